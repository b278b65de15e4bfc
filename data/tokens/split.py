"""The rows of one split of a token store: training or held-out.

Legend: S sequence length, T tokens of a slice of the stream.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import DataError
from data.packing import Row, pack_row, whole_document_rows
from data.tokens.build import ANSWERS_SUFFIX


class Excerpt(NamedTuple):
    """Consecutive tokens of one document."""

    tokens_T: np.ndarray
    document: int
    """The number of the document in the split."""
    domain: int


class TokenSplit:
    """The documents of one split as a stream of tokens, <s> document </s> <s> document </s> ..., divided into rows.

    Row i of length S is made from the S + 1 tokens i * S to i * S + S: the first S are inputs, the last S are labels.

    In a split of conversations, a row does not end within a conversation that fits a row, so that no answer is
    separated from its question. Rows contain whole documents and padding (`whole_document_rows`), and only answers are
    labels.

    Args:
        directory: the directory of the store.
        manifest: the store's manifest.
        name: `train` or `heldout`.
        keep_last_row: return the last, incomplete row too, padded. Every token except <s> is then a label once.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], name: str, *, keep_last_row: bool = False) -> None:
        entry = manifest["splits"][name]
        self.name = name
        self.key: str = manifest["key"]
        self.num_tokens: int = entry["tokens"]
        self.keep_last_row = keep_last_row
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        # An empty file cannot be mapped. A text that is only evaluated has nothing to train on.
        shards = entry["shards"] if self.num_tokens else []
        self._shards = [np.memmap(directory / shard, dtype=dtype, mode="r") for shard in shards]
        self._shard_starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self._starts = np.load(directory / f"{name}-starts.npy", mmap_mode="r", allow_pickle=False)
        self._domain_ids = np.load(directory / f"{name}-domains.npy", mmap_mode="r", allow_pickle=False)
        self._answers: np.ndarray | None = None
        if f"{name}{ANSWERS_SUFFIX}" in manifest["files"]:
            self._answers = np.load(directory / f"{name}{ANSWERS_SUFFIX}", mmap_mode="r", allow_pickle=False)
        self._row_bounds: dict[int, np.ndarray] = {}

    def check_vocab(self, vocab_size: int) -> None:
        """Read all tokens and compare them with the size of the vocabulary.

        Raises:
            DataError: a token id is not below `vocab_size`.
        """
        for shard in self._shards:
            highest = max((int(shard[i : i + 2**24].max()) for i in range(0, len(shard), 2**24)), default=0)
            if highest >= vocab_size:
                raise DataError(f"{shard.filename}: expected token ids below vocab_size {vocab_size}, found {highest}")

    def num_rows(self, seq_len: int) -> int:
        """Return the number of rows of S = `seq_len`. The last token of the stream can only be a label."""
        if self._answers is not None:
            return len(self._whole_rows(seq_len))
        pairs = max(self.num_tokens - 1, 0)
        return -(-pairs // seq_len) if self.keep_last_row else pairs // seq_len

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens `start` to `stop` - 1 of the stream, [T]."""
        first = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = start - int(self._shard_starts[first])
            parts.append(self._shards[first][offset : offset + stop - start])
            start += len(parts[-1])
            first += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def excerpts(self, num_tokens: int, longest: int) -> list[Excerpt]:
        """Return excerpts of at most `num_tokens` tokens together, spread evenly over the domains.

        Every domain has the same share of the tokens. A domain that has fewer tokens than its share gives all, and
        leaves the rest to the other domains. In a domain, the excerpts are spread evenly over its text.

        Args:
            longest: the most tokens of an excerpt. It is shorter if its document ends.
        """
        lengths = np.diff(self._starts, append=self.num_tokens)
        domain_ids = np.asarray(self._domain_ids)
        sizes = np.bincount(domain_ids, weights=lengths).astype(np.int64)
        found: list[list[Excerpt]] = [[] for _ in sizes]
        left = num_tokens
        # The smallest domains first, so that the others know what these leave.
        for place, domain in enumerate(np.argsort(sizes, kind="stable").tolist()):
            share = min(int(sizes[domain]), left // (len(sizes) - place))
            left -= share
            found[domain] = list(self._excerpts_of(np.flatnonzero(domain_ids == domain), lengths, share, longest))
        return [excerpt for of_domain in found for excerpt in of_domain]

    def _excerpts_of(self, documents: np.ndarray, lengths: np.ndarray, share: int, longest: int) -> Iterator[Excerpt]:
        """Yield excerpts of `share` tokens of the text that `documents` make together."""
        ends = np.cumsum(lengths[documents])
        blocks = -(-share // longest)
        skipped = int(ends[-1]) - share if blocks else 0
        for block in range(blocks):
            before = block * skipped // blocks
            start, stop = before + block * share // blocks, before + (block + 1) * share // blocks
            while start < stop:
                place = int(np.searchsorted(ends, start, side="right"))
                document, end = int(documents[place]), int(ends[place])
                offset = int(self._starts[document]) + int(lengths[document]) - end
                end = min(end, stop)
                yield Excerpt(self.tokens(start + offset, end + offset), document, int(self._domain_ids[document]))
                start = end

    def row(self, i: int, seq_len: int, cross_documents: bool = False) -> Row:
        """Return row `i`, 0 <= i < `num_rows(seq_len)`. For `cross_documents`, see `pack_row`."""
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
        if seq_len not in self._row_bounds:
            self._row_bounds[seq_len] = whole_document_rows(self._starts, self.num_tokens, seq_len)
        return self._row_bounds[seq_len]

    @staticmethod
    def _supervised(answers: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return whether each of the tokens `start` to `stop` - 1 belongs to an answer, bool [T]."""
        supervised_T = np.zeros(stop - start, dtype=bool)
        first = np.searchsorted(answers[:, 1], start, side="right")
        last = np.searchsorted(answers[:, 0], stop)
        for low, high in answers[first:last] - start:
            supervised_T[max(low, 0) : high] = True
        return supervised_T
