"""Show, verify, compare and delete the checkpoints of a run.

    python scripts/checkpoint.py action=show run=runs/quickstart-1
    python scripts/checkpoint.py action=show run=runs/quickstart-1 step=600         # its files and tensors
    python scripts/checkpoint.py action=verify run=runs/quickstart-1
    python scripts/checkpoint.py action=diff run=runs/quickstart-1 step=600 other=500
    python scripts/checkpoint.py action=prune run=runs/quickstart-1 keep=2 keep_every=1000
    python scripts/checkpoint.py action=verify run=s3://bucket/runs/quickstart-1    # its copies in a store

`verify` reads whole files, and ends with status 2 if a checkpoint is damaged. `diff` also compares the runs of two
layouts. `prune` refuses to work while the run is written.
"""

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import ConfigError, expect_fields, require
from scripts.cli.command_line import run_tool

if TYPE_CHECKING:
    from training.checkpoint.inspection import Found


@dataclass(frozen=True)
class CheckpointToolConfig:
    """The keys of this tool. conf/checkpoint.yaml has the same keys and explains each."""

    action: Literal["show", "verify", "diff", "prune"]
    run: str
    step: int | None = None
    other: int | None = None
    other_run: str | None = None
    limit: int = 20
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0

    def __post_init__(self) -> None:
        expect_fields(
            self,
            action=(self.action in ACTIONS, f"one of {', '.join(ACTIONS)}"),
            step=(self.step is None or self.step >= 0, "an integer >= 0, or null"),
            other=(self.other is None or self.action == "diff", "null unless action=diff"),
            other_run=(self.other_run is None or self.action == "diff", "null unless action=diff"),
            limit=(self.limit >= 1, "an integer >= 1"),
            keep=(self.keep >= 1, "an integer >= 1"),
            keep_every=(self.keep_every >= 0, "an integer >= 0"),
            keep_best=(self.keep_best >= 0, "an integer >= 0"),
        )


def show(config: CheckpointToolConfig) -> None:
    """Print a table of the checkpoints, or the files and tensors of one."""
    from training.report.checkpoints import show_checkpoint, show_checkpoints

    where, found = chosen(config)
    if config.step is None:
        show_checkpoints(where, found)
    else:
        show_checkpoint(found[config.step])


def verify(config: CheckpointToolConfig) -> None:
    """Read the checkpoints and print which are intact.

    Raises:
        CheckpointError: at the end, if one is not.
    """
    from training.report.checkpoints import show_verified

    show_verified(*chosen(config))


def diff(config: CheckpointToolConfig) -> None:
    """Print how the tensors of two checkpoints differ."""
    from training.checkpoint.manifest import CHECKPOINTS, committed, step_of
    from training.report.checkpoints import show_differences

    directories("run", config.run)
    newest = committed(Path(config.run) / CHECKPOINTS)
    if config.step is None:
        require(newest, ConfigError, f"run={config.run}: expected a checkpoint that is not damaged")
    path = newest[0] if config.step is None else directory_of("run", config.run, "step", config.step)
    if config.other is None and config.other_run is None:
        before = newest[newest.index(path) + 1 :] if path in newest else []
        require(before, ConfigError, f"other=null: expected a step; {path} has no checkpoint before it")
        other = before[0]
    else:
        key, run = ("run", config.run) if config.other_run is None else ("other_run", config.other_run)
        name = "step" if config.other is None else "other"
        other = directory_of(key, run, name, step_of(path) if config.other is None else config.other)
    show_differences(other, path, config.limit)


def prune(config: CheckpointToolConfig) -> None:
    """Delete all checkpoints but those that the keys say, and print which."""
    from training.checkpoint.manifest import Retention
    from training.owner import LOCK_FILE, DirectoryLock
    from training.report.checkpoints import show_pruned

    paths = directories("run", config.run)
    try:
        lock = DirectoryLock.acquire(Path(config.run) / LOCK_FILE)
    except OSError as error:
        raise ConfigError(f"run={config.run}: expected a directory that can be written ({error.strerror})") from error
    require(lock is not None, ConfigError, f"run={config.run}: expected a run that no process is writing")
    assert lock is not None
    try:
        show_pruned(paths, Retention(config.keep, config.keep_every, config.keep_best))
    finally:
        lock.release()


def chosen(config: CheckpointToolConfig) -> tuple[str, dict[int, "Found"]]:
    """Return the directory or the URL with the checkpoints of `run`, and step -> checkpoint: of `step`, or of all.

    Raises:
        ConfigError: the run has none, or not this one.
        RemoteError: the store refused or did not answer.
    """
    from training.checkpoint.inspection import found_copies, found_in
    from training.checkpoint.manifest import CHECKPOINTS
    from training.checkpoint.remote import RemoteCheckpoints
    from training.checkpoint.remote_files import check_url, is_url

    if is_url(config.run):
        check_url("run", config.run)
        remote = RemoteCheckpoints(config.run)
        where, found = remote.url, found_copies(remote)
    else:
        root = Path(config.run) / CHECKPOINTS
        where, found = str(root), found_in(root)
    require(found, ConfigError, f"run={config.run}: expected a run's directory with checkpoints, or its URL")
    if config.step is None:
        return where, found
    expect_step("step", config.step, config.run, found)
    return where, {config.step: found[config.step]}


def directories(key: str, run: str) -> list[Path]:
    """Return the directories of all checkpoints of a run, the newest first.

    Raises:
        ConfigError: the run has none, or is a URL.
    """
    from training.checkpoint.manifest import CHECKPOINTS, step_directories
    from training.checkpoint.remote_files import is_url, without_secrets

    require(
        not is_url(run), ConfigError, f"{key}={without_secrets(run)}: expected a directory (show, verify: or a URL)"
    )
    found = step_directories(Path(run) / CHECKPOINTS)
    require(found, ConfigError, f"{key}={run}: expected a run's directory with checkpoints")
    return found


def directory_of(key: str, run: str, step_key: str, step: int) -> Path:
    """Return the directory of one checkpoint.

    Raises:
        ConfigError: the run does not have it.
    """
    from training.checkpoint.manifest import step_of

    steps = {step_of(path): path for path in directories(key, run)}
    expect_step(step_key, step, run, steps)
    return steps[step]


def expect_step(key: str, step: int, run: str, steps: Collection[int]) -> None:
    """Raise a ConfigError unless the run has a checkpoint of this step."""
    listed = ", ".join(str(number) for number in sorted(steps)[-10:])
    require(step in steps, ConfigError, f"{key}={step}: expected a step of {run}: {listed}")


ACTIONS: dict[str, Callable[[CheckpointToolConfig], None]] = {
    "show": show,
    "verify": verify,
    "diff": diff,
    "prune": prune,
}


def main() -> None:
    """Run this tool with the command line's arguments. `conf/checkpoint.yaml` has its keys."""
    run_tool("checkpoint", CheckpointToolConfig, lambda config: ACTIONS[config.action](config))


if __name__ == "__main__":
    main()
