"""The router: which experts a token goes to, with what weight, and what the balance losses need to know about it.

Shapes: B batch (sequences), S sequence, T = B·S tokens, D model, E experts, K top-k.

Statistics are returned, one row a sequence, and never stored: whoever sums them decides over which tokens.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import RouterConfig
from moe.noise import uniform
from moe.selection import (
    choose_tokens,
    count,
    expert_capacity,
    limit_to_groups,
    most_probable,
    top_k_stable,
    within_capacity,
)


class Routing(NamedTuple):
    """One MoE layer's decision for the tokens at hand."""

    experts_TK: Tensor
    """Chosen experts, int64, best first; E where nothing is dispatched (padding, or dropped over capacity)."""
    weights_TK: Tensor
    """Combine weights, at least fp32; 0 where nothing is dispatched."""
    num_experts: int
    complete: bool
    """Every assignment is dispatched (known without looking at the tensors)."""
    capacity: int | None = None
    """No expert gets more of these tokens; None where no bound is worth knowing."""


class RouterStats(NamedTuple):
    """What one layer saw, per sequence. Padding is excluded everywhere. Stacked over layers: a leading L."""

    counts_BE: Tensor
    """Assignments to each expert before any drop, int64."""
    prob_sum_BE: Tensor
    """Sum over tokens of the router's probabilities; carries the gradient of the balance loss."""
    z_sum_B: Tensor
    """Sum over tokens of logsumexp(logits)²; carries the gradient of the z-loss."""
    dropped_B: Tensor
    """Assignments dropped over capacity, int64."""
    tokens_B: Tensor
    """Tokens, int64."""
    experts_BSK: Tensor
    """The experts chosen for each token before any drop; E where there is none (padding: mask it)."""


