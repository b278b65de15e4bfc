"""One optimizer step, one evaluation, and the one place where losses are normalised.

    loss = Σ CE / labels
         + (balance_coef · Σ_m N_m · L_bal,m  +  z_coef · Σ_m N_m · L_z,m  +  Σ_m N_m · L_router,m) / tokens

`labels` and `tokens` are counted over the whole optimizer step: all ranks, all micro-batches m. Each rank adds only the
contribution of its own tokens. Gradients are therefore *summed* over ranks, never averaged, and no number depends on
the layout. L_router is the term that a kind of router can add (`Router.auxiliary_loss`); the built-in kinds add none.

Shapes: B batch, S sequence, D model, V vocabulary, L MoE layers, E experts, K top-k, G domains,
M figures of a layer (`moe.figures.LAYER_FIGURES`), X columns of a router's own sums,
F = 1 + E columns of a router and its experts.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import IGNORE, Batch
from moe.attention.varlen import segments_of
from moe.config import ModelConfig, RouterConfig
from moe.device import on_gpu
from moe.figures import LAYER_FIGURES
from moe.linear import Predict, linear
from moe.losses import Reductions, auxiliary_losses, linear_cross_entropy
from moe.model import ModelInputs, Output, Transformer
from moe.noise import noise_keys
from moe.router import ROUTERS, RouterStats, update_routers
from parallel.mesh import Mesh
from parallel.tensor import vocabulary_part
from training.device import Moment
from training.engine import Engine
from training.norms import SquareSums


class StepResult(NamedTuple):
    """The figures of one optimizer step over the whole global batch. They are the same on every rank."""

    loss: float
    """The total that was differentiated."""
    ce: float
    """Cross-entropy, nats per label token."""
    balance: float | None
    """L_bal, 1 at balance; None in a dense model."""
    z: float | None
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Non-padding tokens."""
    pairs: int
    """Query-key pairs, summed over the layers, that the causal mask, the windows and the documents leave."""
    counts_LE: Tensor | None
    """Assignments to each expert, before any drop."""
    kept_LE: Tensor | None = None
    """Those of them that were dispatched."""
    layers: Mapping[str, Sequence[float]] = {}
    """The figures of every router: name (`moe.figures.LAYER_FIGURES`) -> one number per layer, without coefficients."""
    router: float | None = None
    """The router kind's own term; None if it has none."""
    telemetry: Mapping[str, Sequence[float]] = {}
    """The router kind's own telemetry: name -> mean over tokens per layer."""

    norms_2LF: Tensor | None = None
    """The L2 norms of weights (before the update) and of gradients (before clipping, 0 for what does not train) of
    each layer's router, the first column, and experts. None if the step was not measured."""

    @property
    def assignments(self) -> int:
        """Assignments that were dispatched, over all layers."""
        return 0 if self.kept_LE is None else int(self.kept_LE.sum())

    @property
    def dropped(self) -> int:
        """Assignments that were dropped over capacity, over all layers."""
        return 0 if self.counts_LE is None else int(self.counts_LE.sum()) - self.assignments


def move_to_device(batch: Batch, mesh: Mesh, seed: int | None = None) -> tuple[ModelInputs, Batch]:
    """The model's inputs for a batch of whole rows on the CPU, and this context rank's part of the batch.

    Masks are built only if something is masked. This is asked of whole rows, so that all ranks that share the rows
    agree, and while the batch is on the CPU, so that no device has to be waited for.

    Args:
        seed: seed of the routers' noise, which is drawn for each token of a training batch by its number; None: the
            routers draw no noise.
    """
    padded = bool((batch.documents_BS < 0).any())
    packed = bool((batch.documents_BS != 0).any())
    # Context parallelism splits documents between ranks, and only GPUs have a kernel that takes segments.
    has_segments = on_gpu(mesh.device) and mesh.layout.context == 1
    segments = segments_of(batch.documents_BS, mesh.device) if has_segments else None
    if mesh.layout.context > 1:
        batch = batch.part(mesh.layout.pieces_of(mesh.context.rank()), mesh.layout.pieces)
    batch = batch.to(mesh.device)
    inputs = ModelInputs(
        tokens_BS=batch.tokens_BS,
        positions_BS=batch.positions_BS,
        documents_BS=batch.documents_BS if packed else None,
        valid_BS=batch.documents_BS >= 0 if padded else None,
        noise_keys_BS=None if seed is None or batch.numbers_BS is None else noise_keys(seed, batch.numbers_BS),
        segments=segments,
    )
    return inputs, batch


