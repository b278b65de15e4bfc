"""Who makes, locks and removes the directory of a run."""

import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import RunError
from training import owner as owner_module
from training.config import RunConfig
from training.owner import (
    LAUNCH_FILE,
    LOCK_FILE,
    SWEEP_TABLE,
    RunOwner,
    _find,
    _is_given,
    join_run,
    launch_identity,
    run_token,
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "PATIENCE_S", 0.0)


def config(root: Path, name: str | None = None) -> RunConfig:
    return RunConfig(experiment="exp", name=name, root=str(root))


def claim(root: Path, name: str | None = None) -> str:
    """Claim a run and keep its directory."""
    with RunOwner() as owner:
        return owner.claim(config(root, name))


def claim_launched(root: Path, name: str | None = None) -> str:
    with RunOwner() as owner:
        return owner.claim_launched(config(root, name))


def refuse(root: Path, name: str | None = None) -> None:
    """Claim a run that is refused before it starts."""
    with pytest.raises(KeyError), RunOwner() as owner:
        owner.claim(config(root, name))
        raise KeyError


def test_next_free_number_and_explicit_name(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "runs"
    assert [claim(root) for _ in range(2)] == ["exp-1", "exp-2"]
    (root / "exp-1" / LOCK_FILE).unlink()
    (root / "exp-1").rmdir()
    assert claim(root) == "exp-1"
    assert claim(root, "mine") == "mine" and claim(root, "sweep/3") == "sweep/3"
    assert os.listdir(root / "sweep" / "3") == [LOCK_FILE]


def test_a_name_that_a_file_has_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "exp-1").write_text("")
    (tmp_path / "exp-2").symlink_to(tmp_path / "missing")
    assert claim(tmp_path) == "exp-3"
    with pytest.raises(RunError, match=r"^run.name=exp-2: .* is not a directory$"):
        claim(tmp_path, "exp-2")


def test_simultaneous_launches_get_different_names(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: claim(tmp_path), range(24)))
    assert sorted(names) == sorted(f"exp-{n}" for n in range(1, 25))


def test_a_name_from_a_unique_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job/7")
    for _ in range(2):  # The second time is as after a restart.
        assert claim_launched(tmp_path) == "exp-job-7"
    assert claim_launched(tmp_path, "mine") == "mine"
    # Another launch with the same id does not continue the old run.
    monkeypatch.setattr("training.owner._start_time", lambda pid: "1")
    assert claim_launched(tmp_path) == "exp-1"


def test_a_uuid_of_torchrun_is_no_name_but_one_of_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", identifier := str(uuid.uuid4()))
    monkeypatch.delenv("PET_RDZV_ID", raising=False)
    assert claim_launched(tmp_path) == "exp-1"
    monkeypatch.setenv("PET_RDZV_ID", identifier)
    monkeypatch.setattr("training.owner._start_time", lambda pid: "1")
    assert claim_launched(tmp_path) == f"exp-{identifier}"


def test_an_id_on_the_command_line_of_the_launcher_is_the_users() -> None:
    given = str(uuid.uuid4())
    for arguments, is_given in (([], False), (["--rdzv-id", given], True)):
        command = [sys.executable, "-c", "print(flush=True); input()", *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
            # Before its first line, /proc may still have no command line of a process that has just been started.
            assert launcher.stdout is not None and launcher.stdout.readline()
            assert _is_given(given, launcher.pid) == is_given and not _is_given(str(uuid.uuid4()), launcher.pid)
            launcher.kill()


@pytest.mark.parametrize("run_id", ["none", "default", ""])
@pytest.mark.parametrize("experiment", ["exp", "group/exp"])
def test_restarted_workers_find_the_name_of_their_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_id: str, experiment: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    run = RunConfig(experiment=experiment, root=str(tmp_path))

    def name() -> str:
        with RunOwner() as owner:
            return owner.claim_launched(run)

    assert _find(run, launch_identity()) is None
    first = name()
    assert first == f"{experiment}-1" == _find(run, launch_identity())
    with RunOwner() as owner:
        assert owner.claim(run) == f"{experiment}-2"
    # The same launcher, which is this process's parent, after a restart.
    assert name() == first
    # Another launcher that has the same process id later.
    monkeypatch.setattr("training.owner._start_time", lambda pid: "1")
    assert name() == f"{experiment}-3"


def test_unwritable_root_is_one_line_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for root in (file, file / "below", Path("/proc/none")):
        for name in ("a", None):
            with pytest.raises(RunError) as caught:
                claim(root, name)
            text = str(caught.value)
            assert text.startswith(f"run.root={root}: expected a writable directory (") and "\n" not in text
    with pytest.raises(RunError, match=r"\(Not a directory\)$"):
        claim(tmp_path, "file")


@pytest.mark.parametrize("kind", ["directory", "named pipe", "symbolic link"])
def test_a_lock_that_is_no_file_is_one_line_and_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / "a" / LOCK_FILE
    lock.parent.mkdir()
    if kind == "directory":
        lock.mkdir()
    elif kind == "named pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to("/dev/zero")
    for attempt in (lambda: claim(tmp_path, "a"), lambda: join_run(lock.parent, "a")):
        with pytest.raises(RunError) as caught:
            attempt()
        assert str(caught.value).endswith(f"({lock} is a {kind}, not a regular file)")
    assert run_token(lock.parent) == "" and os.path.lexists(lock)


@pytest.mark.parametrize("name", [".", "..", "./a", "a/.", "a/", "a//b", "/a", "../a", "a/../b", "a\nb", " a", ""])
def test_names_that_are_no_path_below_the_root_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"^name=.*: expected the name of a directory below run.root"):
        config(tmp_path, name)


