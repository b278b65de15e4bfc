"""The recipe of docs/finetuning.md, command by command: adapters on a released model, from chats to an export."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts.cli.command_line import CONF

DATA = ("data=sft", "data.paths=[chats.jsonl]")
TINY = ("run.root=runs", "data.cache=cache", "train.seq_len=96", "train.precision=fp32", "tracking=disabled",
        "launch.threads=1", "run.sample_tokens=0", "train.device=cpu")  # fmt: skip

BASE = (
    *TINY, "data.code_bytes=60000", "data.prose_bytes=30000", "data.arithmetic_bytes=60000", "data.vocab_size=500",
    "train.global_batch=16", "run.name=base", "optim.lr=3e-3",
)  # fmt: skip
FAMILIES = {
    "olmoe": (), "qwen2_moe": (), "qwen3_moe": ("quantize=nf4",), "deepseek_moe": (), "deepseek_v2": (),
    "deepseek_v3": ("quantize=nf4",),
}  # fmt: skip
"""Families beside Mixtral, whose tiny presets have this name -> what their base is trained with."""
TUNED = (
    *DATA, *TINY, "adapter=lora", "adapter.targets=[attention,router,experts]", "adapter.rank=4", "optim.lr=1e-2",
    "train.global_batch=8",
)  # fmt: skip


def command(directory: Path, tool: str, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(CONF.parent / tool), *arguments],
        cwd=directory, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done


def evaluate(directory: Path, checkpoint: str) -> float:
    given = (f"checkpoint={checkpoint}", *DATA, "split=heldout", "seq_len=96", "format=json", "precision=fp64")
    return json.loads(command(directory, "scripts/evaluate.py", *given, "data.cache=cache").stdout)["loss"]


def generate(directory: Path, checkpoint: str) -> str:
    given = (f"checkpoint={checkpoint}", "prompt=Double of 3?", "chat=true", "max_tokens=12", "precision=fp64")
    found = json.loads(command(directory, "scripts/generate.py", *given, "format=json").stdout)
    return json.dumps(found["results"])


def release(directory: Path, family: str) -> None:
    """Write chats, and a model as it is released: in Hugging Face's format, with its tokenizer."""
    pairs = [(f"Double of {n}?", f"{2 * n}.") for n in range(200)]
    lines = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    (directory / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command(directory, "train.py", f"model={family}_tiny", *BASE, "train.steps=30")
    command(directory, "scripts/export_hf.py", "checkpoint=runs/base", "out=released", "dtype=fp32")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with chats and a released Mixtral."""
    directory = tmp_path_factory.mktemp("recipe")
    release(directory, "mixtral")
    return directory


@pytest.mark.slow
def test_the_recipe_from_a_released_directory_to_an_export(directory):
    before = evaluate(directory, "released")
    done = command(directory, "train.py", *TUNED, "run.name=tuned", "run.init_from=released", "train.steps=20")
    said = re.sub(r"\s+", " ", done.stdout + done.stderr)
    trains = re.search(r"trains: (attention.wq.adapter .*?)frozen", said)
    assert trains and "ffn.router.adapter" in trains[1] and "ffn.experts.adapters.w_down" in trains[1]
    assert re.search(r"frozen: embedding \d.*attention.wq \d.*ffn.experts.w_up \d.*head \d", said)
    after = evaluate(directory, "runs/tuned")
    assert after < 0.9 * before
    command(directory, "scripts/merge.py", "run=runs/tuned", "out=merged")
    command(directory, "scripts/export_hf.py", "checkpoint=merged", "out=exported", "dtype=fp32")
    assert evaluate(directory, "exported") == pytest.approx(after, rel=1e-5)
    assert generate(directory, "runs/tuned") == generate(directory, "exported")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_recipe_of_another_family(tmp_path, family):
    release(tmp_path, family)
    base = FAMILIES[family]
    before = evaluate(tmp_path, "released")
    tuned = (*TUNED, *base, "run.name=tuned", "run.init_from=released", "train.steps=20", "launch.nproc=2")
    command(tmp_path, "train.py", *tuned)
    command(tmp_path, "scripts/merge.py", "run=runs/tuned", "out=merged")
    command(tmp_path, "scripts/export_hf.py", "checkpoint=merged", "out=exported", "dtype=fp32")
    after = evaluate(tmp_path, "exported")
    assert after < 0.95 * before
    if not base:  # A merged model has the weights of the base, and not their rounding to 4 bits.
        assert after == pytest.approx(evaluate(tmp_path, "runs/tuned"), rel=1e-5)
    assert generate(tmp_path, "merged") == generate(tmp_path, "exported")


@pytest.mark.slow
def test_a_run_with_adapters_continues_with_the_same_base_alone(directory):
    """On two ranks; with the base at another place; and not with other weights."""
    tuned = (*TUNED, "run.name=continued", "run.init_from=released")
    command(directory, "train.py", *tuned, "train.steps=2")
    command(directory, "train.py", *tuned, "train.steps=3", "launch.nproc=2", "parallel.expert=2")
    moved = directory / "moved"
    shutil.copytree(directory / "released", moved)
    done = command(directory, "train.py", *tuned, "train.steps=4", "run.init_from=moved")
    assert "continued from step-3" in done.stdout + done.stderr
    weights = load_file(moved / "model.safetensors")
    save_file({name: 1.001 * weight for name, weight in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    refused = command(directory, "train.py", *tuned, "train.steps=5", "run.init_from=moved", status=2).stderr
    assert "run.init_from=moved: expected the weights that the adapters in" in refused.splitlines()[-1]
