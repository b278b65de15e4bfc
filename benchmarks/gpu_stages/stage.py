"""What every stage of `benchmarks/gpu.py` needs: its options, its result file, timing, and the routing of a real run.

A stage is a script. It ends with `raise SystemExit(run_stage(main))`, where `main(stage)` takes a `Stage`.
"""

import itertools
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Stage:
    """The options and the result of one stage."""

    out: Path
    """The JSON file of the result."""
    deadline: float
    """The value of `time.monotonic()` at which the stage should end."""
    device: torch.device
    tiny: bool
    """Whether to use small sizes, which check the stage itself."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    failures: int = 0

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def row(self, **columns: Any) -> None:
        """Add a row to the result and write the file."""
        self.rows.append(columns)
        self.write()

    def check(self, name: str, passed: bool, detail: str = "") -> None:
        """Add the result of a check. A check that failed makes the stage fail."""
        self.failures += not passed
        self.row(check=name, result="passed" if passed else "FAILED", detail=detail)

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """Return `action()`. If it raises, add the error as a failed check, and return None.

        Python's reference cycles and the traceback would keep the tensors of a failed action alive, so they are freed.
        """
        try:
            return action()
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            self.check(name, False, message)
        free_memory()
        return None

    def write(self) -> None:
        """Write the result, whole or not at all."""
        temporary = self.out.with_suffix(".part")
        temporary.write_text(json.dumps({"about": self.about, "rows": self.rows}, indent=1), encoding="utf-8")
        os.replace(temporary, self.out)


def run_stage(main: Callable[[Stage], None]) -> int:
    """Run `main` with the options on the command line (JSON, from `benchmarks/gpu.py`). Return the exit status."""
    options = json.loads(sys.argv[1])
    device = torch.device(options["device"])
    deadline = time.monotonic() + options["seconds"]
    stage = Stage(Path(options["out"]), deadline, device, options["size"] == "tiny")
    stage.about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    stage.write()
    stage.attempt("stage", lambda: main(stage))
    stage.write()
    return 1 if stage.failures else 0


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> None:
    """Return unused memory of the GPU to the driver."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def milliseconds(call: Callable[[], Any], device: torch.device, rounds: int = 10, warm_up: int = 3) -> float:
    """Return the median time of `call`, measured on the device. The calls follow each other without a wait."""
    for _ in range(warm_up):
        call()
    if device.type == "cpu":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return statistics.median(first.elapsed_time(second) for first, second in itertools.pairwise(events))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the norm of `expected`, in fp64. NaN if `found` has a NaN."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def zipf_shares(num_experts: int, exponent: float = 0.6) -> Tensor:
    """Return the expected shares of the assignments per expert under a skewed router, largest first, fp64 [E]."""
    shares = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -exponent
    return shares / shares.sum()


def skewed_logits(tokens: int, num_experts: int, seed: int = 0, shares: Sequence[float] | None = None) -> Tensor:
    """Return router logits [T, E], fp32, whose top-k choices have about the given shares (the Gumbel-top-k trick).

    Args:
        shares: expected share of each expert; None: those of `zipf_shares` in a random order.
    """
    generator = torch.Generator().manual_seed(seed)
    if shares is None:
        shares_E = zipf_shares(num_experts)[torch.randperm(num_experts, generator=generator)]
    else:
        shares_E = torch.tensor(shares, dtype=torch.float64)
    uniform_TE = torch.rand(tokens, num_experts, generator=generator).clamp(1e-7, 1 - 1e-7)
    return shares_E.log().float() - (-uniform_TE.log()).log()


def balanced_experts(tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Tensor:
    """Return experts [T, K] such that all experts have the same number of assignments up to one, int64."""
    generator = torch.Generator().manual_seed(seed)
    start_T1 = torch.randperm(tokens, generator=generator).unsqueeze(1) * top_k
    return (start_T1 + torch.arange(top_k)) % num_experts
