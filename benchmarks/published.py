"""Training runs that others published with their settings, and this project's own, as data to compare predictions with.

    python benchmarks/published.py                                    # all runs, predicted by formulas
    python benchmarks/published.py --trace "model A, one H100"        # predicted from the real step, without values

`RUNS` has the runs. A published figure is FLOP/s, tokens/s or the time of a step. `PublishedRun.step_s` makes seconds
of a step of it. `compare` puts predictions beside them. Megatron-Core counted all query-key pairs of a row in 2024
(https://github.com/NVIDIA/Megatron-LM/issues/831), and the causal half later. None of the papers says what it counts,
so that the time is known up to a range, which is wide for long rows.

The runs used other programs. What they do and this project does not is in `differences`. The most frequent one:
Megatron's distributed optimizer shards the optimizer state over the data-parallel ranks (ZeRO-1), where this project
either replicates it or shards the weights, too. It changes the memory and hardly the time.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.strict import from_dict
from moe.accounting.flops import forward_flops_per_token, meta_model, training_flops_per_token
from moe.config import ModelConfig, RouterConfig
from moe.model import Transformer
from parallel.config import ParallelConfig
from parallel.planning.auto import AUTO_AXES
from parallel.planning.hardware import read_preset
from scripts.cli.command_line import compose_config
from training.config import Config
from training.planning.answer import trace_option
from training.planning.search import Option, Question, consider

H100_PEAK = 989.5
"""TFLOP/s, of which arXiv 2504.14960 gives its MFU."""
FOLDING = "https://arxiv.org/abs/2504.14960"
MEGATRON = "https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/transformer/moe/README.md"
BRIDGE = "https://docs.nvidia.com/nemo/megatron-bridge/latest/performance-summary-archive.html"
DEEPSEEK = "https://arxiv.org/abs/2412.19437"
LLAMA3 = "https://arxiv.org/abs/2407.21783"
SWITCH = "https://arxiv.org/abs/2101.03961"
OWN = "benchmarks/RESULTS.md, one H100"

DROPS = "capacity factor 1, so that every expert has the same load; ZeRO-1; stages per rank not published"
BALANCED = "balanced routing is forced; ZeRO-1"
FP8 = "matmuls in FP8, predicted in bf16"
G8T8 = ("mixtral_8x22b", "num_experts=64", "top_k=8", "expert_hidden_dim=2048")
MODEL_A = (
    "mixtral_8x7b", "dim=2048", "num_layers=16", "num_heads=16", "num_kv_heads=4", "hidden_dim=3584",
)  # fmt: skip


@dataclass(frozen=True)
class PublishedRun:
    """One run: its settings in the words of this project, and what was published. Speeds are those of one GPU."""

    name: str
    model: tuple[str, ...]
    """A preset of `conf/model`, and the keys of `model` that differ from it, as `key=value`."""
    gpus: int
    seq_len: int
    global_batch: int
    """Rows of an optimizer step."""
    parallel: dict[str, int | str]
    """Keys of `parallel`. The rest of the GPUs replicate."""
    source: str
    where: str
    """The place in the source."""
    differences: str
    tflops: float | None = None
    """TFLOP/s without recomputation."""
    tokens_per_s: float | None = None
    step_ms: float | None = None
    all_pairs: bool | None = None
    """Whether `tflops` counts all S·S query-key pairs of a row, or the causal half. None: the source does not say."""
    gpu: str = "h100"
    """A preset of `conf/gpu`."""
    micro_batch: int = 1
    """Rows of a micro-batch on a data-parallel rank."""
    precision: str = "bf16"

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // math.prod(int(self.parallel.get(axis, 1)) for axis in ("pipeline", "tensor", "context"))

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return self.global_batch // (self.data * self.micro_batch)

    @property
    def overrides(self) -> list[str]:
        """The run as overrides of this project's command line, without the numbers of GPUs and their kind."""
        preset, *keys = self.model
        axes: dict[str, int | str] = dict.fromkeys(AUTO_AXES, 1)
        return [
            f"model={preset}",
            *(f"model.{key}" for key in keys),
            *(f"parallel.{axis}={size}" for axis, size in (axes | self.parallel).items()),
            f"train.seq_len={self.seq_len}",
            f"train.global_batch={self.global_batch}",
            f"train.accumulation={self.accumulation}",
            f"train.precision={self.precision}",
        ]

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.global_batch * self.seq_len

    def configs(self) -> tuple[ModelConfig, RouterConfig]:
        """Return the model and its router."""
        preset, *keys = self.model
        return _configs(preset, *keys)

    def flops_per_token(self, all_pairs: bool) -> float:
        """Return the FLOPs of a token, with all S·S pairs of a row or with the causal half."""
        config, router = self.configs()
        flops = training_flops_per_token(_model(config, router), self.seq_len)
        if not all_pairs:
            return flops
        # A row of S tokens has S·(S + 1)/2 causal pairs. Each of the other S·(S - 1)/2 costs the same.
        others = (self.seq_len - 1) / 2 * config.num_layers
        return flops + 12 * config.num_heads * config.head_dim * others

    def step_s(self) -> tuple[float, float]:
        """Return the seconds of an optimizer step that the published figure means: the least and the most.

        The two are different if the source does not say which pairs it counts.
        """
        if self.step_ms is not None:
            return self.step_ms / 1e3, self.step_ms / 1e3
        if self.tokens_per_s is not None:
            seconds = self.tokens / self.gpus / self.tokens_per_s
            return seconds, seconds
        assert self.tflops is not None
        counts = (False, True) if self.all_pairs is None else (self.all_pairs, self.all_pairs)
        scale = self.tokens / self.gpus / (self.tflops * 1e12)
        least, most = (scale * self.flops_per_token(all_pairs) for all_pairs in counts)
        return least, most


