"""Follow a run in the terminal: its curves, the load of every expert, its alarms.

    python scripts/watch.py run=runs/quickstart-1
    python scripts/watch.py run=runs/quickstart-1 once=true      # one picture

It reads what the run writes, on any machine that sees the directory, and ends with the run.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import expect
from scripts.cli.command_line import run_tool


@dataclass(frozen=True)
class WatchConfig:
    """The keys of this tool. conf/watch.yaml has the same keys and explains each."""

    run: str
    every: float = 2.0
    once: bool = False

    def __post_init__(self) -> None:
        expect(0.1 <= self.every <= 3600, "every", self.every, "seconds from 0.1 to 3600")


def watch(config: WatchConfig) -> None:
    """Show the run until it ends, or once."""
    from training.report.watch import follow

    follow(Path(config.run), config.every, config.once)


def main() -> None:
    """Run this tool with the command line's arguments. `conf/watch.yaml` has its keys."""
    run_tool("watch", WatchConfig, watch)


if __name__ == "__main__":
    main()
