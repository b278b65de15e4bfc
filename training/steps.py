"""The optimizer steps of a run in their order. With a GPU, the host is one step ahead of it.

On a GPU, `start_step` returns before the step is computed. The host then packs the next step's micro-batches, queues
the next step, and only then reads the figures of this one, so that the GPU always has work. Before a pause, in which
the model is evaluated or saved, nothing is queued ahead.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch.profiler import record_function

from data.loader import Loader
from training.config import Config
from training.device import Moment
from training.due import Due
from training.engine import Engine
from training.interruption import Interruption
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
    own_seconds: float = 0.0
    """The time of this process for a step, without the time in which it waited for other ranks or for its GPU."""
    nonfinite: tuple[str, ...] = ()
    """If the gradient norm is not finite: the parameters of which this rank's gradient is not finite."""


class Started(NamedTuple):
    """An optimizer step whose figures have not been read."""

    done: int
    lr: float
    pending: PendingResult


class Steps(Iterator[FinishedStep]):
    """Runs the optimizer steps from `first_step` to the end of the run, and yields each of them when it is finished.

    If a rank is interrupted, all ranks end after the step that runs then. While the caller handles a step after which
    the run pauses, no later step has been started, and the loader's position is that after this step.

    Args:
        first_step: the number of steps done before.
        ahead: whether the host starts a step before it reads the figures of the step before. Without it, the run pauses
            after every step.
        pauses_after: the number of steps done -> whether the caller evaluates or saves the model then.
        interruption: the signals to this process; None: none is handled.
        waited: returns the seconds that this process has waited for other ranks (`parallel.waiting`).
        around_step: called before each step with the number of steps done, and with the step's inputs. Returns the
            context in which the step is computed or, on a GPU, queued.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        config: Config,
        first_step: int,
        *,
        ahead: bool,
        pauses_after: Callable[[int], bool],
        interruption: Interruption | None = None,
        waited: Callable[[], float] = lambda: 0.0,
        around_step: Callable[[int, StepInputs], AbstractContextManager[None]] = lambda done, inputs: nullcontext(),
    ) -> None:
        self.engine, self.loader, self.config, self.waited = engine, loader, config, waited
        self.around_step, self.due = around_step, Due(config)
        self.ahead, self.pauses_after, self.interruption = ahead, pauses_after, interruption or Interruption()
        self.done = first_step
        """The number of steps that have been started. At the end they have been finished and yielded, too."""
        self._inputs: StepInputs | None = None
        """Those of the next step, if they are prepared."""
        self._unread: deque[Started] = deque()
        self._before = Moment(engine.mesh.device)
        """The end of the last step that was read, or of the pause after it."""
        self._own_seconds = 0.0
        self._finished = self._run()

    def __next__(self) -> FinishedStep:
        return next(self._finished)

    def go_back(self, step: int) -> None:
        """Continue after `step`, an earlier one. The caller has changed the engine's and the loader's state to it.

        A step that has been started, and not yielded, is forgotten.
        """
        self.done, self._inputs = step, None
        self._unread.clear()
        self._before = Moment(self.engine.mesh.device)

    def _run(self) -> Iterator[FinishedStep]:
        engine, config, steps = self.engine, self.config, self.config.train.steps
        try:
            while self.done < steps and not self.interruption.agreed:
                start = time.monotonic() - self.waited()
                lr = learning_rate(self.done, steps, config.optim)
                inputs, self._inputs = self._inputs or self._next_inputs(), None
                if inputs is None:
                    return
                with self.around_step(self.done, inputs):
                    self.done += 1
                    measured = self.due.measures(self.done)
                    pending = start_step(engine, inputs, config.router, lr, measured)
                self._unread.append(Started(self.done, lr, pending))
                pause = not self.ahead or self.done == steps or self.pauses_after(self.done)
                if not pause:
                    self._inputs = self._next_inputs()
                    pause = self._inputs is None
                self._own_seconds = time.monotonic() - self.waited() - start
                while len(self._unread) > (0 if pause else 1):
                    yield self._read_next()
                if pause:
                    self._before = Moment(engine.mesh.device)
        except (Exception, KeyboardInterrupt):
            while self._unread:  # The steps before the one that failed.
                yield self._read_next()
            raise

    def _next_inputs(self) -> StepInputs | None:
        """Return the inputs of the next step, or None if the ranks stop before it. The loader is before it then."""
        config, position = self.config, self.loader.state_dict()
        with record_function(DATA):
            batches, flags = self.loader.next_step(), self.interruption.flags()
            inputs = prepare_step(self.engine, batches, config.router, config.run.seed, flags)
        if self.interruption.agree(inputs.flags):
            self.loader.load_state_dict(position)
            return None
        return inputs

    def _read_next(self) -> FinishedStep:
        step = self._unread.popleft()
        result = step.pending.read()
        start, self._before = self._before, step.pending.end
        nonfinite = () if math.isfinite(result.grad_norm) else tuple(step.pending.nonfinite_gradients())
        seconds = self._before.seconds_since(start)
        return FinishedStep(step.done, step.lr, result, seconds, self._own_seconds, nonfinite)
