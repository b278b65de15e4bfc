"""Updates of routers after an optimizer step, such as loss-free balancing (arXiv 2408.15664).

Shapes: L MoE layers, E experts.
"""

from torch import Tensor, nn

from moe.router import Router


def update_routers(model: nn.Module, counts_LE: Tensor) -> None:
    """Let every router of `model` update itself from the counts of an optimizer step.

    Args:
        counts_LE: assignments over all micro-batches and ranks before any drop, int64, one row per MoE layer of `model`
            in model order.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, counts_E in zip(routers, counts_LE, strict=True):
        router.update_after_step(counts_E)
