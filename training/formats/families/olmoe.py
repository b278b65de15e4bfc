"""OLMoE."""

from typing import Any, ClassVar

from moe.config import ModelConfig, RouterConfig
from training.formats.families.family import Family
from training.formats.families.softmax import SoftmaxMoe


class Olmoe(SoftmaxMoe):
    """Every layer is a MoE layer, and RMSNorm is applied to all queries and to all keys (arXiv 2409.02060)."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    # The norms of transformers' module are as wide as the model.
    any_head_dim = False
    qk_norm = "width"
    EXPERTS: ClassVar[tuple[str, ...]] = ("num_experts", "num_local_experts")
    BIASES: ClassVar[dict[str, str]] = {"attention_bias": "all"}
    DEFAULTS: ClassVar[dict[str, Any]] = Family.DEFAULTS | {
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_local_experts": None,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "attention_bias": False,
    }
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = Family.NEUTRAL | {"clip_qkv": (None,)}

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        return super().write(model, router) | {
            "intermediate_size": model.expert_width,
            "clip_qkv": None,
            "output_router_logits": False,
        }
