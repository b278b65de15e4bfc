"""Llama, Mistral and Mixtral."""

from typing import Any, ClassVar

from moe.config import ModelConfig, RouterConfig
from training.formats.families.family import BLOCK, Family
from training.formats.fields import Fields
from training.formats.meaning import expect_key


class Llama(Family):
    """Dense, full attention (arXiv 2302.13971)."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    DEFAULTS: ClassVar[dict[str, Any]] = Family.DEFAULTS | {"rms_norm_eps": 1e-6}

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        # transformers refuses others. A Mistral without a window is the same network.
        divides = model.dim % model.num_heads == 0
        expect_key(divides, "model.num_heads", model.num_heads, f"a divisor of dim={model.dim}", self.architecture)
        return super().write(model, router) | {"attention_bias": False, "mlp_bias": False}


class Mistral(Family):
    """Llama with a window, or without (arXiv 2310.06825)."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    windowed = True
    DEFAULTS: ClassVar[dict[str, Any]] = Family.DEFAULTS | {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }


class Mixtral(Family):
    """Mistral with a MoE layer in every layer, whose weights are renormalised (arXiv 2401.04088)."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    moe = True
    windowed = True
    DEFAULTS: ClassVar[dict[str, Any]] = Family.DEFAULTS | {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts": None,
        "num_experts_per_tok": 2,
    }
    NAMES: ClassVar[dict[str, str]] = BLOCK | {
        "layers.N.ffn.router.weight": "model.layers.{n}.block_sparse_moe.gate.weight",
        "layers.N.ffn.experts.w_gate": "model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight",
        "layers.N.ffn.experts.w_down": "model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight",
        "layers.N.ffn.experts.w_up": "model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight",
    }

    def read_model(self, fields: Fields) -> dict[str, Any]:
        # transformers takes `num_experts` in place of `num_local_experts`.
        experts = fields.integer("num_local_experts")
        alias = fields.integer("num_experts") if "num_experts" in fields.raw else experts
        same = alias == experts or "num_local_experts" not in fields.raw
        fields.expect(same, "num_experts", alias, f"{experts}, as num_local_experts")
        top_k = fields.integer("num_experts_per_tok")
        fields.expect(top_k > 1, "num_experts_per_tok", top_k, "at least 2 (weights are renormalised to sum 1)")
        return super().read_model(fields) | {"num_experts": alias, "top_k": top_k}

    def read_router(self, fields: Fields) -> RouterConfig:
        return RouterConfig(normalize=True)

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        renormalised = model.top_k is not None and model.top_k > 1
        expect_key(renormalised, "model.top_k", model.top_k, "at least 2 (weights are renormalised)", self.architecture)
        return super().write(model, router) | {
            "intermediate_size": model.expert_width,
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.top_k,
            "output_router_logits": False,
            "router_jitter_noise": 0.0,
        }
