"""The manifest of a checkpoint, and the checkpoints of a run: which are complete, which is the newest, which to delete.

`manifest.json` has the size and SHA-256 of every file, the regions of every tensor, the JSON state of the run, and the
hash of its own content. It is written last. A directory without a manifest, or with a manifest whose content does not
have the hash that it gives, is not a committed checkpoint.

The hash detects damage. It does not prove who wrote the file. Everything that is read here is therefore checked as
untrusted input: a manifest cannot name a file outside its directory, and reading it cannot run code.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from common.errors import CheckpointError, require
from common.files import UnusableFile, fsync, read_file, sha256_of, write_atomically
from common.text import parse_json, shorten
from training.checkpoint.peers import ALONE, Peers, StalledError

FORMAT = 1
"""The version of the checkpoint format."""
CHECKPOINTS = "checkpoints"
"""Name of the directory with the checkpoints, in a run's directory."""
MANIFEST = "manifest.json"
MAX_MANIFEST = 2**29
"""The most bytes of a manifest."""
MAX_DIMS = 64
"""The most dimensions of a tensor, as in torch."""
HELDOUT_LOSS = "heldout_loss"
"""Key of a checkpoint's state: the held-out loss at its step, if it was evaluated then."""
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
    require(len(text) <= MAX_MANIFEST, CheckpointError, f"{directory}: a manifest of {len(text)} bytes is too large")
    write_atomically(directory / MANIFEST, text)
    fsync(directory)


def begin_checkpoint(root: Path, step: int) -> Path:
    """Make the directory in which the checkpoint of a step is written until `commit_checkpoint`, and remove what
    unfinished ones have left.

    Raises:
        OSError: it cannot be made.
    """
    root.mkdir(parents=True, exist_ok=True)
    for unfinished in root.glob(".tmp-*"):
        shutil.rmtree(unfinished)
    temporary = root / f".tmp-step-{step}"
    temporary.mkdir()
    return temporary


