import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.accounting.costs import (
    Parts,
    active_parts,
    cache_bytes,
    count_parts,
    farthest_token,
    moved_bytes,
    receptive_field,
    stored_bytes,
    training_bytes,
    window_saving,
)
from moe.accounting.flops import count_parameters, forward_flops_per_token, meta_model, training_flops_per_token
from moe.attention.cache import Cache
from moe.config import ModelConfig, RouterConfig
from moe.model import ModelInputs, Transformer
from moe.quantization import QuantizeConfig
from parallel.apply import build_whole_model

MIXED = ModelConfig(
    dim=24,
    num_layers=5,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=40,
    ffn="geglu",
    num_experts=6,
    top_k=2,
    expert_hidden_dim=10,
    expert_ffn="relu",
    num_shared_experts=3,
    first_k_dense=1,
    moe_every=2,
    vocab_size=50,
    sliding_window=(4, 4, 4, 4, None),
    tie_embeddings=True,
)
"""Dense, dense, MoE, dense, MoE."""


def test_parts_by_hand() -> None:
    parts = count_parts(meta_model(MIXED, RouterConfig()))
    assert parts == Parts(
        embedding=50 * 24,
        head=0,
        attention=5 * (2 * 24 * 48 + 2 * 24 * 16),
        router=2 * 6 * 24,
        routed_experts=2 * 6 * 2 * 24 * 10,
        shared_experts=2 * 2 * 24 * 30,
        dense_ffn=3 * 3 * 24 * 40,
        norms=(2 * 5 + 1) * 24,
    )
    untied = count_parts(meta_model(dataclasses.replace(MIXED, tie_embeddings=False), RouterConfig()))
    assert untied == dataclasses.replace(parts, head=50 * 24)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_parts_and_active_parts_sum_to_the_counts_of_the_model(top_k: int) -> None:
    config = dataclasses.replace(MIXED, top_k=top_k)
    model = meta_model(config, RouterConfig())
    counts, parts = count_parameters(model), count_parts(model)
    active = active_parts(parts, config, RouterConfig())
    assert (parts.total, active.total, parts.routed_experts) == counts
    assert dataclasses.replace(active, routed_experts=0) == dataclasses.replace(parts, routed_experts=0)


@pytest.mark.parametrize(
    ("kind", "factor", "experts"),
    [
        ("softmax_topk", None, 2),
        ("softmax_topk", 1.25, 2),
        ("sigmoid_topk", 0.5, 1),
        ("expert_choice", None, 2),
        ("expert_choice", 0.5, 1),
        ("expert_choice", 2.0, 4),
        ("expert_choice", 9.0, 6),
    ],
)
def test_active_experts_are_those_that_compute_a_token(kind: str, factor: float | None, experts: int) -> None:
    router = RouterConfig(kind=kind, capacity_factor=factor, allow_noncausal=True, balance_coef=0.0)
    model = meta_model(MIXED, router)
    counts, expert = count_parameters(model), 2 * 24 * 10
    assert counts.active == counts.total - 2 * (6 - experts) * expert
    assert active_parts(count_parts(model), MIXED, router).total == counts.active
    dropless = forward_flops_per_token(meta_model(MIXED, RouterConfig()), 16)
    assert forward_flops_per_token(model, 16) == dropless + 2 * 2 * (experts - 2) * expert


def test_a_dense_model_is_active_as_a_whole() -> None:
    dense = ModelConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, hidden_dim=12, vocab_size=9)
    parts = count_parts(meta_model(dense, RouterConfig()))
    assert active_parts(parts, dense, RouterConfig()) == parts and parts.dense_ffn == 2 * 3 * 8 * 12
    assert parts.router == parts.routed_experts == parts.shared_experts == 0


def test_forward_flops_are_those_that_torch_counts() -> None:
    """Matmuls are compared exactly. torch's counter ignores masks, so attention is counted from the attended pairs."""
    config = dataclasses.replace(MIXED, expert_kernel="loop")
    model = Transformer(config, RouterConfig(), torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(50, (2, 16))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ModelInputs(tokens, torch.arange(16).expand(2, -1)))
    matmuls = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")
    visible = 4 * sum(min(4, i + 1) for i in range(16)) + sum(i + 1 for i in range(16))
    attention = 2 * 2 * 6 * 8 * visible / 16
    assert forward_flops_per_token(model, 16) == matmuls / 32 + attention
    assert training_flops_per_token(model, 16) == 3 * forward_flops_per_token(model, 16)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("context", [3, 17])
