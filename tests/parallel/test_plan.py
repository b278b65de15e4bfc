"""Plans against what is really built, formulas against hand-computed cases, and the choices of `auto`."""

import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe.accounting.flops import meta_model
from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.losses import token_nats
from moe.model import ModelInputs, Transformer
from moe.recompute import Recompute, set_recompute
from parallel.apply import build_model
from parallel.config import ParallelConfig
from parallel.context import rows_to_each
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.planning.auto import Choice, resolve
from parallel.planning.plan import (
    HEADER,
    Plan,
    activation_bytes,
    bubble,
    describe,
    describe_traffic,
    micro_batches_in_flight,
    plan,
)
from parallel.planning.traffic import (
    Step,
    context_bytes,
    expert_bytes,
    expert_tensor_bytes,
    fetched_places,
    gathered,
    gradient_bytes,
    prediction_bytes,
    reduced,
    routed_rows,
    tensor_bytes,
)
from parallel.stages import stage_layers, stages_of
from parallel.weight_specs import EXPERT_TENSOR_DIMS, TENSOR_DIMS, kind, named_weights
from tests.test_conf import composed
from training.config import with_vocabulary

MODEL = ModelConfig(
    dim=16, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=24, num_experts=8, top_k=2,
    expert_hidden_dim=12, num_shared_experts=1, first_k_dense=1, vocab_size=40,
)  # fmt: skip
ODD = replace(MODEL, dim=18, num_experts=6, expert_hidden_dim=10, num_shared_experts=0, tie_embeddings=True)
"""FSDP cuts its norms, embedding and experts into parts of unequal length."""


@pytest.mark.parametrize("name", ["mixtral_8x7b", "deepseek_moe_16b", "switch_base_8", "glam_64e", "llama2_7b"])
def test_the_inventory_is_that_of_the_model(name: str) -> None:
    config = composed([f"model={name}"])
    listed = named_weights(config.model)
    built = dict(meta_model(config.model, config.router).named_parameters())
    assert {key: tuple(weight.shape) for key, weight in built.items()} == {k: w.shape for k, w in listed.items()}
    for key, weight in listed.items():
        leaf = key.removesuffix(".weight").rpartition(".")[2]
        dims = {"tensor": TENSOR_DIMS, "experts": EXPERT_TENSOR_DIMS}.get(weight.kind, {})
        assert (weight.kind, weight.dim) == (kind(key), dims.get(leaf)), key


def planned(parallel: ParallelConfig, model: ModelConfig, world: int, **options: float) -> Plan:
    sizes = {"rows": 2, "seq_len": 32, "accumulation": 4, "itemsize": 4} | options
    return plan(parallel.layout(world, model, 32), parallel, model, RouterConfig(), **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [MODEL, ODD], ids=["model", "odd"])
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(expert=2),
        ParallelConfig(shard=4, tensor=2, expert=2),
        ParallelConfig(shard=8, expert=1),
        ParallelConfig(context=2, shard=2, expert=2, expert_tensor=2),
        ParallelConfig(pipeline=2, shard=4, expert=2),
        ParallelConfig(pipeline=2, schedule="interleaved", tensor=2, expert=2),
        ParallelConfig(pipeline=2, stage_layers=(1, 5)),
    ],
    ids=lambda parallel: " ".join(f"{k}={v}" for k, v in vars(parallel).items() if v != getattr(ParallelConfig(), k)),
)
def test_a_plan_holds_what_is_built(model: ModelConfig, parallel: ParallelConfig) -> None:
    """On every rank of eight, none of which is a process."""
    layout = parallel.layout(8, model)
    held = [0] * layout.pipeline
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        try:
            mesh = build_mesh(torch.device("cpu"), layout)
            place = mesh.pipeline.rank()
            layers: list[range] | list[None] = [None]
            if layout.pipeline > 1:
                dealt = stage_layers(model, layout.pipeline * parallel.stages_per_rank, parallel.stage_layers)
                layers = [dealt[stage] for stage in stages_of(place, layout, parallel.schedule)]
            parts = [
                build_model(model, RouterConfig(), mesh, compute_dtype=torch.float32, seed=None, layers=own)
                for own in layers
            ]
            weights = [
                part.local_shard(name, weight).local for part in parts for name, weight in part.named_parameters()
            ]
            held[place] = max(held[place], sum(weight.numel() for weight in weights))
            assert all(weight.element_size() == 4 for weight in weights)
        finally:
            dist.destroy_process_group()
    made = planned(parallel, model, 8, trained=0.5)
    assert [stage.parameters for stage in made.stages] == held
    for stage in made.stages:
        assert stage.weights == 4 * stage.parameters
        # half of it trains
        assert (stage.gradients, stage.moments) == pytest.approx((stage.weights / 2, stage.weights), rel=1e-3)
        assert stage.state == stage.weights + stage.gradients + stage.moments and stage.host == 0


