"""From dense to sparse: a MoE model that starts as the function a dense one computes (arXiv 2212.05055).

Shapes: E experts, K top-k, F hidden width of the dense network, G slices it is cut into, D model.

Each expert is a copy of its layer's dense network y(x), and the K combine weights of a token sum to 1: whichever
experts the new router takes, Σ w·y(x) = y(x). The copies part because they get different tokens.

Fine-grained (virtual groups, arXiv 2410.07524): y is the sum of what its hidden units add, so that F/G of them at a
time make G networks y_0 .. y_{G-1} that sum to y. Expert c·G + i is slice i of copy c. The G router rows of a copy are
the same, so that their logits tie and top-K takes whole copies, each slice with 1/G of its copy's weight; `w_down`
times G makes up for it.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from common.checks import expect
from moe.config import ModelConfig, RouterConfig
from moe.noise import fill_rows


@dataclass(frozen=True)
class Upcycling:
    """What to make of a dense model.

    Raises:
        ValueError: `<field>=<value>: expected ...`.
    """

    num_experts: int
    """E of each MoE layer, slices counted one by one."""
    top_k: int
    """K, counted alike."""
    granularity: int = 1
    """G."""
    noise: float = 0.0
    """Standard deviation of what is added to an expert's matrix, in standard deviations of that matrix."""
    first_k_dense: int = 0
    moe_every: int = 1
    router: Literal["softmax_topk", "sigmoid_topk"] = "softmax_topk"
    seed: int = 0

    def __post_init__(self) -> None:
        experts, top_k, slices = self.num_experts, self.top_k, self.granularity
        expect(experts >= 2, "num_experts", experts, "an integer >= 2")
        expect(
            top_k >= 2,
            "top_k",
            top_k,
            "an integer >= 2 (one expert's weight is its raw probability p, and the output would be p times the dense "
            "model's; granularity=2 with top_k=2 takes one whole copy, and costs what a dense model costs)",
        )
        expect(top_k <= experts, "top_k", top_k, f"an integer from 2 to num_experts={experts}")
        expect(slices >= 1, "granularity", slices, "an integer >= 1")
        divides = experts % slices == 0 and top_k % slices == 0
        expect(divides, "granularity", slices, f"a divisor of num_experts={experts} and of top_k={top_k}")
        expect(self.noise >= 0, "noise", self.noise, "a number >= 0")
        expect(0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2**63 - 1")


def moe_config(dense: ModelConfig, plan: Upcycling) -> ModelConfig:
    """The model that `plan` makes of a dense one.

    Raises:
        ValueError: `granularity` does not divide the hidden width, or the layers cannot be chosen like that.
    """
    assert not dense.is_moe, dense
    width, slices = dense.hidden_dim, plan.granularity
    expect(width % slices == 0, "granularity", slices, f"a divisor of hidden_dim={width}, the dense networks' width")
    return replace(
        dense,
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        expert_hidden_dim=width // slices,
        first_k_dense=plan.first_k_dense,
        moe_every=plan.moe_every,
    )


def router_config(plan: Upcycling) -> RouterConfig:
    """A router whose weights sum to 1; the rest of it is the run's that trains on."""
    router = RouterConfig(kind=plan.router)
    assert router.normalizes(plan.top_k) and router.scale == 1
    return router


def dense_name(name: str) -> str | None:
    """The dense model's tensor that `name` of the MoE model is made of; None: there is none (routers)."""
    if ".ffn.router." in name:
        return None
    return re.sub(r"\.ffn\.experts\.(\w+)$", r".ffn.\1.weight", name)


def expert_matrix(dense: Tensor, name: str, expert: int, plan: Upcycling) -> Tensor:
    """Matrix of expert number `expert` in the stacked parameter `name`; fp32 or wider, as `dense` is.

    The noise depends on (seed, `name`, `expert`) only: it is not the number of experts or the layout that draws it.

    Args:
        dense: `w_gate` or `w_up` [F, D], or `w_down` [D, F], of the layer's dense network.

    Returns:
        [F/G, D], or [D, F/G].
    """
    slices, part = plan.granularity, expert % plan.granularity
    if name.endswith("w_down"):
        matrix, scale = dense.chunk(slices, dim=1)[part] * slices, slices
    else:
        matrix, scale = dense.chunk(slices, dim=0)[part], 1
    if not plan.noise:
        return matrix
    noise = torch.empty(matrix.shape)
    fill_rows(noise, f"{plan.seed}/upcycle/{name}/{expert}", plan.noise * scale * float(dense.std(correction=0)))
    return matrix + noise


def router_matrix(name: str, dim: int, init_std: float, plan: Upcycling) -> Tensor:
    """The router's weight [E, D], fp32: one row a copy, drawn as `moe.init` draws it, G times over."""
    rows = torch.empty(plan.num_experts // plan.granularity, dim)
    fill_rows(rows, f"{plan.seed}/{name}", init_std)
    return rows.repeat_interleave(plan.granularity, dim=0)
