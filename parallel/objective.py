"""What an engine, or a pipeline, runs micro-batches through and towards. training/step.py has the loss itself."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from moe.router import RouterStats

Inputs = Mapping[str, Any]
"""Keyword arguments of `Transformer.forward` for one micro-batch, on the device."""


class Objective(Protocol):
    """What is differentiated: one part of the loss for each place in the model where it arises."""

    def compute_prediction_loss(self, logits_BSV: Tensor, micro_batch: int) -> Tensor:
        """The part that the logits of the micro-batch have, a scalar."""
        ...

    def compute_routing_loss(self, stats: RouterStats, layers: Sequence[int], micro_batch: int) -> Tensor:
        """The part that the router statistics of these MoE layers have, a scalar."""
        ...
