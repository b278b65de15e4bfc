"""Small models of every kind, and data that are awkward: what layouts are compared on (training/parity/trial.py).

Packed rows, uneven padding, rows of padding only, an expert that nothing is sent to.

Shapes: B rows, S sequence, E experts, D model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.batch import IGNORE, Batch
from moe.config import ModelConfig, RouterConfig
from moe.model import Transformer
from moe.router import Router
from training.config import OptimConfig

LENGTH, VOCABULARY, ACCUMULATION, STEPS, SEED = 16, 40, 4, 5, 3
LENGTHS = (16, 9, 16, 0, 13, 16, 3, 16)
"""Tokens of the rows, in turn; the rest is padding."""
MODEL = ModelConfig(
    dim=16, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=4, hidden_dim=16, num_experts=8, top_k=2,
    vocab_size=VOCABULARY, sliding_window=5, init_std=0.2, expert_kernel="loop",
)  # fmt: skip
OPTIM = OptimConfig(lr=5e-3, warmup_steps=2, max_grad_norm=0.5)


@dataclass(frozen=True)
class Case:
    """A kind of model, and what of it trains."""

    model: ModelConfig
    router: RouterConfig
    train: str | tuple[str, ...] = "all"
    idle: bool = False
    """No token is ever sent to the last expert (before the first update)."""


MIXTRAL = Case(MODEL, RouterConfig(balance_coef=0.05, z_coef=0.01), idle=True)
CASES: Mapping[str, Case] = {
    "mixtral": MIXTRAL,
    "capacity": Case(
        replace(MODEL, sliding_window=None),
        RouterConfig(balance_coef=0.05, capacity_factor=0.75, balance_scope="sequence"),
    ),
    "deepseek": Case(
        replace(MODEL, top_k=3, expert_hidden_dim=8, num_shared_experts=2, first_k_dense=1),
        RouterConfig(
            kind="sigmoid_topk", scale=2.5, num_groups=4, topk_groups=2, bias_update_rate=0.01, balance_scope="sequence"
        ),
    ),
    "switch": Case(
        replace(MODEL, top_k=1, ffn="geglu", expert_ffn="relu", moe_every=2, tie_embeddings=True, sliding_window=None),
        RouterConfig(jitter=0.1, capacity_factor=1.25, layer_reduction="sum"),
    ),
    "expert_choice": Case(
        replace(MODEL, sliding_window=None),
        RouterConfig(kind="expert_choice", allow_noncausal=True, balance_coef=0.0),
    ),
    "pooled": Case(
        replace(MODEL, sliding_window=(3, None), expert_ffn="gelu"),
        RouterConfig(layer_reduction="hf_pooled", balance_coef=0.05, capacity_factor=0.75, drop_policy="prob",
                     allow_noncausal=True),
    ),
    "partly_frozen": replace(MIXTRAL, train=("router", "expert:3")),
}  # fmt: skip
"""`partly_frozen`: under expert parallelism most ranks hold no expert that trains."""


def rows_for(world_size: int) -> int:
    """Rows of a step, such that every number of data ranks in a world of this size shares them out evenly."""
    return ACCUMULATION * world_size * -(-4 // world_size)


def global_batch(step: int, rows: int) -> dict[str, Tensor]:
    """Rows [B, S] of one or two documents, unevenly padded, some of padding only."""
    generator = torch.Generator().manual_seed(step)
    # No token twice in a row: where tokens compete for experts, equal ones can tie exactly, and rounding would decide.
    tokens = torch.rand(rows, VOCABULARY, generator=generator).argsort(dim=1)[:, :LENGTH]
    cut = torch.randint(1, LENGTH, (rows, 1), generator=generator)
    place = torch.arange(LENGTH).expand(rows, -1)
    lengths = torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(rows)]).unsqueeze(1)
    padding = place >= lengths
    labels = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    return {
        "tokens_BS": tokens.masked_fill(padding, 0),
        "labels_BS": labels.masked_fill(padding | (place == cut - 1), IGNORE),
        "positions_BS": torch.where(place >= cut, place - cut, place).masked_fill(padding, 0),
        "documents_BS": (place >= cut).int().masked_fill(padding, -1),
        "domains_BS": torch.zeros(rows, LENGTH, dtype=torch.uint8),
        "numbers_BS": (torch.arange(rows * LENGTH) + step * rows * LENGTH).view(rows, LENGTH),
    }


def part_of(rows: Mapping[str, Tensor], data_rank: int, data_ranks: int) -> list[Batch]:
    """Micro-batch m is the m-th contiguous part of the rows; each data rank takes a contiguous part of that."""
    micro = len(rows["tokens_BS"]) // ACCUMULATION
    own = micro // data_ranks
    starts = [m * micro + data_rank * own for m in range(ACCUMULATION)]
    return [Batch(**{key: value[start : start + own] for key, value in rows.items()}) for start in starts]


def silence_last_expert(parts: Sequence[Transformer]) -> None:
    """Its logit is 0. The others' come in pairs x, -x, so that more than k of them are greater."""
    for module in (module for part in parts for module in part.modules() if isinstance(module, Router)):
        weight_ED = module.weight.detach()
        weight_ED[1:-2:2] = -weight_ED[0:-2:2]
        weight_ED[-1] = 0