class Rows(Protocol):
    """The seam to the rest of a sequence of which only a part of S places is here. No gradient passes through."""

    pieces: int
    """Consecutive pieces of equal length that the part here consists of."""

    def gather(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] of every part -> the whole, in the order of the sequence, along dim 1."""
        ...

    def slice_local(self, x_BS: Tensor) -> Tensor:
        """The part of a whole that is here: the inverse of `gather`."""
        ...


class LocalRows(nn.Module):
    """The whole sequence is here."""

    pieces = 1

    def gather(self, x_BS: Tensor) -> Tensor:
        return x_BS

    def slice_local(self, x_BS: Tensor) -> Tensor:
        return x_BS


class Router(nn.Module):
    """The kinds (docs/losses.md has sources and formulas); scores s = softmax(x W^T) or sigmoid(x W^T):

    - `softmax_topk`, `sigmoid_topk`: the k experts of the highest score, for sigmoid of score + bias;
    - `expert_choice`: each expert takes the tokens of the sequence that score highest with it.

    Logits, scores and losses are in at least fp32 whatever the model's dtype. Ties go to the lower index.

    Capacity and expert choice are decided over whole sequences: `rows` fetches what they need of the other parts. The
    statistics are of the tokens at hand.
    """

    bias: Tensor | None

    def __init__(self, dim: int, num_experts: int, top_k: int, config: RouterConfig, layer: int = 0) -> None:
        """`layer`: the block's number, so that every layer has noise of its own."""
        super().__init__()
        self.layer = layer
        self.top_k = top_k
        self.kind = config.kind
        self.normalize = config.kind != "expert_choice" and config.normalizes(top_k)
        self.scale = config.scale
        self.num_groups = config.num_groups
        self.topk_groups = config.topk_groups
        self.jitter = config.jitter
        self.capacity_factor = config.capacity_factor
        self.drop_policy = config.drop_policy
        self.rows: Rows = LocalRows()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        # For selection only, moved by moe/balance.py after each optimizer step.
        self.register_buffer("bias", torch.zeros(num_experts) if config.kind == "sigmoid_topk" else None)

    def forward(
        self, x_BSD: Tensor, valid_BS: Tensor | None, noise_keys_BS: Tensor | None = None
    ) -> tuple[Routing, RouterStats]:
        """Route every token.

        Args:
            valid_BS: False on padding; None: no padding.
            noise_keys_BS: `moe.noise.noise_keys` of the tokens; what jitter draws from, in training.

        Raises:
            ValueError: jitter in training without `noise_keys_BS`.
        """
        num_experts = self.weight.shape[0]
        logits_BSE = self._logits(x_BSD, noise_keys_BS)
        if self.kind == "sigmoid_topk":
            scores_BSE = logits_BSE.sigmoid()
            probs_BSE = scores_BSE / _positive(scores_BSE.sum(dim=-1, keepdim=True))
        else:
            scores_BSE = probs_BSE = logits_BSE.softmax(dim=-1)
        mask_BS = torch.ones_like(x_BSD[..., 0], dtype=torch.bool) if valid_BS is None else valid_BS
        mask_BS1 = mask_BS.unsqueeze(-1).long()

        experts_BSK, taken_BSK = self._choose(logits_BSE.detach(), scores_BSE.detach(), mask_BS)
        weights_BSK = scores_BSE.gather(-1, experts_BSK)
        if self.normalize:
            weights_BSK = weights_BSK / _positive(weights_BSK.sum(dim=-1, keepdim=True))
        if self.scale != 1:
            weights_BSK = weights_BSK * self.scale
        counts_BE = count(experts_BSK, taken_BSK, num_experts)
        kept_BSK = self._keep(scores_BSE.detach(), experts_BSK, taken_BSK, counts_BE)

        stats = RouterStats(
            counts_BE=counts_BE,
            prob_sum_BE=(probs_BSE * mask_BS1).sum(dim=1),
            z_sum_B=(logits_BSE.logsumexp(dim=-1).square() * mask_BS1.squeeze(-1)).sum(dim=1),
            dropped_B=(taken_BSK - kept_BSK).sum(dim=(1, 2)),
            tokens_B=mask_BS1.sum(dim=(1, 2)),
            experts_BSK=experts_BSK,
        )
        if self.kind == "expert_choice":
            stats = stats._replace(experts_BSK=experts_BSK.where(taken_BSK.bool(), num_experts))
        complete = valid_BS is None and self.capacity_factor is None and self.kind != "expert_choice"
        if not complete:
            weights_BSK = weights_BSK * kept_BSK
            experts_BSK = experts_BSK.where(kept_BSK.bool(), num_experts)
        if self.kind == "expert_choice":
            # A token may be taken by any number of experts; columns that no token here needs are not carried along.
            used = max(1, int(kept_BSK.sum(dim=-1).max())) if kept_BSK.numel() else 1
            experts_BSK, weights_BSK = experts_BSK[..., :used], weights_BSK[..., :used]
        capacity = self._bound(x_BSD.shape[0], x_BSD.shape[1])
        return Routing(experts_BSK.flatten(0, 1), weights_BSK.flatten(0, 1), num_experts, complete, capacity), stats

    def _bound(self, batch: int, seq_len: int) -> int | None:
        """Rows of an expert, at most. Of parts of sequences it would be far more than what comes."""
        whole = isinstance(self.rows, LocalRows)
        if not whole or (self.capacity_factor is None and self.kind != "expert_choice"):
            return None
        return batch * expert_capacity(self.capacity_factor or 1.0, self.top_k, seq_len, self.weight.shape[0])

    def _logits(self, x_BSD: Tensor, noise_keys_BS: Tensor | None) -> Tensor:
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        x_BSD = x_BSD.to(wide)
        if self.jitter and self.training:
            if noise_keys_BS is None:
                raise ValueError(f"router.jitter={self.jitter}: expected noise keys of the tokens in training")
            draws_BSD = uniform(noise_keys_BS, self.layer, x_BSD.shape[-1], wide)
            x_BSD = x_BSD * (1 - self.jitter + 2 * self.jitter * draws_BSD)
        return F.linear(x_BSD, self.weight.to(wide))

    def _choose(self, logits_BSE: Tensor, scores_BSE: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [B, S, K], best first, and 1 where the assignment holds: not on padding. Expert choice: K = E."""
        if self.kind == "expert_choice":
            whole_BSE = self.rows.gather(scores_BSE)
            seq_len, num_experts = whole_BSE.shape[1:]
            capacity = expert_capacity(self.capacity_factor or 1.0, self.top_k, seq_len, num_experts)
            chosen_BSE = self.rows.slice_local(choose_tokens(whole_BSE, self.rows.gather(mask_BS), capacity))
            experts_BSE = top_k_stable(scores_BSE.masked_fill(~chosen_BSE, -torch.inf), num_experts)
            return experts_BSE, chosen_BSE.gather(-1, experts_BSE).long()
        # Logits order like their softmax, and keep apart what it rounds to the same number.
        ranked_BSE = logits_BSE if self.bias is None else scores_BSE + self.bias
        if self.num_groups is not None and self.topk_groups is not None:
            best = 2 if self.kind == "sigmoid_topk" else 1
            ranked_BSE = limit_to_groups(ranked_BSE, self.num_groups, self.topk_groups, best)
        experts_BSK = top_k_stable(ranked_BSE, self.top_k)
        return experts_BSK, mask_BS.unsqueeze(-1).long().expand_as(experts_BSK)

    def _keep(self, scores_BSE: Tensor, experts_BSK: Tensor, taken_BSK: Tensor, counts_BE: Tensor) -> Tensor:
        """1 where the assignment fits into its expert's capacity."""
        if self.capacity_factor is None or self.kind == "expert_choice":
            return taken_BSK
        num_experts = counts_BE.shape[1]
        if self.drop_policy == "prob":
            held_BSK = scores_BSE.gather(-1, experts_BSK).masked_fill(taken_BSK == 0, -torch.inf)
            whole_BSK, of_whole_BSK = self.rows.gather(held_BSK), self.rows.gather(experts_BSK)
            capacity = expert_capacity(self.capacity_factor, self.top_k, whole_BSK.shape[1], num_experts)
            return taken_BSK * self.rows.slice_local(most_probable(whole_BSK, of_whole_BSK, num_experts, capacity))
        # By position, all that matters of the earlier pieces P of the sequence is how many assignments they hold.
        batch, pieces = counts_BE.shape[0], self.rows.pieces
        experts, taken = (x.unflatten(1, (pieces, -1)).flatten(0, 1) for x in (experts_BSK, taken_BSK))
        counts_BPE = self.rows.gather(count(experts, taken, num_experts).unflatten(0, (batch, pieces)))
        before = self.rows.slice_local(counts_BPE.cumsum(dim=1) - counts_BPE).flatten(0, 1)
        seq_len = counts_BPE.shape[1] * experts.shape[1]
        capacity = expert_capacity(self.capacity_factor, self.top_k, seq_len, num_experts)
        return taken_BSK * within_capacity(experts, taken, before, capacity).view_as(taken_BSK)

    def extra_repr(self) -> str:
        experts, dim = self.weight.shape
        capacity = "dropless" if self.capacity_factor is None else f"capacity_factor={self.capacity_factor}"
        groups = "" if self.num_groups is None else f", best {self.topk_groups} of {self.num_groups} groups"
        noise = f", jitter={self.jitter}" if self.jitter else ""
        kind = f"{self.kind}, top_k={self.top_k}, normalize={self.normalize}, scale={self.scale}"
        return f"{dim} -> {experts}, {kind}{groups}, {capacity}{noise}"


def _positive(total: Tensor) -> Tensor:
    """A sum of sigmoids may underflow to 0: the smallest normal number in its place keeps the quotient finite."""
    return total.clamp(min=torch.finfo(total.dtype).tiny)
