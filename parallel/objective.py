"""The interface between an engine or a pipeline and the loss. `training.step` has the loss itself."""

from typing import Protocol

from torch import Tensor

from moe.router import RouterStats


class Objective(Protocol):
    """The loss as the sum of two parts, which are computed at different places of the model."""

    def compute_prediction_loss(self, x_BSD: Tensor, weight_VD: Tensor, micro_batch: int) -> Tensor:
        """Return the part of the loss that depends on the logits of the micro-batch, a scalar.

        Args:
            x_BSD: the hidden states after the last norm.
            weight_VD: the weight of the head; under tensor parallelism, this rank's shard.
        """

    def compute_routing_loss(self, stats: RouterStats, layers: slice, micro_batch: int) -> Tensor:
        """Return the part of the loss that depends on the router statistics of this range of MoE layers, a scalar."""
