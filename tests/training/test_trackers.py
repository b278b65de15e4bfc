"""W&B: what an offline run's file holds, and that training outlives W&B."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training.config import TrackingConfig
from training.report.metrics import Row
from training.report.trackers import NullTracker, Tracker, check_tracking, load_histogram, start_tracking


def row_of(step: int) -> Row:
    return {
        "step": step,
        "train/loss": 1 / step,
        "router/max_vio": 0.2 * step,
        "router/load/layer_00": [0.125, 0.5, 0.25, 0.125],
    }


def start(directory: Path, resumed_step: int | None, warnings: list[str]) -> Tracker:
    return start_tracking(
        TrackingConfig(),
        name="tiny-1",
        directory=directory,
        resolved_config={"model": {"top_k": 2}},
        resumed_step=resumed_step,
        warn=warnings.append,
    )


def inspect(path: Path | None) -> list[dict[str, Any]]:
    """The records that `wandb leet inspect` reads from an offline run's file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def history(records: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return [
        (record["history"]["step"]["num"], record["history"]["item"])
        for record in records
        if record["type"] == "history"
    ]


def test_offline_run_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    warnings: list[str] = []
    tracker = start(tmp_path, None, warnings)
    for step in (1, 2, 3):
        tracker.log(row_of(step), step)
    tracker.summary({"eval/loss": 0.5})
    tracker.finish()
    first = inspect(tracker.files())

    resumed = start(tmp_path, 2, warnings)
    resumed.log(row_of(3), 3)
    resumed.finish()
    second = inspect(resumed.files())

    rows = history(first)
    assert [step for step, _ in rows] == [1, 2, 3]
    for step, item in rows:
        assert item["router/max_vio"] == pytest.approx(0.2 * step, abs=1e-15)
        assert item["router/load/layer_00/expert_01"] == 0.5
        assert item["router/load/layer_00/expert_03"] == 0.125
        assert item["router/load/layer_00._type"] == "histogram"
        assert item["router/load/layer_00.values"] == [0.125, 0.5, 0.25, 0.125]
    assert any(record.get("summary", {}).get("update", {}).get("eval/loss") == 0.5 for record in first)

    run, again = (next(record["run"] for record in records if record["type"] == "run") for records in (first, second))
    assert run["config"]["update"]["model"] == {"top_k": 2}
    assert again["run_id"] == run["run_id"] and again["display_name"] == "tiny-1"
    assert [step for step, _ in history(second)] == [3]
    assert tracker.files() != resumed.files()
    assert not warnings
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} == {"wandb"}


class FakeRun:
    """A W&B run whose service dies after `lives` calls."""

    def __init__(self, lives: int) -> None:
        self.settings = SimpleNamespace(sync_dir="/nowhere")
        self.logged: list[dict[str, Any]] = []
        self.lives = lives

    def log(self, row: dict[str, Any], step: int | None = None) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise ConnectionResetError("Connection lost")
        self.logged.append(row)

    def finish(self) -> None:
        raise AssertionError("a dead service is left alone")


def fake_wandb(run: FakeRun | Exception) -> SimpleNamespace:
    def init(**settings: object) -> FakeRun:
        if isinstance(run, Exception):
            raise run
        return run

    return SimpleNamespace(
        init=init,
        teardown=lambda exit_code: None,
        setup=lambda settings: None,
        Settings=lambda **settings: settings,
        Histogram=lambda np_histogram: np_histogram,
        Image=lambda path: path,
    )


def test_warns_once_and_carries_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(lives=1)
    warnings: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    tracker = start(tmp_path, None, warnings)
    for step in (1, 2, 3):
        tracker.log(row_of(step), step)
    tracker.finish()
    assert len(run.logged) == 1
    assert len(warnings) == 1 and "ConnectionResetError: Connection lost" in warnings[0]


def test_training_starts_without_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(TimeoutError("no network")))
    assert isinstance(start(tmp_path, None, warnings), NullTracker)
    assert len(warnings) == 1 and "no network" in warnings[0]


def test_missing_pillow_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(lives=9)
    warnings: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    monkeypatch.setattr("training.report.trackers.find_spec", lambda name: None)
    start(tmp_path, None, warnings).image("router/heatmap", tmp_path / "heatmap.png")
    assert run.logged == []
    assert len(warnings) == 1 and "pillow is not installed" in warnings[0]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    monkeypatch.setattr("training.report.trackers.find_spec", lambda name: object())
    start(tmp_path, None, warnings).image("router/heatmap", tmp_path / "heatmap.png")
    assert run.logged == [{"router/heatmap": str(tmp_path / "heatmap.png")}]


def test_online_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for mode in ("offline", "disabled"):
        check_tracking(TrackingConfig(wandb=mode))
    with pytest.raises(ValueError, match=r"^tracking\.wandb=online: expected an API key"):
        check_tracking(TrackingConfig(wandb="online"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_tracking(TrackingConfig(wandb="online"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    with pytest.raises(ValueError, match="expected an API key"):
        check_tracking(TrackingConfig(wandb="online"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_tracking(TrackingConfig(wandb="online"))


def test_histogram_groups_neighbours_beyond_its_limit() -> None:
    assert load_histogram([0.25, 0.75]) == ([0.25, 0.75], [0.0, 1.0, 2.0])
    heights, edges = load_histogram([1 / 1024] * 1024)
    assert heights == [2 / 1024] * 512
    assert edges[:3] == [0.0, 2.0, 4.0]
