import json

import pytest
import torch

from common.errors import DataError
from data.batch import IGNORE, Batch
from data.loader import Loader, epoch_order, evaluation_batches
from data.tokens.store import Store

SEQ_LEN = 64


def loader(store: Store, **changes: int) -> Loader:
    sizes = {"seq_len": SEQ_LEN, "global_batch": 12, "accumulation": 1, "rank": 0, "world_size": 1, "seed": 3} | changes
    return Loader(store.train, cross_documents=False, **sizes)  # type: ignore[arg-type]


def tokens_of(batches: list[Batch]) -> list[list[int]]:
    return torch.cat([batch.tokens_BS for batch in batches]).tolist()


def global_rows(store: Store, steps: int, *, world_size: int, accumulation: int, **changes: int) -> list[list[int]]:
    """Return the token rows of `steps` steps in the global order: by micro-batch, and by rank within a micro-batch."""
    sizes = {"world_size": world_size, "accumulation": accumulation} | changes
    loaders = [loader(store, rank=rank, **sizes) for rank in range(world_size)]
    rows = []
    for _ in range(steps):
        per_rank = [each.next_step() for each in loaders]
        for micro in range(accumulation):
            rows += tokens_of([batches[micro] for batches in per_rank])
    return rows


def test_the_order_is_a_permutation_that_only_seed_and_epoch_choose() -> None:
    # With another order, runs could not resume from older checkpoints.
    assert epoch_order(0, 0, 6).tolist() == [0, 2, 1, 5, 4, 3]
    assert sorted(epoch_order(3, 1, 1000)) == list(range(1000))
    assert len({tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 3), (2, 1), (3, 2), (4, 3)])
def test_every_layout_sees_the_same_rows_in_the_same_order(store: Store, world_size: int, accumulation: int) -> None:
    alone = global_rows(store, 3, world_size=1, accumulation=1)
    assert global_rows(store, 3, world_size=world_size, accumulation=accumulation) == alone
    order = epoch_order(3, 0, store.train.num_rows(SEQ_LEN))
    assert alone == [store.train.row(int(i), SEQ_LEN).tokens_S.tolist() for i in order[:36]]


def test_resume_on_another_layout_goes_on_where_it_stopped(store: Store) -> None:
    whole = global_rows(store, 8, world_size=1, accumulation=1)
    first = [loader(store, rank=rank, world_size=2) for rank in range(2)]
    for each in first:
        for _ in range(4):
            each.next_step()
    assert first[0].state_dict() == first[1].state_dict()
    state = json.loads(json.dumps(first[0].state_dict()))
    assert state["rows"] == 48
    rest = []
    resumed = [loader(store, rank=rank, world_size=4, accumulation=2, global_batch=24) for rank in range(4)]
    for each in resumed:
        each.load_state_dict(state)
    for _ in range(2):
        per_rank = [each.next_step() for each in resumed]
        rest += [row for micro in range(2) for row in tokens_of([batches[micro] for batches in per_rank])]
    assert rest == whole[48:96]


def test_epochs_follow_without_a_gap_even_within_a_step(store: Store) -> None:
    rows = store.train.num_rows(SEQ_LEN)
    batch = 2 * rows + 2
    batch += batch % 2
    seen = global_rows(store, 1, world_size=2, accumulation=1, global_batch=batch)
    expected = [int(i) for epoch in range(3) for i in epoch_order(3, epoch, rows)][:batch]
    assert seen == [store.train.row(i, SEQ_LEN).tokens_S.tolist() for i in expected]


def test_sizes_that_do_not_fit_end_in_one_line(store: Store) -> None:
    with pytest.raises(
        ValueError, match=r"^train.global_batch=12: expected a multiple of train.accumulation=2 times 5 "
    ):
        loader(store, accumulation=2, world_size=5)
    with pytest.raises(
        DataError, match=rf"^train.seq_len=10000000: expected at most {store.train.num_tokens - 1}, the train"
    ):
        loader(store, seq_len=10**7)
    with pytest.raises(DataError, match=r"^run.seed=3: expected 4, the seed of the checkpoint's rows$"):
        loader(store).load_state_dict(loader(store, seed=4).state_dict())


@pytest.mark.parametrize(("world_size", "batch_rows"), [(1, 5), (3, 2), (2, 1000)])
def test_evaluation_covers_every_heldout_row_once(store: Store, world_size: int, batch_rows: int) -> None:
    split = store.heldout
    ranks = [
        list(
            evaluation_batches(
                split, seq_len=SEQ_LEN, batch_rows=batch_rows, rank=rank, world_size=world_size, cross_documents=False
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.tokens_BS.shape == (batch_rows, SEQ_LEN) for batches in ranks for batch in batches)
    in_order = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    labels = torch.cat([batch.labels_BS.flatten() for batch in in_order])
    stream = split.tokens(0, split.num_tokens)
    assert labels[labels != IGNORE].tolist() == stream[stream != store.tokenizer.bos_id].tolist()
    assert sum(batch.num_labels for batch in in_order) == int((stream != store.tokenizer.bos_id).sum())


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 3)])
def test_rows_are_skipped_after_going_back_on_every_layout(store: Store, world_size: int, accumulation: int) -> None:
    whole = global_rows(store, 9, world_size=1, accumulation=1)

    def steps(loaders: list[Loader], count: int) -> list[list[int]]:
        per_rank = [[batch for _ in range(count) for batch in each.next_step()] for each in loaders]
        micro_batches = range(count * accumulation)
        return [row for micro in micro_batches for row in tokens_of([batches[micro] for batches in per_rank])]

    loaders = [loader(store, rank=rank, world_size=world_size, accumulation=accumulation) for rank in range(world_size)]
    assert steps(loaders, 2) == whole[:24]
    saved = loaders[0].state_dict()
    assert steps(loaders, 4) == whole[24:72]
    for each in loaders:
        each.go_back(saved, steps=3, skip=2)  # after step 5
    assert steps(loaders, 1) == whole[24:36]
    one_later = loaders[0].state_dict()
    assert one_later == saved | {"rows": 36, "skipped": [[36, 60]]}
    assert steps(loaders, 2) == whole[60:84]
    for each in loaders:
        each.go_back(saved, steps=2, skip=1)  # `saved` does not know the rows that are skipped already
    assert steps(loaders, 2) == whole[24:36] + whole[72:84]
    assert loaders[0].state_dict()["skipped"] == [[36, 72]]

    resumed = loader(store, rank=0, world_size=1, accumulation=1, global_batch=8)
    resumed.load_state_dict(json.loads(json.dumps(one_later)))
    rows = tokens_of(resumed.next_step()) + tokens_of(resumed.next_step())
    assert rows == whole[60:76]