def commit_checkpoint(temporary: Path, final: Path) -> None:
    """Make the finished directory `temporary` the checkpoint `final`, in one atomic step."""
    if not final.exists():
        temporary.rename(final)
        fsync(final.parent)
        return
    new_names = {file.name for file in temporary.iterdir()}
    for name in sorted(new_names - {MANIFEST}):
        os.replace(temporary / name, final / name)
    fsync(final)
    os.replace(temporary / MANIFEST, final / MANIFEST)
    fsync(final)
    # The checkpoint is saved now. What cannot be removed here goes with it, or with the next one that is written.
    with suppress(OSError):
        temporary.rmdir()
    for file in final.iterdir():
        if file.name not in new_names:
            with suppress(OSError):
                file.unlink()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint directory `path`, after checking its hash and its fields.

    Raises:
        CheckpointError: the manifest is missing or damaged, has another format, names a file that is not a shard file,
            or is of another step than the directory's name.
    """
    file = path / MANIFEST
    try:
        raw = read_file(file, MAX_MANIFEST)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    return parse_manifest(raw, str(file), step_of(path) if STEP_DIRECTORY.fullmatch(path.name) else None)


def parse_manifest(raw: bytes, file: str, step: int | None) -> dict[str, Any]:
    """Return the manifest with the content `raw`, after checking its hash and its fields.

    Args:
        file: its path or URL, for messages.
        step: the step of the checkpoint; None if its directory does not say.

    Raises:
        CheckpointError: as in `read_manifest`.
    """
    try:
        body: dict[str, Any] = parse_json(raw)
        expected = body.pop("sha256")
        actual = _digest(body)
        intact = expected == actual and _canonical(body | {"sha256": expected}) == raw
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: not the JSON that was written") from error
    require(intact, CheckpointError, f"{file}: damaged: found sha256 {actual}, expected {expected}")
    version = shorten(repr(body.get("format")), 40)
    require(version == str(FORMAT), CheckpointError, f"{file}: found format {version}, expected {FORMAT}")
    try:
        _check_body(body)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a checkpoint manifest: {shorten(repr(error), 200)}") from error
    found = body["state"].get("step", step)
    require(
        step is None or found == step,
        CheckpointError,
        f"{file}: found the checkpoint of step {shorten(repr(found), 40)}, expected that of step {step}, "
        "as its directory says",
    )
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


def newest_committed(root: Path) -> Path | None:
    """Return the newest committed checkpoint in `root`, or None. Manifests of older ones are not read."""
    return next(filter(is_committed, step_directories(root)), None)


def verify(path: Path, peers: Peers = ALONE, *, again: bool = True) -> None:
    """Read every file of the checkpoint `path` and compare its size and SHA-256 with the manifest. Collective.

    Files that the manifest does not name are ignored.

    Args:
        peers: the ranks that divide the files between them.
        again: whether to read files that this process has found intact before, and that have not been changed since.

    Raises:
        CheckpointError: on all ranks. It names the first file that differs, with the actual and the expected value.
    """

    def find() -> list[str]:
        files: dict[str, dict[str, Any]] = read_manifest(path)["files"]
        mine = sorted(files.items())[peers.rank :: peers.world_size]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            problems = pool.map(lambda item: _find_damage(path / item[0], peers, again, **item[1]), mine)
        return [problem for problem in problems if problem is not None]

    def report(found: list[list[str]]) -> list[None]:
        for problem in itertools.chain(*found):
            raise CheckpointError(problem)
        return [None] * len(found)

    peers.run(find, path, report)


def damage_of(path: Path, peers: Peers = ALONE, *, again: bool = True) -> CheckpointError | None:
    """Return the error of `verify`, or None if the checkpoint is intact. Collective.

    Raises:
        StalledError: on all ranks, if one made no progress. It says nothing about the checkpoint.
    """
    try:
        verify(path, peers, again=again)
    except StalledError:
        raise
    except CheckpointError as error:
        return error
    return None


class Copies(Protocol):
    """Copies of the checkpoints of a run, elsewhere (`training.checkpoint.remote`). The methods are collective."""

    url: str

    def steps(self, peers: Peers = ALONE) -> list[int]:
        """Return the steps of all copies."""

    def fetch(self, step: int, root: Path, peers: Peers) -> CheckpointError | None:
        """Make a copy the checkpoint `root/step-<step>`. Return why it is not intact, or None."""


class UnfinishedError(CheckpointError):
    """A copy has no manifest. It is not damaged: it is no checkpoint yet."""


def newest_verified(
    root: Path, warn: Callable[[str], None], peers: Peers = ALONE, copies: Copies | None = None
) -> Path | None:
    """Return the newest checkpoint in `root` that passes `verify`, or None if there is no checkpoint at all.

    Collective. A copy is fetched if `root` has no intact checkpoint of its step or a later one.

    Args:
        warn: called on rank 0 with one line for each newer checkpoint that is skipped because it is damaged, and with
            one line about a copy that is used.

    Raises:
        CheckpointError: on all ranks, if there are checkpoints, and all of them are damaged.
        RemoteError: on all ranks, if `copies` are in a store that refused or did not answer.
    """

    def say(line: str) -> None:
        if peers.rank == 0:
            warn(line)

    here = {step_of(path): path for path in listed(root, peers)}
    there = {step: f"{copies.url}/step-{step}" for step in copies.steps(peers)} if copies is not None else {}
    damaged = []
    for step in sorted({*here, *there}, reverse=True):
        error = damage_of(here[step], peers) if step in here else None
        if step in here and error is None:
            return here[step]
        if error is not None:
            say(f"skipping checkpoint step-{step}: {error}")
            damaged.append(f"step-{step}")
        if copies is not None and step in there:
            error = copies.fetch(step, root, peers)
            if error is None:
                older = [f"step-{other}" for other in here if other < step]
                has = "a damaged one" if step in here else f"{older[0]} as its newest" if older else "none"
                say(f"step-{step} is copied from {copies.url}: {root} has {has}")
                return root / f"step-{step}"
            say(f"skipping {there[step]}: {error}")
            if not isinstance(error, UnfinishedError):
                damaged.append(there[step])
    require(
        not damaged,
        CheckpointError,
        f"{root}: expected an undamaged checkpoint; all are damaged ({', '.join(damaged)})",
    )
    return None


def listed(root: Path, peers: Peers) -> list[Path]:
    """Return what `step_directories` returns on rank 0, on all ranks. Collective."""
    names = peers.on_rank_0(lambda: [path.name for path in step_directories(root)], root)
    return [root / name for name in names]


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint. The manifest goes first, so that a partly deleted checkpoint is not a committed one.

    Of a symbolic link, only the link is deleted: what it points to can be another checkpoint that is kept.
    """
    if path.is_symlink():
        path.unlink()
        return
    (path / MANIFEST).unlink(missing_ok=True)
    fsync(path)
    shutil.rmtree(path)


