"""`router.kind=expert_choice`: experts take tokens (arXiv 2202.09368). A later token can displace an earlier one.

Shapes: B batch, S sequence, E experts.
"""

import torch
from torch import Tensor

from moe.config import RouterConfig
from moe.router import ROUTERS, Router
from moe.selection import choose_tokens, expert_capacity, top_k_stable


@ROUTERS.register("expert_choice")
class ExpertChoiceRouter(Router):
    """Each expert takes the C tokens of the sequence that have the highest probability for it, with these
    probabilities as weights; C = ceil(capacity_factor * k * S / E), with factor 1 if none is configured.

    The choice needs the whole sequence. While text is generated, each token instead takes its `top_k` most probable
    experts, with their probabilities as weights.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, config: RouterConfig, layer: int = 0) -> None:
        super().__init__(dim, num_experts, top_k, config, layer)
        self.normalize = False

    @property
    def tokens_choose(self) -> bool:
        """Whether each token takes exactly `top_k` experts. It does so only while text is generated."""
        return self.generating

    def choose_tokens(self, scores_BSE: Tensor, mask_BS: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Return all experts of every token, K = E. The experts that take the token come first."""
        whole_BSE = self.rows.gather(scores_BSE)
        seq_len, num_experts = whole_BSE.shape[1:]
        capacity = expert_capacity(self.capacity_factor or 1.0, self.top_k, seq_len, num_experts)
        whole_chosen_BSE = choose_tokens(whole_BSE, self.rows.gather(mask_BS), capacity, tolerance)
        chosen_BSE = self.rows.slice_local(whole_chosen_BSE)
        experts_BSE = top_k_stable(scores_BSE.masked_fill(~chosen_BSE, -torch.inf), num_experts)
        return experts_BSE, chosen_BSE.gather(-1, experts_BSE).long()
