"""Plans against what is really built, formulas against hand-computed cases, and the choices of `auto`."""

import itertools
import re
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from common.errors import ModelError
from moe.accounting.flops import meta_model
from moe.config import AdapterConfig, ModelConfig, RouterConfig, split_adapter_name
from moe.init import init_parameters
from moe.losses import CHUNK_ELEMENTS
from moe.model import ModelInputs, Transformer
from moe.recompute import Recompute, set_recompute
from parallel.apply import build_model
from parallel.config import ParallelConfig
from parallel.context import rows_to_each
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.planning.auto import Choice, resolve
from parallel.planning.check import check_layout
from parallel.planning.plan import (
    CHUNK_LOGITS,
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
    all_gather_bytes,
    all_reduce_bytes,
    context_bytes,
    expert_bytes,
    expert_tensor_bytes,
    fetched_positions,
    gradient_bytes,
    prediction_bytes,
    routed_rows,
    tensor_bytes,
)
from parallel.planning.workload import Workload
from parallel.stages import stage_layers, stages_of
from parallel.startup.launch import World
from parallel.weight_specs import (
    EXPERT_TENSOR_DIMS,
    TENSOR_DIMS,
    check_weights,
    count_weights,
    kind,
    named_weights,
    tensor_dim,
)
from tests.test_conf import composed
from training.config import with_vocabulary

MODEL = ModelConfig(
    dim=16, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=24, num_experts=8, top_k=2,
    expert_hidden_dim=12, num_shared_experts=1, first_k_dense=1, vocab_size=40,
)  # fmt: skip
UNEVEN = replace(MODEL, num_kv_heads=1, hidden_dim=23, expert_hidden_dim=13, vocab_size=41)
"""Tensor parallelism divides none of its dims but the query heads."""
PARTS = replace(MODEL, qk_norm="width", attention_bias="all", shared_hidden_dim=15, shared_gate=True)
"""Has the parameters that only some families have."""
DENSE = replace(MODEL, num_experts=None, top_k=None, expert_hidden_dim=None, num_shared_experts=0, first_k_dense=0)
ODD = replace(MODEL, dim=18, num_experts=6, expert_hidden_dim=10, num_shared_experts=0, tie_embeddings=True)
"""FSDP shards its norms, embedding and experts into shards of unequal size."""
LATENT = replace(MODEL, num_kv_heads=4, kv_lora_rank=32, q_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=4,
                 v_head_dim=10, head_dim=16)  # fmt: skip


