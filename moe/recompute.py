"""What the backward pass computes again instead of keeping (activation checkpointing, arXiv 1604.06174).

- `selective`: the hidden layers of experts and dense networks, most of what a block keeps. No communication lies in
  between, so none is repeated.
- `full`: whole blocks, of which only the input is kept, and what orders tokens by expert: routing is decided once.
  Communication in the block is repeated.

Statistics of the router are what the forward pass returned; those of the second pass are dropped, so that nothing
counts twice.
"""

from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"]
Method = TypeVar("Method", bound=Callable[..., Any])


def set_recompute(model: nn.Module, mode: Recompute) -> None:
    """Set it on every module that knows how."""
    for module in model.modules():
        if hasattr(module, "recompute"):
            setattr(module, "recompute", mode)  # noqa: B010 (its type is not nn.Module's to know)


def recomputes(mode: Recompute) -> Callable[[Method], Method]:
    """Decorator of a module's method: it is `recomputed` where the module's attribute `recompute` is `mode`."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def run(self: Any, *arguments: Any) -> Any:
            bound = method.__get__(self)
            return recomputed(bound, *arguments) if self.recompute == mode else bound(*arguments)

        return cast(Method, run)

    return decorate


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, whose intermediates exist again only while its backward pass runs."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    # No random state to restore: nothing here draws from a generator (moe/noise.py hashes).
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=_decided_once)


class _Decisions(TorchDispatchMode):
    """Sorting is behind top-k, capacity and the order of dispatched rows: its results are kept, or used again.

    (torch's selective checkpoint contexts do that for any operator, but want the two passes to call the same operators
    one for one, and FSDP gathers weights where it sees fit.)
    """

    def __init__(self, kept: deque[Any], again: bool) -> None:
        super().__init__()
        self.kept = kept
        self.again = again

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "overloadpacket", None) is not torch.ops.aten.sort:
            return function(*args, **kwargs or {})
        if self.again:
            return self.kept.popleft()
        result = function(*args, **kwargs or {})
        self.kept.append(tuple(part.detach() for part in result))
        return result


def _decided_once() -> tuple[_Decisions, _Decisions]:
    kept: deque[Any] = deque()
    return _Decisions(kept, again=False), _Decisions(kept, again=True)
