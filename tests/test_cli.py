import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from common import plugins
from common.errors import ConfigError, TrainingFailure
from common.strict import from_dict, leaf_keys
from moe.config import ROUTER_CONFIGS
from parallel.startup.launch import WorkerFailure, World
from scripts.cli import workers
from scripts.cli.command_line import (
    CONF,
    compose_config,
    load_named_plugins,
    plain,
    run_tool,
    sweep_directory,
    user_message,
    without_local_rank,
)
from scripts.cli.help import OF_TOOLS, field_docs
from scripts.describe import DescribeConfig
from train import main
from training.config import Config, LaunchConfig
from training.layout import build_workload, resolve_layout
from training.owner import RunOwner

ROOT = CONF.parent


def train(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def status_of_train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `main` of train.py in this process, and return its exit status. Imports take most of the time of another."""

    def run(*arguments: str) -> int:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model.num_expert=8"], "model.num_expert=8: unknown key; the nearest valid key is model.num_experts"),
        (["+model.num_expert=8"], "model.num_expert=8: unknown key; the nearest valid key is model.num_experts"),
        (["modle=tiny"], "modle=tiny: unknown key; the nearest valid key is model"),
        (["model.top_k=9"], "model.top_k=9: expected an integer from 1 to num_experts=8"),
        (["data.hub_path=x"], "data.hub_path=x: expected a key of the chosen presets; +data.hub_path=x adds it, "),
        (["model..dim=3"], "model..dim=3: expected key=value (a key is names joined by dots)"),
        (["lr=3e-4"], "lr=3e-4: unknown key; the nearest valid key is optim.lr"),
        (["--lr=3e-4"], "--lr=3e-4: expected key=value, or --help for the keys; the nearest valid key is optim.lr"),
        (
            ["run.name=."],
            "run.name='.': expected the name of a directory below run.root",
        ),
        (["run.root=/dev/null/runs"], "run.root=/dev/null/runs: expected a writable directory (Not a directory)"),
        (["-m", "model.dim=64,x", "run.root=/dev/null/runs"], "run.root=/dev/null/runs: expected a writable directory"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], line: str, status_of_train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of_train(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {line}") and shown.err.count("\n") == 1
    assert shown.out == ""


def test_unknown_preset_lists_the_options() -> None:
    """In another process, as a user runs it."""
    done = train("model=mixtral_tinyy")
    options = ", ".join(sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
    assert (done.returncode, done.stderr) == (
        2,
        f"error: model=mixtral_tinyy: expected one of {options}; the nearest is mixtral_tiny\n",
    )


def test_under_a_launcher_only_local_rank_0_prints() -> None:
    world = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    silent = train("--local_rank=1", "model.top_k=9", LOCAL_RANK="1", **world)
    assert (silent.returncode, silent.stderr) == (2, "")
    refused = train("-m", "model.top_k=1,2", LOCAL_RANK="0", **world)
    assert refused.returncode == 2 and "use: python train.py -m launch.nproc=" in refused.stderr


def test_help_explains_every_key_and_preset_without_torch() -> None:
    done = train("--help", "model=mixtral_tiny", "run.name=lr=1e-3", PYTHONPROFILEIMPORTTIME="1", COLUMNS="110")
    assert done.returncode == 0 and not re.search(r"\| +(torch|numpy)$", done.stderr, re.MULTILINE)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 110
    for key in leaf_keys(Config):
        assert sum(line.split("=")[0].split()[:1] == [key] for line in lines) == 1, key
    presets = " ".join(done.stdout.split())
    assert all(path.stem in presets for path in CONF.glob("*/*.yaml") if path.parent.name not in OF_TOOLS)
    assert "h100" not in presets
    for section in fields(Config):
        if is_dataclass(section.type):
            assert field_docs(section.type).keys() >= {field.name for field in fields(section.type)}
    assert "  run.name=lr=1e-3                       `null`: `<experiment>-<n>` with the next free n" in lines
    assert "  train.accumulation=1                   Micro-batches per optimizer step" in lines


def test_showing_the_config_needs_no_torch() -> None:
    done = train("--cfg", "job", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "num_experts: 8" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported and "torch" not in imported and "numpy" not in imported


def composed(*overrides: str) -> Config:
    return from_dict(Config, compose_config("config", overrides))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.num_experts=eight"], "model.num_experts=eight: expected an integer or null"),
        (
            ["router.normalize=true", "model.top_k=1"],
            "router.normalize=true: expected auto or false with model.top_k=1",
        ),
        (["train.precision=fp16"], "train.precision=fp16: expected one of auto, fp64, fp32, bf16"),
        (["train.steps=1e3"], "train.steps=1000.0: expected an integer"),
        (["~train.steps"], "train.steps=???: expected an integer, and no value was given"),
        (["data=files"], "data.paths=[]: expected at least one file, folder or glob"),
        (["run.name=../x"], "run.name='../x': expected the name of a directory below run.root"),
    ],
)
def test_strict_conversion_of_what_hydra_composed(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_the_world_has_to_fit() -> None:
    def lay_out(config: Config, ranks: int) -> None:
        world = World(world_size=ranks, local_world_size=ranks)
        resolve_layout(config, build_workload(config, config.model), world)

    lay_out(composed("train.global_batch=8", "train.accumulation=2"), 4)
    with pytest.raises(
        ConfigError, match=r"^train.global_batch=8: expected a multiple of train.accumulation=2 times the 8"
    ):
        given = [f"parallel.{axis}=1" for axis in ("tensor", "context", "pipeline")]
        lay_out(composed("train.global_batch=8", "train.accumulation=2", *given), 8)
    with pytest.raises(ConfigError, match=r"^parallel.expert=3: expected a divisor of both model.num_experts=8 and"):
        lay_out(composed("parallel.expert=3"), 6)


def test_local_rank_of_deepspeed_is_stripped() -> None:
    given = ["--local_rank=1", "a=1", "--local_rank", "3", "--local-rank=0", "-m"]
    assert without_local_rank(given) == ["a=1", "-m"]
    others = ["-c", "job", "prompt=-a b", "--local", "--config-dir", "d", "~x", "--cfg=job", "stop=--local_rank=1"]
    assert without_local_rank(others) == others


def test_sweep_directory_is_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    root = f"run.root={tmp_path}"
    assert sweep_directory([root], RunOwner(sweep=True)) is None
    sweep = ["-m", root, "experiment=quickstart", "model.top_k=1,2"]
    for arguments, name in ((sweep, "quickstart-1"), (sweep, "quickstart-2"), ([*sweep, "run.name=mine"], "mine")):
        assert sweep_directory(arguments, RunOwner(sweep=True)) == tmp_path / name
    job = plain(OmegaConf.create({"run": {"root": str(tmp_path), "name": "mine"}}), tmp_path / "mine", 3)
    assert job["run"]["name"] == "mine/3"


def test_the_message_of_a_worker_failure() -> None:
    assert user_message(WorkerFailure(2, "data.paths=x: expected a file"), []) == "data.paths=x: expected a file"
    assert user_message(WorkerFailure(1, "Traceback (most recent call last):\n..."), []) is None
    killed = "worker 1 (process 7) was killed by SIGKILL"
    assert user_message(WorkerFailure(-9, killed), []) == killed
    assert user_message(TrainingFailure("step 7: no memory"), []) == "step 7: no memory"
    assert user_message(RuntimeError("bug"), []) is None


def test_failed_jobs_are_rows_and_status_1(tmp_path: Path) -> None:
    done = train("-m", f"run.root={tmp_path}", "run.name=s", "model.top_k=9,10", "model=mixtral_tiny,small")
    assert done.returncode == 1
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [f" job {j}" for j in range(4)]
    result = json.loads((tmp_path / "s" / "3" / "result.json").read_text())
    assert result == {"status": "failed", "error": "model.top_k=10: expected an integer from 1 to num_experts=8"}
    assert len((tmp_path / "s" / "sweep.csv").read_text().splitlines()) == 5
    assert "4 of 4 runs are not finished." in (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    saved = yaml.safe_load((tmp_path / "s" / "3" / "config.yaml").read_text())
    assert (saved["run"]["name"], saved["model"]["top_k"], saved["data"]["paths"]) == ("s/3", 10, [])


def test_a_job_whose_configuration_cannot_be_resolved_does_not_end_the_sweep(tmp_path: Path) -> None:
    devices = "train.device=cpu,${oc.env:HOME},${nothing},cpu"
    done = train("-m", f"run.root={tmp_path}", "run.name=s", "model.top_k=9", devices)
    assert done.returncode == 1
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [f" job {j}" for j in range(4)]
    saved = yaml.safe_load((tmp_path / "s" / "1" / "config.yaml").read_text())
    assert (saved["run"]["name"], saved["train"]["device"]) == ("s/1", "${oc.env:HOME}")


def test_a_refusal_under_torchrun_leaves_no_run_behind(tmp_path, monkeypatch):
    config = composed(f"run.root={tmp_path}", "run.name=refused", "tracking=disabled")
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)

    def refuse(config, owner):
        owner.claim_launched(config.run)
        assert (tmp_path / "refused").is_dir()
        raise ConfigError("model.vocab_size=1: expected more")

    with pytest.raises(ConfigError):
        workers.execute(config, refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_the_memory_is_refused_before_a_directory_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 4096}.__getitem__)
    monkeypatch.setattr(sys, "argv", ["train.py", "model=mixtral_8x7b", "train.steps=1"])
    given = ["model=mixtral_8x7b", "launch.nproc=8", "train.device=cpu", f"run.root={tmp_path}"]
    config = from_dict(Config, compose_config("config", given))
    with pytest.raises(ConfigError, match=r"^train.device=cpu: .*scripts/plan.py model=mixtral_8x7b gpus=8 gpu=h100`"):
        workers.execute(config, print)
    assert list(tmp_path.iterdir()) == []


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

from moe.config import ROUTER_CONFIGS, RouterConfig

@dataclass(frozen=True)
class ThresholdConfig(RouterConfig):
    MEANING: ClassVar[tuple[str, ...]] = (*RouterConfig.MEANING, "threshold")
    kind: str = "threshold"
    threshold: float = 0.5

ROUTER_CONFIGS.add("threshold", ThresholdConfig)
"""


@pytest.fixture
def user_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin `threshold.py`, and a directory `presets` with a router preset that names it."""
    monkeypatch.setattr(ROUTER_CONFIGS, "_entries", dict(ROUTER_CONFIGS._entries))
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.delitem(sys.modules, "mixwright_plugin_threshold", raising=False)
    (tmp_path / "threshold.py").write_text(PLUGIN)
    (tmp_path / "presets" / "router").mkdir(parents=True)
    preset = f"# @package _global_\nplugins: [{tmp_path}/threshold.py]\nrouter: {{kind: threshold, threshold: 0.25}}\n"
    (tmp_path / "presets" / "router" / "mine.yaml").write_text(preset)
    return tmp_path


def describe_router(config: Config, *arguments: str) -> list[object]:
    return [type(config.router).__name__, config.router, config.plugins, *arguments]


def test_a_preset_of_the_user_brings_its_plugin_and_workers_load_it(user_files: Path) -> None:
    raw = compose_config("config", ["router=mine"], str(user_files / "presets"))
    assert raw["plugins"] == [f"{user_files}/threshold.py"]
    with pytest.raises(ConfigError, match=r"^router.kind=threshold: expected one of softmax_topk, .*plugins=\[...\]"):
        from_dict(Config, raw | {"router": {"kind": "threshold"}})
    load_named_plugins(raw)
    config = from_dict(Config, raw)
    assert type(config.router) is ROUTER_CONFIGS["threshold"] and config.router.threshold == 0.25
    launch = LaunchConfig(nproc=1, threads=1)
    seen = workers.in_processes(launch, describe_router, config, "an argument", fresh=True)
    assert seen == ["ThresholdConfig", seen[1], tuple(raw["plugins"]), "an argument"] and seen[1] == config.router


def test_every_tool_takes_plugins_and_presets_of_the_user(
    user_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "plugins" not in leaf_keys(DescribeConfig)
    plugin = f"plugins=[{user_files}/threshold.py]"
    for arguments in (
        ["--config-dir", str(user_files / "presets"), "router=mine"],
        [plugin, "router.kind=threshold", "+router.threshold=0.25"],
    ):
        seen: list[DescribeConfig] = []
        monkeypatch.setattr(sys, "argv", ["describe.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_tool("describe", DescribeConfig, seen.append)
        assert ended.value.code == 0 and type(seen[0].router) is ROUTER_CONFIGS["threshold"]
        assert seen[0].router == ROUTER_CONFIGS["threshold"](threshold=0.25)
    for arguments, line in (
        (["--config-dir=/nowhere"], "--config-dir=/nowhere: expected a directory"),
        (["--config-dir"], "--config-dir=: expected a directory"),
        (["plugins=threshold.py"], "plugins=threshold.py: expected a list, each item a string"),
        (["--verbose"], "--verbose: expected key=value, or --help for the keys"),
    ):
        monkeypatch.setattr(sys, "argv", ["describe.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_tool("describe", DescribeConfig, seen.append)
        assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {line}\n")


def test_train_takes_plugins_and_presets_of_the_user(
    user_files: Path, status_of_train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    presets = ("--config-dir", str(user_files / "presets"), "router=mine")
    kinds = "softmax_topk, sigmoid_topk, expert_choice"
    unknown = f"router.kind=threshold: expected one of {kinds}, or a name that a module in plugins=[...] registers"
    for arguments, line in (
        (["router.kind=threshold"], unknown),
        ([*presets, "model.top_k=9"], "model.top_k=9: expected an integer from 1 to num_experts=8"),
        (["plugins=[none.py]"], "plugins=none.py: expected a module that can be imported (FileNotFoundError: no file"),
        (["plugins=none.py"], "plugins=none.py: expected a list, each item a string"),
    ):
        assert status_of_train(*arguments) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: {line}") and shown.count("\n") == 1
    sweep = train("-m", *presets, f"run.root={user_files}", "run.name=s", "model.top_k=9,10")
    assert sweep.returncode == 1
    lines = sweep.stderr.splitlines()
    assert [line.partition(": expected")[0] for line in lines] == [
        "error: job 0: model.top_k=9",
        "error: job 1: model.top_k=10",
    ]
    saved = yaml.safe_load((user_files / "s" / "1" / "config.yaml").read_text())
    assert saved["plugins"] == [f"{user_files}/threshold.py"] and saved["router"]["threshold"] == 0.25
