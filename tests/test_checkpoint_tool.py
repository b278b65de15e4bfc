"""`scripts/checkpoint.py` on checkpoints of several steps: what each action prints, deletes and refuses."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts import checkpoint as tool
from training.checkpoint.checkpoint import save
from training.checkpoint.manifest import committed
from training.checkpoint.peers import ALONE
from training.checkpoint.remote import RemoteCheckpoints
from training.owner import LOCK_FILE, DirectoryLock

Call = Callable[..., tuple[int, list[list[str]], str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 10, 20 and 30. `model.b` is the same in all."""
    for step in (10, 20, 30):
        tensors = {
            "model.a": torch.full((4, 3), float(step)),
            "model.b": torch.tensor([float("1.5")], dtype=torch.bfloat16),
            "exp_avg.a": torch.full((4, 3), step / 2),
            "count": torch.tensor(step),
        }
        state = {"step": step, "heldout_loss": 5 - step / 10, "config": {"parallel": {"expert": 2, "tensor": 1}}}
        save(tmp_path / "run" / "checkpoints", step, tensors, state, keep=9)
    return tmp_path / "run"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path) -> Call:
    def called(*arguments: str, where: Path | str = run) -> tuple[int, list[list[str]], str]:
        """Run the tool, and return its exit status, the words of each line that it prints, and its stderr."""
        monkeypatch.setattr(sys, "argv", ["checkpoint.py", f"run={where}", *arguments])
        with pytest.raises(SystemExit) as ended:
            tool.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), [line.split() for line in printed.out.splitlines()], printed.err

    return called


