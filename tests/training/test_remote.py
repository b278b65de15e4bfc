"""Copies of checkpoints in a store: what is committed, kept, found again, refused and said.

The stores are fsspec's own: memory, and a local file system. tests/test_remote_runs.py has whole runs.
"""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from common.errors import CheckpointError, ConfigError
from training.agree import find_checkpoint
from training.checkpoint import checkpoint
from training.checkpoint.manifest import MANIFEST, Retention, committed, newest_verified, read_state, step_of, verify
from training.checkpoint.peers import ALONE, Peers, RemoteError
from training.checkpoint.remote import UNFINISHED, RemoteCheckpoints
from training.checkpoint.remote_files import check_url, without_secrets
from training.checkpoint.saver import Saver
from training.config import CheckpointConfig

SECRET = "AKIA-not-to-be-shown"
NUMBERS = itertools.count()


class Faulty(MemoryFileSystem):
    """A store in memory that refuses or hangs."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    message = f"403: https://store/a?X-Signature={SECRET} with key {SECRET}"
    refused: Callable[[str], bool] = staticmethod(lambda path: False)
    hangs: threading.Event | None = None

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode and Faulty.refused(path):
            raise PermissionError(self.message)
        if "w" in mode and Faulty.hangs is not None:
            Faulty.hangs.wait(20)
        return super()._open(path, mode, **options)


@pytest.fixture(autouse=True)
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty stores, one of which is `faulty://`."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setenv("STORE_SECRET_KEY", SECRET)
    yield
    if Faulty.hangs is not None:
        Faulty.hangs.set()
    for thread in threading.enumerate():
        if thread.name.startswith("store-"):
            thread.join()
    Faulty.refused, Faulty.hangs = staticmethod(lambda path: False), None
    for system in (MemoryFileSystem, Faulty):
        system.store.clear()
        system.pseudo_dirs[:] = [""]


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://bucket/runs" if request.param == "memory" else f"file://{tmp_path / 'store'}"


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0) + step, "b": torch.tensor(step)}


def save(root: Path, step: int, loss: float | None = None, keep: int = 9) -> Path:
    return checkpoint.save(root, step, tensors(step), {"step": step, "heldout_loss": loss}, keep=keep)


def upload(remote: RemoteCheckpoints, root: Path, *steps: int) -> None:
    for step in steps:
        assert remote.upload(save(root, step), ALONE)


def files_of(url: str) -> tuple[Any, list[str]]:
    system, path = fsspec.core.url_to_fs(url)
    return system, sorted(system.find(path))


def damage(remote: RemoteCheckpoints, step: int, content: Callable[[bytes], bytes], file: str = "rank-") -> str:
    """Change a file of a checkpoint's tensors in the store."""
    system, names = files_of(remote.url_of(step))
    (name,) = (name for name in names if file in name)
    system.pipe_file(name, content(system.cat_file(name)))
    return name


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_copy_becomes_the_checkpoint_again(url: str, tmp_path: Path) -> None:
    remote, root, lines = RemoteCheckpoints(url, "a[b]*?/1"), tmp_path / "run" / "checkpoints", []
    saved = save(root, 5)
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    assert remote.upload(saved, ALONE) and not remote.upload(saved, ALONE), "an unchanged one is not copied again"
    assert remote.steps() == [5] and remote.newest(ALONE) == 5 and RemoteCheckpoints(f"{url}/a[b]*?/1").steps() == [5]
    again = tmp_path / "again"
    assert newest_verified(again, lines.append, ALONE, remote) == again / "step-5"
    assert {file.name: file.read_bytes() for file in (again / "step-5").iterdir()} == before
    assert lines == [f"step-5 is copied from {remote.url}: {again} has none"]
    assert [path.name for path in again.iterdir()] == ["step-5"]
    # The run's own checkpoint is taken if it is as new.
    assert newest_verified(root, lines.append, ALONE, remote) == saved and len(lines) == 1


