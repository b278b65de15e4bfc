"""Copies of a run's checkpoints in a remote store, for a run whose machine or disk is lost.

A copy has the files of the checkpoint in the same directories, `<url>/<run>/checkpoints/step-<N>/`. Each rank copies
its part of the files. The manifest is written last, when the store reports the size of every other file, so that an
upload that did not finish is not taken for a checkpoint. A copy becomes a checkpoint of the run again only after all
its files have been read and have the hashes in the manifest.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.errors import CheckpointError, require
from common.files import read_file, write_atomically
from training.checkpoint.manifest import (
    CHECKPOINTS,
    HELDOUT_LOSS,
    MANIFEST,
    MAX_MANIFEST,
    STEP_DIRECTORY,
    Retention,
    UnfinishedError,
    begin_checkpoint,
    by_loss,
    commit_checkpoint,
    damage_of,
    parse_manifest,
    step_of,
)
from training.checkpoint.peers import ALONE, Peers, RemoteError
from training.checkpoint.remote_files import RemoteFiles

NOTHING: Mapping[str, int | None] = MappingProxyType({})
UNFINISHED = "it has no manifest, because its upload did not finish"


class RemoteCheckpoints:
    """The copies of one run's checkpoints. Methods with `peers` are collective, and raise a `RemoteError` on all ranks
    if the store refused or did not answer on any.

    Args:
        url: of which `check_url` holds.
        run: the run's name; empty if `url` is that of the run.
    """

    def __init__(self, url: str, run: str = "") -> None:
        self._base, self._directory = url, f"{run}/{CHECKPOINTS}" if run else CHECKPOINTS
        self.url = f"{url.rstrip('/')}/{self._directory}"
        """The URL of the directory with the checkpoints."""
        # On rank 0:
        self._bodies: dict[int, dict[str, Any]] = {}
        self._damaged: set[int] = set()

    def url_of(self, step: int) -> str:
        """Return the URL of a checkpoint."""
        return f"{self.url}/step-{step}"

    def check(self, peers: Peers) -> None:
        """Check that every rank can write, read and delete a file."""

        def work() -> None:
            files, name = self._files(peers), f".check-{peers.rank}"
            files.write(name, b"written")
            content = files.read(name, 7)
            require(content == b"written", RemoteError, f"{self.url}/{name}: found another content than was written")
            files.delete(name)

        peers.run(work, Path(self.url))

    def steps(self, peers: Peers = ALONE) -> list[int]:
        """Return the steps of all checkpoints, the newest first, whether their uploads have finished or not."""
        return [*peers.on_rank_0(lambda: self._steps(self._files(peers)), Path(self.url))]

    def newest(self, peers: Peers) -> int | None:
        """Return the newest step with an undamaged manifest, or None."""

        def find() -> int | None:
            files = self._files(peers)
            return next((step for step in self._steps(files) if self._body(files, step) is not None), None)

        step: int | None = peers.on_rank_0(find, Path(self.url))
        return step

    def read_manifest(self, step: int) -> dict[str, Any]:
        """Return the manifest of a checkpoint, on a single rank.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        raw = _read_raw(self._files(ALONE), step)
        require(raw is not None, CheckpointError, f"{self.url_of(step)}: {UNFINISHED}")
        assert raw is not None
        return parse_manifest(raw, f"{self.url_of(step)}/{MANIFEST}", step)

    def verify(self, step: int) -> None:
        """Read every file of a checkpoint and compare its size and SHA-256 with the manifest, on a single rank.

        Raises:
            CheckpointError: it names the first file that differs.
        """
        files = self._files(ALONE)
        for name, record in sorted(self.read_manifest(step)["files"].items()):
            found = files.sha256(f"step-{step}/{name}")
            expected = record["size"], record["sha256"]
            require(found == expected, CheckpointError, f"{self.url_of(step)}/{name}: {_difference(found, expected)}")

    def upload(self, path: Path, peers: Peers) -> bool:
        """Copy the committed checkpoint `path` to the store. Return False if the store has this checkpoint already.

        Files that the store has with their names and sizes are not copied again, because the names have a part of the
        hash. So a copy of the step that is complete stays complete until its manifest is replaced. All files are copied
        if `fetch` has found this copy damaged.

        Raises:
            CheckpointError: on all ranks, if a local file cannot be read or is damaged.
        """
        step, files = step_of(path), self._files(peers)
        manifest: dict[str, Any] = {}

        def begin(found: list[None]) -> Sequence[list[tuple[str, str]] | None]:
            raw = read_file(path / MANIFEST, MAX_MANIFEST)
            body = parse_manifest(raw, str(path / MANIFEST), step)
            manifest.update(raw=raw, body=body)
            there = {} if step in self._damaged else files.names(f"step-{step}")
            if _has_files(there, body) and _read_raw(files, step) == raw:
                return [None] * len(found)
            return _divide(body, "sha256", len(found), there)

        def copy() -> None:
            for name, sha256 in mine:
                files.upload(path / name, f"step-{step}/{name}", sha256)

        def commit(found: list[None]) -> list[None]:
            raw, body = manifest["raw"], manifest["body"]
            there = files.names(f"step-{step}")
            different = next(
                (name for name, record in body["files"].items() if there.get(name) != record["size"]), None
            )
            if different is not None:
                size, expected = there.get(different), body["files"][different]["size"]
                raise RemoteError(f"{self.url_of(step)}/{different}: found {size or 0} bytes, expected {expected}")
            files.write(f"step-{step}/{MANIFEST}", raw)
            self._bodies[step] = _summary(body)
            self._damaged.discard(step)
            # What an earlier upload of the step has left does no harm if it stays.
            with suppress(RemoteError):
                for name in there.keys() - body["files"].keys() - {MANIFEST}:
                    files.delete(f"step-{step}/{name}")
            return [None] * len(found)

        mine = peers.run(lambda: None, path, begin)
        if mine is not None:
            peers.run(copy, path, commit)
        return mine is not None

    def fetch(self, step: int, root: Path, peers: Peers) -> CheckpointError | None:
        """Copy a checkpoint to `root/step-<step>`, and replace a damaged one there. Return why it is not intact, or
        None.

        Raises:
            CheckpointError: on all ranks, if it cannot be written in `root`.
        """
        files, final, temporary = self._files(peers), root / f"step-{step}", root / f".tmp-step-{step}"

        def begin(found: list[None]) -> list[Any]:
            raw = _read_raw(files, step)
            if raw is None:
                return [UNFINISHED] * len(found)
            try:
                body = parse_manifest(raw, f"{self.url_of(step)}/{MANIFEST}", step)
            except CheckpointError as error:
                return [str(error)] * len(found)
            write_atomically(begin_checkpoint(root, step) / MANIFEST, raw)
            return list(_divide(body, "size", len(found)))

        def copy() -> None:
            for name, size in mine:
                files.download(f"step-{step}/{name}", temporary / name, size)

        try:
            mine: Any = peers.run(lambda: None, root, begin)
            error: CheckpointError | None = None
            if isinstance(mine, str):
                error = UnfinishedError(mine) if mine == UNFINISHED else CheckpointError(mine)
            if error is None:
                peers.run(copy, root)
                damage = damage_of(temporary, peers)
                error = damage and CheckpointError(str(damage).replace(str(temporary), self.url_of(step)))
            if error is None:
                peers.on_rank_0(lambda: commit_checkpoint(temporary, final), root)
        finally:
            if peers.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
        if error is not None:
            self._damaged.add(step)
        return error

    def prune(self, saved: int, retention: Retention, peers: Peers) -> None:
        """Delete the checkpoints that `retention` does not keep, after that of step `saved` has been copied.

        As among the checkpoints of the run's directory, damaged ones do not count. A checkpoint counts as damaged if
        its manifest is, if the store reports another size of a file than the manifest has, or if `fetch` has found
        it damaged. Its files are not read here.
        """

        def work() -> None:
            files = self._files(peers)
            steps = self._steps(files)
            choice = retention.choose(
                steps,
                saved,
                is_intact=lambda step: self._is_intact(files, step),
                best_first=lambda steps: by_loss(self._states(files, steps)),
            )
            for step in steps:
                if step in choice.superfluous or (step in choice.others and self._body(files, step) is None):
                    self._delete(files, step)

        peers.on_rank_0(work, Path(self.url))

    def delete_after(self, step: int, peers: Peers) -> None:
        """Delete the checkpoints of later steps than `step`."""

        def work() -> None:
            files = self._files(peers)
            for later in self._steps(files):
                if later > step:
                    self._delete(files, later)

        peers.on_rank_0(work, Path(self.url))

    def _files(self, peers: Peers) -> RemoteFiles:
        return RemoteFiles(self._base, self._directory, peers)

    def _steps(self, files: RemoteFiles) -> list[int]:
        names = [name for name, size in files.names().items() if size is None and STEP_DIRECTORY.fullmatch(name)]
        return sorted((step_of(Path(name)) for name in names), reverse=True)

    def _body(self, files: RemoteFiles, step: int) -> dict[str, Any] | None:
        """The summary of the manifest of a checkpoint, or None if it is missing or damaged."""
        if step not in self._bodies:
            raw = _read_raw(files, step)
            with suppress(CheckpointError):
                if raw is not None:
                    self._bodies[step] = _summary(parse_manifest(raw, self.url_of(step), step))
        return self._bodies.get(step)

    def _states(self, files: RemoteFiles, steps: Any) -> Mapping[int, Mapping[str, Any]]:
        bodies = {step: self._body(files, step) for step in steps}
        return {step: body["state"] for step, body in bodies.items() if body is not None}

    def _is_intact(self, files: RemoteFiles, step: int) -> bool:
        body = self._body(files, step)
        return step not in self._damaged and body is not None and _has_files(files.names(f"step-{step}"), body)

    def _delete(self, files: RemoteFiles, step: int) -> None:
        self._bodies.pop(step, None)
        files.delete_directory(f"step-{step}", first=MANIFEST)


