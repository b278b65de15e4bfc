"""One optimizer step, and the one place where losses are normalised.

    loss = Σ CE / labels  +  (balance_coef · Σ_m N_m · L_bal,m  +  z_coef · Σ_m N_m · L_z,m) / tokens

`labels` and `tokens` are counted over the whole optimizer step: all ranks, all micro-batches m. Each rank adds only
what its own tokens contribute, so gradients are plainly *summed* over ranks (never averaged), and no number depends
on the layout.

Shapes: B batch, S sequence, V vocabulary, L MoE layers, E experts.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from moe.balance import update_biases
from moe.config import RouterConfig
from moe.losses import auxiliary_losses, cross_entropy_sum
from moe.model import Output, Transformer
from moe.noise import noise_keys
from parallel.mesh import Mesh
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


def forward(model: Transformer, batch: Batch, device: torch.device, seed: int = 0) -> tuple[Output, Batch]:
    """The model's output for a batch that lies on the CPU, and the batch on `device`.

    Masks are built only where something is masked, which is asked while the batch is still where asking is free.
    `seed`: of the router's jitter, drawn for each token of a training batch by its number.
    """
    padded = bool((batch.documents_BS < 0).any())
    packed = bool((batch.documents_BS != 0).any())
    batch = batch.to(device)
    output = model(
        batch.tokens_BS,
        batch.positions_BS,
        batch.documents_BS if packed else None,
        batch.documents_BS >= 0 if padded else None,
        noise_keys_BS=None if batch.numbers_BS is None else noise_keys(seed, batch.numbers_BS),
    )
    return output, batch


def train_step(engine: Engine, batches: list[Batch], router: RouterConfig, lr: float, seed: int = 0) -> StepResult:
    """Forward and backward over this rank's micro-batches, one update, then the balance update.

    Args:
        batches: this rank's micro-batches, on the CPU.
        router: coefficients and scopes of the auxiliary losses.
        lr: learning rate of this step.
        seed: the run's, for the router's jitter.
    """
    mesh = engine.mesh
    labels, tokens = _global_sum([sum(b.num_labels for b in batches), sum(b.num_valid for b in batches)], mesh)
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    counts_LE, dropped = None, torch.zeros((), dtype=torch.int64, device=mesh.device)
    for batch in batches:
        output, batch = forward(engine.model, batch, mesh.device, seed)
        ce_sum = cross_entropy_sum(output.logits_BSV, batch.labels_BS)
        loss = ce_sum / max(1, labels)
        sums[0] += ce_sum.detach()
        if output.stats is not None:
            aux = auxiliary_losses(output.stats, router, lambda counts: _all_reduce(counts, mesh))
            loss = loss + (router.balance_coef * aux.balance_sum + router.z_coef * aux.z_sum) / max(1, tokens)
            sums[1] += aux.balance_sum.detach()
            sums[2] += aux.z_sum.detach()
            counts_LE = aux.counts_LE if counts_LE is None else counts_LE + aux.counts_LE
            dropped += aux.dropped
        engine.backward(loss)
    grad_norm = engine.step(lr)
    if router.bias_update_rate and counts_LE is not None and math.isfinite(grad_norm):
        update_biases(engine.model, counts_LE, router.bias_update_rate)

    ce_sum, balance_sum, z_sum = _all_reduce(sums, mesh).tolist()
    ce = ce_sum / max(1, labels)
    if counts_LE is None:
        return StepResult(ce, ce, None, None, grad_norm, tokens, None, 0)
    balance, z = balance_sum / max(1, tokens), z_sum / max(1, tokens)
    total = ce + router.balance_coef * balance + router.z_coef * z
    return StepResult(total, ce, balance, z, grad_norm, tokens, counts_LE.cpu(), int(dropped))


def _all_reduce(tensor: Tensor, mesh: Mesh) -> Tensor:
    dist.all_reduce(tensor, group=mesh.world)
    return tensor


def _global_sum(values: list[int], mesh: Mesh) -> list[int]:
    return _all_reduce(torch.tensor(values, device=mesh.device), mesh).tolist()
