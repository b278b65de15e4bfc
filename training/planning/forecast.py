"""The prediction of a run's memory and step time, made by a process of low priority beside the run.

    python -m training.planning.forecast < request.json

It traces the step of the rank that needs most memory, in the run's own layout (`training.planning.trace`). The trace
needs a process group of its own, so that a process of the run cannot make it. The result is `forecast.json` in the
run's directory. If there is no result, the file says why under `error`.
"""

import os
import sys

if __name__ == "__main__":  # The run that has started this process can end during the slow imports.
    from parallel.startup.launch import begin_process

    begin_process()

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from common.strict import from_dict
from common.text import finite, first_line, parse_json_object, to_json
from parallel.planning.hardware import Hardware, preset_of_device, read_preset
from training.run import FORECAST_FILE

NICE = 19
"""What is added to the niceness of the process. 19 is the lowest priority."""


@dataclass(frozen=True)
class Device:
    """The device of rank 0."""

    name: str | None = None
    """The name of the GPU as torch reports it; None: a CPU."""
    capability: int = 0
    """Major number of the GPU's compute capability."""
    memory: int = 0
    """Bytes of the GPU."""
    matmul: float = 0.0
    """FLOP/s of a matmul in the compute dtype, measured on the CPU."""
    copy: float = 0.0
    """Bytes/s that a copy reads and writes, measured on the CPU."""


