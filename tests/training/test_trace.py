"""The traced step against the real one: memory against the allocator's events, and bytes sent against the formulas."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.errors import ConfigError
from common.strict import from_dict
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.planning.auto import without_auto
from parallel.planning.plan import plan
from parallel.planning.traffic import traffic
from scripts.cli.command_line import compose_config
from training.build import build_engine, build_parts
from training.config import Config
from training.device import compute_dtype
from training.layout import build_workload
from training.planning.peak import AllocatorPeak
from training.planning.skew import balanced, choose_experts, counts_of, recorded, zipf
from training.planning.trace import Subject, Trace, example_batches, trace_step
from training.step import train_step

SMALL = ("model.dim=48", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=12", "model.vocab_size=512")


def configured(*overrides: str) -> Config:
    train = ("train.seq_len=64", "train.global_batch=8", "train.compile=false", "train.precision=fp32")
    base = ("model=mixtral_tiny", *SMALL, *train)
    config = from_dict(Config, compose_config("config", [*base, *overrides]))
    return replace(config, parallel=without_auto(config.parallel))


def layout_of(config: Config, world: int) -> Layout:
    return config.parallel.layout(world, config.model, config.train.seq_len)


def measured(config: Config, document: int | None) -> int:
    """The peak of the second step of one process: what exists all the time, and what the allocator reports above it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = build_mesh(torch.device("cpu"), Layout())
        dtype = compute_dtype(config.train.precision, torch.device("cpu"))
        engine = build_engine(config, build_parts(config, config.model, mesh, dtype, 1), mesh)
        batches = example_batches(config, Layout(), config.train.accumulation, document)
        train_step(engine, batches, config.router, 1e-3)
        weights = list(engine.parts[0].parameters())
        moments = 2 * sum(weight.nbytes for weight in weights if weight.requires_grad)
        state = moments + sum(weight.nbytes for weight in weights)
        with AllocatorPeak(torch.device("cpu")) as peak:
            train_step(engine, batches, config.router, 1e-3)
        engine.close()
    finally:
        dist.destroy_process_group()
    return state + peak.above


@pytest.mark.parametrize(
    ("overrides", "document"),
    [
        ((), None),
        (("train.accumulation=2", "parallel.recompute=full"), 20),
        (("train.precision=bf16",), 20),  # The experts' numbers of rows are computed with numbers in fp64.
        (("router.capacity_factor=1.0", "model.num_shared_experts=1", "model.first_k_dense=1"), 20),
        (("model.num_experts=16",), None),  # With more experts than 4·k, routers index by masks of scores.
        (("router=expert_choice", "router.allow_noncausal=true"), None),  # A token can have all experts.
    ],
)
def test_the_peak_is_that_of_the_allocator(overrides: tuple[str, ...], document: int | None) -> None:
    config = configured(*overrides)
    dtype = compute_dtype(config.train.precision, torch.device("cpu"))
    trace = trace_step(Subject(config, Layout(), dtype=dtype, document=document))
    assert trace.peak == pytest.approx(measured(config, document), rel=0.02)
    assert sum(trace.parts.values()) == trace.peak
    weights = trace.state["weights"]
    assert trace.state["moments"] >= 2 * weights and trace.state["gradients"] == weights


@pytest.mark.parametrize(
    "overrides", [("parallel.recompute=selective",), ("train.precision=bf16", "adapter.targets=[attention]")]
)
def test_the_peak_with_weights_in_4_bits_is_that_of_the_allocator(overrides: tuple[str, ...]) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra [quantize]")
    given = ("adapter=lora", "adapter.targets=[attention,experts]", "quantize=nf4", "run.init_from=x")
    config = configured(*given, *overrides)
    trace = trace_step(Subject(config, Layout(), dtype=compute_dtype(config.train.precision, torch.device("cpu"))))
    assert trace.peak == pytest.approx(measured(config, None), rel=0.02)
    workload = build_workload(config, config.model)
    workload = replace(workload, trained=workload.adapter_share)
    planned = plan(Layout(), config.parallel, workload).fullest
    assert trace.state["weights"] == planned.weights and trace.state["gradients"] == planned.gradients


