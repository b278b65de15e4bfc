import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.startup.launch import WorkerFailure, World, launch_workers, world_from_env


def report_place(offset: int) -> tuple[int, str]:
    return world_from_env().rank + offset, os.environ["OMP_NUM_THREADS"]


def rank_1_refuses() -> None:
    if world_from_env().rank == 1:
        raise SystemExit(2) from ValueError("model.dim=1: expected 2")
    time.sleep(60)


def rank_1_has_a_bug() -> None:
    if world_from_env().rank == 1:
        raise RuntimeError("the bug")
    time.sleep(60)


def rank_1_is_killed_once() -> int:
    import torch
    import torch.distributed as dist

    world = world_from_env()
    dist.init_process_group("gloo")
    total = torch.tensor([1.0])
    dist.all_reduce(total)
    if world.rank == 1 and world.restart_count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return world.restart_count * 100 + int(total.item())


def sleep_and_leave_pid(directory: str) -> None:
    (Path(directory) / str(os.getpid())).touch()
    time.sleep(120)


def test_results_by_rank_and_threads() -> None:
    before = dict(os.environ)
    assert launch_workers(report_place, (10,), nproc=2, threads=3) == {0: (10, "3"), 1: (11, "3")}
    assert {name: os.environ.get(name) for name in before} == before
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in os.environ
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_refusal_carries_its_line() -> None:
    with pytest.raises(WorkerFailure) as refused:
        launch_workers(rank_1_refuses, (), nproc=2, threads=1)
    assert (refused.value.exitcode, refused.value.message) == (2, "model.dim=1: expected 2")


@pytest.mark.slow
def test_a_bug_carries_its_traceback() -> None:
    with pytest.raises(WorkerFailure) as bug:
        launch_workers(rank_1_has_a_bug, (), nproc=2, threads=1)
    assert bug.value.exitcode == 1
    assert bug.value.message.startswith("Traceback") and "RuntimeError: the bug" in bug.value.message


@pytest.mark.slow
def test_killed_worker_is_restarted_with_its_group() -> None:
    assert launch_workers(rank_1_is_killed_once, (), nproc=2, max_restarts=1, threads=1) == {0: 104, 1: 104}


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 128 + 15, marks=pytest.mark.slow)]
)
def test_no_worker_outlives_the_launcher(tmp_path: Path, number: signal.Signals, status: int) -> None:
    code = (
        "from parallel.startup.launch import launch_workers\n"
        "from tests.parallel.test_launch import sleep_and_leave_pid\n"
        "if __name__ == '__main__':\n"
        f"    launch_workers(sleep_and_leave_pid, ({str(tmp_path)!r},), nproc=2, threads=1)\n"
    )
    script = tmp_path.parent / f"{tmp_path.name}.py"
    script.write_text(code)
    launcher = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": os.getcwd()})
    try:
        assert _wait(lambda: len(os.listdir(tmp_path)) == 2, 60)
        workers = [int(name) for name in os.listdir(tmp_path)]
        launcher.send_signal(number)
        assert launcher.wait(20) == status
        assert _wait(lambda: not any(_alive(pid) for pid in workers), 5)
    finally:
        launcher.kill()
        launcher.wait()


def test_world_from_env(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert world_from_env() == World(0, 0, 1, 1, 0)
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert world_from_env() == World(5, 1, 8, 4, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert world_from_env() == World(5, 1, 8, 2, 3)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(ValueError, match=r"^RANK=8: expected an integer from 0 to 7 in the environment"):
        world_from_env()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match=r"^WORLD_SIZE=many: expected an integer >= 1 in the environment"):
        world_from_env()


def _wait(holds: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.1)
    return False


def _alive(pid: int) -> bool:
    try:
        # A zombie has ended, although its parent has not waited for it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