@dataclass(frozen=True)
class ScaledRouterConfig(RouterConfig):
    """The configuration of a plugin's router, with two parameters beside the usual one and a key that has no hash."""

    options: dict[str, float] = field(default_factory=dict)

    def weight_shapes(self, dim: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        return super().weight_shapes(dim, num_experts) | {"scale": (num_experts,), "low_rank.weight": (4, dim)}


ROUTER, SCALED = RouterConfig(), ScaledRouterConfig()


@pytest.mark.parametrize("name", ["mixtral_8x7b", "deepseek_moe_16b", "switch_base_8", "glam_64e", "llama2_7b"])
def test_specs_are_those_of_the_built_model(name: str) -> None:
    config = composed([f"model={name}"])
    listed = named_weights(config.model, config.router)
    built = {key: tuple(weight.shape) for key, weight in meta_model(config.model, config.router).named_parameters()}
    assert built == {key: weight.shape for key, weight in listed.items()}
    check_weights(built, config.model, config.router)
    for key, weight in listed.items():
        leaf = re.findall(r"\w+(?:\.bias)?$", key.removesuffix(".weight"))[0]
        dims = {"tensor": TENSOR_DIMS, "kv_heads": TENSOR_DIMS, "experts": EXPERT_TENSOR_DIMS}.get(weight.kind, {})
        assert (weight.kind, weight.tensor_dim) == (kind(key), dims.get(leaf)), key


def test_every_layer_lists_the_parameters_of_a_plugins_router() -> None:
    plain, scaled = named_weights(MODEL, RouterConfig()), named_weights(MODEL, SCALED)
    added = {name: weight for name, weight in scaled.items() if name not in plain}
    assert {name: weight.shape for name, weight in added.items()} == {
        f"layers.{layer}.ffn.router.{name}": shape
        for layer in range(1, 6)
        for name, shape in (("scale", (8,)), ("low_rank.weight", (4, 16)))
    }
    assert {weight.kind for weight in added.values()} == {"router"}
    assert scaled.items() - added.items() == plain.items()
    # Two of the five MoE layers are in this stage.
    counted = count_weights(MODEL, SCALED, range(2, 4)) - count_weights(MODEL, RouterConfig(), range(2, 4))
    assert counted == {added["layers.1.ffn.router.scale"]: 2, added["layers.1.ffn.router.low_rank.weight"]: 2}
    assert named_weights(DENSE, SCALED) == named_weights(DENSE, ROUTER)


def test_a_plan_includes_the_parameters_of_a_plugins_router() -> None:
    parallel = ParallelConfig(pipeline=2, shard=2, expert=2)
    plain, scaled = (planned(parallel, MODEL, 8, router=router) for router in (RouterConfig(), SCALED))
    extra = [scaled.stages[rank].parameters - plain.stages[rank].parameters for rank in range(2)]
    moe_layers = [sum(map(MODEL.is_moe_layer, stage.layers)) for stage in plain.stages]
    assert extra == [layers * (8 + 4 * 16) for layers in moe_layers]
    # FSDP does not shard them: the four ranks of a stage all-reduce their gradients.
    assert scaled.traffic["gradients"] - plain.traffic["gradients"] == pytest.approx(5 * 72 * 4 * 2 * 3 / 4 / 2)
    assert scaled.traffic["shard"] == plain.traffic["shard"]
    # The search caches what it computes, and must not hash the configuration: `options` has no hash.
    assert (
        resolve(AUTO, workload(Layout(shard=4), router=SCALED), World(world_size=4, local_world_size=4)).warning is None
    )


@pytest.mark.parametrize(
    ("name", "expected", "dim"),
    [
        ("embedding", "tensor", 0),
        ("norm.weight", "replicated", None),
        ("layers.0.ffn_norm.weight", "replicated", None),
        ("layers.0.ffn.w_down.weight", "tensor", 1),
        ("layers.0.ffn.shared.w_down.weight", "tensor", 1),
        ("layers.0.attention.wq.weight", "tensor", 0),
        ("layers.0.attention.wv.weight", "kv_heads", 0),
        ("layers.0.ffn.shared_gate.weight", "replicated", None),
        ("layers.0.attention.wq.bias", "tensor", 0),
        ("layers.0.attention.wk.bias", "kv_heads", 0),
        ("layers.0.attention.wo.bias", "replicated", None),
        ("layers.0.attention.q_norm.weight", "replicated", None),
        ("layers.0.ffn.router.low_rank.weight", "router", None),
        ("layers.0.ffn.router.wq.weight", "router", None),
        ("layers.0.ffn.router.experts.w_up", "router", None),
        ("layers.0.ffn.experts.w_down", "experts", 2),
        ("layers.0.ffn.experts.w_down.13", "experts", None),
        ("layers.0.attention.wq.adapter.a", "replicated", None),
        ("layers.0.attention.wq.adapter.b", "tensor", 0),
        ("layers.0.attention.wq.adapter.magnitude", "tensor", 0),
        ("layers.0.attention.wk.adapter.b", "kv_heads", 0),
        ("layers.0.attention.wo.adapter.a", "tensor", 1),
        ("layers.0.attention.wo.adapter.b", "replicated", None),
        ("layers.0.ffn.experts.adapters.w_up.a", "experts", None),
        ("layers.0.ffn.experts.adapters.w_up.b", "experts", 1),
        ("layers.0.ffn.experts.adapters.w_down.a", "experts", 2),
        ("layers.0.ffn.experts.adapters.w_down.b", "experts", None),
        ("layers.0.ffn.router.adapter.a", "router", None),
    ],
)
def test_kinds(name: str, expected: str, dim: int | None) -> None:
    assert (kind(name), tensor_dim(name)) == (expected, dim)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.ffn.adapter.weight",
        "layers.0.ffn.experts.w_down.bias",
        "layers.0.ffn.w_down.13",
        "layers.0.ffn.w_up.bias",
        "layers.0.attention.v_norm.weight",
        "layers.1.ffn.experts.b_up",
        "layers.1.ffn.experts.wq",
        "scale",
    ],
)
def test_a_parameter_without_a_rule_is_an_error(name: str) -> None:
    with pytest.raises(
        ModelError, match=rf"^{re.escape(name)}: expected .* parallel/weight_specs\.py covers .*no rule$"
    ):
        kind(name)