@cache
def _configs(preset: str, *keys: str) -> tuple[ModelConfig, RouterConfig]:
    raw = compose_config("describe", [f"model={preset}", *(f"model.{key}" for key in keys)])
    return from_dict(ModelConfig, raw["model"], "model"), from_dict(RouterConfig, raw["router"], "router")


@cache
def _model(config: ModelConfig, router: RouterConfig) -> Transformer:
    return meta_model(config, router)


def _folding(
    name: str,
    model: tuple[str, ...],
    gpus: int,
    mfu: float,
    where: str,
    parallel: dict[str, int | str],
    seq_len: int = 4096,
    global_batch: int = 256,
    differences: str = DROPS,
) -> PublishedRun:
    """Return a run of arXiv 2504.14960, which gives the MFU."""
    tflops = mfu * H100_PEAK
    return PublishedRun(
        name, model, gpus, seq_len, global_batch, parallel, FOLDING, where, differences, tflops=tflops
    )  # fmt: skip


INTERLEAVED = {"schedule": "interleaved"}
FOLDED_8X22B = {"tensor": 2, "expert": 8, "pipeline": 8, **INTERLEAVED}
PLAIN_8X22B = {"tensor": 2, "expert": 4, "expert_tensor": 2, "pipeline": 8, **INTERLEAVED}

