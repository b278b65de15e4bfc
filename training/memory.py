"""What a run says if it has too little memory."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.errors import TrainingFailure
from common.text import one_line, shorten
from training.agree import AgreedRun
from training.device import Process
from training.report.terminal import human_bytes

SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of the messages of torch's allocators. Only the one for CUDA raises a special exception, `OutOfMemoryError`."""


@contextmanager
def memory_explained(run: AgreedRun, process: Process) -> Iterator[None]:
    """If memory runs out in the context, say what the step is, what needs most memory, and what to change.

    Raises:
        TrainingFailure: in place of the allocator's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingFailure(describe(run, process, error), alone=True) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator, of the host or of a device, has raised `error`."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def describe(run: AgreedRun, process: Process, error: BaseException) -> str:
    """Return the line about the allocator's `error` on this rank."""
    train, layout = run.config.train, run.plan.layout
    rows = train.global_batch // train.accumulation // layout.data
    stage = run.plan.stages[process.world.rank // (layout.world // layout.pipeline)]
    needs = {
        "activations": stage.activations,
        "weights": stage.weights,
        "gradients": stage.gradients,
        "optimizer state": stage.moments,
        "weights in the compute dtype": stage.casts,
    }
    reason = shorten(one_line(str(error)), 200)
    largest = sorted(needs.items(), key=lambda need: -need[1])[:3]
    consumers = ", ".join(f"{name} {human_bytes(size)}" for name, size in largest)
    return one_line(
        f"rank {process.world.rank} ({socket.gethostname()}, {process.device}): out of memory. A step has "
        f"{train.accumulation} x {rows} rows of {train.seq_len} tokens on this rank (micro-batches x rows); the plan's "
        f"largest needs: {consumers}. Ways out: {'; '.join(ways_out(run, process))}. ({reason})"
    )


def ways_out(run: AgreedRun, process: Process) -> list[str]:
    """Return three changes of the configuration with which a rank needs less memory, those that cost least first."""
    config, layout = run.config, run.plan.layout
    train, parallel = config.train, config.parallel
    splits = train.global_batch // layout.data
    possible = (n for n in range(train.accumulation + 1, splits + 1) if train.global_batch % (n * layout.data) == 0)
    ways = [f"train.accumulation={number}" for number in list(possible)[:1]]
    if parallel.recompute != "full" and config.engine.kind == "native":
        ways.append("parallel.recompute=full")
    if config.engine.kind == "native":
        all_data_ranks = layout.shard * layout.replicate
        shards = all_data_ranks > layout.shard
        ways.append(f"parallel.shard={all_data_ranks}" if shards else "more ranks, and parallel.shard")
    elif config.engine.zero_stage < 3:
        ways.append("engine.zero_stage=3")
    if process.device.type == "cuda" and layout.shard > 1 and not parallel.offload:
        ways.append("parallel.offload=true")
    return [*ways, f"train.seq_len={max(1, train.seq_len // 2)}", "a smaller model"][:3]
