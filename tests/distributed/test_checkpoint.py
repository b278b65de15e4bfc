"""Checkpoints of several ranks: resharding, each element saved once, and failures that every rank hears of."""

import errno
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import CheckpointError
from moe.region import LocalShard, Region
from tests.distributed.harness import run_ranks
from training.checkpoint import checkpoint
from training.checkpoint.checkpoint import load, read_state, save, verify

SHAPES = {"w1": (8, 3, 5), "uneven": (5, 2), "matrix": (6, 4)}


def values(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The global tensor: every value is its own index."""
    shape = SHAPES[name]
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def held(name: str, cuts: dict[int, tuple[int, int]], fill: bool, dtype: torch.dtype = torch.float32) -> LocalShard:
    """The part of a global tensor that is the `index`-th of `parts` as torch.chunk cuts, along each dim of `cuts`."""
    part, offset = values(name, dtype), [0] * len(SHAPES[name])
    for dim, (index, parts) in cuts.items():
        length = part.shape[dim]
        start = min(index * -(-length // parts), length)
        offset[dim], part = start, part.narrow(dim, start, min(-(-length // parts), length - start))
    local = part.clone() if fill else torch.full_like(part, -1)
    return LocalShard(local, SHAPES[name], Region(tuple(offset), tuple(part.shape)))


def expert_layout(rank: int, world_size: int, ep: int, fill: bool) -> dict[str, Tensor | LocalShard]:
    """Experts over `ep` ranks and replicated over the rest; dense tensors plain; others sharded unevenly, or twice."""
    row, column = divmod(rank, ep)
    rows = {0: (column, ep)}
    tensors: dict[str, Tensor | LocalShard] = {
        "w1": held("w1", rows, fill),
        "w1.exp_avg": held("w1", rows, fill, torch.float64),
        "uneven": held("uneven", rows, fill),
        "matrix": held("matrix", {1: (row, world_size // ep)} | rows, fill),
        "nested": held("matrix", {0: (rank, world_size)}, fill),
    }
    for name, tensor in {"dense": torch.arange(10.0), "step": torch.tensor(3.0)}.items():
        tensors[name] = tensor if fill else tensor.fill_(-1)
    return tensors


def loaded_exactly(rank: int, world_size: int, path: Path, ep: int) -> list[str]:
    """Names that did not come back exactly."""
    loaded, expected = (expert_layout(rank, world_size, ep, fill) for fill in (False, True))
    load(path, loaded)
    pairs = {name: (tensor, expected[name]) for name, tensor in loaded.items()}
    return [name for name, (a, b) in pairs.items() if not torch.equal(getattr(a, "local", a), getattr(b, "local", b))]


def save_and_load(rank: int, world_size: int, saves: dict[Path, int], loads: list[tuple[Path, int]]) -> list[list[str]]:
    """Save under each root's expert-parallel degree, then load each path under its own; one process start for all."""
    for root, ep in saves.items():
        save(root, 1, expert_layout(rank, world_size, ep, fill=True), {"rank": rank}, keep=2)
    return [loaded_exactly(rank, world_size, path, ep) for path, ep in loads]


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
    """Size of a safetensors file without its header: 8 bytes of length, then that many."""
    content = shard.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def outcome(rank: int, world_size: int, root: Path, case: str) -> str:
    """The error that `case` ends with on this rank, after an older checkpoint was saved."""
    save(root, 1, {"dense": torch.ones(4)}, {}, keep=2)
    part = LocalShard(torch.ones(2), (2 * world_size,), Region((2 * rank,), (2,)))
    tensors: dict[str, Tensor | LocalShard] = {"dense": torch.ones(4), "own": part}
    original = checkpoint.write_shard
    if case == "full disk" and rank == 1:
        checkpoint.write_shard = fail_in_write  # type: ignore[assignment]
    if case == "gap" and rank == 1:
        tensors["own"] = part._replace(region=Region((3,), (1,)), local=torch.ones(1))
    if case == "shape" and rank == 1:
        tensors["dense"] = torch.ones(5)
    try:
        if case == "missing":
            load(root / "step-1", {"dense": torch.ones(4)} | ({"more": torch.ones(1)} if rank == 1 else {}))
        else:
            save(root, 2, tensors, {}, keep=2)
    except CheckpointError as error:
        # The group still works: no rank is left behind in a collective.
        dist.barrier()
        return str(error)
    finally:
        checkpoint.write_shard = original
    return "no error"


def fail_in_write(directory: Path, rank: int, parts: object) -> None:
    (directory / "half-written").write_text("debris")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def outcomes(rank: int, world_size: int, root: Path, expected: dict[str, str]) -> dict[str, str]:
    return {case: outcome(rank, world_size, root, case) for case in expected}


def test_a_failure_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    expected = {
        "full disk": r"rank 1: .*: No space left on device: \d+ bytes are free",
        "gap": "own: found 3 elements on all ranks together, expected 4",
        "shape": r"dense: found F32 \(5,\) on rank 1, expected .*",
        "missing": "rank 1: .*step-1: 1 tensors missing: more",
    }
    for of_rank in run_ranks(outcomes, 2, tmp_path, expected):
        for case, pattern in expected.items():
            assert re.fullmatch(pattern, of_rank[case]), (case, of_rank[case])
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    verify(tmp_path / "step-1")


def stages(rank: int, world_size: int, root: Path) -> list[float]:
    """Ranks that hold different names, as pipeline stages do: each loads its own, together they load all."""
    path = save(root, 1, {f"layer{rank}": torch.full((2,), float(rank)), "shared": torch.ones(3)}, {}, keep=1)
    mine = {f"layer{rank}": torch.zeros(2), "shared": torch.zeros(3)}
    load(path, mine)
    return [*mine[f"layer{rank}"].tolist(), *mine["shared"].tolist()]


def test_ranks_may_hold_different_names(tmp_path: Path) -> None:
    assert run_ranks(stages, 2, tmp_path) == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
