"""Layouts that were measured on this machine, and the calibration that follows from them."""

import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.text import one_line, shorten, to_json
from parallel.planning.hardware import Hardware
from training.report.forecast import COMMUNICATION, COMPUTATION, read_forecast
from training.run import read_result

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
GRACE_S = 20.0
"""Seconds that a run has to end after SIGTERM."""
RATES = ("matmul", "attention_forward", "attention_backward", "wide_matmul")
NOT_MEASURED = "not measured: the budget is used up"


@dataclass
class Measurement:
    """A candidate, and what was measured of it."""

    layout: dict[str, Any]
    """One of the layouts that `training.planning.answer.answer` returned."""
    step_s: float | None = None
    """Median time of a step."""
    peak_bytes: int | None = None
    """Memory of the tensors of the fullest rank."""
    computing_s: float | None = None
    """The part of `step_s` in which rank 0 computes. Known on CPUs only."""
    waiting_s: float | None = None
    problem: str | None = "not measured: interrupted"
    """Why there is no measurement."""

    @property
    def content(self) -> dict[str, Any]:
        """All figures, as values that JSON can hold."""
        layout = self.layout
        return {
            "axes": layout["axes"],
            "accumulation": layout["accumulation"],
            "recompute": layout["recompute"],
            "overrides": layout["overrides"],
            "predicted_step_s": layout["step_s"],
            "predicted_peak_bytes": layout["peak_bytes"],
            "step_s": self.step_s,
            "peak_bytes": self.peak_bytes,
            "problem": self.problem,
        }


def measure(row: Measurement, arguments: Sequence[str], out: Path, deadline: float) -> None:
    """Run `train.py` with these arguments, and fill in what it measured, or why it measured nothing.

    Args:
        arguments: with `run.root=<out>` and a `run.name`.
        deadline: the time (`time.monotonic`) at which the run is ended.

    Raises:
        KeyboardInterrupt: Ctrl-C. The run has ended.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        row.problem = NOT_MEASURED
        return
    name = next(argument.partition("=")[2] for argument in arguments if argument.startswith("run.name="))
    log = out / f"{name}.log"
    with log.open("wb") as file:
        child = subprocess.Popen([sys.executable, str(TRAIN), *arguments], stdout=file, stderr=subprocess.STDOUT)
        try:
            status: int | None = child.wait(left)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(child)
    if status is None:
        row.problem = f"time-out: it did not end within the budget; {log} has its output"
    elif status != 0:
        row.problem = _last_error(log) or f"it ended with status {status}; {log} has its output"
    else:
        _read(row, out / name)


def _end(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _last_error(log: Path) -> str | None:
    """Return the last line of a log that reports an error."""
    lines = read_tail(log).splitlines()
    errors = [line for line in lines if line.startswith(("error:", "RuntimeError", "torch.OutOfMemoryError"))]
    return shorten(one_line(errors[-1]), 300) if errors else None


def read_tail(log: Path, limit: int = 2**16) -> str:
    """Return the last `limit` bytes of a file, as text."""
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - limit))
        return file.read().decode("utf-8", "replace")


def _read(row: Measurement, directory: Path) -> None:
    """Take the figures of a run that has ended."""
    result = read_result(directory)
    if result.get("status") in ("missing", "unreadable"):
        row.problem = f"{directory}: expected a result.json ({result['error']})"
        return
    row.step_s, row.peak_bytes = result.get("real/step_s"), result.get("real/peak_bytes")
    row.problem = None if row.step_s is not None else f"{directory}: expected a measured time in result.json"
    times = read_forecast(directory).get("measured", {}).get("times") or {}
    row.computing_s, row.waiting_s = times.get(COMPUTATION), times.get(COMMUNICATION)


def write_calibration(hardware: Hardware, rows: Sequence[Measurement], out: Path) -> Path | None:
    """Write `hardware.json`, which `calibration=` reads, and return its path. None if nothing was measured.

    All rates of the device are those of `hardware` times one factor: the median ratio of the predicted to the measured
    time of the computation. Where the time that a rank waits is known (on CPUs), the rates of the links are scaled by
    the same ratio of the communication, from layouts without a pipeline. Otherwise the links stay as they are, and the
    time of the computation is the measured step without the predicted communication.
    """
    computing, waiting = [], []
    for row in rows:
        if row.step_s is None:
            continue
        times = row.layout["times"]
        waits = sum(times["exposed"].values())
        computed = row.layout["step_s"] - waits - times["bubble"]
        measured = row.computing_s or row.step_s - waits - times["bubble"]
        if measured > 0:
            computing.append(computed / measured)
        if row.waiting_s and waits and row.layout["axes"]["pipeline"] == 1:
            waiting.append(waits / row.waiting_s)
    if not computing:
        return None
    factor = statistics.median(computing)
    rates = {name: getattr(hardware, name) * factor for name in RATES}
    # A preset has one rate for both passes.
    rates |= dict.fromkeys(("grouped_matmul_forward", "grouped_matmul_backward"), hardware.grouped_matmul * factor)
    rates |= {"copy": hardware.bandwidth * factor, "launch": factor / hardware.launch_s}
    links = statistics.median(waiting) if waiting else None
    if links is not None:
        rates["link"] = hardware.link * links
        rates["link_latency_s"] = hardware.link_latency_s / links
    about = {
        "device": hardware.name,
        "date": time.strftime("%Y-%m-%d"),
        "by": "scripts/tune.py",
        "layouts": len(computing),
        "factor": factor,
        "links_factor": links,
    }
    content = {"rates": {name: rate for name, rate in rates.items() if 0 < rate < math.inf}, "about": about}
    return write_atomically(out / "hardware.json", to_json(content, indent=2) + "\n")
