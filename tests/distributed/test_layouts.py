"""A run computes the same numbers under every layout as on one process.

The quick suite runs every axis on two ranks, each with another model. The slow suite runs all layouts of 2 and 4 ranks,
and those of three axes on 8.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from data.batch import IGNORE, Batch
from moe.config import AdapterConfig
from moe.model import Transformer
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, build_mesh, mesh_of_one
from parallel.startup.launch import World
from tests.distributed.harness import run_ranks
from training import build
from training.checkpoint import checkpoint
from training.engine import NativeEngine
from training.layout import build_workload, resolve_layout
from training.parity import trial as trial_module
from training.parity.config import CASES, MODEL, OPTIM, configuration, rows_for
from training.parity.driver import TOLERANCES, Differences, JobResult, compare, run_jobs
from training.parity.jobs import Job, assign_models, layout_groups, parse_layout, select_layouts
from training.parity.trial import Result, Trial, assemble, rows_of_step, run_case
from training.step import train_step

CPU = torch.device("cpu")
STEPS = 2
QUICK = (
    ("mixtral", "replicate=2"),
    ("partly_frozen", "shard=2"),
    ("mixtral", "expert=2"),
    ("capacity", "expert_tensor=2"),
    ("uneven", "tensor=2"),
    ("expert_choice", "context=2"),
    ("latent", "context=2"),
    ("deepseek", "pipeline=2"),
    ("deepseek", "tensor=2+expert=2+recompute=selective"),
    ("latent", "tensor=2"),
    ("switch", "shard=2+expert=2+offload=true"),
    ("mixtral", "expert=2+overlap=true"),
    ("width_norm", "tensor=2+expert=2"),
)
"""The model and the layout of each comparison in the quick suite."""
CHOSEN = {
    # Under expert parallelism most ranks store no expert that trains.
    2: (("partly_frozen", "expert=2"), ("uneven", "tensor=2"), ("multi_query", "tensor=2"),
        ("deepseek", "tensor=2+recompute=selective"),
        *((model, layout) for model in ("head_norm", "width_norm")
          for layout in ("tensor=2", "context=2", "pipeline=2", "shard=2", "expert=2"))),
    4: (("latent", "tensor=2+context=2"), ("latent", "pipeline=2+shard=2"),
        ("width_norm", "tensor=4"), ("head_norm", "tensor=2+context=2"),
        ("uneven", "tensor=4"), ("uneven", "shard=2+tensor=2"), ("uneven", "expert=2+expert_tensor=2"),
        ("multi_query", "tensor=4"), ("multi_query", "tensor=2+context=2"), ("multi_query", "shard=2+tensor=2"),
        ("multi_query", "pipeline=2+tensor=2"),
        ("mixtral", "expert=2+expert_tensor=2+recompute=full+overlap=true")),
    8: (),
}  # fmt: skip
"""Models and layouts that the slow suite runs beside one model for each layout."""
SINGLE = ("expert=2", "tensor=2", "context=2")
LAYOUT_CHANGES = (
    ("mixtral", "expert=2", "tensor=2"),
    ("mixtral", "shard=2", "context=2"),
    ("mixtral", "pipeline=2", "expert=2"),
    ("multi_query", "tensor=2", "replicate=2"),
)
"""The model, the layout that saves a checkpoint, and the layout that continues from it."""
QUICK_CHANGES = (("mixtral", "shard=2", "expert=2"), ("multi_query", "tensor=2", "pipeline=2"))
"""The same for the quick suite."""
FEW = replace(CASES["uneven"], model=replace(CASES["uneven"].model, vocab_size=5, hidden_dim=1))
"""With `tensor=4`, the last rank stores no row of the embedding and of the head, and three ranks no hidden unit."""

DROPOUT = replace(
    CASES["latent"],
    model=replace(
        CASES["latent"].model,
        sliding_window=None,
        adapter=AdapterConfig("lora", rank=3, targets=("attention",), dropout=0.2),
    ),
)
"""With `context=2`, a rank computes keys and values of other ranks' tokens, with the dropout of these tokens."""


