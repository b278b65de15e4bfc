"""What one optimizer step computes: the input of every estimate in this package."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from moe.config import ModelConfig, RouterConfig
from moe.quantization import FULL_PRECISION, QuantizeConfig
from parallel.layout import Layout
from parallel.weight_specs import WeightSpec, count_weights, ranks_per_shard_group


@dataclass(frozen=True)
class Workload:
    """What one optimizer step computes, independent of how ranks divide the work."""

    model: ModelConfig
    router: RouterConfig
    global_batch: int
    """Rows (sequences) of the step, over all ranks and micro-batches."""
    accumulation: int
    """m: micro-batches of the step."""
    seq_len: int
    """S: tokens of a row."""
    itemsize: int = 2
    """Bytes of a number in the forward pass."""
    weight_itemsize: int = 4
    """Bytes of a number in weights, gradients and optimizer state."""
    trained: float = 1.0
    """Share of the parameters that train."""
    moments: int = 2
    """Optimizer state tensors per trained parameter, each as large as the parameter. AdamW has two."""

    quantize: QuantizeConfig = FULL_PRECISION
    """The weights that are stored in few bits."""

    def trained_share(self, weight: WeightSpec) -> float:
        """Return the share of a parameter's elements that train, which have gradients and moments.

        Adapters train in full. What else trains is spread evenly over the other parameters.
        """
        return 1.0 if weight.adapter else self._trained_share_of_base

    @cached_property
    def adapter_share(self) -> float:
        """The share of the parameters that belongs to adapters."""
        elements = {True: 0, False: 0}
        for weight, number in self.weights.items():
            elements[weight.adapter] += weight.numel * number
        return elements[True] / sum(elements.values())

    @cached_property
    def _trained_share_of_base(self) -> float:
        return max(0.0, self.trained - self.adapter_share) / (1 - self.adapter_share)

    def rows(self, layout: Layout) -> int:
        """Return b, the rows of a micro-batch on one data-parallel rank."""
        return self.global_batch // self.accumulation // layout.data

    def tokens(self, layout: Layout) -> int:
        """Return T, the tokens of a micro-batch that one rank routes."""
        return self.rows(layout) * self.seq_len // layout.sequence

    def shard_bytes(self, weight: WeightSpec, layout: Layout, itemsize: float) -> float:
        """Return the bytes of a parameter on the rank that stores most of it, or of its bytes if it is quantised.

        Args:
            itemsize: bytes of a number of a parameter that is not quantised.
        """
        ranks, packing = ranks_per_shard_group(layout)[weight.kind], weight.packing(self.quantize)
        if packing is not None:
            return weight.packed(packing).largest_shard(layout, ranks)
        return weight.largest_shard(layout, ranks) * itemsize

    def gathered_bytes(self, weight: WeightSpec, layout: Layout) -> float:
        """Return the bytes of a parameter as FSDP gathers it: in the compute dtype, or quantised."""
        packing = weight.packing(self.quantize)
        spec, itemsize = (weight, self.itemsize) if packing is None else (weight.packed(packing), 1)
        return math.prod(spec.local_shape(layout)) * itemsize

    @cached_property
    def workspace(self) -> int:
        """Bytes of the largest quantised matrix while it is dequantised."""
        packings = (weight.packing(self.quantize) for weight in self.weights)
        return max((packing.workspace_bytes(self.itemsize) for packing in packings if packing), default=0)

    @cached_property
    def weights(self) -> Counter[WeightSpec]:
        """How many parameters of each spec the whole model has."""
        return count_weights(self.model, self.router, range(self.model.num_layers))
