"""What the loader hands to the model.

Legend: B rows of this micro-batch on this rank, S sequence, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

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
    """Packed rows, all tensors [B, S] on one device.

    Raises:
        DataError: other shapes or dtypes, or a label on padding.
    """

    tokens_BS: torch.Tensor
    """int64; 0 on padding."""
    labels_BS: torch.Tensor
    """int64: the next token, or `IGNORE` where there is none in this document."""
    positions_BS: torch.Tensor
    """int64, from 0 at each start of a document and of a row."""
    documents_BS: torch.Tensor
    """int32: counts the documents of a row from 0; -1 on padding. Attention stays within one number."""
    domains_BS: torch.Tensor
    """uint8: index into `Store.domains`."""

    numbers_BS: torch.Tensor | None = None
    """int64: each place's number in the endless global order of training; what random draws for it depend on."""

    def __post_init__(self) -> None:
        shape = self.tokens_BS.shape
        for name, dtype in DTYPES.items():
            tensor = getattr(self, name)
            if tensor is None and name == "numbers_BS":
                continue
            if tensor.dtype != dtype or tensor.shape != shape or len(shape) != 2:
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise DataError(
                    f"batch.{name}: expected {dtype} of the [B, S] of tokens_BS {tuple(shape)}, found {found}"
                )
        # Reading values would make an accelerator wait; what lies there has been checked on its way.
        if self.tokens_BS.device.type == "cpu" and (self.labels_BS[self.documents_BS < 0] != IGNORE).any():
            raise DataError(f"batch.labels_BS: expected {IGNORE} on padding (documents_BS < 0), found labels")

    @classmethod
    def stack(cls, rows: Sequence[Row], first_number: int | None = None) -> "Batch":
        """Rows of one length as a batch on the CPU; `first_number`: of the first row in the global order."""
        tensors = [torch.from_numpy(np.stack(columns)) for columns in zip(*rows, strict=True)]
        if first_number is not None:
            length = tensors[0].shape[1]
            places = torch.arange(first_number * length, (first_number + len(rows)) * length)
            tensors.append(places.view(len(rows), length))
        return cls(*tensors)

    def part(self, pieces: Sequence[int], of: int) -> "Batch":
        """Of every row cut into `of` equal pieces, those of the numbers `pieces`, one behind the other."""
        if len(pieces) == of:
            return self
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(
            **{
                name: torch.cat([x.chunk(of, dim=1)[piece] for piece in pieces], dim=1)
                for name, x in tensors.items()
                if x is not None
            }
        )

    def to(self, device: torch.device | str) -> "Batch":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: x.to(device, non_blocking=True) for name, x in tensors.items() if x is not None})

    @property
    def num_labels(self) -> int:
        """Tokens that the cross-entropy is summed over."""
        return int((self.labels_BS != IGNORE).sum())

    @property
    def num_valid(self) -> int:
        """Tokens that are not padding."""
        return int((self.documents_BS >= 0).sum())
