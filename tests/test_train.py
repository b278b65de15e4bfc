"""Whole runs of `train.py`, as a user starts them."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from scripts.cli.command_line import CONF
from tests.commands import run_python
from training.report.metrics import read_metrics
from training.report.probe import read_probe

TINY = [
    "model=mixtral_tiny", "data.code_bytes=60000", "data.prose_bytes=40000", "data.arithmetic_bytes=40000",
    "data.vocab_size=500", "data.heldout_max_bytes=2000", "train.seq_len=64", "train.global_batch=8",
    "train.log_every=1", "run.sample_tokens=4", "launch.threads=1", "telemetry.probe_tokens=256",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return f"data.cache={tmp_path_factory.mktemp('cache')}"


def start(root: Path, cache: str, *overrides: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    flags = [argument for argument in overrides if argument.startswith("-")]
    rest = [argument for argument in overrides if argument not in flags]
    return subprocess.Popen(
        [*(launcher or (sys.executable,)), "train.py", *flags, *TINY, cache, f"run.root={root}", *rest],
        cwd=CONF.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run(root: Path, cache: str, *overrides: str, launcher: tuple[str, ...] = ()) -> str:
    process = start(root, cache, *overrides, launcher=launcher)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out


def numbers(directory: Path) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock."""
    rows = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in rows]


def wandb_steps(directory: Path) -> list[int]:
    """The steps of the rows in all offline W&B files of a run, in the order in which the files were written."""
    steps = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        steps += [record["history"]["item"]["_step"] for record in records if record["type"] == "history"]
    return steps


def test_one_process_writes_everything(tmp_path, cache):
    out = run(tmp_path, cache, "train.steps=3", "run.experiment=demo")
    directory = tmp_path / "demo-1"
    result = json.loads((directory / "result.json").read_text())
    assert result["status"] == "finished" and result["step"] == 3
    assert result["ranks"][0]["experts"] == [0, 1, 2, 3] and result["ranks"][0]["parameters"] == result["total_params"]
    assert (directory / "checkpoints" / "step-3" / "manifest.json").is_file()
    for name in ("config.yaml", "expert_load.svg", "expert_load.png", "curves.svg", "report.html"):
        assert (directory / name).stat().st_size > 0
    assert list((directory / "wandb").glob("offline-run-*/*.wandb"))
    last = numbers(directory)[-1]
    for key in (
        "step", "train/loss", "train/ce", "router/balance_loss", "router/z_loss", "router/max_vio", "router/dead",
        "router/max_vio/layer_00", "router/drop_rate", "optim/lr", "optim/grad_norm", "eval/loss",
        "eval/bits_per_byte/code",
    ):  # fmt: skip
        assert key in last
    assert sum(last["router/load/layer_01"]) == pytest.approx(1)
    assert "step 3/3" in out and "checkpoints/step-3" in out and "run.name=demo-1" in out


@pytest.mark.slow
def test_a_run_continues_only_when_asked(tmp_path, cache):
    run(tmp_path, cache, "train.steps=3", "run.experiment=demo")
    directory = tmp_path / "demo-1"
    again = run(tmp_path, cache, "train.steps=3", "run.experiment=demo", "run.name=demo-1")
    assert "is finished at step 3" in again
    metrics = directory / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]) + "{}\n")
    longer = run(tmp_path, cache, "train.steps=4", "run.experiment=demo", "run.name=demo-1")
    assert f"{metrics}: damaged; rows restored from the checkpoint: 2 of 3\n" in longer
    assert "changed since the checkpoint: train.steps: 3 -> 4\n" in longer
    assert "the schedule ends at step 3; steps 4 to 4 train with the constant rate 1.00e-04\n" in longer
    rows = numbers(directory)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[3]["optim/lr"] == rows[2]["optim/lr"]
    refused = start(tmp_path, cache, "train.steps=5", "run.name=demo-1", "model.num_experts=8")
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert err.startswith("error: model.num_experts=8: expected 4 as in the checkpoint") and err.count("\n") == 1


@pytest.mark.slow
def test_mistakes_that_only_the_data_shows(tmp_path, cache):
    for override, line in (
        ("model.vocab_size=100", "model.vocab_size=100: expected at least 500"),
        ("train.seq_len=100000", "train.seq_len=100000: expected at most"),
    ):
        process = start(tmp_path, cache, "train.steps=1", "launch.nproc=2", override)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.startswith(f"error: {line}") and err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["own", "torchrun"])
