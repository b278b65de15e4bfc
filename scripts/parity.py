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

from scripts.cli.command_line import run_tool
from scripts.cli.workers import on_every_rank
from training.parity.config import ParityConfig


def check_parity(config: ParityConfig) -> None:
    """Run the check on every rank. End the process with status 1 if something differs."""
    from training.parity.driver import check_on_rank
    from training.parity.jobs import select_jobs

    def report_mistakes() -> tuple[()]:
        select_jobs(config, config.launch.nproc)
        return ()

    if not on_every_rank(check_on_rank, config, report_mistakes):
        raise SystemExit(1)


def main() -> None:
    """Run this tool with the command line's arguments. `conf/parity.yaml` has its keys."""
    run_tool("parity", ParityConfig, check_parity)


if __name__ == "__main__":
    main()
