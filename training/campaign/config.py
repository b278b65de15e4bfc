"""Disturb runs of a small model, continue them, and compare them with a run that was not disturbed.

    python scripts/campaign.py
    python scripts/campaign.py campaigns=[signal,disk] faults=20
    python scripts/campaign.py campaigns=kill kills=200 ranks=2 seed=1
    python scripts/campaign.py campaigns=kill kills=60 ranks=4 inside=0.9
    python scripts/campaign.py campaigns=damage damages=1000

Exit status 0: nothing was lost, and no damaged file was used; 1: something was. docs/reliability.md explains the table.
"""

from dataclasses import dataclass

from common.errors import expect, expect_fields

CAMPAIGNS = ("kill", "stop", "signal", "nan", "disk", "damage")
EVERY = "all"
"""The value of `campaigns` that stands for all of them."""


@dataclass(frozen=True)
class CampaignConfig:
    """The keys of `scripts/campaign.py`. conf/campaign.yaml has the same keys and explains each."""

    campaigns: str | tuple[str, ...] = EVERY
    kills: int = 20
    inside: float = 0.6
    faults: int = 4
    damages: int = 1000
    ranks: int = 2
    seed: int = 0
    directory: str | None = None

    def __post_init__(self) -> None:
        names = self.chosen()
        shown = self.campaigns if isinstance(self.campaigns, str) else f"[{','.join(self.campaigns)}]"
        known = bool(names) and set(names) <= set(CAMPAIGNS)
        expect(known, "campaigns", shown, f"{EVERY}, or a list of {', '.join(CAMPAIGNS)}")
        expect_fields(
            self,
            kills=(self.kills >= 1, "an integer >= 1"),
            inside=(0 <= self.inside <= 1, "a number in [0, 1]"),
            faults=(self.faults >= 1, "an integer >= 1"),
            damages=(self.damages >= 1, "an integer >= 1"),
            ranks=(2 <= self.ranks <= 16, "an integer from 2 to 16"),
            seed=(self.seed >= 0, "an integer >= 0"),
            directory=(self.directory != "", "a directory, or null"),
        )

    def chosen(self) -> tuple[str, ...]:
        """Return the names of the campaigns to run, in their order."""
        if self.campaigns == EVERY:
            return CAMPAIGNS
        return tuple(self.campaigns.split(",")) if isinstance(self.campaigns, str) else self.campaigns
