"""What one optimizer step computes: the input of every estimate in this package."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from moe.config import ModelConfig, RouterConfig
from parallel.layout import Layout
from parallel.weight_specs import WeightSpec, count_weights


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

    def rows(self, layout: Layout) -> int:
        """Return b, the rows of a micro-batch on one data-parallel rank."""
        return self.global_batch // self.accumulation // layout.data

    def tokens(self, layout: Layout) -> int:
        """Return T, the tokens of a micro-batch that one rank routes."""
        return self.rows(layout) * self.seq_len // layout.sequence

    @cached_property
    def weights(self) -> Counter[WeightSpec]:
        """How many parameters of each spec the whole model has."""
        return count_weights(self.model, self.router, range(self.model.num_layers))
