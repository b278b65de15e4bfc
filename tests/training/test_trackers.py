"""Trackers: the content of an offline W&B run, trackers of plugins, and failures that must not end a run."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from common.errors import ConfigError, RunError
from common.strict import from_dict
from scripts.cli.command_line import compose_config, to_overrides
from scripts.wandb_workspace import WorkspaceConfig
from scripts.wandb_workspace import save as save_workspace
from tests.commands import ROOT
from training.config import CheckpointConfig, Config, TrackingConfig
from training.report import code_state as code_state_module
from training.report import wandb_tracker
from training.report.alarms import Alarm
from training.report.code_state import code_state, uncommitted_changes
from training.report.metrics import Row, read_metrics
from training.report.recorder import Recorder, check_tracking, start_tracking
from training.report.trackers import TRACKERS, TrackedRun, Tracker, Trackers
from training.report.wandb_files import logged_steps, read_records
from training.report.wandb_tracker import load_histogram
from training.report.wandb_workspace import SECTIONS, workspace


def row_of(step: int) -> Row:
    return {
        "step": step,
        "train/loss": 1 / step,
        "router/max_vio": 0.2 * step,
        "router/load/layer_00": [0.125, 0.5, 0.25, 0.125],
    }


def without_step(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "step"}


def start(
    directory: Path,
    resumed_step: int | None,
    warnings: list[str],
    config: TrackingConfig | None = None,
    rows: Sequence[Row] = (),
) -> Trackers:
    return start_tracking(
        config or TrackingConfig(),
        name="tiny-1",
        directory=directory,
        resolved_config={"model": {"top_k": 2}},
        resumed_step=resumed_step,
        rows=rows,
        warn=warnings.append,
    )


def save_picture(path: Path) -> None:
    """Write a small PNG file."""
    from PIL import Image

    Image.new("RGB", (2, 2)).save(path)


def latest_run(directory: Path) -> Path:
    """The directory of the W&B run that was started last; W&B keeps a link to it."""
    return (directory / "wandb" / "latest-run").resolve()


def inspect(path: Path) -> list[dict[str, Any]]:
    """The records that `wandb leet inspect` reads from the file of an offline run."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def children() -> set[int]:
    """The process ids of the processes that this one has started, and that have not ended."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = status.read_text().rpartition(") ")[2]
        except OSError:
            continue  # It has ended meanwhile.
        if int(rest.split()[1]) == os.getpid():
            found.add(int(status.parent.name))
    return found


def history(records: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return [
        (record["history"]["step"]["num"], record["history"]["item"])
        for record in records
        if record["type"] == "history"
    ]


def test_offline_files_together_have_every_row_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    warnings: list[str] = []
    others = children()  # Other tests of this process can have started some that stay.
    save_picture(tmp_path / "a.png")
    tracker = start(tmp_path, None, warnings, TrackingConfig(group="g", tags=("a", "b"), notes="why = ?"))
    for step in (1, 2, 3):
        tracker.log(row_of(step), step)
    for name in ("a", "b"):
        tracker.image(name, tmp_path / "a.png")
    tracker.summary({"eval/loss": 0.5})
    tracker.finish()
    # W&B's service writes the last rows when it ends.
    assert children() <= others
    first_files = latest_run(tmp_path)
    first = inspect(first_files)

    rows = history(first)
    assert [step for step, _ in rows] == [1, 2, 3]
    for step, item in rows:
        assert item["router/max_vio"] == pytest.approx(0.2 * step, abs=1e-15)
        assert item["step"] == step and not any("expert_01" in name for name in item)
        assert item["experts/load/layer_00._type"] == "histogram"
        assert item["experts/load/layer_00.values"] == [0.125, 0.5, 0.25, 0.125]
        assert [item.get(f"{name}._type") for name in ("a", "b")] == ["image-file" if step == 3 else None] * 2
    assert any(record.get("summary", {}).get("update", {}).get("eval/loss") == 0.5 for record in first)

    # Every section of metrics has the step as its x axis, and the run says what it belongs to and which code it ran.
    metrics = [record["metric"] for record in first if record["type"] == "metric"]
    axes = {metric["glob_name"]: metric["step_metric"] for metric in metrics if "glob_name" in metric}
    assert {f"{name.partition('/')[0]}/*" for _, item in rows for name in item if "/" in name} <= axes.keys()
    assert set(axes.values()) == {"step"}
    run = next(record["run"] for record in first if record["type"] == "run")
    assert (run["run_group"], run["job_type"], run["tags"], run["notes"]) == ("g", "train", ["a", "b"], "why = ?")
    code = run["config"]["update"]["code"]
    assert code["versions"]["torch"] == torch.__version__
    assert run.get("git", {}).get("commit") == code["commit"]
    assert not any(path.suffix in (".diff", ".patch") for path in tmp_path.rglob("*"))

    # A kill while row 3 was being written: the run has it in metrics.jsonl, and W&B has a part of it.
    (file,) = first_files.glob("*.wandb")
    run_id = file.stem.removeprefix("run-")
    assert logged_steps(tmp_path / "wandb", run_id) == {1, 2, 3}
    last = next(content for content in read_records(file) if b"0.3333" in content)
    cut = file.read_bytes().index(last[:64])
    os.truncate(file, cut + 32)
    resumed = start(tmp_path, 3, warnings, rows=[row_of(step) for step in (1, 2, 3)])
    resumed.log(row_of(4), 4)
    resumed.finish()
    second_files = latest_run(tmp_path)
    second = inspect(second_files)
    first_cut = inspect(first_files)
    assert [step for step, _ in history(first_cut)] == [1, 2]
    assert [step for step, _ in history(second)] == [3, 4] and first_files != second_files

    run, again = (next(record["run"] for record in records if record["type"] == "run") for records in (first, second))
    assert run["config"]["update"]["model"] == {"top_k": 2}
    assert again["run_id"] == run["run_id"] and again["display_name"] == "tiny-1"
    assert logged_steps(tmp_path / "wandb", run_id) == {1, 2, 3, 4}
    assert not warnings
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} == {"wandb", "a.png"}


GIVEN: dict[str, Any] = {}
"""What `wandb.init` was given the last time."""


class FakeRun:
    """A W&B run whose service fails after `calls` calls of `log`."""

    def __init__(self, calls: int) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.alerts: list[dict[str, Any]] = []
        self.calls = calls

    def log(self, row: dict[str, Any], step: int | None = None) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise ConnectionResetError("Connection lost")
        self.logged.append(row)

    id = "fake"
    define_metric = save = Mock()

    def alert(self, **alert: Any) -> None:
        self.alerts.append(alert)

    def finish(self) -> None:
        raise AssertionError("a service that has failed must not be called again")


def fake_wandb(run: FakeRun | Exception) -> SimpleNamespace:
    def init(**given: Any) -> FakeRun:
        GIVEN.clear()
        GIVEN.update(given)
        if isinstance(run, Exception):
            raise run
        return run

    return SimpleNamespace(
        init=init,
        teardown=lambda exit_code=None: None,
        setup=lambda settings: None,
        Settings=lambda **settings: settings,
        Histogram=lambda np_histogram: np_histogram,
        Image=lambda path: path,
    )


def test_the_jobs_of_a_sweep_are_a_group_and_an_agents_id_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(calls=9)
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    job = tmp_path / "sizes" / "0"
    job.mkdir(parents=True)
    start(job, None, [])
    assert GIVEN["group"] is None and (job / "wandb" / "run_id.txt").read_text() == "fake\n"
    (tmp_path / "sizes" / ".sweep-lock").touch()
    start(job, 3, [])
    assert (GIVEN["group"], GIVEN["id"], GIVEN["resume"]) == ("sizes", "fake", "allow")
    start(job, None, [], TrackingConfig(group="mine"))
    assert GIVEN["group"] == "mine"


def test_scalars_of_experts_and_changes_of_the_code_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(calls=9)
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    monkeypatch.setattr("training.report.wandb_tracker.uncommitted_changes", lambda: "+ a line\n")
    start(tmp_path, None, [], TrackingConfig(per_expert=True, diff=True)).log(row_of(1), 1)
    assert run.logged[0]["experts/load/layer_00/expert_01"] == 0.5
    assert (tmp_path / "wandb" / "code.diff").read_text() == "+ a line\n"
    many = {f"router/load/layer_{layer:02d}": [1 / 64] * 64 for layer in range(2)}
    start(tmp_path, None, []).log(many, 2)
    assert run.logged[1].keys() == {"step", "experts/load/layer_00", "experts/load/layer_01"}


def test_the_code_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setattr(code_state_module, "ROOT", tmp_path)
    for key in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(key)
    assert (code_state()["commit"], code_state()["dirty"]) == (None, None)
    git("init", "-q")
    (tmp_path / "other.py").touch()
    git("add", ".")
    git("commit", "-qm", "another project")
    assert code_state()["commit"] is None  # It has no train.py.
    (tmp_path / "train.py").touch()
    git("add", ".")
    git("commit", "-qm", "a")
    (tmp_path / "runs").touch()
    assert code_state()["commit"] == git("rev-parse", "HEAD").strip()
    assert code_state()["dirty"] is False and uncommitted_changes() is None
    (tmp_path / "train.py").write_text("changed\n")
    assert code_state()["dirty"] is True and "+changed" in (uncommitted_changes() or "")


def test_the_workspace_is_one_that_wandb_workspaces_takes() -> None:
    pytest.importorskip("wandb_workspaces", reason="the workspace needs the package wandb-workspaces")
    from wandb_workspaces.workspaces.internal import View

    view = workspace("a-team", "mixwright", "MoE")._to_model()
    sent = json.loads(json.dumps(view.model_dump(by_alias=True, exclude_none=True)))
    assert View.model_validate(sent).model_dump(by_alias=True, exclude_none=True) == sent
    shown = {section["name"]: section["panels"] for section in sent["spec"]["section"]["panelBankConfig"]["sections"]}
    assert {name: len(shown[name]) for name in SECTIONS} == {name: len(panels) for name, panels in SECTIONS.items()}
    plots = [panel["config"] for name in SECTIONS for panel in shown[name]]
    patterns = [plot["metricRegex"] for plot in plots if "metricRegex" in plot]
    names = ["router/max_vio/layer_00", "router/max_vio/layer_117", "eval/bits_per_byte/code", "alarm/dead"]
    assert [[re.search(pattern, name) is not None for name in names] for pattern in patterns] == [
        [False, False, True, False],
        [True, True, False, False],
        [False, False, False, False],
        [False, False, False, False],
        [False, False, False, True],
    ]
    assert {plot["xAxis"] for plot in plots} == {"step"}
    assert {metric for plot in plots for metric in plot["metrics"]} >= {"train/loss", "eval/loss", "router/max_vio"}


def test_the_workspace_tool_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("scripts.wandb_workspace.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^wandb-workspaces is not installed: pip install 'mixwright\[workspace\]'$"):
        save_workspace(WorkspaceConfig(entity="a-team"))
    monkeypatch.setattr("scripts.wandb_workspace.find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="expected an API key"):
        save_workspace(WorkspaceConfig(entity="a-team"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    refused = Mock(save=Mock(side_effect=ConnectionError("no network")))
    monkeypatch.setattr("training.report.wandb_workspace.workspace", lambda *names: refused)
    with pytest.raises(RunError, match=r"entity=a-team project=mixwright: W&B refused \(ConnectionError: no network\)"):
        save_workspace(WorkspaceConfig(entity="a-team"))


def test_the_arguments_of_a_wandb_agent_are_those_of_train() -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "examples" / "wandb_sweep.yaml").read_text())
    chosen = {
        name: {"value": values["values"][-1] if "values" in values else values["min"]}
        for name, values in sweep["parameters"].items()
    }
    arguments = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    command = create_sweep_command(list(sweep["command"]))
    assert command[:3] == ["${env}", "${interpreter}", "${program}"] and command[-1] == "${args_no_hyphens}"
    config = from_dict(Config, compose_config("config", to_overrides([*command[3:-1], *arguments], Config)))
    assert (config.model.num_experts, config.model.top_k, config.router.balance_coef) == (16, 2, 0.001)
    assert config.tracking.wandb == "online" and (ROOT / sweep["program"]).is_file()


def test_an_alarm_becomes_an_alert_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(calls=9)
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    tracker = start(tmp_path, None, [])
    for layer, ended in ((0, False), (3, False), (3, True)):
        tracker.alert(Alarm(120, "dead", layer, f"layer {layer}: 5 of 8", first_step=100, ended=ended))
    assert [(alert["title"], alert["level"]) for alert in run.alerts] == [
        ("dead", "WARN"),
        ("dead", "WARN"),
        ("dead: ended", "INFO"),
    ]
    assert run.alerts[1]["text"] == "step 120: layer 3: 5 of 8" and run.alerts[1]["wait_duration"] >= 60


def test_a_failing_wandb_warns_once_and_is_not_called_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(calls=1)
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
    tracker = start(tmp_path, None, warnings)
    assert tracker.running == {}
    tracker.log(row_of(1), 1)
    tracker.finish()
    assert len(warnings) == 1 and "no network" in warnings[0]


def test_missing_pillow_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(calls=9)
    warnings: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    monkeypatch.setattr("training.report.wandb_tracker.find_spec", lambda name: None)
    start(tmp_path, None, warnings).image("router/heatmap", tmp_path / "heatmap.png")
    assert run.logged == []
    assert len(warnings) == 1 and "pillow is not installed" in warnings[0]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    monkeypatch.setattr("training.report.wandb_tracker.find_spec", lambda name: object())
    start(tmp_path, None, warnings).image("router/heatmap", tmp_path / "heatmap.png")
    assert run.logged == [{"router/heatmap": str(tmp_path / "heatmap.png")}]


class ListTracker(Tracker):
    """A tracker as a plugin writes it: it overrides the methods that it needs, and inherits the others."""

    calls: list[tuple[Any, ...]]

    def __init__(self, run: TrackedRun) -> None:
        self.calls = [(run.name, run.directory, run.config, run.resumed_step)]
        ListTracker.calls = self.calls

    def log(self, row: Row, step: int) -> None:
        self.calls.append((step, row["train/loss"]))

    def finish(self) -> None:
        self.calls.append(("finish",))


class CarefulTracker(ListTracker):
    """A tracker that knows which rows it has from an earlier launch."""

    def seen(self) -> Collection[int]:
        return {1, 2, 4}


class FailingTracker(Tracker):
    def log(self, row: Row, step: int) -> None:
        if step == 2:
            raise OSError("disk full\nin detail")

    def finish(self) -> None:
        raise AssertionError("a tracker that has failed must not be called again")


def refuse_to_start(run: TrackedRun) -> Tracker:
    raise RuntimeError("no server")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the trackers of this file, for one test."""
    monkeypatch.setattr(TRACKERS, "_entries", {})
    TRACKERS.register("list")(ListTracker)
    TRACKERS.add("failing", lambda run: FailingTracker())
    TRACKERS.add("refusing", refuse_to_start)


