"""Checkpoints of whole runs: in the background, with weights that are not finite, on slow disks, after Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT, run_python
from training.checkpoint.manifest import committed, step_of, verify
from training.report.metrics import read_metrics

SMALL = [
    "model=mixtral_tiny", "model.num_layers=1", "train.seq_len=32", "train.global_batch=4", "train.log_every=1",
    "data.code_bytes=0", "data.prose_bytes=0", "data.arithmetic_bytes=60000", "data.vocab_size=400",
    "tracking=disabled", "run.sample_tokens=0", "launch.threads=1", "launch.nproc=2",
]  # fmt: skip
NAN_AFTER_STEP_3 = """
import torch
from training.engine import NativeEngine

original = NativeEngine.step

def step(self, *arguments):
    norm = original(self, *arguments)
    if self.updates == 3:
        with torch.no_grad():
            self.parts[0].norm.weight[0] = float("nan")
    return norm

NativeEngine.step = step
"""
SLOW_DISK_OF_RANK_1 = """
import os, time, types
from training.checkpoint import shards

def write(descriptor, content):
    if os.environ["RANK"] == "1":
        time.sleep(0.5)
    return os.write(descriptor, content)

shards.os = types.SimpleNamespace(**vars(os) | {"write": write})
shards.PIECE = 1 << 17
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache={tmp_path_factory.mktemp('cache')}"


def arguments(tmp_path: Path, cache: str, plugin: str = "", name: str = "a") -> list[str]:
    (tmp_path / "fault.py").write_text(plugin)
    return [*SMALL, cache, f"run.root={tmp_path}", f"run.name={name}", f"plugins=[{tmp_path / 'fault.py'}]"]


@pytest.mark.slow
def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path: Path, cache: str) -> None:
    keys = arguments(tmp_path, cache, NAN_AFTER_STEP_3)
    run = run_python("train.py", *keys, "train.steps=6", "checkpoint.every=1")
    assert run.returncode == 0, run.stderr
    newest = tmp_path / "a" / "checkpoints" / "step-2"
    lines = [line for line in run.stdout.splitlines() if " is not saved: " in line]
    assert [line.partition(": ")[0] for line in lines] == [f"step {step} is not saved" for step in (3, 4, 5, 6)]
    assert "model.norm.weight[0:64] has an element that is nan" in lines[0]
    assert lines[1] == f"step 4 is not saved: its gradient norm is nan; the newest checkpoint is still {newest}"
    assert [path.name for path in committed(newest.parent)] == ["step-2", "step-1"]
    verify(newest)


@pytest.mark.slow
def test_a_slow_disk_is_waited_for_longer_than_a_collective(tmp_path: Path, cache: str) -> None:
    keys = arguments(tmp_path, cache, SLOW_DISK_OF_RANK_1)
    run = run_python("train.py", *keys, "train.steps=1", "parallel.timeout_s=2")
    assert run.returncode == 0, run.stderr
    (path,) = committed(tmp_path / "a" / "checkpoints")
    (size,) = (file.stat().st_size for file in path.glob("rank-00001-*"))
    assert size / (1 << 17) * 0.5 > 2, "rank 1 wrote faster than the time-out"
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["status"] == "finished"


@pytest.mark.slow
def test_the_background_writes_the_same_files(tmp_path: Path, cache: str) -> None:
    for name, background in (("a", "false"), ("b", "true")):
        keys = arguments(tmp_path, cache, name=name)
        save = ["checkpoint.every=2", "checkpoint.keep=3", f"checkpoint.background={background}"]
        run = run_python("train.py", *keys, "train.steps=5", *save)
        assert run.returncode == 0, run.stderr
        for step in (2, 4, 5):
            path = tmp_path / name / "checkpoints" / f"step-{step}"
            verify(path)
            assert f"saved {path}{' in the background, in ' if background == 'true' else chr(10)}" in run.stdout
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        assert [row["step"] for row in rows if "speed/checkpoint_stall_s" in row] == [3, 5]
    shards = [
        {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("rank-*")}
        for name in ("a", "b")
    ]
    assert len(shards[0]) == 6 and shards[0] == shards[1]


