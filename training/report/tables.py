"""The tables that rank 0 prints at the start and at the end of a run, and those of `scripts/describe.py`.

`terminal` adapts them to a terminal, a pipe or a file. The table of the expert load is in `heatmap`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.text import show_ranges
from moe.config import FEED_FORWARDS, ModelConfig, RouterConfig
from parallel.planning.plan import HEADER, Plan, describe, describe_traffic
from training.report.terminal import human_bytes, human_count, human_time, show_fields, show_line, show_table

MAX_RANKS_SHOWN = 16
"""With more ranks than this, the layout table summarises the ranks between the first and the last in one row."""
TRAINING_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "master": "fp32 master weights",
    "moments": "two fp32 moments",
    "total": "total",
}


@dataclass(frozen=True)
class RankSummary:
    """What one rank stores, counted on the shards of its modules."""

    rank: int
    host: str
    device: str
    experts: Sequence[int]
    """Indices, among all experts of an MoE layer, of those that the rank stores. Empty for a dense model."""
    layers: Sequence[int]
    """Indices of the layers that the rank stores. Under pipeline parallelism, a rank stores some of them."""
    parameters: int
    bytes: int
    """The size of the weights."""
    expert_parameters: int
    """The number of parameters that belong to experts."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as `result.json` contains them."""
        return asdict(self) | {"experts": list(self.experts), "layers": list(self.layers)}

    def expert_ranges(self) -> str:
        """Return the experts as text: `0-3`, `0,4,8-9`, or `none`."""
        return show_ranges(self.experts) or "none"


def show_corpus(summary: Sequence[Mapping[str, Any]], key: str, directory: Path) -> None:
    """Print one row per domain of the corpus, and their sum.

    Args:
        summary: for each domain, a dict with the keys `domain`, `documents`, `bytes`, `tokens`, `sha256`,
            `heldout_bytes`, `gzip_bits_per_byte` and `unigram_bits_per_byte`. The last two are measured on the held-out
            text. They are None for a domain without held-out text.
        key: the content hash of the whole corpus.
        directory: the directory of the token store.
    """
    rows = [
        [
            row["domain"],
            f"{row['documents']:,}",
            human_bytes(row["bytes"]),
            human_count(row["tokens"]),
            human_bytes(row["heldout_bytes"]),
            *(
                "-" if bits is None else f"{bits:.3f}"
                for bits in (row["gzip_bits_per_byte"], row["unigram_bits_per_byte"])
            ),
            row["sha256"][:8],
        ]
        for row in summary
    ]
    if len(summary) > 1:
        documents, size, tokens, heldout = (
            sum(row[name] for row in summary) for name in ("documents", "bytes", "tokens", "heldout_bytes")
        )
        rows.append(["all", f"{documents:,}", human_bytes(size), human_count(tokens), human_bytes(heldout), "", "", ""])
    show_table(
        "Corpus (gzip -9 and byte unigram: bits per byte of the held-out text)",
        ["domain", "documents", "size", "tokens", "held out", "gzip -9", "unigram", "sha256"],
        rows,
        left=["sha256"],
    )
    show_line(f"corpus {key[:12]} in {directory}")


def show_model(
    model: ModelConfig,
    *,
    total_params: int,
    active_params: int,
    vocab_size: int,
    tokenizer: str,
    precision: str,
    device: str,
) -> None:
    """Print the size and the shape of the model.

    Args:
        model: the configuration of the model.
        total_params: the number of parameters.
        active_params: the number of parameters that one token uses.
        vocab_size: the number of token ids.
        tokenizer: the kind of tokenizer.
        precision: the data type of the forward and backward pass.
        device: the device of rank 0.
    """
    show_fields(
        "Model",
        {
            "parameters": f"{human_count(total_params)} total ({total_params:,}), "
            f"{human_count(active_params)} active per token ({active_params:,})",
            "layers": f"{model.num_layers} of dim {model.dim:,}",
            "feed-forward": _feed_forward(model),
            "attention": f"{_attention(model)}; {_windows(model)}",
            "tokenizer": f"{tokenizer}, {vocab_size:,} ids",
            "precision": f"{precision} on {device}",
        },
    )


def _feed_forward(model: ModelConfig) -> str:
    dense = f"dense {FEED_FORWARDS[model.ffn].label}, hidden {model.hidden_dim:,}"
    if model.num_experts is None:
        return dense
    experts = f"{model.num_experts} {FEED_FORWARDS[model.expert_kind].label} experts, hidden {model.expert_width:,}"
    moe_layers = model.num_moe_layers
    others = "" if moe_layers == model.num_layers else f" in {moe_layers} layers, the others {dense}"
    return f"{experts}; top-{model.top_k} per token{_shared(model)}{others}"


