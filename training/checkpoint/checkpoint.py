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

`save` and `load` are collective, and also work without a process group. All ranks must see the same directory (a shared
file system). A plain tensor must be equal on all ranks that pass its name, so state that differs between ranks needs
different names. The ranks wait for each other through a key-value store (`training.checkpoint.peers`), so no time-out
of a process group limits how long a rank writes or reads.
"""

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import CheckpointError, expect_no_tensors, require
from moe.region import LocalShard, Region
from training.checkpoint.manifest import (
    FORMAT,
    Retention,
    begin_checkpoint,
    commit_checkpoint,
    delete_old_checkpoints,
    read_manifest,
    write_manifest,
)
from training.checkpoint.peers import Peers, StalledError
from training.checkpoint.shards import (
    DTYPES,
    ShardInfo,
    SliceRead,
    as_shard,
    assign_writers,
    find_slices,
    read_shard,
    write_shard,
)


class Assignment(NamedTuple):
    """Which rank writes which region. It is the same for all checkpoints of a run."""

    regions: list[tuple[str, Region]]
    """(tensor, region) pairs that this rank writes."""
    tensors: dict[str, dict[str, Any]]
    """On rank 0, the tensors' records for the manifest, with the rank that writes a chunk in place of the file."""

    def choose(self, shards: Mapping[str, LocalShard]) -> list[tuple[str, Tensor]]:
        """Return (name in the file, tensor) pairs that this rank writes of its `shards`."""
        return [(region.key(name), shards[name].local) for name, region in self.regions]


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor | LocalShard],
    state: dict[str, Any],
    *,
    keep: int,
    peers: Peers | None = None,
) -> Path:
    """Save a checkpoint as `root/step-<step>`, and delete all but the `keep` newest intact ones. Collective.

    Args:
        tensors: name -> a whole tensor, or this rank's shard.
        state: JSON-serialisable. Only rank 0's is saved.
        keep: number of checkpoints to keep, at least 1.
        peers: the ranks; by default, those of the default process group.

    Returns:
        The checkpoint's directory.

    Raises:
        NotFiniteError: on all ranks, if an element of a tensor is not finite. Nothing is saved.
        CheckpointError: on all ranks, if any rank failed. The files that it wrote are removed and older checkpoints are
            unchanged. A message that starts with "saved" means that the step was saved, and only deleting older
            checkpoints failed.
    """
    assert keep >= 1, keep
    peers = peers or Peers.of_default_group()
    shards = {name: as_shard(tensor) for name, tensor in tensors.items()}
    assignment = assign(root, shards, peers)
    path = write(root, step, assignment, assignment.choose(shards), state, peers)
    prune(root, step, Retention(keep), peers)
    return path


def assign(root: Path, shards: Mapping[str, LocalShard], peers: Peers) -> Assignment:
    """Choose which rank writes which region, so that every element is written once. Collective.

    Args:
        root: the directory of the checkpoints, for messages.

    Raises:
        CheckpointError: on all ranks, if a tensor cannot be saved, or the ranks disagree on one.
    """
    records: dict[str, dict[str, Any]] = {}

    def describe() -> list[list[Any]]:
        for name, shard in shards.items():
            require(
                shard.local.dtype in DTYPES,
                CheckpointError,
                f"{name}: found dtype {shard.local.dtype}, expected one of {', '.join(DTYPES.values())}",
            )
        return [
            [name, DTYPES[shard.local.dtype], shard.shape, shard.region if shard.region.numel else None]
            for name, shard in shards.items()
        ]

    def divide(described: list[list[list[Any]]]) -> list[list[tuple[str, Region]]]:
        shards_by_rank = [
            {name: ShardInfo(dtype, tuple(shape), region and _region(region)) for name, dtype, shape, region in rows}
            for rows in described
        ]
        for infos in shards_by_rank:
            for name, info in infos.items():
                records.setdefault(name, {"dtype": info.dtype, "shape": info.shape, "chunks": []})
        regions: list[list[tuple[str, Region]]] = [[] for _ in described]
        for name, region, writer in assign_writers(shards_by_rank):
            regions[writer].append((name, region))
            records[name]["chunks"].append({"rank": writer, "offset": region.offset, "shape": region.shape})
        return regions

    regions = peers.run(describe, root, divide)
    return Assignment([(name, _region(region)) for name, region in regions], records)


