"""Sharded checkpoints of any engine and any layout: saved by all ranks, committed by one rename, loaded on other ranks.

A checkpoint is a directory `step-<N>` with one safetensors file a rank and a manifest (`training.checkpoint.manifest`).
Every element is saved once: a region that several ranks hold is written by the one of them that has least to write.
Loading cuts the saved regions anew for the placements it finds, and reads only the slices that a rank needs.

Why not `torch.distributed.checkpoint`: its FileSystemWriter keeps its index as raw pickle, which runs code when it is
loaded. Its HuggingFaceStorageWriter (`save_distributed=True`) is free of that and did reshard DTensors when tried, but
neither syncs nor hashes, says nothing about a dtype that differs, and hides how many collectives run before a failure
is known everywhere. Planning, writing, and reading are about 150 lines here, and each line can be read.

`save` and `load` are collective over the default process group, and work without one. All ranks must see the same
directory (a shared file system). A plain tensor is taken to be the same on all ranks that hold its name: state that
differs by rank needs names that do. While one rank writes longer than the process group's time-out, others give up.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import CheckpointError
from common.files import fsync
from moe.region import LocalShard
from training.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    committed,
    newest_verified,
    purge,
    read_manifest,
    read_state,
    verify,
    write_manifest,
)
from training.checkpoint.shards import (
    DTYPES,
    Chunk,
    Read,
    SavedShard,
    as_shard,
    assign_owners,
    describe,
    plan_reads,
    read_shard,
    write_shard,
)

__all__ = ["CheckpointError", "committed", "load", "newest_verified", "read_state", "save", "verify"]

T = TypeVar("T")


def save(
    root: Path, step: int, tensors: Mapping[str, Tensor | LocalShard], state: dict[str, Any], *, keep: int
) -> Path:
    """Save `tensors` (whole, or this rank's parts) and rank 0's JSON-able `state`; returns `root/step-<step>`.

    Order: all ranks write and sync files in `root/.tmp-step-<step>`; rank 0 writes and syncs the manifest, renames the
    directory, syncs `root`, and deletes all but the `keep` newest checkpoints. A kill at any point leaves the older
    checkpoints whole and at most debris, which the next save removes. If the step exists (a run that was resumed from
    an earlier one, or saves at its end again), the new files move in beside the old ones, under other names unless
    their content is the same, and replacing the manifest is the commit: there is no moment without a whole checkpoint.

    Raises:
        CheckpointError: on all ranks, if any rank failed; what it had written is removed, older checkpoints are
            untouched. Only where the message begins with "saved" is the step on the disk.
    """
    assert keep >= 1, keep
    rank = _rank()
    final, temporary = root / f"step-{step}", root / f".tmp-step-{step}"
    parts: dict[str, Tensor] = {}

    def prepare() -> dict[str, SavedShard]:
        if rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            for debris in root.glob(".tmp-*"):
                shutil.rmtree(debris)
            temporary.mkdir()
        holdings = {}
        for name, (local, shape, region) in ((name, as_shard(tensor)) for name, tensor in tensors.items()):
            if local.dtype not in DTYPES:
                raise CheckpointError(
                    f"{name}: found dtype {local.dtype}, expected one of {', '.join(DTYPES.values())}"
                )
            if region.numel:
                parts[name] = local
            holdings[name] = SavedShard(DTYPES[local.dtype], shape, region if region.numel else None)
        return holdings

    def write() -> tuple[str, dict[str, Any]]:
        mine = [(chunk.region.key(chunk.name), parts[chunk.name]) for chunk in chunks if chunk.owner == rank]
        return write_shard(temporary, rank, mine)

    def commit() -> None:
        if rank == 0:
            _check_visible(temporary, files)
            write_manifest(temporary, _manifest_body(holdings, chunks, files, state))
            _publish(temporary, final)

    try:
        holdings = _on_all_ranks(prepare, root)
        chunks = assign_owners(holdings)
        files = _on_all_ranks(write, root)
        _on_all_ranks(commit, root)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        _on_all_ranks(lambda: purge(root, step, keep) if rank == 0 else None, root)
    except CheckpointError as error:
        raise CheckpointError(f"saved {final}, but others could not be removed: {error}") from error
    return final


def load(path: Path, tensors: Mapping[str, Tensor | LocalShard]) -> None:
    """Fill `tensors` (whole, or this rank's parts) in place from the checkpoint `path`, whoever saved it.

    Hashes are not checked again: choose `path` with `newest_verified`, or call `verify` on one rank first.

    Raises:
        CheckpointError: on all ranks, if any rank failed: damaged files, names that only one side has (all ranks' names
            together are held against the checkpoint's), shapes or dtypes that differ. Nothing is written before names,
            shapes and dtypes have been found right on all ranks.
    """
    reads: dict[str, list[Read]] = {}
    saved: dict[str, Any] = {}

    def prepare() -> list[str]:
        saved.update(read_manifest(path)["tensors"])
        wanted = {name: as_shard(tensor) for name, tensor in tensors.items()}
        _refuse(path, "missing", [name for name in wanted if name not in saved])
        shapes = {name: (tuple(saved[name]["shape"]), shape) for name, (_, shape, _) in wanted.items()}
        dtypes = {name: (saved[name]["dtype"], DTYPES.get(local.dtype)) for name, (local, _, _) in wanted.items()}
        for what, pairs in (("shape", shapes), ("dtype", dtypes)):
            different = [
                f"{name} (found {found}, expected {own})" for name, (found, own) in pairs.items() if found != own
            ]
            _refuse(path, f"of another {what}", different)
        for name, (local, _, region) in wanted.items():
            if region.numel:
                for file, read in plan_reads(name, saved[name], local, region):
                    reads.setdefault(file, []).append(read)
        return list(tensors)

    def read_all() -> None:
        for file, of_file in reads.items():
            read_shard(path / file, of_file)

    wanted = {name for names in _on_all_ranks(prepare, path) for name in names}
    _refuse(path, "unexpected", sorted(saved.keys() - wanted))
    _on_all_ranks(read_all, path)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _on_all_ranks(work: Callable[[], T], path: Path) -> list[T]:
    """Run `work` on every rank and return all ranks' results; if it failed on any, raise CheckpointError on all."""
    result: T | None = None
    message: str | None = None
    cause: Exception | None = None
    try:
        result = work()
    except CheckpointError as error:
        message, cause = str(error), error
    except OSError as error:
        message, cause = describe(error, path), error
    except Exception as error:  # Whatever it is, the other ranks wait and must hear of it.
        message, cause = f"{path}: {type(error).__name__}: {error}", error
    outcomes: list[Any] = [(result, message)]
    if dist.is_initialized():
        outcomes *= dist.get_world_size()
        dist.all_gather_object(outcomes, (result, message))
    failures = {rank: failure for rank, (_, failure) in enumerate(outcomes) if failure is not None}
    for rank, failure in failures.items():
        common = len(failures) == len(outcomes) and len(set(failures.values())) == 1
        raise CheckpointError(failure if common else f"rank {rank}: {failure}") from cause
    return [outcome for outcome, _ in outcomes]


def _manifest_body(
    holdings: list[dict[str, SavedShard]],
    chunks: list[Chunk],
    files: list[tuple[str, dict[str, Any]]],
    state: dict[str, Any],
) -> dict[str, Any]:
    tensors: dict[str, dict[str, Any]] = {}
    for of_rank in holdings:
        for name, holding in of_rank.items():
            tensors.setdefault(name, {"dtype": holding.dtype, "shape": holding.shape, "chunks": []})
    for name, region, owner in chunks:
        tensors[name]["chunks"].append({"file": files[owner][0], "offset": region.offset, "shape": region.shape})
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "state": state,
        "files": dict(files),
        "tensors": tensors,
    }


def _check_visible(directory: Path, files: list[tuple[str, dict[str, Any]]]) -> None:
    for rank, (name, record) in enumerate(files):
        file = directory / name
        if not file.is_file() or file.stat().st_size != record["size"]:
            raise CheckpointError(
                f"{file}: rank {rank} wrote it, and rank 0 does not see it: expected a shared directory"
            )


def _publish(temporary: Path, final: Path) -> None:
    """Make the finished directory `temporary` the checkpoint `final`, in one atomic step."""
    if not final.exists():
        temporary.rename(final)
        fsync(final.parent)
        return
    news = {file.name for file in temporary.iterdir()}
    for name in sorted(news - {MANIFEST}):
        os.replace(temporary / name, final / name)
    fsync(final)
    os.replace(temporary / MANIFEST, final / MANIFEST)
    fsync(final)
    temporary.rmdir()
    for file in final.iterdir():
        if file.name not in news:
            file.unlink()


def _refuse(path: Path, what: str, names: list[str]) -> None:
    """Raise CheckpointError that lists the first five of `names`, if there are any."""
    if names:
        rest = f", and {len(names) - 5} more" if len(names) > 5 else ""
        raise CheckpointError(f"{path}: {len(names)} tensors {what}: {', '.join(names[:5])}{rest}")
