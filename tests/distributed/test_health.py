"""What ranks find out together about a step that has gone wrong."""

import math
import socket
import statistics
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import TrainingFailure
from moe.config import ModelConfig, RouterConfig
from parallel.apply import build_model
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.waiting import WaitingClock
from tests.distributed.harness import run_ranks
from training.config import HealthConfig, OptimConfig, TelemetryConfig
from training.engine import NativeEngine
from training.health import STEPS, Finding, Health, RefusedSteps, SlowRanks, slow_ranks
from training.links import Link, SlowLinks, best_times, slow_links
from training.parity.trial import micro_batches_of_rank, rows_of_step
from training.recheck import recheck
from training.replicas import ReplicaCheck, describe, fingerprint
from training.report.alarms import Alarm
from training.step import prepare_step, start_step
from training.steps import FinishedStep, Steps

MODEL = ModelConfig(
    dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, hidden_dim=24, num_experts=4, top_k=2, vocab_size=64,
)  # fmt: skip
ROUTER = RouterConfig()
LAYOUTS = {
    "replicate": Layout(replicate=2),
    "expert": Layout(replicate=2, expert=2),
    "tensor": Layout(tensor=2),
    "shard": Layout(shard=2),
}


def engine_of(layout: Layout) -> NativeEngine:
    mesh = build_mesh(torch.device("cpu"), layout)
    return NativeEngine(
        [build_model(MODEL, ROUTER, mesh, compute_dtype=torch.float32, seed=1)], OptimConfig(lr=1e-2), mesh
    )


def step(engine: NativeEngine, done: int) -> FinishedStep:
    layout = engine.mesh.layout
    batches = micro_batches_of_rank(rows_of_step(done, 8), layout.data_rank(engine.mesh.rank), layout.data)
    pending = start_step(engine, prepare_step(engine, batches, ROUTER), ROUTER, 1e-2)
    result = pending.read()
    nonfinite = () if math.isfinite(result.grad_norm) else tuple(pending.nonfinite_gradients())
    return FinishedStep(done, 1e-2, result, 1.0, nonfinite=nonfinite)


def refusals(layout: Layout) -> list[Any]:
    """Three steps, in the second of which one gradient of rank 1 is NaN before gradients are summed over ranks."""
    engine = engine_of(layout)
    health, found = RefusedSteps(HealthConfig(), engine.mesh), []
    backward = engine.backward

    def spoiled(loss: torch.Tensor) -> None:
        backward(loss)
        if engine.mesh.rank == 1:
            engine.parameters["layers.1.ffn.router.weight"].grad[0, 3] = math.nan  # type: ignore[index]

    for done in (1, 2, 3):
        engine.backward = spoiled if done == 2 else backward  # type: ignore[method-assign]
        found.append(tuple(health.check(step(engine, done))))
    return [*found, engine.updates]


class Rows:
    """A loader that sleeps before each step on rank 1."""

    def __init__(self, engine: NativeEngine) -> None:
        self.mesh, self.step = engine.mesh, 0

    def next_step(self) -> list[Any]:
        time.sleep(0.25 * self.mesh.rank)
        self.step += 1
        layout = self.mesh.layout
        return micro_batches_of_rank(rows_of_step(self.step, 8), layout.data_rank(self.mesh.rank), layout.data)

    def state_dict(self) -> dict[str, int]:
        return {"rows": self.step}


def times(layout: Layout) -> tuple[list[Any], list[float], list[float]]:
    engine = engine_of(layout)
    train = SimpleNamespace(steps=STEPS)
    config = SimpleNamespace(
        train=train,
        run=SimpleNamespace(seed=0),
        router=ROUTER,
        optim=OptimConfig(lr=1e-2),
        telemetry=TelemetryConfig(every=0),
    )
    health = SlowRanks(engine.mesh)
    with WaitingClock() as clock:
        steps = Steps(
            engine,
            Rows(engine),
            config,
            0,
            ahead=False,
            pauses_after=bool,
            waited=lambda: clock.seconds,  # type: ignore[arg-type]
        )
        done = list(steps)
    assert dist.Work.wait is not None and dist.Work.wait.__qualname__ != "WaitingClock.__enter__.<locals>.wait"
    found = [tuple(health.check(step)) for step in done]
    return found, [step.own_seconds for step in done], [step.seconds for step in done]


def divergences(layout: Layout) -> dict[str, str]:
    """What is found after a step, and after rank 1 has changed one element of a tensor that it stores."""
    engine = engine_of(layout)
    step(engine, 1)
    check = ReplicaCheck(engine)
    check.compare(1)
    found = {}
    for name, (tensor, group) in engine.replicas().items():
        if group.size() > 1 and any(part in name for part in ("wq", "attention_norm", "w_up", "router", "bias")):
            before = tensor.flatten()[1].item()
            tensor.view(-1)[1] += 0.5 * engine.mesh.rank
            with pytest.raises(TrainingFailure) as error:
                check.compare(2)
            found[name] = str(error.value)
            tensor.view(-1)[1] = before
    check.compare(3)
    return found


