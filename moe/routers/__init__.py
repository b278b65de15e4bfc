"""The built-in kinds of routers, one module each. Importing this package registers them.

- `softmax_topk`: the top-k of the softmax (Switch, GLaM, Mixtral, DeepSeekMoE).
- `sigmoid_topk`: the top-k of sigmoid scores plus a selection bias (DeepSeek-V3).
- `expert_choice`: each expert takes its best tokens.
"""

from moe.config import RouterConfig
from moe.router import ROUTERS, Router
from moe.routers.expert_choice import ExpertChoiceRouter
from moe.routers.sigmoid_topk import SigmoidTopKRouter
from moe.routers.softmax_topk import SoftmaxTopKRouter

__all__ = ["ExpertChoiceRouter", "SigmoidTopKRouter", "SoftmaxTopKRouter", "build_router"]


def build_router(dim: int, num_experts: int, top_k: int, config: RouterConfig, layer: int = 0) -> Router:
    """Return a router of the kind that `config.kind` names, for the block with index `layer`."""
    return ROUTERS[config.kind](dim, num_experts, top_k, config, layer)
