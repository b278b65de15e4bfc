"""Sparse upcycling: the weights of a MoE model that computes the same function as a dense model (arXiv 2212.05055).

Shapes: E experts, K top-k, F hidden width of the dense network, G granularity (slices per copy), D model.

Every expert starts as a copy of its layer's dense network y(x), and the K combine weights w of a token sum to 1.
Whichever experts the new router selects, the layer therefore outputs Σ w·y(x) = y(x). The copies become different in
training because they receive different tokens.

Fine-grained experts (virtual groups, arXiv 2410.07524): the output of the dense network is a sum over its hidden
units. Groups of F/G units are therefore G networks y_0 .. y_{G-1} that sum to y. Expert c·G + i is slice i of copy c.
The G router rows of a copy are equal, so their logits tie and top-K selects whole copies. Each slice then has 1/G of
its copy's weight, and `w_down` is multiplied by G to compensate.

Shared experts are new. Their `w_down` is zero, so that they add nothing until training has changed it.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from common.errors import expect
from moe.config import ModelConfig, RouterConfig
from moe.noise import fill_rows


@dataclass(frozen=True)
class Upcycling:
    """The MoE model to make from a dense model.

    Raises:
        ValueError: `<field>=<value>: expected ...`.
    """

    num_experts: int
    """E, the number of experts of each MoE layer. Every slice counts as one expert."""
    top_k: int
    """K, the number of experts per token. Every slice counts as one expert."""
    granularity: int = 1
    """G, the number of slices that each copy of a dense network is divided into."""
    noise: float = 0.0
    """Standard deviation of the noise that is added to each expert's matrix, as a multiple of the standard deviation of
    the elements of the dense matrix (of G times that matrix for `w_down`)."""
    first_k_dense: int = 0
    moe_every: int = 1
    num_shared_experts: int = 0
    shared_hidden_dim: int | None = None
    shared_gate: bool = False
    """These three are as in `ModelConfig`."""
    router: Literal["softmax_topk", "sigmoid_topk"] = "softmax_topk"
    seed: int = 0

    def __post_init__(self) -> None:
        experts, top_k, slices = self.num_experts, self.top_k, self.granularity
        expect(experts >= 2, "num_experts", experts, "an integer >= 2")
        expect(
            top_k >= 2,
            "top_k",
            top_k,
            "an integer >= 2 (the weight of a single expert is its raw probability p, so the output would be p times "
            "the dense model's; granularity=2 with top_k=2 selects one whole copy at the cost of the dense model)",
        )
        expect(top_k <= experts, "top_k", top_k, f"an integer from 2 to num_experts={experts}")
        expect(slices >= 1, "granularity", slices, "an integer >= 1")
        divides = experts % slices == 0 and top_k % slices == 0
        expect(divides, "granularity", slices, f"a divisor of num_experts={experts} and of top_k={top_k}")
        expect(self.noise >= 0, "noise", self.noise, "a number >= 0")
        expect(0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2**63 - 1")


def moe_config(dense: ModelConfig, plan: Upcycling) -> ModelConfig:
    """Return the configuration of the MoE model that `plan` makes from the dense model `dense`.

    Raises:
        ValueError: `granularity` does not divide the hidden width, or no layer becomes a MoE layer.
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
        num_shared_experts=plan.num_shared_experts,
        shared_hidden_dim=plan.shared_hidden_dim,
        shared_gate=plan.shared_gate,
    )


def router_config(plan: Upcycling) -> RouterConfig:
    """Return the configuration of a router whose combine weights sum to 1.

    The keys that do not change the weights keep their defaults. The run that trains the model sets them.
    """
    router = RouterConfig(kind=plan.router)
    assert router.normalizes(plan.top_k) and router.scale == 1
    return router


def dense_name(name: str) -> str | None:
    """Return the name of the dense model's tensor that the MoE model's tensor `name` is made from.

    Returns None for the tensors of a router and of shared experts, which the dense model does not have.
    """
    if re.search(r"\.ffn\.(router|shared|shared_gate)\.", name):
        return None
    return re.sub(r"\.ffn\.experts\.(\w+)$", r".ffn.\1.weight", name)


def expert_matrix(dense: Tensor, name: str, expert: int, plan: Upcycling) -> Tensor:
    """Return the matrix of one expert in the stacked parameter `name`.

    The noise depends on (`plan.seed`, `name`, `expert`) only. It does not depend on the number of experts or on the
    layout.

    Args:
        dense: `w_gate` or `w_up` [F, D], or `w_down` [D, F], of the layer's dense network, in fp32 or fp64.
        expert: the expert's index in the layer.

    Returns:
        [F/G, D], or [D, F/G] for `w_down`, in the dtype of `dense`.
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


def new_tensor(name: str, shape: tuple[int, ...], init_std: float, plan: Upcycling) -> Tensor:
    """Return a tensor that the dense model does not have, in fp32: of a router, or of shared experts."""
    if ".ffn.router." in name and len(shape) == 2:
        return router_matrix(name, shape[1], init_std, plan)
    tensor = torch.zeros(shape)
    if len(shape) == 2 and not name.endswith(".shared.w_down.weight"):
        fill_rows(tensor, f"{plan.seed}/{name}", init_std)
    return tensor


def router_matrix(name: str, dim: int, init_std: float, plan: Upcycling) -> Tensor:
    """Return the weight [E, D] of a router, in fp32.

    There is one row per copy, drawn as `moe.init` draws the weight of a new router. Each row is repeated G times.
    """
    rows = torch.empty(plan.num_experts // plan.granularity, dim)
    fill_rows(rows, f"{plan.seed}/{name}", init_std)
    return rows.repeat_interleave(plan.granularity, dim=0)