def test_formulas_by_hand() -> None:
    assert gathered(4, 10) == 30
    assert reduced(4, 8) == 12
    # 6 rows of 5 numbers of 2 bytes: 60 bytes, two thirds to other ranks, out and back, and gradients
    assert expert_bytes(6, 5, 3, 2) == pytest.approx(4 * 40)
    assert expert_tensor_bytes(6, 5, 3, 2) == 4 * 120
    assert tensor_bytes(7, 5, 2, 4) == 4 * 140
    assert prediction_bytes(7, 2, 2) == 3 * 14 * 4
    assert context_bytes(3, 2, 8, 4) == 2 * 3 * 2 * 16 * 4
    assert bubble(1, 8, "1f1b") == 0
    assert bubble(4, 8, "1f1b") == 3 / 11
    assert bubble(4, 8, "interleaved") == 3 / 19
    assert [micro_batches_in_flight(rank, 4, 8, "1f1b") for rank in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(0, 4, 2, "1f1b") == 2


@pytest.mark.parametrize(("window", "mean"), [(None, 12), (5, 3), (13, 8), (1, 0)])
def test_places_fetched(window: int | None, mean: float) -> None:
    """Four ranks of eight places. Without a window 0, 8, 16 and 24 of them; W = 5: 0, 4, 4, 4; W = 13: 0, 8, 12, 12."""
    assert fetched_places(window, 8, 4) == mean
    reach = 24 if window is None else window - 1
    assert sum(sum(rows_to_each(reach, 8, source, 4)) for source in range(4)) / 4 == mean


def test_rows_and_gradients_by_hand() -> None:
    step = Step(rows=2, seq_len=32, accumulation=4, itemsize=2)
    assert routed_rows(MODEL, RouterConfig(), step, Layout(replicate=4)) == 2 * 2 * 32
    assert routed_rows(MODEL, RouterConfig(), step, Layout(context=4)) == 2 * 2 * 8
    # ceil(1.25 · 2 · 32 / 8) = 10 rows for each expert of each sequence, filled or not
    assert routed_rows(MODEL, RouterConfig(capacity_factor=1.25), step, Layout(replicate=4)) == 8 * 2 * 10
    assert routed_rows(MODEL, RouterConfig(capacity_factor=0.5), step, Layout(context=4)) == 2 * 2 * 8 / 2
    # of dense layers on two replicas of two shards: half of them, reduced among two ranks, 4 bytes each
    dense = replace(MODEL, num_experts=None, top_k=None, expert_hidden_dim=None, num_shared_experts=0, first_k_dense=0)
    weights = dict.fromkeys(named_weights(dense).values(), 1)
    elements = sum(weight.numel for weight in weights)
    assert gradient_bytes(weights, Layout(replicate=2, shard=2), step) == elements / 2 * 4
    assert gradient_bytes(weights, Layout(shard=2), step) == 0


def test_a_layout_that_sends_nothing_and_one_that_sends_everything() -> None:
    alone = planned(ParallelConfig(), MODEL, 1)
    assert alone.sent == 0 and alone.bubble == 0
    every = ParallelConfig(pipeline=2, shard=2, replicate=2, context=2, tensor=2, expert=4, expert_tensor=2)
    made = planned(every, MODEL, 32)
    assert all(made.traffic.values())
    assert {len(row) for row in describe(made, str)} == {len(HEADER)} and len(describe(made, str)) == 2
    assert set(describe_traffic(made, str)) == {*made.traffic, "idle"}


def test_what_recompute_and_offload_leave() -> None:
    modes = ("none", "selective", "full")
    kept = [planned(ParallelConfig(recompute=mode), MODEL, 1).fullest.activations for mode in modes]  # type: ignore[arg-type]
    assert kept[0] > kept[1] > kept[2]
    here, there = (planned(ParallelConfig(shard=2, offload=offload), MODEL, 2).fullest for offload in (False, True))
    assert there.host == here.state and there.device == here.device - here.state


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("model", [replace(MODEL, num_shared_experts=0), MODEL], ids=["mixtral", "deepseek"])
def test_activations_are_about_what_autograd_keeps(model: ModelConfig, mode: Recompute) -> None:
    model = replace(model, dim=64, head_dim=16, hidden_dim=160, expert_hidden_dim=80)
    built = Transformer(model, RouterConfig(), torch.float32)
    init_parameters(built, 0)
    set_recompute(built, mode)
    weights = {weight.untyped_storage().data_ptr() for weight in built.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, 40, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_nats(built(ModelInputs(tokens, torch.arange(64).expand(2, -1))).logits_BSV, tokens)
    size = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    step = Step(rows=2, seq_len=64, accumulation=1, itemsize=4, recompute=mode)
    estimate = activation_bytes(Layout(), model, RouterConfig(), step, range(model.num_layers))
    assert 0.75 * size < estimate < 1.35 * size


AUTO = ParallelConfig(tensor="auto", pipeline="auto", context="auto", shard="auto")
GB = 10**9
SITUATIONS = [
    # laptops and small machines: as without `auto`
    ("small", 1, 1, 8 * GB, (16, 1, 512), {}, "one process"),
    ("small", 2, 2, 8 * GB, (16, 1, 512), {}, "replicate=2 expert=2"),
    ("small", 4, 4, None, (16, 4, 512), {}, "replicate=4 expert=4"),
    ("mixtral_tiny", 3, 3, 8 * GB, (12, 1, 128), {}, "replicate=3"),
    # a batch that has fewer rows than the world ranks
    ("mixtral_tiny", 8, 8, None, (2, 1, 512), {}, "replicate=2 context=4 expert=4"),
    ("mixtral_tiny", 4, 4, None, (1, 1, 512), {}, "context=4 expert=4"),
    # where plain does not fit, weights are shared out
    ("mixtral_8x7b", 8, 8, 141 * GB, (8, 1, 4096), {"recompute": "full"}, "replicate=8 expert=8"),
    ("mixtral_8x7b", 8, 8, 120 * GB, (8, 1, 4096), {"recompute": "full"}, "shard=8 expert=8"),
    ("mixtral_8x7b", 64, 8, 80 * GB, (256, 4, 4096), {}, "replicate=8 shard=8 expert=8"),
    ("llama2_7b", 8, 8, 80 * GB, (64, 8, 4096), {}, "shard=8"),
    ("deepseek_moe_16b", 8, 8, 80 * GB, (64, 8, 4096), {}, "shard=8 expert=8"),
    # with many micro-batches a step, a pipeline is cheaper than weights that travel for each of them
    ("mixtral_8x7b", 64, 8, 80 * GB, (512, 16, 4096), {}, "pipeline=2 replicate=4 shard=8 expert=8"),
    # fine-grained experts on many ranks leave little on each
    ("deepseek_moe_16b", 64, 8, 80 * GB, (256, 4, 4096), {}, "replicate=64 expert=64"),
    # what is given stays
    ("mixtral_8x7b", 64, 8, 80 * GB, (128, 4, 4096), {"tensor": 8, "expert": 4}, "shard=8 tensor=8 expert=4"),
    ("mixtral_tiny", 4, 4, None, (8, 1, 512), {"offload": True}, "shard=4 expert=4"),
]  # fmt: skip


def choice(
    name: str, world: int, local: int, memory: int | None, batch: tuple[int, int, int], given: dict
) -> tuple[Choice, Layout]:
    config = composed([f"model={name}"])
    model = with_vocabulary(config.model, 4096) if config.model.vocab_size is None else config.model
    global_batch, accumulation, seq_len = batch
    chosen = resolve(
        replace(AUTO, **given), model, config.router, world_size=world, local_world_size=local, memory=memory,
        global_batch=global_batch, accumulation=accumulation, seq_len=seq_len,
    )  # fmt: skip
    layout = chosen.parallel.layout(world, model, seq_len)
    assert layout.world == world and global_batch % (accumulation * layout.data) == 0
    assert all(getattr(chosen.parallel, key) == value for key, value in given.items())
    return chosen, layout


@pytest.mark.parametrize(("name", "world", "local", "memory", "batch", "given", "expected"), SITUATIONS)
def test_what_auto_chooses(name, world, local, memory, batch, given, expected) -> None:
    chosen, layout = choice(name, world, local, memory, batch, given)
    assert str(layout) == expected
    assert chosen.warning is None
    assert choice(name, world, local, memory, batch, given)[0] == chosen


def test_too_large_for_all_ranks_together() -> None:
    """Mixtral's 46.7 B parameters and their AdamW state are 747 GB."""
    chosen, layout = choice("mixtral_8x7b", 8, 8, 80 * GB, (8, 1, 4096), {"recompute": "full"})
    assert str(layout) == "shard=8 expert=8"
    assert chosen.warning is not None
    needed = re.search(r"needs about ([\d.]+) GB of each rank's 80.0 GB", chosen.warning)
    assert needed is not None and float(needed[1]) > 747 / 8


@pytest.mark.parametrize(
    ("world", "batch", "given", "line"),
    [
        (6, (4, 1, 512), {"tensor": 1, "context": 1}, r"global_batch=4: .* the 6 data-parallel ranks, the nearest: 6$"),
        (3, (4, 1, 512), {}, r"global_batch=4: .* the 3 data-parallel ranks, the nearest: 3 or 6$"),
        (4, (8, 1, 512), {"tensor": 3}, r"tensor=3: expected axes whose product .* nearest are tensor=2, tensor=4$"),
        (4, (8, 1, 512), {"expert": 3}, r"expert=3: expected a divisor of both model.num_experts=4 and"),
        (4, (8, 1, 512), {"pipeline": 4}, r"pipeline=4: expected at most"),
        (1, (8, 1, 512), {"offload": True}, r"offload=true: expected parallel.shard > 1"),
        (2, (7, 1, 512), {"offload": True}, r"global_batch=7: .* the 2 data-parallel ranks, the nearest: 6 or 8$"),
    ],
)
def test_what_nothing_can_mend(world: int, batch: tuple[int, int, int], given: dict, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        choice("mixtral_tiny", world, world, None, batch, given)
