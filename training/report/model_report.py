"""The tables of `scripts/describe.py`: a model's shape, parameters, FLOPs, memory and attention."""

from collections.abc import Mapping
from typing import Any

from moe.config import ModelConfig, RouterConfig
from training.report.terminal import human_bytes, human_count, show_fields, show_table

TRAINING_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "master": "fp32 master weights",
    "moments": "two fp32 moments",
    "total": "total",
}


def show_model(
    model: ModelConfig, router: RouterConfig, figures: Mapping[str, Any], *, vocabulary_is_assumed: bool
) -> None:
    """Print a model's figures as tables.

    Args:
        figures: as `moe.accounting.figures.model_figures` returned them for this model.
        vocabulary_is_assumed: whether `model.vocab_size` stands for that of a tokenizer.
    """
    show_fields("model", _shape(model, router, vocabulary_is_assumed))
    _show_parameters(figures)
    _show_memory(figures, has_window=model.sliding_window is not None)
    _show_attention(figures, has_window=model.sliding_window is not None)


def _shape(model: ModelConfig, router: RouterConfig, vocabulary_is_assumed: bool) -> dict[str, str]:
    windows = model.sliding_window if isinstance(model.sliding_window, tuple) else (model.sliding_window,)
    assumed = " (the tokenizer's; vocab_size=... to assume another)" if vocabulary_is_assumed else ""
    shape = {
        "layers": f"{model.num_layers} of width {model.dim:,}",
        "attention": f"{model.num_heads} query heads, {model.num_kv_heads} key/value heads of {model.head_dim}",
        "window": ", ".join("none" if window is None else f"{window:,}" for window in windows),
        "vocabulary": f"{model.vocab_size:,}{', tied to the head' if model.tie_embeddings else ''}{assumed}",
    }
    if model.num_moe_layers < model.num_layers:
        shape["dense layers"] = f"{model.num_layers - model.num_moe_layers}, {model.ffn} of width {model.hidden_dim:,}"
    if model.is_moe:
        experts = f"{model.num_experts:,} routed, top-{model.top_k}"
        shared = f", {model.num_shared_experts} shared" if model.num_shared_experts else ""
        shape["MoE layers"] = f"{model.num_moe_layers}, {model.expert_kind} of width {model.expert_width:,}"
        shape["experts"] = f"{experts}{shared}"
        shape["router"] = _router(model, router)
    return shape


def _router(model: ModelConfig, router: RouterConfig) -> str:
    assert model.top_k is not None
    words: list[str] = [router.kind]
    if router.kind != "expert_choice":
        words.append("weights renormalised" if router.normalizes(model.top_k) else "weights as they are")
    if router.num_groups is not None:
        words.append(f"best {router.topk_groups} of {router.num_groups} groups")
    if router.jitter:
        words.append(f"jitter {router.jitter:g}")
    words.append("dropless" if router.capacity_factor is None else f"capacity factor {router.capacity_factor:g}")
    return ", ".join(words)


def _show_parameters(figures: Mapping[str, Any]) -> None:
    total, active = figures["total_params"], figures["active"]
    rows = [
        (name.replace("_", " ").replace("ffn", "FFN"), f"{count:,}", f"{active[name]:,}", f"{count / total:.1%}")
        for name, count in figures["params"].items()
        if count
    ]
    rows.append(("total", f"{total:,}", f"{figures['active_params']:,}", "100.0%"))
    rows.append(("", human_count(total), human_count(figures["active_params"]), ""))
    show_table("parameters", ("part", "all", "active per token", "share"), rows)
    show_fields(
        f"FLOPs per token, context {figures['context']:,}",
        {
            "forward": human_count(figures["forward_flops_per_token"]),
            "training": f"{human_count(figures['training_flops_per_token'])} (forward and backward)",
        },
    )


def _show_memory(figures: Mapping[str, Any], *, has_window: bool) -> None:
    weights, cache, dtype = figures["weights_bytes"], figures["kv_cache_bytes"], figures["dtype"]
    show_fields("weights alone", {name: human_bytes(size) for name, size in weights.items()})
    in_dtype, in_training = figures["training_bytes"], figures["training_bytes_here"]
    show_table(
        "training, all ranks together, without activations",
        ("", f"in {dtype}", "as train.py holds it"),
        [(label, human_bytes(in_dtype[key]), human_bytes(in_training[key])) for key, label in TRAINING_ROWS.items()],
    )
    show_fields(
        f"key/value cache in {dtype}, {figures['batch']:,} x {figures['context']:,} tokens",
        {
            "full": human_bytes(cache["full"]),
            "rolling": human_bytes(cache["rolling"]) + ("" if has_window else " (no layer has a window)"),
            "with weights": human_bytes(weights[dtype] + cache["rolling"]),
        },
    )


def _show_attention(figures: Mapping[str, Any], *, has_window: bool) -> None:
    field, farthest = figures["receptive_field"], figures["farthest_token"]
    show_fields(
        "reach of the last token",
        {
            "receptive field": "the whole context"
            if field is None
            else f"{field:,} tokens, the sum of the windows (the oldest in reach is {farthest:,} back)"
        },
    )
    for saving in figures["attention"]:
        window = f"W = {saving['window']:,}" + ("" if has_window else " (if it had one; window=... to change)")
        show_table(
            f"query-key pairs of one head, n = {saving['context']:,}, {window}",
            ("mask", "full", "window", "saved"),
            [
                ("n x n against n x W", f"{saving['full']:,}", f"{saving['windowed']:,}", f"{saving['saved']:.1%}"),
                (
                    "causal, the pairs attended to",
                    f"{saving['causal']:,}",
                    f"{saving['causal_windowed']:,}",
                    f"{saving['saved_of_causal']:.1%}",
                ),
            ],
        )
