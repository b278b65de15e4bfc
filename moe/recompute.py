"""Recomputation of activations in the backward pass (activation checkpointing, arXiv 1604.06174).

- `selective`: the hidden layers of experts and dense networks are recomputed. They are most of the activations of a
  block, and recomputing them repeats no communication.
- `full`: whole blocks are recomputed, communication included. A block stores its input, and the results of sorting, so
  that tokens go to the same experts in both passes.

The router statistics are those of the forward pass. The statistics of the recomputation are not used, so no token is
counted twice.
"""

from collections import deque
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]


def set_recompute(model: nn.Module, mode: Recompute) -> None:
    """Make the modules that `mode` selects recompute their activations in the backward pass.

    A module class that can be recomputed has an attribute `RECOMPUTE`: mode -> name of the method to recompute.
    """
    for module in model.modules():
        name = getattr(module, "RECOMPUTE", {}).get(mode)
        if name is not None:
            setattr(module, name, MethodType(_recomputing(getattr(type(module), name)), module))


@cache
def _recomputing(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method that recomputes `method`: one per class, so that modules of a class share compiled code."""

    def recompute(module: nn.Module, *arguments: Any) -> Any:
        return recomputed(method, module, *arguments)

    return recompute


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`. Its intermediate results are freed, and computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    # The model draws from no random generator (`moe.noise` hashes instead), so there is no random state to restore.
    contexts = _sort_once_compiled if torch.compiler.is_compiling() else _sort_once
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


DECISIONS = ("aten.sort", "aten.topk", "mixwright.top_k")
"""The operators whose results decide where tokens go. What follows from them is computed with integers."""


def _decides(operator: Any) -> bool:
    return str(getattr(operator, "overloadpacket", None)) in DECISIONS


class _StoredSorts(TorchDispatchMode):
    """Stores the results of `DECISIONS` in the forward pass, and returns them again in the recomputation.

    They decide top-k, capacity and the order of dispatched rows. A rounding difference between the two passes must not
    change these decisions.

    (torch's selective checkpoint contexts do this for any operator, but they require both passes to call the same
    operators in the same order. Under FSDP they do not, because it all-gathers weights only if they are not present.)
    """

    def __init__(self, results: deque[Any], recomputing: bool) -> None:
        TorchDispatchMode.__init__(self)
        self.results = results
        self.recomputing = recomputing

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _decides(function):
            return function(*args, **kwargs or {})
        if self.recomputing:
            return self.results.popleft()
        result = function(*args, **kwargs or {})
        self.results.append(tree_map(torch.Tensor.detach, result))
        return result


def _sort_once() -> tuple[_StoredSorts, _StoredSorts]:
    """Return the contexts of the forward pass and of the recomputation."""
    results: deque[Any] = deque()
    return _StoredSorts(results, recomputing=False), _StoredSorts(results, recomputing=True)


def _sort_once_compiled() -> Any:
    """Return the contexts for a graph that torch.compile traces. The recomputation is a part of the same graph."""
    return create_selective_checkpoint_contexts(_save_decisions)


def _save_decisions(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _decides(operator) else CheckpointPolicy.PREFER_RECOMPUTE
