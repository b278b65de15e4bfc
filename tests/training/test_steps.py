"""Steps that are started before the figures of the step before are read, and clipping inside the optimizer."""

import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from data.batch import Batch
from moe.config import ModelConfig, RouterConfig
from parallel.apply import build_model
from parallel.mesh import mesh_of_one
from training.config import OptimConfig, TelemetryConfig
from training.device import Moment
from training.engine import NativeEngine
from training.interruption import Interruption
from training.step import move_to_device, train_step
from training.steps import Steps

MODEL = ModelConfig(
    dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=12, num_experts=4, top_k=2, vocab_size=20,
    first_k_dense=1, init_std=0.3,
)  # fmt: skip
ROUTER = RouterConfig(kind="sigmoid_topk", bias_update_rate=0.01)
OPTIM = OptimConfig(lr=1e-2, max_grad_norm=0.05)
STEPS = 6


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch(step: int) -> Batch:
    rows = torch.randint(0, 20, (2, 2, 8), generator=torch.Generator().manual_seed(step))
    zeros = torch.zeros(2, 8, dtype=torch.int64)
    return Batch(rows[0], rows[1], torch.arange(8).expand(2, 8), zeros.int(), zeros.byte())


def engine(max_grad_norm: float | None = OPTIM.max_grad_norm) -> NativeEngine:
    mesh = mesh_of_one(torch.device("cpu"))
    model = build_model(MODEL, ROUTER, mesh, compute_dtype=torch.float32, seed=1)
    return NativeEngine([model], OptimConfig(lr=1e-2, max_grad_norm=max_grad_norm), mesh)


def state(engine: NativeEngine) -> dict[str, torch.Tensor]:
    tensors = {name: getattr(value, "local", value).detach().clone() for name, value in engine.tensors().items()}
    steps = {f"step.{number}": state["step"] for number, state in enumerate(engine.optimizer.state.values())}
    return tensors | {name: step.clone() for name, step in steps.items()} | {"updates": torch.tensor(engine.updates)}


def spoil(engine: NativeEngine) -> None:
    """Make one gradient of the next step infinite."""
    backward = engine.backward

    def spoiled(loss: torch.Tensor) -> None:
        engine.backward = backward  # type: ignore[method-assign]
        backward(loss)
        engine.parts[0].norm.weight.grad[3] = math.inf

    engine.backward = spoiled  # type: ignore[method-assign]


@pytest.mark.parametrize("bound", [OPTIM.max_grad_norm, 1e3, None])
def test_clipping_inside_the_optimizer_equals_clipping_before_it(bound):
    on_host, on_device = engine(bound), engine(bound)
    assert not on_host.updates_on_device
    on_device.updates_on_device = True
    for step in range(STEPS):
        if step == 2:
            before = state(on_host), state(on_device)
            for spoiled in (on_host, on_device):
                spoil(spoiled)
        results = [train_step(e, [batch(step)], ROUTER, 1e-2) for e in (on_host, on_device)]
        assert math.isfinite(results[0].grad_norm) == math.isfinite(results[1].grad_norm) == (step != 2)
        if step == 2:
            for old, new in zip(before, (state(on_host), state(on_device)), strict=True):
                torch.testing.assert_close(new, old, rtol=0, atol=0)
        else:
            assert results[0].grad_norm > OPTIM.max_grad_norm
    assert on_host.updates == on_device.updates == STEPS - 1
    torch.testing.assert_close(state(on_device), state(on_host), rtol=1e-5, atol=1.5e-8 * STEPS)


class Rows:
    """A loader whose steps take one second each."""

    def __init__(self, clock: list[float], broken: int = STEPS) -> None:
        self.clock, self.broken, self.done = clock, broken, 0

    def next_step(self) -> list[Batch]:
        if self.done == self.broken:
            raise OSError("the disk is gone")
        self.done += 1
        self.clock[0] += 1
        return [batch(self.done)]

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def config() -> SimpleNamespace:
    return SimpleNamespace(
        train=SimpleNamespace(steps=STEPS),
        run=SimpleNamespace(seed=0),
        model=MODEL,
        router=ROUTER,
        optim=OPTIM,
        telemetry=TelemetryConfig(every=4),
    )