def _shared(model: ModelConfig) -> str:
    if not model.num_shared_experts:
        return ""
    width = "" if model.shared_hidden_dim is None else f" of width {model.shared_hidden_dim:,}"
    return f", {model.num_shared_experts} shared{width}{' with a gate' if model.shared_gate else ''}"


def _heads(model: ModelConfig) -> str:
    """Return the numbers and widths of the heads, and of the latents if there are any."""
    if model.kv_lora_rank is None:
        return f"{model.num_heads} query heads, {model.num_kv_heads} key/value heads of {model.head_dim}"
    parts = f"{model.qk_nope_head_dim} + {model.rotary_width} rotary"
    queries = "" if model.q_lora_rank is None else f", of queries {model.q_lora_rank:,}"
    heads = f"{model.num_heads} heads of {model.head_dim} ({parts}), values of {model.value_dim}"
    return f"latent, {heads}; latent of keys and values {model.kv_lora_rank:,}{queries}"


def _attention(model: ModelConfig) -> str:
    norms = {"head": "RMSNorm of each query and key head", "width": "RMSNorm of queries and keys"}
    biases = {"qkv": "biases of queries, keys and values", "all": "biases"}
    scaling = model.rope_scaling
    words = (
        _heads(model),
        "" if model.qk_norm is None else norms[model.qk_norm],
        "" if model.attention_bias is None else biases[model.attention_bias],
        "" if model.rotary_dim is None else f"{model.rotary_dim} numbers of each rotated",
        "" if scaling is None else f"rotary frequencies scaled by {scaling.factor:g} ({scaling.kind})",
    )
    return ", ".join(filter(None, words))


def _windows(model: ModelConfig) -> str:
    kinds = dict.fromkeys(map(model.window, range(model.num_layers)))
    return " and ".join("all earlier tokens" if w is None else f"window of {w:,} tokens" for w in kinds)


def show_layout(ranks: Sequence[RankSummary], axes: str) -> None:
    """Print one row per rank. With more than 16 ranks, one row summarises those between the first and the last.

    Args:
        ranks: what each rank stores, in the order of the ranks.
        axes: the sizes of the parallel axes as text, such as `tensor=2 expert=4`; empty for a single rank.
    """
    rows = [
        [
            str(rank.rank),
            rank.host,
            rank.device,
            show_ranges(rank.layers) or "none",
            rank.expert_ranges(),
            f"{rank.parameters:,}",
            f"{rank.expert_parameters:,}",
            human_bytes(rank.bytes),
        ]
        for rank in ranks
    ]
    if len(ranks) > MAX_RANKS_SHOWN:
        between = ranks[1:-1]
        hosts = {rank.host for rank in ranks}
        middle = [
            f"{between[0].rank} to {between[-1].rank}",
            f"{len(hosts)} hosts in all" if len(hosts) > 1 else ranks[0].host,
            ", ".join(sorted({rank.device.split(":")[0] for rank in between})),
            f"{_show_span([len(rank.layers) for rank in between])} each",
            f"{_show_span([len(rank.experts) for rank in between])} each",
            _show_span([rank.parameters for rank in between]),
            _show_span([rank.expert_parameters for rank in between]),
            human_bytes(max(rank.bytes for rank in between)),
        ]
        rows = [rows[0], middle, rows[-1]]
    title = f"Layout: {len(ranks)} {'rank' if len(ranks) == 1 else 'ranks'}{f', {axes}' if axes else ''}"
    columns = ["rank", "host", "device", "layers", "experts", "parameters", "of experts", "weights"]
    show_table(title, columns, rows, left=["host", "device", "layers", "experts"])


def show_plan(plan: Plan) -> None:
    """Print the estimate of the memory that a rank of each pipeline stage needs, and of the bytes that it sends."""
    show_table("Memory of a rank (~ = estimated)", HEADER, describe(plan, human_bytes), left=["layers"])
    traffic = describe_traffic(plan, human_bytes)
    idle = traffic.pop("idle", None)
    if traffic:
        sizes = ", ".join(f"{axis} {size}" for axis, size in traffic.items())
        show_line(f"sent by a rank in one optimizer step: {sizes}")
    if idle:
        show_line(f"a pipeline rank is idle for {idle}")


