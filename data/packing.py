"""Rows from one long stream of documents, with positions and numbers that keep the documents apart.

Legend: S sequence length, T tokens of the stream that a row is made from (at most S + 1).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IGNORE = -100
"""The label of a position that predicts nothing, as `torch.nn.functional.cross_entropy` ignores it by default."""


class Row(NamedTuple):
    """One packed row. The fields have the meaning, and the order, of the fields of `Batch`."""

    tokens_S: np.ndarray
    labels_S: np.ndarray
    positions_S: np.ndarray
    documents_S: np.ndarray
    domains_S: np.ndarray


def pack_row(
    tokens_T: np.ndarray,
    starts: np.ndarray,
    domain_ids: np.ndarray,
    seq_len: int,
    cross_documents: bool,
    supervised_T: np.ndarray | None = None,
) -> Row:
    """Return the row of S = `seq_len` inputs and labels for T consecutive tokens of the stream, padded if T <= S.

    Args:
        tokens_T: 1 <= T <= S + 1 tokens. The token at index S is a label only.
        starts: the indices in `tokens_T` at which documents start, ascending, without index 0.
        domain_ids: the domain of the first token's document, then those of the documents at `starts`.
        cross_documents: let attention, positions and labels cross documents, as if the row were one document.
        supervised_T: whether each token may be a label. None: every token may.
    """
    inputs = min(len(tokens_T), seq_len)
    row = padding_row(seq_len)
    row.tokens_S[:inputs] = tokens_T[:inputs]
    targets = tokens_T[1:]
    row.labels_S[: len(targets)] = targets
    if supervised_T is not None:
        row.labels_S[: len(targets)][~supervised_T[1:]] = IGNORE
    index_S = np.arange(inputs)
    document_S = np.searchsorted(starts, index_S, side="right")
    row.domains_S[:inputs] = domain_ids[document_S]
    if cross_documents:
        row.documents_S[:inputs] = 0
        row.positions_S[:inputs] = index_S
    else:
        row.documents_S[:inputs] = document_S
        row.positions_S[:inputs] = index_S - np.concatenate([[0], starts])[document_S]
        row.labels_S[starts - 1] = IGNORE  # The next token belongs to the next document.
    return row


def whole_document_rows(starts: np.ndarray, num_tokens: int, seq_len: int) -> np.ndarray:
    """Divide the stream into rows of S = `seq_len` such that every document that fits a row is in one row.

    A row has S inputs and one last label, S + 1 tokens. It takes as many of the next documents as fit completely. A
    longer document starts a new row and is split every S tokens; the row with its last tokens can take further
    documents.

    Args:
        starts: the indices in the stream at which documents start, ascending, the first 0.
        num_tokens: the length of the stream.

    Returns:
        int64 [n, 2]: the start and the end (exclusive) in the stream of each of the n rows.
    """
    ends = np.append(starts[1:], num_tokens)
    rows = []
    start = 0
    while start < num_tokens:
        fit = int(np.searchsorted(ends, start + seq_len + 1, side="right"))
        stop = int(ends[fit - 1]) if fit else 0
        if stop > start:
            rows.append((start, stop))
            start = stop
        else:
            rows.append((start, start + seq_len + 1))  # The last token is only a label; the next row starts with it.
            start += seq_len
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def pack_excerpts(lengths: Sequence[int], seq_len: int) -> list[range]:
    """Divide excerpts of documents into rows of S = `seq_len`, in their order. None of them is split.

    Args:
        lengths: the tokens of each excerpt, 1 to S.

    Returns:
        The numbers of the excerpts of each row.
    """
    rows: list[range] = []
    first, used = 0, 0
    for number, length in enumerate(lengths):
        if used + length > seq_len:
            rows.append(range(first, number))
            first, used = number, 0
        used += length
    return [*rows, range(first, len(lengths))] if lengths else []


def padding_row(seq_len: int) -> Row:
    """Return a row of padding only."""
    return Row(
        tokens_S=np.zeros(seq_len, np.int64),
        labels_S=np.full(seq_len, IGNORE, np.int64),
        positions_S=np.zeros(seq_len, np.int64),
        documents_S=np.full(seq_len, -1, np.int32),
        domains_S=np.zeros(seq_len, np.uint8),
    )
