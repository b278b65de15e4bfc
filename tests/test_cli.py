import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.errors import ConfigError
from common.strict import from_dict
from parallel.startup.launch import WorkerFailure, World
from scripts import cli as boundary
from training.config import Config
from training.layout import build_workload, resolve_layout

ROOT = boundary.CONF.parent


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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model.num_expert=8"], "model.num_expert=8: unknown key; the nearest valid key is model.num_experts"),
        (["+model.num_expert=8"], "model.num_expert=8: unknown key; the nearest valid key is model.num_experts"),
        (["modle=tiny"], "modle=tiny: unknown key; the nearest valid key is model"),
        (["model.top_k=9"], "model.top_k=9: expected an integer from 1 to num_experts=8"),
        (["data.hub_path=x"], "data.hub_path=x: expected a key of the chosen presets; +data.hub_path=x adds it, "),
        (["model..dim=3"], "model..dim=3: expected key=value ("),
        (["run.root=/dev/null/runs"], "run.root=/dev/null/runs: expected a writable directory (Not a directory)"),
        (["-m", "model.dim=64,x", "run.root=/dev/null/runs"], "run.root=/dev/null/runs: expected a writable directory"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], line: str) -> None:
    done = train(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {line}") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_unknown_preset_lists_the_options() -> None:
    done = train("model=mixtral_tinyy")
    options = ", ".join(sorted(path.stem for path in (boundary.CONF / "model").glob("*.yaml")))
    assert (done.returncode, done.stderr) == (
        2,
        f"error: model=mixtral_tinyy: expected one of {options}; the nearest is mixtral_tiny\n",
    )


def test_under_a_launcher_only_local_rank_0_speaks() -> None:
    world = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    silent = train("--local_rank=1", "model.top_k=9", LOCAL_RANK="1", **world)
    assert (silent.returncode, silent.stderr) == (2, "")
    refused = train("-m", "model.top_k=1,2", LOCAL_RANK="0", **world)
    assert refused.returncode == 2 and "use: python train.py -m launch.nproc=" in refused.stderr


def test_showing_the_config_needs_no_torch() -> None:
    done = train("--cfg", "job", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "num_experts: 8" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported and "torch" not in imported and "numpy" not in imported


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(boundary.CONF), version_base="1.3"):
        return from_dict(Config, boundary.plain(compose("config", list(overrides))))


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
        (["data=files"], "data.paths=[]: expected at least one file or glob"),
        (["run.name=../x"], "run.name='../x': expected letters"),
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
    assert boundary.without_local_rank(given) == ["a=1", "-m"]


def test_sweep_directory_is_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    root = f"run.root={tmp_path}"
    assert boundary.sweep_directory([root]) is None
    sweep = ["-m", root, "experiment=quickstart", "model.top_k=1,2"]
    assert boundary.sweep_directory(sweep) == tmp_path / "quickstart-1"
    assert boundary.sweep_directory(sweep) == tmp_path / "quickstart-2"
    assert boundary.sweep_directory([*sweep, "run.name=mine"]) == tmp_path / "mine"
    job = boundary.plain(OmegaConf.create({"run": {"root": str(tmp_path), "name": "mine"}}), tmp_path / "mine", 3)
    assert job["run"]["name"] == "mine/3"


def test_worker_failures_speak_for_themselves() -> None:
    assert (
        boundary.user_message(WorkerFailure(2, "data.paths=x: expected a file"), []) == "data.paths=x: expected a file"
    )
    assert boundary.user_message(WorkerFailure(1, "Traceback"), []) is None
    assert boundary.user_message(RuntimeError("bug"), []) is None


def test_failed_jobs_are_rows_and_status_1(tmp_path: Path) -> None:
    done = train("-m", f"run.root={tmp_path}", "run.name=s", "model.top_k=9,10", "model=mixtral_tiny,small")
    assert done.returncode == 1
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [f" job {j}" for j in range(4)]
    result = json.loads((tmp_path / "s" / "3" / "result.json").read_text())
    assert result == {"status": "failed", "error": "model.top_k=10: expected an integer from 1 to num_experts=8"}
    assert len((tmp_path / "s" / "sweep.csv").read_text().splitlines()) == 5
    saved = yaml.safe_load((tmp_path / "s" / "3" / "config.yaml").read_text())
    assert (saved["run"]["name"], saved["model"]["top_k"], saved["data"]["paths"]) == ("s/3", 10, [])


def test_a_refusal_under_torchrun_leaves_no_run_behind(tmp_path, monkeypatch):
    config = composed(f"run.root={tmp_path}", "run.name=refused", "tracking=disabled")
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(boundary, "die_with_parent", lambda: None)

    def refuse(config):
        boundary.prepare_directory(config.run, config.run.name)
        (tmp_path / "refused" / ".lock").touch()
        raise ConfigError("model.vocab_size=1: expected more")

    with pytest.raises(ConfigError):
        boundary.execute(config, refuse)
    assert list(tmp_path.iterdir()) == []
