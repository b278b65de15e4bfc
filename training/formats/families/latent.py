"""DeepSeek-V2 and DeepSeek-V3: multi-head latent attention (`moe.attention.latent`)."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from moe.config import ModelConfig, RouterConfig
from training.formats.families.deepseek import Deepseek
from training.formats.families.experts import PER_EXPERT, moe_layers, read_moe_layers, read_top_k, shared_names
from training.formats.families.family import BLOCK, Family
from training.formats.fields import Fields, shown
from training.formats.foreign_tensors import Format
from training.formats.meaning import expect_key

NORM_EPS = 1e-6
"""The epsilon of the norms of latents in transformers and in DeepSeek's code, whatever `rms_norm_eps` says."""
_ATTENTION = {
    f"layers.N.attention.{ours}.weight": f"model.layers.{{n}}.self_attn.{theirs}.weight"
    for ours, theirs in {
        "wq_down": "q_a_proj",
        "wq_down_norm": "q_a_layernorm",
        "wq_up": "q_b_proj",
        "wkv_down": "kv_a_proj_with_mqa",
        "wkv_down_norm": "kv_a_layernorm",
        "wkv_up": "kv_b_proj",
    }.items()
}
_PAIRED = frozenset(f"layers.N.attention.{name}.weight" for name in ("wq", "wq_up", "wkv_down"))
_SKIPPED = "num_nextn_predict_layers"
MAX_SKIPPED = 100
"""The most layers for multi-token prediction that a file can have."""
_WIDTHS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


class DeepseekLatent(Family):
    """What both families have in common."""

    moe = True
    latent = True
    DEFAULTS: ClassVar[dict[str, Any]] = Family.DEFAULTS | _WIDTHS | {
        "rms_norm_eps": NORM_EPS,
        "routed_scaling_factor": 1.0,
        "n_group": None,
        "topk_group": None,
        "topk_method": None,
        "scoring_func": None,
        "qk_head_dim": None,
        "moe_layer_freq": 1,
        "rope_interleave": True,
    }  # fmt: skip
    IGNORED: ClassVar[frozenset[str]] = Deepseek.IGNORED | {"ep_size"}
    NAMES: ClassVar[dict[str, str]] = BLOCK | _ATTENTION | PER_EXPERT | shared_names("shared_experts")

    def read_model(self, fields: Fields) -> dict[str, Any]:
        widths = {key: fields.integer(key) for key in _WIDTHS if key != "q_lora_rank"}
        nope, rope = widths["qk_nope_head_dim"], widths["qk_rope_head_dim"]
        # transformers writes these two keys, and does not read them.
        for key, width in (("head_dim", rope), ("qk_head_dim", nope + rope)):
            value = fields.get(key)
            fields.expect(value in (None, width), key, value, f"{width}, or no such key")
        eps = fields.number("rms_norm_eps")
        fields.expect(eps == NORM_EPS, "rms_norm_eps", eps, f"{NORM_EPS}, that of the norms of latents")
        interleaved = fields.flag("rope_interleave")
        fields.expect(interleaved, "rope_interleave", interleaved, "true")
        first, every = fields.whole("first_k_dense_replace"), fields.integer("moe_layer_freq")
        fields.expect(every == 1, "moe_layer_freq", every, "1 (transformers does not read it)")
        normalize = fields.flag("norm_topk_prob")
        return super().read_model(fields) | widths | read_moe_layers(
            fields, "first_k_dense_replace", lambda layer: layer >= first
        ) | {
            "head_dim": nope + rope,
            "q_lora_rank": fields.integer_or_null("q_lora_rank"),
            "num_experts": fields.integer("n_routed_experts"),
            "top_k": read_top_k(fields, normalize),
            "expert_hidden_dim": fields.integer("moe_intermediate_size"),
            "num_shared_experts": fields.integer_or_null("n_shared_experts") or 0,
        }  # fmt: skip

    def read_groups(self, fields: Fields) -> tuple[int | None, int | None]:
        """Return `num_groups` and `topk_groups` of the router. One group is none."""
        groups = fields.integer_or_null("n_group")
        if groups in (None, 1):
            best = fields.raw.get("topk_group")
            fields.expect(best in (None, 1), "topk_group", best, f"1, or no such key, with n_group={shown(groups)}")
            return None, None
        return groups, fields.integer("topk_group")

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        assert model.top_k is not None
        rank = model.kv_lora_rank
        expect_key(rank is not None, "model.kv_lora_rank", rank, "an integer", self.architecture)
        eps = model.norm_eps
        expect_key(
            eps == NORM_EPS, "model.norm_eps", eps, f"{NORM_EPS}, that of the norms of latents", self.architecture
        )
        shared = model.num_shared_experts
        expect_key(shared > 0, "model.num_shared_experts", shared, "at least 1", self.architecture)
        first, every = moe_layers(model)
        expect_key(every == 1, "model.moe_every", model.moe_every, "1", self.architecture)
        return super().write(model, router) | {key: getattr(model, key) for key in _WIDTHS} | {
            "head_dim": model.qk_rope_head_dim,
            "n_routed_experts": model.num_experts,
            "num_experts_per_tok": model.top_k,
            "moe_intermediate_size": model.expert_width,
            "n_shared_experts": shared,
            "norm_topk_prob": router.normalizes(model.top_k),
            "routed_scaling_factor": router.scale,
            "first_k_dense_replace": first,
            "moe_layer_freq": 1,
            "attention_bias": False,
        }  # fmt: skip

    @property
    def per_expert(self) -> Format:
        return super().per_expert._replace(interleaved=_PAIRED)


