"""Going back to a checkpoint during a run, after steps that have gone wrong, and skipping their rows."""

from pathlib import Path

from common.errors import CheckpointError, TrainingFailure
from data.loader import Loader
from parallel.collectives import all_gather_json
from parallel.mesh import set_timeout
from training.agree import AgreedRun
from training.checkpoint import checkpoint
from training.checkpoint.manifest import CHECKPOINTS, delete_checkpoint, read_state, step_directories, step_of, verify
from training.engine import Engine
from training.health import Finding, Health
from training.report.trackers import Recorder
from training.steps import Steps

MAX_TIMES = 10
"""A launch that has gone back this often ends at the next problem."""


class Rewind:
    """Goes back to a checkpoint from before the steps that have gone wrong. All methods are collective.

    Args:
        loader: the one that `steps` takes its rows from.
        recorder: of the metrics, which are those of the repeated steps from then on.
    """

    def __init__(
        self, run: AgreedRun, engine: Engine, loader: Loader, steps: Steps, health: Health, recorder: Recorder
    ) -> None:
        self.run, self.engine, self.loader, self.steps = run, engine, loader, steps
        self.health, self.recorder = health, recorder
        self.times, self._last = 0, -1

    def go_back(self, done: int, finding: Finding) -> str | None:
        """Load weights, optimizer state and position from a checkpoint, and skip the rows of the steps that went wrong.

        The rows of the step before them are skipped, too: its update can be the cause. The checkpoint is the newest one
        from before that update; if the same checkpoint was chosen the last time, the one before it. Newer
        checkpoints are deleted, because they have what the run turns away from.

        Args:
            done: the number of steps done.
            finding: the problem of the last `finding.bad_steps` steps.

        Returns:
            The checkpoint. None if there is none to go back to, or the run has gone back too often, and the problem
            does not end the run.

        Raises:
            TrainingFailure: the same, and the problem ends the run; or the configuration does not want to go back.
        """
        mesh, parallel = self.engine.mesh, self.run.config.parallel
        set_timeout(mesh, parallel.start_timeout_s)  # Rank 0 reads whole checkpoints.
        newest_allowed = done - finding.bad_steps - 1
        wanted = finding.goes_back and self.times < MAX_TIMES
        choice = self._choose(newest_allowed, wanted) if mesh.rank == 0 else None
        path, last_good = all_gather_json(choice, mesh.world)[0]
        if path is None:
            good = f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint from before"
            tried = f"; the run has gone back {self.times} times" if self.times else ""
            line = f"step {done}: {finding.problem}; {good}{tried}"
            if finding.ends_run:
                raise TrainingFailure(line)
            set_timeout(mesh, parallel.timeout_s)
            self.recorder.note(f"warning: {line}; the run goes on")
            return None
        state, tensors = read_state(Path(path)), self.engine.tensors()
        checkpoint.load(Path(path), tensors)
        self.engine.finish_loading(tensors, state["updates"])
        step = state["step"]
        self.loader.go_back(state["loader"], done - step, finding.bad_steps + 1)
        self.times, self._last = self.times + 1, step
        self.recorder.note(
            f"step {done}: {finding.problem}; the run goes back to {path} and skips the rows of steps "
            f"{done - finding.bad_steps} to {done}"
        )
        self.recorder.go_back(step)
        self.steps.go_back(step)
        self.health.load_state_dict(state.get("health", {}))
        set_timeout(mesh, parallel.timeout_s)
        return str(path)

    def _choose(self, newest_allowed: int, wanted: bool) -> tuple[str | None, str | None]:
        """Return the checkpoint to go back to if that is wanted, and the newest good one. Only rank 0 calls it.

        If there is one to go back to, newer ones are deleted.
        """
        good: list[Path] = []
        directories = step_directories(self.run.directory / CHECKPOINTS)
        for path in directories:
            if step_of(path) > newest_allowed:
                continue
            try:
                verify(path)
            except CheckpointError as error:
                self.recorder.note(f"skipping checkpoint {path.name}: {error}")
                continue
            good.append(path)
            if step_of(path) != self._last:
                break
        if not good or not wanted or step_of(good[-1]) == self._last:
            return None, str(good[0]) if good else None
        for path in directories:
            if step_of(path) > step_of(good[-1]):
                delete_checkpoint(path)
        return str(good[-1]), str(good[0])
