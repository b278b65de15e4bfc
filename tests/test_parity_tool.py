"""`scripts/parity.py` as a user runs it: the jobs that it selects, its output, and its exit status."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

from common.errors import ConfigError
from common.strict import from_dict, to_dict
from moe.config import RouterConfig
from scripts.cli.command_line import CONF
from training.parity.config import CASES, MODEL, VOCABULARY, ParityConfig
from training.parity.jobs import layout_groups, parse_layout, select_jobs, select_layouts


def tool(*arguments: str, launcher: tuple[str, ...] = (), script: str = "scripts/parity.py"):
    command = [sys.executable, *launcher, script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONF.parent)}
    return subprocess.run(command, cwd=CONF.parent, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_workers_and_the_table():
    layouts = "expert=2,tensor=2+recompute=full,pipeline=2"
    ended = tool(f"layouts={layouts}", "models=pooled", "steps=2", "launch.nproc=2")
    assert ended.returncode == 0, ended.stderr
    assert "[1/3] expert=2  pooled  native: ok" in ended.stdout
    assert "2 of 2 within the tolerance" in ended.stdout and "1 skipped" in ended.stdout
    assert "parallel.pipeline=2: expected 1 with router.layer_reduction=hf_pooled" in ended.stdout


MISS = """
import sys
from training.parity import trial
from training import build

def build_with_other_seed(config, model, mesh, dtype, seed):
    return build.build_parts(config, model, mesh, dtype, seed + (mesh.world_size == 2))

trial.build_parts = build_with_other_seed
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


@pytest.mark.slow
def test_a_model_that_the_user_gives():
    layouts = "expert=2,tensor=2,pipeline=2,pipeline=2+stage_layers=1:3"
    ended = tool(f"layouts={layouts}", "model=mixtral_tiny", "router=switch", "steps=2", "launch.nproc=2")
    assert ended.returncode == 0, ended.stderr
    assert "[1/4] expert=2  given  native: ok" in ended.stdout
    assert "3 of 3 within the tolerance" in ended.stdout and "1 skipped" in ended.stdout
    assert "expected numbers that add up to model.num_layers=2): pipeline=2+stage_layers=1:3 x 1" in ended.stdout


@pytest.mark.parametrize("vocab_size", [None, 50])
def test_the_given_model_is_the_only_case(vocab_size):
    model, router = replace(MODEL, vocab_size=vocab_size), RouterConfig(capacity_factor=1.25)
    config = ParityConfig(model=model, router=router)
    assert from_dict(ParityConfig, to_dict(config)) == config  # Workers build it from plain values.
    [(name, case)] = config.cases().items()
    assert (name, case.router) == ("given", router)
    assert case.model == replace(model, vocab_size=vocab_size or VOCABULARY)
    assert {job.model for job in select_jobs(config, 2)} == {"given"}
    assert ParityConfig(model=model).cases()["given"].router == RouterConfig()
    assert ParityConfig().cases() == CASES


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
        ("model=mixtrall", "model=mixtrall: expected one of deepseek_moe_145b, "),
        ("router=switch", "model=null: expected a preset of conf/model beside router="),
        ("model=mixtral_tiny model.vocab_size=39", "model.vocab_size=39: expected an integer >= 40"),
        ("model=mixtral_tiny models=mixtral", "models=mixtral: expected one of cover, all, given"),
        ("model=mixtral_tiny router=deepseek_v3", "router.num_groups=8: expected a divisor of model.num_experts=4"),
        ("model=llama2_tiny layouts=expert=2", "layouts=expert=2: expected a layout that fits; parallel.expert=2"),
    ],
)
def test_mistakes_are_one_line(argument, message, monkeypatch, capsys):
    from scripts.parity import main

    monkeypatch.setattr(sys, "argv", ["scripts/parity.py", *argument.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("world", [1, 2, 4, 6, 8, 16, 24])
def test_every_layout_of_every_group_can_be_read(world):
    names = select_layouts("all", world)
    assert set(names) == {name for group in layout_groups(world).values() for name in group}
    jobs = select_jobs(ParityConfig(models="mixtral"), world)
    assert [job.layout for job in jobs] == names


def test_a_selection_names_groups_axes_and_layouts():
    assert "tensor=2+expert=4" in select_layouts("expert", 4) and "tensor=2" not in select_layouts("expert", 4)
    assert "expert_tensor=2" not in select_layouts("expert", 2)
    assert select_layouts("single,replicate=2", 2) == layout_groups(2)["single"]
    assert parse_layout("pipeline=2+stage_layers=1:3").stage_layers == (1, 3)
    with pytest.raises(ConfigError):
        parse_layout("pipeline=2+stage_layers=1")


def test_every_model_is_assigned_to_a_layout():
    jobs = select_jobs(ParityConfig(), 4)
    assert len(jobs) == len(select_layouts("all", 4))
    assert {job.model for job in jobs} == set(CASES)
    everything = select_jobs(ParityConfig(models="all", layouts="single"), 2)
    assert len(everything) == len(CASES) * len(layout_groups(2)["single"])
