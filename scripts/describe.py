"""What a model is and what it costs, without a byte of weights: parameters, operations, memory, reach.

    python scripts/describe.py model=mixtral_8x7b
    python scripts/describe.py model=mixtral_8x7b model.sliding_window=4096 batch=8 context=131072 dtype=fp16
    python scripts/describe.py model=switch_c format=json

docs/models.md has the presets, their papers and how each figure is counted.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from common.checks import expect
from common.strict import located, to_dict
from moe.config import ModelConfig, RouterConfig
from scripts.cli.tools import run_tool


@dataclass(frozen=True)
class DescribeConfig:
    """Mirrored by conf/describe.yaml."""

    model: ModelConfig
    router: RouterConfig
    format: Literal["table", "json"] = "table"
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    batch: int = 1
    context: int = 32768
    window: int = 4096
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        for field in ("batch", "context", "window", "vocab_size"):
            expect(getattr(self, field) >= 1, field, getattr(self, field), "an integer >= 1")
        try:
            self.router.check(self.model.num_experts, self.model.top_k)
        except ValueError as error:
            raise located(error, "router") from error

    @property
    def whole_model(self) -> ModelConfig:
        """`model` with a vocabulary."""
        return self.model if self.model.vocab_size is not None else replace(self.model, vocab_size=self.vocab_size)


def describe(config: DescribeConfig) -> None:
    report = figures(config)
    if config.format == "json":
        print(json.dumps(report, indent=2))
    else:
        show_report(config, report)


def figures(config: DescribeConfig) -> dict[str, Any]:
    """Everything the tool knows, JSON-able; bytes and counts are exact integers.

    Raises:
        ModelError: sizes beyond what a tensor can have.
    """
    from moe.accounting.costs import (
        BYTES,
        active_parts,
        cache_bytes,
        count_parts,
        farthest_token,
        receptive_field,
        training_bytes,
        window_saving,
    )
    from moe.accounting.flops import forward_flops_per_token, meta_model, training_flops_per_token

    model = config.whole_model
    built = meta_model(model, config.router)
    parts = count_parts(built)
    active = active_parts(parts, model)
    cache = cache_bytes(model, config.batch, config.context, config.dtype)
    windows = sorted({window for layer in range(model.num_layers) if (window := model.window(layer)) is not None})
    return {
        "total_params": parts.total,
        "active_params": active.total,
        "params": asdict(parts),
        "active": asdict(active),
        "context": config.context,
        "batch": config.batch,
        "dtype": config.dtype,
        "forward_flops_per_token": forward_flops_per_token(built, config.context),
        "training_flops_per_token": training_flops_per_token(built, config.context),
        "weights_bytes": {dtype: parts.total * size for dtype, size in BYTES.items()},
        "training_bytes": asdict(training_bytes(parts.total, config.dtype)),
        "training_bytes_here": asdict(training_bytes(parts.total)),
        "kv_cache_bytes": asdict(cache),
        "receptive_field": receptive_field(model),
        "farthest_token": farthest_token(model),
        "attention": [asdict(window_saving(config.context, window)) for window in windows or [config.window]],
        "model": to_dict(model),
        "router": to_dict(config.router) if model.is_moe else None,
    }


def show_report(config: DescribeConfig, report: dict[str, Any]) -> None:
    """The figures for a person."""
    from training.report.terminal import show_fields

    show_fields("model", _shape(config))
    _show_parameters(report)
    _show_memory(config, report)
    _show_attention(config, report)


def _shape(config: DescribeConfig) -> dict[str, str]:
    model = config.whole_model
    windows = model.sliding_window if isinstance(model.sliding_window, tuple) else (model.sliding_window,)
    assumed = "" if config.model.vocab_size is not None else " (the tokenizer's; vocab_size=... to assume another)"
    shape = {
        "layers": f"{model.num_layers} of width {model.dim:,}",
        "attention": f"{model.num_heads} query heads, {model.num_kv_heads} key/value heads of {model.head_dim}",
        "window": ", ".join("none" if window is None else f"{window:,}" for window in windows),
        "vocabulary": f"{model.vocab_size:,}{', tied to the head' if model.tie_embeddings else ''}{assumed}",
    }
    if model.num_moe_layers < model.num_layers:
        dense = model.num_layers - model.num_moe_layers
        shape["dense layers"] = f"{dense}, {model.ffn} of width {model.hidden_dim:,}"
    if model.is_moe:
        experts = f"{model.num_experts:,} routed, top-{model.top_k}"
        shared = f", {model.num_shared_experts} shared" if model.num_shared_experts else ""
        shape["MoE layers"] = f"{model.num_moe_layers}, {model.expert_kind} of width {model.expert_width:,}"
        shape["experts"] = f"{experts}{shared}"
        shape["router"] = _router(config.router, model)
    return shape


def _router(router: RouterConfig, model: ModelConfig) -> str:
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


def _show_parameters(report: dict[str, Any]) -> None:
    from training.report.terminal import human_count, show_fields, show_table

    total, active = report["total_params"], report["active"]
    rows = [
        (name.replace("_", " ").replace("ffn", "FFN"), f"{count:,}", f"{active[name]:,}", f"{count / total:.1%}")
        for name, count in report["params"].items()
        if count
    ]
    rows.append(("total", f"{total:,}", f"{report['active_params']:,}", "100.0%"))
    rows.append(("", human_count(total), human_count(report["active_params"]), ""))
    show_table("parameters", ("part", "all", "active per token", "share"), rows)
    show_fields(
        f"FLOPs per token, context {report['context']:,}",
        {
            "forward": human_count(report["forward_flops_per_token"]),
            "training": f"{human_count(report['training_flops_per_token'])} (forward and backward)",
        },
    )


def _show_memory(config: DescribeConfig, report: dict[str, Any]) -> None:
    from training.report.terminal import human_bytes, show_fields, show_table

    weights, cache = report["weights_bytes"], report["kv_cache_bytes"]
    show_fields("weights alone", {dtype: human_bytes(size) for dtype, size in weights.items()})
    given, here = report["training_bytes"], report["training_bytes_here"]
    names = {
        "weights": "weights",
        "gradients": "gradients",
        "master": "fp32 master weights",
        "moments": "two fp32 moments",
    }
    show_table(
        "training, all ranks together, without activations",
        ("", f"in {config.dtype}", "as train.py holds it"),
        [
            (names.get(name, name), human_bytes(given[name]), human_bytes(here[name]))
            for name in ("weights", "gradients", "master", "moments", "total")
        ],
    )
    windowed = config.model.sliding_window is not None
    show_fields(
        f"key/value cache in {config.dtype}, {config.batch:,} x {config.context:,} tokens",
        {
            "full": human_bytes(cache["full"]),
            "rolling": human_bytes(cache["rolling"]) + ("" if windowed else " (no layer has a window)"),
            "with weights": human_bytes(weights[config.dtype] + cache["rolling"]),
        },
    )


def _show_attention(config: DescribeConfig, report: dict[str, Any]) -> None:
    from training.report.terminal import show_fields, show_table

    field, farthest = report["receptive_field"], report["farthest_token"]
    show_fields(
        "reach of the last token",
        {
            "receptive field": "the whole context"
            if field is None
            else f"{field:,} tokens, the sum of the windows (the oldest in reach is {farthest:,} back)"
        },
    )
    own = config.model.sliding_window is not None
    for saving in report["attention"]:
        window = f"W = {saving['window']:,}" + ("" if own else " (if it had one; window=... to change)")
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


def main() -> None:
    run_tool("describe", DescribeConfig, describe)


if __name__ == "__main__":
    main()
