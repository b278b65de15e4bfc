"""What a run shows and leaves behind when it starts, ends, or turns out to have ended before. Called on rank 0."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from data.tokens.store import Store
from moe.accounting.flops import ParameterCounts
from moe.config import ModelConfig
from parallel.planning.plan import Plan
from training.config import Config
from training.evaluate import Evaluation
from training.report.heatmap import show_load
from training.report.metrics import read_metrics
from training.report.plots import plot_curves, plot_load, plot_overview
from training.report.tables import (
    RankSummary,
    show_corpus,
    show_end,
    show_evaluation,
    show_layout,
    show_model,
    show_plan,
    show_sample,
)
from training.report.terminal import show_line
from training.run import RESULT_FILE, is_finished, save_result

DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}


def show_start(
    store: Store,
    model: ModelConfig,
    counts: ParameterCounts,
    holdings: list[RankSummary],
    axes: str,
    plan: Plan | None,
    dtype: torch.dtype,
    directory: Path,
    resumed: str | None,
) -> None:
    """What is being built, once.

    Args:
        counts: of the whole model.
        axes: of the layout, as one writes them.
        plan: None: another engine lays out memory.
    """
    show_corpus(store.summary(), store.directory.name, store.directory)
    show_model(
        model,
        total_params=counts.total,
        active_params=counts.active,
        vocab_size=store.tokenizer.vocab_size,
        tokenizer="sentencepiece",
        precision=f"{DTYPE_NAMES[dtype]} (torch {torch.__version__})",
        device=holdings[0].device,
    )
    show_layout(holdings, axes)
    if plan is not None:
        show_plan(plan)
    show_line(f"run directory {directory}" + (f", going on from {Path(resumed).name}" if resumed else ""))


def baselines(store: Store) -> dict[str, tuple[float, float]]:
    """Domain -> bits per byte of its held-out text by gzip -9 and by a byte unigram; domains without such text lack."""
    return {
        row["domain"]: (row["gzip_bits_per_byte"], row["unigram_bits_per_byte"])
        for row in store.summary()
        if row["heldout_bytes"]
    }


def evaluation_row(evaluation: Evaluation) -> dict[str, Any]:
    """Names as in `metrics.jsonl`."""
    bits = {f"eval/bits_per_byte/{domain}": value for domain, value in evaluation.bits_per_byte.items()}
    return {"eval/loss": evaluation.loss} | bits


def finish_run(
    config: Config,
    directory: Path,
    name: str,
    *,
    store: Store,
    counts: ParameterCounts,
    holdings: list[RankSummary],
    evaluation: Evaluation,
    checkpoint: str | None,
    sample: str | None,
    wall_s: float,
    tokens_per_s: float | None,
) -> dict[str, Any]:
    """Show the results, write the plots and `result.json`; returns the latter's content.

    Args:
        tokens_per_s: None where this process had no step left to do.
    """
    known = baselines(store)
    show_evaluation({d: b for d, b in evaluation.bits_per_byte.items() if d in known}, evaluation.loss, known)
    load = evaluation.load_GLE
    if load is not None:
        whole, by_domain = load.sum(dim=0).tolist(), dict(zip(store.domains, load.tolist(), strict=True))
        show_load(whole, by_domain)
        plot_load(whole, by_domain, directory / "expert_load")
    rows = read_metrics(directory / "metrics.jsonl")
    last = rows[-1] if rows else {}
    plot_curves(rows, directory / "curves")
    plot_overview(rows, directory / "overview")
    if sample is not None:
        show_sample(config.run.prompt, sample)
    result = {
        "status": "finished",
        "name": name,
        "step": config.train.steps,
        **evaluation_row(evaluation),
        "train/loss": last.get("train/loss"),
        "router/max_vio": last.get("router/max_vio"),
        "speed/tokens_per_s": tokens_per_s,
        "wall_s": wall_s,
        "total_params": counts.total,
        "active_params": counts.active,
        "num_experts": config.model.num_experts,
        "top_k": config.model.top_k,
        "baselines": {d: {"gzip_bits_per_byte": g, "unigram_bits_per_byte": u} for d, (g, u) in known.items()},
        "ranks": [holding.as_dict() for holding in holdings],
        "checkpoint": checkpoint,
        "corpus": store.directory.name,
        "sample": sample,
        "torch": torch.__version__,
    }
    save_result(directory, result)
    show_end(
        directory,
        None if checkpoint is None else Path(checkpoint),
        resume_command(config, name, len(holdings)),
        open_command(config, directory),
        wall_s,
        tokens_per_s or 0.0,
    )
    return result


def resume_command(config: Config, name: str, world_size: int) -> str:
    """The command line that goes on with this run to twice its length, launched as this one was."""
    dropped = ("run.name=", "run.resume=", "train.steps=")
    overrides = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith(dropped)]
    launcher = [_tool("python")]
    if world_size != config.launch.nproc:
        launcher = [_tool("torchrun"), "--nproc-per-node", str(world_size)]
    return shlex.join([*launcher, "train.py", *overrides, f"run.name={name}", f"train.steps={2 * config.train.steps}"])


def open_command(config: Config, directory: Path) -> str:
    """The command line that shows the run's curves."""
    if config.tracking.wandb == "disabled":
        return shlex.join(["ls", str(directory)])
    return shlex.join([_tool("wandb"), "leet", str(directory / "wandb")])


def _tool(name: str) -> str:
    """A program beside the Python that runs, as it can be called from here."""
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def finished_result(directory: Path, steps: int) -> dict[str, Any] | None:
    """What `result.json` holds, if the run in `directory` has ended after at least `steps` steps."""
    if not is_finished(directory, steps):
        return None
    result: dict[str, Any] = json.loads((directory / RESULT_FILE).read_text())
    return result


def show_finished(directory: Path, result: dict[str, Any]) -> None:
    """The run was asked to go on, and has nothing left to do."""
    show_line(
        f"run {directory} is finished at step {result['step']} (held-out loss {result['eval/loss']:.4f}); "
        "raise train.steps to go on, or choose another run.name"
    )
