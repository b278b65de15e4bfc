"""Training one model under one layout, and gathering its tensors.

The data are packed rows, rows with uneven padding, and rows of padding only.

Shapes: B rows, S sequence, E experts, D model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import IGNORE, Batch
from moe.accounting.flops import count_parameters, meta_model
from moe.model import Transformer
from moe.region import LocalShard, Region
from moe.router import Router
from parallel.collectives import all_gather_json
from parallel.mesh import Mesh
from training.build import build_engine, build_parts
from training.checkpoint.shards import DTYPES, as_shard
from training.config import Config
from training.device import compute_dtype
from training.engine import Engine
from training.parity.config import ACCUMULATION, LENGTH, SEED, VOCABULARY, Case
from training.schedule import learning_rate
from training.step import StepResult, train_step

LENGTHS = (16, 9, 16, 0, 13, 16, 3, 16)
"""Tokens of the rows, in turn. The rest of each row is padding."""
STARTS = 0.3
"""Probability that a document starts at a token."""


def rows_of_step(step: int, rows: int) -> dict[str, Tensor]:
    """Return the rows of one optimizer step, [B, S] with B = `rows`, as the fields of `data.batch.Batch`.

    The documents of a row are short and begin with the same tokens, the first four of which are equal. They have
    equal scores by construction, so that routers in which tokens compete have to break many ties.
    """
    generator = torch.Generator().manual_seed(step)
    place = torch.arange(LENGTH).expand(rows, -1)
    starts = torch.rand(rows, LENGTH, generator=generator) < STARTS
    starts[:, 0] = True
    first = place.where(starts, 0).cummax(dim=1).values
    text = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    text[:, 1:4] = text[:, :1]
    positions = place - first
    lengths = torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(rows)]).unsqueeze(1)
    padding = place >= lengths
    labels = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    last = torch.cat((starts[:, 1:], starts.new_zeros(rows, 1)), dim=1)
    return {
        "tokens_BS": text.gather(1, positions).masked_fill(padding, 0),
        "labels_BS": labels.masked_fill(padding | last, IGNORE),
        "positions_BS": positions.masked_fill(padding, 0),
        "documents_BS": (starts.cumsum(dim=1) - 1).int().masked_fill(padding, -1),
        "domains_BS": torch.zeros(rows, LENGTH, dtype=torch.uint8),
        "numbers_BS": (torch.arange(rows * LENGTH) + step * rows * LENGTH).view(rows, LENGTH),
    }


def micro_batches_of_rank(rows: Mapping[str, Tensor], data_rank: int, data_ranks: int) -> list[Batch]:
    """Return the micro-batches of one data rank.

    Micro-batch m of a step is the m-th contiguous part of its rows. Each data rank takes a contiguous part of that.
    """
    micro_batch = len(rows["tokens_BS"]) // ACCUMULATION
    per_rank = micro_batch // data_ranks
    starts = [m * micro_batch + data_rank * per_rank for m in range(ACCUMULATION)]
    return [Batch(**{key: value[start : start + per_rank] for key, value in rows.items()}) for start in starts]


class Trial:
    """A model under one layout, with its engine. All methods are collective over `mesh`."""

    def __init__(self, case: Case, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        parts = build_parts(config, case.model, mesh, compute_dtype(config.train.precision, mesh.device), SEED)
        if case.last_expert_idle:
            make_last_expert_idle(parts)
        shards = ((part, name, part.local_shard(name, x)) for part in parts for name, x in part.named_parameters())
        stored = all_gather_json(sum(part.numbers_in(name, shard) for part, name, shard in shards), mesh.world)
        whole = count_parameters(meta_model(parts[0].config, parts[0].router_config)).total
        self.share = max(stored) / whole
        """The largest part of the model's weights that one rank stores, before DeepSpeed partitions them."""
        self.engine: Engine = build_engine(config, parts, mesh)

    def train(self, first: int, end: int) -> list[StepResult]:
        """Run the optimizer steps `first` to `end - 1`. Return the figures of each."""
        layout, config, results = self.mesh.layout, self.config, []
        for step in range(first, end):
            batches = micro_batches_of_rank(
                rows_of_step(step, config.train.global_batch), layout.data_rank(self.mesh.rank), layout.data
            )
            lr = learning_rate(step, config.train.steps, config.optim)
            results.append(train_step(self.engine, batches, config.router, lr, config.run.seed, measured=True))
        return results

    def gather_shards(self) -> list[dict[str, LocalShard]]:
        """Return the shards of weights, buffers and moments of every rank, on the CPU of the mesh's first rank.

        Other ranks get an empty list.
        """
        shards = {name: LocalShard(*as_shard(tensor)) for name, tensor in self.engine.tensors().items()}
        shards = {
            name: shard._replace(local=shard.local.detach().cpu().clone(memory_format=torch.contiguous_format))
            for name, shard in shards.items()
        }
        described = {name: (DTYPES[s.local.dtype], s.local.shape, s.shape, s.region) for name, s in shards.items()}
        described_by_rank = all_gather_json(described, self.mesh.world)
        if self.mesh.rank > 0:
            for shard in shards.values():
                dist.send(_as_bytes(shard.local), group=self.mesh.world, group_dst=0)
            return []
        return [shards, *(self._receive(rank, described_by_rank[rank]) for rank in range(1, self.mesh.world_size))]

    def _receive(self, rank: int, described: Mapping[str, Any]) -> dict[str, LocalShard]:
        dtypes = {name: dtype for dtype, name in DTYPES.items()}
        shards = {}
        for name, (dtype, stored, shape, region) in described.items():
            local = torch.empty(stored, dtype=dtypes[dtype])
            dist.recv(_as_bytes(local), group=self.mesh.world, group_src=rank)
            shards[name] = LocalShard(local, tuple(shape), Region(*map(tuple, region)))
        return shards


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return a view of a contiguous tensor as bytes, which every backend can send."""
    return tensor.view(-1).view(torch.uint8)


def make_last_expert_idle(parts: Sequence[Transformer]) -> None:
    """Change every router so that no token chooses the last expert.

    The last expert's logit becomes 0. The logits of the other experts come in pairs x and -x, so that more than
    `top_k` of them are greater than 0.
    """
    for module in (module for part in parts for module in part.modules() if isinstance(module, Router)):
        weight_ED = module.weight.detach()
        weight_ED[1:-2:2] = -weight_ED[0:-2:2]
        weight_ED[-1] = 0


def assemble(shards_by_rank: Sequence[Mapping[str, LocalShard]]) -> dict[str, Tensor]:
    """Put the shards of all ranks together.

    Returns:
        Every tensor that any rank names, whole. An element is NaN if no rank stores it, or if two ranks store
        different values of it.
    """
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for shards in shards_by_rank:
        for name, (local, shape, region) in shards.items():
            if name not in whole:
                whole[name] = torch.full(shape, torch.nan, dtype=local.dtype)
                seen[name] = torch.zeros(shape, dtype=torch.bool)
            place = Region(*region).slices(Region.whole(shape))
            differs = seen[name][place] & (whole[name][place] != local)
            whole[name][place] = local.masked_fill(differs, torch.nan)
            seen[name][place] = True
    return whole


class Result(NamedTuple):
    """The result of a training run of a few steps. Tensors are whole, and on the mesh's first rank only."""

    history: list[StepResult]
    initial: dict[str, Tensor]
    """Weights, buffers and moments before the first step."""
    gradients: dict[str, Tensor]
    """The gradients of the first step, before clipping."""
    final: dict[str, Tensor]
    """Weights, buffers and moments after the last step."""
    share: float
    """`Trial.share`."""


def run_case(case: Case, config: Config, mesh: Mesh) -> Result:
    """Train `case` for all steps of `config`. Collective over `mesh`."""
    trial, steps = Trial(case, config, mesh), config.train.steps
    initial = assemble(trial.gather_shards())
    history = trial.train(0, 1)
    # With any engine, Adam's first moment after one step is (1 - beta1) times the clipped gradient.
    norm, bound = history[0].grad_norm, config.optim.max_grad_norm
    factor = (bound / norm if bound is not None and norm > bound else 1.0) * (1 - config.optim.beta1)
    gradients = {
        name.removeprefix("exp_avg."): moment / factor
        for name, moment in assemble(trial.gather_shards()).items()
        if name.startswith("exp_avg.")
    }
    history += trial.train(1, steps)
    shards_by_rank = trial.gather_shards()
    trial.engine.close()
    return Result(history, initial, gradients, assemble(shards_by_rank), trial.share)
