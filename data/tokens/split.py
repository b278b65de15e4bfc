"""One side of a token store, train or held-out, as rows.

Legend: S sequence, T tokens of a slice of the stream.
"""

from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from data.packing import Row, pack_row, whole_document_rows
from data.tokens.build import ANSWERS


class TokenSplit:
    """The documents of one split as one stream of tokens, <s> document </s> <s> ..., that rows are cut from.

    Row i of length S has the tokens i*S ... i*S + S: S inputs and, one further, S labels. `keep_last_row`: what is
    left at the end becomes a padded row (held-out: every token is a label once, <s> aside); else it is dropped.

    Conversations are not cut where a row ends, so that no answer is asked for without its question: a row has whole
    documents and padding (`whole_document_rows`), and only answers are labels.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], name: str, *, keep_last_row: bool = False) -> None:
        entry = manifest["splits"][name]
        self.name = name
        self.key: str = manifest["key"]
        self.num_tokens: int = entry["tokens"]
        self.keep_last_row = keep_last_row
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shards = [np.memmap(directory / shard, dtype=dtype, mode="r") for shard in entry["shards"]]
        self._shard_starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self._starts = np.load(directory / f"{name}-starts.npy", mmap_mode="r", allow_pickle=False)
        self._domain_ids = np.load(directory / f"{name}-domains.npy", mmap_mode="r", allow_pickle=False)
        self._answers: np.ndarray | None = None
        if f"{name}{ANSWERS}" in manifest["files"]:
            self._answers = np.load(directory / f"{name}{ANSWERS}", mmap_mode="r", allow_pickle=False)
        self._bounds: dict[int, np.ndarray] = {}

    def check_vocab(self, vocab_size: int) -> None:
        """Raises: DataError: a token id outside of the vocabulary of `vocab_size`."""
        for shard in self._shards:
            highest = max((int(shard[i : i + 2**24].max()) for i in range(0, len(shard), 2**24)), default=0)
            if highest >= vocab_size:
                file = shard.filename
                raise DataError(f"{file}: expected token ids below vocab_size {vocab_size}, found {highest}")

    def num_rows(self, seq_len: int) -> int:
        """Rows of S = `seq_len`; the last token of the stream can only be a label."""
        if self._answers is not None:
            return len(self._whole_rows(seq_len))
        pairs = max(self.num_tokens - 1, 0)
        return -(-pairs // seq_len) if self.keep_last_row else pairs // seq_len

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` ... `stop` - 1 of the stream, [T]."""
        first = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = start - int(self._shard_starts[first])
            parts.append(self._shards[first][offset : offset + stop - start])
            start += len(parts[-1])
            first += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def row(self, i: int, seq_len: int, cross_documents: bool = False) -> Row:
        """Row `i`, 0 <= i < `num_rows(seq_len)`; `cross_documents`: see `pack_row`."""
        start, stop = i * seq_len, min((i + 1) * seq_len + 1, self.num_tokens)
        if self._answers is not None:
            start, stop = map(int, self._whole_rows(seq_len)[i])
        tokens_T = self.tokens(start, stop)
        first, last = np.searchsorted(self._starts, [start, start + len(tokens_T) - 1], side="right")
        starts = self._starts[first:last] - start
        supervised_T = None if self._answers is None else self._supervised(self._answers, start, stop)
        domain_ids = self._domain_ids[first - 1 : last]
        return pack_row(tokens_T, starts, domain_ids, seq_len, cross_documents, supervised_T)

    def _whole_rows(self, seq_len: int) -> np.ndarray:
        if seq_len not in self._bounds:
            self._bounds[seq_len] = whole_document_rows(self._starts, self.num_tokens, seq_len)
        return self._bounds[seq_len]

    @staticmethod
    def _supervised(answers: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Whether each of the tokens `start` ... `stop` - 1 belongs to an answer, [T]."""
        supervised_T = np.zeros(stop - start, dtype=bool)
        first = np.searchsorted(answers[:, 1], start, side="right")
        last = np.searchsorted(answers[:, 0], stop)
        for low, high in answers[first:last] - start:
            supervised_T[max(low, 0) : high] = True
        return supervised_T
