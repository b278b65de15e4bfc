"""How many tokens each expert gets: balanced, by Zipf's law, or as recorded in a run.

Shapes: T tokens, K top-k, E experts, L MoE layers.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.errors import ConfigError, require

LOAD = "router/load/layer_"
"""The start of the metrics that have the loads of a layer."""
Loads = tuple[tuple[float, ...], ...]
"""For each MoE layer, the share of the assignments that each expert gets. The shares of a layer sum to 1."""


def read_skew(text: str, layers: int, experts: int) -> Loads | None:
    """Return the loads that a user asks for; None: balanced, or a dense model.

    Args:
        text: `balanced`, `zipf`, `zipf:<exponent>`, or the directory of a run.

    Raises:
        ConfigError: none of these.
    """
    if text == "balanced" or not layers:
        return None
    name, _, exponent = text.partition(":")
    if name != "zipf":
        return recorded(Path(text), layers, experts)
    try:
        power = float(exponent or 1)
    except ValueError:
        power = math.nan
    require(0 <= power < math.inf, ConfigError, f"skew={text}: expected a number >= 0 after zipf:")
    return zipf(layers, experts, power)


def balanced(layers: int, experts: int) -> Loads:
    """Return equal shares for all experts."""
    return ((1 / experts,) * experts,) * layers


def zipf(layers: int, experts: int, exponent: float) -> Loads:
    """Return shares in proportion to 1/n**exponent for the n-th expert. The first experts of all layers get most.

    The experts with most tokens are therefore on the same rank in all layers, which is the worst case for this rank.
    """
    weights = [n**-exponent for n in range(1, experts + 1)]
    return (tuple(weight / sum(weights) for weight in weights),) * layers


def recorded(run: Path, layers: int, experts: int) -> Loads:
    """Return the shares in the last row of a run's `metrics.jsonl` that has loads.

    Raises:
        ConfigError: there is no such row, or it is of a model with other layers or experts.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    loads: list[list[float]] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line) if LOAD in line else {}
            loads = [row[key] for key in sorted(row) if key.startswith(LOAD)] or loads
    except (OSError, ValueError) as error:
        raise ConfigError(f"skew={run}: expected a run with a readable metrics.jsonl ({error})") from error
    require(bool(loads), ConfigError, f"skew={run}: expected a run whose metrics.jsonl has {LOAD}00")
    found = (len(loads), len(loads[0]))
    require(
        found == (layers, experts),
        ConfigError,
        f"skew={run}: expected loads of {layers} MoE layers with {experts} experts each, found {found[0]} with "
        f"{found[1]}",
    )
    return tuple(tuple(share / sum(layer) for share in layer) for layer in loads)


def counts_of(shares: Sequence[float], tokens: int, top_k: int, limit: int | None = None) -> list[int]:
    """Return how many of T·K assignments each expert gets: at most T, and at most `limit`.

    Assignments above T go to the experts that have fewest. Those above `limit` are dropped.
    """
    wanted = torch.tensor(shares, dtype=torch.float64) * tokens * top_k
    counts = wanted.floor().long()
    # The largest remainders are rounded up.
    counts[(wanted - counts).argsort(descending=True, stable=True)[: tokens * top_k - int(counts.sum())]] += 1
    excess = int((counts - tokens).clamp(min=0).sum())
    counts.clamp_(max=tokens)
    for expert in counts.argsort(stable=True).tolist():
        moved = min(excess, tokens - int(counts[expert]))
        counts[expert] += moved
        excess -= moved
    return (counts if limit is None else counts.clamp(max=limit)).tolist()


def choose_experts(counts: Sequence[int], tokens: int, top_k: int) -> Tensor:
    """Return experts [T, K] of which expert e occurs counts[e] times, no expert twice for one token. The rest is E."""
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    experts = torch.nn.functional.pad(experts, (0, tokens * top_k - len(experts)), value=len(counts))
    return experts.view(top_k, tokens).t().contiguous()