@dataclass(frozen=True)
class Request:
    """What is predicted."""

    directory: str
    """The run's directory."""
    config: dict[str, Any]
    """`to_dict` of the run's configuration, with a vocabulary size and a number for every axis that is traced."""
    plugins: tuple[str, ...]
    """What `load_plugins` was given."""
    world: int
    """Number of ranks."""
    ranks: tuple[int, ...]
    """The ranks that are traced."""
    dtype: str
    """Compute dtype, as in `torch.float32`."""
    trained: float
    """Share of the parameters that train."""
    document: int | None
    """Tokens of a document in the mean; None: each row is one document."""
    device: Device

    def encode(self) -> str:
        """Return the request as JSON."""
        return to_json(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Self:
        """Return the request that `encode` wrote."""
        raw = parse_json_object(text)
        lists = {name: tuple(raw[name]) for name in ("plugins", "ranks")}
        return cls(**raw | lists | {"device": Device(**raw["device"])})


def predict(request: Request) -> dict[str, Any]:
    """Return the prediction as `forecast.json` has it: bytes and seconds, in all and by part.

    Memory is that of the traced rank which needs most, and the time that of the slowest one.
    """
    import torch

    from common.plugins import load_plugins
    from training.config import Config

    load_plugins(request.plugins)
    config = from_dict(Config, request.config)
    dtype = {str(each): each for each in (torch.float64, torch.float32, torch.bfloat16)}[request.dtype]
    hardware, preset, note = hardware_of(request.device, narrow=dtype == torch.bfloat16)
    by_trace = config.engine.kind == "native"
    parts = _traced(request, config, dtype, hardware) if by_trace else _by_formula(request, config, dtype, hardware)
    about = {
        "device": request.device.name or "CPU",
        "preset": preset,
        "hardware_note": note,
        "measured_rates": None if request.device.name else asdict(request.device),
        "rates": {name: value for name, value in asdict(hardware).items() if isinstance(value, int | float)},
        "dtype": request.dtype.removeprefix("torch."),
        "document_tokens": request.document,
        "experts": "balanced",
    }
    return parts | about


def hardware_of(device: Device, *, narrow: bool) -> tuple[Hardware, str, str | None]:
    """Return the device as numbers, the preset that they come from, and a sentence if it is that of another GPU.

    The rates of a CPU are those of the preset `cpu`, scaled by what this machine has measured.

    Args:
        narrow: whether the compute dtype is bf16.
    """
    if device.name is not None:
        preset, note = preset_of_device(device.name, device.capability, device.memory)
        return read_preset(preset), preset, note
    cpu = read_preset("cpu")
    # What is relative to the preset's rate in bf16 is slower in fp32 in the same ratio as matmuls.
    faster = device.matmul / (cpu.matmul if narrow else cpu.wide_matmul)
    grouped = device.matmul / cpu.matmul
    scaled = replace(
        cpu,
        matmul=cpu.matmul * faster,
        wide_matmul=cpu.wide_matmul * faster,
        grouped_matmul=cpu.grouped_matmul * grouped,
        attention_forward=cpu.attention_forward * faster,
        attention_backward=cpu.attention_backward * faster,
        bandwidth=device.copy,
    )
    return scaled, "cpu", None


def _traced(request: Request, config: Any, dtype: Any, hardware: Hardware) -> dict[str, Any]:
    from training.planning.timing import step_times
    from training.planning.trace import Subject, trace_step

    layout = config.parallel.layout(request.world, config.model, config.train.seq_len)
    capability = None if request.device.name is None else request.device.capability
    subjects = [Subject(config, layout, rank, dtype, capability, document=request.document) for rank in request.ranks]
    traces = [trace_step(subject) for subject in subjects]
    times = [
        step_times(trace, layout, config.train.accumulation, config.parallel.schedule, hardware) for trace in traces
    ]
    fullest = max(range(len(traces)), key=lambda index: traces[index].peak)
    trace = traces[fullest]
    return {
        "method": "trace",
        "rank": request.ranks[fullest],
        "peak_bytes": trace.peak,
        "peak_phase": trace.peak_phase,
        "memory": trace.parts,
        "operators": len(trace.operators) * config.train.accumulation // trace.micro_batches,
        **_step(max(times, key=lambda step: step.total)),
    }


def _by_formula(request: Request, config: Any, dtype: Any, hardware: Hardware) -> dict[str, Any]:
    """Return the estimate of `parallel.planning.plan`, with the state that DeepSpeed's stage of ZeRO shards."""
    from parallel.planning.plan import plan
    from parallel.planning.times import estimate_times
    from training.layout import build_workload

    workload = build_workload(config, config.model, itemsize=dtype.itemsize, trained=request.trained)
    layout = config.parallel.layout(request.world, config.model, config.train.seq_len)
    stage = plan(layout, config.parallel, workload).fullest
    shards = [request.world if config.engine.zero_stage >= level else 1 for level in (3, 2, 1)]
    state = zip((stage.weights, stage.gradients, stage.moments), shards, strict=True)
    weights, gradients, moments = (nbytes // ranks for nbytes, ranks in state)
    memory = {
        "weights": weights,
        "gradients": gradients,
        "moments": moments,
        "weights in the compute dtype": stage.casts,
        "activations": stage.activations,
    }
    return {
        "method": "formula",
        "rank": 0,
        "peak_bytes": sum(memory.values()),
        "memory": memory,
        **_step(estimate_times(layout, config.parallel, workload, hardware)),
    }


def _step(times: Any) -> dict[str, Any]:
    parts = {
        "matmuls": times.matmul,
        "attention": times.attention,
        "memory-bound operators": times.memory_bound,
        "update": times.update,
        **{f"communication ({axis})": seconds for axis, seconds in times.exposed.items()},
        "bubble": times.bubble,
    }
    return {"step_s": times.total, "times": {name: seconds for name, seconds in parts.items() if seconds}}


def main() -> None:
    """Read a request from stdin and write `forecast.json`."""
    from common.files import write_atomically

    os.nice(NICE)
    request = Request.decode(sys.stdin.read())
    try:
        content = predict(request)
    except Exception as error:  # The run says that there is no prediction, and goes on.
        content = {"error": f"{type(error).__name__}: {first_line(error)}"}
    write_atomically(Path(request.directory) / FORECAST_FILE, to_json(finite(content), indent=2) + "\n")


if __name__ == "__main__":
    main()
