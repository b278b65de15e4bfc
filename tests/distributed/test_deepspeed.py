"""The DeepSpeed engine computes what the native engine computes on one process, at every ZeRO stage and expert degree.

Starting processes takes long, so one start of 2 ranks runs all jobs for 2 ranks that are not slow. Most jobs are fp32,
because DeepSpeed has no fp64.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from data.batch import Batch
from moe.generation.generate import generate
from parallel.apply import build_model
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.distributed.harness import run_ranks
from tests.distributed.whole import assert_same_history, gather_whole
from training.checkpoint import checkpoint
from training.config import EngineConfig, TrainConfig
from training.deepspeed.engine import DeepSpeedEngine
from training.deepspeed.settings import deepspeed_settings
from training.engine import NativeEngine
from training.parity.config import ACCUMULATION, CASES, LENGTH, OPTIM, rows_for
from training.parity.trial import micro_batches_of_rank, rows_of_step
from training.schedule import learning_rate
from training.step import StepResult, evaluate, train_step

pytest.importorskip("deepspeed")

pytestmark = pytest.mark.slow

STEPS = 5
TOLERANCE = 1e-5
"""Relative tolerance of losses and norms. They are fp32, and DeepSpeed clips to max / (norm + 1e-6)."""
TENSOR_TOLERANCE = 5e-5
"""Tolerance of weights after 5 steps, relative to the tensor's largest element. Moments, of which one is a square, have
four times that."""

ROWS = rows_for(4)
MODELS = {name: (case.model, case.router) for name, case in CASES.items()}
MODELS["odd"] = (replace(MODELS["deepseek"][0], dim=9, num_heads=3, num_kv_heads=1, head_dim=2), MODELS["deepseek"][1])
"""Sizes that are not divisible by the number of ranks, so that the partitions of stage 3 end with padding."""
EVERYTHING_PARTITIONED = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,  # Otherwise tiny parameters would not be partitioned.
        "stage3_prefetch_bucket_size": 100,
        "sub_group_size": 3000,
        "reduce_bucket_size": 1000,
    }
}


class Job(NamedTuple):
    case: str
    stage: int
    """The ZeRO stage, or 0 for the native engine."""
    expert: int
    """`parallel.expert`."""
    train: str | tuple[str, ...] = "all"
    dtype: torch.dtype = torch.float32


TWO = [Job("mixtral", 1, 2), Job("deepseek", 2, 2)]
MORE = [
    Job("switch", 3, 2),
    Job("mixtral", 2, 2, ("experts", "*norm*")),
    Job("mixtral", 3, 1, "router"),
    *(Job("mixtral", stage, 2) for stage in (2, 3)),
    Job("deepseek", 3, 2),
    Job("switch", 2, 2),
    Job("mixtral", 2, 1),
    Job("mixtral", 3, 1),
    Job("mixtral", 1, 2, "router"),
    Job("mixtral", 2, 2, dtype=torch.bfloat16),
]
"""More jobs for 2 ranks, which are slow."""
FOUR = [Job("mixtral", 3, 2), Job("deepseek", 2, 2), Job("switch", 1, 4), Job("odd", 3, 4)]


def global_batch(step: int) -> dict[str, torch.Tensor]:
    return rows_of_step(step, ROWS)


def build(job: Job, world: int, directory: str, max_norm: float | None = OPTIM.max_grad_norm) -> Any:
    mesh = build_mesh(torch.device("cpu"), Layout(replicate=world, expert=job.expert))
    parts = [build_model(*MODELS[job.case], mesh, compute_dtype=job.dtype, seed=3)]
    optim = replace(OPTIM, train=job.train, max_grad_norm=max_norm)
    if not job.stage:
        return NativeEngine(parts, optim, mesh)
    train = TrainConfig(steps=STEPS, seq_len=LENGTH, global_batch=ROWS, accumulation=ACCUMULATION)
    settings = deepspeed_settings(
        EngineConfig("deepspeed", job.stage, f"{directory}/ds.json"),  # type: ignore[arg-type]
        train,
        optim,
        world,
    )
    return DeepSpeedEngine(parts, optim, mesh, settings)


def one_step(engine: Any, job: Job, step: int, rank: int, world: int) -> StepResult:
    batches = micro_batches_of_rank(global_batch(step), rank, world)
    return train_step(engine, batches, MODELS[job.case][1], learning_rate(step, STEPS, OPTIM), seed=7, measured=True)


def whole(engine: Any) -> dict[str, torch.Tensor]:
    return gather_whole(engine.tensors())


def run_job(rank: int, world: int, job: Job, directory: str) -> dict:
    engine = build(job, world, directory)
    initial = whole(engine)
    history = [one_step(engine, job, step, rank, world) for step in range(STEPS)]
    final = whole(engine)
    engine.close()
    return {"initial": initial, "final": final, "history": history}


def run(rank: int, world: int, jobs: list[Job], directory: str) -> list[dict]:
    os.environ["LOCAL_RANK"] = str(rank)
    return [run_job(rank, world, job, directory) for job in jobs]


def run_two(rank: int, world: int, directory: str) -> dict:
    results = run(rank, world, TWO, directory)
    relay = [load_and_step(rank, world, directory, step, Job("odd", *layout)) for step, layout in RELAY]
    return {
        "jobs": results,
        "relay": relay,
        "skipped": {3: skip_one_step(rank, world, directory, 3)},
        "used": [use_between_steps(rank, world, directory, stage) for stage in (0, 3)],
    }


RELAY = [(2, (1, 2)), (3, (3, 1)), (4, (2, 2)), (5, (0, 2))]
"""(step, (ZeRO stage, `parallel.expert`)). Each entry continues from the checkpoint of the entry before it."""


def load_and_step(rank: int, world: int, directory: str, step: int, job: Job) -> StepResult:
    """Load the checkpoint of `step`, train for one step, and save the next checkpoint."""
    engine = build(job, world, directory)
    tensors = engine.tensors()
    checkpoint.load(Path(directory) / f"step-{step}", tensors)
    engine.finish_loading(tensors, step)
    result = one_step(engine, job, step, rank, world)
    assert engine.updates == step + 1
    checkpoint.save(Path(directory), step + 1, engine.tensors(), {}, keep=20)
    engine.close()
    return result


def start_and_save(rank: int, world: int, directory: str) -> list[StepResult]:
    """Run all steps of the relay on one process, with a checkpoint after the first two steps."""
    job = Job("odd", 0, 1)
    engine = build(job, world, directory)
    history = []
    for step in range(RELAY[-1][0] + 3):
        if step == RELAY[0][0]:
            checkpoint.save(Path(directory), step, engine.tensors(), {}, keep=20)
        history.append(one_step(engine, job, step, rank, world))
    return history


def end_of_relay(rank: int, world: int, directory: str, step: int) -> StepResult:
    return load_and_step(rank, world, directory, step, Job("odd", 0, 1))


def skip_one_step(rank: int, world: int, directory: str, stage: int) -> dict:
    """Train one step with an infinite loss on the last rank only, then the same step with the right loss.

    The first step must change nothing, so the second is like the first step of another run.
    """
    job = Job("mixtral", stage, 2)
    engine = build(job, world, directory)
    before = whole(engine)
    backward = engine.backward
    engine.backward = lambda loss: backward(loss * math.inf if rank == world - 1 else loss)
    norm = one_step(engine, job, 0, rank, world).grad_norm
    engine.backward = backward
    updates, after = engine.updates, whole(engine)
    again = one_step(engine, job, 0, rank, world)
    engine.close()
    unchanged = all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return {"norm": norm, "updates": updates, "unchanged": unchanged, "again": again}


def use_between_steps(rank: int, world: int, directory: str, stage: int) -> dict:
    """Evaluate and generate between training steps. At stage 3 the weights are gathered only while they are used."""
    job = Job("switch", stage, 2)
    engine = build(job, world, directory, max_norm=None)
    losses, heldout_losses, generated = [], [], []
    for step in range(3):
        losses.append(one_step(engine, job, step, rank, world).loss)
        batches: list[Batch] = micro_batches_of_rank(global_batch(9), rank, world)
        sizes = torch.ones(40, dtype=torch.long)
        heldout_losses.append(evaluate(engine, batches, ("text",), sizes, torch.zeros_like(sizes)).loss)
        generated.append(generate(engine.parts[0], [[1, 2, 3]], max_tokens=4))
    engine.close()
    return {"losses": losses, "heldout": heldout_losses, "generated": generated}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("deepspeed")
    (path / "ds.json").write_text(json.dumps(EVERYTHING_PARTITIONED))
    return str(path)


def reference(job: Job) -> Job:
    return job._replace(stage=0, expert=1)


def run_references(rank: int, world: int, jobs: list[Job], directory: str) -> dict[Job, dict]:
    return {job: run_job(rank, world, job, directory) for job in dict.fromkeys(map(reference, jobs))}


def run_alone(rank: int, world: int, directory: str) -> tuple[dict[Job, dict], list[StepResult]]:
    return run_references(rank, world, TWO, directory), start_and_save(rank, world, directory)


@pytest.fixture(scope="module")
def expected(directory) -> tuple[dict[Job, dict], list[StepResult]]:
    return run_ranks(run_alone, 1, directory)[0]


@pytest.fixture(scope="module")
def more_expected(directory) -> dict[Job, dict]:
    return run_ranks(run_references, 1, [*MORE, *FOUR], directory)[0]


@pytest.fixture(scope="module")
def two(expected, directory) -> list[dict]:
    return run_ranks(run_two, 2, directory)


def assert_same(job: Job, result: dict, expected: dict) -> None:
    exact = job.dtype == torch.float32  # In bf16, another order of a sum changes the result visibly.
    if exact:
        assert_same_history(result["history"], expected["history"], TOLERANCE)
    else:
        assert_near(result, expected)
    assert result["final"].keys() == expected["final"].keys()
    for name, tensor in expected["initial"].items():
        assert torch.equal(result["initial"][name], tensor), (job, name)
    for name, tensor in expected["final"].items() if exact else ():
        difference = (result["final"][name] - tensor).abs().max().item()
        tolerance = TENSOR_TOLERANCE if name.startswith("model.") else 4 * TENSOR_TOLERANCE
        assert difference <= tolerance * tensor.abs().max().item(), (job, name)


def assert_near(result: dict, expected: dict) -> None:
    for step, expected_step in zip(result["history"], expected["history"], strict=True):
        assert step.loss == pytest.approx(expected_step.loss, rel=2e-3)
        assert step.grad_norm == pytest.approx(expected_step.grad_norm, rel=2e-2)


def test_two_ranks_equal_one_process(expected, two):
    for results in two:
        for job, result in zip(TWO, results["jobs"], strict=True):
            assert_same(job, result, expected[0][reference(job)])


def test_two_ranks_equal_one_process_in_more_jobs(more_expected, directory):
    for results in run_ranks(run, 2, MORE, directory):
        for job, result in zip(MORE, results, strict=True):
            assert_same(job, result, more_expected[reference(job)])


def test_four_ranks_equal_one_process(more_expected, directory):
    for results in run_ranks(run, 4, FOUR, directory):
        for job, result in zip(FOUR, results, strict=True):
            assert_same(job, result, more_expected[reference(job)])


def test_the_reference_runs_are_not_trivial(expected):
    for job in map(reference, TWO):
        result = expected[0][job]
        assert any(step.grad_norm > OPTIM.max_grad_norm for step in result["history"])
        assert any(not torch.equal(tensor, result["final"][name]) for name, tensor in result["initial"].items())


def test_checkpoints_move_between_engines_stages_and_worlds(expected, two, directory):
    """Native engine on 1 rank, then three layouts of DeepSpeed and the native engine on 2 ranks, then 1 rank again."""
    history = expected[1]
    for (step, layout), result in zip(RELAY, two[0]["relay"], strict=True):
        assert result.loss == pytest.approx(history[step].loss, rel=TOLERANCE), layout
        assert result.grad_norm == pytest.approx(history[step].grad_norm, rel=TOLERANCE), layout
    last = RELAY[-1][0] + 1
    result = run_ranks(end_of_relay, 1, directory, last)[0]
    assert result.loss == pytest.approx(history[last].loss, rel=TOLERANCE)
    assert result.grad_norm == pytest.approx(history[last].grad_norm, rel=TOLERANCE)


def test_a_norm_that_is_not_finite_changes_nothing(expected, two):
    first = expected[0][Job("mixtral", 0, 1)]["history"][0]
    for results in two:
        for stage, result in results["skipped"].items():
            assert not math.isfinite(result["norm"]), stage
            assert (result["updates"], result["unchanged"]) == (0, True), stage
            assert result["again"].loss == pytest.approx(first.loss, rel=TOLERANCE), stage
            assert result["again"].grad_norm == pytest.approx(first.grad_norm, rel=TOLERANCE), stage


def test_evaluation_and_generation_with_partitioned_weights(two):
    for results in two:
        native, partitioned = results["used"]
        assert partitioned["losses"] == pytest.approx(native["losses"], rel=TOLERANCE)
        assert partitioned["heldout"] == pytest.approx(native["heldout"], rel=TOLERANCE)
        assert partitioned["generated"] == native["generated"]
