"""Compiled blocks: one graph per kind of block and kind of call, and the numbers of eager blocks."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.compiled import CompiledBlocks, compile_clock
from moe.config import AdapterConfig, ModelConfig, RopeScaling, RouterConfig
from moe.generation.generate import generate
from moe.init import init_parameters
from moe.model import ModelInputs, Transformer
from moe.noise import noise_keys
from moe.quantization import QuantizeConfig
from moe.recompute import Recompute, set_recompute

SEQ_LEN = 24
VOCAB = 32


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(
    router: RouterConfig, mode: Recompute = "none", dtype: torch.dtype = torch.float64, **model: Any
) -> Transformer:
    config = ModelConfig(
        **(
            {
                "dim": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "hidden_dim": 24,
                "num_experts": 4, "top_k": 2, "expert_hidden_dim": 12, "num_shared_experts": 1, "first_k_dense": 1,
                "vocab_size": VOCAB,
            }
            | model
        )
    )  # fmt: skip
    built = Transformer(config, router, dtype).to(torch.promote_types(dtype, torch.float32))
    init_parameters(built, 0)
    set_recompute(built, mode)
    return built


def inputs(seed: int, *, padded: bool = False, packed: bool = False) -> ModelInputs:
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(VOCAB, (2, SEQ_LEN), generator=generator)
    documents_BS = (torch.arange(SEQ_LEN) // 10).expand(2, -1).clone()
    if padded:
        documents_BS[1, 17:] = -1
    return ModelInputs(
        tokens_BS,
        torch.arange(SEQ_LEN).expand(2, -1),
        documents_BS if padded or packed else None,
        documents_BS >= 0 if padded else None,
        noise_keys(seed, torch.arange(2 * SEQ_LEN).view(2, -1)),
    )


STATS = ("counts_BE", "experts_BSK", "kept_BE", "figures_BM")


def losses_and_gradients(model: Transformer, *batches: ModelInputs) -> list[Tensor]:
    """Run micro-batches; return their losses, choices of experts and the sum of their gradients."""
    model.zero_grad()
    found = []
    for batch in batches:
        output = model(batch)
        assert output.stats is not None
        loss = output.logits_BSV.square().mean() + output.stats.prob_sum_BE.square().mean()
        if loss.requires_grad:
            loss.backward()
        found += [loss.detach(), *(getattr(output.stats, name) for name in STATS)]
    return found + [weight.grad for weight in model.parameters() if weight.grad is not None]


ROUTERS = {
    "jitter": (
        RouterConfig(jitter=0.1),
        {"qk_norm": "head", "attention_bias": "all", "rotary_dim": 2, "shared_gate": True},
    ),
    "bias_and_window": (RouterConfig(kind="sigmoid_topk", capacity_factor=1.0), {"sliding_window": 6}),
    "prob": (RouterConfig(capacity_factor=1.0, drop_policy="prob", allow_noncausal=True), {"ffn": "relu"}),
    "choice": (RouterConfig(kind="expert_choice", allow_noncausal=True, balance_coef=0.0), {}),
    "latent": (
        RouterConfig(),
        {"num_kv_heads": 4, "kv_lora_rank": 6, "q_lora_rank": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4,
         "v_head_dim": 5, "head_dim": 7, "rope_scaling": RopeScaling("yarn", 4.0, 8, mscale=0.7, mscale_all_dim=0.7)},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_compiled_blocks_compute_what_eager_blocks_compute(name: str) -> None:
    router, options = ROUTERS[name]
    eager, compiled = build(router, **options), build(router, **options)
    compiled.run_block = CompiledBlocks("aot_eager")
    batches = inputs(0), inputs(1, padded=True), inputs(2)
    expected, found = losses_and_gradients(eager, *batches), losses_and_gradients(compiled, *batches)
    assert compiled.run_block.refusal is None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_compiled_blocks_multiply_quantised_weights_and_train_adapters() -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra [quantize]")
    adapter = AdapterConfig(kind="lora", rank=2, targets=("attention", "experts"))

    def quantised() -> Transformer:
        with torch.device("meta"):
            model = Transformer(build(RouterConfig(), adapter=adapter).config, RouterConfig(), torch.float64).double()
        model.quantize(QuantizeConfig("nf4"))
        init_parameters(model.to_empty(device="cpu"), 0)
        for name, weight in model.named_parameters():
            weight.requires_grad_(".adapter" in name)
        return model

    eager, compiled = quantised(), quantised()
    compiled.run_block = CompiledBlocks("aot_eager")
    batches = inputs(0), inputs(1, padded=True)
    expected, found = losses_and_gradients(eager, *batches), losses_and_gradients(compiled, *batches)
    assert compiled.run_block.refusal is None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_equal_blocks_share_a_graph_and_other_contents_need_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(RouterConfig(jitter=0.1))
    model.run_block = CompiledBlocks("aot_eager")
    clock = compile_clock()
    before = clock.graphs
    losses_and_gradients(model, inputs(0), inputs(1))
    assert clock.graphs - before == 2  # a dense block and a MoE block
    losses_and_gradients(model, inputs(2, padded=True))
    assert clock.graphs - before == 4
    with torch.no_grad():
        losses_and_gradients(model, inputs(3))
    assert clock.graphs - before == 6
    losses_and_gradients(model, inputs(4), inputs(5, padded=True), inputs(6))
    with torch.no_grad():
        losses_and_gradients(model, inputs(7))
    assert clock.graphs - before == 6
    assert model.run_block.refusal is None


def test_evaluation_and_generation_compile_nothing_and_are_eager() -> None:
    eager, compiled = build(RouterConfig()), build(RouterConfig())
    compiled.run_block = CompiledBlocks("aot_eager")
    losses_and_gradients(compiled, inputs(0))
    frames = torch._dynamo.utils.counters["frames"].copy()
    graphs = compile_clock().graphs
    with torch.no_grad():
        expected = [eager.eval()(batch).logits_BSV for batch in (inputs(1), inputs(2, padded=True))]
        found = [compiled.eval()(batch).logits_BSV for batch in (inputs(1), inputs(2, padded=True))]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    compiled.train()
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    assert generate(compiled, prompts, max_tokens=6) == generate(eager, prompts, max_tokens=6)
    assert compiled.training
    assert compile_clock().graphs == graphs and torch._dynamo.utils.counters["frames"] == frames
    losses_and_gradients(compiled, inputs(3))
    assert compile_clock().graphs == graphs


@pytest.mark.parametrize("mode", [pytest.param("selective", marks=pytest.mark.slow), "full"])
def test_recomputation_is_a_part_of_the_graph(mode: Recompute) -> None:
    eager, compiled = build(RouterConfig(jitter=0.1)), build(RouterConfig(jitter=0.1), mode)
    compiled.run_block = CompiledBlocks("aot_eager")
    before = compile_clock().graphs
    expected, found = losses_and_gradients(eager, inputs(0)), losses_and_gradients(compiled, inputs(0))
    assert compile_clock().graphs - before == 2
    assert compiled.run_block.refusal is None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles kernels for CPUs with g++")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_generated_kernels_differ_by_rounding_and_repeat_bit_for_bit(dtype: torch.dtype, tolerance: float) -> None:
    eager, compiled = build(RouterConfig(), dtype=dtype, num_layers=2), build(RouterConfig(), dtype=dtype, num_layers=2)
    compiled.run_block = CompiledBlocks()
    expected, found = losses_and_gradients(eager, inputs(0)), losses_and_gradients(compiled, inputs(0))
    assert compiled.run_block.refusal is None
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y.double()).norm() <= tolerance * y.double().norm()
    again = losses_and_gradients(compiled, inputs(0))
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
