"""The report of a run that has ended early: when it is written, what it says, and that it neither fails nor waits."""

import json
import signal
import time
from pathlib import Path

import pytest

from common.errors import TrainingFailure
from scripts.cli import early_end
from scripts.cli.early_end import report_early_end, signal_of
from tests.training.test_page import write_run
from training.config import RunConfig
from training.owner import RunOwner


@pytest.fixture
def owner(tmp_path: Path) -> RunOwner:
    """The owner of a run that has logged steps and has no result."""
    run = write_run(tmp_path / "r")
    (run / "result.json").unlink()
    with RunOwner() as owner:
        owner.claim(RunConfig(experiment="e", root=str(tmp_path), name="r"))
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 13}) + "\n")
    return owner


def test_the_report_says_why_the_run_has_ended(
    owner: RunOwner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r" / "report.html"
    for error, message, reason in (
        (TrainingFailure("rank 1 is gone"), "rank 1 is gone", "The run has ended with an error: rank 1 is gone."),
        (SystemExit(128 + signal.SIGTERM), "", "The run was ended by SIGTERM."),
        (KeyboardInterrupt(), "", "The run was ended by SIGINT."),
    ):
        report_early_end(owner, error, message)
        assert capsys.readouterr().out == f"report until here: {page}\n"
        text = page.read_text(encoding="utf-8")
        assert f"<li>{reason} There is no readable result.json" in text and "13 of ?" in text
    assert signal_of(SystemExit(2)) is None and signal_of(ValueError()) is None


def test_no_report_without_a_new_step_or_for_a_launcher_that_waits(
    owner: RunOwner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunOwner() as refused:
        refused.claim(RunConfig(experiment="e", root=str(tmp_path), name="r"))
    report_early_end(refused, ValueError())
    report_early_end(RunOwner(), KeyboardInterrupt())
    monkeypatch.setenv("RANK", "0")
    report_early_end(owner, TrainingFailure("rank 1 is gone"))
    assert not (tmp_path / "r" / "report.html").exists()


def test_a_report_that_takes_too_long_is_given_up(
    owner: RunOwner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(early_end, "LIMIT_S", 0.05)
    monkeypatch.setattr("training.report.page.write.run_page", lambda data: time.sleep(60))
    before = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)]
    report_early_end(owner, TrainingFailure("rank 1 is gone"))
    assert capsys.readouterr().out == "warning: report.html is not written: Ctrl-C, or it took longer than 0.05 s\n"
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)] == before
