"""Check that every layout computes what one process computes: the command line of `training/parity`.

    python scripts/parity.py layouts=all launch.nproc=4
    python scripts/parity.py model=mixtral_tiny router=switch launch.nproc=2

`--help` prints more examples and all keys; they are in training/parity/config.py and conf/parity.yaml.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel.startup.launch import begin_process

if __name__ in ("__main__", "__mp_main__"):  # This process, or a worker that it has started.
    begin_process()

from parallel.startup.launch import is_launched
from scripts.cli.command_line import run_tool
from scripts.cli.workers import in_processes, prepare_launched
from training.parity.config import ParityConfig


def check_parity(config: ParityConfig) -> None:
    """Run the check in this process or in worker processes. End the process with status 1 if something differs."""
    from training.parity.driver import check_on_rank
    from training.parity.jobs import select_jobs

    if is_launched():
        prepare_launched(config.launch)
        equal = check_on_rank(config)
    else:
        select_jobs(config, config.launch.nproc)  # Report a mistake before any worker starts.
        equal = in_processes(config.launch, check_on_rank, config)
    if not equal:
        raise SystemExit(1)


def main() -> None:
    """Run this tool with the command line's arguments. `conf/parity.yaml` has its keys."""
    run_tool("parity", ParityConfig, check_parity)


if __name__ == "__main__":
    main()
