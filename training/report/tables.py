"""What rank 0 tells a person at the start and at the end of a run. Everything goes to stdout.

Tables adapt to a terminal and become plain aligned lines elsewhere (`terminal`). The expert-load heatmap is in
`heatmap`, the live progress in `progress`, figures in `plots`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe.config import FEED_FORWARDS, ModelConfig
from parallel.planning.plan import HEADER, Plan, describe, describe_traffic
from training.report.heatmap import show_load
from training.report.progress import Progress
from training.report.terminal import human_bytes, human_count, human_time, show_fields, show_line, show_table

__all__ = [
    "Progress",
    "RankSummary",
    "human_bytes",
    "human_count",
    "human_time",
    "show_corpus",
    "show_end",
    "show_evaluation",
    "show_layout",
    "show_load",
    "show_model",
    "show_plan",
    "show_sample",
]

MAX_RANKS_SHOWN = 16


@dataclass(frozen=True)
class RankSummary:
    """What one rank really holds, counted on its own shards."""

    rank: int
    host: str
    device: str
    experts: Sequence[int]
    """Global indices of its experts (of every MoE layer); empty in a dense model."""
    layers: Sequence[int]
    """Numbers of its layers: a pipeline stage holds some."""
    parameters: int
    bytes: int
    """Of the weights."""
    expert_parameters: int

    def as_dict(self) -> dict[str, Any]:
        """As it stands in `result.json`."""
        return asdict(self) | {"experts": list(self.experts), "layers": list(self.layers)}

    def expert_ranges(self) -> str:
        """`0-3`, `0,4,8-9`, or `none`."""
        return _ranges(self.experts)

    def layer_ranges(self) -> str:
        return _ranges(self.layers)


def _ranges(numbers: Sequence[int]) -> str:
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges) or "none"


def show_corpus(summary: Sequence[Mapping[str, Any]], key: str, directory: Path) -> None:
    """A row per domain and their sum; the baselines are bits per byte of the held-out text.

    Args:
        summary: per domain `domain, documents, bytes, tokens, sha256, heldout_bytes, gzip_bits_per_byte,
            unigram_bits_per_byte`.
        key: content hash of the whole corpus.
        directory: where its token shards lie.
    """
    rows = [
        [
            row["domain"],
            f"{row['documents']:,}",
            human_bytes(row["bytes"]),
            human_count(row["tokens"]),
            human_bytes(row["heldout_bytes"]),
            f"{row['gzip_bits_per_byte']:.3f}",
            f"{row['unigram_bits_per_byte']:.3f}",
            row["sha256"][:8],
        ]
        for row in summary
    ]
    if len(summary) > 1:
        documents, size, tokens, heldout = (
            sum(row[name] for row in summary) for name in ("documents", "bytes", "tokens", "heldout_bytes")
        )
        rows.append(["all", f"{documents:,}", human_bytes(size), human_count(tokens), human_bytes(heldout), "", "", ""])
    columns = ["domain", "documents", "size", "tokens", "held out", "gzip -9", "unigram", "sha256"]
    show_table("Corpus (gzip -9 and byte unigram: bits per byte of the held-out text)", columns, rows, left=["sha256"])
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
    """Size and shape of the model.

    Args:
        active_params: parameters that one token passes through.
        tokenizer: where the tokenizer comes from.
    """
    heads = f"{model.num_heads} query heads, {model.num_kv_heads} key/value heads of {model.head_dim}"
    fields = {
        "parameters": f"{human_count(total_params)} total ({total_params:,}), "
        f"{human_count(active_params)} active per token ({active_params:,})",
        "layers": f"{model.num_layers} of dim {model.dim:,}",
        "feed-forward": _feed_forward(model),
        "attention": f"{heads}; {_windows(model)}",
        "tokenizer": f"{tokenizer}, {vocab_size:,} ids",
        "precision": f"{precision} on {device}",
    }
    show_fields("Model", fields)


def _feed_forward(model: ModelConfig) -> str:
    dense = f"dense {FEED_FORWARDS[model.ffn].label}, hidden {model.hidden_dim:,}"
    if model.num_experts is None:
        return dense
    experts = f"{model.num_experts} {FEED_FORWARDS[model.expert_kind].label} experts, hidden {model.expert_width:,}"
    shared = f", {model.num_shared_experts} shared" if model.num_shared_experts else ""
    moe_layers = model.num_moe_layers
    others = "" if moe_layers == model.num_layers else f" in {moe_layers} layers, the others {dense}"
    return f"{experts}; top-{model.top_k} per token{shared}{others}"


def _windows(model: ModelConfig) -> str:
    kinds = dict.fromkeys(map(model.window, range(model.num_layers)))
    return " and ".join("all earlier tokens" if w is None else f"window of {w:,} tokens" for w in kinds)


def show_layout(ranks: Sequence[RankSummary], axes: str) -> None:
    """A row per rank; beyond 16 ranks the first, the last and what lies between them.

    Args:
        axes: what they are, as in `tensor=2 expert=4`.
    """

    def row(holding: RankSummary) -> list[str]:
        return [
            str(holding.rank),
            holding.host,
            holding.device,
            holding.layer_ranges(),
            holding.expert_ranges(),
            f"{holding.parameters:,}",
            f"{holding.expert_parameters:,}",
            human_bytes(holding.bytes),
        ]

    rows = [row(holding) for holding in ranks]
    if len(ranks) > MAX_RANKS_SHOWN:
        between = ranks[1:-1]
        hosts, held = {holding.host for holding in ranks}, [len(holding.experts) for holding in between]
        middle = [
            f"{between[0].rank} to {between[-1].rank}",
            f"{len(hosts)} hosts in all" if len(hosts) > 1 else ranks[0].host,
            ", ".join(sorted({holding.device.split(":")[0] for holding in between})),
            f"{_span([len(holding.layers) for holding in between])} each",
            f"{_span(held)} each",
            _span([holding.parameters for holding in between]),
            _span([holding.expert_parameters for holding in between]),
            human_bytes(max(holding.bytes for holding in between)),
        ]
        rows = [rows[0], middle, rows[-1]]
    columns = ["rank", "host", "device", "layers", "experts", "parameters", "of experts", "weights"]
    title = f"Layout: {len(ranks)} {'rank' if len(ranks) == 1 else 'ranks'}{f', {axes}' if axes else ''}"
    show_table(title, columns, rows, left=["host", "device", "layers", "experts"])


def show_plan(plan: Plan) -> None:
    """What a rank of each pipeline stage is expected to need, and to send in one optimizer step."""
    show_table("Memory of a rank (~ estimated)", HEADER, describe(plan, human_bytes), left=["layers"])
    sent = describe_traffic(plan, human_bytes)
    idle = sent.pop("idle", None)
    if sent:
        show_line("sent by a rank in one step: " + ", ".join(f"{axis} {size}" for axis, size in sent.items()))
    if idle:
        show_line(f"a pipeline rank idles {idle}")


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def show_evaluation(
    bits_per_byte: Mapping[str, float], loss: float, baselines: Mapping[str, tuple[float, float]]
) -> None:
    """Bits per byte of the held-out text by domain, beside what needs no training.

    Args:
        loss: held-out cross-entropy, nats per token.
        baselines: domain -> (gzip -9, byte unigram), bits per byte of the same bytes.
    """
    rows = []
    for domain, bits in bits_per_byte.items():
        known = domain in baselines
        gzip, unigram = baselines.get(domain, (float("nan"), float("nan")))
        rows.append(
            [
                domain,
                f"{bits:.3f}",
                f"{gzip:.3f}" if known else "-",
                f"{unigram:.3f}" if known else "-",
                "beats gzip" if bits < gzip else "",
            ]
        )
    show_table(
        f"Held-out text: loss {loss:.4f} nats per token; bits per byte by domain",
        ["domain", "model", "gzip -9", "byte unigram", ""],
        rows,
        left=[""],
    )
    if baselines:
        show_line(
            "gzip and the unigram see only the held-out text itself; the model has learnt from the training text."
        )


def show_sample(prompt: str, text: str) -> None:
    """Generated `text` (without the prompt) after its prompt. Control characters appear as escapes."""
    show_line()
    show_line("Sample", style="bold")
    lines = f"[{prompt}]{text}".split("\n")
    for line in lines:
        show_line(f"  {line}")


def show_end(
    directory: Path,
    checkpoint: Path | None,
    resume_command: str,
    open_command: str,
    wall_s: float,
    tokens_per_s: float,
) -> None:
    """Where everything lies, and the commands to go on with."""
    show_fields(
        f"Done in {human_time(wall_s)}, {human_count(tokens_per_s)} tokens/s",
        {
            "run": str(directory),
            "checkpoint": "none" if checkpoint is None else str(checkpoint),
            "resume": resume_command,
            "results": open_command,
        },
    )
