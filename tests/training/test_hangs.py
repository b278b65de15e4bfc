"""A rank that is stopped while another one waits for its part of a checkpoint."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from common.errors import TrainingFailure
from training.checkpoint.peers import StalledError
from training.hangs import INTERVAL_S, hangs_explained


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
        said = rf"^rank 1 \(process {process.pid}\) was stopped, and is killed: rank 1: no progress, in step 0; "
        with (
            pytest.raises(TrainingFailure, match=said),
            hangs_explained(tmp_path, 0, {1: process.pid}, 4.0),
        ):
            raise StalledError("rank 1: no progress")
        assert process.wait(timeout=10) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()


def test_a_rank_that_is_stopped_is_killed_although_no_collective_fails(tmp_path: Path) -> None:
    """As if this rank waited for the store that the stopped rank serves: it goes on when the connection breaks."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        os.kill(process.pid, signal.SIGSTOP)
        said = rf"^rank 0 \(process {process.pid}\) was stopped, and is killed: rank 1 waited 1 s for it in step 0; "
        with (
            pytest.raises(TrainingFailure, match=said),
            hangs_explained(tmp_path, 1, {0: process.pid, 1: os.getpid()}, 1.0),
        ):
            assert process.wait(timeout=20) == -signal.SIGKILL
            raise dist.DistNetworkError("Connection reset by peer")
    finally:
        process.kill()
        process.wait()


def test_a_rank_that_goes_on_in_time_is_left_alone(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        with hangs_explained(tmp_path, 1, {0: process.pid}, 4 * INTERVAL_S):
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(2 * INTERVAL_S)
            os.kill(process.pid, signal.SIGCONT)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
