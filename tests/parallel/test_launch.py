import base64
import contextlib
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import ConfigError
from parallel.collectives import all_gather_json
from parallel.startup.launch import WorkerFailure, World, launch_workers, world_from_env
from parallel.startup.rendezvous import exposure, open_store
from parallel.startup.threads import describe_threads, set_threads, usable_cores
from scripts.cli import workers
from training.config import LaunchConfig


def report_place(offset: int) -> tuple[int, str | None, int]:
    return world_from_env().rank + offset, os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()


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
    assert launch_workers(report_place, (10,), nproc=2, threads=3) == {0: (10, "3", 3), 1: (11, "3", 3)}
    assert {name: os.environ.get(name) for name in before} == before
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in os.environ
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_workers_keep_the_threads_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch_workers(report_place, (0,), nproc=1) == {0: (0, "1", 1)}
    monkeypatch.delenv("OMP_NUM_THREADS")
    # The job before has left nothing behind.
    cores = len(os.sched_getaffinity(0))
    assert launch_workers(report_place, (0,), nproc=cores) == {rank: (rank, None, 1) for rank in range(cores)}


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of the user's, six usable cores, and torch's number of threads restored at the end."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("parallel.startup.threads.usable_cores", lambda: 6)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "variables", "ranks", "number", "source"),
    [
        (None, {}, 1, 6, "6 usable cores, 1 local process"),
        (None, {}, 4, 1, "6 usable cores, 4 local processes"),
        (None, {}, 9, 1, "6 usable cores, 9 local processes"),
        (None, {"OMP_NUM_THREADS": "2,1"}, 3, 8, "OMP_NUM_THREADS=2,1"),  # torch has read it: nothing is set
        (None, {"MKL_NUM_THREADS": "3"}, 3, 8, "MKL_NUM_THREADS=3"),
        (None, {"OMP_NUM_THREADS": "none"}, 3, 2, "6 usable cores, 3 local processes"),
        (None, {"OMP_NUM_THREADS": ""}, 3, 2, "6 usable cores, 3 local processes"),
        (5, {"OMP_NUM_THREADS": "2"}, 3, 5, "launch.threads=5"),
    ],
)
def test_the_key_comes_first_then_the_environment_then_the_cores(
    threads: None, monkeypatch: pytest.MonkeyPatch, asked: int | None, variables: dict[str, str], ranks: int,
    number: int, source: str,
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(8)
    set_threads(asked, ranks)
    assert describe_threads(asked, ranks) == f"{number} per process ({source})"


def test_launched_processes_share_the_cores_and_obey_the_key(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(8)
    workers.prepare_launched(LaunchConfig())
    assert torch.get_num_threads() == 3
    workers.prepare_launched(LaunchConfig(threads=2))
    assert torch.get_num_threads() == 2


def test_the_limit_of_the_control_group_counts(tmp_path: Path) -> None:
    membership, group = tmp_path / "cgroup", tmp_path / "user.slice" / "job"
    group.mkdir(parents=True)
    cores = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path, membership) == cores  # no control groups
    membership.write_text("1:name=systemd:/other\n0::/user.slice/job\n")
    (group / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path, membership) == cores
    (group.parent / "cpu.max").write_text("190000 100000\n")
    assert usable_cores(tmp_path, membership) == 1
    (group.parent / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path, membership) == 1


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


def test_forked_workers_import_nothing_again_and_have_the_environment_of_their_launch(tmp_path: Path) -> None:
    (tmp_path / "imported_once.py").write_text(
        "import os\nimporter = os.getpid()\ndef is_forked():\n    return importer == os.getppid()\n"
    )
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel" / "__init__.py").write_text("raise SystemExit('the package of the current directory')")
    script = tmp_path / "scripts" / "launcher.py"
    script.parent.mkdir()
    script.write_text(
        "import os\n"
        "from parallel.startup.launch import launch_workers, preload_workers\n"
        "from tests.parallel.test_launch import report_place\n"
        "if __name__ == '__main__':\n"
        "    preload_workers(['imported_once'])\n"
        "    os.environ['PYTHONPATH'] = 'changed'\n"
        "    print(launch_workers(report_place, (10,), nproc=2, threads=3, preloaded=True))\n"
        "    print(launch_workers(os.getenv, ('PYTHONPATH',), nproc=1, preloaded=True))\n"
        "    import imported_once\n"
        "    print(launch_workers(imported_once.is_forked, (), nproc=1, preloaded=True))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{os.getcwd()}:{tmp_path}", "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120
    )
    expected = "{0: (10, '3', 3), 1: (11, '3', 3)}\n{0: 'changed'}\n{0: True}\n"
    assert (result.stdout, result.stderr) == (expected, "")


SLEEPERS = """
from parallel.startup.launch import begin_process
if __name__ in ("__main__", "__mp_main__"):
    begin_process()
import sys
from parallel.startup.launch import launch_workers, preload_workers
from tests.parallel.test_launch import sleep_and_leave_pid
if __name__ == "__main__":
    directory, nproc, preloaded = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
    if preloaded:
        preload_workers(["tests.parallel.test_launch"])
    launch_workers(sleep_and_leave_pid, (directory,), nproc=nproc, threads=1, preloaded=preloaded)
"""


@contextlib.contextmanager
def sleeping_workers(tmp_path: Path, nproc: int, preloaded: bool) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process that launches workers, each of which leaves its pid in the directory and sleeps.

    The temporary files of the launch are in `tmp_path / "tmp"`.
    """
    script, pids, temporary = tmp_path / "sleepers.py", tmp_path / "pids", tmp_path / "tmp"
    script.write_text(SLEEPERS)
    pids.mkdir()
    temporary.mkdir()
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "TMPDIR": str(temporary)}
    launcher = subprocess.Popen([sys.executable, script, pids, str(nproc), str(preloaded)], env=environment)
    try:
        yield launcher, pids
    finally:
        launcher.kill()
        launcher.wait()


@pytest.mark.parametrize(
    ("number", "status", "preloaded"),
    [
        (signal.SIGINT, -2, True),
        *(
            pytest.param(number, status, preloaded, marks=pytest.mark.slow)
            for number, status, preloaded in (
                (signal.SIGINT, -2, False),
                (signal.SIGTERM, 128 + 15, False),
                (signal.SIGTERM, 128 + 15, True),
                (signal.SIGKILL, -9, False),
                (signal.SIGKILL, -9, True),
            )
        ),
    ],
)
def test_no_worker_outlives_the_launcher(tmp_path: Path, number: signal.Signals, status: int, preloaded: bool) -> None:
    with sleeping_workers(tmp_path, 2, preloaded) as (launcher, pids):
        assert _wait(lambda: len(os.listdir(pids)) == 2, 60)
        workers = [int(name) for name in os.listdir(pids)]
        launcher.send_signal(number)
        assert launcher.wait(20) == status
        assert _wait(lambda: not any(_alive(pid) for pid in workers), 5)
    if number != signal.SIGKILL:
        assert _wait(lambda: not any((tmp_path / "tmp").iterdir()), 5), list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("nproc", "preloaded"),
    [
        (2, False),
        pytest.param(2, True, marks=pytest.mark.slow),
        pytest.param(4, False, marks=pytest.mark.slow),
        pytest.param(4, True, marks=pytest.mark.slow),
    ],
)
def test_workers_that_import_torch_die_with_the_launcher(tmp_path: Path, nproc: int, preloaded: bool) -> None:
    with sleeping_workers(tmp_path, nproc, preloaded) as (launcher, _):
        # Processes of multiprocessing: a tracker, then the workers, or the one that they are forked from.
        assert _wait(lambda: len(children(launcher.pid)) >= (2 if preloaded else nproc + 1), 60)
        time.sleep(0.3)
        started = children(launcher.pid)
        launcher.kill()
        launcher.wait()
        assert _wait(lambda: not any(_alive(pid) for pid in started), 3), started  # On a quiet machine: 1 s.


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
    monkeypatch.setenv("RANK", "5")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK=: expected an integer from 0 to 1 in the environment"):
        world_from_env()
    # One process needs no launcher's variables, and without RANK none of them describes this process.
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert world_from_env() == World(0, 0, 1, 1, 3)
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert world_from_env() == World() and isinstance(open_store(World(), 1.0), dist.HashStore)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"^MASTER_PORT=: expected a port in the environment"):
        open_store(World(5, 0, 8, 1), 1.0)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match=r"^WORLD_SIZE=many: expected an integer >= 1 in the environment"):
        world_from_env()


def test_ranks_of_agents_that_count_restarts_differently_share_a_store(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    first, joined = (open_store(World(rank, 0, 2, 1, restart_count=1 - rank), 5.0) for rank in (0, 1))
    first.set("name", "run")
    assert joined.get("name") == b"run"


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


class Planted:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def attack_and_report(directory: str) -> list[str]:
    """On rank 0: return where the launch listens, and write a pickle for the agent's rendezvous into every store.

    Every rank joins a gloo group, so that all sockets of a run are open.
    """
    world = world_from_env()
    assert exposure(world) is None
    store = open_store(world, 30)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.world_size)
    by_rank = all_gather_json({"ranks": (world.rank,) * (1 + 9 * world.rank), "nan": math.nan})
    assert by_rank == [{"ranks": [rank] * (1 + 9 * rank), "nan": None} for rank in range(world.world_size)]
    sockets = []
    if world.rank == 0:
        pids = [os.getppid(), *children(os.getppid())]
        sockets = sorted(place for pid in pids for place in listening(pid))
        ports = [int(place.rpartition(":")[2]) for place in listening(os.getppid())]
        state = base64.b64encode(pickle.dumps(Planted(f"{directory}/ran")))
        for port in {*ports, int(os.environ["MASTER_PORT"])}:
            with contextlib.suppress(RuntimeError):
                client = dist.TCPStore("localhost", port, timeout=timedelta(seconds=1))
                client.set(f"torch.rendezvous.{os.environ['TORCHELASTIC_RUN_ID']}", state)
        time.sleep(1)  # The agent reads the rendezvous ten times a second.
    dist.barrier()
    dist.destroy_process_group()
    return sockets


def children(pid: int) -> list[int]:
    """Return all descendants of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    with contextlib.suppress(OSError):
        own = [int(child) for task in tasks for child in task.read_text().split()]
        return own + [descendant for child in own for descendant in children(child)]
    return []


def listening(pid: int) -> set[str]:
    """Return the addresses, `ADDRESS:PORT`, on which a process listens."""
    found: set[str] = set()
    with contextlib.suppress(OSError):
        opened = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists() or link.is_symlink()}
        for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in opened:
                    address, port = fields[1].split(":")
                    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                    found.add(f"{socket.inet_ntop(family, b''.join(words))}:{int(port, 16)}")
    return found


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux's /proc")
def test_a_launch_on_one_host_listens_on_loopback_only_and_unpickles_nothing_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    sockets = launch_workers(attack_and_report, (str(tmp_path),), nproc=2, threads=1)[0]
    assert len(sockets) >= 3  # the store, and gloo's of each rank
    assert {place.rpartition(":")[0] for place in sockets} == {"127.0.0.1"}
    assert not (tmp_path / "ran").exists()


