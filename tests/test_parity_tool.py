"""`scripts/parity.py` as a user starts it: what it selects, what it prints, how it ends."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from common.errors import ConfigError
from scripts.cli.hydra import CONF
from scripts.parity import ParityConfig, jobs_for
from training.parity.cases import CASES
from training.parity.layouts import chosen, layouts_for, parse_layout


def tool(*arguments: str, launcher: tuple[str, ...] = (), script: str = "scripts/parity.py"):
    command = [sys.executable, *launcher, script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONF.parent)}
    return subprocess.run(command, cwd=CONF.parent, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_own_workers_and_a_table():
    layouts = "expert=2,tensor=2+recompute=full,pipeline=2"
    ended = tool(f"layouts={layouts}", "models=pooled", "steps=2", "launch.nproc=2")
    assert ended.returncode == 0, ended.stderr
    assert "[1/3] expert=2  pooled  native: ok" in ended.stdout
    assert "2 of 2 within the tolerance" in ended.stdout and "1 skipped" in ended.stdout
    assert "parallel.pipeline=2: expected 1 with router.layer_reduction=hf_pooled" in ended.stdout


MISS = """
import sys
from training.parity.trial import trial as parity
from training import build as engines

def build(config, model, mesh, dtype, seed):
    return engines.build_parts(config, model, mesh, dtype, seed + (mesh.world_size == 2))

parity.build_parts = build
from scripts.parity import main
main()
"""


@pytest.mark.slow
def test_torchrun_and_a_miss(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    engines = ("precision=fp32", "engines=native,deepspeed-2") if find_spec("deepspeed") else ("engines=native",)
    ended = tool("layouts=expert=2", "models=mixtral", *engines, launcher=torchrun)
    assert ended.returncode == 0 and ended.stdout.count(" within the tolerance") == 1, ended.stderr
    (tmp_path / "miss.py").write_text(MISS)
    ended = tool("layouts=expert=2", "models=mixtral", launcher=torchrun, script=str(tmp_path / "miss.py"))
    assert ended.returncode == 1 and "0 of 1 within" in ended.stdout and "MISS" in ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("layouts=exprt", "layouts=exprt: expected one of all, single, pairs"),
        ("layouts=tensor=3", "layouts=tensor=3: expected a layout that fits; parallel.tensor=3"),
        ("layouts=tensr=2", "parallel.tensr=2"),
        ("layouts=tensor=²", "parallel.tensor=²: expected auto or an integer"),
        ("models=mixtrall", "models=mixtrall: expected one of cover, all, mixtral"),
        ("engines=deep", "engines=deep: expected one of native"),
        ("steps=1", "steps=1: expected an integer >= 2"),
        ("precision=bf16", "precision=bf16"),
    ],
)
def test_mistakes_are_one_line(argument, message, monkeypatch, capsys):
    from scripts.parity import main

    monkeypatch.setattr(sys, "argv", ["scripts/parity.py", argument])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("world", [1, 2, 4, 6, 8, 16, 24])
def test_every_layout_of_every_group_can_be_read_and_nearly_all_fit(world):
    names = chosen("all", world)
    assert set(names) == {name for group in layouts_for(world).values() for name in group}
    fitting = jobs_for(ParityConfig(models="mixtral"), world)
    assert [job.layout for job in fitting] == names


def test_a_selection_names_groups_axes_and_layouts():
    assert "tensor=2+expert=4" in chosen("expert", 4) and "tensor=2" not in chosen("expert", 4)
    assert "expert_tensor=2" not in chosen("expert", 2)
    assert chosen("single,replicate=2", 2) == layouts_for(2)["single"]
    assert parse_layout("pipeline=2+stage_layers=1:3").stage_layers == (1, 3)
    with pytest.raises(ConfigError):
        parse_layout("pipeline=2+stage_layers=1")


def test_models_take_turns():
    jobs = jobs_for(ParityConfig(), 4)
    assert len(jobs) == len(chosen("all", 4))
    assert {job.model for job in jobs} == set(CASES)
    everything = jobs_for(ParityConfig(models="all", layouts="single"), 2)
    assert len(everything) == len(CASES) * len(layouts_for(2)["single"])
