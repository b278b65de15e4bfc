"""The jobs of a sweep: how many there are, which one runs, and how an interrupted sweep goes on.

`sweep.jsonl` in the directory of a sweep has a line for every launch, with the number of its jobs, and one for every
job, with the arguments that it was started with first. A launch with the same `run.name` goes through the same jobs
again: those that have finished return their loss at once, and one that was interrupted is resumed.
"""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from common.errors import RunError, require
from common.files import append_line, disk_errors
from common.text import to_json
from scripts.cli.early_end import signal_of, write_in_time
from scripts.cli.overrides import PARSER
from training.config import Config
from training.owner import SWEEP_RECORD
from training.report.sweep import SweepRecord, best_line, sweep_rows, write_sweep
from training.report.terminal import show_fields, show_line
from training.run import finished_result

FREE = ("run.name=", "run.root=", "launch.", "tracking.", "tracking=")
"""The starts of arguments that can differ when a sweep goes on, because they change no number."""


def launch_line(arguments: Sequence[str], total: int | None) -> str:
    """Return the line of `sweep.jsonl` for a launch."""
    return to_json({"jobs": total, "arguments": list(arguments)})


def count_jobs(overrides: Sequence[Override], hydra: DictConfig) -> int | None:
    """Return the number of jobs of a sweep, or None if it is unknown.

    Args:
        overrides: the parsed overrides of the command line.
        hydra: Hydra's own section of the composed configuration.
    """
    if "n_trials" in hydra.sweeper:
        return int(hydra.sweeper.n_trials)
    swept = {override.get_key_element(): override for override in overrides}
    for key, value in (hydra.sweeper.get("params") or {}).items():
        swept.setdefault(str(key), PARSER.parse_override(f"{key}={value}"))
    sizes = [
        len(list(override.sweep_string_iterator())) if override.is_discrete_sweep() else None
        for override in swept.values()
        if override.is_sweep_override()
    ]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def silence_optuna(hydra: DictConfig) -> None:
    """Keep Optuna, if it is the sweeper, from logging what it does: it would write colours into log files, too.

    Args:
        hydra: Hydra's own section of the composed configuration.
    """
    if "optuna" in str(hydra.sweeper.get("_target_")):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)


def begin_job(sweep_dir: Path, number: int, arguments: Sequence[str]) -> None:
    """Say which job of the sweep begins, and record its arguments.

    Raises:
        RunError: the job was started with other arguments before.
    """
    record = SweepRecord.read(sweep_dir)
    before, now = map(_that_matter, (record.jobs.get(number, arguments), arguments))
    require(
        before == now,
        RunError,
        f"run.name={sweep_dir.name}: expected the command of the sweep, or another name; job {number} was started with "
        f"{_without(before, now)}, and would have {_without(now, before)}",
    )
    if number not in record.jobs:
        with disk_errors(sweep_dir):
            append_line(sweep_dir / SWEEP_RECORD, to_json({"job": number, "arguments": list(arguments)}))
    of_all = "" if record.total is None else f" of {record.total}"
    own = [each for each in arguments if each not in record.launch]
    show_line()
    show_line(f"Sweep {sweep_dir.name}: job {number + 1}{of_all} (directory {number}): {shlex.join(own)}", style="bold")


def _without(arguments: Sequence[str], others: Sequence[str]) -> str:
    return shlex.join(argument for argument in arguments if argument not in others) or "less"


def _that_matter(arguments: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if not argument.startswith(FREE)]


def end_job(sweep_dir: Path) -> None:
    """Write the table of the jobs so far, and say how many have finished."""
    rows, varying = sweep_rows(sweep_dir)
    with disk_errors(sweep_dir):
        write_sweep(sweep_dir, rows, varying)
    total = SweepRecord.read(sweep_dir).total
    finished = sum(row["status"] == "finished" for row in rows)
    show_line(f"Sweep {sweep_dir.name}: {finished} of {len(rows) if total is None else total} jobs finished")
    if best := best_line(rows, varying):
        show_line(best)


def finished_job(config: Config) -> dict[str, Any]:
    """Return the result of a job that has done all its steps already, and say so. Else return an empty dict."""
    result = finished_result(Path(config.run.root) / str(config.run.name), config.train.steps)
    if result is None:
        return {}
    show_line(f"finished before: held-out loss {result.get('eval/loss')}")
    return result


def show_interrupted_sweep(sweep_dir: Path | None, error: BaseException, typed: Sequence[str]) -> None:
    """Print how a sweep goes on that a signal or Ctrl-C has ended, and write its report.

    Nothing is done for other errors and single runs.

    Args:
        sweep_dir: its directory; None: a single run.
        typed: the arguments of the command.
    """
    if sweep_dir is None or signal_of(error) is None:
        return
    end_job(sweep_dir)
    named = any(argument.startswith("run.name=") for argument in typed)
    command = ["python", "train.py", *typed, *([] if named else [f"run.name={sweep_dir.name}"])]
    show_fields("Interrupted sweep", {"continue": shlex.join(command)}, commands=("continue",))
    write_in_time(sweep_dir)
