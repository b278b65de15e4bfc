"""The models A and B of the benchmarks of whole steps, their weights and batches, and transformers' models."""

from typing import Any

import torch

from data.batch import IGNORE, Batch
from moe.config import ModelConfig
from moe.init import initial_std
from moe.model import Transformer

MODELS = {
    "A": ModelConfig(
        dim=2048, num_layers=16, num_heads=16, num_kv_heads=4, head_dim=128, hidden_dim=3584, num_experts=8, top_k=2,
        vocab_size=32_000,
    ),
    "B": ModelConfig(
        dim=2048, num_layers=6, num_heads=16, num_kv_heads=16, head_dim=128, hidden_dim=11_264, num_experts=64, top_k=6,
        num_shared_experts=2, expert_hidden_dim=1408, vocab_size=50_304,
    ),
}  # fmt: skip
"""A has few large experts, as Mixtral. B has many small ones, as DeepSeekMoE."""
ROWS, LENGTH = 4, 4096
"""The batch of a step: rows, and tokens of a row."""


@torch.no_grad()
def draw_weights(model: Transformer) -> None:
    """Draw the initial weights on the model's device, with the standard deviations of `moe.init`.

    Drawing them on the host, as a run does, takes longer than the measurements.
    """
    for buffer in model.buffers():
        buffer.zero_()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=initial_std(name, model.config))


def example_batch(rows: int, length: int, vocab_size: int, *, padded: bool = False) -> Batch:
    """Return rows of one document, on the CPU. With `padded`, the last eighth of the last row is padding."""
    shape, generator = (rows, length), torch.Generator().manual_seed(0)
    text, labels = torch.randint(0, vocab_size, (2, *shape), generator=generator).unbind()
    documents = torch.zeros(shape, dtype=torch.int32)
    if padded:
        documents[-1, length - length // 8 :] = -1
    padding = documents < 0
    return Batch(
        text.masked_fill(padding, 0),
        labels.masked_fill(padding, IGNORE),
        torch.arange(length).expand(shape).masked_fill(padding, 0),
        documents,
        torch.zeros(shape, dtype=torch.uint8),
        torch.arange(rows * length).view(shape),
    )


def transformers_model(
    model: ModelConfig, seq_len: int, dtype: torch.dtype, experts: str, **options: Any
) -> torch.nn.Module:
    """Return transformers' Mixtral with the shape of `model`, on the current default device.

    Args:
        seq_len: tokens of a row.
        dtype: of the weights.
        experts: the implementation of the experts, e.g. `grouped_mm`.
        options: further fields of its configuration.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=model.vocab_size, hidden_size=model.dim, intermediate_size=model.hidden_dim,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads, head_dim=model.head_dim, num_local_experts=model.num_experts,
        num_experts_per_tok=model.top_k, max_position_embeddings=seq_len, sliding_window=model.sliding_window,
        use_cache=False, tie_word_embeddings=False, **options,
    )  # fmt: skip
    kernels = {"attn_implementation": "sdpa", "experts_implementation": experts}
    peer: torch.nn.Module = MixtralForCausalLM._from_config(config, dtype=dtype, **kernels)
    return peer.train()