def test_the_manifest_is_the_last_file_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that is cut before any of its writes leaves the older checkpoint as the newest."""
    remote, root, written = RemoteCheckpoints("faulty://bucket", "a"), tmp_path / "checkpoints", []

    def count(path: str) -> bool:
        written.append(path.rpartition("/")[2])
        return len(written) == cut

    cut = 0
    upload(remote, root, 1)
    Faulty.refused = staticmethod(count)
    newest = save(root, 2)
    for cut in (1, 2):
        written.clear()
        with pytest.raises(RemoteError):
            remote.upload(newest, ALONE)
        lines: list[str] = []
        fresh = RemoteCheckpoints("faulty://bucket", "a")
        assert fresh.newest(ALONE) == 1
        assert newest_verified(tmp_path / f"again{cut}", lines.append, ALONE, fresh) == tmp_path / f"again{cut}/step-1"
        # The cut before the first file leaves nothing of the step; that before the manifest leaves its tensors.
        assert [f"skipping {remote.url_of(2)}: {UNFINISHED}"] * (cut - 1) == lines[:-1]
    assert written[0].startswith("rank-") and written[1:] == [MANIFEST]
    cut = 0
    assert remote.upload(newest, ALONE) and RemoteCheckpoints("faulty://bucket", "a").newest(ALONE) == 2


def upload_until_killed(root: Path, url: str, first: int, calls: int) -> None:
    """Save and copy checkpoints until SIGKILL, which is sent in the middle of the `calls`-th write to the store, or
    before a file there is deleted."""
    remaining = calls

    def is_last() -> bool:
        nonlocal remaining
        remaining -= 1
        return remaining == 0

    def write(file: LocalFileOpener, content: bytes) -> int:
        if is_last():
            file.f.write(content[: len(content) // 2])
            file.f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return file.f.write(content)

    def delete(system: LocalFileSystem, path: str) -> None:
        if is_last():
            os.kill(os.getpid(), signal.SIGKILL)
        os.remove(path)

    LocalFileOpener.write, LocalFileSystem.rm_file = write, delete
    remote = RemoteCheckpoints(url, "a")
    for step in itertools.count(first):
        for number in range(1 + step % 2):  # Every other step is saved twice, so that copies are replaced, too.
            path = checkpoint.save(root, step, tensors(step + number), {"step": step}, keep=2)
            remote.upload(path, ALONE)
            remote.prune(step, Retention(2), ALONE)


def test_a_kill_at_any_point_of_an_upload_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    root, url, newest = tmp_path / "checkpoints", f"file://{tmp_path / 'store'}", 1
    context, remote = multiprocessing.get_context("fork"), RemoteCheckpoints(url, "a")
    upload(remote, root, 1)
    for calls in range(1, 13):
        process = context.Process(target=upload_until_killed, args=(root, url, newest, calls))
        process.start()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        again, lines, newest = tmp_path / f"again-{calls}", [], step_of(committed(root)[0])
        path = newest_verified(again, lines.append, ALONE, RemoteCheckpoints(url, "a"))
        assert path is not None and step_of(path) >= newest - 1, "a copy that was complete is lost"
        assert all(line.endswith(UNFINISHED) for line in lines[:-1]), lines
        verify(path)
    # The next upload removes what the kills have left.
    upload(remote, root, newest + 1)
    remote.prune(newest + 1, Retention(1), ALONE)
    assert [Path(name).parent.name for name in files_of(remote.url)[1]] == [f"step-{newest + 1}"] * 2


def test_a_run_whose_first_upload_did_not_finish_starts_anew(url: str, tmp_path: Path) -> None:
    remote, lines = RemoteCheckpoints(url, "a"), []
    upload(remote, tmp_path / "checkpoints", 1)
    system, names = files_of(remote.url)
    system.rm_file(next(name for name in names if name.endswith(MANIFEST)))
    assert newest_verified(tmp_path / "again", lines.append, ALONE, remote) is None
    assert lines == [f"skipping {remote.url_of(1)}: {UNFINISHED}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [(flip, "found sha256"), (lambda content: content[:-1], "found"), (lambda content: content + b"more", "found")],
)
def test_damage_in_the_store_leads_to_the_checkpoint_before(
    url: str, tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    remote, root, lines = RemoteCheckpoints(url, "a"), tmp_path / "checkpoints", []
    upload(remote, root, 1, 2)
    name = damage(remote, 2, change).rpartition("/")[2]
    assert newest_verified(tmp_path / "again", lines.append, ALONE, remote) == tmp_path / "again" / "step-1"
    assert lines[0].startswith(f"skipping {remote.url_of(2)}: {remote.url_of(2)}/{name}: {message}")
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["step-1"]
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        remote.verify(2)
    remote.verify(1)
    # If the run's own checkpoint is damaged, the copy of the same step is taken.
    damage(remote, 1, lambda content: content)
    (shard,) = (root / "step-1").glob("rank-*")
    shard.write_bytes(flip(shard.read_bytes()))
    checkpoint_2 = root / "step-2"
    (checkpoint_2 / MANIFEST).unlink()
    assert newest_verified(root, lines.append, ALONE, remote) == root / "step-1"
    assert lines[-1] == f"step-1 is copied from {remote.url}: {root} has a damaged one"
    verify(root / "step-1")
    damage(remote, 1, flip)
    with pytest.raises(CheckpointError, match="expected an undamaged checkpoint; all are damaged"):
        newest_verified(tmp_path / "third", lines.append, ALONE, remote)


def test_a_manifest_that_does_not_belong_there_is_damage(url: str, tmp_path: Path) -> None:
    remote, lines = RemoteCheckpoints(url, "a"), []
    upload(remote, tmp_path / "checkpoints", 1, 2)
    system, names = files_of(remote.url)
    manifests = [name for name in names if name.endswith(MANIFEST)]
    system.pipe_file(manifests[1], system.cat_file(manifests[0]))
    assert newest_verified(tmp_path / "again", lines.append, ALONE, remote) == tmp_path / "again" / "step-1"
    assert "found the checkpoint of step 1, expected that of step 2" in lines[0]
    system.pipe_file(manifests[1], b"{" * 99)
    assert newest_verified(tmp_path / "third", lines.append, ALONE, remote) == tmp_path / "third" / "step-1"


def test_the_store_keeps_what_the_run_keeps_and_counts_intact_ones(url: str, tmp_path: Path) -> None:
    """keep=2 and keep_every=30: of 10, 20, 30, 40, 50, and 45 whose size is wrong, 30, 40 and 50 stay."""
    remote, root = RemoteCheckpoints(url, "a"), tmp_path / "checkpoints"
    upload(remote, root, 10, 20, 30, 40, 45)
    damage(remote, 45, lambda content: content[:-1])
    upload(remote, root, 50)
    remote.prune(50, Retention(2, every=30), ALONE)
    assert remote.steps() == [50, 40, 30]
    # Damage that only the hash shows counts after it was found.
    damage(remote, 40, flip)
    assert remote.fetch(40, tmp_path / "again", ALONE) is not None
    upload(remote, root, 60)
    remote.prune(60, Retention(3), ALONE)
    assert remote.steps() == [60, 50, 30]
    for step, loss in ((70, 1.0), (80, 0.5), (90, 2.0)):
        remote.upload(save(root, step, loss), ALONE)
    remote.prune(90, Retention(1, best=2), ALONE)
    assert remote.steps() == [90, 80, 70]
    remote.delete_after(70, ALONE)
    assert remote.steps() == [70]
    _, names = files_of(remote.url)
    assert len(names) == 2, "files of deleted checkpoints are left"


def saver_of(tmp_path: Path, remote: RemoteCheckpoints, newest: str | None = None, **keys: Any) -> tuple[Saver, list]:
    lines: list[str] = []
    return Saver(tmp_path / "checkpoints", CheckpointConfig(**keys), ALONE, newest, lines.append, remote), lines


@pytest.mark.parametrize("background", [True, False])
def test_every_checkpoint_is_copied_with_a_line(url: str, tmp_path: Path, background: bool) -> None:
    remote = RemoteCheckpoints(url, "a")
    saver, lines = saver_of(tmp_path, remote, background=background)
    with saver:
        saver.prepare(lambda: tensors(0))
        for step in (1, 2, 3):
            saver.save(step, lambda: tensors(step), {"step": step})  # noqa: B023
    assert remote.steps() == [3, 2], "checkpoint.keep does not count in the store"
    assert lines[-1].startswith(f"copied step-3 to {remote.url} in ") and lines[-2].startswith("saved ")
    assert saver.take_figures().keys() >= {"speed/checkpoint_s", "speed/checkpoint_upload_s"}
    # A run that continues copies the checkpoint that the launch before could not copy any more.
    newest = save(tmp_path / "checkpoints", 4)
    saver, lines = saver_of(tmp_path, remote, str(newest), background=background)
    with saver:
        saver.prepare(lambda: tensors(0))
    assert remote.steps() == [4, 3] and len(lines) == 1 and lines[0].startswith("copied step-4 to ")
    saver.go_back(str(tmp_path / "checkpoints" / "step-3"))
    assert remote.steps() == [3] and saver.newest_step == 3


@pytest.mark.parametrize("on_error", ["warn", "stop"])
def test_a_store_that_refuses_is_one_line_without_secrets(tmp_path: Path, on_error: str) -> None:
    remote = RemoteCheckpoints("faulty://bucket", "a")
    saver, lines = saver_of(tmp_path, remote, on_error=on_error)
    saver.save(1, lambda: tensors(1), {"step": 1})
    Faulty.refused = staticmethod(lambda path: "rank-" in path)
    if on_error == "stop":
        with pytest.raises(CheckpointError) as caught:
            saver.save(2, lambda: tensors(2), {"step": 2})
        line = str(caught.value)
    else:
        saver.save(2, lambda: tensors(2), {"step": 2})
        line = lines[-1]
        assert line.startswith("warning: ") and line.endswith(" (checkpoint.on_error=warn)")
    path = tmp_path / "checkpoints" / "step-2"
    assert f"{path} is saved, but it could not be copied to {remote.url}: {remote.url_of(2)}/rank-" in line
    assert "403" in line and SECRET not in line and "\n" not in line
    assert [found.name for found in committed(tmp_path / "checkpoints")] == ["step-2", "step-1"]
    assert remote.steps() == [1] and saver.newest == str(path)
    verify(path)


def test_a_store_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    Faulty.hangs = threading.Event()
    remote, path = RemoteCheckpoints("faulty://bucket", "a"), save(tmp_path, 1)
    start = time.monotonic()
    with pytest.raises(RemoteError, match=r"rank-\S+: no progress for 0.2 s: expected a store that answers"):
        remote.upload(path, Peers(None, 0, 1, timeout_s=0.2))
    assert time.monotonic() - start < 10
    verify(path)


def on_two_ranks(store: dist.Store, work: Callable[[Peers], Any]) -> list[Any]:
    """Call `work` in two threads, as the ranks that share `store`. Return its results or its exceptions."""
    name = f"call-{next(NUMBERS)}"

    def call(rank: int) -> Any:
        try:
            return work(Peers(store, rank, 2, name=name))
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, range(2)))


def test_each_rank_copies_its_files_and_all_learn_of_a_failure(tmp_path: Path) -> None:
    remote, root, store = RemoteCheckpoints("faulty://bucket", "a"), tmp_path / "checkpoints", dist.HashStore()
    written: set[str] = set()

    def refuse(path: str) -> bool:
        written.add(path.rpartition("/")[2][:10])
        return refused and "rank-00001" in path

    Faulty.refused, refused = staticmethod(refuse), False
    for step in (1, 2):
        save_step = partial(checkpoint.save, root, step, tensors(step), {"step": step}, keep=9)
        on_two_ranks(store, lambda peers, save_step=save_step: save_step(peers=peers))
    assert on_two_ranks(store, lambda peers: remote.upload(root / "step-1", peers)) == [True, True]
    assert written == {"rank-00000", "rank-00001", "manifest.j"}
    refused = True
    errors = on_two_ranks(store, lambda peers: remote.upload(root / "step-2", peers))
    assert [type(error) for error in errors] == [RemoteError] * 2 and str(errors[0]) == str(errors[1])
    assert str(errors[0]).startswith(f"rank 1: {remote.url_of(2)}/rank-00001-") and remote.newest(ALONE) == 1
    errors = on_two_ranks(store, remote.check)
    assert errors == [None, None], "only files of tensors are refused"
    refused = False
    assert on_two_ranks(store, lambda peers: remote.upload(root / "step-2", peers)) == [True, True]
    damage(remote, 2, flip, file="rank-00001")
    lines: list[str] = []
    found = on_two_ranks(store, lambda peers: newest_verified(tmp_path / "again", lines.append, peers, remote))
    assert found == [tmp_path / "again" / "step-1"] * 2 and len(lines) == 2
    verify(found[0])


def find(tmp_path: Path, remote: RemoteCheckpoints, lines: list[str], **keys: str) -> str | None:
    config: Any = SimpleNamespace(
        run=SimpleNamespace(resume=keys.get("resume", "auto")),
        checkpoint=CheckpointConfig(remote="memory://bucket", on_error=keys.get("on_error", "stop")),  # type: ignore
    )
    return find_checkpoint(config, tmp_path, ALONE, restarted=False, warn=lines.append, remote=remote)


def test_a_run_starts_where_the_store_and_the_directory_say(tmp_path: Path) -> None:
    remote, lines = RemoteCheckpoints("faulty://bucket", "a"), []
    assert find(tmp_path / "new", remote, lines) is None and lines == []
    assert not Faulty.store, "the check has left a file"
    upload(remote, tmp_path / "old", 1)
    assert read_state(Path(find(tmp_path / "lost", remote, lines) or "")) == {"step": 1, "heldout_loss": None}
    with pytest.raises(
        CheckpointError, match=r"run.resume=never: expected .*; faulty://bucket/a/checkpoints has .* step-1"
    ):
        find(tmp_path / "third", remote, lines, resume="never")

    Faulty.refused = staticmethod(lambda path: True)
    start = "checkpoint.remote=memory://bucket: expected a store that can be read and written"
    for keys, directory in (({}, "lost"), ({"on_error": "warn"}, "third")):
        with pytest.raises(CheckpointError) as caught:
            find(tmp_path / directory, remote, lines, **keys)
        assert str(caught.value).startswith(start) and SECRET not in str(caught.value)
    lines.clear()
    newest = str(tmp_path / "lost" / "checkpoints" / "step-1")
    assert find(tmp_path / "lost", remote, lines, on_error="warn") == newest
    assert len(lines) == 1 and lines[0].startswith(f"warning: {start}")
    assert lines[0].endswith(f"the run continues from {newest}") and SECRET not in lines[0]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("runs/copies", "a URL such as s3://"),
        ("/mnt/copies", "a URL such as s3://"),
        ("s3://", "a URL such as s3://"),
        ("nothing://bucket", "a protocol that fsspec knows, such as s3, gs, abfs or file, not nothing"),
        ("simplecache::s3://bucket", "a URL such as s3://"),
        ("file:///a::s3://bucket", "a single URL"),
        (f"s3://{SECRET}:{SECRET}@bucket/a", "a URL without keys and passwords"),
        (f"s3://name:a/{SECRET}@bucket/a", "a URL without keys and passwords"),
        (f"sftp://name:a/{SECRET}@host/a", "a URL without keys and passwords"),
        (f"s3://{SECRET}@bucket/a", "a URL without keys and passwords"),
        (f"sftp://user:{SECRET}@host/a", "a URL without keys and passwords"),
        (f"file:///a?key={SECRET}", "a URL without keys and passwords"),
    ],
)
def test_urls_that_are_refused(url: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORE_SECRET_KEY")
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig(remote=url)
    message = str(caught.value)
    assert message.startswith("remote=") and f": expected {expected}" in message
    assert SECRET not in message and "\n" not in message


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"class": "library_that_is_not_installed.Store", "err": "Install nothing to access it"}
    monkeypatch.setitem(known_implementations, "missing", missing)
    with pytest.raises(
        ConfigError, match=r"the library for missing:// to be installed \(Install nothing to access it\)"
    ):
        CheckpointConfig(remote="missing://bucket")


def test_messages_lose_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-12345")
    options = {"key": "abcdef-1", "client": {"tokens": ["abcdef-2"], "endpoint_url": "http://host:1"}}
    monkeypatch.setitem(fsspec.config.conf, "faulty", options)
    Faulty.refused = staticmethod(lambda path: True)
    monkeypatch.setattr(Faulty, "message", "abcdef-1 abcdef-2 http://host:1/a")
    with pytest.raises(RemoteError, match=r": PermissionError: \*\*\* \*\*\* http://host:1/a$"):
        RemoteCheckpoints("faulty://bucket", "a").check(ALONE)
    text = "GET https://user:p/w@host/a?sig=abc#x failed with session-12345 and option-678"
    assert without_secrets(text, ["option-678"]) == "GET https://***@host/a?*** failed with *** and ***"
    check_url("remote", "hdfs://user@host:8020/a")
