"""Whole runs of `train.py` in which something goes wrong, as a user sees them."""

import json
from pathlib import Path

import pytest

from tests.test_train import numbers, run, start

pytestmark = pytest.mark.slow
FAULTS = '''
"""A plugin that makes a step go wrong."""
import os, signal
import torch
from parallel.startup.launch import world_from_env
from training import steps

start_step, world, started = steps.start_step, world_from_env(), 0


def faulty(engine, inputs, *arguments):
    global started
    started += 1
    first_row = int(inputs.batches[0].numbers_BS[0, 0]) // 64
    if FAULT == "killed" and started == 7 and world.rank == 1 and not world.restart_count:
        os.kill(os.getpid(), signal.SIGKILL)
    pending = start_step(engine, inputs, *arguments)
    if FAULT == "memory" and started == 3 and world.rank == 1:
        torch.empty(2**46)
    if FAULT == "differs" and started == 4 and world.rank == 1:
        engine.parts[0].layers[1].attention_norm.weight.data[3] += 0.5
    if FAULT == "jumps" and 48 <= first_row < 56:
        engine.parts[0].head.weight.data.mul_(1e6)
    return pending


steps.start_step = faulty
'''
SMALL = ("train.seq_len=64", "tracking=disabled", "run.sample_tokens=0", "train.compile=false")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache={tmp_path_factory.mktemp('cache')}"


def plugin(directory: Path, fault: str) -> str:
    path = directory / f"{fault}.py"
    path.write_text(FAULTS.replace("FAULT ==", f'"{fault}" =='))
    return f"plugins=[{path}]"


def test_a_restart_says_who_died_and_where_the_run_goes_on(tmp_path, cache):
    arguments = (*SMALL, plugin(tmp_path, "killed"), "train.steps=8", "checkpoint.every=5", "run.name=a")
    out = run(tmp_path, cache, "launch.nproc=2", "launch.max_restarts=1", *arguments)
    assert "\nrestart 1: rank 1 was killed by SIGKILL; the run continues after step 5" in out
    assert "; 1 restart\n" in out
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["restarts"] == 1 and 0 < result["goodput"]["share"] < 1 and result["goodput"]["seconds"]["down"] > 0
    assert [row["step"] for row in numbers(tmp_path / "a")] == list(range(1, 9))


def test_a_replica_that_differs_ends_the_run_before_it_is_saved(tmp_path, cache):
    arguments = (*SMALL, plugin(tmp_path, "differs"), "train.steps=8", "checkpoint.every=3", "run.name=a")
    process = start(tmp_path, cache, "launch.nproc=2", "parallel.replicate=2", *arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("error: step 6: ranks 0-1 differ in ") and err.count("\n") == 1, err
    assert err.endswith("no value has a majority; equal after step 3\n")
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-3"]


def test_a_jump_takes_runs_of_all_layouts_the_same_way(tmp_path, cache):
    arguments = (*SMALL, plugin(tmp_path, "jumps"), "train.steps=9", "checkpoint.every=2", "health.on_spike=rewind")
    layouts = {
        "one": (),
        "two": ("launch.nproc=2", "parallel.replicate=2"),
        "again": ("launch.nproc=2", "parallel.replicate=2"),
    }
    for name, layout in layouts.items():
        out = run(tmp_path, cache, f"run.name={name}", "train.precision=fp64", *layout, *arguments)
        assert "step 8: the loss is " in out and "step-6 and skips the rows of steps 7 to 8\n" in out
    one, two, again = (numbers(tmp_path / name) for name in layouts)
    assert two == again
    for row, other in zip(one, two, strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-9)


def test_a_rank_without_memory_says_what_to_change(tmp_path, cache):
    arguments = (*SMALL, plugin(tmp_path, "memory"), "train.steps=8", "train.accumulation=2", "run.name=a")
    process = start(tmp_path, cache, "launch.nproc=2", "parallel.replicate=2", *arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count("\n") == 1, err
    assert err.startswith("error: rank 1 (") and "2 x 2 rows of 64 tokens on this rank" in err
    assert "Ways out: train.accumulation=4; parallel.recompute=full; parallel.shard=2. (" in err
    assert "can't allocate memory: you tried to allocate 281474976710656 bytes" in err
