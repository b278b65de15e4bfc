"""When each rank of a pipeline computes which pass of which micro-batch, as plain numbers.

The orders are those of the schedules that `parallel/pipeline.py` takes from torch (1F1B and its interleaved form: arXiv
2104.04473; zero bubble: arXiv 2401.10241). Every stage is assumed to take the same time, and sending to take none.

Letters: P pipeline ranks, m micro-batches of a step, v stages per rank.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from parallel.stages import Schedule

Kind = Literal["forward", "backward", "weights"]


class Pass(NamedTuple):
    """One pass of one micro-batch through one stage."""

    kind: Kind
    """`backward` computes all gradients, or with `zero_bubble` those of the stage's input. `weights` computes those of
    its weights."""
    stage: int
    micro_batch: int


class Block(NamedTuple):
    """A pass, and when it runs."""

    of: Pass
    start: float
    end: float


def passes_of(rank: int, ranks: int, micro_batches: int, schedule: Schedule) -> list[Pass]:
    """Return the passes of a pipeline rank in the order in which it computes them.

    The rank first runs the forward passes that the next ranks wait for. Then it alternates between a forward and a
    backward pass, and it ends with the backward passes that remain. With `zero_bubble`, rank r computes the gradients
    of weights r passes later than those of inputs.
    """
    stages = 1 if schedule == "1f1b" else 2
    forwards = list(_in_groups(rank, ranks, micro_batches, range(stages)))
    backwards = list(_in_groups(rank, ranks, micro_batches, range(stages)[::-1]))
    round_size = micro_batches // max(1, micro_batches // ranks)
    behind = (ranks - 1 - rank) * (2 if schedule == "interleaved" else 1)
    warm_up = min(behind + (stages - 1) * round_size, len(forwards))
    order = [Pass("forward", *where) for where in forwards[:warm_up]]
    for number, where in enumerate(backwards):
        order += [Pass("forward", *each) for each in forwards[warm_up + number : warm_up + number + 1]]
        order.append(Pass("backward", *where))
        if schedule == "zero_bubble" and number >= rank:
            order.append(Pass("weights", *backwards[number - rank]))
    if schedule == "zero_bubble":
        order += [Pass("weights", *where) for where in backwards[max(0, len(backwards) - rank) :]]
    return order


def _in_groups(rank: int, ranks: int, micro_batches: int, chunks: range) -> Iterator[tuple[int, int]]:
    """Yield (stage, micro-batch): a group of micro-batches through each stage of the rank, then the next group."""
    size = micro_batches // max(1, micro_batches // ranks)
    for first in range(0, micro_batches, size):
        for chunk in chunks:
            for micro_batch in range(first, min(first + size, micro_batches)):
                yield rank + chunk * ranks, micro_batch


def timeline(ranks: int, micro_batches: int, schedule: Schedule, forward: float, backward: float) -> list[list[Block]]:
    """Return the blocks of each pipeline rank. Each pass begins as soon as its rank and its input are ready.

    Args:
        forward: time of the forward pass of one micro-batch through all stages of a rank.
        backward: the same for the whole backward pass.
    """
    stages = ranks if schedule == "1f1b" else 2 * ranks
    share = stages // ranks
    seconds: dict[Kind, float] = {
        "forward": forward / share,
        "backward": backward / share / (2 if schedule == "zero_bubble" else 1),
        "weights": backward / share / 2,
    }
    waiting = [passes_of(rank, ranks, micro_batches, schedule) for rank in range(ranks)]
    blocks: list[list[Block]] = [[] for _ in range(ranks)]
    counted = [0] * ranks
    ends: dict[Pass, float] = {}
    while any(waiting):
        before = len(ends)
        for rank, order in enumerate(waiting):
            for done in order:
                needed = _input_of(done, stages)
                if needed is not None and needed not in ends:
                    break
                free = blocks[rank][-1].end if blocks[rank] else 0.0
                start = free if needed is None else max(free, ends[needed])
                ends[done] = start + seconds[done.kind]
                blocks[rank].append(Block(done, start, ends[done]))
            del order[: len(blocks[rank]) - counted[rank]]
            counted[rank] = len(blocks[rank])
        assert len(ends) > before, f"{schedule}: {ranks} ranks wait for each other with {micro_batches} micro-batches"
    return blocks


def _input_of(of: Pass, stages: int) -> Pass | None:
    """Return the pass whose result this one needs."""
    if of.kind == "forward":
        return Pass("forward", of.stage - 1, of.micro_batch) if of.stage else None
    if of.kind == "weights":
        return Pass("backward", of.stage, of.micro_batch)
    last = of.stage == stages - 1
    return Pass("forward" if last else "backward", of.stage if last else of.stage + 1, of.micro_batch)


def idle_share(blocks: list[list[Block]]) -> float:
    """Return the share of the time, from the first block to the last one, in which a rank idles, in the mean."""
    end = max(block.end for rank in blocks for block in rank)
    busy = sum(block.end - block.start for rank in blocks for block in rank)
    return 1 - busy / (end * len(blocks))
