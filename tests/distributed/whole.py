"""Putting tensors together from the parts that ranks hold, for comparison with a single process."""

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from moe.region import Held
from training.parity import assemble
from training.shards import held


def gather_whole(tensors: Mapping[str, Tensor | Held]) -> dict[str, Tensor]:
    """Every tensor that any rank names, whole, on every rank. Collective.

    Fails where two ranks differ in what both hold, or where an element is held by none.
    """
    own = {name: held(tensor) for name, tensor in tensors.items()}
    everywhere: list[dict[str, Held]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    whole = assemble(everywhere)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: an element that no rank holds, or ranks differ"
    return whole
