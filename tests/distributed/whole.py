"""Putting tensors together from the parts that ranks hold, for comparison with a single process."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moe.region import Held, Region
from training.shards import held


def gather_whole(tensors: Mapping[str, Tensor | Held]) -> dict[str, Tensor]:
    """Every tensor that any rank names, whole, on every rank. Collective.

    Fails where two ranks differ in what both hold, or where an element is held by none.
    """
    own = {name: tuple(held(tensor)) for name, tensor in tensors.items()}
    everywhere: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    whole: dict[str, Tensor] = {}
    for of_rank in everywhere:
        for name, (local, shape, region) in of_rank.items():
            if name not in whole:
                whole[name] = torch.full(shape, torch.nan, dtype=local.dtype)
            place = Region(*region).slices(Region.whole(shape))
            before = whole[name][place]
            assert (before.isnan() | (before == local)).all(), f"{name}: ranks differ"
            whole[name][place] = local
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: an element that no rank holds"
    return whole
