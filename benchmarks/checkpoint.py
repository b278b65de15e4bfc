"""How long training waits for a checkpoint: saved at once, and in the background.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py                  # 300 MB on the CPU
    python benchmarks/checkpoint.py --device cuda --megabytes 4000 --directory /data

After each save this process multiplies matrices, as training does meanwhile. `without` is the time of the same matmuls
while no checkpoint is written. `until complete` includes reading the checkpoint before, to verify it. Times are medians
over the rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

if __name__ in ("__main__", "__mp_main__"):
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.checkpoint.peers import ALONE
from training.checkpoint.saver import Saver
from training.config import CheckpointConfig
from training.device import pick_device

TENSORS = 30


def multiply(matrix: torch.Tensor, times: int) -> float:
    """Multiply `matrix` with itself, and return the seconds."""
    start = time.perf_counter()
    for _ in range(times):
        matrix @ matrix
    if matrix.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--directory", type=Path, help="where the checkpoints are written; default: temporary files")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = pick_device(options.device, 0, 1)
    elements = options.megabytes * 10**6 // 4 // TENSORS
    tensors = {f"w{number}": torch.randn(elements, device=device) for number in range(TENSORS)}
    matrix = torch.randn(1024, 1024, device=device)
    multiply(matrix, 3)
    times = max(1, int(1.0 / (multiply(matrix, 10) / 10)))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, {options.megabytes} MB in {TENSORS} tensors")
    measured: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for mode in ("at once", "background"):
            config = CheckpointConfig(background=mode == "background")
            columns = measured.setdefault(mode, {"stall": [], "whole": [], "matmuls": [], "without": []})
            with Saver(Path(directory) / mode, config, ALONE, None, lambda line: None) as saver:
                saver.prepare(lambda: tensors)
                for step in range(options.rounds):
                    columns["without"].append(multiply(matrix, times))
                    saver.save(step, lambda: tensors, {"step": step})
                    columns["matmuls"].append(multiply(matrix, times))
                    saver.finish()
                    figures = saver.take_figures()
                    columns["stall"].append(figures["speed/checkpoint_stall_s"])
                    columns["whole"].append(figures["speed/checkpoint_s"])
    print("seconds           training waits   until complete   matmuls after it   without")
    for mode, columns in measured.items():
        stall, whole, matmuls, without = (statistics.median(values) for values in columns.values())
        print(f"  {mode:<15} {stall:14.3f} {whole:16.3f} {matmuls:18.3f} {without:9.3f}")


if __name__ == "__main__":
    main()
