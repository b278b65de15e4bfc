"""Putting tensors together from the parts that ranks hold, for comparison with a single process."""

from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.region import LocalShard
from training.checkpoint.shards import as_shard
from training.parity.trial import assemble
from training.step import StepResult


def gather_whole(tensors: Mapping[str, Tensor | LocalShard]) -> dict[str, Tensor]:
    """Every tensor that any rank names, whole, on every rank. Collective.

    Fails where two ranks differ in what both hold, or where an element is held by none.
    """
    own = {name: as_shard(tensor) for name, tensor in tensors.items()}
    everywhere: list[dict[str, LocalShard]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    whole = assemble(everywhere)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: an element that no rank holds, or ranks differ"
    return whole


def assert_same_history(mine: Sequence[StepResult], theirs: Sequence[StepResult], tolerance: float) -> None:
    """Figures to a relative `tolerance`, counts exactly."""
    for own, other in zip(mine, theirs, strict=True):
        for field in ("loss", "ce", "balance", "z", "grad_norm"):
            assert getattr(own, field) == pytest.approx(getattr(other, field), rel=tolerance), field
        assert torch.equal(own.counts_LE, other.counts_LE)
        assert (own.dropped, own.tokens) == (other.dropped, other.tokens)
