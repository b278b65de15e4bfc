"""The order of the rows, which depends only on the seed and not on the number of ranks.

Legend: A micro-batches of an optimizer step (accumulation), B rows of a micro-batch on this rank, S sequence length.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from common.errors import DataError
from data.batch import Batch
from data.packing import Row, padding_row
from data.tokens.split import TokenSplit


def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return the permutation of `range(num_rows)` for one epoch, int64 [num_rows]."""
    # NumPy guarantees the raw bits of a bit generator across versions, but not the results of Generator.permutation.
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    return np.argsort(bits, kind="stable")


class Loader:
    """Returns the training rows of this rank, step by step.

    The global order of rows consists of one epoch after another. An epoch contains every row once, and each epoch has
    its own permutation. A step can contain the end of one epoch and the start of the next.

    A loader resumes exactly (`load_state_dict`). The number of ranks, `global_batch` and `accumulation` can then
    differ from those of the saved loader.

    Args:
        split: the rows, usually `Store.train`.
        seq_len: S.
        global_batch: rows per optimizer step, over all ranks and micro-batches.
        accumulation: micro-batches per step.
        rank: the index of this rank among the data-parallel ranks.
        world_size: the number of data-parallel ranks.
        seed: an integer >= 0 that chooses the order.
        cross_documents: see `pack_row`.

    Raises:
        DataError: `global_batch` is not a multiple of `accumulation` times `world_size`, the split has no row of this
            length, or the seed is negative.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        seq_len: int,
        global_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        cross_documents: bool,
    ) -> None:
        if global_batch < 1 or global_batch % (accumulation * world_size):
            raise DataError(
                f"train.global_batch={global_batch}: expected a multiple of train.accumulation={accumulation} times "
                f"{world_size} data-parallel ranks"
            )
        if split.num_rows(seq_len) < 1:
            raise DataError(
                f"train.seq_len={seq_len}: expected at most {max(split.num_tokens - 1, 0)}, the {split.name} tokens "
                "that have a next token"
            )
        if seed < 0:
            raise DataError(f"run.seed={seed}: expected an integer >= 0")
        self.split = split
        self.seq_len = seq_len
        self.global_batch = global_batch
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.cross_documents = cross_documents
        self._num_rows = split.num_rows(seq_len)
        self._rows = 0
        self._skipped: list[tuple[int, int]] = []
        """First row and end of each range of the global order that no step takes, in order."""
        self._epoch = 0
        self._order = epoch_order(seed, 0, self._num_rows)

    def next_step(self) -> list[Batch]:
        """Return the A micro-batches, each [B, S], of this rank for the next optimizer step.

        A step takes the next G = `global_batch` rows of the global order that are not skipped. Micro-batch m contains
        rows m * G/A to (m + 1) * G/A - 1 of them. It is divided into `world_size` equal parts, and this rank takes part
        `rank`.
        """
        per_rank = self.global_batch // self.accumulation // self.world_size
        batches = []
        for micro in range(self.accumulation):
            first = (micro * self.world_size + self.rank) * per_rank
            numbers = [self._after(count + 1) - 1 for count in range(first, first + per_rank)]
            batches.append(Batch.stack([self._row(number) for number in numbers], numbers))
        self._rows = self._after(self.global_batch)
        return batches

    def _after(self, count: int) -> int:
        """Return the position in the global order after the next `count` rows that are not skipped."""
        position = self._rows
        for first, end in self._skipped:
            if first >= position + count:
                break
            if position < end:
                count -= max(0, first - position)
                position = end
        return position + count

    def _row(self, number: int) -> Row:
        """Return row `number` of the global order."""
        epoch, place = divmod(number, self._num_rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.seed, epoch, self._num_rows)
        return self.split.row(int(self._order[place]), self.seq_len, self.cross_documents)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, the same on every rank.

        `rows` is the number of rows that all ranks together have consumed or skipped, and `skipped` has the ranges that
        are skipped. The other entries identify the global order.
        """
        skipped = {"skipped": [list(pair) for pair in self._skipped]} if self._skipped else {}
        return {"rows": self._rows} | skipped | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `state`, which any rank of any layout can have saved.

        Raises:
            DataError: `state` belongs to another corpus, sequence length or seed, and so to another order of rows.
        """
        keys = {"corpus": "data", "seq_len": "train.seq_len", "seed": "run.seed"}
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(
                    f"{keys[name]}={value}: expected {state.get(name)}, the {name} of the checkpoint's rows"
                )
        self._rows = int(state["rows"])
        self._skipped = [(int(first), int(end)) for first, end in state.get("skipped", [])]

    def go_back(self, state: dict[str, Any], steps: int, skip: int) -> None:
        """Go back to `state`, and skip the rows of the last `skip` of the `steps` steps that have followed it.

        These steps must have had the same `global_batch`.

        Raises:
            DataError: as `load_state_dict`.
        """
        skipped = self._skipped  # also the ranges that are younger than `state`
        self.load_state_dict(state)
        self._skipped = skipped
        first, end = self._after((steps - skip) * self.global_batch), self._after(steps * self.global_batch)
        outside = [pair for pair in skipped if pair[1] <= first or pair[0] >= end]
        self._skipped = sorted([*outside, (first, end)])

    def _identity(self) -> dict[str, Any]:
        return {"corpus": self.split.key, "seq_len": self.seq_len, "seed": self.seed}


def evaluation_batches(
    split: TokenSplit, *, seq_len: int, batch_rows: int, rank: int, world_size: int, cross_documents: bool
) -> Iterator[Batch]:
    """Yield the rows of `split` that this rank evaluates, in batches of shape [`batch_rows`, S].

    The ranks together get every row once, and every rank gets the same number of batches. After the last row, batches
    are filled with rows of padding (document number -1).

    Args:
        split: the rows, usually `Store.heldout`.
        seq_len: S.
        batch_rows: rows per batch.
        rank: the index of this rank among the data-parallel ranks.
        world_size: the number of data-parallel ranks.
        cross_documents: see `pack_row`.
    """
    num_rows = split.num_rows(seq_len)
    for numbers in numbers_of_rank(num_rows, batch_rows, rank, world_size):
        yield Batch.stack(
            [split.row(i, seq_len, cross_documents) if i < num_rows else padding_row(seq_len) for i in numbers]
        )


def numbers_of_rank(num_rows: int, batch_rows: int, rank: int, world_size: int) -> Iterator[range]:
    """Yield the numbers of the rows of each batch of this rank, of which those from `num_rows` on are padding.

    The ranks together get every row once, and every rank gets the same number of batches.
    """
    for start in range(0, num_rows, batch_rows * world_size):
        first = start + rank * batch_rows
        yield range(first, first + batch_rows)
