"""The router: which experts a token goes to, with what weight, and the statistics that the balance losses need.

Shapes: L MoE layers, B batch (sequences), S sequence, T = B·S tokens, D model, E experts, K top-k, M figures of a token
(`TOKEN_FIGURES`), X columns of a router's own sums.

`Router` is the base class. Each kind of router is a subclass in `moe/routers/`, and a plugin can register more
(docs/extending.md). Statistics are returned, one row per sequence, and never stored: the caller decides over which
tokens they are summed.
"""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from common.errors import ConfigError, expect
from common.registry import Registry
from common.strict import leaf_keys
from moe.config import ROUTER_CONFIGS, RouterConfig
from moe.figures import METRICS, TOKEN_FIGURES
from moe.kernels import eager_kernels
from moe.linear import wide_linear
from moe.low_rank import LowRank
from moe.noise import fill_rows, uniform
from moe.selection import (
    count,
    expert_capacity,
    first_equal_rows,
    limit_to_groups,
    margin,
    margin_of_choice,
    most_probable,
    tie_tolerance,
    top_k_stable,
    within_capacity,
)


class Routing(NamedTuple):
    """One MoE layer's routing decision for the tokens of this rank."""

    experts_TK: Tensor
    """Chosen experts, int64, best first; E where nothing is dispatched (padding, or dropped over capacity)."""
    weights_TK: Tensor
    """Combine weights, at least fp32; 0 where nothing is dispatched."""
    num_experts: int
    complete: bool
    """Whether every assignment is dispatched, as far as it is known without reading the tensors."""
    capacity: int | None = None
    """The largest number of these tokens that one expert can get; None if there is no useful bound."""


class RouterStats(NamedTuple):
    """The statistics of one layer's router, per sequence, without padding. Stacked over layers: a leading L."""

    counts_BE: Tensor
    """Assignments to each expert before any drop, int64."""
    prob_sum_BE: Tensor
    """Sum over tokens of the router's probabilities; carries the gradient of the balance loss."""
    z_sum_B: Tensor
    """Sum over tokens of logsumexp(logits)²; carries the gradient of the z-loss."""
    kept_BE: Tensor
    """Assignments to each expert that are dispatched, int64. The others are dropped over capacity."""
    tokens_B: Tensor
    """Tokens, int64."""
    experts_BSK: Tensor
    """The experts chosen for each token before any drop. Entries on padding have no meaning: mask them."""
    weights_BSK: Tensor
    """Their combine weights before any drop. No gradient."""
    margin_BS: Tensor
    """The margin of each token (`TOKEN_FIGURES`). No gradient."""
    figures_BM: Tensor
    """Sums over tokens of `TOKEN_FIGURES`, fp32 or wider. No gradient."""
    extra_BX: Tensor
    """Sums over tokens that this kind of router adds, fp32 or wider (`Router.compute_extra`); X = 0 for most kinds."""


class Decision(NamedTuple):
    """The intermediate results of one routing decision, for `Router.compute_extra`."""

    x_BSD: Tensor
    """The router's input, in the compute dtype."""
    logits_BSE: Tensor
    scores_BSE: Tensor
    experts_BSK: Tensor
    weights_BSK: Tensor
    """Combine weights before any drop."""
    mask_BS: Tensor
    """False on padding."""


class Rows(Protocol):
    """Access to whole sequences where this rank stores only a part of each, of S tokens. No gradient passes through."""

    pieces: int
    """Number of consecutive pieces of equal length that make up this rank's part."""

    def gather(self, x_BS: Tensor) -> Tensor:
        """Join the parts [B, S, ...] of all ranks along dim 1, in the order of the sequence."""

    def slice_local(self, x_BS: Tensor) -> Tensor:
        """Return this rank's part of whole sequences; the inverse of `gather`."""


class LocalRows(nn.Module):
    """The default on one device: the sequences are whole."""

    pieces = 1

    def gather(self, x_BS: Tensor) -> Tensor:
        """Return `x_BS` [B, S, ...] unchanged."""
        return x_BS

    def slice_local(self, x_BS: Tensor) -> Tensor:
        """Return `x_BS` [B, S, ...] unchanged."""
        return x_BS


