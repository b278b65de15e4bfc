"""The optimizer steps of a run in their order. With a GPU, the host is one step ahead of it.

On a GPU, `start_step` returns before the step is computed. The host then packs the next step's micro-batches, queues
the next step, and only then reads the figures of this one, so that the GPU always has work. Before a pause, in which
the model is evaluated or saved, nothing is queued ahead.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch.profiler import record_function

from data.loader import Loader
from training.config import Config
from training.device import Moment
from training.engine import Engine
from training.report.profile import DATA
from training.schedule import learning_rate
from training.step import PendingResult, StepInputs, StepResult, prepare_step, start_step


class FinishedStep(NamedTuple):
    """An optimizer step that the device has computed."""

    done: int
    """The number of steps up to this one."""
    lr: float
    result: StepResult
    seconds: float
    """The time on the device between the end of the step before, or of the pause before, and the end of this step."""


class Started(NamedTuple):
    """An optimizer step whose figures have not been read."""

    done: int
    lr: float
    pending: PendingResult


def run_steps(
    engine: Engine,
    loader: Loader,
    config: Config,
    first_step: int,
    *,
    ahead: bool,
    pauses_after: Callable[[int], bool],
) -> Iterator[FinishedStep]:
    """Run the optimizer steps from `first_step` to the end of the run, and yield each of them when it is finished.

    While the caller handles a step after which the run pauses, no later step has been started, and the loader's
    position is that after this step.

    Args:
        first_step: the number of steps done before.
        ahead: whether the host starts a step before it reads the figures of the step before. Without it, the run pauses
            after every step.
        pauses_after: the number of steps done -> whether the caller evaluates or saves the model then.
    """
    steps, seed = config.train.steps, config.run.seed
    inputs: StepInputs | None = None
    unread: deque[Started] = deque()
    before = Moment(engine.mesh.device)

    def next_inputs() -> StepInputs:
        with record_function(DATA):
            return prepare_step(engine, loader.next_step(), config.router, seed)

    def read_next() -> FinishedStep:
        nonlocal before
        step = unread.popleft()
        result = step.pending.read()
        start, before = before, step.pending.end
        return FinishedStep(step.done, step.lr, result, before.seconds_since(start))

    try:
        for step in range(first_step, steps):
            done, lr = step + 1, learning_rate(step, steps, config.optim)
            if inputs is None:
                inputs = next_inputs()
            unread.append(Started(done, lr, start_step(engine, inputs, config.router, lr)))
            inputs = None
            pause = not ahead or done == steps or pauses_after(done)
            if not pause:
                inputs = next_inputs()
            while len(unread) > (0 if pause else 1):
                yield read_next()
            if pause:
                before = Moment(engine.mesh.device)
    except (Exception, KeyboardInterrupt):
        while unread:  # The steps before the one that failed.
            yield read_next()
        raise