class Choice(NamedTuple):
    """What becomes of the checkpoints of a run, by their steps."""

    newest: list[int]
    """The newest intact ones, which are kept."""
    superfluous: set[int]
    """Those to delete."""
    others: set[int]
    """Those to delete only if they have no undamaged manifest."""


class Retention(NamedTuple):
    """Which checkpoints are kept."""

    keep: int
    """Number of newest checkpoints."""
    every: int = 0
    """Every checkpoint whose step is a multiple of this number is kept, too; 0: none."""
    best: int = 0
    """Number of checkpoints with the lowest held-out loss that are kept, too."""

    def choose(
        self,
        steps: Sequence[int],
        saved: int | None,
        is_intact: Callable[[int], bool],
        best_first: Callable[[Sequence[int]], Sequence[int]],
    ) -> Choice:
        """Choose among the checkpoints `steps`, the newest first.

        Args:
            saved: the step that was just saved, which is intact; None: there is none, and no step counts as later.
            is_intact: whether a checkpoint is not damaged. It is called for the checkpoints that are kept only.
            best_first: returns those of some steps that have a held-out loss, the lowest first.
        """

        def first_intact(candidates: Sequence[int], number: int) -> list[int]:
            return list(itertools.islice(filter(is_intact, candidates), number))

        later = [step for step in steps if saved is not None and step > saved]
        just_saved = [step for step in steps if step == saved]
        older = [step for step in steps if step not in later and step not in just_saved]
        newest = just_saved + first_intact(older, self.keep - len(just_saved))
        enough = len(newest) >= self.keep
        kept = {*newest, *first_intact(later, len(later))}
        if self.best:
            kept |= {*first_intact(best_first(just_saved + older), self.best)}
        superfluous = {step for step in steps if step not in kept and (step in later or enough)}
        if self.every:
            superfluous -= {step for step in superfluous if step % self.every == 0 and step not in later}
        return Choice(newest, superfluous, {*steps} - superfluous - kept)


def delete_old_checkpoints(root: Path, newest: int | None, retention: Retention, peers: Peers = ALONE) -> None:
    """Keep the newest intact checkpoints up to step `newest`, which was just saved, and delete older ones. Collective.

    A damaged checkpoint counts as none: the ranks verify the checkpoints that they keep. Files that this process has
    found intact before, and that have not been changed since, are not read again. Checkpoints that `retention.every`
    keeps are not verified. A damaged checkpoint is deleted as soon as there are `retention.keep` intact ones.

    This also deletes directories whose manifest is missing or damaged, and damaged checkpoints of later steps. Later
    steps exist when a run was resumed from an earlier step, and a damaged one would count as the run's newest
    checkpoint. Undamaged checkpoints of later steps are kept and are not counted.

    Args:
        newest: None if no checkpoint was just saved. All are verified then.

    Raises:
        CheckpointError: on all ranks, if no checkpoint is intact, or one cannot be deleted.
    """
    path_of = {step_of(path): path for path in listed(root, peers)}
    choice = retention.choose(
        [*path_of],
        newest,
        # The checkpoint of this step was hashed when it was written.
        is_intact=lambda step: damage_of(path_of[step], peers, again=False) is None,
        best_first=lambda steps: _best_first([path_of[step] for step in steps], peers),
    )
    require(choice.newest, CheckpointError, f"{root}: expected an intact checkpoint; nothing is deleted")

    def delete() -> None:
        for step, path in path_of.items():
            if step in choice.superfluous or (step in choice.others and _is_uncommitted(path)):
                delete_checkpoint(path)

    peers.on_rank_0(delete, root)


