"""The manifest of a checkpoint, and the checkpoints of a run: which are complete, which is the newest, which to delete.

`manifest.json` has the size and SHA-256 of every file, the regions of every tensor, the JSON state of the run, and the
hash of its own content. It is written last. A directory without a manifest, or with a manifest whose content does not
have the hash that it gives, is not a committed checkpoint.

The hash detects damage. It does not prove who wrote the file. Everything that is read here is therefore checked as
untrusted input: a manifest cannot name a file outside its directory, and reading it cannot run code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, require
from common.files import fsync, sha256_of, write_atomically
from common.text import parse_json

FORMAT = 1
"""The version of the checkpoint format."""
CHECKPOINTS = "checkpoints"
"""Name of the directory with the checkpoints, in a run's directory."""
MANIFEST = "manifest.json"
STEP_DIRECTORY = re.compile(r"step-(0|[1-9][0-9]*)")
SHARD_FILE = re.compile(r"rank-[0-9]{5,}-[0-9a-f]{16}\.safetensors")


def write_manifest(directory: Path, body: dict[str, Any]) -> None:
    """Write `body` and its hash as the manifest of `directory`, and flush the file and the directory to the disk.

    Args:
        body: JSON-serialisable, without the key `sha256`.

    Raises:
        CheckpointError: `body` is not strict JSON, e.g. because it has a NaN.
    """
    try:
        # Tuples become lists and integer keys become strings in JSON. The hash must be that of the values read back.
        body = parse_json(_canonical(body))
        text = _canonical(body | {"sha256": _digest(body)})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: state cannot be written as JSON: {error}") from error
    write_atomically(directory / MANIFEST, text)
    fsync(directory)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint directory `path`, after checking its hash and its fields.

    Raises:
        CheckpointError: the manifest is missing or damaged, has another format, or names a file that is not a shard
            file.
    """
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        body: dict[str, Any] = parse_json(raw)
        expected = body.pop("sha256")
        actual = _digest(body)
        intact = expected == actual and _canonical(body | {"sha256": expected}) == raw
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: not the JSON that was written") from error
    require(intact, CheckpointError, f"{file}: damaged: found sha256 {actual}, expected {expected}")
    require(
        body.get("format") == FORMAT, CheckpointError, f"{file}: found format {body.get('format')!r}, expected {FORMAT}"
    )
    try:
        _check_body(body)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a checkpoint manifest: {error!r}") from error
    return body


def read_state(path: Path) -> dict[str, Any]:
    """Return the JSON state that was saved with the checkpoint `path`. Needs no process group.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    return dict(read_manifest(path)["state"])


def step_directories(root: Path) -> list[Path]:
    """Return every directory `step-<N>` in `root`, committed or not, newest first."""
    paths = root.iterdir() if root.is_dir() else ()
    directories = [path for path in paths if STEP_DIRECTORY.fullmatch(path.name) and path.is_dir()]
    return sorted(directories, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return N of the directory `step-<N>`."""
    return int(path.name.removeprefix("step-"))


def is_committed(path: Path) -> bool:
    """Return whether the checkpoint `path` has an undamaged manifest. Its other files are not read."""
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def committed(root: Path) -> list[Path]:
    """Return the committed checkpoints in `root`, newest first. Their tensor files are not read: see `verify`."""
    return [path for path in step_directories(root) if is_committed(path)]


def verify(path: Path) -> None:
    """Read every file of the checkpoint `path` and compare its size and SHA-256 with the manifest.

    Files that the manifest does not name are ignored.

    Raises:
        CheckpointError: names the first file that differs, with the actual and the expected value.
    """
    files: dict[str, dict[str, Any]] = read_manifest(path)["files"]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for problem in pool.map(lambda item: _find_damage(path / item[0], **item[1]), files.items()):
            if problem is not None:
                raise CheckpointError(problem)


def newest_verified(root: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint in `root` that passes `verify`, or None if `root` has no checkpoint at all.

    This reads whole files. Call it on one rank and send the result to the others.

    Args:
        warn: called with one line for each newer checkpoint that is skipped because it is damaged.

    Raises:
        CheckpointError: `root` has checkpoints, and all of them are damaged.
    """
    damaged = []
    for path in step_directories(root):
        try:
            verify(path)
        except CheckpointError as error:
            warn(f"skipping checkpoint {path.name}: {error}")
            damaged.append(path.name)
        else:
            return path
    require(
        not damaged,
        CheckpointError,
        f"{root}: expected an undamaged checkpoint; all are damaged ({', '.join(damaged)})",
    )
    return None


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint. The manifest goes first, so that a partly deleted checkpoint is not a committed one."""
    (path / MANIFEST).unlink(missing_ok=True)
    fsync(path)
    shutil.rmtree(path)


def delete_old_checkpoints(root: Path, newest: int, keep: int) -> None:
    """Keep the `keep` newest checkpoints up to step `newest`, which was just saved, and delete the older ones.

    This also deletes uncommitted directories, and damaged checkpoints of later steps. Later steps exist when a run was
    resumed from an earlier step, and a damaged one would count as the run's newest checkpoint. Undamaged checkpoints of
    later steps are kept and do not count towards `keep`.
    """
    up_to_newest = [path for path in step_directories(root) if step_of(path) <= newest]
    kept = [path for path in up_to_newest if is_committed(path)][:keep]
    for path in up_to_newest:
        if path not in kept:
            delete_checkpoint(path)
    for path in step_directories(root):
        if step_of(path) > newest:
            try:
                verify(path)
            except CheckpointError:
                delete_checkpoint(path)


def _find_damage(file: Path, size: int, sha256: str) -> str | None:
    """Return a message if `file` does not have this size and SHA-256, else None."""
    try:
        actual_size = file.stat().st_size
        if actual_size != size:
            return f"{file}: found {actual_size} bytes, expected {size}"
        actual = sha256_of(file)
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror}), expected {size} bytes"
    return None if actual == sha256 else f"{file}: found sha256 {actual}, expected {sha256}"


def _check_body(body: dict[str, Any]) -> None:
    """Raise TypeError, KeyError or AttributeError unless `body` has the fields and types that a reader needs."""
    require(isinstance(body["state"], dict), TypeError, "state is not an object")
    for name, record in body["files"].items():
        require(SHARD_FILE.fullmatch(name), TypeError, f"file name {name!r}")
        require(set(record) == {"size", "sha256"} and isinstance(record["size"], int), TypeError, f"record of {name}")
    for name, record in body["tensors"].items():
        dims, chunks = len(record["shape"]), record["chunks"]
        sizes = [record["shape"], *(chunk[key] for chunk in chunks for key in ("offset", "shape"))]
        require(
            all(len(size) == dims and all(isinstance(n, int) and n >= 0 for n in size) for size in sizes),
            TypeError,
            f"shapes of {name!r}",
        )
        require(
            isinstance(record["dtype"], str) and all(chunk["file"] in body["files"] for chunk in chunks),
            TypeError,
            f"record of {name!r}",
        )


def _canonical(body: dict[str, Any]) -> bytes:
    """Return the one JSON text that stands for `body`: sorted keys and no white space."""
    return json.dumps(body, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()
