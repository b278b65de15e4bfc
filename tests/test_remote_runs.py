"""Runs whose checkpoints are also in a store: what the command line refuses, and a run whose directory is lost."""

import shutil
from pathlib import Path

import pytest

from tests.commands import run_python
from training.checkpoint.manifest import committed, verify
from training.report.metrics import read_metrics

SMALL = [
    "model=mixtral_tiny", "model.num_layers=1", "train.seq_len=32", "train.global_batch=4", "train.log_every=1",
    "data.code_bytes=0", "data.prose_bytes=0", "data.arithmetic_bytes=60000", "data.vocab_size=400",
    "tracking=disabled", "run.sample_tokens=0", "launch.threads=1",
]  # fmt: skip
KILLED_AFTER_THE_COPY = """
import os, signal, time
from pathlib import Path
from training.engine import NativeEngine

original = NativeEngine.step

def step(self, *arguments):
    if self.updates == 4 and os.environ["KILLED_AFTER"] and self.mesh.rank == 1:
        while not (Path(os.environ["KILLED_AFTER"]) / "manifest.json").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)

NativeEngine.step = step
"""


def test_a_url_with_a_password_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    keys = [*SMALL, f"run.root={tmp_path / 'runs'}", "run.name=a", "launch.nproc=2"]
    run = run_python("train.py", *keys, "checkpoint.remote=s3://name:pa55word@bucket/runs")
    line = "error: checkpoint.remote=s3://***@bucket/runs: expected a URL without keys and passwords, which the "
    assert run.returncode == 2 and run.stderr.startswith(line) and run.stderr.count("\n") == 1
    assert "pa55word" not in run.stdout + run.stderr and not (tmp_path / "runs").exists()


def test_a_run_without_a_name_cannot_be_found_again(tmp_path: Path) -> None:
    run = run_python("train.py", *SMALL, f"run.root={tmp_path / 'runs'}", "checkpoint.remote=memory://bucket")
    assert run.returncode == 2 and run.stderr.startswith("error: run.name=null: expected the name of the run with ")
    assert run.stderr.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_whose_directory_is_lost_continues_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks that save in the background: the rows and the files are those of the run that was not interrupted."""
    store = tmp_path / "store"
    (tmp_path / "fault.py").write_text(KILLED_AFTER_THE_COPY)
    keys = [*SMALL, f"data.cache={tmp_path / 'cache'}", "launch.nproc=2", f"plugins=[{tmp_path / 'fault.py'}]"]
    keys += [f"run.root={tmp_path / 'runs'}", "checkpoint.every=2", "checkpoint.background=true"]
    for name, remote, killed in (
        ("whole", "null", ""),
        ("lost", f"file://{store}", "4"),
        ("lost", f"file://{store}", ""),
    ):
        shutil.rmtree(tmp_path / "runs" / "lost", ignore_errors=True)
        monkeypatch.setenv("KILLED_AFTER", str(store / "lost" / "checkpoints" / f"step-{killed}") if killed else "")
        run = run_python("train.py", *keys, f"run.name={name}", f"checkpoint.remote={remote}", "train.steps=6")
        assert (run.returncode == 0) == (not killed), run.stdout + run.stderr
    copies = f"file://{store}/lost/checkpoints"
    assert f"step-4 is copied from {copies}: " in run.stdout and f"copied step-6 to {copies} in " in run.stdout
    for step in (4, 6):
        verify(store / "lost" / "checkpoints" / f"step-{step}")
    whole, lost = (tmp_path / "runs" / name for name in ("whole", "lost"))
    (newest, _), (expected, _) = committed(lost / "checkpoints"), committed(whole / "checkpoints")
    files, expected_files = (
        {file.name: file.read_bytes() for file in path.glob("rank-*")} for path in (newest, expected)
    )
    assert newest.name == "step-6" and files == expected_files and len(files) == 2
    # The probe that the churn compares with was in the directory that was lost.
    other = ("speed/", "router/churn")
    rows, expected_rows = (
        [{key: value for key, value in row.items() if not key.startswith(other)} for row in read_metrics(path)]
        for path in (lost / "metrics.jsonl", whole / "metrics.jsonl")
    )
    assert rows == expected_rows and len(rows) == 6

    # The store is gone: the run does not start, and with `warn` it uses its own checkpoint.
    shutil.rmtree(store)
    store.write_text("not a directory")
    more = [*keys, "run.name=lost", f"checkpoint.remote=file://{store}", "train.steps=7"]
    run = run_python("train.py", *more)
    assert run.returncode == 2 and run.stdout.count("error: ") + run.stderr.count("error: ") == 1
    assert f"error: checkpoint.remote=file://{store}: expected a store that can be read and written (" in run.stderr
    run = run_python("train.py", *more, "checkpoint.on_error=warn")
    assert run.returncode == 0 and f"the run continues from {newest}" in run.stdout
    assert f"step-7 is saved, but it could not be copied to {copies}: " in run.stdout