def _is_uncommitted(path: Path) -> bool:
    """Whether the manifest of `path` is missing or damaged. One that the disk does not give may be neither."""
    try:
        read_manifest(path)
    except CheckpointError as error:
        refused = error.__cause__
        return not isinstance(refused, OSError) or isinstance(refused, FileNotFoundError | UnusableFile)
    return False


def _best_first(paths: list[Path], peers: Peers) -> list[int]:
    """Return the steps of the checkpoints that record a held-out loss, the lowest first; of equal ones the newest.
    Collective."""

    def find() -> list[int]:
        states = {}
        for path in paths:
            with suppress(CheckpointError):
                states[step_of(path)] = read_state(path)
        return by_loss(states)

    return [*peers.on_rank_0(find, paths[0].parent)] if paths else []


def by_loss(states: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Return the steps whose state has a held-out loss, the lowest loss first. Equal ones stay in their order.

    >>> by_loss({30: {"heldout_loss": 2.5}, 20: {"heldout_loss": 2.0}, 10: {"heldout_loss": None}})
    [20, 30]
    """
    found = [(state.get(HELDOUT_LOSS), step) for step, state in states.items()]
    return [step for _, step in sorted((pair for pair in found if isinstance(pair[0], int | float)), key=itemgetter(0))]


_intact: set[tuple[Path, int, int, int, str]] = set()
"""Path, size, inode, time of change and SHA-256 of the files that this process has found intact."""
SETTLED_NS = 2 * 10**9
"""A file that is changed twice within the resolution of the file system's clock looks unchanged. Such a young file is
always read again."""


def _find_damage(file: Path, peers: Peers, again: bool, size: int, sha256: str) -> str | None:
    """Return a message if `file` does not have this size and SHA-256, else None."""
    try:
        status = file.stat()
        if status.st_size != size:
            return f"{file}: found {status.st_size} bytes, expected {size}"
        known = (file, size, status.st_ino, status.st_mtime_ns, sha256)
        if known in _intact and not again:
            return None
        now = time.time_ns()
        actual = sha256_of(file, lambda done: peers.progress(file, done, size))
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror}), expected {size} bytes"
    if actual != sha256:
        return f"{file}: found sha256 {actual}, expected {sha256}"
    if now - status.st_mtime_ns > SETTLED_NS:
        _intact.add(known)
    return None


def _check_body(body: dict[str, Any]) -> None:
    """Raise TypeError, KeyError or AttributeError unless `body` has the fields and types that a reader needs."""
    require(isinstance(body["state"], dict), TypeError, "state is not an object")
    for name, record in body["files"].items():
        require(SHARD_FILE.fullmatch(name), TypeError, f"file name {name!r}")
        has_types = _is_size([record["size"]]) and isinstance(record["sha256"], str)
        require(set(record) == {"size", "sha256"} and has_types, TypeError, f"record of {name}")
    for name, record in body["tensors"].items():
        dims, chunks = len(record["shape"]), record["chunks"]
        sizes = [record["shape"], *(chunk[key] for chunk in chunks for key in ("offset", "shape"))]
        require(
            dims <= MAX_DIMS
            and all(_is_size(size) and len(size) == dims for size in sizes)
            and math.prod(record["shape"]) < 2**63,
            TypeError,
            f"shapes of {name!r}",
        )
        require(
            isinstance(record["dtype"], str) and all(chunk["file"] in body["files"] for chunk in chunks),
            TypeError,
            f"record of {name!r}",
        )


def _is_size(value: Any) -> bool:
    """Whether `value` is a list of whole numbers that can be sizes or offsets of a tensor."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _canonical(body: dict[str, Any]) -> bytes:
    """Return the one JSON text that stands for `body`: sorted keys and no white space."""
    return json.dumps(body, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()