def jobs_of(pairs: Iterable[tuple[str, str]]) -> list[Job]:
    return [Job(model, layout, parse_layout(layout)) for model, layout in pairs]


def rows_of_five_tokens(step: int, rows: int) -> dict[str, torch.Tensor]:
    made = rows_of_step(step, rows)
    labels_BS = made["labels_BS"]
    few_BS = torch.where(labels_BS == IGNORE, labels_BS, labels_BS % 5)
    return made | {"tokens_BS": made["tokens_BS"] % 5, "labels_BS": few_BS}


def quick(rank: int, world: int, directory: Path) -> dict:
    """All quick checks in one world, because starting processes costs more than most jobs."""
    results = {
        "fp64": list(run_jobs(jobs_of(QUICK), CPU, steps=STEPS)),
        "fp32": list(run_jobs(jobs_of([("mixtral", "tensor=2")]), CPU, precision="fp32", steps=STEPS)),
        "dropout": list(run_jobs(jobs_of([("dropout", "context=2")]), CPU, cases={"dropout": DROPOUT}, steps=STEPS)),
        "one token": one_token_per_rank(rank, world),
        "continued": continue_all(QUICK_CHANGES, directory),
        "tampered": {name: tampered(name) for name in TAMPERED},
    }
    if rank == 0:
        results["one process"] = references()
    return results


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What two ranks return."""
    return run_ranks(quick, 2, tmp_path_factory.mktemp("continued"))


def assert_within_tolerance(results: list[JobResult], precision: str) -> None:
    for result in results:
        assert result.why_skipped is None, result
        assert result.differences.within(TOLERANCES[precision]), result


def test_every_layout_equals_one_process(world):
    """In fp64, the figures, the gradients of the first step, and the last weights, moments and buffers to 1e-9."""
    assert len(world[0]["fp64"]) == len(QUICK)
    for precision in ("fp64", "fp32"):
        assert_within_tolerance(world[0][precision], precision)
    assert_within_tolerance(world[0]["dropout"], "fp64")


def config_of(layout: str, world_size: int, model: str = "mixtral"):
    """The configuration of a model, with the rows of a world of 2."""
    case = CASES[model]
    config = configuration(case, parse_layout(layout), rows=rows_for(2), steps=2 * STEPS)
    return resolve_layout(config, build_workload(config, case.model), World(world_size=world_size)).config


def trial(model: str, layout: str) -> Trial:
    config = config_of(layout, dist.get_world_size(), model)
    world = World(world_size=dist.get_world_size())
    sizes = resolve_layout(config, build_workload(config, config.model), world).plan.layout
    return Trial(CASES[model], config, build_mesh(CPU, sizes))


def continued(root: Path, model: str, before: str, after: str) -> tuple[list, dict]:
    """Run half of the steps under one layout, save a checkpoint, and run the other half under another layout."""
    first = trial(model, before)
    history = first.train(0, STEPS)
    path = checkpoint.save(root, STEPS, first.engine.tensors(), {}, keep=2)
    second = trial(model, after)
    with torch.no_grad():
        for part in second.engine.parts:
            for parameter in part.parameters():
                parameter.zero_()
    tensors = second.engine.tensors()
    checkpoint.load(path, tensors)
    second.engine.finish_loading(tensors, first.engine.updates)
    return history + second.train(STEPS, 2 * STEPS), assemble(second.gather_shards())


def continue_all(changes: Sequence[tuple[str, str, str]], directory: Path) -> list[tuple[list, dict]]:
    return [continued(directory / str(number), *change) for number, change in enumerate(changes)]


def references() -> dict[str, Result]:
    """The runs of one process with which `continued` is compared."""
    return {
        model: run_case(CASES[model], config_of("expert=1", 1, model), mesh_of_one(CPU))
        for model in ("mixtral", "multi_query")
    }


def assert_continued(changes: Sequence[tuple[str, str, str]], results: dict) -> None:
    for change, (history, final) in zip(changes, results["continued"], strict=True):
        reference = results["one process"][change[0]]
        differences = compare(reference._replace(history=history, final=final), reference)
        assert differences.within(TOLERANCES["fp64"]), (change, differences)


def test_a_checkpoint_continues_under_another_layout(world):
    assert_continued(QUICK_CHANGES, world[0])


def test_the_parity_run_is_not_trivial(world):
    """Clipping was active, weights changed, and the last expert got no token and no gradient."""
    reference = world[0]["one process"]["mixtral"]
    assert any(step.grad_norm > OPTIM.max_grad_norm for step in reference.history)
    change = reference.final["model.embedding"] - reference.initial["model.embedding"]
    assert change.abs().max() > 1e-2
    assert reference.history[0].counts_LE[:, -1].eq(0).all() and reference.history[0].counts_LE[:, :-1].gt(0).all()
    for name, gradient in reference.gradients.items():
        if "experts" in name:
            assert gradient[-1].eq(0).all() and all(expert.ne(0).any() for expert in gradient[:-1]), name


def dropped_and_frozen(rank: int, world: int) -> None:
    config = configuration(CASES["capacity"], ParallelConfig(expert=1), rows=16, steps=2)
    assert all(step.dropped > 0 for step in run_case(CASES["capacity"], config, mesh_of_one(CPU)).history)
    case = CASES["partly_frozen"]
    result = run_case(case, configuration(case, ParallelConfig(expert=1), rows=16, steps=2), mesh_of_one(CPU))
    for name, tensor in result.initial.items():
        frozen = name.startswith("model.") and "router" not in name and "experts" not in name
        assert torch.equal(result.final[name], tensor) == frozen, name
        if "experts" in name:
            changed = [not torch.equal(a, b) for a, b in zip(tensor, result.final[name], strict=True)]
            assert name.startswith("exp_avg") or changed == [expert == 3 for expert in range(8)], name


def test_capacity_drops_assignments_and_frozen_weights_do_not_change():
    run_ranks(dropped_and_frozen, 1)


def one_token_per_rank(rank: int, world: int) -> tuple[float, torch.Tensor]:
    """Most experts get no token, on every rank."""
    mesh = build_mesh(CPU, ParallelConfig().layout(world, MODEL))
    config = replace(config_of("expert=1", 1), optim=OPTIM)
    engine = NativeEngine(build.build_parts(config, MODEL, mesh, torch.float64, 3), OPTIM, mesh)
    one = torch.full((1, 1), rank)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    result = train_step(
        engine, [Batch(one, one, zero, zero.int(), zero.to(torch.uint8))], CASES["mixtral"].router, 1e-3
    )
    return result.grad_norm, result.counts_LE


def assert_finite_and_equal(results: list[tuple[float, torch.Tensor]]) -> None:
    norm, counts_LE = results[0]
    assert counts_LE.sum().item() == 2 * len(results) * MODEL.num_layers and (counts_LE == 0).any()
    assert all(math.isfinite(other) and other == norm for other, _ in results)


def test_experts_without_tokens_neither_hang_nor_break(world):
    assert_finite_and_equal([results_of_rank["one token"] for results_of_rank in world])


TAMPERED = {"layers.1.ffn.experts.w_up": "expert=2", "layers.2.attention.wq": "replicate=2"}
"""The weight that is changed a little on one rank, and the layout. The other rank stores other experts, or the same
weight."""


def tampered(name: str) -> list[JobResult]:
    layout = TAMPERED[name]

    def build_and_change(config, model, mesh: Mesh, dtype, seed) -> list[Transformer]:
        (part,) = parts = build.build_parts(config, model, mesh, dtype, seed)
        if mesh.world_size == 2 and mesh.rank == 1:
            weight = next(parameter for full_name, parameter in part.named_parameters() if full_name.startswith(name))
            weight.detach().view(-1)[0] += 1e-4
        return parts

    with mock.patch.object(trial_module, "build_parts", build_and_change):
        return list(run_jobs([Job("mixtral", layout, parse_layout(layout))], CPU, steps=2))


def test_one_weight_of_one_rank_is_noticed(world):
    by_name = {name: results[0].differences for name, results in world[0]["tampered"].items()}
    for name, differences in by_name.items():
        assert not differences.within(TOLERANCES["fp64"]) and not differences.same_initial_weights, name
        assert differences.figures > 1e-9 and differences.gradients > 1e-9, name
    # If two ranks store different values of the same weight, the assembled weight is NaN.
    assert [math.isinf(differences.weights) for differences in by_name.values()] == [False, True]


def test_each_difference_counts():
    good = Differences(0, 0, 0, 0, 0, True, True, 1.0)
    assert good.within(TOLERANCES["fp64"])
    for field in ("figures", "grad_norm", "gradients", "weights", "moments"):
        assert not good._replace(**{field: 1e-8}).within(TOLERANCES["fp64"]), field
    for field in ("same_initial_weights", "same_counts"):
        assert not good._replace(**{field: False}).within(TOLERANCES["fp64"]), field


def test_shards_are_assembled_and_gaps_and_contradictions_become_nan():
    from moe.region import LocalShard, Region

    def shard(values, row):
        return LocalShard(torch.tensor([values]), (2, 2), Region((row, 0), (1, 2)))

    assert assemble([{"w": shard([1.0, 2.0], 0)}, {"w": shard([3.0, 4.0], 1)}])["w"].tolist() == [[1, 2], [3, 4]]
    for others in ({}, {"w": shard([1.0, 5.0], 0)}):
        assert assemble([{"w": shard([1.0, 2.0], 0)}, others])["w"].isnan().any()


def run_all(rank: int, world: int, jobs: list[Job], directory: Path) -> dict:
    results = {"fp64": list(run_jobs(jobs, CPU, steps=STEPS + 1)), "one token": one_token_per_rank(rank, world)}
    if world == 2:
        single = jobs_of(("mixtral", layout) for layout in SINGLE)
        results["fp32"] = list(run_jobs(single, CPU, precision="fp32", steps=STEPS))
        results["continued"] = continue_all(LAYOUT_CHANGES, directory)
        results["one process"] = references()
    if world == 4:
        few = jobs_of([("few", "tensor=4"), ("few", "shard=2+tensor=2")])
        with mock.patch.object(trial_module, "rows_of_step", rows_of_five_tokens):
            results["few"] = list(run_jobs(few, CPU, cases={"few": FEW}, steps=STEPS))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 8])
def test_all_layouts_equal_one_process(size, tmp_path):
    """Each layout with one model, and each axis alone with Mixtral. In a world of 4, the last rank also
    stores no row of a vocabulary and no hidden unit."""
    layouts, groups = select_layouts("all" if size < 8 else "triples", size), layout_groups(size)
    models = assign_models(layouts, CASES, size)
    mixtral = groups["single"] if size < 8 else ()
    pairs = (*zip(models, layouts, strict=True), *(("mixtral", layout) for layout in mixtral), *CHOSEN[size])
    ranks = run_ranks(run_all, size, jobs_of(dict.fromkeys(pairs)), tmp_path)
    results = ranks[0]
    assert_within_tolerance([result for result in results["fp64"] if result.why_skipped is None], "fp64")
    assert sum(result.why_skipped is None for result in results["fp64"]) >= 0.9 * len(results["fp64"])
    assert_finite_and_equal([of_rank["one token"] for of_rank in ranks])
    if size == 2:
        assert_within_tolerance(results["fp32"], "fp32")
        assert_continued(LAYOUT_CHANGES, results)
    if size == 4:
        assert_within_tolerance(results["few"], "fp64")
