"""Signals to the processes of a run: it ends after its step, with a checkpoint from which it continues bit for bit."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.cli.command_line import CONF
from tests.parallel.test_launch import children
from tests.test_train import TINY, cache, numbers, run, start  # noqa: F401

EVERY = ("train.steps=14", "telemetry.forecast=false", "checkpoint.every=3", "checkpoint.keep=9")


def wait_for_step(directory: Path, process: subprocess.Popen[str], step: int = 3) -> None:
    deadline = time.monotonic() + 120
    while not (directory / "checkpoints" / f"step-{step}").is_dir():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def saved_steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (directory / "checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "processes", "target"),
    [(signal.SIGHUP, 1, "launcher"), (signal.SIGTERM, 2, "launcher"), (signal.SIGUSR1, 2, "worker")],
)
def test_a_signal_ends_a_run_with_a_checkpoint_of_its_step(
    tmp_path: Path,
    cache: str,  # noqa: F811
    number: signal.Signals,
    processes: int,
    target: str,
) -> None:
    directory, arguments = tmp_path / "stopped", (f"launch.nproc={processes}", "run.name=stopped", *EVERY)
    process = start(tmp_path, cache, *arguments)
    wait_for_step(directory, process)
    started = [pid for pid in children(process.pid) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(process.pid if target == "launcher" else started[-1], number)  # The first is the one that has forked them.
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (128 + number, "")
    last = saved_steps(directory)[-1]
    *_, checkpoint, resume, report = out.splitlines()
    assert checkpoint.endswith(f"stopped/checkpoints/step-{last}") and resume.split()[0] == "resume"
    assert report == f"report until here: {directory / 'report.html'}" and (directory / "report.html").is_file()
    if target == "worker":
        run(tmp_path, cache, *arguments)
        run(tmp_path, cache, *arguments, "run.name=whole")
        assert last < 14 and numbers(directory) == numbers(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_a_stopped_rank_is_named_and_ends_the_run(tmp_path: Path, cache: str, torchrun: bool) -> None:  # noqa: F811
    directory, limit = tmp_path / "stopped", 12
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    launched = ("launch.nproc=1",) if torchrun else ("launch.nproc=2",)
    process = start(
        tmp_path, cache, *launched, "run.name=stopped", f"parallel.timeout_s={limit}", "train.steps=100000",
        "telemetry.forecast=false",
        "checkpoint.every=3", launcher=launcher if torchrun else (),
    )  # fmt: skip
    wait_for_step(directory, process)
    names = b"train.py" if torchrun else b"forkserver"
    workers = [pid for pid in children(process.pid) if names in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[-1], signal.SIGSTOP)
    start_s = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - start_s < limit + 25  # On a quiet machine: limit + 5. torch's agent would wait for 30 s.
    assert process.returncode == 1
    waited = r"rank \d (waited 12 s (in \w+:\w+ of|for it in)|has ended, and is waited for with .*, in) step \d"
    assert re.search(rf"rank \d \(process {workers[-1]}\) was stopped, and is killed: {waited}", err), err
    assert (directory / "report.html").is_file() != torchrun
    [record] = (directory / "collectives").glob("rank-*.json")
    assert json.loads(record.read_text())["step"] >= 3


@pytest.mark.slow
def test_torchrun_passes_the_warning_of_a_cluster_on(tmp_path: Path, cache: str) -> None:  # noqa: F811
    directory = tmp_path / "stopped"
    environment = {"NPROC": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [CONF.parent / "scripts" / "node.sh", *TINY, cache, f"run.root={tmp_path}", "run.name=stopped", *EVERY],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    wait_for_step(directory, process)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    *_, checkpoint, resume, _ = out.splitlines()
    assert checkpoint.endswith(f"stopped/checkpoints/step-{saved_steps(directory)[-1]}")
    assert (directory / "report.html").is_file() and not list(directory.glob(".report*"))
    assert "store_type=file" in resume and process.returncode == 1


@pytest.mark.slow
def test_a_sweep_stops_after_the_job_that_a_signal_ends(tmp_path: Path, cache: str) -> None:  # noqa: F811
    arguments = ("-m", "run.seed=1,2", "launch.nproc=2", "run.name=sweep", *EVERY)
    process = start(tmp_path, cache, *arguments)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("**/checkpoints/step-3")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "resume" in out
    assert len(list(tmp_path.glob("**/checkpoints"))) == 1
    assert "Sweep sweep: 0 of 2 jobs finished" in out and "run.name=sweep" in shlex.split(out.splitlines()[-2])
    pages = [tmp_path / "sweep" / "report.html", tmp_path / "sweep" / "0" / "report.html"]
    assert out.endswith(f"report until here: {pages[0]}\n") and all(page.is_file() for page in pages)

    # The same command first continues the interrupted job. When it is called once more, all jobs are finished.
    last = saved_steps(tmp_path / "sweep" / "0")[-1]
    out = run(tmp_path, cache, *arguments)
    assert f"continued from step-{last}" in out and "job 2 of 2" in out and "Sweep: 2 of 2 jobs finished" in out
    results = [tmp_path / "sweep" / job / "result.json" for job in "01"]
    written = [result.stat().st_mtime_ns for result in results]
    out = run(tmp_path, cache, *arguments)
    assert out.count("finished before") == 2 and [result.stat().st_mtime_ns for result in results] == written


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_workers_at_once(tmp_path: Path, cache: str) -> None:  # noqa: F811
    # The step takes longer than the test waits.
    slow = ("train.global_batch=4096", "train.seq_len=256", "train.accumulation=64")
    process = start(tmp_path, cache, "launch.nproc=2", "run.name=stopped", *slow)
    deadline = time.monotonic() + 120
    while not (tmp_path / "stopped" / "config.yaml").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(3)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    assert process.wait(20) == 130
