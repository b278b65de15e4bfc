"""What every stage of `benchmarks/gpu.py` needs: its options, its result file, timing, and the routing of a real run.

A stage is a script. It ends with `raise SystemExit(run_stage(main))`, where `main(stage)` takes a `Stage`.
"""

import itertools
import json
import math
import os
import platform
import statistics
import sys
import textwrap
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.text import to_json
from parallel.startup.launch import world_from_env

if TYPE_CHECKING:
    from parallel.mesh import Mesh
    from training.config import Config

DETAIL_WIDTH = 110
"""Characters of a line of the table that holds the details of a check."""
MAX_ROUNDS = 200
"""The largest number of calls that are timed."""
TRACE_LINES = 6
"""Calls of a traceback that are printed, the innermost ones. The result of a remote run holds few lines."""


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
        first, *rest = textwrap.wrap(detail, DETAIL_WIDTH) or [""]
        self.row(check=name, result="passed" if passed else "FAILED", detail=first)
        for line in rest:
            self.row(check="", result="", detail=line)

    def fits(self, name: str, seconds: float) -> bool:
        """Return whether at least `seconds` remain. If not, add a row that says that `name` was left out."""
        if self.remaining_s >= seconds:
            return True
        self.row(check=name, result="left out", detail=f"{self.remaining_s:.0f} s remained, expected {seconds:.0f}")
        return False

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """Return `action()`. If it raises, add the error as a failed check, and return None.

        Python's reference cycles and the traceback would keep the tensors of a failed action alive, so they are freed.
        """
        try:
            return action()
        except Exception as error:
            traceback.print_exc(limit=-TRACE_LINES)
            self.check(name, False, first_line(error))
        free_memory()
        return None

    @contextmanager
    def timed(self, item: str) -> Iterator[None]:
        """Add a row with the seconds that the statements in the block take."""
        start = time.monotonic()
        try:
            yield
        finally:
            synchronize(self.device)
            self.row(item=item, seconds=round(time.monotonic() - start, 1))

    def run_checks(self, checks: Sequence[tuple[str, Callable[[], Any]]], reserve_s: float = 5.0) -> None:
        """Run named checks in order of importance, each with `attempt`, while at least `reserve_s` seconds are left."""
        for number, (name, action) in enumerate(checks):
            if self.remaining_s < reserve_s:
                self.row(check="left out", result="no time", detail=", ".join(later for later, _ in checks[number:]))
                return
            start, before = time.monotonic(), len(self.rows)
            self.attempt(name, action)
            synchronize(self.device)
            for row in self.rows[before : before + 1]:
                row["seconds"] = f"{time.monotonic() - start:.1f}"
            for row in self.rows[before + 1 :]:
                row["seconds"] = ""
            self.write()

    def keep(self, *files: Path) -> None:
        """Add files to `files.zip` beside the result, which has the files of all stages."""
        with zipfile.ZipFile(self.out.parent / "files.zip", "a", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, file.name)

    def write(self) -> None:
        """Write the result, whole or not at all."""
        temporary = self.out.with_suffix(".part")
        temporary.write_text(to_json({"about": self.about, "rows": self.rows}, indent=1), encoding="utf-8")
        os.replace(temporary, self.out)


class Comparison:
    """One check of many cases. Each compares tensors with a reference, and the check passes if all are within bounds.

    A case that raises fails alone. The result is one row: the case that is closest to its bound, or those that fail.
    """

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage, self.name = stage, name
        self.cases, self.failures, self.worst = 0, [], (-1.0, "no case")

    def case(self, name: str, bound: float, pairs: Callable[[], Iterable[tuple[str, Any, Any]]]) -> None:
        """Compare what `pairs` yields: (name, what was found, what is expected). These are tensors or numbers."""
        self.cases += 1
        try:
            errors = [(self._error(found, expected), part) for part, found, expected in pairs()]
        except Exception as error:
            if not self.failures:
                traceback.print_exc(limit=-TRACE_LINES)
            self.failures.append(f"{name}: {first_line(error)}")
            free_memory()
            return
        error, part = max(errors, key=lambda entry: math.inf if math.isnan(entry[0]) else entry[0])
        shown = f"{name} {part} {error:.1e}"
        if not error <= bound:
            self.failures.append(f"{shown} > {bound:g}")
        self.worst = max(self.worst, (error / bound if bound else 0.0, f"{shown}/{bound:g}"))

    @staticmethod
    def _error(found: Any, expected: Any) -> float:
        found, expected = torch.as_tensor(found), torch.as_tensor(expected)
        if found.shape != expected.shape:
            return math.inf
        if not expected.is_floating_point():
            return float((found.cpu() != expected.cpu()).sum())  # the number of different elements
        size = math.sqrt(expected.numel())
        if expected.detach().double().norm() < 1e-9 * size:  # relative to a gradient of 0, every error is infinite
            return (found.detach().double().norm() / size).item() if size else 0.0
        return relative_error(found, expected)

    def finish(self) -> None:
        """Add the row."""
        passed = self.cases - len(self.failures)
        detail = "; ".join(self.failures[:8]) if self.failures else self.worst[1]
        self.stage.check(self.name, not self.failures, f"{passed}/{self.cases}: {detail}"[:700])


