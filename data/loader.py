"""Which rows come when: an order that depends on the seed alone, whatever the number of ranks.

Legend: A micro-batches of an optimizer step (accumulation), B rows of one of them on this rank, S sequence.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from common.errors import DataError
from data.batch import Batch
from data.packing import Row, padding_row
from data.tokens.split import TokenSplit


def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The permutation of `range(num_rows)` of one epoch, int64."""
    # NumPy promises the raw bits of a bit generator for all time, and not what Generator.permutation makes of them.
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    return np.argsort(bits, kind="stable")


class Loader:
    """This rank's share of the training rows, step by step; resumes exactly, also with other sizes.

    An epoch is every row once, in an order of its own; the next follows without a gap, within a step if need be.

    Args:
        seq_len: S.
        global_batch: rows of an optimizer step, over all ranks and micro-batches.
        accumulation: micro-batches of a step.
        rank, world_size: of the data-parallel ranks.
        seed: >= 0, chooses the order.

    Raises:
        DataError: sizes that do not divide, or text that fills no row.
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
            found = f"train.accumulation={accumulation} times {world_size} data-parallel ranks"
            raise DataError(f"train.global_batch={global_batch}: expected a multiple of {found}")
        if split.num_rows(seq_len) < 1:
            most = max(split.num_tokens - 1, 0)
            raise DataError(
                f"train.seq_len={seq_len}: expected at most {most}, the {split.name} tokens that have a next"
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
        self._epoch = 0
        self._order = epoch_order(seed, 0, self._num_rows)

    def next_step(self) -> list[Batch]:
        """The A micro-batches, each [B, S], of this rank for the next optimizer step.

        Micro-batch m is rows m*G/A ... (m+1)*G/A of the step's G = `global_batch` rows in the global order, and of
        these the `rank`-th of `world_size` equal parts is this rank's.
        """
        per_rank = self.global_batch // self.accumulation // self.world_size
        batches = []
        for micro in range(self.accumulation):
            first = self._rows + (micro * self.world_size + self.rank) * per_rank
            rows = [self._row(number) for number in range(first, first + per_rank)]
            batches.append(Batch.stack(rows, first_number=first))
        self._rows += self.global_batch
        return batches

    def _row(self, number: int) -> Row:
        """Row `number` of the endless global order."""
        epoch, place = divmod(number, self._num_rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.seed, epoch, self._num_rows)
        return self.split.row(int(self._order[place]), self.seq_len, self.cross_documents)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able. `rows`: rows that all ranks together have consumed; the rest tells which order they are of."""
        return {"rows": self._rows} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after `state`, saved by any rank of any layout.

        Raises:
            DataError: it is of another corpus, sequence length or seed: its rows would be others.
        """
        keys = {"corpus": "data", "seq_len": "train.seq_len", "seed": "run.seed"}
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(
                    f"{keys[name]}={value}: expected {state.get(name)}, the {name} of the checkpoint's rows"
                )
        self._rows = int(state["rows"])

    def _identity(self) -> dict[str, Any]:
        return {"corpus": self.split.key, "seq_len": self.seq_len, "seed": self.seed}


def evaluation_batches(
    split: TokenSplit, *, seq_len: int, batch_rows: int, rank: int, world_size: int, cross_documents: bool
) -> Iterator[Batch]:
    """Every row of `split` once over all ranks, in [`batch_rows`, S] batches, as many on each rank.

    Where the rows run out, rows of padding alone (documents -1) stand in for them.
    """
    num_rows = split.num_rows(seq_len)
    for start in range(0, num_rows, batch_rows * world_size):
        first = start + rank * batch_rows
        yield Batch.stack(
            [
                split.row(i, seq_len, cross_documents) if i < num_rows else padding_row(seq_len)
                for i in range(first, first + batch_rows)
            ]
        )