def test_rolling_cache_is_the_size_of_the_cache(dtype: str, torch_dtype: torch.dtype, context: int) -> None:
    cache = Cache(MIXED, 3, max_len=context, dtype=torch_dtype)
    counted = cache_bytes(MIXED, 3, context, dtype)
    assert counted.rolling == cache.nbytes
    full = Cache(dataclasses.replace(MIXED, sliding_window=None), 3, max_len=context, dtype=torch_dtype)
    assert counted.full == full.nbytes


@pytest.mark.parametrize("quantize", [QuantizeConfig("nf4"), QuantizeConfig("int8", targets=("experts",))], ids=str)
def test_bytes_of_quantised_weights_are_those_in_memory(quantize: QuantizeConfig) -> None:
    built = build_whole_model(MIXED, RouterConfig(), torch.device("cpu"), torch.bfloat16, quantize)
    stored = stored_bytes(built, "bf16")
    assert stored.total == sum(weight.untyped_storage().nbytes() for weight in built.parameters())
    experts = [built.layers[layer].ffn.experts for layer in (2, 4)]
    assert stored.routed_experts == sum(weight.untyped_storage().nbytes() for x in experts for weight in x.parameters())
    # Written and read once more in bf16.
    parts = count_parts(meta_model(MIXED, RouterConfig()))
    others = parts.attention + parts.shared_experts + parts.dense_ffn
    quantised = parts.routed_experts + (others if quantize.kind == "nf4" else 0)
    assert moved_bytes(built, "bf16").total == stored.total + 4 * quantised


def test_training_bytes() -> None:
    assert dataclasses.astuple(training_bytes(10)) == (40, 40, 0, 80, 80, 160)
    assert training_bytes(10, "fp32") == training_bytes(10)
    assert dataclasses.astuple(training_bytes(10, "bf16")) == (20, 20, 40, 80, 120, 160)
    assert dataclasses.astuple(training_bytes(10, "bf16", trained=3)) == (20, 6, 12, 24, 36, 62)


def test_receptive_field_is_none_with_any_full_layer() -> None:
    assert receptive_field(MIXED) is farthest_token(MIXED) is None
    windowed = dataclasses.replace(MIXED, sliding_window=(4, 4, 2, 1, 3))
    assert receptive_field(windowed) == 14


def test_farthest_token_is_the_oldest_that_moves_the_last_logit() -> None:
    config = dataclasses.replace(MIXED, sliding_window=(4, 2, 3, 1, 2))
    model = Transformer(config, RouterConfig(), torch.float64).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    tokens, positions = torch.full((1, 20), 7), torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        before = model(ModelInputs(tokens, positions)).logits_BSV[0, -1]
        moved = []
        for back in range(20):
            other = tokens.clone()
            other[0, 19 - back] = 8
            moved.append((model(ModelInputs(other, positions)).logits_BSV[0, -1] - before).abs().max() > 1e-6)
    assert max(back for back in range(20) if moved[back]) == farthest_token(config) == 7


@pytest.mark.parametrize(("context", "window"), [(32, 4), (7, 1), (5, 5), (5, 9), (1, 1)])
def test_window_saving_against_the_mask(context: int, window: int) -> None:
    distance = torch.arange(context).unsqueeze(1) - torch.arange(context)
    causal, seen = int((distance >= 0).sum()), int(((distance >= 0) & (distance < window)).sum())
    saving = window_saving(context, window)
    assert (saving.causal, saving.causal_windowed) == (causal, seen)
    assert (saving.full, saving.windowed) == (context**2, context * min(window, context))
    assert saving.saved_of_causal == 1 - seen / causal


def test_the_savings_of_the_course() -> None:
    saving = window_saving(32768, 4096)
    assert (saving.full, saving.windowed) == (1_073_741_824, 134_217_728)
    assert (f"{saving.saved:.1%}", f"{saving.saved_of_causal:.1%}") == ("87.5%", "76.6%")
