"""How commands end that are interrupted: Ctrl-C, and a reader of stdout that has ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.cli.command_line import end
from tests.commands import ROOT
from tests.test_train import TINY


def start(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start Python in a new session, so that a signal can be sent to its process group, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def test_ctrl_c_has_its_status_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as stop:
        end(KeyboardInterrupt(), [])
    assert stop.value.code == 130 and capfd.readouterr() == ("", "")


def test_a_pipe_without_a_reader_ends_a_command_silently() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start("scripts/describe.py", "--help", stdout=writer)
    os.close(writer)
    assert (process.communicate(timeout=120)[1], process.returncode) == ("", 141)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_prints_how_to_resume(tmp_path: Path, processes: int) -> None:
    process = start(
        "train.py", *TINY, f"data.cache={tmp_path / 'cache'}", f"run.root={tmp_path}", "run.name=stopped",
        f"launch.nproc={processes}", "checkpoint.every=2", "train.steps=100000", "telemetry.forecast=false",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "stopped" / "checkpoints" / "step-2").is_dir():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "")
    *_, checkpoint, resume, report = out.splitlines()
    assert checkpoint.split()[:1] == ["checkpoint"] and "stopped/checkpoints/step-" in checkpoint
    assert resume.split()[0] == "resume" and resume.endswith("run.name=stopped train.steps=100000")
    page = tmp_path / "stopped" / "report.html"
    assert report == f"report until here: {page}" and "The run was ended by SIGINT." in page.read_text(encoding="utf-8")
