"""What a run prints and writes when it starts and when it ends. Only rank 0 prints and writes."""

import os
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common.text import finite
from moe.model import Transformer
from parallel.collectives import all_gather_json
from parallel.mesh import Mesh
from parallel.startup.failures import LAST_FAILURE
from parallel.startup.launch import World, world_from_env
from parallel.startup.threads import describe_threads
from parallel.weight_specs import kind
from training.agree import AgreedRun
from training.config import Config, OptimConfig
from training.device import DTYPE_NAMES
from training.report.forecast import lines as forecast_lines
from training.report.forecast import summary as forecast_summary
from training.report.goodput import Goodput, goodput_line
from training.report.heatmap import show_load
from training.report.metrics import METRICS_FILE, left_out, read_metrics
from training.report.page.write import write_report_or_say_why
from training.report.plots import plot_curves, plot_load, plot_overview
from training.report.tables import (
    RankSummary,
    baselines_of,
    show_corpus,
    show_end,
    show_evaluation,
    show_layout,
    show_model,
    show_plan,
    show_sample,
)
from training.report.terminal import show_fields, show_line
from training.run import FORECAST_FILE, save_result
from training.schedule import learning_rate
from training.step import Evaluation

ROOT = Path(__file__).resolve().parents[2]
"""The directory of `train.py`."""


@dataclass(frozen=True)
class RunSummary:
    """What is known of a run as soon as its engine is built."""

    run: AgreedRun
    dtype: torch.dtype
    """Data type of the forward and backward pass."""
    ranks: list[RankSummary]
    """What each rank stores, in the order of the ranks."""


def show_start(summary: RunSummary) -> None:
    """Print the corpus, the model, the layout and the run directory."""
    run, ranks = summary.run, summary.ranks
    show_corpus(run.tokens.summary(), run.tokens.directory.name, run.tokens.directory)
    for line in run.tokens.skipped():
        show_line(line)
    quantize = run.config.quantize
    stored = f", {', '.join(quantize.targets)} stored in {quantize.kind}," if quantize.kind else ""
    show_model(
        run.model,
        total_params=run.counts.total,
        active_params=run.counts.active,
        vocab_size=run.tokens.tokenizer.vocab_size,
        tokenizer="tokenizer.json" if run.tokens.tokenizer_files.has_json else "sentencepiece",
        precision=f"{DTYPE_NAMES[summary.dtype]} (torch {torch.__version__}){stored}",
        device=ranks[0].device,
    )
    show_layout(ranks, str(run.plan.layout) if len(ranks) > 1 else "")
    if run.config.engine.kind == "native":  # DeepSpeed decides how it uses the memory.
        show_plan(run.plan)
    threads = describe_threads(run.config.launch.threads, world_from_env().local_world_size)
    show_line(f"CPU threads: {threads}")
    continued = f", continued from {Path(run.checkpoint).name}" if run.checkpoint else ""
    show_line(f"run directory {run.directory}{continued}")
    for note in run.notes:
        show_line(note)
    for line in run.trained:
        show_line(line)


def show_restart(world: World, run: AgreedRun, furthest: int) -> None:
    """Print why the launcher has restarted the workers, and which steps are repeated.

    Args:
        furthest: the last step that the run is known to have done.
    """
    why = os.environ.get(LAST_FAILURE, "a worker failed; the output of the launcher names it")
    done = run.state["step"] if run.state else 0
    repeats = f" and repeats steps {done + 1} to {furthest}" if furthest > done else ""
    show_line(f"restart {world.restart_count}: {why}; the run continues after step {done}{repeats}")


def evaluation_row(evaluation: Evaluation) -> dict[str, Any]:
    """Return the evaluation under its names in `metrics.jsonl`. Figures that do not exist are left out."""
    bits = {f"eval/bits_per_byte/{domain}": value for domain, value in evaluation.bits_per_byte.items()}
    return bits if evaluation.loss is None else {"eval/loss": evaluation.loss} | bits


