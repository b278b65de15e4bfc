"""The corridor: one run from its command line to its last checkpoint, top to bottom.

    python train.py launch.nproc=2 experiment=quickstart                           starts its own workers
    torchrun --nproc-per-node 2 train.py experiment=quickstart                     torchrun starts them
    python train.py -m launch.nproc=2 experiment=quickstart model.num_experts=4,8  a sweep, job after job

`main` is the Hydra boundary: strings go in, a validated `Config` comes out, once. `train` is what each worker does.
"""

import math
import os
import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from common.strict import from_dict
from scripts import cli as boundary
from training.config import Config, with_vocabulary
from training.initial import start_from

MAX_REFUSED = 5
"""Steps in a row whose gradient norm is not finite (each changes no weight) before the run gives up."""
SAMPLE_TEMPERATURE = 0.8


def train(config: Config) -> dict[str, Any]:
    """One worker's life, start to end. Returns what `result.json` holds, on rank 0."""
    # Imported here, so that `--help` and refusals do not wait for torch.
    import dataclasses
    import time
    from pathlib import Path

    import torch

    from common.strict import to_dict
    from data.corpora.chat import instruction
    from data.loader import Loader, evaluation_batches
    from data.tokens.store import prepare
    from moe.accounting.flops import count_parameters, meta_model, training_flops_per_token
    from moe.generation.sampling import Sampling
    from parallel.mesh import build_mesh, close_process_group, init_process_group, set_timeout
    from parallel.startup.launch import world_from_env
    from parallel.startup.preflight import check_ranks_agree, collect_properties
    from parallel.startup.rendezvous import choose_on_rank0, open_store, wait_for_all
    from training.build import build_engine, build_parts
    from training.checkpoint import checkpoint
    from training.checkpoint.manifest import CHECKPOINTS
    from training.device import (
        check_memory,
        compute_dtype,
        make_deterministic,
        memory_of_a_rank,
        peak_flops,
        pick_device,
    )
    from training.evaluate import evaluate
    from training.formats.reader import open_model
    from training.initial import find_initial
    from training.layout import build_workload, resolve_layout
    from training.report.metrics import router_metrics
    from training.report.rank_summary import gather_rank_summaries
    from training.report.recorder import Recorder
    from training.report.run_report import evaluation_row, finish_run, finished_result, show_finished, show_start
    from training.report.terminal import show_line
    from training.resume import check_shared, checked_state, find_checkpoint
    from training.run import lock_run, prepare_directory, save_config, save_tokenizer, torchrun_name
    from training.sample import sample_tokens
    from training.schedule import learning_rate
    from training.step import train_step
    from training.trainable import check_same_choice, choose_trainable, format_patterns, trained_elements

    started = time.monotonic()
    steps, log_every, eval_every = config.train.steps, config.train.log_every, config.train.eval_every

    # 1. This process: its place in the world, its device, its arithmetic.
    world = world_from_env()
    is_main = world.rank == 0
    device = pick_device(config.train.device, world.local_rank, world.local_world_size)
    dtype = compute_dtype(config.train.precision, device)
    if config.run.deterministic:
        make_deterministic()

    # 2. This run: its name, its directory, its tokens, the checkpoint it goes on from. Rank 0 decides and tells the
    #    others through the launcher's key-value store: whatever is wrong shows before a process group exists.
    agreed = open_store(world, config.parallel.start_timeout_s)
    libraries = ("deepspeed",) if config.engine.kind == "deepspeed" else ()
    facts = collect_properties(to_dict(config), device.type, str(dtype), libraries)
    check_ranks_agree(agreed, world, facts, config.parallel.start_timeout_s)
    name = torchrun_name(config.run, lambda choose: choose_on_rank0(agreed, world, "name", choose))
    directory = prepare_directory(config.run, name)
    store = prepare(config.data, verify=world.local_rank == 0, report=show_line if is_main else None)
    check_shared(agreed, world, directory, store.train.key)
    lock = lock_run(directory, name) if is_main else None
    model_config = with_vocabulary(config.model, store.tokenizer.vocab_size)
    whole = meta_model(model_config, config.router)
    counts = count_parameters(whole)
    trained = trained_elements(whole, choose_trainable(whole, config.optim.train))
    memory = choose_on_rank0(agreed, world, "memory", lambda: memory_of_a_rank(device, world.local_world_size))
    workload = build_workload(config, model_config, itemsize=dtype.itemsize, trained=trained / counts.total)
    config, plan, warning = resolve_layout(config, workload, world, memory)
    layout = plan.layout
    if device.type == "cpu" and config.engine.kind == "native":
        check_memory(counts.total, plan.fullest.state, world.local_world_size)
    found = choose_on_rank0(
        agreed,
        world,
        "checkpoint",
        lambda: find_checkpoint(config, directory, restarted=world.restart_count > 0, warn=show_line),
    )
    state = checked_state(found, model_config, config.router, steps) if found else None
    if state:
        check_same_choice(config.optim.train, state.get("train", "all"), str(found))
    fresh = config.run.init_from if found is None else None
    initial = choose_on_rank0(agreed, world, "initial", lambda: find_initial(fresh, warn=show_line))
    finished = choose_on_rank0(agreed, world, "finished", lambda: finished_result(directory, steps))
    if finished is not None:
        if is_main:
            show_finished(directory, finished)
        wait_for_all(agreed, world, "seen")
        return dict(finished)

    # 3. Data: this rank's share of an order that depends on the seed only.
    loader = Loader(
        store.train,
        seq_len=config.train.seq_len,
        global_batch=config.train.global_batch,
        accumulation=config.train.accumulation,
        rank=layout.data_rank(world.rank),
        world_size=layout.data,
        seed=config.run.seed,
        cross_documents=config.data.cross_documents,
    )
    if state:
        loader.load_state_dict(state["loader"])
    first_step = state["step"] if state else 0

    # 4. The world: process group and mesh.
    init_process_group(agreed, world.rank, world.world_size, device, config.parallel.start_timeout_s)
    mesh = build_mesh(device, layout)

    # 5. Model and engine: meta device -> parallelism -> materialise -> initialise -> optimizer -> checkpoint.
    seed = config.run.seed if initial is None else None
    parts = build_parts(config, model_config, mesh, dtype, seed)
    if initial is not None:
        source = open_model(initial, check=False)
        for part in parts:
            source.fill(part)
    holdings = gather_rank_summaries(parts, mesh)
    engine = build_engine(config, parts, mesh)
    if state:
        tensors = engine.tensors()
        checkpoint.load(Path(found), tensors)
        engine.finish_loading(tensors, state["updates"])
        del tensors
    if is_main:
        named = dataclasses.replace(config.run, name=name)
        save_config(directory, to_dict(dataclasses.replace(config, run=named, model=model_config)))
        save_tokenizer(directory, store.tokenizer.path)
        axes = str(layout) if world.world_size > 1 else ""
        ours = plan if config.engine.kind == "native" else None
        show_start(store, model_config, counts, holdings, axes, ours, dtype, directory, found)
        if warning:
            show_line(warning)
        if trained < counts.total:
            show_line(
                f"optim.train={format_patterns(config.optim.train)}: {trained:,} of {counts.total:,} parameters train"
            )
    token_bytes_V = torch.from_numpy(store.tokenizer.token_bytes()).to(device)
    evaluation_rows = max(1, config.train.global_batch // config.train.accumulation // layout.data)
    # The FLOPs of a step are those of training everything: with frozen weights there is no true utilisation to give.
    peak = peak_flops(device, dtype, config.train.peak_tflops) if trained == counts.total else None
    flops_per_token = training_flops_per_token(whole, config.train.seq_len)
    set_timeout(mesh, config.parallel.timeout_s)

    def evaluate_now() -> Any:
        batches = evaluation_batches(
            store.heldout,
            seq_len=config.train.seq_len,
            batch_rows=evaluation_rows,
            rank=layout.data_rank(world.rank),
            world_size=layout.data,
            cross_documents=config.data.cross_documents,
        )
        return evaluate(engine, batches, store.domains, token_bytes_V)

    # 6. The loop.
    evaluation, saved = None, found
    busy_s, busy_tokens, logged_s, logged_tokens, refused = 0.0, 0, 0.0, 0, 0
    with Recorder(config, directory, name, active=is_main, resumed_step=first_step if state else None) as recorder:
        for step in range(first_step, steps):
            done = step + 1
            lr = learning_rate(step, steps, config.optim)
            began = time.monotonic()
            # ------------------------------------------------------------------ one optimizer step
            batches = loader.next_step()
            result = train_step(engine, batches, config.router, lr, config.run.seed)
            # ------------------------------------------------------------------
            busy_s += time.monotonic() - began
            busy_tokens += result.tokens
            refused = 0 if math.isfinite(result.grad_norm) else refused + 1
            if refused == MAX_REFUSED:
                raise RuntimeError(f"step {done}: gradient norm {result.grad_norm}, for the {refused}th step in a row")

            row: dict[str, Any] = {"train/loss": result.loss, "train/ce": result.ce}
            if result.counts_LE is not None:
                row |= {"router/balance_loss": result.balance, "router/z_loss": result.z}
                row |= router_metrics(result.counts_LE, result.dropped)
            row |= {"optim/lr": lr, "optim/grad_norm": result.grad_norm}
            speed = (busy_tokens - logged_tokens) / (busy_s - logged_s)
            row["speed/tokens_per_s"] = speed
            if peak is not None:
                row["speed/mfu"] = speed * flops_per_token / (peak * world.world_size)
            write = done == 1 or done % log_every == 0 or done == steps
            if write:
                logged_s, logged_tokens = busy_s, busy_tokens
            if done == steps or (eval_every and done % eval_every == 0):
                evaluation = evaluate_now()
                row |= evaluation_row(evaluation)
                write = True
            recorder.step(row, done, write=write)

            if done == steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
                state = {
                    "step": done,
                    "updates": engine.updates,
                    "loader": loader.state_dict(),
                    "model": to_dict(model_config),
                    "router": to_dict(config.router),
                    "train": config.optim.train,
                }
                recorder.sync()
                committed = checkpoint.save(
                    directory / CHECKPOINTS, done, engine.tensors(), state, keep=config.checkpoint.keep
                )
                saved = str(committed)
                recorder.saved(saved)

        recorder.end_progress()

        # 7. The end: results, a sample of text, plots.
        evaluation = evaluation or evaluate_now()
        sample = None
        if config.run.sample_tokens:
            asked = instruction(config.run.prompt) if config.data.kind == "sft" else config.run.prompt
            prompt = [store.tokenizer.bos_id, *store.tokenizer.encode(asked)]
            sampling = Sampling(temperature=SAMPLE_TEMPERATURE, seed=config.run.seed)
            sample_ids = sample_tokens(
                engine, prompt, config.run.sample_tokens, sampling, store.tokenizer.eos_id, directory
            )
            sample = None if sample_ids is None else store.tokenizer.decode(sample_ids)
        engine.close()
        close_process_group()  # no rank has to wait while rank 0 draws and uploads
        outcome: dict[str, Any] = {}
        if is_main:
            outcome = finish_run(
                config,
                directory,
                name,
                store=store,
                counts=counts,
                holdings=holdings,
                evaluation=evaluation,
                checkpoint=saved,
                sample=sample,
                wall_s=time.monotonic() - started,
                tokens_per_s=busy_tokens / busy_s if busy_s else None,
            )
            recorder.finish(outcome, directory)
    if lock is not None:
        lock.release()
    return outcome


@hydra.main(version_base="1.3", config_path=str(boundary.CONF), config_name="config")
def job(cfg: DictConfig) -> float:
    """One run, or one job of a sweep; its held-out loss is what a sweeper sees. A failed sweep job is a row: NaN."""
    sweep_dir, number = boundary.current_job()
    sys.argv[1:] = HydraConfig.get().overrides.task  # of this job alone: what its workers see, and print to resume it
    try:
        raw = start_from(boundary.plain(cfg, sweep_dir, number), sys.argv[1:])
        config = from_dict(Config, raw)
        result = boundary.execute(config, train, fresh_processes=sweep_dir is not None)
        return float(result.get("eval/loss", math.nan))
    except Exception as error:
        if sweep_dir is None:
            boundary.end(error, sys.argv[1:])
        boundary.record_failure(error, sys.argv[1:], cfg, sweep_dir / str(number))
        return math.nan


def main() -> None:
    """Exit status 0 on success, 2 with one line for a mistake of the user's, 1 for anything else."""
    sys.argv[1:] = boundary.without_local_rank(sys.argv[1:])
    # Hydra then lets exceptions through, instead of printing its own report and ending with status 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sweep_dir = boundary.sweep_directory(sys.argv[1:])
        if sweep_dir is not None:
            quoted = str(sweep_dir).replace("'", "\\'")
            sys.argv.append(f"hydra.sweep.dir='{quoted}'")
        job()
    except Exception as error:
        boundary.end(error, sys.argv[1:])
    if sweep_dir is not None:
        from training.report.sweep import sweep_table

        if any(row["status"] != "finished" for row in sweep_table(sweep_dir)):
            raise SystemExit(1)


if __name__ == "__main__":
    # Under its own name, so that workers and schedulers that pickle `train` can import it.
    import train as this_module

    this_module.main()
