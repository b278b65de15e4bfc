"""Sharded checkpoints for every engine and layout: all ranks save, one rename commits, and other ranks can load.

A checkpoint is a directory `step-<N>` with one safetensors file per rank and a manifest
(`training.checkpoint.manifest`). Every element is saved once: if several ranks store the same region, one of them
writes it. `load` does not need the layout that `save` had. It intersects the saved regions with the regions that each
rank stores now, and a rank reads only the slices that it needs.

Why not `torch.distributed.checkpoint`? Its FileSystemWriter saves its index as pickle, and loading pickle can run any
code. Its HuggingFaceStorageWriter (`save_distributed=True`) uses no pickle and reshards, but it has neither hashes nor
a manifest. With torch 2.13 it loads, without any error, a file with a flipped bit, a checkpoint from which a rank's
file is missing (the elements keep their old values), and fp32 weights into an fp64 tensor. It also builds a second copy
of the whole file in memory. Planning, writing and reading take about 150 lines here.

`save` and `load` are collective over the default process group, and also work without one. All ranks must see the same
directory (a shared file system). A plain tensor must be equal on all ranks that pass its name, so state that differs
between ranks needs different names. If one rank writes for longer than the process group's time-out, the other ranks
stop with an error.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import CheckpointError, expect_no_tensors, require
from common.files import fsync
from moe.region import LocalShard
from training.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    delete_old_checkpoints,
    read_manifest,
    write_manifest,
)
from training.checkpoint.shards import (
    DTYPES,
    ShardInfo,
    SliceRead,
    WriteTask,
    as_shard,
    assign_writers,
    explain_os_error,
    find_slices,
    read_shard,
    write_shard,
)

T = TypeVar("T")


def save(
    root: Path, step: int, tensors: Mapping[str, Tensor | LocalShard], state: dict[str, Any], *, keep: int
) -> Path:
    """Save a checkpoint as `root/step-<step>`. Collective.

    All ranks write and flush their files in `root/.tmp-step-<step>`. Rank 0 then writes and flushes the manifest,
    renames the directory, flushes `root`, and deletes all but the `keep` newest checkpoints. If the process is killed
    at any point, the older checkpoints are complete. Unfinished files can remain; the next `save` removes them.

    The step can exist already, because the run was resumed from an earlier step or saves again at its end. The new
    files are then moved into the existing directory. Their names differ from the old names unless their content is the
    same. Replacing the manifest is the commit, so there is a complete checkpoint at every moment.

    Args:
        tensors: name -> a whole tensor, or this rank's shard.
        state: JSON-serialisable. Only rank 0's is saved.
        keep: number of checkpoints to keep, at least 1.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: on all ranks, if any rank failed. The files that it wrote are removed and older checkpoints are
            unchanged. A message that starts with "saved" means that the step was saved, and only deleting older
            checkpoints failed.
    """
    assert keep >= 1, keep
    rank = dist.get_rank() if dist.is_initialized() else 0
    final, temporary = root / f"step-{step}", root / f".tmp-step-{step}"
    local_parts: dict[str, Tensor] = {}

    def prepare() -> dict[str, ShardInfo]:
        if rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            for unfinished in root.glob(".tmp-*"):
                shutil.rmtree(unfinished)
            temporary.mkdir()
        infos = {}
        for name, (local, shape, region) in ((name, as_shard(tensor)) for name, tensor in tensors.items()):
            require(
                local.dtype in DTYPES,
                CheckpointError,
                f"{name}: found dtype {local.dtype}, expected one of {', '.join(DTYPES.values())}",
            )
            if region.numel:
                local_parts[name] = local
            infos[name] = ShardInfo(DTYPES[local.dtype], shape, region if region.numel else None)
        return infos

    def write() -> tuple[str, dict[str, Any]]:
        to_write = [(task.region.key(task.name), local_parts[task.name]) for task in tasks if task.rank == rank]
        return write_shard(temporary, rank, to_write)

    def commit() -> None:
        if rank == 0:
            _check_visible(temporary, files)
            write_manifest(temporary, _manifest_body(shards_by_rank, tasks, files, state))
            _publish(temporary, final)

    try:
        shards_by_rank = _run_on_all_ranks(prepare, root)
        tasks = assign_writers(shards_by_rank)
        files = _run_on_all_ranks(write, root)
        _run_on_all_ranks(commit, root)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        _run_on_all_ranks(lambda: delete_old_checkpoints(root, step, keep) if rank == 0 else None, root)
    except CheckpointError as error:
        raise CheckpointError(f"saved {final}, but older checkpoints could not be deleted: {error}") from error
    return final


def load(path: Path, tensors: Mapping[str, Tensor | LocalShard]) -> None:
    """Fill `tensors` in place from the checkpoint `path`, which any layout may have saved. Collective.

    Hashes are not checked here: choose `path` with `newest_verified`, or call `verify` on one rank before.

    Args:
        tensors: name -> a whole tensor, or this rank's shard. All ranks together must pass all names of the checkpoint.

    Raises:
        CheckpointError: on all ranks, if any rank failed: a file is damaged, the checkpoint lacks a name or has a name
            that no rank passed, or a shape or dtype differs. Names, shapes and dtypes are checked on all ranks before
            the first tensor is changed.
    """
    slices_by_file: dict[str, list[SliceRead]] = {}
    saved: dict[str, Any] = {}

    def prepare() -> list[str]:
        saved.update(read_manifest(path)["tensors"])
        shards = {name: as_shard(tensor) for name, tensor in tensors.items()}
        expect_no_tensors(path, "missing", shards.keys() - saved.keys(), CheckpointError)
        shapes = {name: (tuple(saved[name]["shape"]), shape) for name, (_, shape, _) in shards.items()}
        dtypes = {name: (saved[name]["dtype"], DTYPES.get(local.dtype)) for name, (local, _, _) in shards.items()}
        for what, pairs in (("shape", shapes), ("dtype", dtypes)):
            different = [f"{name} (found {a}, expected {b})" for name, (a, b) in pairs.items() if a != b]
            expect_no_tensors(path, f"of another {what}", different, CheckpointError)
        for name, (local, _, region) in shards.items():
            if region.numel:
                for file, read in find_slices(name, saved[name], local, region):
                    slices_by_file.setdefault(file, []).append(read)
        return list(tensors)

    def read_all() -> None:
        for file, slices in slices_by_file.items():
            read_shard(path / file, slices)

    passed = {name for names in _run_on_all_ranks(prepare, path) for name in names}
    expect_no_tensors(path, "unexpected", saved.keys() - passed, CheckpointError)
    _run_on_all_ranks(read_all, path)


def _run_on_all_ranks(work: Callable[[], T], path: Path) -> list[T]:
    """Call `work` on every rank and return the results of all ranks.

    Raises:
        CheckpointError: on all ranks, if `work` failed on any rank.
    """
    result: T | None = None
    message: str | None = None
    cause: Exception | None = None
    try:
        result = work()
    except CheckpointError as error:
        message, cause = str(error), error
    except OSError as error:
        message, cause = explain_os_error(error, path), error
    except Exception as error:  # The other ranks wait for this rank's result, so every error must reach them.
        message, cause = f"{path}: {type(error).__name__}: {error}", error
    outcomes: list[Any] = [(result, message)]
    if dist.is_initialized():
        outcomes *= dist.get_world_size()
        dist.all_gather_object(outcomes, (result, message))
    failures = {rank: failure for rank, (_, failure) in enumerate(outcomes) if failure is not None}
    for rank, failure in failures.items():
        same_everywhere = len(failures) == len(outcomes) and len(set(failures.values())) == 1
        raise CheckpointError(failure if same_everywhere else f"rank {rank}: {failure}") from cause
    return [outcome for outcome, _ in outcomes]


def _manifest_body(
    shards_by_rank: list[dict[str, ShardInfo]],
    tasks: list[WriteTask],
    files: list[tuple[str, dict[str, Any]]],
    state: dict[str, Any],
) -> dict[str, Any]:
    tensors: dict[str, dict[str, Any]] = {}
    for shards in shards_by_rank:
        for name, info in shards.items():
            tensors.setdefault(name, {"dtype": info.dtype, "shape": info.shape, "chunks": []})
    for name, region, writer in tasks:
        tensors[name]["chunks"].append({"file": files[writer][0], "offset": region.offset, "shape": region.shape})
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
        require(
            file.is_file() and file.stat().st_size == record["size"],
            CheckpointError,
            f"{file}: rank {rank} wrote this file, and rank 0 does not see it: expected a shared directory",
        )


def _publish(temporary: Path, final: Path) -> None:
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
    temporary.rmdir()
    for file in final.iterdir():
        if file.name not in new_names:
            file.unlink()