def test_a_public_address_of_several_hosts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    several = World(rank=0, world_size=4, local_world_size=2)
    for address, warned in (("8.8.8.8", True), ("10.0.0.1", False), ("localhost", False), ("2606:4700::1", True)):
        monkeypatch.setenv("MASTER_ADDR", address)
        line = exposure(several)
        assert (line is not None and line.startswith(f"warning: MASTER_ADDR={address} is a public address")) == warned
    assert exposure(World(world_size=4, local_world_size=4)) is None
    assert all_gather_json({"alone": (1, 2)}) == [{"alone": [1, 2]}]


@pytest.mark.slow
def test_the_documented_torchrun_line_listens_on_loopback_only(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "from tests.parallel.test_launch import attack_and_report\n"
        "sockets = attack_and_report(sys.argv[1])\n"
        "if os.environ['RANK'] == '0':\n"
        "    pathlib.Path(sys.argv[1], 'sockets').write_text(json.dumps(sockets))\n"
    )
    private = ("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--nproc-per-node", "2")
    removed = ("GLOO_SOCKET_IFNAME",)
    environment = {name: value for name, value in os.environ.items() if name not in removed} | {
        "PYTHONPATH": os.getcwd(),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "torch.distributed.run", *private, script, tmp_path]
    subprocess.run(command, env=environment, check=True, timeout=180)
    sockets = json.loads((tmp_path / "sockets").read_text())
    assert len(sockets) >= 3 and {place.rpartition(":")[0] for place in sockets} == {"127.0.0.1"}
    assert not (tmp_path / "ran").exists()
