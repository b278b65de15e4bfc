"""One optimizer step, and the one place where losses are normalised.

    loss = Σ CE / labels  +  (balance_coef · Σ_m N_m · L_bal,m  +  z_coef · Σ_m N_m · L_z,m) / tokens

`labels` and `tokens` are counted over the whole optimizer step: all ranks, all micro-batches m. Each rank adds only
what its own tokens contribute, so gradients are plainly *summed* over ranks (never averaged), and no number depends
on the layout.

Shapes: B batch, S sequence, V vocabulary, L MoE layers, E experts.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from moe.balance import update_biases
from moe.config import ModelConfig, RouterConfig
from moe.losses import auxiliary_losses, cross_entropy_sum
from moe.noise import noise_keys
from moe.router import RouterStats
from parallel.mesh import Mesh
from parallel.tensor import cross_entropy
from training.engine import Engine


class StepResult(NamedTuple):
    """Figures of one optimizer step over the whole global batch, the same on every rank."""

    loss: float
    """The total that was differentiated."""
    ce: float
    """Nats per label token."""
    balance: float | None
    """L_bal, 1 at balance; None in a dense model."""
    z: float | None
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Non-padding tokens."""
    counts_LE: Tensor | None
    """Assignments to each expert, before any drop."""
    dropped: int


def on_device(batch: Batch, mesh: Mesh, seed: int = 0) -> tuple[dict[str, Any], Batch]:
    """The model's inputs for a batch of whole rows that lies on the CPU, and this context rank's part of the batch.

    Masks are built only where something is masked, which is asked while the batch is still where asking is free, and
    of whole rows, so that all ranks that share them agree.

    Args:
        seed: of the router's jitter, drawn for each token of a training batch by its number.
    """
    padded = bool((batch.documents_BS < 0).any())
    packed = bool((batch.documents_BS != 0).any())
    batch = batch.part(mesh.layout.pieces_of(mesh.context.rank()), mesh.layout.pieces).to(mesh.device)
    inputs = {
        "tokens_BS": batch.tokens_BS,
        "positions_BS": batch.positions_BS,
        "documents_BS": batch.documents_BS if packed else None,
        "valid_BS": batch.documents_BS >= 0 if padded else None,
        "noise_keys_BS": None if batch.numbers_BS is None else noise_keys(seed, batch.numbers_BS),
    }
    return inputs, batch


class StepLoss:
    """The loss of one optimizer step, term by term, and what is told of it.

    Ranks of `mesh.tensor` see the same labels, and those of `mesh.pipeline` the same tokens: sums count them once.
    """

    def __init__(
        self, batches: Sequence[Batch], router: RouterConfig, model: ModelConfig, mesh: Mesh, labels: int, tokens: int
    ) -> None:
        """`batches`: this rank's part, on the device; `labels`, `tokens`: of the whole step."""
        self.batches = batches
        self.router = router
        self.mesh = mesh
        self.labels, self.tokens = max(1, labels), max(1, tokens)
        self.sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
        """Of cross-entropy, and of balance and z-losses times tokens: of this rank."""
        self.layers = model.num_moe_layers
        self.counts_LE = torch.zeros(self.layers, model.num_experts or 0, dtype=torch.int64, device=mesh.device)
        """Of the whole step, for the layers of this stage."""
        self.dropped = torch.zeros((), dtype=torch.int64, device=mesh.device)

    def compute_prediction_loss(self, logits_BSV: Tensor, micro_batch: int) -> Tensor:
        labels_BS = self.batches[micro_batch].labels_BS
        if self.mesh.tensor.size() > 1:
            ce_sum = cross_entropy(logits_BSV, labels_BS, self.mesh.tensor).sum()
        else:
            ce_sum = cross_entropy_sum(logits_BSV, labels_BS)
        if self.mesh.tensor.rank() == 0:
            self.sums[0] += ce_sum.detach()
        return ce_sum / self.labels

    def compute_routing_loss(self, stats: RouterStats, layers: Sequence[int], micro_batch: int) -> Tensor:
        aux = auxiliary_losses(
            stats,
            self.router,
            reduce_counts=lambda counts: _all_reduce(counts, self.mesh.stage),
            reduce_sequences=lambda counts: _all_reduce(counts, self.mesh.sequence),
            sequence_parts=self.mesh.sequence.size(),
            layers=self.layers,
        )
        self.sums[1] += aux.balance_sum.detach()
        self.sums[2] += aux.z_sum.detach()
        self.counts_LE[layers] += aux.counts_LE
        self.dropped += aux.dropped
        return (self.router.balance_coef * aux.balance_sum + self.router.z_coef * aux.z_sum) / self.tokens


def train_step(engine: Engine, batches: list[Batch], router: RouterConfig, lr: float, seed: int = 0) -> StepResult:
    """Forward and backward over this rank's micro-batches, one update, then the balance update.

    Args:
        batches: this data rank's micro-batches, whole rows on the CPU.
        router: coefficients and scopes of the auxiliary losses.
        lr: learning rate of this step.
        seed: the run's, for the router's jitter.
    """
    mesh, config = engine.mesh, engine.parts[0].config
    prepared = [on_device(batch, mesh, seed) for batch in batches]
    own = [batch for _, batch in prepared]
    labels, tokens = _count(batches, mesh)
    loss = StepLoss(own, router, config, mesh, labels, tokens)
    engine.run([inputs for inputs, _ in prepared], loss)
    grad_norm = engine.step(lr)

    counts_LE, dropped = loss.counts_LE, loss.dropped
    if mesh.pipeline.size() > 1:
        _all_reduce(counts_LE, mesh.pipeline)
        _all_reduce(dropped, mesh.pipeline)
    if router.bias_update_rate and config.is_moe and math.isfinite(grad_norm):
        for model in engine.parts:
            update_biases(model, counts_LE[model.moe_layers], router.bias_update_rate)
    ce_sum, balance_sum, z_sum = _all_reduce(loss.sums, mesh.world).tolist()
    ce = ce_sum / loss.labels
    if not config.is_moe:
        return StepResult(ce, ce, None, None, grad_norm, tokens, None, 0)
    balance, z = balance_sum / loss.tokens, z_sum / loss.tokens
    total = ce + router.balance_coef * balance + router.z_coef * z
    return StepResult(total, ce, balance, z, grad_norm, tokens, counts_LE.cpu(), int(dropped))


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(tensor, group=group)
    return tensor


def _count(batches: list[Batch], mesh: Mesh) -> tuple[int, int]:
    """Labels and tokens of the whole step: whole rows, which the ranks of a data rank all see."""
    once = mesh.sequence.rank() == 0 and mesh.pipeline.rank() == 0
    own = [sum(b.num_labels for b in batches), sum(b.num_valid for b in batches)] if once else [0, 0]
    labels, tokens = _all_reduce(torch.tensor(own, device=mesh.device), mesh.world).tolist()
    return labels, tokens
