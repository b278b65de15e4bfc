"""What a campaign counts: damages that are noticed or not, and differences from the run that was not disturbed."""

import io
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from training.campaign import damage
from training.campaign.config import CAMPAIGNS, CampaignConfig
from training.campaign.processes import DISTURBANCES, Disk, NotANumber, Signal, Stop, Watched
from training.campaign.runs import EVERY, STEPS, Reference, Tally, compare, configuration, content, rows_of
from training.checkpoint import manifest
from training.checkpoint.checkpoint import save
from training.checkpoint.manifest import CHECKPOINTS
from training.config import Config
from training.report.metrics import MetricsWriter


def test_the_keys() -> None:
    assert CampaignConfig().chosen() == CAMPAIGNS
    assert CampaignConfig(campaigns="damage").chosen() == CampaignConfig(campaigns=("damage",)).chosen() == ("damage",)
    for wrong in ("theft", (), ("kill", "theft")):
        with pytest.raises(
            ConfigError, match=r"^campaigns=.*expected all, or a list of kill, stop, signal, nan, disk, damage$"
        ):
            CampaignConfig(campaigns=wrong)
    with pytest.raises(ConfigError, match=r"^ranks=1: expected an integer from 2 to 16$"):
        CampaignConfig(ranks=1)


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    """The files of a run that has finished, with two small tensors in place of a model."""
    directory = tmp_path / "reference"
    directory.mkdir()
    writer = MetricsWriter(directory / "metrics.jsonl", None)
    for step in range(1, STEPS + 1):
        writer.write({"step": step, "train/loss": 6 - step / STEPS, "speed/tokens_per_s": 1.0})
        if step % EVERY == 0 and step > STEPS - 4 * EVERY:
            tensors = {"model.a": torch.full((4, 3), float(step)), "exp_avg.a": torch.full((4, 3), step / 2)}
            save(directory / CHECKPOINTS, step, tensors, {"step": step, "metrics": writer.record().to_state()}, keep=9)
    writer.close()
    checkpoints = {step: content(directory / CHECKPOINTS / f"step-{step}") for step in range(STEPS, STEPS - 6, -EVERY)}
    return Reference(directory, checkpoints, rows_of(directory))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


Resume = Callable[..., damage.Resumption]


@pytest.fixture
def judge(reference: Reference, work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, Tally]]:
    """Damage files of the reference, and return what `damage.check` says. There is no token store and no model."""
    monkeypatch.setattr(damage, "Store", lambda directory, verify: None)
    monkeypatch.setattr(damage, "saved_values", lambda state, directory, checkpoint: {})
    monkeypatch.setattr(damage, "resumable_state", lambda path, steps: manifest.read_state(Path(path)))
    (work / "empty").mkdir(parents=True)
    before = damage.intact_files(reference.directory, work / "empty")

    def judged(change: Callable[[Path], object]) -> tuple[str, Tally]:
        damage.restore(work, before)
        change(work / damage.RUN)
        tally = Tally("damage", tried=1)
        expected = damage.newest_intact(before, damage.read_files(work))
        outcome = damage.check(CampaignConfig(), work, "this", before, expected, reference, tally)
        return outcome, tally

    return judged


def shard(run: Path, step: int = STEPS) -> Path:
    (file,) = (run / CHECKPOINTS / f"step-{step}").glob("rank-*")
    return file


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_is_noticed(judge: Callable[..., tuple[str, Tally]]) -> None:
    older, tally = judge(lambda run: flip(shard(run)))
    assert older == "older checkpoint" and tally.whole
    rows, tally = judge(lambda run: flip(run / "metrics.jsonl"))
    assert rows == "rows restored" and tally.whole
    refused, tally = judge(lambda run: [flip(shard(run, STEPS - EVERY * number)) for number in range(damage.NEWEST)])
    assert refused == "refused" and tally.whole


def test_nothing_said_is_not_noticed(judge: Callable[..., tuple[str, Tally]]) -> None:
    outcome, tally = judge(lambda run: None)
    assert outcome == "not noticed" and tally.unnoticed == ["this: nothing is said"] and not tally.lost


