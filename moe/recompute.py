"""What the backward pass computes again instead of keeping (activation checkpointing, arXiv 1604.06174).

- `selective`: the hidden layers of experts and dense networks, most of what a block keeps. No communication lies in
  between, so none is repeated.
- `full`: whole blocks, of which only the input is kept, and what orders tokens by expert: routing is decided once.
  Communication in the block is repeated.

Statistics of the router are what the forward pass returned; those of the second pass are dropped, so that nothing
counts twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]
DECISIONS = (torch.ops.aten.sort.stable, torch.ops.aten.sort.default)
"""The operators behind top-k, capacity and the order of dispatched rows."""


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, whose intermediates exist again only while its backward pass runs."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    contexts = partial(create_selective_checkpoint_contexts, _keep_decisions)
    # No random state to restore: nothing here draws from a generator (moe/noise.py hashes).
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
        determinism_check="none",
    )


def set_recompute(model: nn.Module, mode: Recompute) -> None:
    """Set it on every module that knows how."""
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = mode


def _keep_decisions(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    overload = getattr(operator, "overloadpacket", operator)
    packets = {decision.overloadpacket for decision in DECISIONS}
    return CheckpointPolicy.MUST_SAVE if overload in packets else CheckpointPolicy.PREFER_RECOMPUTE