class DeepseekV2(DeepseekLatent):
    """Softmax scores that are not renormalised; with `group_limited_greedy` from the best groups (arXiv 2405.04434)."""

    model_type = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    DEFAULTS: ClassVar[dict[str, Any]] = DeepseekLatent.DEFAULTS | {
        "n_routed_experts": 64,
        "num_experts_per_tok": None,
        "moe_intermediate_size": 1407,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "topk_method": "greedy",
        "scoring_func": "softmax",
    }

    def read_router(self, fields: Fields) -> RouterConfig:
        scoring, method = fields.get("scoring_func"), fields.get("topk_method")
        fields.expect(scoring == "softmax", "scoring_func", scoring, "softmax")
        methods = ("greedy", "group_limited_greedy")
        fields.expect(method in methods, "topk_method", method, f"one of {', '.join(methods)}")
        # With true, DeepSeek's code renormalises and does not scale, and transformers does neither.
        normalize = fields.flag("norm_topk_prob")
        fields.expect(not normalize, "norm_topk_prob", normalize, "false")
        groups, best = self.read_groups(fields) if method == "group_limited_greedy" else (None, None)
        scale = fields.number("routed_scaling_factor")
        return RouterConfig(normalize=False, scale=scale, num_groups=groups, topk_groups=best)

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        return super().write(model, router) | {
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "topk_method": "greedy" if router.num_groups is None else "group_limited_greedy",
            "n_group": router.num_groups,
            "topk_group": router.topk_groups,
        }


class DeepseekV3(DeepseekLatent):
    """Sigmoid scores, of which a bias changes the selection and not the weights (arXiv 2412.19437).

    The layers after the last one, `num_nextn_predict_layers` in number, are for multi-token prediction. They are not
    read.
    """

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    DEFAULTS: ClassVar[dict[str, Any]] = DeepseekLatent.DEFAULTS | {
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        _SKIPPED: 0,
    }
    NAMES: ClassVar[dict[str, str]] = DeepseekLatent.NAMES | {
        "layers.N.ffn.router.bias": "model.layers.{n}.mlp.gate.e_score_correction_bias"
    }

    def read_router(self, fields: Fields) -> RouterConfig:
        for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
            fields.expect(fields.get(key) == value, key, fields.get(key), value)
        skipped = 0 if fields.get(_SKIPPED) is None else fields.whole(_SKIPPED)
        fields.expect(skipped <= MAX_SKIPPED, _SKIPPED, skipped, f"at most {MAX_SKIPPED}")
        groups, best = self.read_groups(fields)
        return RouterConfig(
            kind="sigmoid_topk",
            normalize=fields.flag("norm_topk_prob"),
            scale=fields.number("routed_scaling_factor"),
            num_groups=groups,
            topk_groups=best,
        )

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        return super().write(model, router) | {
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_group": router.num_groups or 1,
            "topk_group": router.topk_groups or 1,
            _SKIPPED: 0,
        }

    @property
    def per_expert(self) -> Format:
        return super().per_expert._replace(fp32=frozenset({"layers.N.ffn.router.bias"}))

    def format_of(self, names: Iterable[str], raw: Mapping[str, Any]) -> Format:
        names, first = list(names), raw["num_hidden_layers"]
        numbers = {int(found[1]) for name in names if (found := re.match(r"model\.layers\.(\d{1,9})\.", name))}
        skipped = sorted(numbers & set(range(first, first + min(MAX_SKIPPED, raw.get(_SKIPPED) or 0))))
        form = super().format_of(names, raw)
        if not skipped:
            return form
        shown = ", ".join(map(str, skipped))
        return form._replace(
            ignored=rf"{form.ignored}|model\.layers\.({'|'.join(map(str, skipped))})\..*",
            note=f"not reading layer {shown}, which is for multi-token prediction ({_SKIPPED}={raw[_SKIPPED]})",
        )