class StepLoss:
    """The loss of one optimizer step, term by term, and the sums that the figures of the step are made of.

    Ranks of `mesh.tensor` have the same labels, and ranks of `mesh.pipeline` the same tokens: sums count them once.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        router: RouterConfig,
        model: ModelConfig,
        mesh: Mesh,
        counted: tuple[int, int],
        measured: bool = False,
    ) -> None:
        """
        Args:
            batches: this rank's part of every micro-batch, on the device.
            counted: labels and tokens of the whole optimizer step.
            measured: whether the norms of routers and experts are computed.
        """
        self.batches, self.router, self.mesh = batches, router, mesh
        self.labels, self.tokens = (max(1, number) for number in counted)
        self.model, self.layers = model, model.num_moe_layers
        self.vocabulary = vocabulary_part(mesh.tensor, model.vocab_size or 0)
        experts = model.num_experts or 0
        columns = router.num_extra(experts) if model.is_moe else 0
        sizes = (4 if columns else 3, self.layers * len(LAYER_FIGURES), 2 * self.layers * (1 + experts) * measured)
        self.all_sums = torch.zeros(sum(sizes), dtype=torch.float64, device=mesh.device)
        """This rank's contributions to the three that follow, which are views of it: one all-reduce sums them."""
        self.sums, figures, squares = self.all_sums.split(sizes)
        """The cross-entropy, and the balance loss, z-loss and router's own term times tokens."""
        self.figures_LM = figures.view(self.layers, len(LAYER_FIGURES))
        """The figures of the layers of this stage times tokens."""
        measures = measured and model.is_moe
        self.squares = SquareSums(squares.view(2, self.layers, 1 + experts), model, mesh) if measures else None
        """Receives the squares of the weights and gradients of the layers of this stage."""
        self.assignments_2LE = torch.zeros(2, self.layers, experts, dtype=torch.int64, device=mesh.device)
        self.counts_LE, self.kept_LE = self.assignments_2LE
        """Assignments of the whole step, before and after drops, for the layers of this stage."""
        self.extra_LX = torch.zeros(self.layers, columns, dtype=torch.float64, device=mesh.device)
        """The router kind's own sums over the whole step, for the layers of this stage."""
        self.reductions = Reductions(
            counts=lambda counts: _all_reduce(counts, mesh.stage),
            sequences=lambda counts: _all_reduce(counts, mesh.sequence),
            sequence_parts=mesh.sequence.size(),
        )

    def compute_prediction_loss(self, x_BSD: Tensor, weight_VD: Tensor, micro_batch: int) -> Tensor:
        """The cross-entropy of one micro-batch on this rank, divided by the labels of the step."""
        labels_BS = self.batches[micro_batch].labels_BS
        loss, nats_BS = linear_cross_entropy(x_BSD, weight_VD, labels_BS, 1 / self.labels, self.vocabulary)
        if self.mesh.tensor.rank() == 0:
            self.sums[0] += nats_BS.sum()
        return loss

    def compute_routing_loss(self, stats: RouterStats, layers: slice, micro_batch: int) -> Tensor:
        """The auxiliary losses of one micro-batch on this rank, divided by the tokens of the step."""
        aux = auxiliary_losses(stats, self.router, self.reductions, self.layers)
        self.sums[1] += aux.balance_sum.detach()
        self.sums[2] += aux.z_sum.detach()
        self.figures_LM[layers] += aux.figures_LM
        self.counts_LE[layers] += aux.counts_LE
        self.kept_LE[layers] += aux.kept_LE
        total = self.router.balance_coef * aux.balance_sum + self.router.z_coef * aux.z_sum
        if self.extra_LX.shape[1]:
            self.sums[3] += aux.router_sum.detach()
            self.extra_LX[layers] += aux.extra_LX
            total = total + aux.router_sum
        return total / self.tokens

    def reduce_over_stages(self) -> None:
        """Sum the counts over the pipeline stages, each of which has counted its layers."""
        if self.mesh.pipeline.size() > 1:
            for counted in (self.assignments_2LE, *([self.extra_LX] if self.extra_LX.shape[1] else [])):
                _all_reduce(counted, self.mesh.pipeline)


