"""The batch that the loader gives to the model.

Legend: B rows of a micro-batch on this rank, S sequence length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import DataError
from data.packing import IGNORE, Row

DTYPES = {
    "tokens_BS": torch.int64,
    "labels_BS": torch.int64,
    "positions_BS": torch.int64,
    "documents_BS": torch.int32,
    "domains_BS": torch.uint8,
    "numbers_BS": torch.int64,
}

__all__ = ["IGNORE", "Batch"]


@dataclass(frozen=True)
class Batch:
    """Packed rows. All tensors have the shape [B, S] and are on one device.

    Raises:
        DataError: a tensor has another shape or dtype, or there is a label on padding.
    """

    tokens_BS: torch.Tensor
    """int64; 0 on padding."""
    labels_BS: torch.Tensor
    """int64: the next token, or `IGNORE` where this document has no next token."""
    positions_BS: torch.Tensor
    """int64; starts from 0 at the start of every document and of every row."""
    documents_BS: torch.Tensor
    """int32: the number of the document within the row, from 0; -1 on padding. A token attends only to tokens with
    the same number."""
    domains_BS: torch.Tensor
    """uint8: index into `Store.domains`."""

    numbers_BS: torch.Tensor | None = None
    """int64: the number of each token's place in the global order of training, which runs over all epochs. Random
    numbers drawn for a place depend on this number and not on the layout. In a probe: the number of its place in the
    rows of the probe. None in an evaluation."""

    def __post_init__(self) -> None:
        shape = self.tokens_BS.shape
        for name, dtype in DTYPES.items():
            tensor = getattr(self, name)
            if tensor is None and name == "numbers_BS":
                continue
            if tensor.dtype != dtype or tensor.shape != shape or len(shape) != 2:
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise DataError(
                    f"batch.{name}: expected {dtype} with the shape [B, S] of tokens_BS {tuple(shape)}, found {found}"
                )
        # On an accelerator, reading values would wait for the device. They were checked on the CPU before the copy.
        if self.tokens_BS.device.type == "cpu" and (self.labels_BS[self.documents_BS < 0] != IGNORE).any():
            raise DataError(f"batch.labels_BS: expected {IGNORE} on padding (documents_BS < 0), found labels")

    @classmethod
    def stack(cls, rows: Sequence[Row], numbers: Sequence[int] | None = None) -> "Batch":
        """Return rows of equal length as a batch on the CPU.

        Args:
            numbers: the numbers of the rows in the global order of training. None: no `numbers_BS`.
        """
        tensors = [torch.from_numpy(np.stack(columns)) for columns in zip(*rows, strict=True)]
        if numbers is not None:
            length = tensors[0].shape[1]
            tensors.append(torch.tensor(numbers).unsqueeze(1) * length + torch.arange(length))
        return cls(*tensors)

    def part(self, pieces: Sequence[int], of: int) -> "Batch":
        """Split every row into `of` equal pieces and return those with the numbers `pieces`, concatenated."""
        if len(pieces) == of:
            return self
        return self._map(lambda tensor: torch.cat([tensor.chunk(of, dim=1)[piece] for piece in pieces], dim=1))

    def to(self, device: torch.device | str) -> "Batch":
        """Return a copy on `device`.

        A copy from the CPU to another device is one packed tensor in pinned memory, and the host does not wait for it.
        """
        if torch.device(device).type == "cpu" or not self.tokens_BS.is_cpu:
            return self._map(lambda tensor: tensor.to(device))
        tensors = {name: getattr(self, name) for name in DTYPES if getattr(self, name) is not None}
        packed = torch.stack([tensor.long() for tensor in tensors.values()]).pin_memory()
        parts = packed.to(device, non_blocking=True).unbind()
        return Batch(**{name: part.to(DTYPES[name]) for name, part in zip(tensors, parts, strict=True)})

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return the batch in which `function` has been applied to every tensor."""
        tensors = {name: getattr(self, name) for name in DTYPES}
        return Batch(**{name: function(tensor) for name, tensor in tensors.items() if tensor is not None})

    @property
    def num_labels(self) -> int:
        """The number of labels that are not `IGNORE`, over which the cross-entropy is summed."""
        return int((self.labels_BS != IGNORE).sum())

    @property
    def num_valid(self) -> int:
        """The number of tokens that are not padding."""
        return int((self.documents_BS >= 0).sum())

    def attended_pairs(self, window: int | None) -> int:
        """Return the number of query-key pairs of one layer: within documents, under a causal mask and a window.

        Args:
            window: the number of keys that a query attends to, its own position included. None: all earlier ones.
        """
        keys_BS = self.positions_BS + 1
        return int((keys_BS if window is None else keys_BS.clamp(max=window))[self.documents_BS >= 0].sum())
