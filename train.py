"""Train a model: from the command line to a valid configuration, and then to the training loop.

    python train.py launch.nproc=2 experiment=quickstart                           starts two worker processes
    NPROC=2 scripts/node.sh experiment=quickstart                                  torchrun starts them
    python train.py -m launch.nproc=2 experiment=quickstart model.num_experts=4,8  a sweep, one job after the other

`job` converts what Hydra composed to a validated `Config`. Each worker process then calls `train`. Nothing here imports
torch before the configuration is valid, so that `--help` and refusals take less than a second.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from parallel.startup.launch import begin_process, interrupts_raise

if __name__ in ("__main__", "__mp_main__"):  # This process, or a worker that it has started.
    begin_process()

import math
import os
from typing import Any

import hydra
from omegaconf import DictConfig

from common.errors import RunError
from common.strict import from_dict
from scripts.cli.command_line import (
    CONF,
    asks_for_help,
    check_presets,
    current_job,
    end,
    job_arguments,
    job_command,
    last_line,
    load_named_plugins,
    plain,
    record_failure,
    show_train_help,
    sweep_directory,
    take_flag,
    without_local_rank,
)
from scripts.cli.early_end import report_early_end
from scripts.cli.overrides import quote
from scripts.cli.sweeps import begin_job, end_job, finished_job, show_interrupted_sweep
from scripts.cli.workers import execute
from training.config import Config
from training.initial import start_from
from training.owner import RunOwner


def train(config: Config, owner: RunOwner | None = None) -> dict[str, Any]:
    """Train one run in this process; see `training.loop.train`."""
    from training import loop

    return loop.train(config, owner)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> float:
    """Run one run, or one job of a sweep.

    Returns:
        The held-out loss, which a sweeper minimises. Infinite if there is none, and for a job of a sweep that failed:
        the sweep continues.
    """
    sweep_dir, number = current_job()
    # Worker processes see only these arguments, and the command that resumes the run is printed from them.
    sys.argv[1:] = job_arguments()
    result: dict[str, Any] = {}
    before: dict[str, Any] = {}
    owner = RunOwner()
    try:
        if sweep_dir is not None and number is not None:
            begin_job(sweep_dir, number, sys.argv[1:])
    except RunError as error:
        end(error, sys.argv[1:])
    try:
        raw = plain(cfg, sweep_dir, number)
        load_named_plugins(raw)
        config = from_dict(Config, start_from(raw, sys.argv[1:]))
        before = finished_job(config) if sweep_dir is not None else {}
        result = before or execute(config, train, owner, fresh_processes=sweep_dir is not None)
    except Exception as error:
        try:
            if sweep_dir is None:
                end(error, sys.argv[1:])
            record_failure(error, sys.argv[1:], cfg, sweep_dir, number)
        finally:
            report_early_end(owner, error, last_line(error, sys.argv[1:]))
    except (KeyboardInterrupt, SystemExit) as stop:
        report_early_end(owner, stop)
        raise
    if sweep_dir is not None and not before:
        end_job(sweep_dir)
    loss = result.get("eval/loss")
    return math.inf if loss is None else float(loss)


def main() -> None:
    """Exit with status 0, or 2 after one line about a mistake that the user can correct, or 1 after any other error.

    `scripts.cli.command_line.end` has the others.
    """
    # With this variable Hydra lets exceptions through. Without it, it prints a report and exits with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    typed = without_local_rank(sys.argv[1:])
    interrupts_raise()
    sweep_dir = None
    try:
        if asks_for_help(typed):
            return show_train_help(typed)
        config_dir, _ = take_flag(typed, "--config-dir", "-cd")
        if config_dir is not None:
            check_presets(config_dir)
        sys.argv[1:] = job_command(typed)
        with RunOwner(sweep=True) as sweep:
            sweep_dir = sweep_directory(sys.argv[1:], sweep)
            if sweep_dir is not None:
                sys.argv.append(f"hydra.sweep.dir={quote(str(sweep_dir))}")
            job()
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        show_interrupted_sweep(sweep_dir, error, typed)
        end(error, typed)
    except SystemExit as error:
        show_interrupted_sweep(sweep_dir, error, typed)
        raise
    if sweep_dir is not None:
        from training.report.page.write import write_report_or_say_why
        from training.report.sweep import sweep_table
        from training.report.terminal import show_line

        rows = sweep_table(sweep_dir)
        write_report_or_say_why(sweep_dir, show_line)
        if any(row["status"] != "finished" for row in rows):
            raise SystemExit(1)


if __name__ == "__main__":
    # `train` is pickled for worker processes, which import it from this module and not from `__main__`.
    import train as this_module

    this_module.main()
