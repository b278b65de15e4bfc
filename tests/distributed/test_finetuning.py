"""What fine-tuning asks of several ranks: checkpoints of single experts, and steps with nothing to predict."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.batch import IGNORE
from moe.config import RouterConfig
from parallel.apply import build_model
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.distributed.harness import run_ranks
from tests.distributed.whole import gather_whole
from training.checkpoint import checkpoint
from training.checkpoint.manifest import read_manifest
from training.engine import NativeEngine
from training.parity.cases import MODEL, OPTIM, global_batch, part_of, rows_for
from training.step import StepResult, train_step

ROUTER = RouterConfig(balance_coef=0.05, z_coef=0.01)
TRAIN = ("router", "expert:3", "expert:4")


def engine_of(expert_size: int, seed: int, train: str | tuple[str, ...] = TRAIN) -> NativeEngine:
    mesh = build_mesh(torch.device("cpu"), Layout(replicate=dist.get_world_size(), expert=expert_size))
    model = build_model(MODEL, ROUTER, mesh, compute_dtype=torch.float64, seed=seed)
    return NativeEngine([model], replace(OPTIM, train=train), mesh)


def steps(engine: NativeEngine, first: int, last: int) -> None:
    for step in range(first, last):
        rank, world = engine.mesh.rank, engine.mesh.world_size
        train_step(engine, part_of(global_batch(step, rows_for(4)), rank, world), ROUTER, 1e-3)


def interrupted(rank: int, world: int, root: Path) -> tuple[dict, dict, int]:
    whole = engine_of(2, seed=3)
    steps(whole, 0, 2)
    path = checkpoint.save(root, 2, whole.tensors(), {}, keep=2)
    steps(whole, 2, 4)
    other = engine_of(4, seed=7)
    tensors = other.tensors()
    checkpoint.load(path, tensors)
    other.finish_loading(tensors, 2)
    steps(other, 2, 4)
    return gather_whole(whole.tensors()), gather_whole(other.tensors()), other.updates


@pytest.mark.slow
def test_single_experts_are_saved_and_go_on_under_another_layout(tmp_path):
    """Saved by four ranks with two expert shards, loaded into four: weights and moments of four steps are the same."""
    results = run_ranks(interrupted, 4, tmp_path)
    saved = read_manifest(tmp_path / "step-2")["tensors"]
    moments = {name for name in saved if name.startswith("exp_avg.")}
    assert moments == {
        f"exp_avg.layers.{layer}.ffn.{part}"
        for layer in range(MODEL.num_layers)
        for part in ("router.weight", *(f"experts.{w}.{e}" for w in ("w_gate", "w_up", "w_down") for e in (3, 4)))
    }
    for whole, other, updates in results:
        assert updates == 4 and whole.keys() == other.keys() == saved.keys()
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-9, atol=1e-12, msg=name)


def without_labels(rank: int, world: int) -> list[StepResult]:
    """A batch of prompts only: first on one of the ranks, then on both."""
    engine = engine_of(2, seed=3, train="all")
    results = []
    for nobody in (False, True):
        rows = global_batch(0, rows_for(4))
        rows["labels_BS"][:] = IGNORE
        if not nobody:
            rows["labels_BS"][0, 0] = 5
        results.append(train_step(engine, part_of(rows, rank, world), ROUTER, 1e-3))
    assert all(parameter.isfinite().all() for parameter in engine.parts[0].parameters())
    return results


def test_a_step_without_a_label_is_a_step_of_the_router_losses():
    for some, none in run_ranks(without_labels, 2):
        assert some.ce > 0 and none.ce == 0
        assert none.loss > 0 and 0 < none.grad_norm < some.grad_norm
        assert none.tokens == some.tokens > 0
