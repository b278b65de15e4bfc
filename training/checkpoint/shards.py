"""The regions of a checkpoint's tensors: which rank writes each region, and safetensors files that contain regions."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import CheckpointError, require
from common.files import explain_os_error, open_binary
from common.text import to_json
from moe.region import LocalShard, Region, whole_shard
from training.checkpoint.peers import NotFiniteError

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
"""Each supported dtype -> its name in the safetensors format."""


PIECE = 1 << 23
"""Bytes that are hashed while the piece is written."""
FLUSHED = 1 << 28
"""Bytes after which a file is flushed to the disk, so that its progress is the disk's and not that of a cache."""
Progress: TypeAlias = Callable[[Path, int, int], None]
"""Is called with a file, the bytes of it that have been read or written, and its size."""


class ShardInfo(NamedTuple):
    """A rank's shard of one tensor, without the values. Ranks exchange these before they write."""

    dtype: str
    """A value of `DTYPES`."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    region: Region | None
    """The region that the rank stores; None if the rank stores no element of the tensor."""


class WriteTask(NamedTuple):
    """A region of a tensor, and the rank that writes it to its file."""

    name: str
    region: Region
    rank: int


class LazyTensor(NamedTuple):
    """A tensor to write. It is made when it is written, so that only one such tensor is in memory at a time."""

    key: str
    """Its name in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """Returns the tensor, on any device."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SliceRead(NamedTuple):
    """One slice of a tensor in a safetensors file, and the memory to copy it into."""

    key: str
    """The tensor's name in the file."""
    dtype: str
    """The expected dtype of the tensor in the file, a value of `DTYPES`."""
    shape: tuple[int, ...]
    """The expected shape of the tensor in the file."""
    slices: tuple[slice, ...]
    target: Tensor
    """A view of the tensor that is loaded."""


def as_shard(tensor: Tensor | LocalShard) -> LocalShard:
    """Return a shard as it is, and a plain tensor as a shard that is the whole tensor."""
    return tensor if isinstance(tensor, LocalShard) else whole_shard("", tensor)


