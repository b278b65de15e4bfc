"""Running the campaigns that the user has chosen, and the table at the end."""

import shutil
import tempfile
import time
from pathlib import Path

from training.campaign.config import CampaignConfig
from training.campaign.damage import damage
from training.campaign.processes import disturb, kill, run_reference
from training.campaign.runs import Launch, Tally
from training.report.terminal import human_time, show_line, show_table

COLUMNS = ("campaign", "tried", "inside a save", "noticed", "lost", "corrupted", "time")


def run_campaigns(config: CampaignConfig, launch: Launch) -> bool:
    """Run the campaigns and print what they counted.

    Args:
        launch: starts worker processes.

    Returns:
        Whether nothing was lost and nothing corrupted, and every disturbance was noticed.
    """
    root = Path(config.directory or tempfile.mkdtemp(prefix="campaign-"))
    root.mkdir(parents=True, exist_ok=True)
    show_line(f"runs in {root}; ranks {config.ranks}, seed {config.seed}")
    start = time.monotonic()
    reference, pace = run_reference(config, root, launch)
    show_line(
        f"the run without disturbances: {human_time(time.monotonic() - start)}; start {human_time(pace.start)}, step "
        f"{human_time(pace.step)}, save {human_time(pace.save)}"
    )
    tallies = []
    for name in config.chosen():
        start = time.monotonic()
        if name == "damage":
            tally = damage(config, root, reference)
        elif name == "kill":
            tally = kill(config, root, launch, reference, pace)
        else:
            tally = disturb(name, config, root, launch, reference)
        tally.seconds = time.monotonic() - start
        for line in (*tally.unnoticed, *tally.lost, *tally.corrupted):
            show_line(line)
        tallies.append(tally)
    show_table("Campaigns", COLUMNS, [_row(tally) for tally in tallies])
    whole = all(tally.whole for tally in tallies)
    if config.directory is None and whole:
        shutil.rmtree(root)
    elif not whole:
        show_line(f"the runs are kept in {root}")
    return whole


def _row(tally: Tally) -> list[str]:
    inside = "-" if tally.inside is None else str(tally.inside)
    noticed = tally.tried - len(tally.unnoticed)
    figures = map(str, (noticed, len(tally.lost), len(tally.corrupted)))
    return [tally.campaign, str(tally.tried), inside, *figures, human_time(tally.seconds)]