@pytest.mark.usefixtures("registry")
def test_registered_trackers_get_every_row_beside_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(calls=9)
    warnings: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    config = TrackingConfig(trackers=("failing", "refusing", "list"))
    check_tracking(config)
    tracker = start(tmp_path, 7, warnings, config)
    for step in (1, 2, 3):
        tracker.log(row_of(step), step)
    tracker.summary({"eval/loss": 0.5})
    tracker.image("curves", tmp_path / "curves.png")
    monkeypatch.setattr(run, "finish", lambda: None)
    tracker.finish()
    started = ("tiny-1", tmp_path, {"model": {"top_k": 2}}, 7)
    assert ListTracker.calls == [started, (1, 1.0), (2, 0.5), (3, 1 / 3), ("finish",)]
    assert [row["train/loss"] for row in run.logged[:3]] == [1.0, 0.5, 1 / 3]
    assert run.logged[3:] == [{"curves": str(tmp_path / "curves.png")}] and run.summary == {"eval/loss": 0.5}
    refusing, failing = warnings
    assert refusing.startswith("tracker refusing did not start (RuntimeError: no server); training continues")
    assert failing.startswith("tracker failing stopped (OSError: disk full); training continues")


@pytest.mark.usefixtures("registry")
def test_registered_trackers_work_without_wandb(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = start(tmp_path, None, warnings, TrackingConfig(wandb="disabled", trackers=("list", "list")))
    tracker.finish()
    assert list(tracker.running) == ["tracker list"] and not warnings
    assert ListTracker.calls == [("tiny-1", tmp_path, {"model": {"top_k": 2}}, None), ("finish",)]
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_tracker_gets_the_rows_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row_of(step) for step in (1, 2, 3)]
    monkeypatch.setattr(TRACKERS, "_entries", {"list": ListTracker, "careful": CarefulTracker})
    for name, expected in (("list", [4, 5]), ("careful", [3, 5])):
        config = TrackingConfig(wandb="disabled", trackers=(name,))
        trackers = start(tmp_path, 3, [], config, rows)
        for step in (4, 5):
            trackers.log({"train/loss": 1 / step}, step)
        assert ListTracker.calls[1:] == [(step, 1 / step) for step in expected]


