"""Checkpoints of several ranks: resharding, each element saved once, and failures that every rank hears of."""

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from tests.distributed.harness import run_ranks
from training import checkpoint
from training.checkpoint import CheckpointError, load, read_state, save, verify

SHAPES = {"w1": (8, 3, 5), "uneven": (5, 2), "matrix": (6, 4)}


def values(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The global tensor: every value is its own index."""
    shape = SHAPES[name]
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def expert_layout(world_size: int, ep: int, fill: bool) -> dict[str, Tensor]:
    """Experts over `ep` ranks and replicated over the rest; dense tensors plain; others sharded unevenly, or twice."""
    mesh = init_device_mesh("cpu", (world_size // ep, ep), mesh_dim_names=("expert_dp", "ep"))
    experts = SHAPES["w1"][0] // ep
    first = mesh.get_local_rank("ep") * experts

    def expert(dtype: torch.dtype) -> Tensor:
        local = values("w1", dtype)[first : first + experts].clone()
        return DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False)

    def sharded(name: str, placements: Sequence[Placement]) -> Tensor:
        return distribute_tensor(values(name), mesh, placements)

    tensors = {
        "w1": expert(torch.float32),
        "w1.exp_avg": expert(torch.float64),
        "uneven": sharded("uneven", [Replicate(), Shard(0)]),
        "matrix": sharded("matrix", [Shard(1), Shard(0)]),
        "nested": distribute_tensor(values("matrix"), mesh, [Shard(0), Shard(0)]),
        "dense": torch.arange(10.0),
        "step": torch.tensor(3.0),
    }
    if not fill:
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(-1)
    return tensors


def loaded_exactly(rank: int, world_size: int, path: Path, ep: int) -> list[str]:
    """Names that did not come back exactly; compares local parts, so that no collective of DTensor takes part."""
    loaded, expected = expert_layout(world_size, ep, fill=False), expert_layout(world_size, ep, fill=True)
    load(path, loaded)
    wrong = []
    for name, tensor in loaded.items():
        other = expected[name]
        if isinstance(tensor, DTensor) and isinstance(other, DTensor):
            tensor, other = tensor.to_local(), other.to_local()
        if not torch.equal(tensor, other):
            wrong.append(name)
    return wrong


def save_and_load(rank: int, world_size: int, saves: dict[Path, int], loads: list[tuple[Path, int]]) -> list[list[str]]:
    """Save under each root's expert-parallel degree, then load each path under its own; one process start for all."""
    for root, ep in saves.items():
        save(root, 1, expert_layout(world_size, ep, fill=True), {"rank": rank}, keep=2)
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
    mesh = init_device_mesh("cpu", (world_size,))
    tensors: dict[str, Tensor] = {"dense": torch.ones(4), "own": DTensor.from_local(torch.ones(2), mesh, [Shard(0)])}
    original = checkpoint.write_shard
    if case == "full disk" and rank == 1:
        checkpoint.write_shard = fail_in_write  # type: ignore[assignment]
    if case == "partial":
        tensors["own"] = DTensor.from_local(torch.ones(2), mesh, [Partial()])
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
        "partial": "own: found placements .*, expected no partial sums",
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
