"""Stage `train`: a real run of a 1.3 B-parameter mixture by `train.py`, as a user starts it.

The text is Python code of the standard library, of installed packages and of this repository: one domain each. The
number of steps is chosen to fit the time. The run trains its own tokenizer, evaluates at its end, and writes no
checkpoint. Its metrics, plots and profile go into `files.zip`.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from stage import Stage, run_stage

ROOT = Path(__file__).resolve().parents[2]
DOMAIN_BYTES = {"stdlib": 8_000_000, "torch": 7_000_000, "transformers": 7_000_000, "mixwright": 3_000_000}
"""Domain -> the most bytes of it."""
TINY_BYTES = 300_000
START_S, END_S, STEP_S = 75.0, 15.0, 0.25
"""Estimated seconds before the first step, after the last, and of a step. They decide the number of steps."""
STEPS = (60, 400)
"""The least and the largest number of steps."""
MODEL = {
    "dim": 1024, "num_layers": 12, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "hidden_dim": 1024,
    "num_experts": 32, "top_k": 4, "sliding_window": "null",
}  # fmt: skip
TINY_MODEL = {"dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "hidden_dim": 32}
FILES = ("metrics.jsonl", "overview.png", "curves.png", "expert_load.png", "profile.md", "result.json", "log.txt")


def copy_text(target: Path, *, tiny: bool) -> dict[str, int]:
    """Copy Python files to a folder per domain, up to its limit. Return the bytes of each domain."""
    sources = {"stdlib": Path(sysconfig.get_path("stdlib")), "mixwright": ROOT}
    for package in ("torch", "transformers"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            sources[package] = Path(spec.origin).parent
    sizes = {}
    for domain, source in sources.items():
        limit, size = TINY_BYTES if tiny else DOMAIN_BYTES[domain], 0
        (target / domain).mkdir(parents=True)
        for number, path in enumerate(sorted(source.rglob("*.py"))):
            hidden = any(part.startswith(".") or part == "site-packages" for part in path.relative_to(source).parts)
            if hidden or not path.is_file():
                continue
            content = path.read_bytes()
            try:
                content.decode()
            except UnicodeDecodeError:
                continue
            if 200 < len(content) < 500_000 and size < limit:
                size += len(content)
                (target / domain / f"{number}.txt").write_bytes(content)
        sizes[domain] = size
    return sizes


def command(stage: Stage, text: Path, runs: Path, steps: int) -> list[str]:
    """Return the command line of the run."""
    model = MODEL | (TINY_MODEL if stage.tiny else {})
    overrides = {
        **{f"model.{key}": value for key, value in model.items()},
        "data.paths": f"[{text}]",
        "data.cache": runs / "cache",
        "data.vocab_size": 512 if stage.tiny else 16_384,
        "train.device": stage.device.type,
        "train.steps": steps,
        "train.seq_len": 64 if stage.tiny else 2048,
        "train.global_batch": 4 if stage.tiny else 16,
        "train.log_every": 2 if stage.tiny else 5,
        "train.profile": "true",
        "optim.lr": 3e-3 if stage.tiny else 6e-4,
        "checkpoint.at_end": "false",
        "run.root": runs,
        "run.name": "run",
    }
    groups = ["model=small", "data=files", "tracking=disabled"]
    return [sys.executable, str(ROOT / "train.py"), *groups, *(f"{key}={value}" for key, value in overrides.items())]


def run(arguments: list[str], log: Path, timeout: float) -> int | None:
    """Run a command with its output in a file. Return its exit status, or None if the time was over."""
    # The machine may have no network, and no name that can be resolved.
    defaults = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **defaults, **os.environ}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            arguments, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def report(stage: Stage, directory: Path) -> None:
    """Add rows with the metrics over the run and with the held-out results."""
    metrics = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    chosen = {round(index * (len(rows) - 1) / 15) for index in range(16)} if rows else set()
    for index in sorted(chosen):
        row: dict[str, Any] = rows[index]
        stage.row(
            step=row["step"],
            loss=row["train/loss"],
            ce=row["train/ce"],
            max_vio=row.get("router/max_vio"),
            grad_norm=row["optim/grad_norm"],
            tokens_per_s=row["speed/tokens_per_s"],
            mfu=row.get("speed/mfu"),
        )
    if rows:
        fell = rows[0]["train/ce"] - rows[-1]["train/ce"]
        stage.check("the loss falls", fell > (0.01 if stage.tiny else 1.0), f"by {fell:.2f} nats")
    result_file = directory / "result.json"
    if result_file.exists():
        result = json.loads(result_file.read_text())
        baselines = result["baselines"]
        for key, value in result.items():
            if key.startswith("eval/bits_per_byte/"):
                domain = key.removeprefix("eval/bits_per_byte/")
                gzip_bits = (baselines.get(domain) or {}).get("gzip_bits_per_byte")
                stage.row(domain=domain, bits_per_byte=value, gzip_bits_per_byte=gzip_bits)
        names = ("eval/loss", "total_params", "active_params", "speed/tokens_per_s", "wall_s")
        stage.row(**{name: result[name] for name in names}, mfu_of_last_rows=_mean_mfu(rows))


def _mean_mfu(rows: list[dict[str, Any]]) -> float | None:
    """Return the mean of the second half of the run."""
    values = [row["speed/mfu"] for row in rows[len(rows) // 2 :] if row.get("speed/mfu") is not None]
    return sum(values) / len(values) if values else None


def main(stage: Stage) -> None:
    """Copy the text, run, report."""
    if importlib.util.find_spec("hydra") is None:
        stage.check("packages of train.py", False, "hydra is not installed: see benchmarks/gpu_wheels.sh")
        return
    with tempfile.TemporaryDirectory() as folder:
        text, runs, log = Path(folder) / "text", Path(folder) / "runs", Path(folder) / "log.txt"
        sizes = copy_text(text, tiny=stage.tiny)
        steps = 12 if stage.tiny else int((stage.remaining_s - START_S - END_S) / STEP_S)
        steps = steps if stage.tiny else min(max(steps, STEPS[0]), STEPS[1])
        stage.about |= {"text": sizes, "steps": steps}
        start = time.monotonic()
        status = run(command(stage, text, runs, steps), log, max(10.0, stage.remaining_s - 3))
        directory = runs / "run"
        report(stage, directory)
        lines = log.read_text(errors="replace").splitlines()
        passed = status == 0
        stage.check("train.py", passed, f"{time.monotonic() - start:.0f} s, exit status {status}")
        if not passed:
            print("\n".join(lines[-25:]), flush=True)
        shutil.copy(log, directory / "log.txt") if directory.exists() else None
        stage.keep(*(directory / name for name in FILES if (directory / name).exists()))


if __name__ == "__main__":
    raise SystemExit(run_stage(main))
