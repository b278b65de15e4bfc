"""The order of the passes in a pipeline, against torch's schedules and the formula of the idle time."""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules

from parallel.planning.plan import bubble
from parallel.planning.timeline import idle_share, passes_of, timeline
from parallel.stages import Schedule

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved", "zero_bubble")
KINDS = {"FORWARD": "forward", "FULL_BACKWARD": "backward", "BACKWARD_INPUT": "backward", "BACKWARD_WEIGHT": "weights"}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (3, 6), (4, 8), (4, 16), (8, 8)])
def test_idle_time_of_the_blocks_is_that_of_the_formula(schedule: Schedule, ranks: int, micro_batches: int) -> None:
    blocks = timeline(ranks, micro_batches, schedule, forward=1.0, backward=2.0)
    assert idle_share(blocks) == pytest.approx(bubble(ranks, micro_batches, schedule))
    starts = {block.of: block.start for of_rank in blocks for block in of_rank}
    stages = ranks if schedule == "1f1b" else 2 * ranks
    assert len(starts) == stages * micro_batches * (3 if schedule == "zero_bubble" else 2)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble"])
def test_order_is_that_of_torch(schedule: Schedule, ranks: int) -> None:
    zero_bubble = schedule == "zero_bubble"
    kind = schedules.ScheduleInterleavedZeroBubble if zero_bubble else schedules.ScheduleInterleaved1F1B
    micro_batches = 2 * ranks
    own = SimpleNamespace(
        n_local_stages=2, pp_group_size=ranks, _n_microbatches=micro_batches, microbatches_per_round=ranks,
        number_of_rounds=2,
    )  # fmt: skip
    for rank in range(ranks):
        theirs = kind._calculate_single_rank_operations(own, rank)  # type: ignore[arg-type]
        found = [(KINDS[each[1].name], each[0], each[2]) for each in theirs if each is not None]
        assert [tuple(each) for each in passes_of(rank, ranks, micro_batches, schedule)] == found
