"""Llama, Mistral and Mixtral."""

from typing import Any, ClassVar

from moe.config import ModelConfig, RouterConfig
from training.formats.families.experts import read_experts, read_top_k
from training.formats.families.family import BLOCK, Family
from training.formats.fields import Fields
from training.formats.meaning import expect_key


class Llama(Family):
    """Dense, full attention (arXiv 2302.13971)."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    BIASES: ClassVar[dict[str, str]] = {"attention_bias": "all"}
    DEFAULTS: ClassVar[dict[str, Any]] = Family.DEFAULTS | {"rms_norm_eps": 1e-6, "attention_bias": False}

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        # transformers refuses others. A Mistral without a window is the same network.
        divides = model.dim % model.num_heads == 0
        expect_key(divides, "model.num_heads", model.num_heads, f"a divisor of dim={model.dim}", self.architecture)
        return super().write(model, router) | {"mlp_bias": False}


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
        experts = read_experts(fields, "num_local_experts", "num_experts")
        return super().read_model(fields) | {"num_experts": experts, "top_k": read_top_k(fields, normalize=True)}

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