def sent(trace: Trace) -> Counter[str]:
    total: Counter[str] = Counter()
    for collective in trace.collectives:
        total[collective.axis] += collective.sent
    return total


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (16, ("parallel.shard=4", "parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=2")),
        (8, ("parallel.context=2", "parallel.expert=4")),
    ],
)
def test_collectives_send_what_the_formulas_say(world: int, overrides: tuple[str, ...]) -> None:
    config = configured(*overrides)
    layout = layout_of(config, world)
    formulas = traffic(build_workload(config, config.model, itemsize=4), layout, config.parallel)
    found = sent(trace_step(Subject(config, layout)))
    for axis in ("expert", "expert_tensor", "tensor", "context", "shard", "gradients"):
        assert found[axis] == pytest.approx(formulas[axis], abs=200), axis
    assert found["expert"] > 0


def test_the_first_rank_of_a_pipeline_stores_more_micro_batches_than_the_last() -> None:
    config = configured("parallel.pipeline=2", "train.accumulation=4", "model.num_layers=4")
    layout = layout_of(config, 2)
    first, last = (trace_step(Subject(config, layout, rank)) for rank in (0, 1))
    attention = [trace.parts["attention"] for trace in (first, last)]
    assert attention[0] > 1.5 * attention[1]
    assert sent(first)["pipeline"] == sent(last)["pipeline"] == 4 * 2 * 64 * 48 * 4  # m micro-batches of [B, S, D]


def test_a_plan_for_gpus_takes_their_branches() -> None:
    config = configured("model.dim=64", "model.head_dim=16", "model.hidden_dim=64")
    on_gpu = trace_step(Subject(config, Layout(), dtype=torch.bfloat16, capability=9))
    names = {operator.name for operator in on_gpu.operators}
    assert {"attention", "attention_backward", "_grouped_mm", "_fused_adamw_"} <= names
    assert "attention" not in {operator.name for operator in trace_step(Subject(config, Layout())).operators}


def test_the_rank_with_the_popular_experts_needs_more_memory() -> None:
    config = configured("parallel.expert=2")
    layout, experts = layout_of(config, 2), config.model.num_experts or 0
    layers = config.model.num_moe_layers
    even = trace_step(Subject(config, layout, loads=balanced(layers, experts)))
    first, second = (trace_step(Subject(config, layout, rank, loads=zipf(layers, experts, 1.0))) for rank in (0, 1))
    assert first.parts["experts"] > even.parts["experts"] > second.parts["experts"]


def test_experts_are_chosen_by_their_shares() -> None:
    shares = zipf(1, 5, 2.0)[0]
    counts = counts_of(shares, tokens=7, top_k=2)
    assert sum(counts) == 14 and max(counts) <= 7
    experts_TK = choose_experts(counts, 7, 2)
    assert experts_TK.flatten().bincount(minlength=5).tolist() == counts
    assert all(len(set(row)) == 2 for row in experts_TK.tolist())
    dropped = choose_experts(counts_of(shares, 7, 2, limit=3), 7, 2)
    assert (dropped == 5).sum() == 14 - sum(min(count, 3) for count in counts)


def test_the_loads_of_a_run_are_read_from_its_last_row(tmp_path: Path) -> None:
    rows = ['{"router/load/layer_00": [0.5, 0.5], "router/load/layer_01": [1.0, 0.0]}', '{"loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    assert recorded(tmp_path, layers=2, experts=2) == ((0.5, 0.5), (1.0, 0.0))
    with pytest.raises(ConfigError, match="expected loads of 2 MoE layers with 4 experts each, found 2 with 2"):
        recorded(tmp_path, layers=2, experts=4)
    with pytest.raises(ConfigError, match="expected a run with a readable"):
        recorded(tmp_path / "missing", layers=2, experts=4)