def rechecks(layout: Layout) -> list[Any]:
    """Whether a step is the same after it was computed twice, and what is found if rank 1 computes wrongly once."""
    engine, reference = engine_of(layout), engine_of(layout)
    batches = micro_batches_of_rank(rows_of_step(1, 8), layout.data_rank(engine.mesh.rank), layout.data)
    recheck(engine, prepare_step(engine, batches, ROUTER), ROUTER, 0)
    same = step(engine, 1).result.grad_norm == step(reference, 1).result.grad_norm
    backward = engine.backward

    def flipped(loss: torch.Tensor) -> None:
        engine.backward = backward  # type: ignore[method-assign]
        backward(loss)
        if engine.mesh.rank == 1:
            engine.parts[0].get_parameter("layers.1.ffn.router.weight").grad[0, 3] *= 1 + 2**-20  # type: ignore[index]

    engine.backward = flipped  # type: ignore[method-assign]
    with pytest.raises(TrainingFailure) as error:
        recheck(engine, prepare_step(engine, batches, ROUTER), ROUTER, 1)
    return [same, str(error.value), engine.updates]


def network(layout: Layout) -> list[Any]:
    """What is found in six measurements of two hosts. From the third to the fifth, rank 0 takes long to send."""
    engine = engine_of(layout)
    found, measured, checks = SlowLinks(engine.mesh, (0, 1), 60.0), SlowLinks._measure, []
    for number in range(1, 7):
        there = 0.25 if 3 <= number <= 5 else 0.01

        def timed(links: SlowLinks, there: float = there) -> dict[Link, float]:
            times = measured(links)
            assert list(times) == [(0, 1), (1, 0)] and min(times.values()) > 0
            return {Link(0, 1): there, Link(1, 0): 0.01}

        found._measure = partial(timed, found)  # type: ignore[method-assign]
        checks.append(found.check(10 * number, 10))
    return [*checks, SlowLinks(engine.mesh, (0,), 60.0).check(10, 10)]


