"""Make a workspace in W&B: the panels of a mixture of experts, in sections, for all runs of a project.

    pip install 'mixwright[workspace]'
    python scripts/wandb_workspace.py entity=my-team project=mixwright

It needs an API key of W&B and prints the address of the workspace. The runs can come later.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import ConfigError, RunError, expect, require
from common.text import first_line
from scripts.cli.command_line import run_tool


@dataclass(frozen=True)
class WorkspaceConfig:
    """The keys of this tool. conf/wandb_workspace.yaml has the same keys and explains each."""

    entity: str
    project: str = "mixwright"
    name: str = "Mixture of experts"

    def __post_init__(self) -> None:
        for field in ("entity", "project", "name"):
            expect(getattr(self, field) != "", field, "''", "a name")


def save(config: WorkspaceConfig) -> None:
    """Send the workspace to W&B and print its address.

    Raises:
        ConfigError: the package wandb-workspaces or the API key is missing.
        RunError: W&B does not take the workspace, or cannot be reached.
    """
    from training.config import TrackingConfig
    from training.report.recorder import check_tracking
    from training.report.wandb_workspace import workspace

    installed = find_spec("wandb_workspaces") is not None
    require(installed, ConfigError, "wandb-workspaces is not installed: pip install 'mixwright[workspace]'")
    check_tracking(TrackingConfig(wandb="online"))
    view = workspace(config.entity, config.project, config.name)
    try:
        view.save()
    except Exception as error:  # The package raises the errors of its HTTP client, and its own.
        raise RunError(f"entity={config.entity} project={config.project}: W&B refused ({first_line(error)})") from error
    print(view.url)


def main() -> None:
    """Run this tool with the command line's arguments. `conf/wandb_workspace.yaml` has its keys."""
    run_tool("wandb_workspace", WorkspaceConfig, save)


if __name__ == "__main__":
    main()
