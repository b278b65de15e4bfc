"""`scripts/campaign.py` as a user runs it: ranks are killed, files are damaged, and nothing is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, run_python


def campaign(*arguments: str, script: str = "scripts/campaign.py") -> tuple[int, dict[str, list[str]], str]:
    """Return the exit status, the words of the last table's lines by their first word, and all output."""
    ended = run_python(script, *arguments)
    table = ended.stdout.rpartition("\nCampaigns\n")[2]
    return (
        ended.returncode,
        {line.split()[0]: line.split()[1:] for line in table.splitlines() if line},
        (ended.stdout + ended.stderr),
    )


@pytest.mark.slow
def test_kills_and_damages(tmp_path: Path) -> None:
    status, table, output = campaign(
        "campaigns=[kill,damage]", "kills=3", "damages=100", "seed=3", f"directory={tmp_path / 'runs'}"
    )
    assert status == 0, output
    tried, _, noticed, lost, corrupted, *_ = table["kill"]
    assert (tried, noticed, lost, corrupted) == ("3", "3", "0", "0")
    tried, _, noticed, lost, corrupted, *_ = table["damage"]
    assert tried == noticed and int(tried) > 90 and (lost, corrupted) == ("0", "0")


BLIND = """
from training.checkpoint import manifest
manifest.verify = lambda path, peers=None, again=True: None
from scripts import campaign

if __name__ == "__main__":
    campaign.main()
"""


@pytest.mark.slow
def test_status_1_if_damaged_files_are_used(tmp_path: Path) -> None:
    (tmp_path / "blind.py").write_text(BLIND)
    script = str(tmp_path / "blind.py")
    status, table, output = campaign("campaigns=damage", "damages=30", f"directory={tmp_path / 'runs'}", script=script)
    assert status == 1 and int(table["damage"][4]) > 0, output
    assert "is used although it is damaged" in output and f"the runs are kept in {tmp_path / 'runs'}" in output


def test_not_under_torchrun() -> None:
    ended = subprocess.run(
        [sys.executable, "scripts/campaign.py"],
        cwd=ROOT,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr == "error: ranks: expected no torchrun or deepspeed around a campaign\n"
