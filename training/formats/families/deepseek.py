"""DeepSeekMoE."""

from typing import Any, ClassVar

from moe.config import ModelConfig, RouterConfig
from training.formats.families.experts import moe_layers, read_moe_layers, shared_names
from training.formats.families.family import Family
from training.formats.families.softmax import SoftmaxMoe
from training.formats.fields import Fields
from training.formats.meaning import expect_key


class Deepseek(SoftmaxMoe):
    """Fine-grained experts and shared experts in all but the first layers (arXiv 2401.06066).

    The released models (deepseek-moe-16b-base, deepseek-moe-16b-chat) have their own code, `modeling_deepseek.py`,
    which transformers loads with `trust_remote_code`. This class reads their files without that code. The keys of the
    experts have no defaults, because copies of the code have different ones.
    """

    model_type = "deepseek"
    architecture = "DeepseekForCausalLM"
    # The released code does not read the key.
    any_head_dim = False
    EXPERTS: ClassVar[tuple[str, ...]] = ("n_routed_experts",)
    DEFAULTS: ClassVar[dict[str, Any]] = Family.DEFAULTS | {
        "rms_norm_eps": 1e-6,
        "n_routed_experts": None,
        "num_experts_per_tok": None,
        "moe_intermediate_size": None,
        "n_shared_experts": None,
        "norm_topk_prob": None,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "attention_bias": False,
    }
    IGNORED: ClassVar[frozenset[str]] = Family.IGNORED | {"aux_loss_alpha", "seq_aux"}
    BIASES: ClassVar[dict[str, str]] = {"attention_bias": "all"}
    SCALINGS: ClassVar[tuple[str, ...]] = ("linear",)
    NAMES: ClassVar[dict[str, str]] = SoftmaxMoe.NAMES | shared_names("shared_experts")

    def read_model(self, fields: Fields) -> dict[str, Any]:
        scoring = fields.get("scoring_func")
        fields.expect(scoring == "softmax", "scoring_func", scoring, "softmax")
        first, every = fields.whole("first_k_dense_replace"), fields.integer("moe_layer_freq")
        layers = read_moe_layers(fields, "moe_layer_freq", lambda layer: layer >= first and layer % every == 0)
        layers["num_shared_experts"] = fields.integer_or_null("n_shared_experts") or 0
        return super().read_model(fields) | layers | {"expert_hidden_dim": fields.integer("moe_intermediate_size")}

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        dense, every = moe_layers(model)
        first = dense + every - 1
        multiple = f"1, or a divisor of {first}, the number of the first MoE layer"
        expect_key(first % every == 0, "model.moe_every", every, multiple, self.architecture)
        return super().write(model, router) | {
            "moe_intermediate_size": model.expert_width,
            "n_shared_experts": model.num_shared_experts or None,
            "first_k_dense_replace": first,
            "moe_layer_freq": every,
            "scoring_func": "softmax",
        }
