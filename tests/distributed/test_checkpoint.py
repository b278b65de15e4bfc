"""Checkpoints of several ranks: resharding, saving each element once, and failures, which are errors on all ranks."""

import errno
import os
import re
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import CheckpointError
from moe.region import LocalShard, Region
from tests.distributed.harness import TIMEOUT_S, run_ranks
from training.checkpoint import checkpoint, shards
from training.checkpoint.checkpoint import load, save
from training.checkpoint.manifest import read_state, verify
from training.checkpoint.peers import Peers, StalledError
from training.checkpoint.saver import Saver
from training.config import CheckpointConfig

SHAPES = {"w1": (8, 3, 5), "uneven": (5, 2), "matrix": (6, 4)}


def values(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a whole tensor. The value of each element is its index."""
    shape = SHAPES[name]
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def shard_of(
    name: str, chunks: dict[int, tuple[int, int]], fill: bool, dtype: torch.dtype = torch.float32
) -> LocalShard:
    """Return a shard of a tensor. Along each dim of `chunks`, it is the `index`-th of `count` chunks (torch.chunk).

    Without `fill`, all elements are -1.
    """
    shard, offset = values(name, dtype), [0] * len(SHAPES[name])
    for dim, (index, count) in chunks.items():
        length = shard.shape[dim]
        start = min(index * -(-length // count), length)
        offset[dim], shard = start, shard.narrow(dim, start, min(-(-length // count), length - start))
    local = shard.clone() if fill else torch.full_like(shard, -1)
    return LocalShard(local, SHAPES[name], Region(tuple(offset), tuple(shard.shape)))


def expert_layout(rank: int, world_size: int, ep: int, fill: bool) -> dict[str, Tensor | LocalShard]:
    """Return this rank's tensors in a layout with `ep` expert-parallel ranks.

    The stacked experts `w1` are sharded over `ep` ranks and replicated over the other axis. Of the other tensors, some
    are plain, and some are sharded unevenly or along two dims.
    """
    row, column = divmod(rank, ep)
    rows = {0: (column, ep)}
    tensors: dict[str, Tensor | LocalShard] = {
        "w1": shard_of("w1", rows, fill),
        "w1.exp_avg": shard_of("w1", rows, fill, torch.float64),
        "uneven": shard_of("uneven", rows, fill),
        "matrix": shard_of("matrix", {1: (row, world_size // ep)} | rows, fill),
        "nested": shard_of("matrix", {0: (rank, world_size)}, fill),
    }
    for name, tensor in {"dense": torch.arange(10.0), "step": torch.tensor(3.0)}.items():
        tensors[name] = tensor if fill else tensor.fill_(-1)
    return tensors


def load_and_compare(rank: int, world_size: int, path: Path, ep: int) -> list[str]:
    """Load the checkpoint `path`, and return the names of the tensors that are not what was saved."""
    loaded, expected = (expert_layout(rank, world_size, ep, fill) for fill in (False, True))
    load(path, loaded)
    pairs = {name: (tensor, expected[name]) for name, tensor in loaded.items()}
    return [name for name, (a, b) in pairs.items() if not torch.equal(getattr(a, "local", a), getattr(b, "local", b))]


def save_and_load(rank: int, world_size: int, saves: dict[Path, int], loads: list[tuple[Path, int]]) -> list[list[str]]:
    """Save a checkpoint in each root of `saves`, then load each path of `loads`, with the given expert-parallel sizes.

    All of it is one function, because starting processes takes long.
    """
    for root, ep in saves.items():
        save(root, 1, expert_layout(rank, world_size, ep, fill=True), {"rank": rank}, keep=2)
    return [load_and_compare(rank, world_size, path, ep) for path, ep in loads]


def test_experts_reshard_and_are_saved_once(tmp_path: Path) -> None:
    ep2, ep4, ep2_of_4 = (tmp_path / name / "step-1" for name in ("ep2", "ep4", "ep2_of_4"))
    assert run_ranks(save_and_load, 2, {ep2.parent: 2}, [(ep2, 2), (ep2, 1)]) == [[[], []]] * 2
    saves = {ep4.parent: 4, ep2_of_4.parent: 2}
    assert run_ranks(save_and_load, 4, saves, [(ep2, 4), (ep2, 2), (ep4, 2)]) == [[[], [], []]] * 4
    assert run_ranks(save_and_load, 2, {}, [(ep4, 2), (ep4, 1), (ep2_of_4, 2)]) == [[[], [], []]] * 2

    words = {"w1": 120, "w1.exp_avg": 2 * 120, "uneven": 10, "matrix": 24, "nested": 24, "dense": 10, "step": 1}
    for path, world_size in ((ep2, 2), (ep4, 4), (ep2_of_4, 4)):
        verify(path)
        assert read_state(path) == {"rank": 0}
        sizes = [payload_bytes(shard) for shard in path.glob("*.safetensors")]
        assert len(sizes) == world_size
        assert sum(sizes) == 4 * sum(words.values())


def payload_bytes(shard: Path) -> int:
    """Return the size of a safetensors file without its header, which starts with 8 bytes that give its length."""
    content = shard.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def outcome(rank: int, world_size: int, root: Path, case: str) -> str:
    """Save an older checkpoint, run the failing `case`, and return its error message on this rank."""
    save(root, 1, {"dense": torch.ones(4)}, {}, keep=2)
    shard = LocalShard(torch.ones(2), (2 * world_size,), Region((2 * rank,), (2,)))
    tensors: dict[str, Tensor | LocalShard] = {"dense": torch.ones(4), "sharded": shard}
    original = checkpoint.write_shard
    if case in ("full disk", "background") and rank == 1:
        checkpoint.write_shard = fail_in_write  # type: ignore[assignment]
    if case == "gap" and rank == 1:
        tensors["sharded"] = shard._replace(region=Region((3,), (1,)), local=torch.ones(1))
    if case == "shape" and rank == 1:
        tensors["dense"] = torch.ones(5)
    if case == "nan" and rank == 1:
        shard.local[1] = float("nan")
    try:
        if case == "missing":
            load(root / "step-1", {"dense": torch.ones(4)} | ({"more": torch.ones(1)} if rank == 1 else {}))
        elif case == "background":
            save_in_background(rank, world_size, root, tensors)
        else:
            save(root, 2, tensors, {}, keep=2)
    except CheckpointError as error:
        # The barrier shows that no rank is still in another collective.
        dist.barrier()
        return str(error)
    finally:
        checkpoint.write_shard = original
    return "no error"


def save_in_background(rank: int, world_size: int, root: Path, tensors: dict[str, Tensor | LocalShard]) -> None:
    """Save in the background, and poll after each of the steps that are computed meanwhile."""
    peers = Peers(dist.distributed_c10d._get_default_store(), rank, world_size, name="saver")
    with Saver(root, CheckpointConfig(background=True), peers, None, lambda line: None) as saver:
        saver.save(2, lambda: tensors, {})
        for step in range(1000):
            time.sleep(0.005 * rank)
            number = torch.tensor(step)
            dist.all_reduce(number)
            assert number.item() == step * world_size, "a rank learned of the failure before another"
            saver.poll()


def fail_in_write(directory: Path, rank: int, tensors: object, progress: object) -> None:
    (directory / "half-written").write_text("unfinished")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def outcomes(rank: int, world_size: int, root: Path, expected: dict[str, str]) -> dict[str, str]:
    return {case: outcome(rank, world_size, root, case) for case in expected}


def test_a_failure_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    expected = {
        "full disk": r"rank 1: .*: No space left on device: \d+ bytes are free",
        "background": r"rank 1: .*: No space left on device: \d+ bytes are free",
        "gap": "sharded: found 3 elements on all ranks together, expected 4",
        "nan": r"rank 1: sharded\[2:4\] has an element that is nan",
        "shape": r"dense: found F32 \(5,\) on rank 1, expected .*",
        "missing": "rank 1: .*step-1: 1 tensor missing: more",
    }
    for messages in run_ranks(outcomes, 2, tmp_path, expected):
        for case, pattern in expected.items():
            assert re.fullmatch(pattern, messages[case]), (case, messages[case])
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    verify(tmp_path / "step-1")


def stages(rank: int, world_size: int, root: Path) -> list[float]:
    """Save and load with different names on each rank, as pipeline stages do."""
    path = save(root, 1, {f"layer{rank}": torch.full((2,), float(rank)), "shared": torch.ones(3)}, {}, keep=1)
    tensors = {f"layer{rank}": torch.zeros(2), "shared": torch.zeros(3)}
    load(path, tensors)
    return [*tensors[f"layer{rank}"].tolist(), *tensors["shared"].tolist()]


def test_ranks_can_pass_different_names(tmp_path: Path) -> None:
    assert run_ranks(stages, 2, tmp_path) == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def slow_disks(rank: int, world_size: int, disks: dict[Path, tuple[int, float]]) -> list[str]:
    return [slow_disk(rank, world_size, root, *speed) for root, speed in disks.items()]


def slow_disk(rank: int, world_size: int, root: Path, pieces: int, pause_s: float) -> str:
    """Save a checkpoint, of which rank 1 writes `pieces` pieces in `pause_s` seconds each, and rank 0 almost nothing.

    The process group and the reading and writing of checkpoints have a time-out of 1 s.
    """
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    write, shards.PIECE = os.write, 1 << 10

    def slow(descriptor: int, content: bytes) -> int:
        time.sleep(pause_s)
        return write(descriptor, content)

    tensors = {f"of rank {rank}": torch.ones(pieces << 8 if rank else 1)}
    peers = Peers(dist.distributed_c10d._get_default_store(), rank, world_size, timeout_s=1)
    if rank == 1:
        shards.os.write = slow  # type: ignore[assignment]
    try:
        save(root, 1, tensors, {}, keep=2, peers=peers)
    except StalledError as error:
        return str(error)
    finally:
        shards.os.write = write
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), dist.group.WORLD)
    return "saved"


def test_ranks_wait_for_a_slow_disk_as_long_as_it_answers(tmp_path: Path) -> None:
    disks = {tmp_path / "slow": (8, 0.4), tmp_path / "stuck": (1, 2.5)}
    file = re.escape(str(tmp_path / "stuck" / ".tmp-step-1" / "rank-00001.unfinished"))
    for slow, stuck in run_ranks(slow_disks, 2, disks):
        assert slow == "saved"
        assert re.fullmatch(rf"rank 1: no progress for 1 s with {file} \(0 of \d+ bytes\): expected .*", stuck)
    verify(tmp_path / "slow" / "step-1")
    assert list((tmp_path / "stuck").glob("step-*")) == []
