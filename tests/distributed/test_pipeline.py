"""Pipelines: whatever the schedule, and whatever runs beside it, a run computes what one process computes."""

import gc
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from data.batch import Batch
from moe.config import ModelConfig, RouterConfig
from moe.recompute import Recompute
from parallel.apply import build_model
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.pipeline import Pipeline
from parallel.stages import Schedule, stage_layers, stages_of
from tests.distributed.harness import run_ranks
from tests.distributed.whole import assert_same_history, gather_whole
from training.engine import NativeEngine
from training.parity.config import ACCUMULATION, CASES, MODEL, OPTIM
from training.parity.trial import rows_of_step
from training.schedule import learning_rate
from training.step import evaluate, train_step

ROWS, STEPS = 16, 3
DEEP = {name: (case.model, case.router) for name, case in CASES.items()}
DEEP["deepseek"] = (replace(DEEP["deepseek"][0], first_k_dense=2), DEEP["deepseek"][1])


class Job(NamedTuple):
    case: str
    train: str | tuple[str, ...] = "all"
    parallel: ParallelConfig = ParallelConfig()
    stage_layers: tuple[int, ...] | None = None

    @property
    def alone(self) -> "Job":
        return Job(self.case, self.train)


def pipeline(size: int, schedule: Schedule, recompute: Recompute = "none", **sizes: int) -> ParallelConfig:
    return ParallelConfig(pipeline=size, schedule=schedule, recompute=recompute, **{"expert": 1} | sizes)


JOBS = {
    2: [
        Job("mixtral", "all", pipeline(2, "interleaved")),
        Job("switch", "all", pipeline(2, "zero_bubble")),
        Job("deepseek", "router", pipeline(2, "1f1b"), (2, 2)),
        Job("deepseek", "router", pipeline(2, "zero_bubble", "selective")),
    ],
    4: [
        Job("mixtral", "all", pipeline(4, "1f1b")),
        Job("mixtral", "all", pipeline(2, "zero_bubble", expert=2)),
        Job("mixtral", "all", pipeline(2, "interleaved", shard=2, expert=2)),
        Job("deepseek", "router", pipeline(2, "1f1b", shard=2), (2, 2)),
        Job("switch", "all", pipeline(2, "interleaved", tensor=2)),
        Job("mixtral", "all", pipeline(2, "zero_bubble", "selective", context=2)),
    ],
}
"""By world size."""


def batches_of(step: int, micro_batches: int, rank: int, layout: Layout) -> list[Batch]:
    """This data rank's part of every micro-batch."""
    rows = rows_of_step(step, ROWS)
    per_rank = len(rows["tokens_BS"]) // micro_batches // layout.data
    starts = [(m * layout.data + layout.data_rank(rank)) * per_rank for m in range(micro_batches)]
    return [Batch(**{name: rows[name][start : start + per_rank] for name in rows}) for start in starts]


def run(rank: int, world: int, jobs: list[Job]) -> list[dict]:
    return [run_job(rank, world, job) for job in jobs]


def run_job(rank: int, world: int, job: Job) -> dict:
    model, router = DEEP[job.case]
    layout = job.parallel.layout(world, model)
    mesh = build_mesh(torch.device("cpu"), layout)

    def build(layers: range | None = None):
        return build_model(
            model, router, mesh, compute_dtype=torch.float64, seed=3, layers=layers, recompute=job.parallel.recompute
        )

    if layout.pipeline == 1:
        parts, pipe = [build()], None
    else:
        schedule = job.parallel.schedule
        stages = stages_of(mesh.pipeline.rank(), layout, schedule)
        layers = stage_layers(model, router, job.parallel.num_stages(layout), job.stage_layers)
        parts = [build(layers[stage]) for stage in stages]
        pipe = Pipeline(parts, stages, mesh, schedule)
    engine = NativeEngine(parts, replace(OPTIM, train=job.train), mesh, pipe)
    history, evaluations = [], []
    for step in range(STEPS):
        held_out = batches_of(100, step % 2 + 1, rank, layout)  # batches of several sizes, none that of training
        sizes = torch.ones(model.vocab_size, dtype=torch.int64)
        evaluations.append(evaluate(engine, held_out, ("all",), sizes, torch.zeros_like(sizes)))
        batches = batches_of(step, ACCUMULATION, rank, layout)
        history.append(train_step(engine, batches, router, learning_rate(step, STEPS, OPTIM), seed=7, measured=True))
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    left = sum((tensor.is_leaf and tensor.grad is not None) or tensor.grad_fn is not None for tensor in tensors)
    return {"final": gather_whole(engine.tensors()), "history": history, "evaluations": evaluations, "left": left}


@pytest.fixture(scope="module")
def expected() -> dict[Job, dict]:
    jobs = list({job.alone: None for jobs in JOBS.values() for job in jobs})
    return dict(zip(jobs, run_ranks(run, 1, jobs)[0], strict=True))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_pipeline_equals_one_process(expected, world):
    """fp64: weights, moments, figures of the steps and of evaluation to 1e-9. No gradient and no graph is left."""
    jobs = JOBS[world]
    for of_rank in run_ranks(run, world, jobs):
        for job, result in zip(jobs, of_rank, strict=True):
            assert_same(result, expected[job.alone], job)


def assert_same(result: dict, expected: dict, job: Job) -> None:
    assert_same_history(result["history"], expected["history"], 1e-9)
    for mine, theirs in zip(result["evaluations"], expected["evaluations"], strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-9), job
        assert torch.equal(mine.load_GLE, theirs.load_GLE), job
    assert result["final"].keys() == expected["final"].keys(), job
    for name, tensor in expected["final"].items():
        scale = tensor.abs().max().item()
        assert (result["final"][name] - tensor).abs().max().item() <= 1e-9 * scale, (job, name)
    assert result["left"] == 0, job


def test_layers_are_cut_where_stages_cost_the_same():
    """Counted by hand: attention 2·16·32 + 2·16·16, two of eight experts of 3·16·16 and a router of 8·16 a layer."""
    layer = 2 * 16 * 32 + 2 * 16 * 16 + 2 * 3 * 16 * 16 + 8 * 16

    def lengths(model: ModelConfig, stages: int, given: tuple[int, ...] | None = None) -> list[int]:
        layers = stage_layers(model, RouterConfig(), stages, given)
        assert [number for stage in layers for number in stage] == list(range(model.num_layers))
        return [len(stage) for stage in layers]

    model = replace(MODEL, num_layers=8, vocab_size=1)
    assert lengths(model, 4) == [2, 2, 2, 2]
    assert sorted(lengths(model, 3)) == [2, 3, 3] and lengths(model, 3)[-1] == 2
    heavy = replace(model, vocab_size=2 * layer // 16)  # a head like two layers
    assert lengths(heavy, 2) == [5, 3]
    assert lengths(replace(model, vocab_size=layer), 4) == [2, 2, 3, 1]  # a head like sixteen; the first have fewer
    assert lengths(model, 3, (1, 3, 4)) == [1, 3, 4]
    dense_first = replace(model, first_k_dense=2, hidden_dim=48, expert_hidden_dim=12)
    assert lengths(dense_first, 2) == [4, 4]
    assert lengths(model, 8) == [1] * 8


def test_stages_go_round():
    assert stages_of(1, Layout(pipeline=4), "1f1b") == [1]
    assert stages_of(1, Layout(pipeline=4), "interleaved") == stages_of(1, Layout(pipeline=4), "zero_bubble") == [1, 5]
