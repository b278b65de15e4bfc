"""`router.kind=sigmoid_topk`: the routing of DeepSeek-V3 (arXiv 2412.19437).

Shapes: B batch, S sequence, E experts.
"""

import torch
from torch import Tensor

from moe.config import RouterConfig
from moe.router import ROUTERS, Router, positive


@ROUTERS.register("sigmoid_topk")
class SigmoidTopKRouter(Router):
    """The k experts with the highest sigmoid score plus bias. The weights are the scores without the bias.

    The bias balances the load without a loss (arXiv 2408.15664): after each optimizer step it rises for experts that
    got fewer assignments than the mean, and falls for the others. It takes part in selection only.
    """

    GROUP_TOP = 2

    bias: Tensor

    def __init__(self, dim: int, num_experts: int, top_k: int, config: RouterConfig, layer: int = 0) -> None:
        super().__init__(dim, num_experts, top_k, config, layer)
        self.register_buffer("bias", torch.zeros(num_experts))

    def compute_scores(self, logits_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sigmoid of the logits, and as probabilities these scores divided by their sum over experts."""
        scores_BSE = logits_BSE.sigmoid()
        return scores_BSE, scores_BSE / positive(scores_BSE.sum(dim=-1, keepdim=True))

    def rank_experts(self, logits_BSE: Tensor, scores_BSE: Tensor) -> Tensor:
        """Return the scores plus the bias. Experts with equal rows of the weight have equal scores here.

        Kernels compute the sigmoid of the last numbers of a tensor in another way than that of the others, and can
        round equal logits differently.
        """
        first_E = self.first_equal_experts()
        return (scores_BSE if first_E is None else scores_BSE.index_select(-1, first_E)) + self.bias

    @torch.no_grad()
    def update_after_step(self, counts_E: Tensor) -> None:
        """Update the bias: `b_e += rate * sign(mean n - n_e)`, unless the router is frozen."""
        rate = self.config.bias_update_rate
        if rate and any(parameter.requires_grad for parameter in self.parameters()):
            # n̄ - n_e is multiplied by E: without a division, an expert at the mean keeps its bias exactly.
            missing_E = counts_E.sum() - counts_E * counts_E.numel()
            self.bias += rate * missing_E.sign().to(self.bias)
