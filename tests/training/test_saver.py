"""Saving in one process: in the background or at once, refusals, failures. tests/test_saving.py has those of runs."""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import CheckpointError
from training.checkpoint import checkpoint
from training.checkpoint import saver as saver_module
from training.checkpoint.manifest import committed, read_state, verify
from training.checkpoint.peers import ALONE, Peers, StalledError
from training.checkpoint.saver import Saver
from training.checkpoint.shards import write_shard
from training.config import CheckpointConfig


class Disk:
    """A disk that waits before it writes, and can be full."""

    def __init__(self) -> None:
        self.go_on, self.full = threading.Event(), False

    def write_shard(self, *arguments: Any) -> Any:
        assert self.go_on.wait(20)
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_shard(*arguments)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    slow = Disk()
    monkeypatch.setattr(checkpoint, "write_shard", slow.write_shard)
    yield slow
    slow.go_on.set()


@pytest.fixture
def saver_of(tmp_path: Path) -> Callable[..., tuple[Saver, list[str]]]:
    def build(root: str = "background", **keys: Any) -> tuple[Saver, list[str]]:
        lines: list[str] = []
        config = CheckpointConfig(**{"background": True} | keys)
        return Saver(tmp_path / root, config, ALONE, None, lines.append), lines

    return build


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(7)}


def test_a_save_in_the_background_writes_the_values_at_its_start(saver_of, disk: Disk, tmp_path: Path) -> None:
    values = tensors()
    saver, lines = saver_of()
    state = {"step": 1, "loader": {"position": 3}}
    with saver:
        saver.prepare(lambda: values)
        saver.save(1, lambda: values, state)
        state["loader"]["position"] = 4
        for tensor in values.values():
            tensor.zero_()
        saver.poll()
        assert lines == [] and saver.newest is None
        disk.go_on.set()
    assert lines[0].startswith(f"saved {tmp_path / 'background' / 'step-1'} in the background, in ")
    assert saver.newest == str(tmp_path / "background" / "step-1")
    figures = saver.take_figures()
    assert figures.keys() == {"speed/checkpoint_stall_s", "speed/checkpoint_s"} and saver.take_figures() == {}

    at_once, _ = saver_of("at_once", background=False)
    at_once.save(1, tensors, {"step": 1, "loader": {"position": 3}})
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / root / "step-1").iterdir()}
        for root in ("background", "at_once")
    ]
    assert files[0] == files[1] and len(files[0]) == 2


def test_at_most_one_save_is_in_flight(saver_of, disk: Disk, tmp_path: Path) -> None:
    saver, lines = saver_of()
    saver.save(1, tensors, {"step": 1})
    threading.Timer(0.2, disk.go_on.set).start()
    saver.save(2, tensors, {"step": 2})
    assert len(lines) == 1 and "step-1 in the background" in lines[0], "step 2 did not wait for step 1"
    saver.finish()
    assert [path.name for path in committed(tmp_path / "background")] == ["step-2", "step-1"]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_ends_the_run_or_is_a_warning(saver_of, disk: Disk, tmp_path: Path, background: bool) -> None:
    disk.go_on.set()
    for on_error in ("stop", "warn"):
        saver, lines = saver_of(on_error, on_error=on_error, background=background)
        disk.full = False
        saver.save(1, tensors, {"step": 1})
        saver.finish()
        disk.full = True

        def save_and_wait(saver: Saver = saver) -> None:
            saver.save(2, tensors, {"step": 2})
            while saver._thread is not None:
                saver.poll()

        if on_error == "stop":
            with pytest.raises(CheckpointError, match=r"No space left on device: \d+ bytes are free$"):
                save_and_wait()
        else:
            save_and_wait()
            assert lines[1].startswith("step 2 is not saved: ") and "\n" not in lines[1]
            newest = tmp_path / "warn" / "step-1"
            assert lines[1].endswith(f"(checkpoint.on_error=warn); the newest checkpoint is still {newest}")
        assert [path.name for path in (tmp_path / on_error).iterdir()] == ["step-1"]
        verify(tmp_path / on_error / "step-1")


def test_the_save_in_flight_is_finished_if_the_run_fails(saver_of, disk: Disk, tmp_path: Path) -> None:
    saver, lines = saver_of()
    with pytest.raises(KeyboardInterrupt), saver:
        saver.save(1, tensors, {"step": 1})
        threading.Timer(0.2, disk.go_on.set).start()
        raise KeyboardInterrupt
    assert lines[0] == "the checkpoint that is being written is finished first"
    assert read_state(tmp_path / "background" / "step-1") == {"step": 1}


def test_what_is_not_finite_is_refused_and_said(saver_of, tmp_path: Path) -> None:
    saver, lines = saver_of(on_error="stop")
    saver.save(1, lambda: {"w": torch.tensor([1.0, float("inf")])}, {"step": 1})
    saver.finish()
    assert lines == ["step 1 is not saved: w[0:2] has an element that is inf; there is no checkpoint yet"]
    assert list((tmp_path / "background").iterdir()) == []


def test_a_run_that_fails_does_not_wait_long_for_a_rank_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "PATIENCE_S", 0.2)
    lines: list[str] = []
    peers = Peers(dist.HashStore(), 0, 2, 60.0)
    saver = Saver(tmp_path, CheckpointConfig(background=True), peers, None, lines.append)
    saver._assignment = checkpoint.Assignment([], {})
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), saver:
        saver.save(1, dict, {})
        time.sleep(0.2)  # The thread waits for rank 1 already.
        raise KeyboardInterrupt
    assert time.monotonic() - start < 30 and lines[1].startswith(
        "a checkpoint was not saved: rank 1: no progress for 0.2 s"
    )


def test_nothing_is_expected_from_a_rank_that_has_ended_but_what_it_has_sent(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    peers = Peers(dist.HashStore(), 0, 2, 60.0)
    peers.siblings = {0: os.getpid(), 1: process.pid}
    peers._send("io/0/result/1", ["sent", None])
    assert peers.run(lambda: "own", tmp_path, lambda results: [results, None]) == ["own", "sent"]
    with pytest.raises(StalledError, match=r"^rank 1 has ended, and is waited for with a checkpoint$"):
        peers.run(lambda: "own", tmp_path)


def test_a_process_of_low_priority_saves_in_the_background(
    saver_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def setpriority(which: int, who: int, priority: int) -> None:
        if priority < 15:  # as for a process without the capability CAP_SYS_NICE
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "getpriority", lambda which, who: 15)
    monkeypatch.setattr(os, "setpriority", setpriority)
    saver, _ = saver_of()
    with saver:
        saver.save(1, tensors, {"step": 1})
    verify(tmp_path / "background" / "step-1")
