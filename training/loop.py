"""The training loop: one run in one worker process, from its configuration to its last checkpoint.

`train` is meant to be read from top to bottom. Its small parts are below it. The large ones are modules: `agree` (what
the ranks agree on first), `build` (model and engine), `steps` (the order of the optimizer steps), `step` (the
optimizer step and the evaluation), `report` (what is printed and written).
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.errors import DataError
from common.plugins import loaded_plugins
from common.strict import to_dict
from data.corpora.messages import Message
from data.loader import Loader
from data.tokens.conversation import encode_conversation, end_token_ids
from data.tokens.tokenizer import TextTokenizer
from moe.accounting.flops import MatmulCosts, count_parameters, meta_model
from moe.figures import TOKEN_FIGURES
from moe.generation.generate import generate
from moe.generation.sampling import Sampling
from moe.init import init_adapters
from parallel.apply import build_whole_model
from parallel.mesh import broadcast_from_first, build_mesh, close_process_group, init_process_group, set_timeout
from parallel.startup.rendezvous import open_store, wait_for_all
from parallel.waiting import WaitingClock
from training.agree import AgreedRun, agree_on_run
from training.build import build_engine, build_parts, unreached_routers
from training.checkpoint import checkpoint
from training.checkpoint.manifest import CHECKPOINTS, HELDOUT_LOSS
from training.checkpoint.peers import Peers
from training.checkpoint.saver import Saver
from training.compilation import CompilationReport
from training.config import Config
from training.device import DTYPE_NAMES, Process, free_bytes, peak_flops, set_up_process
from training.due import Due
from training.engine import Engine, NativeEngine
from training.evaluation.evaluator import Evaluator
from training.forecast import Forecast
from training.formats.reader import BASE, open_model
from training.hang_reports import find_ranks
from training.hangs import hangs_explained
from training.health import Health
from training.interruption import Interruption
from training.memory import memory_explained
from training.owner import RunOwner
from training.probe import Prober
from training.recheck import recheck
from training.replicas import ReplicaCheck
from training.report.goodput import Goodput
from training.report.metrics import layer_metrics, norm_metrics, router_metrics, straggler_metrics, telemetry_metrics
from training.report.profile import StepProfiler
from training.report.recorder import Recorder
from training.report.run_report import (
    RunSummary,
    evaluation_row,
    finish_run,
    gather_rank_summaries,
    show_finished,
    show_restart,
    show_start,
)
from training.rewind import Rewind
from training.router_health import RouterHealth
from training.run import INTERRUPTED, save_config
from training.step import Evaluation, StepInputs, StepResult
from training.steps import Steps

TEMPERATURE = 0.8


def train(config: Config, owner: RunOwner | None = None) -> dict[str, Any]:
    """Train one run. Every worker process calls this function.

    Args:
        owner: claims the run's directory on rank 0. None: the launcher owns it and has chosen `run.name`.

    Returns:
        On rank 0 the content of `result.json`. On other ranks the same if the run was finished before, else an empty
        dict. After a signal, on every rank: the status `INTERRUPTED`, the signal's number, and the step.
    """
    run_start = time.monotonic()
    steps = config.train.steps

    # 1. This process: its rank, its device and its data type.
    process = set_up_process(config)
    world, device = process.world, process.device

    # 2. The run: the ranks agree on its name, tokens, model, layout and starting point.
    rank_store = open_store(world, config.parallel.start_timeout_s)
    peers, savers = (
        Peers(rank_store, world.rank, world.world_size, config.checkpoint.io_timeout_s, name)
        for name in ("reading", "saving")
    )
    run = agree_on_run(config, process, rank_store, peers, owner)
    if run.finished_result is not None:
        if process.is_main:
            show_finished(run.directory, run.finished_result)
        wait_for_all(rank_store, world, "seen")
        return run.finished_result

    restarted = world.restart_count > 0
    account_directory = run.directory if process.is_main else None
    goodput = Goodput(account_directory, run_start, new=run.state is None and not restarted, restarted=restarted)

    # 3. The data: this rank's share of the rows, in an order that depends only on the seed.
    layout = run.plan.layout
    loader = Loader(
        run.tokens.train,
        seq_len=config.train.seq_len,
        global_batch=config.train.global_batch,
        accumulation=config.train.accumulation,
        rank=layout.data_rank(world.rank),
        world_size=layout.data,
        seed=config.run.seed,
        cross_documents=config.data.cross_documents,
    )
    if run.state:
        loader.load_state_dict(run.state["loader"])

    # 4. The process groups: one of all ranks, and one for each parallel axis.
    init_process_group(rank_store, world.rank, world.world_size, device, config.parallel.start_timeout_s)
    mesh = build_mesh(device, layout)

    # 5. The model and its engine: built on the meta device, sharded, materialised, filled; optimizer; checkpoint.
    seed = config.run.seed if run.initial_directory is None else None
    with memory_explained(run, process):
        parts = build_parts(run.config, run.model, mesh, process.dtype, seed)
    if run.initial_directory is not None:
        with goodput.spent_on("load"):
            source = open_model(run.initial_directory, check=False)
            for part in parts:
                source.fill(part)
                init_adapters(part, config.run.seed)
    summary = RunSummary(run, process.dtype, gather_rank_summaries(parts, mesh))
    router_health = None
    if run.model.is_moe:
        unreached = unreached_routers(parts, run.config.router, mesh)
        trained = run.config.optim.train == "all" and run.model.adapter is None
        router_health = RouterHealth(run.config.health, run.model, run.config.router, unreached, trained)
    with memory_explained(run, process):
        engine = build_engine(run.config, parts, mesh)
    if run.checkpoint and run.state:
        with goodput.spent_on("load"):
            tensors = engine.tensors()
            checkpoint.load(Path(run.checkpoint), tensors, peers)
            engine.finish_loading(tensors, run.state["updates"])
            del tensors
    if process.is_main:
        named_run = dataclasses.replace(config.run, name=run.name)
        save_config(run.directory, to_dict(dataclasses.replace(run.config, run=named_run, model=run.model)))
        run.tokens.tokenizer_files.copy_to(run.directory)  # The run can be used without its token store.
        show_start(summary)
        if restarted:
            show_restart(world, run, goodput.furthest)
    # Until here a collective had more time, because the ranks read files and compile.
    set_timeout(mesh, config.parallel.timeout_s)
    rank_store.set_timeout(timedelta(seconds=config.parallel.timeout_s))
    ranks = find_ranks(world, mesh.world)
    peers.siblings = savers.siblings = ranks.siblings

    # 6. The loop over optimizer steps, which `Steps` runs.
    first_step, due = run.state["step"] if run.state else 0, Due(config)
    evaluator, throughput, peak = held_out_evaluator(run, engine), Throughput(), peak_of_all_ranks(run, process)
    compilation = CompilationReport(engine.parts)
    evaluation, health = None, Health(config.health, mesh, ranks.heads, config.parallel.timeout_s, router_health)
    health.load_state_dict((run.state or {}).get("health", {}))
    profiling = config.train.profile and process.is_main and first_step < steps
    with (
        run.lock or nullcontext(),
        memory_explained(run, process),
        Recorder(run.config, run.directory, run.name, active=process.is_main, state=run.state) as recorder,
        step_profiler(summary, engine, first_step, peak) if profiling else nullcontext() as profiler,
        WaitingClock() as waiting,
        Saver(
            run.directory / CHECKPOINTS, config.checkpoint, savers, run.checkpoint, recorder.note, run.remote
        ) as saver,
        Interruption(list(ranks.siblings.values())) as interruption,
        hangs_explained(run.directory, ranks, rank_store, config.parallel.timeout_s) as flight,
        Forecast(run, process, engine, first_step) as forecast,
    ):
        saver.prepare(engine.tensors)

        def pauses_after(done: int) -> bool:
            return due.pauses(done) or (profiler is not None and profiler.pauses_after(done))

        @contextmanager
        def around_step(done: int, inputs: StepInputs) -> Iterator[None]:
            if due.rechecks_next(done) and isinstance(engine, NativeEngine):
                recheck(engine, inputs, config.router, done)  # or the run ends
            with forecast.around_step():
                yield

        queue = Steps(
            engine,
            loader,
            run.config,
            first_step,
            ahead=device.type != "cpu",
            pauses_after=pauses_after,
            interruption=interruption,
            waited=lambda: waiting.seconds,
            around_step=around_step,
        )
        flight.step = lambda: queue.done
        replicas = ReplicaCheck(engine)
        prober = Prober(run, engine, run.state["step"] if run.state else None, recorder.note)
        goodput.started()

        def compare(done: int) -> None:
            with goodput.spent_on("compare"):
                replicas.compare(done)  # or the run ends

        def save(done: int, evaluated: Evaluation | None) -> None:
            if config.health.every:
                compare(done)
            if health.refused.in_a_row:
                saver.refuse(done, f"its gradient norm is {result.grad_norm}")
                return
            with goodput.spent_on("save"):
                recorder.sync()
                state = checkpoint_state(run, engine, loader, health, done, evaluated)
                saver.save(done, engine.tensors, state | {"metrics": recorder.record()})
            goodput.write()

        rewind = Rewind(run, engine, loader, queue, health, recorder, prober, peers)
        if first_step == 0 and due.probes(0):
            with goodput.spent_on("evaluation"):
                prober.probe(0)
        for step in queue:
            done, result = step.done, step.result
            saver.poll()
            throughput.add(result.tokens, step_flops(result, run.costs), step.seconds)
            goodput.step(done, step.seconds, refused=not math.isfinite(result.grad_norm))
            if profiler is not None:
                profiler.step(result)
            found = health.check(step)
            row = step_row(result, step.lr, layout.expert) | speed_row(throughput, peak)
            row |= found.row
            forecast.step(step, row.get("router/rank_load_max"))
            write = due.writes(done) or result.norms_2LF is not None or found.writes
            if write:
                throughput.start_interval()
            if due.evaluates(done):
                with goodput.spent_on("evaluation"):
                    evaluation = evaluator.evaluate()
                row |= evaluation_row(evaluation)
                write = True
            if due.probes(done):
                with goodput.spent_on("evaluation"):
                    row |= prober.probe(done)
                write = True
            if write:
                row |= saver.take_figures()
            recorder.note(*compilation.lines(), *found.lines)
            recorder.step(row, done, write=write)
            recorder.alarms(found.alarms, show=found.problem is None)

            if found.problem is not None:
                saver.finish()
                with goodput.spent_on("load"):
                    gone_back = rewind.go_back(done, found)  # or the run ends
                if gone_back is not None:
                    saver.go_back(gone_back)
                    continue

            if due.saves(done):
                save(done, evaluation if due.evaluates(done) else None)
            elif due.compares(done):
                compare(done)

        with goodput.spent_on("save"):
            saver.finish()
        recorder.end_progress()
        if queue.done < steps:
            # A run that saves no checkpoint at all saves none here.
            if (config.checkpoint.every or config.checkpoint.at_end) and queue.done > saver.newest_step:
                save(queue.done, None)
                saver.finish()
            interruption.close()
            engine.close()
            close_process_group()
            return {"status": INTERRUPTED, "signal": interruption.agreed, "step": queue.done}
        interruption.close()

        # 7. The end: the last evaluation, a sample of text, the results.
        with goodput.spent_on("evaluation"):
            evaluation = evaluation or evaluator.evaluate()
        sample = sample_text(config, run.tokens.tokenizer, engine, run.directory, peers)
        measured = forecast.measure()
        engine.close()
        close_process_group()  # Now no rank has to wait while rank 0 draws plots and uploads them.
        outcome: dict[str, Any] = {}
        if process.is_main:
            outcome = finish_run(
                summary,
                evaluation,
                checkpoint=saver.newest,
                sample=sample,
                wall_s=time.monotonic() - run_start,
                tokens_per_s=throughput.of_all_steps(),
                goodput=goodput,
                forecast=lambda: forecast.finish(measured),
                disk_errors=recorder.disk_errors,
            )
            recorder.finish(outcome, run.directory)
    return outcome


def checkpoint_state(
    run: AgreedRun, engine: Engine, loader: Loader, health: Health, step: int, evaluation: Evaluation | None
) -> dict[str, Any]:
    """Return what a checkpoint contains besides tensors. `training.agree` and `training.resume` read it.

    Args:
        step: the number of optimizer steps done.
        evaluation: the one after this step; None if there was none.
    """
    loss = None if evaluation is None else evaluation.loss
    return {
        HELDOUT_LOSS: loss if loss is not None and math.isfinite(loss) else None,
        "step": step,
        "updates": engine.updates,
        "loader": loader.state_dict(),
        "health": health.state_dict(),
        "model": to_dict(run.model),
        "router": to_dict(run.config.router),
        "config": run.recorded,
        "plugins": loaded_plugins(),
    } | ({} if run.base is None else {BASE: run.base})


def step_profiler(summary: RunSummary, engine: Engine, first_step: int, peak: float | None) -> StepProfiler:
    """Return what traces steps of this rank.

    Args:
        peak: FLOP/s of all devices together; None: unknown.
    """
    run, ranks = summary.run, engine.mesh.world_size
    about = {
        "run": run.name,
        "device": summary.ranks[0].device,
        "precision": DTYPE_NAMES[summary.dtype],
        "torch": torch.__version__,
        "ranks": str(ranks) if ranks == 1 else f"{ranks}; the trace is that of rank 0",
    }
    return StepProfiler(
        engine.parts,
        engine.mesh.device,
        run.directory,
        steps=run.config.train.steps - first_step,
        first_step=first_step,
        costs=run.costs,
        ranks=ranks,
        peak=None if peak is None else peak / ranks,
        about=about,
    )


def step_row(result: StepResult, lr: float, expert_parallel: int = 1) -> dict[str, Any]:
    """Return the metrics of one optimizer step, under their names in `metrics.jsonl`.

    Args:
        expert_parallel: the ranks over which the experts are spread.
    """
    row: dict[str, Any] = {"train/loss": result.loss, "train/ce": result.ce}
    if result.counts_LE is not None and result.kept_LE is not None:
        row |= {"router/balance_loss": result.balance, "router/z_loss": result.z}
        row |= router_metrics(result.counts_LE, result.kept_LE, expert_parallel)
        for name, values_L in result.layers.items():
            row |= telemetry_metrics({name: values_L}) if name in TOKEN_FIGURES else layer_metrics(name, values_L)
        if result.norms_2LF is not None:
            row |= norm_metrics(result.norms_2LF) | straggler_metrics(result.kept_LE)
    if result.router is not None:
        row |= {"router/auxiliary_loss": result.router} | telemetry_metrics(result.telemetry)
    return row | {"optim/lr": lr, "optim/grad_norm": result.grad_norm}


def step_flops(result: StepResult, costs: MatmulCosts) -> int:
    """Return the FLOPs of the model in one optimizer step: of the tokens, assignments and pairs that are computed."""
    return costs.training_flops(result.tokens, result.assignments, result.pairs)


def speed_row(throughput: "Throughput", peak: float | None) -> dict[str, Any]:
    """Return the speed of the current interval, under its names in `metrics.jsonl`.

    Args:
        peak: FLOP/s of all devices together. None: the model FLOPs utilisation is unknown.
    """
    tokens_per_s, flops_per_s = throughput.of_interval()
    row = {"speed/tokens_per_s": tokens_per_s}
    return row if peak is None else row | {"speed/mfu": flops_per_s / peak}


def peak_of_all_ranks(run: AgreedRun, process: Process) -> float | None:
    """Return the peak of all devices together in FLOP/s, or None if no utilisation can be computed from it.

    That is so if the peak is unknown, or if some parameters do not train: `MatmulCosts.training_flops` counts the
    gradients of all parameters.
    """
    peak = peak_flops(process.device, process.dtype, run.config.train.peak_tflops)
    return peak * process.world.world_size if peak is not None and run.trained_parameters == run.counts.total else None


class Throughput:
    """Tokens and FLOPs per second of all ranks together. Only the time of optimizer steps counts."""

    def __init__(self) -> None:
        self.tokens, self.flops, self.seconds = 0, 0, 0.0
        self._interval_start = (0, 0, 0.0)

    def add(self, tokens: int, flops: int, seconds: float) -> None:
        """Count one optimizer step."""
        self.tokens += tokens
        self.flops += flops
        self.seconds += seconds

    def start_interval(self) -> None:
        """Begin a new interval with the next step."""
        self._interval_start = self.tokens, self.flops, self.seconds

    def of_interval(self) -> tuple[float, float]:
        """Return the tokens and the FLOPs per second since the last `start_interval`.

        At least one step must have been counted since.
        """
        tokens, flops, seconds = self._interval_start
        return (self.tokens - tokens) / (self.seconds - seconds), (self.flops - flops) / (self.seconds - seconds)

    def of_all_steps(self) -> float | None:
        """Return the tokens per second over all steps of this process, or None if there was none."""
        return self.tokens / self.seconds if self.seconds else None


def held_out_evaluator(run: AgreedRun, engine: Engine) -> Evaluator:
    """Return what evaluates the engine's model on the run's held-out text, in batches as large as those of training."""
    train, data_ranks = run.config.train, run.plan.layout.data
    return Evaluator(
        engine,
        run.tokens,
        seq_len=train.seq_len,
        batch_rows=max(1, train.global_batch // train.accumulation // data_ranks),
        cross_documents=run.config.data.cross_documents,
    )


def sample_text(config: Config, tokenizer: TextTokenizer, engine: Engine, directory: Path, peers: Peers) -> str | None:
    """Generate `run.sample_tokens` tokens after `run.prompt`. Collective.

    Generation needs whole sequences and whole weights. If the layout shards either, rank 0 reads the whole model from
    the run's newest checkpoint.

    Args:
        directory: the run's directory, which has a checkpoint of the engine's weights unless `checkpoint.at_end` is
            false.
        peers: the ranks, which wait while rank 0 reads a checkpoint.

    Returns:
        The text after the prompt. None if no sample is wanted. If the layout shards sequences or weights, also None on
        ranks other than 0, and on rank 0 without that checkpoint, or if the whole model does not fit beside what its
        device stores.
    """
    if not config.run.sample_tokens:
        return None
    if config.data.kind == "sft":
        try:
            tokens, _ = encode_conversation([Message("user", config.run.prompt)], tokenizer)
        except DataError:
            return None  # The chat template takes no question without more messages.
    else:
        tokens = tokenizer.encode_prompt(config.run.prompt)
    sampling = Sampling(temperature=TEMPERATURE, seed=config.run.seed)
    ends = end_token_ids(tokenizer)
    continue_text = partial(
        generate,
        prompts=[tokens],
        max_tokens=config.run.sample_tokens,
        sampling=sampling,
        stop=ends,
    )
    mesh = engine.mesh
    if mesh.layout.sequence == mesh.layout.pipeline == mesh.layout.shard == 1:
        (model,) = engine.parts
        [ids] = continue_text(model, agree=lambda logits_BV: broadcast_from_first(logits_BV, mesh))
        return tokenizer.decode(ids)
    text = None
    if mesh.rank == 0 and config.checkpoint.at_end:
        source = open_model(directory, check=False)
        dtype = engine.parts[0].compute_dtype
        needed = count_parameters(meta_model(source.model, source.router)).total * dtype.itemsize
        if needed < free_bytes(mesh.device) / 2:
            model = build_whole_model(source.model, source.router, mesh.device, dtype, config.quantize)
            source.fill(model)
            [ids] = continue_text(model)
            text = tokenizer.decode(ids)
    peers.run(lambda: None, directory)  # Rank 0 may have read a large checkpoint.
    return text
