"""Write the report of a run: one HTML file with its curves, its router and its experts, which opens without a network.

    python scripts/report.py run=runs/quickstart-1                      # writes runs/quickstart-1/report.html
    python scripts/report.py run=runs/quickstart-1 out=/tmp/report.html

A run writes its report itself when it ends. This tool is for runs that are not finished, and for older ones.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import ConfigError
from common.files import explain_os_error
from scripts.cli.command_line import run_tool


@dataclass(frozen=True)
class ReportConfig:
    """The keys of this tool. conf/report.yaml has the same keys and explains each."""

    run: str
    out: str | None = None


def report(config: ReportConfig) -> None:
    """Write the report and print where it is.

    Raises:
        ConfigError: there is no such run, or the file cannot be written.
    """
    from training.report.page.write import REPORT_FILE, write_run_page

    directory = Path(config.run)
    target = directory / REPORT_FILE if config.out is None else Path(config.out)
    try:
        print(write_run_page(directory, target))
    except OSError as error:
        key, value = ("run", config.run) if config.out is None else ("out", config.out)
        reason = explain_os_error(error, target.parent)
        raise ConfigError(f"{key}={value}: expected a place for a file that can be written ({reason})") from error


def main() -> None:
    """Run this tool with the command line's arguments. `conf/report.yaml` has its keys."""
    run_tool("report", ReportConfig, report)


if __name__ == "__main__":
    main()
