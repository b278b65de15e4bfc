"""Damaged files reach every reader in a process that is watched; see `tests/fuzz_readers.py`."""

import json
from pathlib import Path

import pytest

from tests.commands import run_python


@pytest.mark.slow
def test_readers_run_no_code_and_open_nothing_outside(tmp_path: Path) -> None:
    done = run_python("-m", "tests.fuzz_readers", str(tmp_path / "files"), "60")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == [] and sum(result["counts"].values()) >= 2000 and len(result["counts"]) >= 25


@pytest.mark.slow
def test_the_watch_sees_what_readers_must_not_do(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    code = """
import os, pickle, subprocess, sys
from pathlib import Path
from tests.fuzz_readers import Watch
inside = Path(sys.argv[1]) / "inside"
watch = Watch(inside)
watch.active = True
(inside / "a").write_text("x")
open(inside / "a").close()
assert watch.seen == []
attempts = (
    lambda: open(inside.parent / "b", "w"), lambda: open("/etc/hostname"), lambda: os.system("true"),
    lambda: exec("1"), lambda: subprocess.run(["true"]), lambda: os.remove(inside.parent / "b"),
    lambda: pickle.loads(pickle.dumps(os.getcwd)), lambda: open(inside / ".." / "c", "w"),
)
for attempt in attempts:
    before = len(watch.seen)
    attempt()
    assert len(watch.seen) > before
"""
    done = run_python("-c", code, str(tmp_path))
    assert done.returncode == 0, done.stderr
