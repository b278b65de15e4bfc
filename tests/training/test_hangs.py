"""A rank that is stopped while another one waits for its part of a checkpoint."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from common.errors import TrainingFailure
from training.checkpoint.peers import StalledError
from training.hangs import hangs_explained


def test_a_rank_that_is_stopped_in_a_save_is_named_and_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        with (
            pytest.raises(StalledError, match=r"^rank 1: no progress$"),
            hangs_explained(tmp_path, 0, {1: process.pid}, 4.0),
        ):
            raise StalledError("rank 1: no progress")
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        said = rf"^rank 1 \(process {process.pid}\) was stopped, and is killed: rank 1: no progress$"
        with (
            pytest.raises(TrainingFailure, match=said),
            hangs_explained(tmp_path, 0, {1: process.pid}, 4.0),
        ):
            raise StalledError("rank 1: no progress")
        assert process.wait(timeout=10) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
