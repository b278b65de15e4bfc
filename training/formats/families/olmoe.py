"""OLMoE."""

from typing import Any, ClassVar

from moe.config import ModelConfig, RouterConfig
from training.formats.families.experts import PER_EXPERT, read_experts, read_top_k
from training.formats.families.family import BLOCK, Family
from training.formats.fields import Fields


class Olmoe(Family):
    """Every layer is a MoE layer, and RMSNorm is applied to all queries and to all keys (arXiv 2409.02060)."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    moe = True
    qk_norm = "width"
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
    NAMES: ClassVar[dict[str, str]] = BLOCK | PER_EXPERT

    def read_model(self, fields: Fields) -> dict[str, Any]:
        keys = super().read_model(fields)
        # The norms of transformers' module have the width of the model, not that of the heads.
        width = keys["dim"] // keys["num_heads"]
        fields.expect(keys["head_dim"] == width, "head_dim", keys["head_dim"], f"{width}, or no such key")
        return keys | {
            "num_experts": read_experts(fields, "num_experts", "num_local_experts"),
            "top_k": read_top_k(fields, fields.flag("norm_topk_prob")),
        }

    def read_router(self, fields: Fields) -> RouterConfig:
        return RouterConfig(normalize=fields.flag("norm_topk_prob"))

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        assert model.top_k is not None
        keys = super().write(model, router)
        del keys["head_dim"]
        return keys | {
            "intermediate_size": model.expert_width,
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.top_k,
            "norm_topk_prob": router.normalizes(model.top_k),
            "clip_qkv": None,
            "output_router_logits": False,
        }
