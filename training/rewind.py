"""Going back to a checkpoint during a run, after steps that have gone wrong, and skipping their rows."""

from pathlib import Path

from common.errors import TrainingFailure
from data.loader import Loader
from training.agree import AgreedRun
from training.checkpoint import checkpoint
from training.checkpoint.manifest import (
    CHECKPOINTS,
    damage_of,
    delete_checkpoint,
    listed,
    read_state,
    step_directories,
    step_of,
)
from training.checkpoint.peers import Peers
from training.engine import Engine
from training.health import Finding, Health
from training.probe import Prober
from training.report.recorder import Recorder
from training.steps import Steps

MAX_TIMES = 10
"""A launch that has gone back this often ends at the next problem."""


class Rewind:
    """Goes back to a checkpoint from before the steps that have gone wrong. All methods are collective.

    Args:
        loader: the one that `steps` takes its rows from.
        recorder: of the metrics, which are those of the repeated steps from then on.
        prober: of the routers; its files are also those of the repeated steps.
        peers: the ranks as they read checkpoints together.
    """

    def __init__(
        self,
        run: AgreedRun,
        engine: Engine,
        loader: Loader,
        steps: Steps,
        health: Health,
        recorder: Recorder,
        prober: Prober,
        peers: Peers,
    ) -> None:
        self.root, self.engine, self.loader, self.steps = run.directory / CHECKPOINTS, engine, loader, steps
        self.health, self.recorder, self.prober, self.peers = health, recorder, prober, peers
        self.times, self._last = 0, -1

    def go_back(self, done: int, finding: Finding) -> str | None:
        """Load weights, optimizer state and position from a checkpoint, and skip the rows of the steps that went wrong.

        The checkpoint is the newest one from before these steps. If it was chosen the last time, it is the one before.
        The rows of the step before the steps that went wrong are skipped, too, if it is repeated: its update can be the
        cause. Newer checkpoints are deleted, because they have what the run turns away from.

        Args:
            done: the number of steps done.
            finding: the problem of the last `finding.bad_steps` steps.

        Returns:
            The checkpoint. None if there is none to go back to, or the run has gone back too often, and the problem
            does not end the run.

        Raises:
            TrainingFailure: the same, and the problem ends the run; or the configuration does not want to go back.
            CheckpointError: on all ranks, if the checkpoint cannot be read, or a newer one cannot be deleted.
        """
        good = self._good_checkpoints(done - finding.bad_steps)
        step = step_of(good[-1]) if good else self._last
        if not finding.goes_back or self.times == MAX_TIMES or step == self._last:
            known = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint from before"
            tried = f"; the run has gone back {self.times} time{'s' * (self.times > 1)}" if self.times else ""
            line = f"step {done}: {finding.problem}; {known}{tried}"
            if finding.ends_run:
                raise TrainingFailure(line)
            self.recorder.note(f"warning: {line}; the run goes on")
            return None
        path = good[-1]
        state, tensors = read_state(path), self.engine.tensors()
        checkpoint.load(path, tensors, self.peers)
        self.engine.finish_loading(tensors, state["updates"])
        skip = min(finding.bad_steps + 1, done - step)
        self.loader.go_back(state["loader"], done - step, skip)
        self.health.load_state_dict(state.get("health", {}))
        self.steps.go_back(step)
        self.recorder.note(
            f"step {done}: {finding.problem}; the run goes back to {path} and skips the rows of steps "
            f"{done - skip + 1} to {done}"
        )
        self.recorder.go_back(state)
        self.prober.go_back(step)
        self.times, self._last = self.times + 1, step
        self.peers.on_rank_0(lambda: self._delete_after(step), self.root)
        return str(path)

    def _delete_after(self, step: int) -> None:
        for path in step_directories(self.root):
            if step_of(path) > step:
                delete_checkpoint(path)

    def _good_checkpoints(self, newest: int) -> list[Path]:
        """Return the newest intact checkpoint up to step `newest`. Add the one before if the run went back to it last.

        The ranks divide the files between them, and read them whole.
        """
        good: list[Path] = []
        for path in listed(self.root, self.peers):
            if step_of(path) <= newest and (not good or step_of(good[-1]) == self._last):
                error = damage_of(path, self.peers)
                if error is None:
                    good.append(path)
                else:
                    self.recorder.note(f"skipping checkpoint {path.name}: {error}")
        return good
