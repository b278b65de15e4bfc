"""Kill ranks and damage files of small runs, and check that nothing is lost: the command line of `training/campaign`.

    python scripts/campaign.py campaigns=[kill,damage]
    python scripts/campaign.py campaigns=kill kills=200 ranks=2 seed=1

`--help` prints more examples and all keys; they are in training/campaign/config.py and conf/campaign.yaml.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel.startup.launch import begin_process

if __name__ in ("__main__", "__mp_main__"):  # This process, or a worker that it has started.
    begin_process()

from common.errors import ConfigError, require
from parallel.startup.launch import is_launched, preload_workers
from scripts.cli.command_line import run_tool
from scripts.cli.workers import TRAINING_MODULES, execute
from training.campaign.config import CampaignConfig

PRELOADED = (*TRAINING_MODULES, "training.campaign.worker", "matplotlib.pyplot", "sentencepiece")
"""What the processes of a run import."""


def disturb(config: CampaignConfig) -> None:
    """Run the campaigns. End the process with status 1 if something was lost, or used although it was damaged."""
    require(not is_launched(), ConfigError, "ranks: expected no torchrun or deepspeed around a campaign")
    preload_workers(PRELOADED)
    from training.campaign.driver import run_campaigns

    if not run_campaigns(config, execute):
        raise SystemExit(1)


def main() -> None:
    """Run this tool with the command line's arguments. `conf/campaign.yaml` has its keys."""
    run_tool("campaign", CampaignConfig, disturb)


if __name__ == "__main__":
    main()