class Router(nn.Module):
    """Base class of all routers: every token takes its `top_k` experts (docs/losses.md has sources and formulas).

    `forward` is the same for every kind. A subclass overrides the steps in which it differs: `compute_logits`,
    `compute_scores`, `rank_experts`, `choose_experts`, `compute_weights`, `compute_extra`, `init_parameter` and
    `update_after_step`. Its parameters are those that its configuration names (`RouterConfig.weight_shapes`).

    Logits, scores and losses are computed in at least fp32, whatever the model's dtype. Equal scores go to the expert
    with the lower index, and where tokens compete, to the earlier token, also if they are equal up to rounding only
    (`moe.selection.best_of_sequence`). Capacity is decided over whole sequences, which `rows` fetches where this rank
    stores parts of them. The statistics cover the tokens of this rank.

    Attributes:
        rows: seam: access to whole sequences (context and tensor parallelism install another).
        adapter: seam: adds to the logits (`moe.adapter.install_adapters`). None: nothing does.
        generating: True while text is generated (and while `training.probe` routes its tokens). Capacity is then
            ignored: it depends on the length of the sequence so far, and a token must not be dropped because others
            follow.
    """

    TELEMETRY: ClassVar[tuple[str, ...]] = ()
    """Names of the last columns of `extra_BX`. Each is logged as `router/<name>`, a mean over tokens. None is one
    of `METRICS`."""

    GROUP_TOP: ClassVar[int] = 1
    """How many of its best experts make up a group's score under group-limited routing (DeepSeek-V2: 1)."""

    weight: nn.Parameter

    def __init__(self, dim: int, num_experts: int, top_k: int, config: RouterConfig, layer: int = 0) -> None:
        """
        Args:
            layer: the block's index, from which every layer draws its own noise.
        """
        super().__init__()
        self.config = config
        self.layer = torch.tensor(layer, device="cpu")  # as a number, each layer would be compiled separately
        self.num_experts = num_experts
        self.top_k = top_k
        self.normalize = config.normalizes(top_k)
        self.rows: Rows = LocalRows()
        self.adapter: LowRank | None = None
        self.generating = False
        for name, shape in config.weight_shapes(dim, num_experts).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @property
    def tokens_choose(self) -> bool:
        """Whether each token takes exactly `top_k` experts; otherwise experts take tokens."""
        return True

    @property
    def capacity_factor(self) -> float | None:
        """The capacity factor in effect; None: dropless."""
        return None if self.generating else self.config.capacity_factor

    def forward(
        self, x_BSD: Tensor, valid_BS: Tensor | None, noise_keys_BS: Tensor | None = None
    ) -> tuple[Routing, RouterStats]:
        """Route every token.

        Args:
            valid_BS: False on padding; None: no padding.
            noise_keys_BS: `moe.noise.noise_keys` of the tokens, from which jitter is drawn in training.

        Raises:
            ValueError: jitter in training without `noise_keys_BS`.
        """
        num_experts = self.num_experts
        logits_BSE = self.compute_logits(x_BSD, noise_keys_BS)
        tolerance = tie_tolerance(x_BSD.dtype, logits_BSE.dtype)
        scores_BSE, probs_BSE = self.compute_scores(logits_BSE)
        mask_BS = torch.ones_like(x_BSD[..., 0], dtype=torch.bool) if valid_BS is None else valid_BS
        mask_BS1 = mask_BS.unsqueeze(-1).long()

        if self.tokens_choose:
            experts_BSK, taken_BSK = self.choose_experts(logits_BSE.detach(), scores_BSE.detach(), mask_BS)
        else:
            experts_BSK, taken_BSK = self.choose_tokens(scores_BSE.detach(), mask_BS, tolerance)
        weights_BSK = self.compute_weights(scores_BSE, experts_BSK)
        decision = Decision(x_BSD, logits_BSE, scores_BSE, experts_BSK, weights_BSK, mask_BS)
        extra_BX = self.compute_extra(decision)
        self._check_shapes(experts_BSK, taken_BSK, weights_BSK, extra_BX)
        counts_BE = count(experts_BSK, taken_BSK, num_experts)
        kept_BSK = self._keep_within_capacity(scores_BSE.detach(), experts_BSK, taken_BSK, counts_BE, tolerance)
        log_sum_BS = logits_BSE.logsumexp(dim=-1)
        figures_BSM = self.token_figures(logits_BSE.detach(), log_sum_BS.detach(), probs_BSE.detach(), experts_BSK)

        stats = RouterStats(
            counts_BE=counts_BE,
            prob_sum_BE=(probs_BSE * mask_BS1).sum(dim=1),
            z_sum_B=(log_sum_BS.square() * mask_BS1.squeeze(-1)).sum(dim=1),
            kept_BE=counts_BE if kept_BSK is taken_BSK else count(experts_BSK, kept_BSK, num_experts),
            tokens_B=mask_BS1.sum(dim=(1, 2)),
            experts_BSK=experts_BSK if self.tokens_choose else experts_BSK.where(taken_BSK.bool(), num_experts),
            weights_BSK=weights_BSK.detach(),
            margin_BS=figures_BSM[..., TOKEN_FIGURES.index("margin")],
            figures_BM=(figures_BSM * mask_BS1).sum(dim=1),
            extra_BX=extra_BX,
        )
        complete = valid_BS is None and self.capacity_factor is None and self.tokens_choose
        if not complete:
            weights_BSK = weights_BSK * kept_BSK
            experts_BSK = experts_BSK.where(kept_BSK.bool(), num_experts)
        if not self.tokens_choose and not torch.compiler.is_compiling():  # Shapes of a graph do not depend on values.
            # Any number of experts can take a token; columns that no token of this rank needs are cut off. The host
            # waits for a GPU here: with all E columns, `combine` would need E rows of memory for every token.
            used = max(1, int(kept_BSK.sum(dim=-1).max())) if kept_BSK.numel() else 1
            experts_BSK, weights_BSK = experts_BSK[..., :used], weights_BSK[..., :used]
        capacity = self._bound(x_BSD.shape[0], x_BSD.shape[1])
        return Routing(experts_BSK.flatten(0, 1), weights_BSK.flatten(0, 1), num_experts, complete, capacity), stats

    def compute_logits(self, x_BSD: Tensor, noise_keys_BS: Tensor | None) -> Tensor:
        """Return the logits [B, S, E] of the input, in at least fp32 (`moe.linear.wide_linear`).

        In training the input is multiplied by jitter (Switch, arXiv 2101.03961). Experts with equal rows of the weight
        get equal logits. The kernel of a matmul can round them differently.

        Raises:
            ValueError: jitter in training without `noise_keys_BS`.
        """
        jitter = self.config.jitter
        if jitter and self.training:
            if noise_keys_BS is None:
                raise ValueError(f"router.jitter={jitter}: expected noise keys of the tokens in training")
            wide = torch.promote_types(x_BSD.dtype, torch.float32)
            draws_BSD = uniform(noise_keys_BS, self.layer, x_BSD.shape[-1], wide)
            x_BSD = x_BSD * (1 - jitter + 2 * jitter * draws_BSD)
        logits_BSE = wide_linear(x_BSD, self.weight)
        if self.adapter is not None:
            logits_BSE = self.adapter(x_BSD, logits_BSE, self.weight, noise_keys_BS=noise_keys_BS)
        first_E = self.first_equal_experts()
        if first_E is None:
            return logits_BSE
        # The values are those of the first of equal rows. The gradient stays that of each row.
        return logits_BSE.detach().index_select(-1, first_E) + (logits_BSE - logits_BSE.detach())

    def first_equal_experts(self) -> Tensor | None:
        """Return for each expert the first one that has the same logits for every token, [E]; None: all differ.

        Such experts have equal rows of the weight, and of what an adapter adds to it.
        """
        adapter = self.adapter
        if adapter is None:
            return first_equal_rows(self.weight.detach())
        rows: list[Tensor] = [self.weight, adapter.b]
        rows += [] if adapter.magnitude is None else [adapter.magnitude.unsqueeze(-1)]
        return first_equal_rows(torch.cat(rows, dim=1).detach())

    def compute_scores(self, logits_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores [B, S, E] and the probabilities [B, S, E].

        The combine weights are taken from the scores, and the balance loss is computed from the probabilities. The
        probabilities sum to 1 over the experts. By default both are the softmax of the logits.
        """
        probs_BSE = logits_BSE.softmax(dim=-1)
        return probs_BSE, probs_BSE

    def rank_experts(self, logits_BSE: Tensor, scores_BSE: Tensor) -> Tensor:
        """Return the numbers [B, S, E] whose order decides which experts a token takes.

        By default these are the logits. They have the same order as their softmax, but two different logits can have
        equal softmax values after rounding.
        """
        return logits_BSE

    def choose_experts(self, logits_BSE: Tensor, scores_BSE: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the experts of every token. No gradient.

        Returns:
            The experts [B, S, K], best first, and int64 [B, S, K]: 1 where the assignment counts, 0 on padding.
        """
        ranked_BSE = self.rank_experts(logits_BSE, scores_BSE)
        if self.config.num_groups is not None and self.config.topk_groups is not None:
            ranked_BSE = limit_to_groups(ranked_BSE, self.config.num_groups, self.config.topk_groups, self.GROUP_TOP)
        experts_BSK = top_k_stable(ranked_BSE, self.top_k)
        return experts_BSK, mask_BS.unsqueeze(-1).long().expand_as(experts_BSK)

    def choose_tokens(self, scores_BSE: Tensor, mask_BS: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Let the experts choose tokens, where `tokens_choose` is False. No gradient.

        Args:
            tolerance: scores whose log-odds differ by at most this are equal up to rounding.

        Returns:
            As `choose_experts`. K can be larger than `top_k`.
        """
        raise NotImplementedError(f"router.kind={self.config.kind} has no choose_tokens")

    def compute_weights(self, scores_BSE: Tensor, experts_BSK: Tensor) -> Tensor:
        """Return the combine weights [B, S, K]: the chosen experts' scores, renormalised and scaled as configured."""
        weights_BSK = scores_BSE.gather(-1, experts_BSK)
        if self.normalize:
            weights_BSK = weights_BSK / positive(weights_BSK.sum(dim=-1, keepdim=True))
        if self.config.scale != 1:
            weights_BSK = weights_BSK * self.config.scale
        return weights_BSK

    def token_figures(self, logits_BSE: Tensor, log_sum_BS: Tensor, probs_BSE: Tensor, experts_BSK: Tensor) -> Tensor:
        """Return `TOKEN_FIGURES` of each token, [B, S, M]. No gradient.

        - entropy: that of the probabilities over ln E, from 0 to 1; 1 if there is one expert.
        - margin: the `top_k`-th largest probability minus the next one; 0 if there is no next one.
        - logit_range: the largest logit minus the smallest one.

        Args:
            log_sum_BS: logsumexp of the logits.
        """
        own = type(self)
        is_softmax = own.compute_scores is Router.compute_scores
        # The entropy of a softmax needs no further logarithms.
        nats_BS = (
            log_sum_BS - torch.linalg.vecdot(probs_BSE, logits_BSE)
            if is_softmax
            else torch.special.entr(probs_BSE).sum(dim=-1)
        )
        entropy_BS = nats_BS / math.log(self.num_experts) if self.num_experts > 1 else torch.ones_like(nats_BS)
        takes_most_probable = (
            is_softmax
            and self.tokens_choose
            and self.config.num_groups is None
            and own.rank_experts is Router.rank_experts
            and own.choose_experts is Router.choose_experts
        )
        if self.top_k == self.num_experts:
            margin_BS = torch.zeros_like(nats_BS)
        elif takes_most_probable:
            margin_BS = margin_of_choice(probs_BSE, experts_BSK)
        else:
            margin_BS = margin(probs_BSE, self.top_k)
        return torch.stack((entropy_BS, margin_BS, logits_BSE.amax(dim=-1) - logits_BSE.amin(dim=-1)), dim=-1)

    def compute_extra(self, decision: Decision) -> Tensor:
        """Return the sums over the tokens of each sequence that this kind of router adds to the statistics, [B, X].

        X is `RouterConfig.num_extra`.

        The columns feed `auxiliary_loss`; the last ones, named by `TELEMETRY`, are logged. Exclude padding. The default
        has no columns.
        """
        return decision.logits_BSE.new_zeros(decision.logits_BSE.shape[0], 0)

    @classmethod
    def auxiliary_loss(cls, config: RouterConfig, extra_LX: Tensor, tokens: Tensor) -> Tensor:
        """Return this kind's own term of the loss, per layer [L], including its coefficients.

        Args:
            extra_LX: the columns of `compute_extra`, summed over the global micro-batch, fp64. They carry the gradient.
            tokens: tokens of the global micro-batch.
        """
        return extra_LX.new_zeros(extra_LX.shape[0])

    def init_parameter(self, name: str, tensor: Tensor, identity: str, std: float) -> None:
        """Fill the parameter `name` of this router. By default normal, with standard deviation `std`.

        Args:
            tensor: the parameter, on any device.
            identity: what the random numbers depend on (the seed and the parameter's full name).
        """
        fill_rows(tensor.view(len(tensor), -1), identity, std)

    def update_after_step(self, counts_E: Tensor) -> None:
        """Update buffers after an optimizer step; the default has none.

        Args:
            counts_E: assignments to each expert over the whole optimizer step, before any drop, int64.
        """

    def _check_shapes(self, experts_BSK: Tensor, taken_BSK: Tensor, weights_BSK: Tensor, extra_BX: Tensor) -> None:
        """Raise ConfigError if a method that a subclass overrides has returned a tensor of another shape."""
        shapes = [list(tensor.shape) for tensor in (experts_BSK, taken_BSK, weights_BSK)]
        if not shapes[0] == shapes[1] == shapes[2]:
            raise ConfigError(
                f"router.kind={self.config.kind}: expected choose_experts and compute_weights to return three tensors "
                f"of one shape [B, S, K], found {', '.join(map(str, shapes))}"
            )
        extra_shape = [shapes[0][0], self.config.num_extra(self.num_experts)]
        if list(extra_BX.shape) != extra_shape or len(self.TELEMETRY) > extra_shape[1]:
            raise ConfigError(
                f"router.kind={self.config.kind}: expected compute_extra to return {extra_shape}, a column for each of "
                f"num_extra, the last ones named by TELEMETRY={list(self.TELEMETRY)}; found {list(extra_BX.shape)}"
            )

    def _bound(self, batch: int, seq_len: int) -> int | None:
        """Return the largest number of rows that an expert can get, or None.

        If this rank stores only parts of sequences, the bound would be far above the actual numbers.
        """
        if not isinstance(self.rows, LocalRows) or (self.capacity_factor is None and self.tokens_choose):
            return None
        return batch * expert_capacity(self.capacity_factor or 1.0, self.top_k, seq_len, self.num_experts)

    def _keep_within_capacity(
        self, scores_BSE: Tensor, experts_BSK: Tensor, taken_BSK: Tensor, counts_BE: Tensor, tolerance: float
    ) -> Tensor:
        """Return 1 where an assignment counts and fits into its expert's capacity, else 0, int64 [B, S, K]."""
        if self.capacity_factor is None or not self.tokens_choose:
            return taken_BSK
        num_experts = counts_BE.shape[1]
        if self.config.drop_policy == "prob":
            scores_BSK = scores_BSE.gather(-1, experts_BSK).masked_fill(taken_BSK == 0, -torch.inf)
            whole_scores_BSK, whole_experts_BSK = self.rows.gather(scores_BSK), self.rows.gather(experts_BSK)
            capacity = expert_capacity(self.capacity_factor, self.top_k, whole_scores_BSK.shape[1], num_experts)
            kept_BSK = most_probable(whole_scores_BSK, whole_experts_BSK, num_experts, capacity, tolerance)
            return taken_BSK * self.rows.slice_local(kept_BSK)
        # By position, only the number of assignments in the earlier pieces P of the sequence matters.
        batch, pieces = counts_BE.shape[0], self.rows.pieces
        experts, taken = (x.unflatten(1, (pieces, -1)).flatten(0, 1) for x in (experts_BSK, taken_BSK))
        counts_BPE = self.rows.gather(count(experts, taken, num_experts).unflatten(0, (batch, pieces)))
        before = self.rows.slice_local(counts_BPE.cumsum(dim=1) - counts_BPE).flatten(0, 1)
        seq_len = counts_BPE.shape[1] * experts.shape[1]
        capacity = expert_capacity(self.capacity_factor, self.top_k, seq_len, num_experts)
        return taken_BSK * within_capacity(experts, taken, before, capacity).view_as(taken_BSK)

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the widths, and the configuration of the routing."""
        config, (experts, dim) = self.config, self.weight.shape
        capacity = "dropless" if config.capacity_factor is None else f"capacity_factor={config.capacity_factor}"
        groups = "" if config.num_groups is None else f", best {config.topk_groups} of {config.num_groups} groups"
        noise = f", jitter={config.jitter}" if config.jitter else ""
        kind = f"{config.kind}, top_k={self.top_k}, normalize={self.normalize}, scale={config.scale}"
        return f"{dim} -> {experts}, {kind}{groups}, {capacity}{noise}"


def update_routers(model: nn.Module, counts_LE: Tensor, applied: Tensor) -> None:
    """Let every router of `model` update itself from the counts of an optimizer step.

    Args:
        counts_LE: assignments over all micro-batches and ranks before any drop, int64, one row per MoE layer of `model`
            in model order.
        applied: whether the step has changed the weights, a boolean scalar. If it has not, the buffers keep their
            values. The host does not read it, because it would wait for a GPU.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, counts_E in zip(routers, counts_LE, strict=True):
        before = {name: buffer.clone() for name, buffer in router.named_buffers()}
        router.update_after_step(counts_E)
        for name, buffer in router.named_buffers():
            buffer.copy_(torch.where(applied, buffer, before[name]))


def balance_reaches(router: Router, dtype: torch.dtype) -> bool:
    """Return whether a gradient with respect to the router's probabilities changes a parameter of the router.

    The balance loss has no other way to the router. If a kind of router detaches its probabilities, or fills them with
    constants, its balance loss is reported and changes nothing. A few tokens are enough to see it.

    Args:
        dtype: the dtype of the router's input.
    """
    num_experts, dim = router.num_experts, router.weight.shape[-1]
    parameters, training = list(router.parameters()), router.training
    x_BSD = torch.arange(num_experts * dim, device=router.weight.device).view(1, num_experts, dim).cos().to(dtype)
    router.eval()  # Jitter needs the numbers of the tokens.
    try:
        with torch.enable_grad(), eager_kernels():  # No kernel is compiled for so few tokens.
            _, probs_BSE = router.compute_scores(router.compute_logits(x_BSD, None))
            uneven_E = torch.arange(num_experts, device=probs_BSE.device, dtype=probs_BSE.dtype)
            balance = (probs_BSE * uneven_E).sum()
            if not balance.requires_grad:
                return False
            gradients = torch.autograd.grad(balance, parameters, allow_unused=True)
    finally:
        router.train(training)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def positive(total: Tensor) -> Tensor:
    """Return `total`, a sum of scores, with 0 replaced by the smallest normal number.

    A sum of sigmoids can underflow to 0, but a quotient by it must stay finite.
    """
    return total.clamp(min=torch.finfo(total.dtype).tiny)


ROUTERS: Registry[type[Router]] = Registry("router.kind")
"""The module of every kind of router; `moe.config.ROUTER_CONFIGS` has the configuration dataclasses."""

RouterClass = TypeVar("RouterClass", bound=type[Router])


def register_router(kind: str, config: type[RouterConfig] = RouterConfig) -> Callable[[RouterClass], RouterClass]:
    """Return a class decorator that registers a router under the name that `router.kind` takes.

    Args:
        config: the kind's configuration dataclass, which mirrors the section `router`.

    Raises:
        ValueError: another router has the name.
        ConfigError: the classes cannot be those of a router.
    """

    def register(router: RouterClass) -> RouterClass:
        key = "router.kind"
        expect(issubclass(router, Router), key, kind, f"a subclass of moe.router.Router, found {router.__name__}")
        expect(issubclass(config, RouterConfig), key, kind, f"a RouterConfig, found {config.__name__}")
        taken = ", ".join(sorted({*METRICS} & {*router.TELEMETRY}))
        expect(not taken, key, kind, f"names in TELEMETRY that are no metrics of every router, found {taken}")
        unknown = ", ".join(set(config.MEANING) - set(leaf_keys(config)))
        expect(not unknown, key, kind, f"fields of {config.__name__} in MEANING, found {unknown}")
        expect(
            config.num_extra is not RouterConfig.num_extra
            or {"compute_extra", "auxiliary_loss", "TELEMETRY"}.isdisjoint(vars(router)),
            key,
            kind,
            f"num_extra in {config.__name__}, the number of columns that compute_extra returns and that auxiliary_loss "
            "and TELEMETRY read",
        )
        ROUTER_CONFIGS.add(kind, config)
        ROUTERS.add(kind, router)
        return router

    return register