def test_a_run_is_in_no_other_run_and_is_no_sweep(tmp_path: Path) -> None:
    claim(tmp_path, "other")
    for name in ("other/checkpoints", "other/checkpoints/step-2", "other/wandb", f"other/{LOCK_FILE}"):
        with pytest.raises(RunError) as caught:
            claim(tmp_path, name)
        line = f"run.name={name}: expected a name outside of other runs; {tmp_path}/other is a run"
        assert str(caught.value) == line and os.listdir(tmp_path / "other") == [LOCK_FILE]
    with RunOwner(sweep=True) as sweep:
        sweep.claim(config(tmp_path, "sweep"))
        assert claim(tmp_path, "sweep/0") == "sweep/0"
        with pytest.raises(RunError, match=r"^run.name=sweep: expected a run that no other process is writing"):
            RunOwner(sweep=True).claim(config(tmp_path, "sweep"))
    with pytest.raises(RunError, match=r"^run.name=sweep: expected the name of a run; .*/sweep is a sweep$"):
        claim(tmp_path, "sweep")
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / SWEEP_TABLE).touch()
    with pytest.raises(RunError, match=r"is a sweep$"):
        claim(tmp_path, "older")
    with pytest.raises(RunError, match=r"^run.name=other: expected the name of a sweep; .*/other is a run$"):
        RunOwner(sweep=True).claim(config(tmp_path, "other"))


def test_a_refused_start_removes_what_it_made_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(tmp_path)
    refuse(tmp_path, "mine")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with pytest.raises(KeyError), RunOwner() as owner:
        owner.claim_launched(config(tmp_path))
        assert sorted(os.listdir(tmp_path / "exp-job")) == [LOCK_FILE, LAUNCH_FILE]
        raise KeyError
    assert os.listdir(tmp_path) == []
    # A directory of the user's, a run that has started, and one that an earlier launch has made.
    (tmp_path / "users").mkdir()
    refuse(tmp_path, "users")
    assert os.listdir(tmp_path / "users") == []
    with pytest.raises(KeyError), RunOwner() as owner:
        owner.claim(config(tmp_path, "started"))
        (tmp_path / "started" / "config.yaml").touch()
        raise KeyError
    assert sorted(os.listdir(tmp_path / "started")) == [LOCK_FILE, "config.yaml"]
    claim(tmp_path, "earlier")
    refuse(tmp_path, "earlier")
    assert os.listdir(tmp_path / "earlier") == []


def test_a_start_beside_a_run_is_refused_and_removes_nothing(tmp_path: Path) -> None:
    with RunOwner() as owner:
        owner.claim(config(tmp_path, "mine"))
        token = run_token(tmp_path / "mine")
        assert len(token) == 32
        for _ in range(20):
            with pytest.raises(RunError) as caught, RunOwner() as other:
                other.claim(config(tmp_path, "mine"))
            line = f"run.name=mine: expected a run that no other process is writing; {tmp_path}/mine is in use"
            assert str(caught.value) == line and other.directory is None
        assert run_token(tmp_path / "mine") == token
    with RunOwner() as owner:
        owner.claim(config(tmp_path, "mine"))
        assert run_token(tmp_path / "mine") != token


HOLD = """
import sys; from pathlib import Path; from training.owner import join_run
lock = join_run(Path(sys.argv[1]), "mine"); print(flush=True); sys.stdin.read()
"""


def test_the_directory_stays_locked_while_a_worker_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = None
    with pytest.raises(KeyError), RunOwner() as owner:
        owner.claim(config(tmp_path, "mine"))
        command = [sys.executable, "-c", HOLD, str(tmp_path / "mine")]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert worker.stdout is not None and worker.stdin is not None and worker.stdout.readline()
        raise KeyError  # The launcher ends first. It removes nothing while another process shares the lock.
    assert worker is not None
    with pytest.raises(RunError, match=r"is in use$"):
        claim(tmp_path, "mine")
    monkeypatch.setattr(owner_module, "PATIENCE_S", 60.0)
    threading.Timer(0.2, worker.kill).start()
    assert claim(tmp_path, "mine") == "mine"  # It has waited for the end of the worker.
    worker.wait()


def race(root: Path, name: str | None, seconds: float, starts: bool, running: list[str], wrong: list[str]) -> int:
    """Start runs again and again, as one of several launches. A run that starts writes a file and expects to find it,
    and nobody else's, until its end. Returns the number of runs that were not refused."""
    deadline, mine, claimed = time.monotonic() + seconds, str(threading.get_ident()), 0
    while time.monotonic() < deadline:
        try:
            with RunOwner() as owner:
                owner.claim(config(root, name))
                claimed += 1
                directory = owner.directory
                assert directory is not None
                running.append(str(directory))
                if running.count(str(directory)) > 1:
                    wrong.append("two owners")
                if starts:
                    (directory / mine).touch()
                    time.sleep(0.001)
                    if set(os.listdir(directory)) != {LOCK_FILE, mine}:
                        wrong.append(f"found {os.listdir(directory)}")
                    (directory / mine).unlink()
                running.remove(str(directory))
                raise KeyError
        except (KeyError, RunError):
            continue
        except OSError as error:
            wrong.append(repr(error))
    return claimed


@pytest.mark.parametrize("name", ["mine", None])
def test_races_of_refused_and_running_starts(tmp_path: Path, name: str | None) -> None:
    running: list[str] = []
    wrong: list[str] = []
    with ThreadPoolExecutor(6) as pool:
        launches = [pool.submit(race, tmp_path, name, 1.0, starts, running, wrong) for starts in (True, False) * 3]
        claimed = [launch.result() for launch in launches]
    assert wrong == [] and sum(claimed) > 50
    # At most an empty directory is left: one launch did not remove it, because another one had already claimed it.
    assert [name for path in tmp_path.iterdir() for name in os.listdir(path)] == []