def run_stage(main: Callable[[Stage], None]) -> int:
    """Run `main` with the options on the command line (JSON, from `benchmarks/gpu.py`). Return the exit status."""
    options = json.loads(sys.argv[1])
    # A process group needs the index. Under torchrun, every rank has its own GPU.
    local_rank = world_from_env().local_rank
    device = torch.device("cuda", local_rank) if options["device"] == "cuda" else torch.device("cpu", 0)
    deadline = time.monotonic() + options["end"] - time.time()
    stage = Stage(Path(options["out"]), deadline, device, options["size"] == "tiny")
    stage.about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "start_s": round(time.time() - options["start"], 1),
    }
    stage.write()
    stage.attempt("stage", lambda: main(stage))
    stage.write()
    return 1 if stage.failures else 0


def first_line(error: BaseException) -> str:
    """Return the type and the start of the message of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


@contextmanager
def one_process(device: torch.device) -> "Iterator[Mesh]":
    """Start the process group of one rank, and end it. Yields its mesh."""
    import torch.distributed as dist

    from parallel.mesh import close_process_group, init_process_group, mesh_of_one

    # The machine may have no network, and no name that can be resolved.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    init_process_group(dist.HashStore(), 0, 1, device, 300.0)
    try:
        yield mesh_of_one(device)
    finally:
        close_process_group()


def with_compile(config: "Config", on: bool) -> "Config":
    """Return the configuration of a run whose blocks run through torch.compile or do not."""
    return replace(config, train=replace(config.train, compile=on))


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
    """Return the median time of `call`, measured on the device. The calls follow each other without a wait.

    On a CPU with one thread, this is the time for which the process had the CPU: other processes do not count.
    """
    return statistics.median(times_of(call, device, rounds, warm_up))


def times_of(
    call: Callable[[], Any], device: torch.device, rounds: int = 10, warm_up: int = 3, least_ms: float = 0.0
) -> list[float]:
    """Return the milliseconds of each of several calls, as `milliseconds` measures them.

    Args:
        rounds: number of calls. There are more if they take less than `least_ms` together, but at most `MAX_ROUNDS`.
        warm_up: number of calls before, at least 1.
    """
    for _ in range(warm_up - 1):
        call()
    (last,) = _times_of(call, device, 1)
    wanted = min(MAX_ROUNDS, math.ceil(least_ms / max(last, 1e-3)))
    return _times_of(call, device, max(rounds, wanted))


def _times_of(call: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    if device.type == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        times = [clock()]
        for _ in range(rounds):
            call()
            times.append(clock())
        return [(second - first) * 1e3 for first, second in itertools.pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [first.elapsed_time(second) for first, second in itertools.pairwise(events)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the norm of `expected`, in fp64. NaN if `found` has a NaN."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def zipf_shares(num_experts: int, exponent: float = 0.6) -> Tensor:
    """Return the expected shares of the assignments per expert under a skewed router, largest first, fp64 [E].

    With `skewed_logits`, 8 experts and top-2, the default exponent gives the fullest expert 1.9 times the mean. The
    quickstart's routers have this between steps 120 and 230 (mean over its 4 layers, every 5 steps). In its first 60
    steps they have 2.7 (an exponent of 1.1 gives this), and at step 600 1.4 (an exponent of 0.3).
    """
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