def test_trackers_start_when_the_first_row_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[Row]] = []

    class Starting(Tracker):
        def __init__(self, run: TrackedRun) -> None:
            found.append(read_metrics(tmp_path / "metrics.jsonl"))

    monkeypatch.setattr(TRACKERS, "_entries", {"starting": Starting})
    tracking = TrackingConfig(wandb="disabled", trackers=("starting",))
    train, saving = SimpleNamespace(steps=3), CheckpointConfig()
    config = SimpleNamespace(train=train, tracking=tracking, checkpoint=saving)
    monkeypatch.setattr("training.report.recorder.to_dict", vars)
    row = {"train/loss": 1.0, "train/ce": 1.0, "optim/lr": 1.0, "optim/grad_norm": 1.0, "speed/tokens_per_s": 1.0}
    with Recorder(config, tmp_path, "tiny-1", active=True, state=None) as recorder:  # type: ignore[arg-type]
        recorder.step(row, 1, write=False)
        assert found == []
        recorder.step(row, 2, write=True)
        recorder.step(row, 3, write=True)
    assert found == [[{"step": 2} | row]]


def test_an_unknown_tracker_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        "tracking.trackers=[list,other]: expected names that a module in plugins=[...] registers "
        "(registered: {known}), found {unknown}"
    )
    config = TrackingConfig(wandb="disabled", trackers=("list", "other"))
    for trackers, known, unknown in (({}, "none", "list, other"), ({"list": ListTracker}, "list", "other")):
        monkeypatch.setattr(TRACKERS, "_entries", trackers)
        with pytest.raises(ConfigError) as caught:
            check_tracking(config)
        assert str(caught.value) == message.format(known=known, unknown=unknown)
        assert caught.value.field == "tracking.trackers"


