"""Whole tensors from the shards of all ranks, to compare them with those of a single process."""

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
    """Return every tensor that any rank names, whole, on every rank. Collective.

    Fails if no rank stores an element, or if two ranks store different values of it.
    """
    shards = {name: as_shard(tensor) for name, tensor in tensors.items()}
    shards_by_rank: list[dict[str, LocalShard]] = [{}] * dist.get_world_size()
    dist.all_gather_object(shards_by_rank, shards)
    whole = assemble(shards_by_rank)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: no rank stores an element, or two ranks store different values"
    return whole


def assert_same_history(history: Sequence[StepResult], expected: Sequence[StepResult], tolerance: float) -> None:
    """Compare losses, norms and the figures of layers to a relative `tolerance`, and counts exactly."""
    for step, expected_step in zip(history, expected, strict=True):
        for field in ("loss", "ce", "balance", "z", "grad_norm"):
            assert getattr(step, field) == pytest.approx(getattr(expected_step, field), rel=tolerance), field
        assert step.layers.keys() == expected_step.layers.keys()
        for name, values_L in step.layers.items():
            assert values_L == pytest.approx(expected_step.layers[name], rel=tolerance), name
        for norms_LF, expected_LF in zip(step.norms_2LF, expected_step.norms_2LF, strict=True):
            largest = expected_LF.max().item()
            torch.testing.assert_close(norms_LF, expected_LF, rtol=0, atol=tolerance * largest)
        assert torch.equal(step.counts_LE, expected_step.counts_LE)
        assert torch.equal(step.kept_LE, expected_step.kept_LE)
        assert (step.tokens, step.pairs) == (expected_step.tokens, expected_step.pairs)