def _region(pair: Sequence[Sequence[int]]) -> Region:
    offset, shape = pair
    return Region(tuple(offset), tuple(shape))


def write(
    root: Path, step: int, assignment: Assignment, parts: list[tuple[str, Tensor]], state: dict[str, Any], peers: Peers
) -> Path:
    """Write a checkpoint as `root/step-<step>`, and commit it. Collective.

    All ranks write and flush their files in `root/.tmp-step-<step>`. Rank 0 then writes and flushes the manifest,
    renames the directory, and flushes `root`. If the process is killed at any point, the older checkpoints are
    complete. Unfinished files can remain; the next `write` removes them.

    The step can exist already, because the run was resumed from an earlier step or saves again at its end. The new
    files are then moved into the existing directory. Their names differ from the old names unless their content is the
    same. Replacing the manifest is the commit, so there is a complete checkpoint at every moment.

    Args:
        parts: what `assignment.choose` returned, or copies of these tensors.
        state: JSON-serialisable. Only rank 0's is saved.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: as in `save`.
    """
    final, temporary = root / f"step-{step}", root / f".tmp-step-{step}"

    def commit(files: list[tuple[str, dict[str, Any]]]) -> list[None]:
        _check_visible(temporary, files)
        write_manifest(temporary, _manifest_body(assignment.tensors, files, state))
        commit_checkpoint(temporary, final)
        return [None] * len(files)

    try:
        peers.on_rank_0(lambda: str(begin_checkpoint(root, step)), root)
        peers.run(lambda: write_shard(temporary, peers.rank, parts, peers.progress), root, commit)
    except CheckpointError:
        if peers.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def prune(root: Path, step: int, retention: Retention, peers: Peers) -> None:
    """Delete the checkpoints that `retention` does not keep, after `step` has been saved. Collective.

    Raises:
        CheckpointError: on all ranks, if one could not be deleted.
    """
    try:
        delete_old_checkpoints(root, step, retention, peers)
    except StalledError:
        raise
    except CheckpointError as error:
        saved = f"saved {root / f'step-{step}'}"
        raise CheckpointError(f"{saved}, but older checkpoints could not be deleted: {error}") from error


def load(path: Path, tensors: Mapping[str, Tensor | LocalShard], peers: Peers | None = None) -> None:
    """Fill `tensors` in place from the checkpoint `path`, which any layout may have saved. Collective.

    Hashes are not checked here: choose `path` with `newest_verified`, or call `verify` before.

    Args:
        tensors: name -> a whole tensor, or this rank's shard. All ranks together must pass all names of the checkpoint.
        peers: the ranks; by default, those of the default process group.

    Raises:
        CheckpointError: on all ranks, if any rank failed: a file is damaged, the checkpoint lacks a name or has a name
            that no rank passed, or a shape or dtype differs. Names, shapes and dtypes are checked on all ranks before
            the first tensor is changed.
    """
    peers = peers or Peers.of_default_group()
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

    def compare(passed: list[list[str]]) -> list[None]:
        expect_no_tensors(path, "unexpected", saved.keys() - {*itertools.chain(*passed)}, CheckpointError)
        return [None] * len(passed)

    def read_all() -> None:
        for file, slices in slices_by_file.items():
            read_shard(path / file, slices, peers.progress)

    peers.run(prepare, path, compare)
    peers.run(read_all, path)


def _manifest_body(
    tensors: dict[str, dict[str, Any]], files: list[tuple[str, dict[str, Any]]], state: dict[str, Any]
) -> dict[str, Any]:
    """Return the manifest's content.

    Args:
        tensors: `Assignment.tensors`.
        files: for each rank, the name and the record of its file.
    """

    def located(chunk: dict[str, Any]) -> dict[str, Any]:
        return {"file": files[chunk["rank"]][0], "offset": chunk["offset"], "shape": chunk["shape"]}

    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "state": state,
        "files": dict(files),
        "tensors": {
            name: record | {"chunks": [located(chunk) for chunk in record["chunks"]]}
            for name, record in tensors.items()
        },
    }


def _check_visible(directory: Path, files: list[tuple[str, dict[str, Any]]]) -> None:
    for rank, (name, record) in enumerate(files):
        file = directory / name
        require(
            file.is_file() and file.stat().st_size == record["size"],
            CheckpointError,
            f"{file}: rank {rank} wrote this file, and rank 0 does not see it: expected a shared directory",
        )