def test_a_damaged_checkpoint_that_is_used_is_found(
    judge: Callable[..., tuple[str, Tally]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "verify", lambda path, peers, *, again: None)
    _, tally = judge(lambda run: flip(shard(run)))
    assert len(tally.corrupted) == 1 and f"step-{STEPS}/rank-00000" in tally.corrupted[0]
    assert "is used although it is damaged" in tally.corrupted[0] and tally.unnoticed


def test_a_good_checkpoint_that_is_not_used_is_lost(
    judge: Callable[..., tuple[str, Tally]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage, "newest_intact", lambda before, after: STEPS)
    _, tally = judge(lambda run: flip(shard(run)))
    assert tally.lost == [f"this: continues after step {STEPS - EVERY}, expected {STEPS}"]


def test_a_traceback_is_not_noticed(judge: Callable[..., tuple[str, Tally]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("step")

    monkeypatch.setattr(damage, "saved_values", fail)
    _, tally = judge(lambda run: flip(shard(run)))
    assert tally.unnoticed == ["this: not one line, but KeyError: 'step'"]


def test_every_damage_changes_the_files(reference: Reference, work: Path) -> None:
    (work / "empty").mkdir(parents=True)
    before, choose = damage.intact_files(reference.directory, work / "empty"), random.Random(0)
    assert len(before) == 1 + 2 * damage.NEWEST
    for change in damage.DAMAGES.values():
        for path in before:
            damage.restore(work, before)
            change(work, path, choose)
            assert damage.read_files(work) != before, (change, path)


def test_a_run_is_compared_bit_by_bit(reference: Reference, tmp_path: Path) -> None:
    """Of the run that is compared, the rows come from the reference and the newest checkpoint is made here."""

    def found(step: int, *, at_least: int, value: float | None = None, rows: int = STEPS) -> Tally:
        run = tmp_path / f"{step}-{at_least}-{value}-{rows}"
        tensors = {
            "model.a": torch.full((4, 3), float(step) if value is None else value),
            "exp_avg.a": torch.full((4, 3), step / 2),
        }
        save(run / CHECKPOINTS, step, tensors, {"step": step, "metrics": None}, keep=9)
        lines = (reference.directory / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[:rows]))
        compare(run, reference, tally := Tally("kill"), "this", at_least=at_least)
        return tally

    assert found(STEPS - EVERY, at_least=STEPS - EVERY).whole
    assert "newest checkpoint" in found(STEPS - EVERY, at_least=STEPS).lost[0]
    assert "differs from that of the run" in found(STEPS, at_least=0, value=1.0).corrupted[0]
    assert "rows of 3 steps are missing, the first is 38" in found(STEPS, at_least=0, rows=STEPS - 3).lost[0]


def test_a_directory_that_a_killed_save_has_left_is_not_a_save(tmp_path: Path) -> None:
    config: Config = configuration(tmp_path, "run", ranks=2, seed=0)
    checkpoints = tmp_path / "run" / CHECKPOINTS
    (checkpoints / ".tmp-step-2").mkdir(parents=True)
    watched = Watched(config, lambda *arguments: {}, lambda watched: None)
    assert not watched.saves()
    (checkpoints / ".tmp-step-4").mkdir()
    assert watched.saves()


def test_what_counts_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = random.Random(0)

    def ended(**values: Any) -> Any:
        defaults = {"directory": tmp_path, "stopped": None, "newest": lambda: 6, "printed": io.StringIO("")}
        return SimpleNamespace(**defaults | values)

    stop = Stop(1, 1, choose)
    stop.start = time.monotonic()
    assert stop.problem(ended(failure="rank 1 (process 7) was stopped, and is killed: rank 0 waited")) is None
    assert stop.problem(ended(failure="rank 0 (process 7) was stopped, and is killed: rank 1 waited"))
    assert stop.problem(ended(failure="Traceback:\n  rank 1 (process 7)"))
    stop.start -= 60
    assert "60.0 s" in str(stop.problem(ended(failure="rank 1 (process 7) was stopped")))

    monkeypatch.setattr("training.campaign.processes.rows_of", lambda directory: {5: "", 6: ""})
    signalled = Signal(1, 1, choose)
    signalled.number, resume = signal.SIGTERM, "  resume  python train.py"
    good = {"failure": None, "stopped": signal.SIGTERM, "printed": io.StringIO(resume)}
    assert signalled.problem(ended(**good)) is None
    assert "the last step is 6, step 5 is saved" in str(signalled.problem(ended(**good | {"newest": lambda: 5})))
    assert signalled.problem(ended(**good | {"stopped": signal.SIGINT}))
    assert "no command that resumes" in str(signalled.problem(ended(**good | {"printed": io.StringIO("")})))

    nan = NotANumber(1, 3, choose)
    assert nan.spoiled is not None and nan.spoiled.since in (7, 8)
    line = f"step {nan.spoiled.since}: not finite on rank 1 (host): {nan.spoiled.parameter}"
    nan.newest = 6
    assert nan.problem(ended(failure="step 12: five steps in a row", output=lambda: line)) is None
    assert nan.problem(ended(failure="step 12: five steps in a row", output=lambda: line.replace("rank 1", "rank 0")))
    assert nan.problem(ended(failure="step 12", output=lambda: line, newest=lambda: 8))

    disk = Disk(1, 1, choose)
    disk.limit = 9
    assert disk.problem(ended(failure="rank 1: /run/x: File too large")) is None
    assert disk.problem(ended(failure="Traceback:\nOSError: File too large"))
    assert set(DISTURBANCES) == set(CAMPAIGNS) - {"kill", "damage"}
