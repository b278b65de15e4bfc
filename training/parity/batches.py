"""The data: packed rows, uneven padding, and rows of padding only.

Shapes: B rows, S sequence.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from data.batch import IGNORE, Batch
from training.parity.cases import ACCUMULATION, LENGTH, VOCABULARY

LENGTHS = (16, 9, 16, 0, 13, 16, 3, 16)
"""Tokens of the rows, in turn. The rest of each row is padding."""


def rows_of_step(step: int, rows: int) -> dict[str, Tensor]:
    """Return the rows of one optimizer step, [B, S] with B = `rows`, as the fields of `data.batch.Batch`.

    Each row has one or two documents.
    """
    generator = torch.Generator().manual_seed(step)
    # The tokens of a row are all different. Where tokens compete for experts, equal tokens can tie exactly, and the
    # rounding of a layout would decide.
    tokens = torch.rand(rows, VOCABULARY, generator=generator).argsort(dim=1)[:, :LENGTH]
    second_start = torch.randint(1, LENGTH, (rows, 1), generator=generator)
    place = torch.arange(LENGTH).expand(rows, -1)
    lengths = torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(rows)]).unsqueeze(1)
    padding = place >= lengths
    labels = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    return {
        "tokens_BS": tokens.masked_fill(padding, 0),
        "labels_BS": labels.masked_fill(padding | (place == second_start - 1), IGNORE),
        "positions_BS": torch.where(place >= second_start, place - second_start, place).masked_fill(padding, 0),
        "documents_BS": (place >= second_start).int().masked_fill(padding, -1),
        "domains_BS": torch.zeros(rows, LENGTH, dtype=torch.uint8),
        "numbers_BS": (torch.arange(rows * LENGTH) + step * rows * LENGTH).view(rows, LENGTH),
    }


def micro_batches_of_rank(rows: Mapping[str, Tensor], data_rank: int, data_ranks: int) -> list[Batch]:
    """Return the micro-batches of one data rank.

    Micro-batch m of a step is the m-th contiguous part of its rows. Each data rank takes a contiguous part of that.
    """
    micro_batch = len(rows["tokens_BS"]) // ACCUMULATION
    per_rank = micro_batch // data_ranks
    starts = [m * micro_batch + data_rank * per_rank for m in range(ACCUMULATION)]
    return [Batch(**{key: value[start : start + per_rank] for key, value in rows.items()}) for start in starts]