@pytest.mark.slow
def test_ctrl_c_lets_the_save_in_flight_finish(tmp_path: Path, cache: str) -> None:
    keys = [*arguments(tmp_path, cache, SLOW_DISK_OF_RANK_1), "train.steps=100", "checkpoint.background=true"]
    keys += ["telemetry.forecast=false"]
    with subprocess.Popen(
        [sys.executable, "train.py", *keys, "checkpoint.every=3"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if line.replace(" ", "").startswith("step4/"):
                os.killpg(process.pid, signal.SIGINT)
    assert process.returncode == 130, lines
    newest, before = committed(tmp_path / "a" / "checkpoints")
    # It is step 3, unless this process was slow to send the signal.
    assert any(line.startswith(f"saved {before} in the background") for line in lines), lines
    assert step_of(newest) > step_of(before) and step_of(before) % 3 == 0
    verify(before)
    verify(newest)


FULL_AFTER_STEP_3 = """
import errno, os
from training.engine import NativeEngine

original = NativeEngine.step

def step(self, *arguments):
    if self.updates == 3 and self.mesh.rank == 0:
        with open(os.environ["FILLER"], "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    if self.updates == 6 and self.mesh.rank == 0 and "FREED" in os.environ:
        os.truncate(os.environ["FILLER"], 0)
    return original(self, *arguments)

NativeEngine.step = step
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_or_is_a_warning(
    tmp_path: Path, cache: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler = small_disk / "filler"
    monkeypatch.setenv("FILLER", str(filler))
    (tmp_path / "fault.py").write_text(FULL_AFTER_STEP_3)
    keys = [*SMALL, cache, f"run.root={small_disk}", f"plugins=[{tmp_path / 'fault.py'}]"]
    keys += ["train.steps=8", "checkpoint.every=1", "tracking=offline"]
    free = r": No space left on device: (\d+ bytes are needed, )?\d+ bytes are free"

    stopped = run_python("train.py", *keys, "run.name=a")
    error = stopped.stderr.strip().splitlines()[-1]
    assert stopped.returncode == 2 and re.match(rf"error: (rank \d+: )?{small_disk}.*{free}", error), stopped.stderr
    checkpoints = small_disk / "a" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-2", "step-3"]
    for path in committed(checkpoints):
        verify(path)
    filler.unlink()

    monkeypatch.setenv("FREED", "1")
    warned = run_python("train.py", *keys, "run.name=b", "checkpoint.on_error=warn")
    assert warned.returncode == 0, warned.stderr
    lines = [line for line in warned.stdout.splitlines() if re.search(free, line)]
    assert any(line.startswith("step 4 is not saved: ") for line in lines), warned.stdout
    assert not [path for path in (small_disk / "b").rglob("*") if path.name.startswith(".tmp")]
    assert [row["step"] for row in read_metrics(small_disk / "b" / "metrics.jsonl")] == list(range(1, 9))
    assert [path.name for path in committed(small_disk / "b" / "checkpoints")] == ["step-8", "step-7"]
    assert json.loads((small_disk / "b" / "result.json").read_text())["status"] == "finished"

    monkeypatch.delenv("FREED")
    never_freed = run_python("train.py", *keys, "run.name=c", "checkpoint.on_error=warn")
    assert never_freed.returncode == 0, never_freed.stderr
    assert [path.name for path in committed(small_disk / "c" / "checkpoints")] == ["step-3", "step-2"]
    assert not (small_disk / "c" / "result.json").exists()
    assert re.search(
        rf"warning: result.json cannot be written: .*{free} \(checkpoint.on_error=warn\)", never_freed.stdout
    )