def run(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> list:
    """All steps, with a pause of 100 seconds after the third one."""
    clock = [0.0]
    monkeypatch.setattr("training.device.time.monotonic", lambda: clock[0])
    rows, found = Rows(clock), []
    trained = engine()
    for step in Steps(trained, rows, config(), 0, ahead=ahead, pauses_after=lambda done: done == 3):
        if step.done == 3:
            assert rows.done == trained.updates == 3
            clock[0] += 100
        started = min(step.done + 2, 3 if step.done < 3 else STEPS) if ahead else step.done
        assert rows.done == (3 if step.done == 3 else started), step.done
        assert (step.result.norms_2LF is not None) == (step.done in (4, STEPS))
        tensors = {name: value.tolist() for name, value in step.result._asdict().items() if torch.is_tensor(value)}
        found.append(step._replace(seconds=0, own_seconds=0, result=step.result._replace(**tensors)))
        found[-1] = (found[-1], step.seconds)
    assert sum(seconds for _, seconds in found) == STEPS
    if not ahead:
        assert [seconds for _, seconds in found] == [1] * STEPS
    return [step for step, _ in found]


def test_steps_ahead_give_the_results_of_steps_one_by_one(monkeypatch):
    ahead = run(True, monkeypatch)
    assert [step.done for step in ahead] == [1, 2, 3, 4, 5, 6]
    assert ahead == run(False, monkeypatch)


@pytest.mark.parametrize("ahead", [True, False])
def test_the_caller_gets_every_step_before_one_that_fails(ahead):
    done = []
    steps = Steps(engine(), Rows([0.0], broken=4), config(), 0, ahead=ahead, pauses_after=lambda done: False)
    with pytest.raises(OSError, match="the disk is gone"):
        done.extend(step.done for step in steps)
    assert done == [1, 2, 3, 4]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_steps_after_the_one_that_runs(ahead: bool, number: signal.Signals) -> None:
    before, done, rows = signal.getsignal(number), [], Rows([0.0])
    with Interruption() as interruption:
        steps = Steps(
            engine(), rows, config(), 0, ahead=ahead, pauses_after=lambda done: False, interruption=interruption
        )
        for step in steps:
            done.append(step.done)
            if step.done == 2:
                os.kill(os.getpid(), number)
    # With a device, the step after the one that is yielded has been started.
    last = 4 if ahead else 2
    assert done == list(range(1, last + 1)) and steps.done == rows.done == last
    assert interruption.agreed == number and signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_a_single_process_and_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption, pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.flags() == [0, 0, 0, 0]
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.flags() == [0, 1, 0, 0]
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


LOSES_A_RANK = """
import os, signal, subprocess, sys, time
import training.interruption as module

os.environ["RANK"] = "0"
module.REPORT_S = float(sys.argv[1])
rank = subprocess.Popen(["true"])
rank.wait()
try:
    with module.Interruption([rank.pid]):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2 if sys.argv[2] == "fails" else 60)
        raise RuntimeError
except RuntimeError:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    print("reported")
"""


@pytest.mark.parametrize(("report_s", "step", "end"), [(30, "fails", (0, "reported\n")), (0.1, "waits", (143, ""))])
def test_a_rank_that_loses_another_one_has_time_to_report_it(report_s: float, step: str, end: tuple[int, str]) -> None:
    command = [sys.executable, "-c", LOSES_A_RANK, str(report_s), step]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=50)
    assert (process.returncode, process.stdout) == end


@pytest.mark.parametrize(("device", "context", "known"), [("cuda", 1, True), ("cuda", 2, False), ("cpu", 1, False)])
def test_gpus_get_the_segments_of_whole_rows(
    device: str, context: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batch, "to", lambda self, device: self)
    monkeypatch.setattr("training.step.segments_of", lambda documents_BS, device: (documents_BS, device))
    layout = SimpleNamespace(context=context, pieces=context, pieces_of=lambda rank: [rank])
    mesh: Any = SimpleNamespace(device=torch.device(device), layout=layout, context=SimpleNamespace(rank=lambda: 0))
    rows = batch(0)
    inputs, _ = move_to_device(rows, mesh)
    assert inputs.segments == ((rows.documents_BS, mesh.device) if known else None)


class DeviceEvent:
    """A CUDA event of a device whose clock only advances by its own work, here in milliseconds."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.at = DeviceEvent.now

    def elapsed_time(self, later: "DeviceEvent") -> float:
        return later.at - self.at


def test_a_moment_on_a_gpu_is_one_of_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", DeviceEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    host = iter([0.0, 10.0, 10.1])  # The host is late for the first step, and on time for the second one.
    monkeypatch.setattr("training.device.time.monotonic", lambda: next(host))
    moments = []
    for now in (5.0, 155.0, 305.0):
        monkeypatch.setattr(DeviceEvent, "now", now)
        moments.append(Moment(torch.device("cuda")))
    assert [later.seconds_since(earlier) for earlier, later in itertools.pairwise(moments)] == [0.15, 0.15]
