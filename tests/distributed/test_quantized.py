"""Quantised weights on several ranks: the same bytes, logits and gradients as on one, read from a model directory."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.model import ModelInputs, Transformer
from moe.quantization import QuantizeConfig
from moe.region import Region
from parallel.apply import Storage, build_model
from parallel.config import ParallelConfig
from parallel.layout import AXES, Layout
from parallel.mesh import build_mesh
from parallel.planning.plan import Plan, plan
from parallel.planning.workload import Workload
from tests.distributed.harness import run_ranks
from training.formats.model_directory import Block, write_model
from training.formats.reader import open_model

pytest.importorskip("bitsandbytes", reason="needs the extra [quantize]")

MODEL = ModelConfig(
    dim=24, num_layers=3, num_heads=3, num_kv_heads=1, head_dim=8, hidden_dim=20, num_experts=6, top_k=2, vocab_size=31,
    expert_hidden_dim=12, num_shared_experts=1, first_k_dense=1, init_std=0.3,
)  # fmt: skip
LAYOUTS = {
    "expert": (6, Layout(replicate=2, expert=2), False),
    "shard": (6, Layout(shard=2), False),
    "shard-uneven": (5, Layout(shard=2), False),  # divides the bytes of each expert
    "shard-expert": (6, Layout(shard=2, expert=2), False),
    "shard-offload": (6, Layout(shard=2), True),
    "pipeline": (6, Layout(pipeline=2), False),
}
"""Name -> number of experts, layout, offload."""
QUANTIZE = QuantizeConfig("nf4", block_size=32)
TOKENS = torch.arange(24).view(2, 12) * 7 % 31


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[int, Path]:
    paths = {experts: tmp_path_factory.mktemp("models") / "m" for experts in (5, 6)}
    for experts, path in paths.items():
        config = replace(MODEL, num_experts=experts)
        model = Transformer(config, RouterConfig(), torch.float32)
        init_parameters(model, 0)
        blocks = [
            Block(name, tuple(x.shape), Region.whole(x.shape), x.dtype, partial(torch.Tensor.detach, x))
            for name, x in model.state_dict().items()
        ]
        write_model(path, config, RouterConfig(), blocks, None)
    return paths


def run_one(path: Path, layout: Layout, tokens: torch.Tensor, *, offload: bool, layers: list[int] | None):
    """Return this rank's part of every parameter with its region, the logits, and this rank's part of the gradients."""
    mesh, source = build_mesh(torch.device("cpu"), layout), open_model(path)
    storage = Storage(quantize=QUANTIZE, offload=offload)
    model = build_model(
        source.model, source.router, mesh, compute_dtype=torch.float32, seed=None, storage=storage, layers=layers
    )
    source.fill(model)
    stored = {name: model.local_shard(name, weight) for name, weight in model.named_parameters()}
    stored = {name: shard._replace(local=shard.local.clone()) for name, shard in stored.items()}
    if layers is not None:
        return stored, None, {}
    logits = model(ModelInputs(tokens, torch.arange(12).expand(len(tokens), -1))).logits_BSV
    logits.square().sum().backward()
    gradients = {
        name: model.local_shard(name, weight.grad)
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    return stored, logits.detach(), gradients


def run(rank: int, world: int, directories: dict[int, Path]):
    if world == 1:
        return {n: run_one(path, Layout(), TOKENS, offload=False, layers=None) for n, path in directories.items()}
    layers = {"pipeline": [[0], [1, 2]][rank]}
    return {
        name: run_one(directories[n], layout, TOKENS[rank : rank + 1], offload=offload, layers=layers.get(name))
        for name, (n, layout, offload) in LAYOUTS.items()
    }


def planned(name: str) -> Plan:
    experts, layout, offload = LAYOUTS[name]
    config = replace(MODEL, num_experts=experts)
    axes = {axis: getattr(layout, axis) for axis in (*AXES, "expert")}
    stage_layers = (1, 2) if name == "pipeline" else None
    parallel = ParallelConfig(**axes, offload=offload, stage_layers=stage_layers)
    workload = Workload(config, RouterConfig(), 4, 2, 12, itemsize=4, quantize=QUANTIZE)
    return plan(layout, parallel, workload)


def test_two_ranks_have_the_bytes_and_the_numbers_of_one(directories):
    [single] = run_ranks(run, 1, directories)
    by_rank = run_ranks(run, 2, directories)
    for name, (experts, _, _) in LAYOUTS.items():
        stored, logits, gradients = single[experts]
        assert sum(shard.local.dtype == torch.uint8 for shard in stored.values()) > 10
        found = {key: torch.zeros(shard.shape, dtype=torch.int) for key, shard in stored.items()}
        summed = {key: torch.zeros(shard.shape) for key, shard in gradients.items()}
        for rank, results in enumerate(by_rank):
            of_rank, logits_of_rank, gradients_of_rank = results[name]
            for key, (tensor, shape, region) in of_rank.items():
                whole, place = stored[key].local, region.slices(Region.whole(shape))
                assert shape == tuple(whole.shape), (name, key)
                assert torch.equal(tensor, whole[place]), (name, key)
                found[key][place] += 1
            if logits_of_rank is not None:
                torch.testing.assert_close(logits_of_rank, logits[rank : rank + 1], rtol=1e-4, atol=1e-4)
                for key, (tensor, shape, region) in gradients_of_rank.items():
                    summed[key][region.slices(Region.whole(shape))] += tensor
        assert all(times.min() > 0 for times in found.values()), name
        fullest = max(sum(shard.local.nbytes for shard in results[name][0].values()) for results in by_rank)
        assert planned(name).fullest.weights == fullest, name
        for key, gradient in summed.items() if name != "pipeline" else ():
            torch.testing.assert_close(
                gradient, gradients[key].local, rtol=1e-3, atol=1e-3 * gradient.abs().max().item()
            )
