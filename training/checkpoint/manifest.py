"""What makes a directory a checkpoint: a self-hashed manifest, written last.

`manifest.json` names every file with its size and SHA-256, every tensor with the regions it was cut into, and the JSON
state of the run. It ends the writing of a checkpoint: a directory without it, or whose manifest does not hash to the
value it carries, was never committed. The hash finds damage; it does not prove who wrote the file, so that everything
read here is checked as input: nothing in a manifest can name a file outside its directory or run code.
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

from common.errors import CheckpointError
from common.files import fsync

FORMAT = 1
CHECKPOINTS = "checkpoints"
"""Directory of a run's checkpoints, in the run's own."""
MANIFEST = "manifest.json"
STEP_DIRECTORY = re.compile(r"step-(0|[1-9][0-9]*)")
SHARD_FILE = re.compile(r"rank-[0-9]{5,}-[0-9a-f]{16}\.safetensors")


def write_manifest(directory: Path, body: dict[str, Any]) -> None:
    """Write `body`, which is JSON-able and carries no `sha256` of its own, with its hash, and sync the directory.

    Raises:
        CheckpointError: `body` is not strict JSON (NaN is not).
    """
    try:
        # Once through JSON, so that tuples and integer keys hash as what they will be read back as.
        body = json.loads(_canonical(body))
        text = _canonical(body | {"sha256": _digest(body)})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: state cannot be written as JSON: {error}") from error
    with open(directory / MANIFEST, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fsync(directory)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint directory `path`, its self-hash and shape checked.

    Raises:
        CheckpointError: there is none, it is damaged, of another format, or names something other than shard files.
    """
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        body: dict[str, Any] = json.loads(raw)
        claimed = body.pop("sha256")
        found = _digest(body)
        intact = claimed == found and _canonical(body | {"sha256": claimed}) == raw
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: not the JSON that was written") from error
    if not intact:
        raise CheckpointError(f"{file}: damaged: found sha256 {found}, expected {claimed}")
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{file}: found format {body.get('format')!r}, expected {FORMAT}")
    try:
        _check_body(body)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a checkpoint manifest: {error!r}") from error
    return body


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state that was saved with the checkpoint `path`. Needs no process group.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    state: dict[str, Any] = read_manifest(path)["state"]
    return state


def step_directories(root: Path) -> list[Path]:
    """Every `step-<N>` directory below `root`, committed or not, newest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if STEP_DIRECTORY.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def is_committed(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def committed(root: Path) -> list[Path]:
    """The checkpoints below `root` whose manifest is whole, newest first. Tensor files are not read: see `verify`."""
    return [path for path in step_directories(root) if is_committed(path)]


def verify(path: Path) -> None:
    """Read every file of the checkpoint `path` and compare size and SHA-256 with the manifest.

    Files that the manifest does not name are ignored.

    Raises:
        CheckpointError: names the first file that differs, what was found and what was expected.
    """
    files: dict[str, dict[str, Any]] = read_manifest(path)["files"]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for problem in pool.map(lambda item: _problem(path / item[0], **item[1]), files.items()):
            if problem is not None:
                raise CheckpointError(problem)


def newest_verified(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint below `root` that passes `verify`; None where there is no checkpoint at all.

    `warn` gets one line for each newer one that was skipped. Reads whole files: one rank calls it and tells the others.

    Raises:
        CheckpointError: there are checkpoints, and none passes.
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
    if damaged:
        raise CheckpointError(f"{root}: none of its checkpoints is whole ({', '.join(damaged)})")
    return None


def remove(path: Path) -> None:
    """Delete a checkpoint: the manifest first, so that a kill on the way leaves nothing that looks like one."""
    (path / MANIFEST).unlink(missing_ok=True)
    fsync(path)
    shutil.rmtree(path)


def purge(root: Path, newest: int, keep: int) -> None:
    """Keep the `keep` newest checkpoints up to step `newest`, which has just been saved.

    Uncommitted leftovers go too, and so do damaged checkpoints of later steps: a run that was resumed from before
    them would otherwise count them as its newest. Whole ones of later steps stay, and are not counted.
    """
    earlier = [path for path in step_directories(root) if step_of(path) <= newest]
    kept = [path for path in earlier if is_committed(path)][:keep]
    for path in earlier:
        if path not in kept:
            remove(path)
    for path in step_directories(root):
        if step_of(path) > newest:
            try:
                verify(path)
            except CheckpointError:
                remove(path)


def _problem(file: Path, size: int, sha256: str) -> str | None:
    try:
        found_size = file.stat().st_size
        if found_size != size:
            return f"{file}: found {found_size} bytes, expected {size}"
        with open(file, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return f"{file}: found nothing readable ({error.strerror}), expected {size} bytes"
    return None if found == sha256 else f"{file}: found sha256 {found}, expected {sha256}"


def _check_body(body: dict[str, Any]) -> None:
    """Raise TypeError, KeyError or AttributeError unless `body` has the fields and types that readers rely on."""
    if not isinstance(body["state"], dict):
        raise TypeError("state is not an object")
    for name, record in body["files"].items():
        if not SHARD_FILE.fullmatch(name):
            raise TypeError(f"file name {name!r}")
        if set(record) != {"size", "sha256"} or not isinstance(record["size"], int):
            raise TypeError(f"record of {name}")
    for name, record in body["tensors"].items():
        for chunk in record["chunks"]:
            numbers = [*record["shape"], *chunk["offset"], *chunk["shape"]]
            same_rank = len(record["shape"]) == len(chunk["offset"]) == len(chunk["shape"])
            if chunk["file"] not in body["files"] or not same_rank:
                raise TypeError(f"chunk of {name!r}")
            if not all(isinstance(number, int) and number >= 0 for number in numbers):
                raise TypeError(f"chunk of {name!r}")


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()
