"""What a run needs and how long its steps take, compared with a prediction that a process beside the run makes.

Rank 0 starts the process (`training.planning.forecast`) before the first step. Every rank measures the memory of one
step. At the end of the run, rank 0 puts the prediction and the measurement together.
"""

import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import torch

from common.files import write_atomically
from common.plugins import given_plugins
from common.strict import to_dict
from common.text import finite, to_json
from moe.region import LocalShard
from parallel.collectives import all_gather_json
from parallel.startup.launch import LAUNCHER_PID, ROOT
from training.agree import AgreedRun
from training.config import Config
from training.device import Process
from training.engine import Engine
from training.planning.forecast import Device, Request
from training.planning.peak import AllocatorPeak
from training.report.forecast import COMMUNICATION, COMPUTATION, read_forecast
from training.report.profile import TRACED_STEPS, WAIT_STEPS, WARM_UP_STEPS
from training.run import FORECAST_FILE, FORECAST_STEPS
from training.steps import FinishedStep
from training.trainable import persistent_buffers

MEASURED_STEP = 4
"""The step whose memory is measured. The optimizer's state exists, and blocks are compiled, after the first ones."""
RECENT = 1000
"""The time of a step is the median of up to this many last steps."""
MATMUL_SIZE, COPIED_BYTES, REPEATS = 512, 2**25, 3
"""Rows and columns of the matmul, and bytes of the copy, that measure a CPU, and how often: the fastest one counts."""