RUNS: tuple[PublishedRun, ...] = (
    PublishedRun(
        "Mixtral 8x7B, Megatron 0.8", ("mixtral_8x7b",), 64, 4096, 256,
        {"expert": 8, "pipeline": 4, **INTERLEAVED}, MEGATRON, "438 TFLOPS, reference mapping of v0.8",
        "8 stages per rank; dropless; ZeRO-1", tflops=438.0, all_pairs=True,
    ),
    _folding("Mixtral 8x22B, folded", ("mixtral_8x22b",), 128, 0.493, "table 3", parallel=FOLDED_8X22B),
    _folding("Mixtral 8x22B, not folded", ("mixtral_8x22b",), 128, 0.463, "table 3", parallel=PLAIN_8X22B),
    _folding(
        "Mixtral 8x22B, TP + EP + DP", ("mixtral_8x22b",), 128, 0.366, "table 3",
        parallel={"tensor": 4, "expert": 8, "expert_tensor": 4},
    ),
    _folding(
        "Mixtral 8x22B, FSDP + EP", ("mixtral_8x22b",), 128, 0.234, "table 3",
        parallel={"tensor": 2, "shard": 64, "expert": 8}, differences="capacity factor 1; ZeRO-3, as here",
    ),
    *(
        _folding(
            f"Mixtral 8x22B, folded, {gpus} GPUs", ("mixtral_8x22b",), gpus, mfu, "table 4", parallel=FOLDED_8X22B,
            global_batch=1024,
        )
        for gpus, mfu in ((128, 0.522), (256, 0.507), (512, 0.489), (1024, 0.449))
    ),
    _folding(
        "Mixtral 8x22B, 16 k tokens", ("mixtral_8x22b",), 128, 0.476, "table 5",
        parallel=FOLDED_8X22B | {"context": 4}, seq_len=16384, global_batch=1024,
    ),
    _folding(
        "Mixtral 8x22B, 128 k tokens", ("mixtral_8x22b",), 1024, 0.429, "table 5",
        parallel=FOLDED_8X22B | {"context": 8, "tensor": 8}, seq_len=131072, global_batch=128,
    ),
    _folding(
        "Mixtral 8x22B of 64 experts, folded", G8T8, 128, 0.288, "table 3",
        parallel={"tensor": 4, "expert": 8, "pipeline": 8, **INTERLEAVED},
    ),
    _folding(
        "Mixtral 8x22B of 64 experts, not folded", G8T8, 128, 0.171, "table 3",
        parallel={"tensor": 2, "expert": 8, "expert_tensor": 2, "pipeline": 8, **INTERLEAVED},
    ),
    _folding(
        "Qwen2 57B-A14B, folded", ("qwen2_57b_a14b",), 64, 0.390, "table 3",
        parallel={"tensor": 2, "expert": 4, "pipeline": 4, **INTERLEAVED},
    ),
    *(
        PublishedRun(
            f"Llama 3 405B, {gpus} GPUs, {seq_len // 1024} k tokens", ("llama3_405b",), gpus, seq_len,
            16 * 2**20 // seq_len, parallel | INTERLEAVED, LLAMA3, "table 4",
            "ZeRO-2; rows of a micro-batch and stages per rank not published; packed documents", tflops=tflops,
        )
        for gpus, seq_len, tflops, parallel in (
            (8192, 8192, 430.0, {"tensor": 8, "pipeline": 16, "shard": 64}),
            (16384, 8192, 400.0, {"tensor": 8, "pipeline": 16, "shard": 128}),
            (16384, 131072, 380.0, {"tensor": 8, "context": 16, "pipeline": 16, "shard": 8}),
        )
    ),
    PublishedRun(
        "gpt-oss 120B, H100", ("gpt_oss_120b",), 64, 4096, 1280, {"expert": 8, "pipeline": 4}, BRIDGE,
        "26.02", BALANCED, tokens_per_s=5993.0,
    ),
    PublishedRun(
        "gpt-oss 120B, B200", ("gpt_oss_120b",), 64, 4096, 1280, {"expert": 64}, BRIDGE, "26.02", BALANCED,
        tokens_per_s=8047.0, gpu="b200", micro_batch=4,
    ),
    PublishedRun(
        "DeepSeek-V3, its authors", ("deepseek_v3",), 2048, 4096, 15360,
        {"expert": 64, "pipeline": 16}, DEEPSEEK,
        "180 K GPU hours for 1e12 tokens, section 1; layout in 3.2, batch in 4.2",
        f"{FP8}; with multi-token prediction; DualPipe hides the exchange of tokens; ZeRO-1",
        tokens_per_s=1e12 / (180e3 * 3600), gpu="h800",
    ),
    PublishedRun(
        "DeepSeek-V3, H100", ("deepseek_v3",), 1024, 4096, 8192,
        {"tensor": 2, "expert": 64, "pipeline": 8, **INTERLEAVED}, BRIDGE, "25.09, dropless",
        f"{FP8}; {BALANCED}; 4 stages per rank", tokens_per_s=1297.0,
    ),
    *(
        PublishedRun(
            f"Qwen3-30B-A3B, H100, {how}", ("qwen3_moe_30b",), 16, 4096, rows,
            {"expert": 8, "pipeline": 2, **INTERLEAVED}, BRIDGE, release,
            f"{FP8}; {BALANCED}; {stages} stages per rank", tokens_per_s=speed, micro_batch=micro_batch,
        )
        for how, rows, micro_batch, release, stages, speed in (
            ("dropless", 1024, 1, "26.02", 12, 5113.0), ("with drops", 512, 2, "25.09", 24, 10494.0),
        )
    ),
    PublishedRun(
        "model A, one H100", MODEL_A, 1, 4096, 4, {}, OWN, "one optimizer step, whole rows, run 1",
        "measured with this project", step_ms=275.7, micro_batch=4,
    ),
)  # fmt: skip
"""Runs with complete settings. All are in bf16 but those of DeepSeek-V3 and Qwen3, for which only FP8 was found."""


class PublishedCost(NamedTuple):
    """The FLOPs of a forward pass of an encoder-decoder that a paper gives."""

    model: str
    """A preset of `conf/model`."""
    flops: float
    """Of one sequence."""
    encoded: int
    """Tokens of the sequence in the encoder, which has half of the layers."""
    decoded: int
    """Tokens in the decoder, which has the other half and the head."""
    source: str
    where: str

    def computed(self) -> float:
        """Return the FLOPs by this project's count, without cross-attention, which its models do not have."""
        config, router = _configs(self.model)
        model = _model(config, router)
        head = 2 * config.dim * (config.vocab_size or 0)
        layers = forward_flops_per_token(model, self.encoded) - head
        return layers / 2 * (self.encoded + self.decoded) + head * self.decoded


