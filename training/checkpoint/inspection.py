"""What a checkpoint contains, and how two checkpoints differ. No layout and no model are needed."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import CheckpointError, expect_no_tensors, require
from common.text import first_line
from moe.region import Region
from training.checkpoint.manifest import HELDOUT_LOSS, MANIFEST, read_manifest, step_directories, step_of, verify
from training.checkpoint.remote import RemoteCheckpoints
from training.checkpoint.shards import DTYPES, SliceRead, find_slices, read_shard

DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


class Found(NamedTuple):
    """A checkpoint, in a directory or in a store. All functions raise a CheckpointError if it is damaged."""

    where: str
    """Its path or URL."""
    read_manifest: Callable[[], dict[str, Any]]
    verify: Callable[[], None]
    """Reads all its files."""
    saved_at: Callable[[], float | None]
    """Returns seconds since the epoch, or None if they are not known."""


def found_in(root: Path) -> dict[int, Found]:
    """Return step -> checkpoint of those in the directory `root`, the newest first."""
    return {
        step_of(path): Found(str(path), partial(read_manifest, path), partial(verify, path), partial(_saved_at, path))
        for path in step_directories(root)
    }


def found_copies(remote: RemoteCheckpoints) -> dict[int, Found]:
    """Return step -> checkpoint of those in a store, the newest first."""
    return {
        step: Found(
            remote.url_of(step), partial(remote.read_manifest, step), partial(remote.verify, step), lambda: None
        )
        for step in remote.steps()
    }


def _saved_at(path: Path) -> float:
    try:
        return (path / MANIFEST).stat().st_mtime
    except OSError as error:  # A run that goes on has deleted it.
        raise CheckpointError(f"{path / MANIFEST}: cannot be read: {error.strerror}") from error


class Contents(NamedTuple):
    """What the manifest of a checkpoint says."""

    saved_at: float | None
    """Seconds since the epoch; None if they are not known."""
    size: int
    """Bytes of all files of tensors."""
    files: int
    parameters: int
    """Elements of the model's weights and buffers."""
    tensors: dict[str, dict[str, Any]]
    """The record of every tensor: dtype, shape and chunks."""
    layout: dict[str, int]
    """The parallel axes of more than one rank that the run had; empty if the checkpoint does not record them."""
    loss: float | None
    """The held-out loss, if the model was evaluated after the same step."""


def read_contents(checkpoint: Found) -> Contents:
    """Return what the manifest of a checkpoint says. The files of tensors are not read.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    body = checkpoint.read_manifest()
    state, tensors = body["state"], body["tensors"]
    parallel = state.get("config", {}).get("parallel", {}) if isinstance(state.get("config"), dict) else {}
    axes = parallel.items() if isinstance(parallel, dict) else ()
    loss = state.get(HELDOUT_LOSS)
    return Contents(
        saved_at=checkpoint.saved_at(),
        size=sum(record["size"] for record in body["files"].values()),
        files=len(body["files"]),
        parameters=sum(math.prod(tensors[name]["shape"]) for name in tensors if name.startswith("model.")),
        tensors=tensors,
        layout={axis: size for axis, size in axes if type(size) is int and size > 1},
        loss=loss if isinstance(loss, float) else None,
    )


class Difference(NamedTuple):
    """How a tensor differs between two checkpoints."""

    name: str
    equal: bool
    """Whether all bits are equal."""
    largest: float
    """The largest absolute difference of an element."""
    relative: float
    """The norm of the difference, divided by the norm of the first tensor."""


def compare(first: Path, second: Path) -> Iterator[Difference]:
    """Yield the difference of every tensor of two checkpoints, which can have been saved by different layouts.

    One tensor of each is in memory at a time. Hashes are not checked: see `verify`.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the checkpoints have tensors of other names, shapes or dtypes.
    """
    ours, theirs = (read_manifest(path)["tensors"] for path in (first, second))
    expect_no_tensors(second, f"missing that {first} has", ours.keys() - theirs.keys(), CheckpointError)
    expect_no_tensors(first, f"missing that {second} has", theirs.keys() - ours.keys(), CheckpointError)
    kinds = {name: [(record[name]["dtype"], record[name]["shape"]) for record in (ours, theirs)] for name in ours}
    different = [name for name, (mine, other) in kinds.items() if mine != other]
    expect_no_tensors(second, f"of another shape or dtype than in {first}", different, CheckpointError)
    for name in sorted(ours):
        a, b = read_tensor(first, name, ours[name]), read_tensor(second, name, theirs[name])
        if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            yield Difference(name, True, 0.0, 0.0)
            continue
        apart = a.double() - b.double()
        largest = apart.abs().max().item()
        # 0 and -0 differ in their bits only.
        relative = (apart.norm() / a.double().norm()).item() if largest else 0.0
        yield Difference(name, False, largest, relative)


def read_tensor(path: Path, name: str, record: dict[str, Any]) -> Tensor:
    """Return a whole tensor of the checkpoint `path`.

    Args:
        record: its record in the manifest.

    Raises:
        CheckpointError: a file cannot be read, the chunks have not as many elements as the tensor, or it does not fit
            in memory.
    """
    require(record["dtype"] in DTYPE_OF, CheckpointError, f"{path}: {name}: found dtype {record['dtype']!r}")
    try:
        whole = torch.empty(record["shape"], dtype=DTYPE_OF[record["dtype"]])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {name}: expected a tensor that fits in memory ({first_line(error)})") from error
    slices: dict[str, list[SliceRead]] = {}
    if whole.numel():
        for file, read in find_slices(name, record, whole, Region.whole(record["shape"])):
            slices.setdefault(file, []).append(read)
    for file, reads in slices.items():
        read_shard(path / file, reads)
    return whole