class StepInputs(NamedTuple):
    """The micro-batches of one optimizer step on this rank, and counts over all ranks."""

    inputs: list[ModelInputs]
    batches: list[Batch]
    """This rank's part of every micro-batch, on the device."""
    labels: int
    tokens: int
    """Non-padding tokens."""
    pairs: int
    """`StepResult.pairs`."""
    flags: list[int]
    """The sums of all ranks' `flags`."""


def prepare_step(
    engine: Engine, batches: list[Batch], router: RouterConfig, seed: int = 0, flags: Sequence[int] = ()
) -> StepInputs:
    """Move the micro-batches of one optimizer step to the device, and count their tokens. Collective.

    The host does not wait for the device, which may still be computing an earlier step.

    Args:
        batches: this data rank's micro-batches, whole rows on the CPU.
        seed: the run's seed, for the routers' noise.
        flags: numbers of this rank's, equally many on every rank.
    """
    dropout = any(part.config.adapter is not None and part.config.adapter.dropout for part in engine.parts)
    noise_seed = seed if router.draws_noise or dropout else None
    counted = _count(batches, engine.parts[0].config, engine.mesh, flags)
    prepared = [move_to_device(batch, engine.mesh, noise_seed) for batch in batches]
    return StepInputs([inputs for inputs, _ in prepared], [batch for _, batch in prepared], *counted)


class PendingResult:
    """The figures of an optimizer step that a GPU may still be computing. The host gets them in one copy."""

    def __init__(
        self, loss: StepLoss, grad_norm: Tensor, inputs: StepInputs, gradient_norms: Mapping[str, Tensor]
    ) -> None:
        """
        Args:
            gradient_norms: what `Engine.gradient_norms` returned.
        """
        self._gradient_norms = gradient_norms
        self.router, self.model, self.is_moe = loss.router, loss.model, loss.layers > 0
        self.labels, self.loss_tokens = loss.labels, loss.tokens
        self.tokens, self.pairs = inputs.tokens, inputs.pairs
        self._measured = loss.squares is not None
        squares = loss.all_sums[:0] if loss.squares is None else loss.squares.sums_2LF
        figures = (loss.sums, loss.figures_LM, grad_norm, loss.assignments_2LE, loss.extra_LX, squares)
        self._shapes = [figure.shape for figure in figures]
        # fp64 represents every count below 2**53.
        packed = torch.cat([figure.flatten().double() for figure in figures])
        self._packed = packed.to("cpu", non_blocking=True)  # from a GPU, into pinned memory
        self.end = Moment(packed.device)

    def read(self) -> StepResult:
        """Wait for the device to finish the step, and return its figures."""
        self.end.wait()
        parts = self._packed.split([shape.numel() for shape in self._shapes])
        sums, figures_LM, grad_norm, assignments_2LE, extra_LX, squares = (
            part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)
        )
        ce, norm = sums[0].item() / self.labels, grad_norm.item()
        if not self.is_moe:
            return StepResult(ce, ce, None, None, norm, self.tokens, self.pairs, None)
        balance, z, *extra = (total / self.loss_tokens for total in sums[1:].tolist())
        total = ce + self.router.balance_coef * balance + self.router.z_coef * z + sum(extra)
        layers = dict(zip(LAYER_FIGURES, (figures_LM / self.loss_tokens).t().tolist(), strict=True))
        if self.model.top_k == self.model.num_experts:
            del layers["margin"]  # There is no next expert.
        counts_LE, kept_LE = assignments_2LE.long()
        result = StepResult(total, ce, balance, z, norm, self.tokens, self.pairs, counts_LE, kept_LE, layers)
        if self._measured:
            result = result._replace(norms_2LF=squares.sqrt())
        if not extra:
            return result
        # The last columns of the router kind's own sums have names.
        names = ROUTERS[self.router.kind].TELEMETRY
        means_XL = (extra_LX / self.loss_tokens).t().tolist()
        telemetry = dict(zip(names, means_XL[len(means_XL) - len(names) :], strict=True))
        return result._replace(router=extra[0], telemetry=telemetry)

    def nonfinite_gradients(self) -> list[str]:
        """Return the parameters of which this rank's own gradient is not finite, in the model's order.

        The host waits for the device and copies a number per parameter, so this is for steps that were refused.
        """
        return [name for name, norm in self._gradient_norms.items() if not math.isfinite(norm.item())]


