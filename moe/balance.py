"""Loss-free balancing: a bias on each expert's selection score, moved after each optimizer step (arXiv 2408.15664).

Shapes: L MoE layers, E experts.
"""

import torch
from torch import Tensor, nn

from moe.router import Router


@torch.no_grad()
def update_biases(model: nn.Module, counts_LE: Tensor, rate: float) -> None:
    """`b_e += rate * sign(mean n - n_e)` in every router that has a bias and is not frozen.

    Args:
        counts_LE: assignments of the whole optimizer step, over all micro-batches and ranks, layers in model order.
        rate: the paper's u.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, counts_E in zip(routers, counts_LE, strict=True):
        if router.bias is not None and router.weight.requires_grad:
            # n̄ - n_e without a division: an expert at the mean stays where it is, exactly.
            missing_E = counts_E.sum() - counts_E * counts_E.numel()
            router.bias += rate * missing_E.sign().to(router.bias)
