"""The learning rate as a pure function of the step.

A schedule has its own length, which is not that of the run. With the keys of the section `optim`, let `n` be
`schedule_steps`, `s` be `schedule_start`, `w` be `warmup_steps` (null: `n // 20`), and let `factor` be the function
that `schedule` names. The learning rate of the optimizer step with index i, from 0, is

    t = min(i - s, n - 1)
    rate(i) = lr * (t + 1) / w     if t < w
              lr * factor(t)       otherwise

So the steps after the end of the schedule train with the rate of its last step.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from common.errors import ConfigError
from common.registry import Registry


class Position(NamedTuple):
    """A step of the schedule after the warm-up, and the keys of the section `optim` that schedules read."""

    step: int
    """Counted from the start of the schedule: from `warmup` to `steps - 1`."""
    steps: int
    """The length of the schedule."""
    warmup: int
    decay_steps: int | None
    min_lr_ratio: float


Schedule = Callable[[Position], float]
"""The factor on `optim.lr` at a position."""

SCHEDULES: Registry[Schedule] = Registry("optim.schedule")
"""Schedules by the name that `optim.schedule` takes."""


@SCHEDULES.register("cosine")
def cosine(at: Position) -> float:
    """Half a cosine from 1 to `min_lr_ratio` (SGDR, arXiv 1608.03983)."""
    floor = at.min_lr_ratio
    progress = (at.step - at.warmup) / max(1, at.steps - 1 - at.warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@SCHEDULES.register("wsd")
def warmup_stable_decay(at: Position) -> float:
    """1, then a linear decay to `min_lr_ratio` over the last `decay_steps` (arXiv 2404.06395)."""
    floor = at.min_lr_ratio
    decay = max(1, at.steps // 10) if at.decay_steps is None else at.decay_steps
    remaining = (at.steps - 1 - at.step) / decay if decay else 1.0
    return floor + (1 - floor) * min(1.0, remaining)


@SCHEDULES.register("constant")
def constant(at: Position) -> float:
    """Always 1."""
    return 1.0


def learning_rate(step: int, steps: int, config: Any) -> float:
    """The learning rate of one step: a linear warm-up, then the schedule that `config.schedule` names, then its end.

    Args:
        step: the index of the step in the run, from 0; at least `config.schedule_start`.
        steps: the length of the schedule, unless `config.schedule_steps` is set.
        config: the section `optim`, a `training.config.OptimConfig`.

    Raises:
        ConfigError: the schedule did not return a number >= 0.

    >>> from training.config import OptimConfig
    >>> config = OptimConfig(lr=1.0, warmup_steps=2, min_lr_ratio=0.1)
    >>> [round(learning_rate(step, 6, config), 3) for step in range(8)]
    [0.5, 1.0, 1.0, 0.775, 0.325, 0.1, 0.1, 0.1]
    """
    steps = steps if config.schedule_steps is None else config.schedule_steps
    warmup = steps // 20 if config.warmup_steps is None else config.warmup_steps
    at = min(step - (config.schedule_start or 0), steps - 1)
    if at < warmup:
        return config.lr * (at + 1) / warmup
    position = Position(at, steps, warmup, config.decay_steps, config.min_lr_ratio)
    factor = SCHEDULES[config.schedule](position)
    if not (isinstance(factor, int | float) and 0 <= factor < math.inf):
        raise ConfigError(
            f"optim.schedule={config.schedule}: expected a schedule that returns a number >= 0, found {factor!r} at "
            f"step {at}"
        )
    return config.lr * factor