def assign_writers(shards_by_rank: Sequence[dict[str, ShardInfo]]) -> list[WriteTask]:
    """Choose one rank to write each distinct region, so that the ranks write about the same number of bytes.

    The result depends on the arguments only, so every rank computes the same one.

    Args:
        shards_by_rank: for each rank, tensor name -> the rank's shard.

    Raises:
        CheckpointError: ranks disagree on a tensor's dtype or shape, or the distinct regions of a tensor do not have
            as many elements together as the tensor.
    """
    holders: dict[tuple[str, Region], list[int]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, shards in enumerate(shards_by_rank):
        for name, (dtype, shape, region) in shards.items():
            if kinds.setdefault(name, (dtype, shape)) != (dtype, shape):
                raise CheckpointError(
                    f"{name}: found {dtype} {shape} on rank {rank}, expected {kinds[name]} as on the ranks before it"
                )
            if region is not None:
                holders.setdefault((name, region), []).append(rank)
    stored = dict.fromkeys(kinds, 0)
    for name, region in holders:
        stored[name] += region.numel
    for name, (_, shape) in kinds.items():
        total = torch.Size(shape).numel()
        if stored[name] != total:
            raise CheckpointError(f"{name}: found {stored[name]} elements on all ranks together, expected {total}")

    widths = {name: dtype.itemsize for dtype, name in DTYPES.items()}
    load = [0] * len(shards_by_rank)
    tasks = []
    sized = [(region.numel * widths[kinds[name][0]], name, region) for name, region in holders]
    # The largest region first, each to the holder that has the fewest bytes to write so far.
    for size, name, region in sorted(sized, key=lambda item: (-item[0], item[1], item[2])):
        writer = min(holders[name, region], key=lambda rank: load[rank])
        load[writer] += size
        tasks.append(WriteTask(name, region, writer))
    return tasks


def no_progress(file: Path, done: int, total: int) -> None:
    """The default of arguments of the type `Progress`: does nothing."""


def write_shard(
    directory: Path, rank: int, tensors: Sequence[tuple[str, Tensor]], progress: Progress = no_progress
) -> tuple[str, dict[str, Any]]:
    """Write `tensors` as the file of rank `rank` in the checkpoint directory `directory`.

    Args:
        tensors: (name in the file, tensor on any device) pairs.

    Returns:
        The file's name, and its record for the manifest.

    Raises:
        NotFiniteError: a tensor has an element that is not finite.
        CheckpointError: the file cannot be written, e.g. because the disk is full. No partial file remains.
    """
    lazy = [LazyTensor(key, t.dtype, tuple(t.shape), partial(_finite, key, t.detach())) for key, t in tensors]
    return write_lazy_shard(directory, rank, lazy, progress)


def _finite(key: str, tensor: Tensor) -> Tensor:
    """Return `tensor` on the CPU, after checking that all its elements are finite."""
    tensor = tensor.cpu()
    if tensor.is_floating_point() and tensor.numel():
        # The extremes of a tensor with a NaN are NaN. `isfinite` would write a tensor of booleans, which takes 20 times
        # as long.
        for extreme in torch.aminmax(tensor):
            require(math.isfinite(extreme), NotFiniteError, f"{key} has an element that is {extreme.item()}")
    return tensor


def write_lazy_shard(
    directory: Path, rank: int, tensors: Sequence[LazyTensor], progress: Progress = no_progress
) -> tuple[str, dict[str, Any]]:
    """Like `write_shard`, for tensors that are made one by one and not checked.

    The file's name contains the hash of its content. Two checkpoints of one step can therefore be in one directory
    while one of them replaces the other.

    Raises:
        CheckpointError: as in `write_shard`.
    """
    unnamed = directory / f"rank-{rank:05}.unfinished"
    record = write_safetensors(unnamed, tensors, progress=progress)
    name = f"rank-{rank:05}-{record['sha256'][:16]}.safetensors"
    unnamed.rename(directory / name)
    return name, record


def write_safetensors(
    path: Path,
    tensors: Sequence[LazyTensor],
    metadata: dict[str, str] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write one safetensors file and flush it to the disk.

    `safetensors.torch.save_file` takes all tensors at once and does not hash or flush the file. This function makes and
    writes one tensor at a time. It hashes the bytes in memory, so that a later `verify` also finds errors that happened
    while the file was written. A second thread hashes a piece while it is written.

    Returns:
        `{"size": bytes, "sha256": hexadecimal digits}`.

    Raises:
        CheckpointError: the file cannot be written, e.g. because the disk is full. No partial file remains.
    """
    # Wide dtypes first: every tensor then starts at a multiple of its item size, as the format requires.
    tensors = sorted(tensors, key=lambda lazy: -lazy.dtype.itemsize)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for lazy in tensors:
        start, end = end, end + lazy.nbytes
        header[lazy.key] = {"dtype": DTYPES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [start, end]}
    encoded = to_json(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    size = 8 + len(encoded) + end

    try:
        with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
            output = _HashedOutput(file.fileno(), path, size, pool, progress)
            output.write(len(encoded).to_bytes(8, "little") + encoded)
            for lazy in tensors:
                tensor = lazy.make()
                assert (tensor.dtype, tuple(tensor.shape)) == (lazy.dtype, lazy.shape), lazy.key
                # numpy has no bfloat16, so every dtype is viewed as bytes.
                output.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(explain_os_error(error, path.parent, size)) from error
    return {"size": size, "sha256": output.digest.hexdigest()}


class _HashedOutput:
    """An open file, and the hash of what has been written to it.

    Args:
        size: bytes of the whole file.
        pool: one thread, which hashes.
    """

    def __init__(self, descriptor: int, path: Path, size: int, pool: ThreadPoolExecutor, progress: Progress) -> None:
        self.digest = hashlib.sha256()
        self._descriptor, self._path, self._size, self._pool, self._progress = descriptor, path, size, pool, progress
        self._written, self._flushed = 0, 0
        progress(path, 0, size)

    def write(self, content: bytes | memoryview) -> None:
        """Write `content` completely, and add it to the hash."""
        whole = memoryview(content)
        for start in range(0, len(whole), PIECE):
            rest = whole[start : start + PIECE]
            hashed = self._pool.submit(self.digest.update, rest)
            try:
                while rest:  # One call can write less than it was given.
                    rest = rest[os.write(self._descriptor, rest) :]
            finally:
                hashed.result()
            self._written += len(whole[start : start + PIECE])
            if self._written - self._flushed >= FLUSHED:
                os.fdatasync(self._descriptor)
                self._flushed = self._written
            self._progress(self._path, self._written, self._size)


def find_slices(name: str, record: dict[str, Any], local: Tensor, region: Region) -> list[tuple[str, SliceRead]]:
    """Find the slices of a checkpoint's files that fill `local`, which is `region` of the saved tensor `name`.

    Args:
        record: the tensor's record in the manifest.

    Returns:
        (file name, slice) pairs.

    Raises:
        CheckpointError: the saved chunks have more or fewer elements in the region than it has.
    """
    slices = []
    covered = 0
    for chunk in record["chunks"]:
        saved = Region(tuple(chunk["offset"]), tuple(chunk["shape"]))
        common = saved.intersect(region)
        if common is not None:
            covered += common.numel
            target = local[common.slices(region)]
            slices.append(
                (chunk["file"], SliceRead(saved.key(name), record["dtype"], saved.shape, common.slices(saved), target))
            )
    require(
        covered == region.numel,
        CheckpointError,
        f"{name}: found {covered} saved elements of {region.key(name)}, expected {region.numel}",
    )
    return slices


def read_shard(file: Path, slices: Sequence[SliceRead], progress: Progress = no_progress) -> None:
    """Copy slices of one safetensors file into their targets. Bytes outside the slices are not read.

    Raises:
        CheckpointError: the file is missing, is not a safetensors file, or lacks a tensor that the manifest names.
    """
    try:
        open_binary(file).close()  # The library would wait for a named pipe.
        with safe_open(file, framework="pt") as shard:
            done, total = 0, sum(read.target.nbytes for read in slices)
            for read in slices:
                progress(file, done, total)
                stored = shard.get_slice(read.key)
                dtype, shape = stored.get_dtype(), tuple(stored.get_shape())
                require(
                    (dtype, shape) == (read.dtype, read.shape),
                    CheckpointError,
                    f"{file}: {read.key}: found {dtype} {shape}, expected {read.dtype} {read.shape}",
                )
                read.target.copy_(stored[read.slices] if read.slices else shard.get_tensor(read.key))
                done += read.target.nbytes
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