def test_two_starts_of_one_name_are_one_run_and_one_refusal(tmp_path, cache, launcher):
    """The start that is refused removes nothing of the run that goes on."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = ("run.name=x", "train.steps=2", *(("launch.nproc=2",) if launcher == "own" else ()))
    starts = [start(tmp_path, cache, *arguments, launcher=torchrun if launcher == "torchrun" else ()) for _ in "12"]
    errors = {process.communicate(timeout=180)[1]: process.returncode for process in starts}
    refused = [error for error in errors if "error: run.name=x: expected a run that no other process" in error]
    # The second start can also come so late that the run has finished.
    assert [code for error, code in errors.items() if error not in refused] in ([0], [0, 0]), errors
    assert all(errors[error] == (2 if launcher == "own" else 1) for error in refused)
    assert json.loads((tmp_path / "x" / "result.json").read_text())["step"] == 2
    assert [row["step"] for row in numbers(tmp_path / "x")] == [1, 2] and os.listdir(tmp_path) == ["x"]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bitwise(tmp_path, cache):
    arguments = ("launch.nproc=2", "train.steps=8", "checkpoint.every=2", "train.accumulation=2")
    run(tmp_path, cache, "run.name=whole", *arguments)
    process = start(tmp_path, cache, "run.name=killed", *arguments)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "killed" / "result.json").exists()
    out = run(tmp_path, cache, "run.name=killed", *arguments)
    assert "continued from step-" in out
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert wandb_steps(tmp_path / "killed") == [row["step"] for row in numbers(tmp_path / "whole")]
    for path in sorted((tmp_path / "whole" / "probe").iterdir()):
        assert (tmp_path / "killed" / "probe" / path.name).read_bytes() == path.read_bytes(), path
    assert len(list((tmp_path / "killed" / "probe").iterdir())) == 7  # tokens, and steps 0, 1, 2, 4, 6, 8


def check_exported(run_directory: Path) -> None:
    """Export a run and generate from both directories. The export has the rows of the vocabulary, and no others."""
    out = run_directory / "exported"
    exported = run_python("scripts/export_hf.py", f"checkpoint={run_directory}", f"out={out}", "dtype=fp32")
    assert exported.returncode == 0, exported.stderr
    tensors = load_file(out / "model.safetensors")
    assert {tensors[name].shape[0] for name in ("model.embed_tokens.weight", "lm_head.weight")} == {499}
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (16, 64)  # the width of one head
    rows = []
    for source in (run_directory, out):
        arguments = (f"checkpoint={source}", "prompt=1 + 1 =", "max_tokens=8", "format=json")
        done = run_python("scripts/generate.py", *arguments)
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(done.stdout)["results"])
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_another_layout_gives_the_same_run_and_takes_over_its_checkpoint(tmp_path, cache):
    """fp64: one process, two with expert parallelism (torchrun), and a run that goes through every axis on its way."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(tmp_path, cache, "run.name=one", "train.steps=6", "train.precision=fp64")
    run(tmp_path, cache, "run.name=two", "train.steps=6", "train.precision=fp64", launcher=torchrun)
    # Tensor parallelism divides neither the vocabulary nor the key/value head.
    schedule = (
        "train.precision=fp64", "optim.schedule=constant", "optim.warmup_steps=0", "train.accumulation=2",
        "model.num_kv_heads=1", "data.vocab_size=499",
    )  # fmt: skip
    run(tmp_path, cache, "run.name=constant", "train.steps=8", *schedule)
    axes = ("expert", "tensor", None, "tensor", "pipeline", "context", "shard", "expert_tensor")
    for step, axis in enumerate(axes, start=1):
        layout = ("launch.nproc=1",) if axis is None else (f"parallel.{axis}=2", "launch.nproc=2")
        run(tmp_path, cache, "run.name=changed", *schedule, f"train.steps={step}", *layout)
        if step == 4:
            check_exported(tmp_path / "changed")
    assert json.loads((tmp_path / "two" / "result.json").read_text())["ranks"][1]["experts"] == [2, 3]
    for left, right in (("one", "two"), ("constant", "changed")):
        for mine, other in zip(numbers(tmp_path / left), numbers(tmp_path / right), strict=True):
            for key in mine.keys() & other.keys():
                # The ranks of a layout are its own, and the launches of the last run have probed every step.
                if "rank_load_max" not in key and (left == "one" or "churn" not in key):
                    assert mine[key] == pytest.approx(other[key], rel=1e-9), (left, mine["step"], key)
        mine, other = (read_probe(tmp_path / name) for name in (left, right))
        assert mine.steps == [0, 1, 2, 4, *((6,) if left == "one" else (8,))] and set(mine.steps) <= set(other.steps)
        for step in mine.steps:
            for array, another in zip(mine.routing(step)[:3], other.routing(step)[:3], strict=True):
                np.testing.assert_allclose(array, another, rtol=1e-5)


