"""Ranks that do not answer: stopped, in an endless loop, behind others, or on the other side of a cut network."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.errors import TrainingFailure
from parallel.startup.launch import launch_workers, world_from_env
from parallel.startup.rendezvous import open_store
from training import hang_reports
from training.checkpoint.peers import StalledError
from training.hang_reports import Ranks, Report, blame, find_ranks
from training.hangs import INTERVAL_S, hangs_explained

HOST = "node"


def test_a_rank_that_is_stopped_in_a_save_is_named_and_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        with (
            pytest.raises(StalledError, match=r"^rank 1: no progress$"),
            hangs_explained(tmp_path, Ranks(0, [HOST] * 2, {1: process.pid}), dist.HashStore(), 4.0),
        ):
            raise StalledError("rank 1: no progress")
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        said = rf"^rank 1 \(process {process.pid}\) was stopped, and is killed: rank 1: no progress, in step 0; "
        with (
            pytest.raises(TrainingFailure, match=said),
            hangs_explained(tmp_path, Ranks(0, [HOST] * 2, {1: process.pid}), dist.HashStore(), 4.0),
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
            hangs_explained(tmp_path, Ranks(1, [HOST] * 2, {0: process.pid}), dist.HashStore(), 1.0),
        ):
            assert process.wait(timeout=20) == -signal.SIGKILL
            raise dist.DistNetworkError("Connection reset by peer")
    finally:
        process.kill()
        process.wait()


def test_a_rank_that_goes_on_in_time_is_left_alone(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        with hangs_explained(tmp_path, Ranks(1, [HOST] * 2, {0: process.pid}), dist.HashStore(), 4 * INTERVAL_S):
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(2 * INTERVAL_S)
            os.kill(process.pid, signal.SIGCONT)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_the_ranks_that_are_named_are_those_that_others_wait_for() -> None:
    ranks = Ranks(1, ["a", "a", "b", "b"], {0: 77})
    waits = {rank: Report(rank, 7, "gloo:all_reduce", "0", 40) for rank in range(4)}
    runs = Report(2, 7, place="spin (mine.py:3)")
    assert blame(waits | {2: runs}, ranks) == " for rank 2 (b), which runs spin (mine.py:3) in step 7"
    silent = " for ranks 2-3 (b), which gives no answer (blocked, or its host is down, or the network to it is cut)"
    assert blame({rank: waits[rank] for rank in (0, 1)}, ranks) == silent.replace("gives", "give")
    assert blame({rank: waits[rank] for rank in (1, 2, 3)}, ranks) == " for rank 0 (a), which gives no answer (blocked)"
    behind = waits | {3: Report(3, 6, "gloo:all_gather", "0", 39)}
    assert blame(behind, ranks) == (
        " for rank 3 (b), which waits in gloo:all_gather of step 6, number 39 of its process group, while others are "
        "in number 40"
    )
    assert blame(waits, ranks).startswith(
        ", and all ranks wait: in gloo:all_reduce of step 7 (4 ranks); connections between a, b are broken, or"
    )
    assert blame({}, ranks).startswith(" and does not reach rank 0 (a): ")


def hang(directory: str) -> str:
    """Ranks 0 and 1 wait for rank 2 in different process groups, and rank 2 does not come. Return what is said."""
    world = world_from_env()
    store = open_store(world, 30)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=3, timeout=timedelta(seconds=30))
    ranks = find_ranks(world, dist.group.WORLD)
    groups = [dist.new_group(members, timeout=timedelta(seconds=3)) for members in ([0, 1, 2], [1, 2])]
    hang_reports.COLLECT_S = 30.0  # For a machine with other work on it. Nobody waits longer than for the last report.
    dist.barrier()
    said = ""
    try:
        with hangs_explained(Path(directory), ranks, store, 3.0):
            if world.rank == 2:
                never_comes(store)
            else:
                dist.all_reduce(torch.zeros(2), group=groups[world.rank])
    except TrainingFailure as error:
        said = str(error)
    store.add("said", 1)
    while store.add("said", 0) < 3:  # Rank 0 serves the store.
        time.sleep(0.05)
    return said


def never_comes(store: dist.Store) -> None:
    while store.add("said", 0) < 2:
        pass


@pytest.mark.slow
def test_a_rank_in_an_endless_loop_is_named_with_the_function_that_it_runs(tmp_path: Path) -> None:
    said = launch_workers(hang, (str(tmp_path),), nproc=3, threads=1)
    host = socket.gethostname()
    for rank in (0, 1):
        expected = (
            rf"rank {rank} waited 3 s in gloo:all_reduce of step 0 for rank 2 \({host}\), which runs never_comes "
            r"\(test_hangs.py:\d+\) in step 0; the last collectives of the ranks that answer are in .*"
        )
        assert re.fullmatch(expected, said[rank]), said
    stack = json.loads((tmp_path / "collectives" / "rank-2.json").read_text())["stack"]
    assert any(call.startswith("hang (") for call in stack) and stack[-1].startswith("never_comes (")