def damage(run: Path, step: int) -> Path:
    (shard,) = (run / "checkpoints" / f"step-{step}").glob("rank-*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    return shard


def test_show(call: Call, run: Path) -> None:
    (run / "checkpoints" / "step-20" / "manifest.json").write_text("{}")
    status, lines, _ = call("action=show")
    rows = {words[0]: words for words in lines if words and words[0] in ("10", "20", "30")}
    # 13 model parameters: 12 of `a` and 1 of `b`. The layout has the axes of more than one rank.
    assert status == 0 and rows.keys() == {"10", "30"}
    assert rows["30"][-5:] == ["1", "4", "13", "expert=2", "2.0000"]
    assert [words[:2] for words in lines if words and words[0] == "damaged:"] == [
        ["damaged:", str(run / "checkpoints" / "step-20" / "manifest.json") + ":"]
    ]
    status, lines, _ = call("action=show", "step=30")
    assert ["model.a", "F32", "4", "x", "3", "1", "0"] in lines and ["count", "I64", "scalar", "1", "0"] in lines


def test_verify(call: Call, run: Path) -> None:
    status, lines, _ = call("action=verify")
    assert status == 0 and [words[:3] for words in lines] == [[f"step-{n}", "is", "intact:"] for n in (30, 20, 10)]
    shard = damage(run, 20)
    status, lines, error = call("action=verify")
    assert status == 2 and lines[1][:4] == ["step-20", "is", "damaged:", f"{shard}:"]
    assert error == f"error: {run / 'checkpoints'}: 1 of 3 checkpoints are damaged: step-20\n"
    assert call("action=verify", "step=30")[0] == 0 and call("action=verify", "step=20")[0] == 2


def test_diff(call: Call, run: Path, tmp_path: Path) -> None:
    status, lines, _ = call("action=diff")
    # From 20 to 30: |20 - 30| / |20| = 0.5, for `exp_avg.a`, too; the counter is 20 and 30.
    assert status == 0 and ["equal", "bits", "1", "of", "4"] in lines
    assert ["model.a", "5.000e-01", "1.000e+01"] in lines and ["exp_avg.a", "5.000e-01", "5.000e+00"] in lines
    status, lines, _ = call("action=diff", "step=10", "other=30", "limit=1")
    assert status == 0 and ["from", str(run / "checkpoints" / "step-30")] in lines
    assert ["Tensors", "that", "differ", "most", "(1", "of", "3)"] in lines
    other = tmp_path / "other"
    save(other / "checkpoints", 30, {"model.a": torch.ones(4, 3)}, {"step": 30}, keep=9)
    status, _, error = call("action=diff", f"other_run={other}")
    assert status == 2 and "3 tensors missing that" in error and error.count("\n") == 1


def test_tensors_that_differ_in_the_sign_of_zero_come_last(call: Call, tmp_path: Path) -> None:
    for step, sign, one in ((1, 1.0, 1.0), (2, -1.0, 1.1)):
        tensors = {"a": sign * torch.zeros(2), "b": torch.full((2,), one), "c": torch.full((2,), one**20)}
        save(tmp_path / "zeros" / "checkpoints", step, tensors, {"step": step}, keep=9)
    _, lines, _ = call("action=diff", where=tmp_path / "zeros")
    assert [words[0] for words in lines[-3:]] == ["c", "b", "a"] and lines[-1][1:] == ["0.000e+00", "0.000e+00"]


def test_prune(call: Call, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(run, 30)
    status, lines, _ = call("action=prune", "keep=1", "keep_every=10")
    assert status == 0 and lines[-1][:3] == ["3", "checkpoints", "are"], "damaged or not, every 10th is kept"
    status, lines, _ = call("action=prune", "keep=1")
    assert status == 0 and [words[1] for words in lines[:-1]] == ["step-30:", "step-10:"]
    assert [path.name for path in committed(run / "checkpoints")] == ["step-20"]
    damage(run, 20)
    status, _, error = call("action=prune")
    assert (status, error) == (2, f"error: {run / 'checkpoints'}: expected an intact checkpoint; nothing is deleted\n")
    lock = DirectoryLock.acquire(run / LOCK_FILE)
    assert lock is not None
    status, _, error = call("action=prune")
    assert (status, error) == (2, f"error: run={run}: expected a run that no process is writing\n")
    lock.release()
    (run / LOCK_FILE).unlink()
    monkeypatch.setattr(os, "open", refuse)
    status, _, error = call("action=prune")
    assert (status, error) == (
        2,
        f"error: run={run}: expected a directory that can be written (Read-only file system)\n",
    )


def refuse(*arguments: object) -> int:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_mistakes_are_one_line(call: Call, run: Path, tmp_path: Path) -> None:
    for arguments, message in {
        ("action=show", "step=7"): f"step=7: expected a step of {run}: 10, 20, 30",
        (
            "action=diff",
            "step=10",
        ): f"other=null: expected a step; {run / 'checkpoints' / 'step-10'} has no checkpoint ",
        ("action=list",): "action=list: expected ",
        ("action=show", "other=1"): "other=1: expected null unless action=diff",
        ("action=prune", "keep=0"): "keep=0: expected an integer >= 1",
        ("action=show", "stpe=3"): "stpe=3: ",
    }.items():
        status, lines, error = call(*arguments)
        assert (status, lines, error.count("\n")) == (2, [], 1) and error.startswith(f"error: {message}"), error
    for action, end in (("show", ", or its URL"), ("prune", "")):
        status, _, error = call(f"action={action}", where=tmp_path / "none")
        line = f"error: run={tmp_path / 'none'}: expected a run's directory with checkpoints{end}\n"
        assert (status, error) == (2, line)


def test_copies_in_a_store(call: Call, run: Path, tmp_path: Path) -> None:
    url, remote = f"file://{tmp_path}/store/run", RemoteCheckpoints(f"file://{tmp_path}/store", "run")
    status, _, error = call("action=show", where=url)
    assert (status, error) == (2, f"error: run={url}: expected a run's directory with checkpoints, or its URL\n")
    for path in committed(run / "checkpoints"):
        remote.upload(path, ALONE)
    shard = damage(tmp_path / "store" / "run", 20)
    status, lines, _ = call("action=verify", where=url)
    assert status == 2 and [words[:3] for words in lines] == [
        ["step-30", "is", "intact:"], ["step-20", "is", "damaged:"], ["step-10", "is", "intact:"]
    ]  # fmt: skip
    assert lines[1][3] == f"{remote.url_of(20)}/{shard.name}:"
    assert call("action=verify", "step=30", where=url)[0] == 0
    (shard.parent / "manifest.json").unlink()
    status, lines, _ = call("action=show", where=url)
    rows = {words[0]: words for words in lines if words and words[0] in ("10", "20", "30")}
    assert status == 0 and rows.keys() == {"10", "30"} and rows["30"][-5:] == ["1", "4", "13", "expert=2", "2.0000"]
    assert [words[1] for words in lines if words and words[0] == "damaged:"] == [f"{remote.url_of(20)}:"]
    status, lines, _ = call("action=show", "step=30", where=url)
    assert ["model.a", "F32", "4", "x", "3", "1", "0"] in lines
    for action, where, message in (
        ("prune", url, f"run={url}: expected a directory (show, verify: or a URL)"),
        ("diff", "s3://key:secret@bucket/a", "run=s3://***@bucket/a: expected a directory"),
        ("show", "s3://key:secret@bucket/a", "run=s3://***@bucket/a: expected a URL without keys"),
        ("show", "nothing://bucket/a", "run=nothing://bucket/a: expected a protocol that fsspec knows"),
    ):
        status, lines, error = call(f"action={action}", where=where)
        assert (status, lines, error.count("\n")) == (2, [], 1) and error.startswith(f"error: {message}"), error
