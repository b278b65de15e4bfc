"""Rows cut out of one long stream of documents, with the marks that keep the documents apart.

Legend: S sequence, T tokens of the stream that a row looks at (at most S + 1).
"""

from typing import NamedTuple

import numpy as np

IGNORE = -100
"""The label of a position that predicts nothing (what `torch.nn.functional.cross_entropy` leaves out)."""


class Row(NamedTuple):
    """One packed row; the fields mean what they mean in `Batch`, whose order this is."""

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
    """A row of S = `seq_len` inputs and their labels from T consecutive tokens of the stream, padded where T <= S.

    Args:
        tokens_T: 1 <= T <= S + 1 tokens; number S is a label only.
        starts: offsets into `tokens_T`, ascending, at which documents start; the first token's is not among them.
        domain_ids: of the first token's document, then of those at `starts`.
        cross_documents: attention, positions and labels run across documents, as if the row were one.
        supervised_T: whether each token may be a label; None: all may.
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
        row.labels_S[starts - 1] = IGNORE  # what follows there is another document
    return row


def whole_document_rows(starts: np.ndarray, num_tokens: int, seq_len: int) -> np.ndarray:
    """Start and end (exclusive) in the stream of each row, [n, 2], such that a document that fits a row is in one.

    A row takes documents in their order as long as all of their tokens fit, S = `seq_len` inputs and one last label.
    A document that fits none begins a row of its own and is cut every S tokens; what is left of it begins the next.

    Args:
        starts: of the documents in the stream, ascending, the first 0.
        num_tokens: length of the stream.
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
            rows.append((start, start + seq_len + 1))  # the last token is a label here, and the next row's first input
            start += seq_len
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def padding_row(seq_len: int) -> Row:
    """A row without a token."""
    return Row(
        tokens_S=np.zeros(seq_len, np.int64),
        labels_S=np.full(seq_len, IGNORE, np.int64),
        positions_S=np.zeros(seq_len, np.int64),
        documents_S=np.full(seq_len, -1, np.int32),
        domains_S=np.zeros(seq_len, np.uint8),
    )
