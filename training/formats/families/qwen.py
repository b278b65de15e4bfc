"""Qwen2 and Qwen3, dense and with MoE layers."""

from typing import Any, ClassVar

from moe.config import ModelConfig, RouterConfig
from training.formats.families.experts import moe_layers, read_moe_layers, shared_names
from training.formats.families.family import Family
from training.formats.families.softmax import SoftmaxMoe
from training.formats.fields import Fields


class Qwen(Family):
    """What the families have in common: windows of some of the layers are described, and never used in releases."""

    DEFAULTS: ClassVar[dict[str, Any]] = Family.DEFAULTS | {
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "layer_types": None,
    }

    def check_window(self, fields: Fields) -> None:
        used, types = fields.get("use_sliding_window"), fields.get("layer_types")
        fields.expect(used in (False, None), "use_sliding_window", used, "false")
        full = isinstance(types, list) and all(kind == "full_attention" for kind in types)
        same = full and len(types) == fields.integer("num_hidden_layers")
        fields.expect(types is None or same, "layer_types", types, "full_attention for each layer")

    def read_window(self, fields: Fields) -> int | None:
        # Without `use_sliding_window`, `sliding_window` has no meaning. transformers writes 0 for Qwen2-MoE.
        return None

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        return super().write(model, router) | {"use_sliding_window": False, "sliding_window": None}


class Qwen2(Qwen):
    """Llama with biases of queries, keys and values (arXiv 2407.10671)."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    DEFAULTS: ClassVar[dict[str, Any]] = Qwen.DEFAULTS | {"num_key_value_heads": 32}

    def read_model(self, fields: Fields) -> dict[str, Any]:
        return super().read_model(fields) | {"attention_bias": "qkv"}


class Qwen3(Qwen):
    """Llama with RMSNorm of each head's query and key (arXiv 2505.09388)."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    qk_norm = "head"
    BIASES: ClassVar[dict[str, str]] = {"attention_bias": "all"}
    DEFAULTS: ClassVar[dict[str, Any]] = Qwen.DEFAULTS | {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
    }


class QwenMoe(Qwen, SoftmaxMoe):
    """The MoE layers of both versions."""

    DEFAULTS: ClassVar[dict[str, Any]] = Qwen.DEFAULTS | {
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    }

    def read_model(self, fields: Fields) -> dict[str, Any]:
        step, dense = fields.integer("decoder_sparse_step"), fields.get("mlp_only_layers")
        listed = dense is None or (isinstance(dense, list) and all(type(layer) is int for layer in dense))
        fields.expect(listed, "mlp_only_layers", dense, "a list of layers")
        only = frozenset(dense or ())
        key = "mlp_only_layers" if only else "decoder_sparse_step"
        layers = read_moe_layers(fields, key, lambda layer: layer not in only and (layer + 1) % step == 0)
        return super().read_model(fields) | layers | {"expert_hidden_dim": fields.integer("moe_intermediate_size")}

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        first, every = moe_layers(model)
        dense = [layer for layer in range(model.num_layers) if not model.is_moe_layer(layer)]
        return super().write(model, router) | {
            "moe_intermediate_size": model.expert_width,
            "decoder_sparse_step": 1 if first else every,
            "mlp_only_layers": dense if first else [],
            "output_router_logits": False,
        }


class Qwen2Moe(QwenMoe):
    """Qwen2 with MoE layers, and a shared expert whose output is multiplied by a sigmoid gate (Qwen1.5-MoE)."""

    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    BIASES: ClassVar[dict[str, str]] = {"qkv_bias": "qkv"}
    DEFAULTS: ClassVar[dict[str, Any]] = QwenMoe.DEFAULTS | {
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    }
    NAMES: ClassVar[dict[str, str]] = (
        QwenMoe.NAMES
        | shared_names("shared_expert")
        | {"layers.N.ffn.shared_gate.weight": "model.layers.{n}.mlp.shared_expert_gate.weight"}
    )

    def read_model(self, fields: Fields) -> dict[str, Any]:
        width = fields.integer("shared_expert_intermediate_size")
        shared = {"num_shared_experts": 1, "shared_hidden_dim": width, "shared_gate": True}
        return super().read_model(fields) | shared

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        # Without shared experts, the width has no meaning: the model is not computed by this family.
        width = model.shared_width or model.expert_width
        return super().write(model, router) | {"shared_expert_intermediate_size": width}


class Qwen3Moe(QwenMoe):
    """Qwen3 with MoE layers, whose weights are renormalised in releases (arXiv 2505.09388)."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    qk_norm = "head"
    EXPERTS: ClassVar[tuple[str, ...]] = ("num_experts", "num_local_experts")
    BIASES: ClassVar[dict[str, str]] = {"attention_bias": "all"}
    DEFAULTS: ClassVar[dict[str, Any]] = QwenMoe.DEFAULTS | {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_local_experts": None,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "attention_bias": False,
    }
