"""The norms of routers and of single experts: of their weights, and of their gradients before clipping.

A rank adds the squares of the elements that it stores. An element that m ranks store counts 1/m on each of them. A
plain sum over all ranks therefore counts it once.

Shapes: L MoE layers, E experts, F = 1 + E columns (the router, then each expert).
"""

import re
from typing import Literal

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.region import LocalShard
from parallel.mesh import Mesh
from parallel.weight_shards import replica_group
from parallel.weight_specs import kind


class SquareSums:
    """Sums of squares of the weights and the gradients of every MoE layer.

    Args:
        sums_2LF: zeros, fp64, which receive the sums: of weights first, then of gradients.
    """

    def __init__(self, sums_2LF: Tensor, model: ModelConfig, mesh: Mesh) -> None:
        self.sums_2LF, self.mesh = sums_2LF, mesh
        layers = filter(model.is_moe_layer, range(model.num_layers))
        self.places = {number: place for place, number in enumerate(layers)}
        """Number of a block -> its place among the MoE layers."""

    @staticmethod
    def take(name: str) -> bool:
        """Return whether the parameter `name` belongs to a router or to routed experts."""
        return kind(name) in ("router", "experts")

    @torch.no_grad()
    def add(self, of: Literal["weight", "gradient"], name: str, shard: LocalShard) -> None:
        """Add this rank's shard of a parameter or of its gradient. Those that `take` does not name are left out.

        Weights that are stored in few bits are left out, too. The parameters of adapters count as the weights of their
        router or expert.

        Args:
            name: the parameter's name; `<stacked parameter>.<expert>` for a single expert (`training.trainable`).
        """
        if not self.take(name) or not shard.local.is_floating_point():
            return
        sums_F = self.sums_2LF[("weight", "gradient").index(of), self.places[int(name.split(".")[1])]]
        first, tensors = 0, shard.local.unsqueeze(0)
        if kind(name) == "experts":
            single = re.search(r"\.(\d+)$", name)
            first, tensors = (int(single[1]), tensors) if single else (shard.region.offset[0], shard.local)
            first += 1
        norms = torch.linalg.vector_norm(tensors, dim=tuple(range(1, tensors.dim())))
        copies = replica_group(name, self.mesh).size()
        sums_F[first : first + len(tensors)] += norms.double().square().to(sums_F.device) / copies