def start_step(
    engine: Engine, inputs: StepInputs, router: RouterConfig, lr: float, measured: bool = False
) -> PendingResult:
    """Run the forward and backward passes of this rank's micro-batches, one update, then the routers' own updates.

    On a GPU, the host only queues them. (It waits for the device in dropless expert parallelism, whose exchanges need
    their sizes on the host, with `router.kind=expert_choice`, in fp64, with offloaded weights, with an optimizer other
    than AdamW, and with `engine=deepspeed`.)

    Args:
        router: coefficients and scopes of the auxiliary losses.
        lr: learning rate of this step.
        measured: whether the norms of routers and experts are computed (`telemetry.every`).
    """
    mesh, config = engine.mesh, engine.parts[0].config
    loss = StepLoss(inputs.batches, router, config, mesh, (inputs.labels, inputs.tokens), measured)
    engine.run(inputs.inputs, loss)
    grad_norm = engine.step(lr, loss.squares)
    loss.reduce_over_stages()
    for model in engine.parts if config.is_moe else []:
        update_routers(model, loss.counts_LE[model.moe_layers], grad_norm.isfinite())
    _all_reduce(loss.all_sums, mesh.world)
    return PendingResult(loss, grad_norm, inputs, engine.gradient_norms())


def train_step(
    engine: Engine, batches: list[Batch], router: RouterConfig, lr: float, seed: int = 0, measured: bool = False
) -> StepResult:
    """Run one optimizer step and wait for its figures. The arguments are those of `prepare_step` and `start_step`."""
    return start_step(engine, prepare_step(engine, batches, router, seed), router, lr, measured).read()


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(tensor, group=group)
    return tensor


def _count(
    batches: list[Batch], config: ModelConfig, mesh: Mesh, flags: Sequence[int]
) -> tuple[int, int, int, list[int]]:
    """Labels, tokens and query-key pairs of the whole step. The ranks that share a data rank's rows count them once.

    The sums of the ranks' flags travel with them. They are summed on the CPUs, so that no device has to be waited for.
    """
    local = [0, 0, 0]
    if mesh.sequence.rank() == 0 and mesh.pipeline.rank() == 0:
        layers = Counter(map(config.window, range(config.num_layers)))
        pairs = sum(number * b.attended_pairs(window) for b in batches for window, number in layers.items())
        local = [sum(b.num_labels for b in batches), sum(b.num_valid for b in batches), pairs]
    if mesh.world.size() > 1:
        local = _all_reduce(torch.tensor([*local, *flags]), mesh.world).tolist()
    else:
        local += flags
    labels, tokens, pairs, *flag_sums = local
    return labels, tokens, pairs, flag_sums


class Evaluated(Protocol):
    """What `evaluate` needs of a model. Every engine has it."""

    parts: list[Transformer]
    mesh: Mesh

    def forward(self, inputs: ModelInputs, predict: Predict = linear) -> list[tuple[Transformer, Output]]:
        """As `training.engine.Engine.forward`."""


class TextSums(NamedTuple):
    """Sums over the labels of a text."""

    nats: float
    """The cross-entropy."""
    labels: int
    bytes: int
    """The UTF-8 bytes that the labels stand for. The end of a document stands for none."""

    @property
    def loss(self) -> float | None:
        """Nats per label; None without labels."""
        return self.nats / self.labels if self.labels else None

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of the text; None without bytes. The end of a document costs bits, too."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None


