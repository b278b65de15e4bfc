"""Write the report of a run or a sweep: one HTML file, which opens without a network.

    python scripts/report.py run=runs/quickstart-1                      # writes runs/quickstart-1/report.html
    python scripts/report.py run=runs/sweep-1                           # a table of the jobs, loss against cost
    python scripts/report.py runs=[runs/a,runs/b] out=comparison.html   # the same for any runs
    python scripts/report.py run=runs/quickstart-1 format=svg           # its figures, in figures/
    python scripts/report.py run=runs/quickstart-1 format=svg step=500  # those of one step show step 500, not the last

Runs and sweeps write their report themselves when they end. This tool is for those that have not, and for older ones.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import ConfigError, expect
from common.files import explain_os_error
from scripts.cli.command_line import run_tool


@dataclass(frozen=True)
class ReportConfig:
    """The keys of this tool. conf/report.yaml has the same keys and explains each."""

    run: str | None = None
    runs: tuple[str, ...] = ()
    out: str | None = None
    format: Literal["html", "png", "svg"] = "html"
    step: int | None = None

    def __post_init__(self) -> None:
        expect((self.run is None) != (not self.runs), "run", self.run, "a run or a sweep, or else runs=[...]")
        expect(not self.runs or self.out is not None, "out", self.out, "a file for the report of several runs")
        expect(not self.runs or self.format == "html", "format", self.format, "html for several runs")
        expect(self.step is None or self.format != "html", "step", self.step, "null for a page, which has every step")


def report(config: ReportConfig) -> None:
    """Write the report, or its figures, and print where they are.

    Raises:
        ConfigError: there is no such run, it has not recorded the step, or the file cannot be written.
    """
    from training.report.page.write import write_comparison, write_figures, write_report

    directory, out = Path(config.run or "."), None if config.out is None else Path(config.out)
    try:
        if out is not None and config.runs:
            print(write_comparison([Path(run) for run in config.runs], out))
        elif config.format == "html":
            print(write_report(directory, out))
        else:
            print(write_figures(directory, out, config.format, config.step))
    except OSError as error:
        key, value = ("run", config.run) if config.out is None else ("out", config.out)
        reason = explain_os_error(error, out or directory)
        raise ConfigError(f"{key}={value}: expected a place for a file that can be written ({reason})") from error


def main() -> None:
    """Run this tool with the command line's arguments. `conf/report.yaml` has its keys."""
    run_tool("report", ReportConfig, report)


if __name__ == "__main__":
    main()