def _show_span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def baselines_of(summary: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return domain -> bits per byte of its held-out text by `gzip -9` and by a byte unigram.

    Args:
        summary: `data.tokens.store.Store.summary`. Domains without held-out text are left out.
    """
    return {
        row["domain"]: (row["gzip_bits_per_byte"], row["unigram_bits_per_byte"])
        for row in summary
        if row["heldout_bytes"]
    }


def show_evaluation(
    bits_per_byte: Mapping[str, float],
    loss: float | None,
    baselines: Mapping[str, tuple[float, float]],
    text: str = "held-out text",
) -> None:
    """Print the bits per byte of a text in each domain, beside two baselines that need no training.

    Args:
        bits_per_byte: the model's bits per byte by domain, without the domains that have none of the text.
        loss: the cross-entropy of all the text, in nats per token. None: that text has no label.
        baselines: by domain, the bits per byte of `gzip -9` and of a byte unigram on the same text.
        text: what the text is.
    """
    compared = {
        domain: [f"{gzip:.3f}", f"{unigram:.3f}", "yes" if bits_per_byte[domain] < gzip else "no"]
        for domain, (gzip, unigram) in baselines.items()
        if domain in bits_per_byte
    }
    rows = [[domain, f"{bits:.3f}", *compared.get(domain, ["-", "-", "-"])] for domain, bits in bits_per_byte.items()]
    show_table(
        f"{text.capitalize()}: loss {'-' if loss is None else f'{loss:.4f}'} nats per token; bits per byte by domain",
        ["domain", "model", "gzip -9", "byte unigram", "below gzip -9"],
        rows,
    )
    if baselines:
        show_line(
            f"gzip -9 and the byte unigram use only the {text} itself; the model was trained on the training text"
        )


def show_sample(prompt: str, text: str, note: str | None = None) -> None:
    """Print a prompt in brackets and the text generated from it. Control characters are printed as escapes.

    Args:
        prompt: the prompt.
        text: the generated text, without the prompt.
        note: a line about how the text was generated.
    """
    show_line()
    show_line("Sample (the prompt in brackets)", style="bold")
    if note is not None:
        show_line(note)
    for line in f"[{prompt}]{text}".split("\n"):
        show_line(f"  {line}")


def show_end(
    directory: Path,
    checkpoint: Path | None,
    resume_command: str,
    rate: str,
    open_command: str,
    page: Path | None,
    wall_s: float,
    tokens_per_s: float,
    figures: Mapping[str, str],
) -> None:
    """Print the run's directory and the commands that resume the run and show its results.

    Args:
        directory: the run's directory.
        checkpoint: the directory of the last checkpoint, if there is one.
        resume_command: the command line that continues the run.
        rate: the learning rate of the continued run, in words.
        open_command: the command line that shows the run's metrics.
        page: the report, if it was written.
        wall_s: the seconds that the run took.
        tokens_per_s: the training speed.
        figures: name -> what the run has spent its time on, and what was predicted and measured.
    """
    show_fields(
        f"Done in {human_time(wall_s)}, {human_count(tokens_per_s)} tokens/s",
        {
            "run": str(directory),
            "checkpoint": "none" if checkpoint is None else str(checkpoint),
            "resume": resume_command,
            "": f"({rate}; docs/runs.md has other ways)",
            "results": open_command,
            "report": "none" if page is None else str(page),
            **figures,
        },
        commands=("resume", "results"),
    )


def show_figures(
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
        "attention": _attention(model),
        "window": ", ".join("none" if window is None else f"{window:,}" for window in windows),
        "vocabulary": f"{model.vocab_size:,}{', tied to the head' if model.tie_embeddings else ''}{assumed}",
    }
    if model.num_moe_layers < model.num_layers:
        shape["dense layers"] = f"{model.num_layers - model.num_moe_layers}, {model.ffn} of width {model.hidden_dim:,}"
    if model.is_moe:
        shape["MoE layers"] = f"{model.num_moe_layers}, {model.expert_kind} of width {model.expert_width:,}"
        shape["experts"] = f"{model.num_experts:,} routed, top-{model.top_k}{_shared(model)}"
        shape["router"] = _router(model, router)
    return shape


def _router(model: ModelConfig, router: RouterConfig) -> str:
    assert model.top_k is not None
    weights = "weights renormalised" if router.normalizes(model.top_k) else "weights as they are"
    words = (
        router.kind,
        "" if router.kind == "expert_choice" else weights,
        "" if router.num_groups is None else f"best {router.topk_groups} of {router.num_groups} groups",
        f"jitter {router.jitter:g}" if router.jitter else "",
        "dropless" if router.capacity_factor is None else f"capacity factor {router.capacity_factor:g}",
    )
    return ", ".join(filter(None, words))


def _show_parameters(figures: Mapping[str, Any]) -> None:
    total, active = figures["total_params"], figures["active"]
    rows = [
        (name.replace("_", " ").replace("ffn", "FFN"), f"{count:,}", f"{active[name]:,}", f"{count / total:.1%}")
        for name, count in figures["params"].items()
        if count
    ]
    rows.append(("total", f"{total:,}", f"{figures['active_params']:,}", "100.0%"))
    rows.append(("", human_count(total), human_count(figures["active_params"]), ""))
    if figures["trained_params"] < total:
        trained = figures["trained_params"]
        rows.append(("of adapters, which train", f"{trained:,}", "", f"{trained / total:.2%}"))
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