class Evaluation(NamedTuple):
    """The result of one evaluation, the same on every rank."""

    sums: dict[str, TextSums]
    """By domain."""
    load_GLE: Tensor | None
    """Assignments per domain, layer and expert; None in a dense model."""

    @property
    def loss(self) -> float | None:
        """Nats per label token of all domains; None if the text has no label."""
        return TextSums(*(sum(column) for column in zip(*self.sums.values(), strict=True))).loss

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """Domain -> bits per byte. A domain whose text has no labels is left out."""
        return {name: sums.bits_per_byte for name, sums in self.sums.items() if sums.bits_per_byte is not None}


@torch.no_grad()
def evaluate(
    evaluated: Evaluated,
    batches: Iterable[Batch],
    domains: tuple[str, ...],
    token_bytes_V: Tensor,
    prefix_bytes_V: Tensor,
) -> Evaluation:
    """Evaluate the model on every batch. Collective.

    Args:
        batches: batches of whole rows, the same number on every rank.
        domains: names of the domains, in the order of the indices in `Batch.domains_BS`.
        token_bytes_V: UTF-8 bytes that each token id stands for, on the device.
        prefix_bytes_V: bytes of the token after this id that are no part of the text: the space that some tokenizers
            put after <s>.
    """
    mesh, config = evaluated.mesh, evaluated.parts[0].config
    for model in evaluated.parts:
        model.eval()
    nats, labels, size = (torch.zeros(len(domains), dtype=torch.float64, device=mesh.device) for _ in range(3))
    shape = (len(domains), config.num_moe_layers, config.num_experts or 0)
    load_GLE = torch.zeros(shape, dtype=torch.int64, device=mesh.device)
    vocabulary = vocabulary_part(mesh.tensor, config.vocab_size or 0)
    for batch in batches:
        inputs, batch = move_to_device(batch, mesh)

        def predict(x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor = batch.labels_BS) -> Tensor:
            return linear_cross_entropy(x_BSD, weight_VD, labels_BS, vocabulary=vocabulary).nats_BS

        for model, output in evaluated.forward(inputs, predict):
            # Ranks of `mesh.tensor` have the same tokens: one of them counts them.
            if model.is_last:
                nats_BS = output.result
                if mesh.tensor.rank() == 0:
                    predicted_BS = batch.labels_BS != IGNORE
                    domain_N = batch.domains_BS.flatten().long()
                    bytes_BS = token_bytes_V[batch.labels_BS.clamp(min=0)] - prefix_bytes_V[batch.tokens_BS]
                    bytes_BS *= predicted_BS
                    for total, values_BS in ((nats, nats_BS), (labels, predicted_BS), (size, bytes_BS)):
                        total.index_add_(0, domain_N, values_BS.flatten().double())
            if output.stats is not None:
                domains_BS, valid_BS = model.slice_local(batch.domains_BS), model.slice_local(batch.documents_BS >= 0)
                load_GLE[:, model.moe_layers] += _load_by_domain(
                    output.stats.experts_BSK, domains_BS, valid_BS, *shape[::2]
                )
    for model in evaluated.parts:
        model.train()
    for total in (nats, labels, size, load_GLE):
        dist.all_reduce(total, group=mesh.world)
    columns = nats.tolist(), map(round, labels.tolist()), map(round, size.tolist())
    sums = {name: TextSums(*values) for name, *values in zip(domains, *columns, strict=True)}
    return Evaluation(sums, load_GLE.cpu() if config.is_moe else None)


def _load_by_domain(
    experts_LBSK: Tensor, domains_BS: Tensor, valid_BS: Tensor, num_domains: int, num_experts: int
) -> Tensor:
    """Count the assignments of every domain to every expert, int64 [G, L, E], without those of padding.

    Args:
        experts_LBSK: E where nothing is assigned.
    """
    experts_LBSK = experts_LBSK.where(valid_BS.unsqueeze(-1), num_experts)
    cells_LN = (domains_BS.long().unsqueeze(-1) * (num_experts + 1) + experts_LBSK).flatten(1)
    counts = cells_LN.new_zeros(len(cells_LN), num_domains * (num_experts + 1))
    counts.scatter_add_(1, cells_LN, torch.ones_like(cells_LN))
    return counts.view(-1, num_domains, num_experts + 1)[..., :num_experts].transpose(0, 1)
