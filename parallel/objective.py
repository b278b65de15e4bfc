"""The interface between an engine or a pipeline and the loss. `training.step` has the loss itself."""

from typing import Protocol

from torch import Tensor

from moe.router import RouterStats


class Objective(Protocol):
    """The loss as the sum of two parts, which are computed at different places of the model."""

    def compute_prediction_loss(self, logits_BSV: Tensor, micro_batch: int) -> Tensor:
        """Return the part of the loss that depends on the logits of the micro-batch, a scalar."""

    def compute_routing_loss(self, stats: RouterStats, layers: slice, micro_batch: int) -> Tensor:
        """Return the part of the loss that depends on the router statistics of this range of MoE layers, a scalar."""
