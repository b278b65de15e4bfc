"""Noisy top-k routing (Shazeer et al. 2017, arXiv 1701.06538), as a plugin.

    python train.py --config-dir examples/noisy_topk router=noisy_topk launch.nproc=2 train.steps=50

The router adds normal noise to its logits before it chooses the top k. The noise has a standard deviation that the
router learns for every token and expert: softplus(x · W_noise). Two losses keep the load even, both the square of a
coefficient of variation over experts: of the importance (the sum of an expert's combine weights), and of the load (the
sum over tokens of the probability that the expert is among the top k when its noise is drawn again).

Shapes: B batch, S sequence, D model, E experts, K top-k, L layers.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import expect
from moe.config import RouterConfig
from moe.linear import wide_linear
from moe.noise import normal
from moe.router import Decision, Router, register_router

NOISE_SALT = 1 << 32
"""Added to the layer's index, so that the noise has nothing in common with the jitter of any layer."""


@dataclass(frozen=True)
class NoisyTopKConfig(RouterConfig):
    """The section `router` with the keys of this kind."""

    MEANING: ClassVar[tuple[str, ...]] = (*RouterConfig.MEANING, "noise_floor")

    kind: str = "noisy_topk"
    noise_floor: float = 0.01
    """Added to the standard deviation of the noise."""
    importance_coef: float = 0.1
    load_coef: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.noise_floor > 0, "noise_floor", self.noise_floor, "a number > 0")
        expect(self.importance_coef >= 0, "importance_coef", self.importance_coef, "a number >= 0")
        expect(self.load_coef >= 0, "load_coef", self.load_coef, "a number >= 0")

    def weight_shapes(self, dim: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Return two matrices: `weight` for the logits, and `noise_weight` for the standard deviation of the noise."""
        return {"weight": (num_experts, dim), "noise_weight": (num_experts, dim)}

    @property
    def draws_noise(self) -> bool:
        """Every training step draws noise."""
        return True

    def num_extra(self, num_experts: int) -> int:
        """Return the number of columns: two per expert for the losses, and one for the telemetry."""
        return 2 * num_experts + 1


@register_router("noisy_topk", NoisyTopKConfig)
class NoisyTopKRouter(Router):
    """Choose the top k of the logits plus learned normal noise. Evaluation and generation use no noise."""

    TELEMETRY = ("noise_std",)

    config: NoisyTopKConfig
    noise_weight: torch.nn.Parameter

    def compute_logits(self, x_BSD: Tensor, noise_keys_BS: Tensor | None) -> Tensor:
        """Return x · W + noise · std in training, and x · W otherwise, [B, S, E]."""
        clean_BSE = super().compute_logits(x_BSD, noise_keys_BS)
        if not self.training:
            return clean_BSE
        if noise_keys_BS is None:
            raise ValueError("router.kind=noisy_topk: expected noise keys of the tokens in training")
        noise_BSE = normal(noise_keys_BS, self.layer + NOISE_SALT, self.num_experts, clean_BSE.dtype)
        return clean_BSE + noise_BSE * self._std(x_BSD)

    def compute_extra(self, decision: Decision) -> Tensor:
        """Return [B, 2·E + 1]: importance [E], load [E], and the mean standard deviation summed over tokens [1]."""
        mask_BS1 = decision.mask_BS.unsqueeze(-1).to(decision.logits_BSE)
        importance_BSE = torch.zeros_like(decision.logits_BSE)
        importance_BSE = importance_BSE.scatter_add(-1, decision.experts_BSK, decision.weights_BSK)
        std_BSE = self._std(decision.x_BSD)
        clean_BSE = wide_linear(decision.x_BSD, self.weight)
        load_BSE = self._probability_of_top_k(clean_BSE, decision.logits_BSE, std_BSE)
        std_BS1 = std_BSE.detach().mean(dim=-1, keepdim=True)
        return (torch.cat((importance_BSE, load_BSE, std_BS1), dim=-1) * mask_BS1).sum(dim=1)

    @classmethod
    def auxiliary_loss(cls, config: RouterConfig, extra_LX: Tensor, tokens: Tensor) -> Tensor:
        """Return importance_coef · CV(importance)² + load_coef · CV(load)², per layer [L]."""
        assert isinstance(config, NoisyTopKConfig)
        importance_LE, load_LE = extra_LX[:, :-1].chunk(2, dim=1)
        return config.importance_coef * _cv_squared(importance_LE) + config.load_coef * _cv_squared(load_LE)

    def init_parameter(self, name: str, tensor: Tensor, identity: str, std: float) -> None:
        """Fill `noise_weight` with 0, so that the noise of every expert starts with the scale softplus(0) = ln 2."""
        if name == "noise_weight":
            tensor.zero_()
        else:
            super().init_parameter(name, tensor, identity, std)

    def _std(self, x_BSD: Tensor) -> Tensor:
        return F.softplus(wide_linear(x_BSD, self.noise_weight)) + self.config.noise_floor

    def _probability_of_top_k(self, clean_BSE: Tensor, noisy_BSE: Tensor, std_BSE: Tensor) -> Tensor:
        """Return the probability that an expert is among the top k if only its noise is drawn again (section A.1)."""
        if self.top_k == self.num_experts:
            return torch.ones_like(clean_BSE)
        best_BSK = noisy_BSE.detach().topk(self.top_k + 1, dim=-1).values
        # An expert in the top k competes with the (k+1)-th logit, any other one with the k-th.
        inside_BSE = noisy_BSE.detach() > best_BSK[..., -1:]
        bound_BSE = torch.where(inside_BSE, best_BSK[..., -1:], best_BSK[..., -2:-1])
        return 0.5 * (1 + torch.erf((clean_BSE - bound_BSE) / (std_BSE * math.sqrt(2))))


def _cv_squared(total_LE: Tensor) -> Tensor:
    """Return the squared coefficient of variation over experts, [L]."""
    mean_L1 = total_LE.mean(dim=1, keepdim=True)
    return ((total_LE / mean_L1.clamp(min=1e-10) - 1) ** 2).mean(dim=1)