COSTS = (PublishedCost("switch_c", 890e9, 512, 114, SWITCH, "table 9; T5's lengths, arXiv 1910.10683, section 3.1.4"),)


class Prediction(NamedTuple):
    """What a plan says about a run."""

    step_s: float
    memory: float
    """Bytes of the tensors of the fullest device."""


class Comparison(NamedTuple):
    """A run with its prediction."""

    run: PublishedRun
    published_s: tuple[float, float]
    """The least and the most."""
    prediction: Prediction | None
    """None: the plan refuses the layout."""

    @property
    def ratio(self) -> tuple[float, float] | None:
        """The predicted time relative to the published ones: the least and the most."""
        least, most = self.published_s
        return (self.prediction.step_s / most, self.prediction.step_s / least) if self.prediction else None


def compare(
    predict: Callable[[PublishedRun], Prediction | None], runs: Sequence[PublishedRun] = RUNS
) -> list[Comparison]:
    """Return each run with what `predict` says about it."""
    return [Comparison(run, run.step_s(), predict(run)) for run in runs]


def show(comparisons: Sequence[Comparison]) -> None:
    """Print a table of the comparisons."""
    head = ("run", "GPUs", "layout", "tokens a step", "published, s", "predicted, s", "ratio", "predicted, GB")
    lines = [head, *(_cells(comparison) for comparison in comparisons)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print("\nWhere from, and what differs:")
    for run in (comparison.run for comparison in comparisons):
        print(f"  {run.name}: {run.source}, {run.where}. {run.differences}")


def _cells(comparison: Comparison) -> tuple[str, ...]:
    run, prediction, ratio = comparison.run, comparison.prediction, comparison.ratio
    layout = "+".join(f"{axis}={size}" for axis, size in run.parallel.items() if axis != "schedule")
    predicted = ("-", "-", "-") if prediction is None or ratio is None else (
        f"{prediction.step_s:.2f}", _range(ratio), f"{prediction.memory / 1e9:.0f}"
    )  # fmt: skip
    return (
        run.name, f"{run.gpus:,} {run.gpu}", layout or "one", f"{run.tokens:,}", _range(comparison.published_s),
        *predicted,
    )  # fmt: skip


def _range(values: tuple[float, float]) -> str:
    least, most = (f"{value:.2f}" for value in values)
    return least if least == most else f"{least} - {most}"


def show_costs() -> None:
    """Print the published FLOPs of a forward pass beside this project's count."""
    for cost in COSTS:
        print(
            f"{cost.model}: {cost.flops:.3g} FLOPs of a sequence published ({cost.source}, {cost.where}), "
            f"{cost.computed():.3g} computed, ratio {cost.computed() / cost.flops:.2f}"
        )


def question_of(run: PublishedRun) -> Question:
    """Return a run as what the planner is asked."""
    model, router = run.configs()
    return Question(
        model=model,
        router=router,
        parallel=ParallelConfig(**run.parallel),  # type: ignore[arg-type]
        gpus=run.gpus,
        hardware=read_preset(run.gpu),
        seq_len=run.seq_len,
        global_batch=run.global_batch,
        accumulation=run.accumulation,
        recompute=("none",),
        itemsize=2,
        moments=2,
        margin=0.0,
        loads=None,
    )


def option_of(run: PublishedRun) -> Option:
    """Return the layout of a run with the planner's estimates by formula."""
    question = question_of(run)
    layout = question.parallel.layout(run.gpus, question.model, run.seq_len)
    return consider(question, question.parallel, layout, run.accumulation)


def by_formula(run: PublishedRun) -> Prediction:
    """Predict a run by the formulas with which the planner compares layouts."""
    option = option_of(run)
    return Prediction(option.times.total, option.peak)


def by_trace(run: PublishedRun) -> Prediction:
    """Predict a run from the real step of its fullest rank and of rank 0, without values. This takes minutes."""
    config = from_dict(Config, compose_config("config", run.overrides))
    verified = trace_option(question_of(run), config, option_of(run), None)
    return Prediction(verified.times.total, verified.peak)


def main() -> None:
    parser = argparse.ArgumentParser(description="Published training runs beside the predictions of the planner.")
    parser.add_argument("runs", nargs="*", help="names of runs (default: all)")
    parser.add_argument("--trace", action="store_true", help="trace the step of each run, which takes minutes")
    options = parser.parse_args()
    names = [run.name for run in RUNS]
    for name in options.runs:
        if name not in names:
            parser.error(f"{name}: expected some of {'; '.join(names)}")
    runs = [run for run in RUNS if not options.runs or run.name in options.runs]
    show(compare(by_trace if options.trace else by_formula, runs))
    show_costs()


if __name__ == "__main__":
    main()