def finish_run(
    summary: RunSummary,
    evaluation: Evaluation,
    *,
    checkpoint: str | None,
    sample: str | None,
    wall_s: float,
    tokens_per_s: float | None,
    goodput: Goodput,
    forecast: Callable[[], dict[str, Any]],
    disk_errors: Callable[[str], AbstractContextManager[None]],
) -> dict[str, Any]:
    """Print the results, write the plots, `result.json` and the report, and return the content of `result.json`.

    Args:
        evaluation: of the final weights.
        checkpoint: the newest checkpoint.
        sample: generated text.
        wall_s: seconds since this process started to train.
        tokens_per_s: the mean speed of the optimizer steps; None if this process did none.
        goodput: the account of the run's time, which is written and shown.
        forecast: writes `forecast.json` and returns its content; empty if the run has none.
        disk_errors: what is written -> a context manager for writing it (`Recorder.disk_errors`).
    """
    run = summary.run
    baselines = baselines_of(run.tokens.summary())
    show_evaluation(evaluation.bits_per_byte, evaluation.loss, baselines)
    if evaluation.load_GLE is not None:
        load_LE = evaluation.load_GLE.sum(dim=0).tolist()
        load_by_domain = dict(zip(run.tokens.domains, evaluation.load_GLE.tolist(), strict=True))
        show_load(load_LE, load_by_domain)
        with disk_errors("the plot of the load"):
            plot_load(load_LE, load_by_domain, run.directory / "expert_load")
    metrics, damaged = run.directory / METRICS_FILE, list[int]()
    rows = read_metrics(metrics, damaged)
    if damaged:
        show_line(left_out(metrics, damaged))
    last_row = rows[-1] if rows else {}
    with disk_errors("the plots of the metrics"):
        plot_curves(rows, run.directory / "curves")
        plot_overview(rows, run.directory / "overview")
    if sample is not None:
        top_k = run.model.top_k
        note = None if top_k is None else run.config.router.generation_note(top_k)
        show_sample(run.config.run.prompt, sample, note)
    goodput.write()
    account = goodput.summary()
    compared: dict[str, Any] = {}
    with disk_errors(FORECAST_FILE):
        compared = forecast()
    result: dict[str, Any] = {
        "status": "finished",
        "name": run.name,
        "step": run.config.train.steps,
        **{"eval/loss": None, **evaluation_row(evaluation)},
        "train/loss": last_row.get("train/loss"),
        "router/max_vio": last_row.get("router/max_vio"),
        "speed/tokens_per_s": tokens_per_s,
        "wall_s": wall_s,
        "goodput": account,
        "restarts": goodput.restarts,
        **forecast_summary(compared),
        "total_params": run.counts.total,
        "active_params": run.counts.active,
        "num_experts": run.model.num_experts,
        "top_k": run.model.top_k,
        "baselines": {d: {"gzip_bits_per_byte": g, "unigram_bits_per_byte": u} for d, (g, u) in baselines.items()},
        "ranks": [rank.as_dict() for rank in summary.ranks],
        "checkpoint": checkpoint,
        "corpus": run.tokens.directory.name,
        "sample": sample,
        "torch": torch.__version__,
    }
    result = finite(result)  # So that trackers and the caller get what the file has.
    with disk_errors("result.json"):
        save_result(run.directory, result)
    page = write_report_or_say_why(run.directory, show_line)
    show_end(
        run.directory,
        None if checkpoint is None else Path(checkpoint),
        resume_command(run.config, run.name, len(summary.ranks), 2 * run.config.train.steps),
        rate_of_resumption(run.config.optim, run.config.train.steps),
        open_command(run.config, run.directory),
        page,
        wall_s,
        tokens_per_s or 0.0,
        {"goodput": goodput_line(account, goodput.restarts)} | forecast_lines(compared),
    )
    return result


def rate_of_resumption(optim: OptimConfig, done: int) -> str:
    """Return what the learning rate does in a run that continues after step `done` with the same schedule.

    Args:
        optim: with the schedule that `resolve_schedule` returned.
    """
    end = (optim.schedule_start or 0) + (optim.schedule_steps or done)
    if done < end:
        return f"with the learning rate of the schedule, which ends at step {end}"
    return f"with the constant learning rate {learning_rate(done, done, optim):.2e}"