def jobs(rank: int, world_size: int) -> dict[str, Any]:
    return {name: refusals(layout) for name, layout in LAYOUTS.items()} | {
        "times": times(LAYOUTS["expert"]),
        "network": network(LAYOUTS["expert"]),
        "rechecks": {name: rechecks(layout) for name, layout in LAYOUTS.items()},
        "divergences": {name: divergences(layout) for name, layout in LAYOUTS.items()},
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(jobs, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rank_and_the_parameter_are_named(results: list[dict[str, Any]], layout: str) -> None:
    first, second = (result[layout] for result in results)
    assert first == second
    fine, refused, after, updates = first
    assert fine == after == tuple(Finding()) and updates == 2
    (line,), row, _, _, problem, *_ = refused
    assert line == (
        f"step 2 changed no weight: its gradient norm is nan; rank 1 ({socket.gethostname()}): the gradient of "
        f"layers.1.ffn.router.weight (1 in a row; after 5 the run ends)"
    )
    assert problem is None and row == {
        "health/refused_in_a_row": 1,
        "health/refused_rank": 1,
        "health/refused_parameter": "layers.1.ffn.router.weight",
    }


def test_a_slow_rank_is_named_although_all_ranks_take_the_same_time(results: list[dict[str, Any]]) -> None:
    (found, own, whole), (same, slow_own, slow_whole) = (result["times"] for result in results)
    assert found == same and all(one == tuple(Finding()) for one in found[:-1])
    _, row, (alarm,), *_ = found[-1]
    assert alarm.message.startswith(f"rank 1 ({socket.gethostname()}) is slow: it needs 0.")
    assert alarm.message.endswith("(steps 1 to 10, without waiting for each other)") and row["speed/slow_rank"] == 1
    assert (alarm.step, alarm.rule, alarm.first_step, alarm.ended) == (10, "slow_rank", 1, False)
    assert min(slow_own) > 0.25 and statistics.median(own) < statistics.median(slow_own) / 2
    assert min(whole[1:]) > 0.2 and min(slow_whole) > 0.2


def test_a_slow_link_is_named_with_its_direction_until_it_is_fast_again(results: list[dict[str, Any]]) -> None:
    first, second = (result["network"] for result in results)
    host, nothing = socket.gethostname(), ((), {})
    row = {"speed/slow_link_from": 0, "speed/slow_link_to": 1, "speed/slow_link_s": 0.25}
    ends = f"the network from rank 0 ({host}) to rank 1 ({host}) is"
    slow = f"{ends} slow: 1 MiB takes 0.250 s (4.2 MB/s), and usually 0.010 s"
    fast = f"{ends} no longer slow: 1 MiB takes 0.010 s (104.9 MB/s), and usually 0.010 s"
    start, end = Alarm(40, "slow_link", None, slow, 30), Alarm(60, "slow_link", None, fast, 50, ended=True)
    assert first == second == [nothing, nothing, nothing, ((start,), row), nothing, ((end,), {}), nothing]


def test_slow_links_by_hand() -> None:
    there, back, third = Link(0, 1), Link(1, 0), Link(0, 2)

    def found(now: dict[Link, float], before: dict[Link, float]) -> set[Link]:
        return slow_links(now, best_times(now, before))

    assert found({there: 0.1, back: 0.01}, {}) == {there}
    assert found({there: 0.1, back: 0.1}, {}) == set()  # nobody knows what is usual
    assert found({there: 0.1, back: 0.09}, {there: 0.04, back: 0.01}) == {there, back}
    assert found({there: 0.005, back: 0.001}, {}) == set()  # below the least delay
    assert found({there: 0.1, back: 0.02, third: 0.03}, {}) == {there}


def test_slow_ranks_by_hand() -> None:
    assert slow_ranks([0.2, 1.2], 1) == {1}
    assert slow_ranks([0.01, 0.03], 1) == set()  # below the least delay
    assert slow_ranks([3.0, 3.1, 6.5, 2.9], 1) == {2}
    assert slow_ranks([3.0, 3.1, 4.5, 2.9], 1) == {2} and slow_ranks([9.0, 9.1, 10.5, 9.0], 1) == set()
    assert slow_ranks([1.0, 1.1, 3.0, 3.1], 2) == set()  # stages of a pipeline have other layers
    assert slow_ranks([1.0, 1.1, 3.0, 9.1], 2) == {3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replica_that_differs_is_noticed_in_every_layout(results: list[dict[str, Any]], layout: str) -> None:
    first, second = (result["divergences"][layout] for result in results)
    assert first == second
    changed = {name.removeprefix("model.") for name in first}
    norm = {"layers.0.attention_norm.weight", "exp_avg_sq.layers.1.attention_norm.weight"}
    query, experts = (
        {"layers.1.attention.wq.weight", "exp_avg.layers.0.attention.wq.weight"},
        {"layers.0.ffn.experts.w_up"},
    )
    router = {"layers.0.ffn.router.weight", "exp_avg.layers.0.ffn.router.weight"}
    replicated = {
        "replicate": norm | query | experts,
        "expert": norm | query,
        "tensor": norm | experts,
        "shard": set(),
    }[layout]
    assert router | replicated <= changed
    assert not changed & ((norm | query | experts) - replicated)
    for name, line in first.items():
        shown = name.removeprefix("model.")
        assert line == f"step 2: ranks 0-1 differ in {shown}, and no value has a majority; equal after step 1"


def test_the_odd_rank_is_the_one_that_differs_from_most() -> None:
    def report(host: str, value: int, count: int = 1) -> dict[str, Any]:
        return {"host": host, "count": count, "first": [["model.norm.weight", [0, 1, 3], value]] * bool(count)}

    line = describe([report("a", 5, 2), report("b", 6, 2), report("c", 0, 0), report("d", 5, 2)])
    assert line == "rank 1 (b) differs from ranks 0,3 in norm.weight and 1 more tensor"


def test_a_tensor_is_named_of_which_all_ranks_have_sent_the_fingerprint() -> None:
    """All weights of rank 3, in the second stage of a pipeline, differ. So the tied embedding differs from rank 1's."""
    tied = ["model.embedding.weight (first and last stage)", [1, 3], 5]
    names = [f"model.layers.1.{name}" for name in ("wq", "wk", "wv")]
    reports: list[dict[str, Any]] = [{"host": "a", "count": 0, "first": []} for _ in range(4)]
    reports[1] |= {"count": 1, "first": [tied]}
    for rank, value in ((2, 7), (3, 8)):
        reports[rank] |= {"count": 9, "first": [[name, [2, 3], value] for name in names]}
    assert describe(reports) == "ranks 2-3 differ in layers.1.wq and 8 more tensors, and no value has a majority"


def test_times_from_before_a_checkpoint_are_forgotten_when_the_run_goes_back_to_it() -> None:
    health = Health(HealthConfig(), SimpleNamespace(world_size=2), (), 1.0)  # type: ignore[arg-type]
    assert health.slow.check(FinishedStep(1, 0.0, SimpleNamespace(), 1.0, 0.5)) == Finding()  # type: ignore[arg-type]
    assert health.slow.times == [0.5]
    health.load_state_dict({})
    assert health.slow.times == []


def test_the_fingerprint_changes_with_every_bit() -> None:
    for dtype, length in (
        (torch.float32, 7),
        (torch.float64, 3),
        (torch.bfloat16, 9),
        (torch.int64, 2),
        (torch.float32, 1),
    ):
        tensor = torch.arange(1, 2 * length + 1).to(dtype)[1 : length + 1]  # at an odd offset in memory
        before = fingerprint(tensor)
        assert fingerprint(tensor.clone()) == before
        bits = tensor.view(torch.uint8)
        for byte in range(len(bits)):
            bits[byte] ^= 1 << byte % 8
            assert fingerprint(tensor) != before
            bits[byte] ^= 1 << byte % 8
    assert fingerprint(torch.zeros(0)) == 0 and fingerprint(torch.tensor(1.0)) != 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_is_computed_twice_names_the_rank_that_errs(results: list[dict[str, Any]], layout: str) -> None:
    first, second = (result["rechecks"][layout] for result in results)
    host = socket.gethostname()
    line = f"step 2: computed twice, with different gradients on rank 1 ({host}): layers.1.ffn.router.weight"
    assert first == second == [True, line, 1]