@pytest.mark.parametrize(
    ("name", "shape", "difference"),
    [
        ("layers.3.ffn.adapter.weight", (4, 16), "expected no parameter of this name, found shape [4,16]"),
        ("layers.3.ffn.router.bias", (8,), "expected no parameter of this name, found shape [8]"),
        ("layers.3.ffn.router.weight", (8, 8), "expected shape [8,16], found shape [8,8]"),
        ("layers.3.attention.wo.weight", None, "expected shape [16,16], found no parameter of this name"),
    ],
)
def test_a_built_model_with_other_parameters_is_refused(name: str, shape: tuple | None, difference: str) -> None:
    built = {key: tuple(weight.shape) for key, weight in meta_model(MODEL, RouterConfig()).named_parameters()}
    check_weights(built, MODEL, RouterConfig())
    changed = {key: value for key, value in (built | {name: shape}).items() if value is not None}
    hint = "(parallel/weight_specs.py lists every parameter of a model"
    with pytest.raises(ModelError, match=f"^{re.escape(f'{name}: {difference} {hint}')}.*RouterConfig"):
        check_weights(changed, MODEL, RouterConfig())
    # Of several differences, the first in the order of the model is named.
    first = r"^layers\.1\.ffn\.router\.weight: expected shape \[8,16\], found shape \[9,9\] "
    with pytest.raises(ModelError, match=first):
        check_weights(changed | {"layers.1.ffn.router.weight": (9, 9)}, MODEL, RouterConfig())


def workload(layout: Layout, model: ModelConfig = MODEL, router: RouterConfig = ROUTER, **options: float) -> Workload:
    """Two rows of 32 tokens on every data-parallel rank in each of four micro-batches."""
    sizes = {"accumulation": 4, "seq_len": 32, "itemsize": 4} | options
    return Workload(model, router, global_batch=2 * int(sizes["accumulation"]) * layout.data, **sizes)  # type: ignore[arg-type]


def planned(
    parallel: ParallelConfig, model: ModelConfig, world: int, router: RouterConfig = ROUTER, **options: float
) -> Plan:
    layout = parallel.layout(world, model, 32)
    return plan(layout, parallel, workload(layout, model, router, **options))