def show_interrupted(config: Config, directory: Path, checkpoint: Path | None, world_size: int) -> None:
    """Print the newest checkpoint of a run that was interrupted, and the command that continues it."""
    name = str(directory.relative_to(config.run.root))
    show_fields(
        "Interrupted",
        {
            "run": str(directory),
            "checkpoint": "none, so the run starts again" if checkpoint is None else str(checkpoint),
            "resume": resume_command(config, name, world_size, config.train.steps),
        },
        commands=("resume",),
    )


def resume_command(config: Config, name: str, world_size: int, steps: int) -> str:
    """Return the command line that continues this run up to step `steps`, with the launcher that started it."""
    replaced = ("run.name", "run.resume", "train.steps")
    overrides = [
        argument
        for argument in sys.argv[1:]
        if ("=" in argument or argument.startswith("~")) and argument.partition("=")[0].lstrip("+") not in replaced
    ]
    # torchrun's defaults listen on all interfaces (docs/clusters.md).
    private = ("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file")
    torchrun = [
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        _tool("torchrun"),
        *private,
        "--nproc-per-node",
        str(world_size),
    ]
    launcher = [_tool(Path(sys.executable).name)] if world_size == config.launch.nproc else torchrun
    command = [*launcher, _from_here(ROOT / "train.py"), *overrides]
    return shlex.join([*command, f"run.name={name}", f"train.steps={steps}"])


def open_command(config: Config, directory: Path) -> str:
    """Return the command line that shows the run's curves."""
    if config.tracking.wandb != "disabled":
        return shlex.join([_tool("wandb"), "leet", str(directory / "wandb")])
    if config.tracking.tensorboard:
        return shlex.join([_tool("tensorboard"), "--logdir", str(directory)])
    return shlex.join(["ls", str(directory)])


def show_finished(directory: Path, result: dict[str, Any]) -> None:
    """Print that the run has no steps left to do."""
    loss = result.get("eval/loss")
    shown = "-" if loss is None else f"{loss:.4f}"
    show_line(
        f"run {directory} is finished at step {result['step']} (held-out loss {shown}); "
        "raise train.steps to continue it, or choose another run.name"
    )


def _tool(name: str) -> str:
    """The shortest command that a shell finds for a program installed beside this Python."""
    path = Path(sys.executable).parent / name
    on_path = shutil.which(name) == str(path)
    return name if on_path and not path.is_relative_to(Path.cwd()) else _from_here(path)


def _from_here(path: Path) -> str:
    """An absolute path, relative to the current directory if it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def gather_rank_summaries(parts: Sequence[Transformer], mesh: Mesh) -> list[RankSummary]:
    """Return one summary per rank, in the order of the ranks, on every rank. Collective.

    Args:
        parts: the modules of this rank: the model, or one module for each of its pipeline stages.
    """
    shards = {name: part.local_shard(name, weight) for part in parts for name, weight in part.named_parameters()}
    numbers = {name: part.numbers_in(name, shards[name]) for part in parts for name, _ in part.named_parameters()}
    of_experts = [name for name in shards if kind(name) == "experts"]
    regions = [shards[name].region for name in of_experts]
    experts = {region.offset[0] + row for region in regions for row in range(region.shape[0])}
    layers = [number for part in parts for number, layer in enumerate(part.layers) if layer is not None]
    summary = RankSummary(
        rank=mesh.rank,
        host=socket.gethostname(),
        device=str(mesh.device),
        experts=sorted(experts),
        layers=layers,
        parameters=sum(numbers.values()),
        bytes=sum(shard.local.numel() * shard.local.element_size() for shard in shards.values()),
        expert_parameters=sum(numbers[name] for name in of_experts),
    )
    return [RankSummary(**gathered) for gathered in all_gather_json(asdict(summary), mesh.world)]
