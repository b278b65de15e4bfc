"""Which rectangle of which tensor a rank holds, and how rectangles get into and out of safetensors files."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import CheckpointError
from moe.region import LocalShard, Region, whole_shard

# torch's dtypes under the names that the safetensors format gives them.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SavedShard(NamedTuple):
    """What a rank tells the others about one tensor."""

    dtype: str
    shape: tuple[int, ...]
    region: Region | None
    """The part that this rank holds; None if it holds nothing of it."""


class Chunk(NamedTuple):
    """A region that `owner` writes."""

    name: str
    region: Region
    owner: int


class Read(NamedTuple):
    """One copy from a file: `target` is a view of the tensor being loaded."""

    key: str
    dtype: str
    chunk_shape: tuple[int, ...]
    slices: tuple[slice, ...]
    target: Tensor


def as_shard(tensor: Tensor | LocalShard) -> LocalShard:
    """A plain tensor is taken to be whole."""
    return tensor if isinstance(tensor, LocalShard) else whole_shard("", tensor)


def assign_owners(holdings: list[dict[str, SavedShard]]) -> list[Chunk]:
    """Give every distinct region to one of its holders, so that ranks write about as many bytes. Same on all ranks.

    Raises:
        CheckpointError: ranks disagree on a tensor's dtype or shape, or together do not hold each element of it once.
    """
    holders: dict[tuple[str, Region], list[int]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, of_rank in enumerate(holdings):
        for name, (dtype, shape, region) in of_rank.items():
            if kinds.setdefault(name, (dtype, shape)) != (dtype, shape):
                raise CheckpointError(
                    f"{name}: found {dtype} {shape} on rank {rank}, expected {kinds[name]} as elsewhere"
                )
            if region is not None:
                holders.setdefault((name, region), []).append(rank)
    held = dict.fromkeys(kinds, 0)
    for name, region in holders:
        held[name] += region.numel
    for name, (_, shape) in kinds.items():
        total = torch.Size(shape).numel()
        if held[name] != total:
            raise CheckpointError(f"{name}: found {held[name]} elements on all ranks together, expected {total}")

    widths = {name: dtype.itemsize for dtype, name in DTYPES.items()}
    load = [0] * len(holdings)
    chunks = []
    sized = [(region.numel * widths[kinds[name][0]], name, region) for name, region in holders]
    for size, name, region in sorted(sized, key=lambda item: (-item[0], item[1], item[2])):
        owner = min(holders[name, region], key=lambda rank: load[rank])
        load[owner] += size
        chunks.append(Chunk(name, region, owner))
    return chunks


class Part(NamedTuple):
    """A tensor to be written, which exists only while its turn lasts."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """The tensor, on any device."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shard(directory: Path, rank: int, parts: Sequence[tuple[str, Tensor]]) -> tuple[str, dict[str, Any]]:
    """Write `parts` (key, tensor on any device) as rank `rank`'s file of a checkpoint, and return its name and record.

    Raises:
        CheckpointError: as `write_parts`.
    """
    made = [Part(key, tensor.dtype, tuple(tensor.shape), partial(_same, tensor)) for key, tensor in parts]
    return write_parts(directory, rank, made)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def write_parts(directory: Path, rank: int, parts: Sequence[Part]) -> tuple[str, dict[str, Any]]:
    """As `write_shard`, with tensors that are made one by one.

    The name carries the content's hash, so that two checkpoints of one step can share a directory while one replaces
    the other.

    Raises:
        CheckpointError: the file could not be written (disk full, say). No part of it is left.
    """
    unnamed = directory / f"rank-{rank:05}.unfinished"
    record = write_safetensors(unnamed, parts)
    name = f"rank-{rank:05}-{record['sha256'][:16]}.safetensors"
    unnamed.rename(directory / name)
    return name, record


def write_safetensors(path: Path, parts: Sequence[Part], metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """Write one safetensors file, synced, and return its size and SHA-256.

    Written here rather than by the safetensors package: tensor by tensor, so that no second copy of the file is held,
    and hashed from memory on the way, so that what the disk garbled is caught too.

    Raises:
        CheckpointError: the file could not be written (disk full, say). No part of it is left.
    """
    # Wide types first: every tensor then starts at a multiple of its item size, as the format asks.
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for part in parts:
        start, end = end, end + part.nbytes
        header[part.key] = {"dtype": DTYPES[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    size = 8 + len(head) + end

    digest = hashlib.sha256()
    try:
        with open(path, "wb", buffering=0) as file:
            write_all(file.fileno(), len(head).to_bytes(8, "little") + head, digest)
            for part in parts:
                tensor = part.make()
                assert (tensor.dtype, tuple(tensor.shape)) == (part.dtype, part.shape), part.key
                # Any dtype as bytes: numpy knows no bfloat16.
                octets = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                write_all(file.fileno(), octets.data, digest)
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(describe(error, path.parent, size)) from error
    return {"size": size, "sha256": digest.hexdigest()}


def write_all(descriptor: int, content: bytes | memoryview, digest: Any) -> None:
    """Write and hash `content`; a short write (2 GiB is the most Linux takes at once) is continued."""
    rest = memoryview(content)
    while rest:
        written = os.write(descriptor, rest[: 1 << 26])
        digest.update(rest[:written])
        rest = rest[written:]


def describe(error: OSError, directory: Path, needed: int | None = None) -> str:
    """One line for a failed operation in `directory`; `needed`: bytes that were to be written."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or directory}: {error.strerror or error}"
    needs = "" if needed is None else f"this rank's part needs {needed} bytes, "
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return f"{directory}: {error.strerror}: {needs}{shutil.disk_usage(existing).free} bytes are free"


def plan_reads(name: str, record: dict[str, Any], local: Tensor, region: Region) -> list[tuple[str, Read]]:
    """The (file, read) pairs that fill `local`, which holds `region` of the saved tensor that `record` describes.

    Raises:
        CheckpointError: the saved chunks do not cover the region exactly once.
    """
    reads = []
    covered = 0
    for chunk in record["chunks"]:
        saved = Region(tuple(chunk["offset"]), tuple(chunk["shape"]))
        common = saved.intersect(region)
        if common is not None:
            covered += common.numel
            target = local[common.slices(region)]
            reads.append(
                (chunk["file"], Read(saved.key(name), record["dtype"], saved.shape, common.slices(saved), target))
            )
    if covered != region.numel:
        raise CheckpointError(f"{name}: found {covered} saved elements of {region.key(name)}, expected {region.numel}")
    return reads


def read_shard(file: Path, reads: Sequence[Read]) -> None:
    """Copy slices of one safetensors file into their targets; bytes outside the slices are not read.

    Raises:
        CheckpointError: the file is missing, is not a safetensors file, or lacks what the manifest says it holds.
    """
    try:
        with safe_open(file, framework="pt") as shard:
            for read in reads:
                part = shard.get_slice(read.key)
                found = (part.get_dtype(), tuple(part.get_shape()))
                if found != (read.dtype, read.chunk_shape):
                    raise CheckpointError(
                        f"{file}: {read.key}: found {found[0]} {found[1]}, expected {read.dtype} {read.chunk_shape}"
                    )
                read.target.copy_(part[read.slices] if read.slices else shard.get_tensor(read.key))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