BUILT = [
    *itertools.product((MODEL, ODD), (
        ParallelConfig(expert=2),
        ParallelConfig(shard=4, tensor=2, expert=2),
        ParallelConfig(shard=8, expert=1),
        ParallelConfig(context=2, shard=2, expert=2, expert_tensor=2),
        ParallelConfig(pipeline=2, shard=4, expert=2),
        ParallelConfig(pipeline=2, schedule="interleaved", tensor=2, expert=2),
        ParallelConfig(pipeline=2, stage_layers=(1, 5)),
    )),
    (UNEVEN, ParallelConfig(tensor=4, expert=2, expert_tensor=2)),
    (UNEVEN, ParallelConfig(shard=4, tensor=2, expert=2)),
    (PARTS, ParallelConfig(pipeline=2, tensor=4, expert=2)),
    (PARTS, ParallelConfig(shard=4, tensor=2, expert=2)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "parallel"),
    BUILT,
    ids=[
        " ".join(f"{key}={value}" for key, value in vars(parallel).items() if value != getattr(ParallelConfig(), key))
        + {MODEL: "", ODD: " odd", UNEVEN: " uneven", PARTS: " parts"}[model]
        for model, parallel in BUILT
    ],
)
def test_a_plan_has_the_memory_of_what_is_built(model: ModelConfig, parallel: ParallelConfig) -> None:
    """On every rank of eight, none of which is a process."""
    layout = parallel.layout(8, model)
    largest = [0] * layout.pipeline
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        try:
            mesh = build_mesh(torch.device("cpu"), layout)
            position = mesh.pipeline.rank()
            layers: list[range] | list[None] = [None]
            if layout.pipeline > 1:
                by_stage = stage_layers(model, ROUTER, parallel.num_stages(layout), parallel.stage_layers)
                layers = [by_stage[stage] for stage in stages_of(position, layout, parallel.schedule)]
            parts = [
                build_model(model, ROUTER, mesh, compute_dtype=torch.float32, seed=None, layers=layers_of_part)
                for layers_of_part in layers
            ]
            weights = [
                part.local_shard(name, weight).local for part in parts for name, weight in part.named_parameters()
            ]
            largest[position] = max(largest[position], sum(weight.numel() for weight in weights))
            assert all(weight.element_size() == 4 for weight in weights)
        finally:
            dist.destroy_process_group()
    expected = planned(parallel, model, 8, trained=0.5)
    assert [stage.parameters for stage in expected.stages] == largest
    for stage in expected.stages:
        assert stage.weights == 4 * stage.parameters
        # half of it trains
        assert (stage.gradients, stage.moments) == pytest.approx((stage.weights / 2, stage.weights), rel=1e-3)
        assert stage.state == stage.weights + stage.gradients + stage.moments and stage.host == 0


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(shard=4, tensor=2, expert=2),
        ParallelConfig(pipeline=2, tensor=4, expert=2),
        ParallelConfig(pipeline=2, shard=4, expert=4),
    ],
    ids=["fsdp", "tensor", "fsdp and pipeline"],
)
def test_a_plan_with_adapters_has_the_gradients_and_moments_of_these_alone(parallel: ParallelConfig) -> None:
    """Every kind of weight has an adapter. The largest numbers of their elements are those of the built parts."""
    model = replace(PARTS, adapter=AdapterConfig(kind="lora", rank=3, targets=("*",)))
    layout = parallel.layout(8, model)
    largest = [(0, 0)] * layout.pipeline
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        try:
            mesh = build_mesh(torch.device("cpu"), layout)
            position = mesh.pipeline.rank()
            layers = None
            if layout.pipeline > 1:
                layers = stage_layers(model, ROUTER, layout.pipeline, None)[position]
            part = build_model(model, ROUTER, mesh, compute_dtype=torch.float32, seed=None, layers=layers)
            elements = {name: part.local_shard(name, p).local.numel() for name, p in part.named_parameters()}
            adapters = sum(number for name, number in elements.items() if split_adapter_name(name)[1] is not None)
            found = sum(elements.values()), adapters
            largest[position] = (max(largest[position][0], found[0]), max(largest[position][1], found[1]))
        finally:
            dist.destroy_process_group()
    question = workload(layout, model)
    stages = plan(layout, parallel, replace(question, trained=question.adapter_share)).stages
    assert [(stage.parameters, stage.gradients // 4) for stage in stages] == largest
    assert all(stage.moments == 2 * stage.gradients and 0 < stage.gradients < stage.weights for stage in stages)


def test_optimizer_state_is_as_many_tensors_as_the_workload_says() -> None:
    for moments in (0, 1, 3):
        stage = planned(ParallelConfig(shard=2), MODEL, 2, moments=moments).fullest
        assert stage.moments == moments * stage.weights


def test_formulas_by_hand() -> None:
    assert all_gather_bytes(4, 10) == 30
    assert all_reduce_bytes(4, 8) == 12
    # 6 rows of 5 numbers of 2 bytes: 60 bytes, two thirds to other ranks, out and back, and gradients
    assert expert_bytes(6, 5, 3, 2) == pytest.approx(4 * 40)
    assert expert_tensor_bytes(6, 5, 3, 2) == 4 * 120
    assert tensor_bytes(7, 5, 2, 4) == 4 * 140
    assert prediction_bytes(7, 2, 2) == 3 * 14 * 4
    assert context_bytes(3, 2, 16, 4) == 2 * 3 * 2 * 16 * 4
    assert bubble(1, 8, "1f1b") == 0
    assert bubble(4, 8, "1f1b") == 3 / 11
    assert bubble(4, 8, "interleaved") == 3 / 19
    assert [micro_batches_in_flight(rank, 4, 8, "1f1b") for rank in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(0, 4, 2, "1f1b") == 2


@pytest.mark.parametrize(("window", "mean"), [(None, 12), (5, 3), (13, 8), (1, 0)])
def test_positions_fetched(window: int | None, mean: float) -> None:
    """Four ranks with eight positions each fetch 0, 8, 16 and 24 without a window; 0, 4, 4, 4 with W = 5; 0, 8, 12, 12
    with W = 13."""
    assert fetched_positions(window, 8, 4) == mean
    reach = 24 if window is None else window - 1
    assert sum(sum(rows_to_each(reach, 8, source, 4)) for source in range(4)) / 4 == mean


def test_rows_and_gradients_by_hand() -> None:
    replicas, contexts = Layout(replicate=4), Layout(context=4)
    assert routed_rows(workload(replicas), replicas) == 2 * 2 * 32
    assert routed_rows(workload(contexts), contexts) == 2 * 2 * 8
    # ceil(1.25 · 2 · 32 / 8) = 10 rows for each expert of each sequence, filled or not
    assert routed_rows(workload(replicas, router=RouterConfig(capacity_factor=1.25)), replicas) == 8 * 2 * 10
    assert routed_rows(workload(contexts, router=RouterConfig(capacity_factor=0.5)), contexts) == 2 * 2 * 8 / 2
    choice = RouterConfig(kind="expert_choice", allow_noncausal=True, balance_coef=0.0, capacity_factor=1.5)
    assert routed_rows(workload(contexts, router=choice), contexts) == 2 * 2 * 8 * 1.5
    # Dense layers on two replicas of two shards: half of them is all-reduced over two ranks, 4 bytes per element.
    weights = dict.fromkeys(named_weights(DENSE, ROUTER).values(), 1)
    elements = sum(weight.numel for weight in weights)
    layout = Layout(replicate=2, shard=2)
    assert gradient_bytes(weights, layout, workload(layout)) == elements / 2 * 4
    assert gradient_bytes(weights, Layout(shard=2), workload(Layout(shard=2))) == 0
    # Two ranks store each of the two key/value heads [4, 16], and four all norms [16]: 6 layers, and the last norm.
    layout = ParallelConfig(tensor=4).layout(4, DENSE)
    weights = count_weights(DENSE, ROUTER, range(6))
    assert gradient_bytes(weights, layout, workload(layout)) == 4 * (6 * 2 * 4 * 16 + 13 * 16 * 2 * 3 / 4)


def test_a_layout_that_sends_nothing_and_one_that_sends_everything() -> None:
    alone = planned(ParallelConfig(), MODEL, 1)
    assert alone.sent == 0 and alone.bubble == 0
    every = ParallelConfig(pipeline=2, shard=2, replicate=2, context=2, tensor=2, expert=4, expert_tensor=2)
    expected = planned(every, MODEL, 32)
    assert all(expected.traffic.values())
    assert {len(row) for row in describe(expected, str)} == {len(HEADER)} and len(describe(expected, str)) == 2
    assert set(describe_traffic(expected, str)) == {*expected.traffic, "idle"}


def test_recompute_and_offload_need_less_memory() -> None:
    modes = ("none", "selective", "full")
    stored = [planned(ParallelConfig(recompute=mode), MODEL, 1).fullest.activations for mode in modes]  # type: ignore[arg-type]
    assert stored[0] > stored[1] > stored[2]
    kept, offloaded = (planned(ParallelConfig(shard=2, offload=offload), MODEL, 2).fullest for offload in (False, True))
    assert offloaded.host == kept.state and offloaded.device == kept.device - kept.state


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize(
    "model",
    [replace(MODEL, num_shared_experts=0), MODEL, PARTS, LATENT],
    ids=["mixtral", "deepseek", "parts", "latent"],
)
def test_activations_are_about_what_autograd_stores(model: ModelConfig, mode: Recompute) -> None:
    model = replace(model, dim=64, head_dim=16, hidden_dim=160, expert_hidden_dim=80)
    built = Transformer(model, RouterConfig(), torch.float32)
    init_parameters(built, 0)
    set_recompute(built, mode)
    weights = {weight.untyped_storage().data_ptr() for weight in built.parameters()}
    stored: dict[int, torch.Tensor] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, 40, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        x = built(ModelInputs(tokens, torch.arange(64).expand(2, -1)), predict=lambda x, weight: x).result
    # The gradients of the hidden states and of the head, and a chunk of logits.
    size = x.nbytes + 4 * 40 * 64 + 4 * 40 * x.shape[1] * 2
    size += sum(tensor.untyped_storage().nbytes() for pointer, tensor in stored.items() if pointer not in weights)
    parallel = ParallelConfig(recompute=mode)
    step = workload(Layout(), model, seq_len=64, accumulation=1)
    estimate = activation_bytes(Layout(), parallel, step, range(model.num_layers))
    assert 0.75 * size < estimate < 1.35 * size


LARGE = {
    "few": ModelConfig(dim=2048, num_layers=4, num_heads=16, num_kv_heads=4, head_dim=128, hidden_dim=3584,
                       num_experts=8, top_k=2, vocab_size=32_000),
    "many": ModelConfig(dim=2048, num_layers=3, num_heads=16, num_kv_heads=4, head_dim=128, hidden_dim=1408,
                        num_experts=64, top_k=6, num_shared_experts=2, vocab_size=50_304),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mode", "activations", "casts"),
    [
        ("few", "none", 5.793, 1.624),
        ("few", "selective", 2.975, 0.215),
        ("few", "full", 0.402, 0.131),
        ("many", "none", 7.226, 3.695),
        ("many", "selective", 3.904, 0.269),
        ("many", "full", 0.336, 0.206),
    ],
)
def test_a_plan_in_bf16_has_what_autograd_stores_on_a_gpu(
    name: str, mode: Recompute, activations: float, casts: float
) -> None:
    """The numbers are GB of saved tensors after a forward pass of 4 x 4,096 tokens on a fake CUDA device, where norms
    and attention take other paths than on a CPU. They do not have what the loss makes, and what is recomputed."""
    model = LARGE[name]
    step = Workload(model, RouterConfig(), global_batch=4, accumulation=1, seq_len=4096)
    found = plan(Layout(), ParallelConfig(recompute=mode), step).fullest
    of_block = sum(
        weight.numel() for key, weight in meta_model(model, RouterConfig()).layers[0].named_parameters()
        if ("ffn." in key and "router" not in key) or (mode == "full" and "router" not in key)
    )  # fmt: skip
    assert found.casts == pytest.approx(1e9 * casts + (0 if mode == "none" else 2 * of_block), rel=2e-3)
    one, two = (activation_bytes(Layout(), ParallelConfig(recompute=mode), step, range(n)) for n in (1, 2))
    recomputed = 2 * one - two
    loss = 4 * (model.vocab_size or 0) * model.dim + max(recomputed, 2 * CHUNK_LOGITS)
    assert found.activations - loss == pytest.approx(1e9 * activations, rel=0.06)


@pytest.mark.parametrize(("name", "gigabytes"), [("few", 0.8053), ("many", 0.8053)])
def test_jitter_stores_its_factors_and_the_tokens_times_them_in_fp32(name: str, gigabytes: float) -> None:
    """Measured as above. Without shared experts, the router's input itself is not stored then."""
    step = Workload(LARGE[name], RouterConfig(), global_batch=4, accumulation=1, seq_len=4096)
    jittered = replace(step, router=RouterConfig(jitter=0.1))
    layers = range(LARGE[name].num_layers)
    less, more = (activation_bytes(Layout(), ParallelConfig(), each, layers) for each in (step, jittered))
    assert more - less == pytest.approx(1e9 * gigabytes, rel=1e-3)


@pytest.mark.parametrize(("mode", "blocks"), [("none", 4), ("full", 1), ("selective", 0)])
def test_overlap_casts_the_experts_once_for_each_half(mode: Recompute, blocks: int) -> None:
    """In bf16, a rank with half of the experts stores the second cast of their weights, of all blocks or of one."""
    model = replace(LARGE["few"], num_layers=4)
    step = Workload(model, RouterConfig(), global_batch=4, accumulation=1, seq_len=4096)
    parallel = ParallelConfig(recompute=mode)
    once, twice = (
        plan(Layout(replicate=2, expert=2, overlap=overlap), parallel, step).fullest for overlap in (False, True)
    )
    experts = meta_model(model, RouterConfig()).layers[0].ffn.experts.parameters()
    assert twice.casts - once.casts == blocks * 2 * sum(weight.numel() for weight in experts) // 2
    assert twice.activations == once.activations


def test_gradients_replace_activations_in_the_only_micro_batch() -> None:
    once, twice = (planned(ParallelConfig(), MODEL, 1, accumulation=number).fullest for number in (1, 2))
    assert once.activations == twice.activations
    assert once.device == once.weights + once.moments + max(once.gradients, once.activations)
    assert twice.device == twice.state + twice.activations


def test_a_chunk_of_logits_counts_whatever_the_vocabulary() -> None:
    assert CHUNK_ELEMENTS["cuda"] == CHUNK_LOGITS
    large = replace(DENSE, vocab_size=2**20)
    step = workload(Layout(), large, seq_len=512, accumulation=1)
    more = workload(Layout(), replace(large, vocab_size=2**21), seq_len=512, accumulation=1)
    sizes = [activation_bytes(Layout(), ParallelConfig(), each, range(large.num_layers)) for each in (step, more)]
    assert sizes[0] > step.itemsize * CHUNK_LOGITS
    assert sizes[1] - sizes[0] == 4 * 2**20 * large.dim  # the gradient of the head's weight


AUTO = ParallelConfig(tensor="auto", pipeline="auto", context="auto", shard="auto")
GB = 10**9
SITUATIONS = [
    # Laptops and small machines: as without `auto`.
    ("small", 1, 1, 8 * GB, (16, 1, 512), {}, "one process"),
    ("small", 2, 2, 8 * GB, (16, 1, 512), {}, "replicate=2 expert=2"),
    ("small", 4, 4, None, (16, 4, 512), {}, "replicate=4 expert=4"),
    ("mixtral_tiny", 3, 3, 8 * GB, (12, 1, 128), {}, "replicate=3"),
    # A batch with fewer rows than ranks.
    ("mixtral_tiny", 8, 8, None, (2, 1, 512), {}, "replicate=2 context=4 expert=4"),
    ("mixtral_tiny", 4, 4, None, (1, 1, 512), {}, "context=4 expert=4"),
    # If the simplest layout does not fit, weights are sharded.
    ("mixtral_8x7b", 8, 8, 141 * GB, (8, 1, 4096), {"recompute": "full"}, "replicate=8 expert=8"),
    ("mixtral_8x7b", 8, 8, 120 * GB, (8, 1, 4096), {"recompute": "full"}, "shard=8 expert=8"),
    ("mixtral_8x7b", 64, 8, 80 * GB, (256, 4, 4096), {}, "replicate=8 shard=8 expert=8"),
    ("llama2_7b", 8, 8, 80 * GB, (64, 8, 4096), {}, "shard=8"),
    ("deepseek_moe_16b", 8, 8, 80 * GB, (64, 8, 4096), {}, "shard=8 expert=8"),
    # With many micro-batches per step, a pipeline is cheaper than gathering the weights for each of them.
    ("mixtral_8x7b", 64, 8, 80 * GB, (512, 16, 4096), {}, "pipeline=2 replicate=4 shard=8 expert=8"),
    # Fine-grained experts on many ranks: each rank stores few.
    ("deepseek_moe_16b", 64, 8, 80 * GB, (256, 4, 4096), {}, "replicate=64 expert=64"),
    # Sizes that the user sets are kept.
    (
        "mixtral_8x7b", 64, 8, 80 * GB, (128, 4, 4096), {"tensor": 8, "expert": 4},
        "replicate=2 shard=4 tensor=8 expert=4",
    ),
    ("mixtral_tiny", 4, 4, None, (8, 1, 512), {"offload": True}, "shard=4 expert=4"),
]  # fmt: skip


def choice(
    name: str, world: int, local: int, memory: int | None, batch: tuple[int, int, int], given: dict
) -> tuple[Choice, Layout]:
    config = composed([f"model={name}"])
    model = with_vocabulary(config.model, 4096) if config.model.vocab_size is None else config.model
    global_batch, accumulation, seq_len = batch
    step = Workload(model, config.router, global_batch, accumulation, seq_len)
    chosen = resolve(replace(AUTO, **given), step, World(world_size=world, local_world_size=local), memory)
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
        (1, (8, 1, 512), {"overlap": True}, r"overlap=true: expected parallel.expert > 1 beside it, found 1$"),
        (2, (7, 1, 512), {"offload": True}, r"global_batch=7: .* the 2 data-parallel ranks, the nearest: 6 or 8$"),
    ],
)
def test_an_impossible_layout_is_refused(world: int, batch: tuple[int, int, int], given: dict, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        choice("mixtral_tiny", world, world, None, batch, given)


@pytest.mark.parametrize(
    ("heads", "tensor", "line"),
    [
        ((12, 6), 4, r"tensor=4: expected a divisor or a multiple of model.num_kv_heads=6$"),
        ((6, 2), 4, r"tensor=4: expected a divisor of model.num_heads=6$"),
        ((6, 1), 3, r"tensor=3: expected a divisor of train.seq_len=32$"),
    ],
)
def test_tensor_parallelism_divides_heads_and_rows(heads: tuple[int, int], tensor: int, line: str) -> None:
    model, parallel = replace(MODEL, num_heads=heads[0], num_kv_heads=heads[1]), ParallelConfig(tensor=tensor)
    layout = parallel.layout(tensor, model)
    with pytest.raises(ValueError, match=f"^{line}"):
        check_layout(layout, parallel, workload(layout, model))


def test_parts_for_the_grouped_kernel_are_multiples_of_eight() -> None:
    model, parallel = replace(MODEL, expert_hidden_dim=24, expert_kernel="grouped"), ParallelConfig(expert_tensor=2)
    layout = parallel.layout(2, model)
    with pytest.raises(ValueError, match=r"^expert_tensor=2: expected parts of the experts' hidden width 24 that are"):
        check_layout(layout, parallel, workload(layout, model))
