"""What ranks find out together about a step that has gone wrong."""

import math
import socket
from typing import Any

import pytest
import torch

from moe.config import ModelConfig, RouterConfig
from parallel.apply import build_model
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.distributed.harness import run_ranks
from training.config import HealthConfig, OptimConfig
from training.engine import NativeEngine
from training.health import RefusedSteps
from training.parity.trial import micro_batches_of_rank, rows_of_step
from training.step import prepare_step, start_step
from training.steps import FinishedStep

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
    return FinishedStep(done, 1e-2, result, 1.0, nonfinite)


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


def jobs(rank: int, world_size: int) -> dict[str, Any]:
    return {name: refusals(layout) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(jobs, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rank_and_the_parameter_are_named(results: list[dict[str, Any]], layout: str) -> None:
    first, second = (result[layout] for result in results)
    assert first == second
    fine, refused, after, updates = first
    assert fine == after == ((), {}, None, 0, False) and updates == 2
    (line,), row, problem, *_ = refused
    assert line == (
        f"step 2 changed no weight: its gradient norm is nan; rank 1 ({socket.gethostname()}): the gradient of "
        f"layers.1.ffn.router.weight (1 in a row; after 5 the run ends)"
    )
    assert problem is None and row == {
        "health/refused_in_a_row": 1,
        "health/refused_rank": 1,
        "health/refused_parameter": "layers.1.ffn.router.weight",
    }