def test_online_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for mode in ("offline", "disabled"):
        check_tracking(TrackingConfig(wandb=mode))
    with pytest.raises(ValueError, match=r"^tracking\.wandb=online: expected an API key"):
        check_tracking(TrackingConfig(wandb="online"))
    for host in ("api.wandb.ai", "api.forge.coreweave.com"):  # `wandb login` of older and newer versions
        (tmp_path / "netrc").write_text(f"machine {host} login user password secret\n")
        check_tracking(TrackingConfig(wandb="online"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    with pytest.raises(ValueError, match="expected an API key"):
        check_tracking(TrackingConfig(wandb="online"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_tracking(TrackingConfig(wandb="online"))


@pytest.mark.slow
def test_without_a_network_the_run_is_written_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # Nothing listens on this port.
    monkeypatch.setattr(wandb_tracker, "INIT_TIMEOUT_S", 2)
    warnings: list[str] = []
    trackers = start(tmp_path, None, warnings, TrackingConfig(wandb="online"))
    trackers.log(without_step(row_of(1)), 1)
    trackers.finish()
    [line] = warnings
    assert line.startswith("W&B cannot be reached (CommError: ") and "\n" not in line
    assert line.endswith(f"the run is written offline, and `wandb sync {tmp_path / 'wandb'}/offline-run-*` sends it")
    run_id = (tmp_path / "wandb" / "run_id.txt").read_text().strip()
    assert logged_steps(tmp_path / "wandb", run_id) == {1}


class FakeService(BaseHTTPRequestHandler):
    """Answers a new run as W&B's service does, until it is `gone`. Then it closes every connection."""

    gone = threading.Event()

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_POST(self) -> None:
        if self.gone.is_set():
            return
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "i", "name": request.get("variables", {}).get("name"), "displayName": "n", "project": project}
        files = {"runID": "i", "uploadHeaders": [], "files": []}
        data = {
            "upsertBucket": {"bucket": bucket, "inserted": True},
            "createRunFiles": files,
            "model": {"bucket": None},
        }
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.mark.slow
def test_a_network_that_is_lost_delays_the_end_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeService)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(wandb_tracker, "FINISH_TIMEOUT_S", 2)
    warnings: list[str] = []
    trackers = start(tmp_path, None, warnings, TrackingConfig(wandb="online"))
    assert list(trackers.running) == ["W&B"], warnings
    trackers.log(without_step(row_of(1)), 1)
    FakeService.gone.set()
    server.shutdown()
    server.server_close()
    trackers.log(without_step(row_of(2)), 2)
    trackers.finish()
    [files] = (tmp_path / "wandb").glob("run-*")
    [line] = warnings
    assert line.startswith(f"W&B stopped (TimeoutError: no network for 2 s; `wandb sync {files}` sends the rest)")
    [records] = files.glob("*.wandb")
    assert len([1 for record in read_records(records) if b"max_vio" in record]) >= 2, "the rows are on the disk"


def test_histogram_groups_neighbours_beyond_its_limit() -> None:
    assert load_histogram([0.25, 0.75]) == ([0.25, 0.75], [0.0, 1.0, 2.0])
    heights, edges = load_histogram([1 / 1024] * 1024)
    assert heights == [2 / 1024] * 512
    assert edges[:3] == [0.0, 2.0, 4.0]


class ExitingTracker(Tracker):
    def finish(self) -> None:
        raise SystemExit(3)


def test_a_tracker_cannot_end_the_process() -> None:
    warnings: list[str] = []
    trackers = Trackers(warnings.append)
    trackers.start("exiting", ExitingTracker)
    trackers.start("at once", lambda: sys.exit("no server"))
    trackers.finish()
    assert [line.partition(";")[0] for line in warnings] == [
        "at once did not start (SystemExit: no server)",
        "exiting stopped (SystemExit: 3)",
    ]


def test_a_tracker_gets_no_row_twice_after_the_run_has_gone_back(tmp_path: Path) -> None:
    tracker = ListTracker(TrackedRun("a", tmp_path, {}, None))
    trackers = Trackers(warn=pytest.fail)
    trackers.start("list", lambda: tracker)
    trackers.log({"train/loss": 1.0}, 5)
    trackers.rewind(2, newest=5)
    for step in (3, 5, 6):
        trackers.log({"train/loss": 2.0}, step)
    assert tracker.calls[1:] == [(5, 1.0), (6, 2.0)]


def csv_lines(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_file_has_every_row_once_and_late_columns(tmp_path: Path) -> None:
    warnings: list[str] = []
    config = TrackingConfig(wandb="disabled", csv=True)
    rows = [row_of(step) for step in range(1, 7)]
    rows[2]["eval/loss"] = math.nan  # a column that the first rows do not have
    rows[4]["health/refused_parameter"] = 'a "b",\nc'
    tracker = start(tmp_path, None, warnings, config)
    for row in rows[:5]:
        tracker.log(without_step(row), int(row["step"]))
    whole = (tmp_path / "metrics.csv").read_text()
    lines = csv_lines(tmp_path)
    assert [line["step"] for line in lines] == list("12345")
    assert [float(line["train/loss"]) for line in lines] == [row["train/loss"] for row in rows[:5]]
    assert [line["eval/loss"] for line in lines] == ["", "", "nan", "", ""]
    assert lines[4]["health/refused_parameter"] == 'a "b", c' and "experts/load/layer_00/expert_01" not in lines[0]
    tracker.finish()

    # A kill while line 5 was written. The checkpoint is that of step 4, and the file lacks its line, too.
    four = whole.index("\n4,") + 1
    for size in (whole.index("\n5,") + 4, four + 3, four, whole.index("\n3,") + 2, 2, 0):
        (tmp_path / "metrics.csv").write_text(whole[:size])
        again = start(tmp_path, 4, warnings, config, rows[:4])
        for row in rows[4:]:
            again.log(without_step(row), int(row["step"]))
        again.finish()
        lines = csv_lines(tmp_path)
        assert [line["step"] for line in lines] == list("123456"), size
        assert [line["eval/loss"] for line in lines] == ["", "", "nan", "", "", ""]
        assert [float(line["train/loss"]) for line in lines] == [row["train/loss"] for row in rows]

    # The run goes back to step 2 and repeats steps with other figures.
    again = start(tmp_path, 6, warnings, config, rows)
    again.rewind(2, newest=6)
    again.log({"train/loss": 9.0}, 3)
    again.finish()
    assert [(line["step"], line["train/loss"]) for line in csv_lines(tmp_path)] == [
        ("1", "1.0"),
        ("2", "0.5"),
        ("3", "9.0"),
    ]
    assert warnings == [] and [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_values_of_experts_are_columns_only_if_asked_for(tmp_path: Path) -> None:
    tracker = start(tmp_path, None, [], TrackingConfig(wandb="disabled", csv=True, per_expert=True))
    tracker.log({"router/load/layer_00": [0.25, 0.75], "experts/grad_norm/layer_00": [1.0, 2.0]}, 1)
    tracker.finish()
    assert csv_lines(tmp_path) == [
        {
            "step": "1",
            "experts/load/layer_00/expert_00": "0.25",
            "experts/load/layer_00/expert_01": "0.75",
            "experts/grad_norm/layer_00/expert_00": "1.0",
            "experts/grad_norm/layer_00/expert_01": "2.0",
        }
    ]


def test_tensorboard_shows_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tracking.tensorboard needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def events() -> EventAccumulator:
        return EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "histograms": 0, "tensors": 0}).Reload()

    def scalars(name: str) -> list[tuple[int, float]]:
        return [(event.step, pytest.approx(event.value)) for event in events().Scalars(name)]

    warnings: list[str] = []
    config = TrackingConfig(wandb="disabled", tensorboard=True)
    rows = [row_of(step) for step in range(1, 7)]
    expected = [(step, 1 / step) for step in range(1, 7)]
    tracker = start(tmp_path, None, warnings, config)
    for row in rows[:5]:
        tracker.log(without_step(row), int(row["step"]))
    tracker.alert(Alarm(step=5, rule="dead", layer=0, message="layer 0: 3 of 4", first_step=1))
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert scalars("train/loss") == expected[:5]
    assert not any(name.endswith("expert_01") for name in events().Tags()["scalars"])
    (*_, load) = events().Histograms("experts/load/layer_00")
    assert load.step == 5 and load.histogram_value.bucket_limit == [1, 2, 3, 4]
    assert load.histogram_value.bucket == [0.125, 0.5, 0.25, 0.125]
    (alarm,) = events().Tensors("alarms/dead/text_summary")
    assert alarm.step == 5 and alarm.tensor_proto.string_val == [b"layer 0: 3 of 4"]

    # A kill while row 5 was written, of a run whose checkpoint is that of step 4.
    content = file.read_bytes()
    for size in (len(content), len(content) - 3, *range(len(content) // 3, len(content) // 2, 250), 20, 0):
        for path in (tmp_path / "tensorboard").iterdir():
            path.unlink()
        file.write_bytes(content[:size])
        again = start(tmp_path, 4, warnings, config, rows[:4])
        for row in rows[4:]:
            again.log(without_step(row), int(row["step"]))
        assert scalars("train/loss") == expected, size
        shown = events()
        for of_name in (shown.Scalars("router/max_vio"), shown.Histograms("experts/load/layer_00")):
            assert [event.step for event in of_name] == [1, 2, 3, 4, 5, 6], size
        again.finish()

    again = start(tmp_path, 6, warnings, config, rows)
    again.rewind(2, newest=6)
    again.log({"train/loss": 9.0}, 3)
    save_picture(tmp_path / "a.png")
    again.image("a", tmp_path / "a.png")
    again.summary({"eval/loss": None, "ranks": [1]})
    again.finish()
    assert scalars("train/loss") == [*expected[:2], (3, 9.0)]
    assert [text.step for text in events().Tensors("config/text_summary")] == [1, 3]
    (picture,) = events().Images("a")
    assert (picture.step, picture.width, picture.height) == (3, 2, 2) and warnings == []


def test_tensorboard_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.report.recorder.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^tracking\.tensorboard=true: expected the package tensorboard"):
        check_tracking(TrackingConfig(wandb="disabled", tensorboard=True))
    check_tracking(TrackingConfig(wandb="disabled"))
