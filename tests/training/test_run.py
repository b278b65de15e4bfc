import json
import os
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from common.errors import RunError
from training.config import RunConfig
from training.run import (
    _is_given,
    choose_name,
    finished_result,
    launched_directory,
    lock_run,
    prepare_directory,
    save_config,
    save_result,
    torchrun_name,
)


def config(root: Path, name: str | None = None) -> RunConfig:
    return RunConfig(experiment="exp", name=name, root=str(root))


def test_next_free_number_and_explicit_name(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "runs"
    assert [choose_name(config(root)) for _ in range(2)] == ["exp-1", "exp-2"]
    (root / "exp-1").rmdir()
    assert choose_name(config(root)) == "exp-1"
    assert choose_name(config(root, "mine")) == "mine"
    assert not (root / "mine").exists()


def test_simultaneous_launches_get_different_names(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: choose_name(config(tmp_path)), range(24)))
    assert sorted(names) == sorted(f"exp-{n}" for n in range(1, 25))


def test_torchrun_name_from_a_unique_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job/7")
    for _ in range(2):  # The second time is as after a restart.
        assert torchrun_name(config(tmp_path), lambda choose: choose()) == "exp-job-7"
    assert torchrun_name(config(tmp_path, "mine"), lambda choose: choose()) == "mine"
    # Another launch with the same id does not continue the old run.
    monkeypatch.setattr("training.run._start_time", lambda pid: "1")
    assert torchrun_name(config(tmp_path), lambda choose: choose()) == "exp-1"


def test_a_uuid_of_torchrun_is_no_name_but_one_of_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", identifier := str(uuid.uuid4()))
    monkeypatch.delenv("PET_RDZV_ID", raising=False)
    assert torchrun_name(config(tmp_path), lambda choose: choose()) == "exp-1"
    monkeypatch.setenv("PET_RDZV_ID", identifier)
    monkeypatch.setattr("training.run._start_time", lambda pid: "1")
    assert torchrun_name(config(tmp_path), lambda choose: choose()) == f"exp-{identifier}"


def test_an_id_on_the_command_line_of_the_launcher_is_the_users() -> None:
    given = str(uuid.uuid4())
    with subprocess.Popen(["sleep", "60"]) as launcher:
        assert not _is_given(given, launcher.pid)
        launcher.kill()
    with subprocess.Popen([sys.executable, "-c", "input()", "--rdzv-id", given], stdin=subprocess.PIPE) as launcher:
        assert _is_given(given, launcher.pid) and not _is_given(str(uuid.uuid4()), launcher.pid)
        launcher.kill()


@pytest.mark.parametrize("run_id", ["none", "default", ""])
def test_restarted_workers_find_the_name_of_their_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_id: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    run = config(tmp_path)
    assert launched_directory(run) is None
    first = torchrun_name(run, lambda choose: choose())
    assert first == "exp-1" and launched_directory(run) == tmp_path / first
    assert choose_name(run) == "exp-2"
    # The same launcher, which is this process's parent, after a restart.
    assert torchrun_name(run, lambda choose: choose()) == first
    # Another launcher that has the same process id later.
    monkeypatch.setattr("training.run._start_time", lambda pid: "1")
    assert torchrun_name(run, lambda choose: choose()) == "exp-3"


def test_unwritable_root_is_one_line_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for root in (file, file / "below", Path("/proc/none")):
        for attempt in (lambda run: prepare_directory(run, "a"), choose_name):
            with pytest.raises(RunError) as caught:
                attempt(config(root))
            text = str(caught.value)
            assert text.startswith(f"run.root={root}: expected a writable directory (") and "\n" not in text
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunError):
        prepare_directory(config(tmp_path), "taken")


def test_prepare_directory_leaves_nothing_behind(tmp_path: Path) -> None:
    directory = prepare_directory(config(tmp_path), "sweep-1/3")
    assert directory == tmp_path / "sweep-1" / "3" and os.listdir(directory) == []
    assert prepare_directory(config(tmp_path), "sweep-1/3") == directory


def test_finished_result(tmp_path: Path) -> None:
    assert finished_result(tmp_path, 10) is None
    result = {"status": "finished", "step": 10}
    save_result(tmp_path, result)
    assert finished_result(tmp_path, 10) == finished_result(tmp_path, 5) == result
    assert finished_result(tmp_path, 11) is None
    save_result(tmp_path, {"status": "failed", "step": 10})
    assert finished_result(tmp_path, 10) is None
    (tmp_path / "result.json").write_text("{")
    assert finished_result(tmp_path, 10) is None


def test_saved_files_read_back(tmp_path: Path) -> None:
    values = {"run": {"name": None, "lr": 1e-3}, "list": ["ä", 2]}
    assert yaml.safe_load(save_config(tmp_path, values).read_text(encoding="utf-8")) == values
    assert json.loads(save_result(tmp_path, values).read_text()) == values
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "result.json"]


def test_a_run_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    lock = lock_run(tmp_path, "mine")
    other = (
        "import sys; from pathlib import Path; from training.run import lock_run; lock_run(Path(sys.argv[1]), 'mine')"
    )
    command = [sys.executable, "-c", other, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "RunError: run.name=mine: expected a run that no other process is writing" in refused.stderr
    lock.release()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
