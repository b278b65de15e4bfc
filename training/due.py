"""What happens after which optimizer step: writing metrics, evaluating, probing, comparing replicas, saving."""

from training.config import Config


class Due:
    """Says what is due after a number of optimizer steps, `done`.

    Args:
        config: `train.log_every`, `train.eval_every`, `telemetry`, `health.every`, `checkpoint.every` and
            `checkpoint.at_end`.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.steps = config, config.train.steps

    def writes(self, done: int) -> bool:
        """Return whether the metrics of the step are written: of the first, of every `train.log_every`th, the last."""
        return done == 1 or is_due(done, self.config.train.log_every, self.steps)

    def evaluates(self, done: int) -> bool:
        """Return whether the model is evaluated on the held-out tokens."""
        return is_due(done, self.config.train.eval_every, self.steps)

    def measures(self, done: int) -> bool:
        """Return whether the norms and straggler factors of step `done` are computed, and its row is written."""
        every = self.config.telemetry.every
        return every > 0 and self.config.model.is_moe and is_due(done, every, self.steps)

    def probes(self, done: int) -> bool:
        """Return whether the routers are probed: at step 0, after powers of 2, before each checkpoint, at the end."""
        is_power = done & (done - 1) == 0
        probed = self.config.model.is_moe and self.config.telemetry.probe_tokens > 0
        return probed and (is_power or done == self.steps or self.saves(done))

    def saves(self, done: int) -> bool:
        """Return whether a checkpoint is saved."""
        return is_due(done, self.config.checkpoint.every, self.steps, at_end=self.config.checkpoint.at_end)

    def compares(self, done: int) -> bool:
        """Return whether replicas are compared. They are also compared before a checkpoint is saved."""
        every = self.config.health.every
        return every > 0 and is_due(done, every, self.steps)

    def pauses(self, done: int) -> bool:
        """Return whether something is done with the weights, so that no later step may have been started."""
        return self.evaluates(done) or self.probes(done) or self.compares(done) or self.saves(done)

    def rechecks_next(self, done: int) -> bool:
        """Return whether the gradients of the step after `done` are computed twice (`health.recheck_every`)."""
        every = self.config.health.recheck_every
        return every > 0 and (done + 1) % every == 0


def is_due(done: int, every: int, steps: int, *, at_end: bool = True) -> bool:
    """Return whether something that happens every `every` steps, and after the last step, happens after step `done`.

    Args:
        every: 0 if it happens only after the last step.
        steps: the number of steps of the run.
        at_end: False if it does not happen because a step is the last one.
    """
    return (at_end and done == steps) or (every > 0 and done % every == 0)
