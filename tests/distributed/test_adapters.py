"""Checkpoints of adapters that other layouts have saved, and the models into which these are merged."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from moe.config import AdapterConfig
from moe.region import Region
from parallel.apply import build_model
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh
from tests.adapters import write_run
from tests.distributed.harness import run_ranks
from tests.foreign import save_reference
from training.checkpoint import checkpoint
from training.checkpoint.manifest import CHECKPOINTS, read_manifest
from training.engine import NativeEngine
from training.formats.merge import MergedReader
from training.formats.reader import open_model
from training.parity.config import OPTIM

ADAPTER = AdapterConfig(kind="lora", rank=3, targets=("*",))
LAYOUTS = {
    "expert": ParallelConfig(expert=2),
    "tensor": ParallelConfig(tensor=2, expert=1),
    "shard": ParallelConfig(shard=2, expert=1),
}


def save_again(rank: int, world: int, tuned: Path, root: Path) -> None:
    """Load the checkpoint of one process under each layout, and save what that layout stores."""
    source = open_model(tuned)
    state = read_manifest(source.path)["state"]
    for name, parallel in LAYOUTS.items():
        mesh = build_mesh(torch.device("cpu"), parallel.layout(world, source.model))
        model = build_model(source.model, source.router, mesh, compute_dtype=torch.float32, seed=None)
        source.fill(model)
        engine = NativeEngine([model], replace(OPTIM, train="all"), mesh)
        weights = {key: tensor for key, tensor in engine.tensors().items() if key.startswith("model.")}
        checkpoint.save(root / name / CHECKPOINTS, 1, weights, state | {"step": 1}, keep=1)
        dist.barrier()


def test_every_layouts_checkpoint_is_merged_to_the_same_bytes(tmp_path):
    save_reference("mixtral", tmp_path / "base")
    tuned = write_run(tmp_path / "base", ADAPTER, tmp_path / "tuned")
    run_ranks(save_again, 2, tuned, tmp_path)
    expected = MergedReader(open_model(tuned))
    for name in LAYOUTS:
        (tmp_path / name / "config.yaml").write_bytes((tuned / "config.yaml").read_bytes())
        reader = open_model(tmp_path / name)
        saved = read_manifest(reader.path)["tensors"]
        assert saved.keys() == read_manifest(open_model(tuned).path)["tensors"].keys()
        assert any(len(record["chunks"]) > 1 for record in saved.values())
        merged = MergedReader(reader)
        for weight, shape in expected.shapes.items():
            region = Region.whole(shape)
            assert torch.equal(
                merged.read(weight, region, torch.float32), expected.read(weight, region, torch.float32)
            ), (name, weight)
