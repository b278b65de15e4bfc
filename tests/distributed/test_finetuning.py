"""Fine-tuning on several ranks: checkpoints of single experts, and steps without a label."""

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
from training.parity.config import MODEL, OPTIM, rows_for
from training.parity.trial import micro_batches_of_rank, rows_of_step
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
        train_step(engine, micro_batches_of_rank(rows_of_step(step, rows_for(4)), rank, world), ROUTER, 1e-3)


def interrupted(rank: int, world: int, root: Path) -> tuple[dict, dict, int]:
    """Train for 4 steps with 2 expert shards, and again from the checkpoint of step 2 with 4 expert shards."""
    uninterrupted = engine_of(2, seed=3)
    steps(uninterrupted, 0, 2)
    path = checkpoint.save(root, 2, uninterrupted.tensors(), {}, keep=2)
    steps(uninterrupted, 2, 4)
    resumed = engine_of(4, seed=7)
    tensors = resumed.tensors()
    checkpoint.load(path, tensors)
    resumed.finish_loading(tensors, 2)
    steps(resumed, 2, 4)
    return gather_whole(uninterrupted.tensors()), gather_whole(resumed.tensors()), resumed.updates


@pytest.mark.slow
def test_training_single_experts_resumes_in_another_layout(tmp_path):
    """Weights and moments after 4 steps are those of the run that was not interrupted."""
    results = run_ranks(interrupted, 4, tmp_path)
    saved = read_manifest(tmp_path / "step-2")["tensors"]
    moments = {name for name in saved if name.startswith("exp_avg.")}
    assert moments == {
        f"exp_avg.layers.{layer}.ffn.{part}"
        for layer in range(MODEL.num_layers)
        for part in ("router.weight", *(f"experts.{w}.{e}" for w in ("w_gate", "w_up", "w_down") for e in (3, 4)))
    }
    for uninterrupted, resumed, updates in results:
        assert updates == 4 and uninterrupted.keys() == resumed.keys() == saved.keys()
        for name, tensor in resumed.items():
            torch.testing.assert_close(tensor, uninterrupted[name], rtol=1e-9, atol=1e-12, msg=name)


def without_labels(rank: int, world: int) -> list[StepResult]:
    """Train on a batch with one label on rank 0 only, then on a batch without any label."""
    engine = engine_of(2, seed=3, train="all")
    results = []
    for any_label in (True, False):
        rows = rows_of_step(0, rows_for(4))
        rows["labels_BS"][:] = IGNORE
        if any_label:
            rows["labels_BS"][0, 0] = 5
        results.append(train_step(engine, micro_batches_of_rank(rows, rank, world), ROUTER, 1e-3))
    assert all(parameter.isfinite().all() for parameter in engine.parts[0].parameters())
    return results


def test_a_step_without_labels_trains_on_the_router_losses_only():
    for with_label, without in run_ranks(without_labels, 2):
        assert with_label.ce > 0 and without.ce == 0
        assert without.loss > 0 and 0 < without.grad_norm < with_label.grad_norm
        assert without.tokens == with_label.tokens > 0
