import numpy as np
import pytest
import torch

from common.errors import DataError
from data.batch import IGNORE, Batch
from data.packing import pack_row, padding_row

# Three documents <s>=1 ... </s>=2, of domains 0, 1, 0: [1 5 6 2] [1 7 2] [1 8 9 2]. Documents start at 0, 4, 7.
STREAM = np.array([1, 5, 6, 2, 1, 7, 2, 1, 8, 9, 2], dtype=np.uint16)
STARTS = np.array([4, 7])
DOMAINS = np.array([0, 1, 0], dtype=np.uint8)


def test_documents_of_a_row_are_kept_apart() -> None:
    row = pack_row(STREAM[:10], STARTS, DOMAINS, seq_len=9, cross_documents=False)
    assert row.tokens_S.tolist() == [1, 5, 6, 2, 1, 7, 2, 1, 8]
    assert row.labels_S.tolist() == [5, 6, 2, IGNORE, 7, 2, IGNORE, 8, 9]
    assert row.positions_S.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert row.documents_S.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert row.domains_S.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0]


def test_a_row_that_ends_with_its_document_has_no_last_label() -> None:
    row = pack_row(STREAM[:5], STARTS[:1], DOMAINS[:2], seq_len=4, cross_documents=False)
    assert row.labels_S.tolist() == [5, 6, 2, IGNORE]
    assert row.documents_S.tolist() == [0, 0, 0, 0]


def test_the_last_row_is_padded() -> None:
    row = pack_row(STREAM[7:], STARTS[:0], DOMAINS[2:], seq_len=6, cross_documents=False)
    assert row.tokens_S.tolist() == [1, 8, 9, 2, 0, 0]
    assert row.labels_S.tolist() == [8, 9, 2, IGNORE, IGNORE, IGNORE]
    assert row.documents_S.tolist() == [0, 0, 0, 0, -1, -1]


def test_cross_documents_makes_one_document_of_the_row() -> None:
    row = pack_row(STREAM[:10], STARTS, DOMAINS, seq_len=9, cross_documents=True)
    assert row.labels_S.tolist() == [5, 6, 2, 1, 7, 2, 1, 8, 9]
    assert row.positions_S.tolist() == list(range(9))
    assert row.documents_S.tolist() == [0] * 9
    assert row.domains_S.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0]


def test_a_batch_counts_and_checks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # It needs a GPU.
    row = pack_row(STREAM[:7], STARTS[:1], DOMAINS[:2], seq_len=9, cross_documents=False)
    batch = Batch.stack([row, padding_row(9)])
    assert (batch.num_valid, batch.num_labels) == (7, 5)
    assert (batch.attended_pairs(None), batch.attended_pairs(2)) == (10 + 6, 7 + 5)  # Documents of 4 and 3 tokens.
    assert batch.to("meta").tokens_BS.device.type == "meta"
    with pytest.raises(DataError, match="labels_BS: expected -100 on padding"):
        Batch(batch.tokens_BS, batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.domains_BS)
    with pytest.raises(DataError, match=r"documents_BS: expected torch.int32 .* found torch.int64 \(2, 9\)"):
        Batch(batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.documents_BS.long(), batch.domains_BS)
    with pytest.raises(DataError, match="positions_BS"):
        Batch(batch.tokens_BS, batch.labels_BS, torch.zeros(2, 8, dtype=torch.int64), *batch_rest(batch))


def batch_rest(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.documents_BS, batch.domains_BS