def _read_raw(files: RemoteFiles, step: int) -> bytes | None:
    """The content of the manifest of a checkpoint, or None if there is none."""
    return files.read(f"step-{step}/{MANIFEST}", MAX_MANIFEST)


def _divide(
    body: dict[str, Any], field: str, ranks: int, there: Mapping[str, int | None] = NOTHING
) -> list[list[tuple[str, Any]]]:
    """Return for each rank the names of its files, and this field of their records, without files that are `there`."""
    files = sorted(body["files"].items())
    return [
        [(name, record[field]) for name, record in files[rank::ranks] if there.get(name) != record["size"]]
        for rank in range(ranks)
    ]


def _has_files(names: Mapping[str, int | None], body: dict[str, Any]) -> bool:
    return MANIFEST in names and all(names.get(name) == record["size"] for name, record in body["files"].items())


def _summary(body: dict[str, Any]) -> dict[str, Any]:
    """What is needed of a manifest to choose the checkpoints to keep."""
    return {"files": body["files"], "state": {HELDOUT_LOSS: body["state"].get(HELDOUT_LOSS)}}


def _difference(found: tuple[int, str] | None, expected: tuple[int, str]) -> str:
    if found is None:
        return f"not found, expected {expected[0]} bytes"
    if found[0] != expected[0]:
        return f"found {found[0]} bytes, expected {expected[0]}"
    return f"found sha256 {found[1]}, expected {expected[1]}"