class Forecast:
    """A context manager around the training loop. Every rank of a run has one.

    Args:
        first_step: the step after which this process starts.
    """

    def __init__(self, run: AgreedRun, process: Process, engine: Engine, first_step: int) -> None:
        self.run, self.process, self.engine = run, process, engine
        self.active = run.config.telemetry.forecast and run.config.train.steps - first_step >= FORECAST_STEPS
        self.is_native = run.config.engine.kind == "native"
        profiled = WAIT_STEPS + WARM_UP_STEPS + TRACED_STEPS + 1
        self.measured_step = profiled if run.config.train.profile else MEASURED_STEP
        """Torch cannot profile a step twice, so that the memory is measured after the steps that `train.profile`
        traces."""
        self._child: subprocess.Popen[str] | None = None
        self._started = self._finished = 0
        self._peak: int | None = None
        self._load: float | None = None
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._waiting: deque[float] = deque(maxlen=RECENT)
        self._cpu_s: deque[float] = deque(maxlen=RECENT)

    def __enter__(self) -> Self:
        if self.active and self.process.is_main:
            with suppress(OSError):
                (self.run.directory / FORECAST_FILE).unlink(missing_ok=True)  # that of an earlier launch
            with suppress(OSError):
                self._child = start(request_of(self.run, self.process))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Measure the memory of the step that is computed, or queued, in the context, if it is the one to measure."""
        self._started += 1
        if not self.active or self._started != self.measured_step:
            start_s = time.process_time()
            yield
            self._cpu_s.append(time.process_time() - start_s)
            return
        if self.process.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.process.device)  # `step` reads it after the last step.
            yield
            return
        if not self.is_native:  # DeepSpeed has buffers that are no tensors of the engine's.
            yield
            return
        state = state_bytes(self.engine)
        with AllocatorPeak(self.process.device) as peak:
            yield
        self._peak = state["weights"] + state["moments"] + peak.above

    def step(self, step: FinishedStep, load: float | None) -> None:
        """Count a finished step.

        Args:
            load: `router/rank_load_max` of the step.
        """
        self._finished += 1
        if self.active and self._finished == self.measured_step:
            self._load = load
        if self.active and self._finished > self.measured_step:
            self._seconds.append(step.seconds)
            self._waiting.append(max(0.0, step.seconds - step.own_seconds))
            if self.process.device.type == "cuda" and step.done == self.run.config.train.steps:
                self._peak = torch.cuda.max_memory_allocated(self.process.device)

    def measure(self) -> dict[str, Any]:
        """Return the figures of all ranks: the largest memory, and the median time of a step. Collective."""
        if not self.active:
            return {}
        # DeepSpeed would gather the tensors.
        memory = state_bytes(self.engine) if self.is_native else {}
        own = {"rank": self.process.world.rank, "peak_bytes": self._peak, "memory": memory}
        ranks = all_gather_json(own, self.engine.mesh.world)
        fullest = max(ranks, key=lambda rank: rank["peak_bytes"] or 0)
        step_s = statistics.median(self._seconds) if self._seconds else None
        times, cpu_s = {}, None
        if step_s is not None and self.process.device.type == "cpu":  # The host does not wait for each step of a GPU.
            waiting = statistics.median(self._waiting)
            times = {COMPUTATION: max(0.0, step_s - waiting), COMMUNICATION: waiting}
            cpu_s = statistics.median(self._cpu_s)
        return fullest | {
            "step_s": step_s,
            "steps": len(self._seconds),
            "times": times,
            "cpu_s": cpu_s,
            "rank_load_max": self._load,
        }

    def finish(self, measured: dict[str, Any]) -> dict[str, Any]:
        """End the process, and return the content of `forecast.json`, with what `measure` returned. On rank 0.

        Raises:
            OSError: the file cannot be written.
        """
        if not self.active:
            return {}
        ended = None if self._child is None else self._child.poll()
        self.__exit__(None, None, None)
        content = read_forecast(self.run.directory)
        if not content:
            failed = "it could not be started" if self._child is None else f"it ended with status {ended}"
            working = self._child is not None and ended is None
            content = {"error": "not ready when the run ended" if working else failed}
        content["measured"] = measured
        write_atomically(self.run.directory / FORECAST_FILE, to_json(finite(content), indent=2) + "\n")
        return content


def request_of(run: AgreedRun, process: Process) -> Request:
    """Return what is predicted for a run. On a CPU, this takes some milliseconds, in which the CPU is measured."""
    config: Config = run.config
    plan, stages = run.plan, run.plan.stages
    fullest = stages.index(plan.fullest) * (plan.layout.world // plan.layout.pipeline)
    rows = run.tokens.summary()
    document = sum(row["tokens"] for row in rows) // max(1, sum(row["documents"] for row in rows))
    whole = config.data.cross_documents or document >= config.train.seq_len
    return Request(
        directory=str(run.directory.resolve()),
        config=to_dict(config) | {"model": to_dict(run.model)},
        plugins=given_plugins(),
        world=process.world.world_size,
        ranks=tuple(dict.fromkeys((0, fullest))),
        dtype=str(process.dtype),
        trained=run.trained_parameters / run.counts.total,
        document=None if whole else max(1, document),
        device=describe(process.device, process.dtype),
    )


def describe(device: torch.device, dtype: torch.dtype) -> Device:
    """Return what is known of a device: the name of a GPU, the speed of a CPU."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return Device(about.name, about.major, about.total_memory)
    factor = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)
    product = torch.empty_like(factor)
    source = torch.zeros(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    matmul_s = _fastest(lambda: torch.mm(factor, factor, out=product))
    copy_s = _fastest(lambda: target.copy_(source))
    return Device(matmul=2 * MATMUL_SIZE**3 / matmul_s, copy=2 * COPIED_BYTES / copy_s)


def _fastest(run: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of some calls. The first call is not counted."""
    run()
    times = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return min(times)


def start(request: Request) -> subprocess.Popen[str]:
    """Start the process that predicts. It prints nothing, has one thread, uses no GPU, and ends with this process.

    Raises:
        OSError: no process can be started.
    """
    variables = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "", LAUNCHER_PID: str(os.getpid())}
    child = subprocess.Popen(
        [sys.executable, "-m", "training.planning.forecast"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=variables | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1") | own,
        text=True,
    )
    assert child.stdin is not None
    with child.stdin as stdin:
        stdin.write(request.encode())
    return child


OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which a launcher makes a process a rank."""


def state_bytes(engine: Engine) -> dict[str, int]:
    """Return the bytes of the weights (with buffers) and of the moments that this rank stores."""
    found = {"weights": 0, "moments": 0}
    for part in engine.parts:
        found["weights"] += sum(part.local_shard(name, weight).local.nbytes for name, weight in part.named_parameters())
        found["weights"] += sum(buffer.nbytes for buffer in persistent_buffers(part).values())
    for name, tensor in engine.tensors().items():
        if not name.startswith("model."):
            found["moments"] += (tensor.local if isinstance(tensor, LocalShard) else tensor).nbytes
    return found