@pytest.mark.slow
def test_a_domain_of_one_document_trains_and_has_no_figures(tmp_path, cache):
    rows = [{"text": f"line {i} of a text, {i * i} words and more of them\n" * 20, "lang": "en"} for i in range(40)]
    rows.append({"text": "habari ya dunia " * 9, "lang": "sw"})
    (tmp_path / "two.ndjson").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    files = (
        "data=files",
        f"data.paths=[{tmp_path}/two.ndjson]",
        "data.domain_key=lang",
        "data.on_error=skip",
        "data.vocab_size=340",
    )
    overrides = [argument for argument in TINY if "_bytes=" not in argument or "heldout" in argument]
    done = run_python("train.py", *overrides, cache, *files, f"run.root={tmp_path}", "run.name=x", "train.steps=2")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "x" / "result.json").read_text()
    result = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} in result.json"))
    assert result["eval/loss"] > 0 and "eval/bits_per_byte/en" in result and "eval/bits_per_byte/sw" not in result
    assert result["baselines"].keys() == {"en"} and "NaN" not in (tmp_path / "x" / "metrics.jsonl").read_text()
    assert "data.on_error=skip left out 1 place:" in done.stdout and "two.ndjson: line 42: expected" in done.stdout
    bad = run_python("train.py", *overrides, cache, *files[:3], f"run.root={tmp_path}", "run.name=y")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "two.ndjson: line 42: expected" in bad.stderr


@pytest.mark.slow
def test_a_sweep_ends_with_a_table_and_a_failed_job_is_a_row(tmp_path, cache):
    process = start(
        tmp_path, cache, "-m", "run.name=sweep", "train.steps=2", "model.num_experts=2,4", "model.top_k=1,3",
        "tracking=disabled",
    )  # fmt: skip
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1 and "error: job 1: model.top_k=3" in err
    table = (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()
    assert len(table) == 5 and [("finished" in line, "failed" in line) for line in table[1:]] == [
        (True, False), (False, True), (True, False), (True, False)
    ]  # fmt: skip
    assert (tmp_path / "sweep" / "sweep.svg").is_file() and "Sweep: 3 of 4 jobs finished" in out
    assert (tmp_path / "sweep" / "2" / "checkpoints" / "step-2").is_dir()


@pytest.mark.slow
def test_a_name_of_any_characters_passes_workers_a_sweep_and_the_command_that_resumes(tmp_path, cache):
    name, prompt = "lr=1e-3 it's (ü)", "The ${x}, 'next' \\"
    out = run(tmp_path, cache, "train.steps=1", f"run.name={name}", f"run.prompt={prompt}", "launch.nproc=2")
    saved = yaml.safe_load((tmp_path / name / "config.yaml").read_text(encoding="utf-8"))
    assert saved["run"]["name"] == name and saved["run"]["prompt"] == prompt
    [line] = [line for line in out.splitlines() if line.split()[:1] == ["resume"]]
    [program, *words] = shlex.split(line)[1:]
    assert Path(program).name == Path(sys.executable).name
    resumed = subprocess.run([sys.executable, *words], cwd=CONF.parent, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert len(numbers(tmp_path / name)) == 2
    run(tmp_path, cache, "-m", "train.steps=1", "run.name=1e5", "run.prompt=ü=1,1e3", "model.top_k=1")
    prompts = [yaml.safe_load((tmp_path / "1e5" / job / "config.yaml").read_text())["run"]["prompt"] for job in "01"]
    assert prompts == ["ü=1", "1e3"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_trains_in_one_process_whatever_a_cluster_exports(tmp_path, cache, monkeypatch, stage):
    pytest.importorskip("deepspeed")
    exported = {"LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
    for variable, value in exported.items():
        monkeypatch.setenv(variable, value)
    steps = ("train.steps=2", "train.precision=fp32")
    run(tmp_path, cache, *steps, "run.name=ds", "engine=deepspeed", f"engine.zero_stage={stage}")
    run(tmp_path, cache, *steps, "run.name=native")
    losses = [[row["train/loss"] for row in numbers(tmp_path / name)] for name in ("ds", "native")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
