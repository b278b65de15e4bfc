"""What the ranks agree on before a process group exists: the run's name, its tokens, its layout and where it starts.

Rank 0 chooses and sends its choice to the other ranks through the launcher's key-value store. A mistake is therefore
reported before any process group exists, and no rank waits in a collective for a rank that has ended.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.errors import CheckpointError, DataError, ModelError, RunError, expect, require
from common.plugins import changed_plugins, loaded_plugins
from common.strict import to_dict
from data.tokens.store import Store, prepare
from moe.accounting.flops import MatmulCosts, ParameterCounts, count_parameters, matmul_costs, meta_model
from moe.config import ModelConfig
from moe.model import Transformer
from moe.quantization import target_of
from parallel.planning.plan import Plan
from parallel.startup.preflight import check_ranks_agree, collect_properties, flatten
from parallel.startup.rendezvous import choose_on_rank0, exposure
from training.checkpoint.manifest import CHECKPOINTS, newest_committed, newest_verified
from training.checkpoint.peers import Peers, RemoteError
from training.checkpoint.remote import RemoteCheckpoints
from training.compilation import choose_compilation
from training.config import Config, with_vocabulary
from training.device import Process, memory_of_a_rank
from training.formats.reader import BASE, describe_base, expect_same_base, open_model
from training.host import check_memory
from training.layout import build_workload, resolve_layout
from training.owner import DirectoryLock, RunOwner, join_run, run_token
from training.report.terminal import show_line
from training.resume import (
    changed_keys,
    recorded_values,
    resolve_schedule,
    resumable_state,
    saved_values,
    schedule_lines,
)
from training.run import finished_result
from training.trainable import Choice, choose_trainable, describe_choice, format_patterns, trained_elements


@dataclass(frozen=True)
class AgreedRun:
    """The run as all ranks know it before any of them computes."""

    config: Config
    """The configuration, with the sizes of the parallel axes that were `auto`, and the length of the schedule."""
    name: str
    directory: Path
    lock: DirectoryLock | None
    """The lock on the directory that rank 0 shares with the launcher; None on other ranks, and if rank 0 owns it."""
    tokens: Store
    """The token store: the training and the held-out tokens, and their tokenizer."""
    model: ModelConfig
    """The model's configuration, with its vocabulary."""
    counts: ParameterCounts
    """Numbers of parameters of the whole model."""
    trained_parameters: int
    """Number of parameters that `optim.train` and the adapters choose."""
    trained: list[str]
    """Lines about them, and about the others; empty if all train."""
    costs: MatmulCosts
    """What a token, an assignment to an expert and a query-key pair cost."""
    plan: Plan
    """The layout, and the estimate of its memory."""
    recorded: dict[str, Any]
    """The configuration as checkpoints record it (`training.resume.recorded_values`)."""
    notes: list[str]
    """Lines for the user: warnings, keys that have changed since the checkpoint, the end of the schedule."""
    checkpoint: str | None
    """The checkpoint that the run continues from; None for a run that starts at step 0."""
    state: dict[str, Any] | None
    """The state in this checkpoint."""
    remote: RemoteCheckpoints | None
    """The copies of the run's checkpoints in a store (`checkpoint.remote`)."""
    initial_directory: str | None
    """The model directory whose weights the run starts from; None for random weights or a checkpoint. With adapters,
    the directory of the weights that they are added to, also for a run that continues."""
    base: dict[str, str] | None
    """How the checkpoints of a run with adapters name this directory (`training.formats.reader.describe_base`)."""
    finished_result: dict[str, Any] | None
    """The content of `result.json` if the run has reached `train.steps` already."""


def agree_on_run(
    config: Config, process: Process, rank_store: dist.Store, peers: Peers, owner: RunOwner | None
) -> AgreedRun:
    """Check that the ranks were started alike, and agree on everything that `AgreedRun` has.

    Args:
        rank_store: the key-value store of this launch's ranks.
        peers: the ranks, for reading the checkpoint.
        owner: claims the run's directory on rank 0. None: the launcher owns it and has chosen `run.name`.

    Raises:
        PreflightError: the ranks were not started alike.
        ConfigError, RunError, DataError, ModelError, CheckpointError: the run cannot be done as configured.
    """
    world = process.world
    libraries = ("deepspeed",) if config.engine.kind == "deepspeed" else ()
    properties = flatten({"plugins": loaded_plugins()})
    properties |= collect_properties(to_dict(config), process.device.type, str(process.dtype), libraries)
    check_ranks_agree(rank_store, world, properties, config.parallel.start_timeout_s)
    from_rank_0 = partial(choose_on_rank0, rank_store, world)

    # The name, the directory and the tokens.
    name = from_rank_0("name", lambda: config.run.name if owner is None else owner.claim_launched(config.run))
    directory = Path(config.run.root) / name
    lock = join_run(directory, name) if process.is_main and owner is None else None
    tokens = prepare(config.data, verify=world.local_rank == 0, report=show_line if process.is_main else None)
    check_shared(from_rank_0, directory, tokens.train.key)

    # The model and its layout.
    model = with_vocabulary(config.model, tokens.tokenizer.vocab_size)
    whole = meta_model(model, config.router)
    counts = count_parameters(whole)
    choice = choose_trainable(whole, config.optim.train)
    expect_full_precision(whole, choice, config)
    trained_parameters = trained_elements(whole, choice)
    memory = from_rank_0("memory", lambda: memory_of_a_rank(process.device, world.local_world_size))
    workload = build_workload(config, model, itemsize=process.dtype.itemsize, trained=trained_parameters / counts.total)
    resolved, plan, warning = resolve_layout(config, workload, world, memory)
    if process.device.type == "cpu" and config.engine.kind == "native":
        check_memory(counts.total, plan.fullest.state, world.local_world_size)

    # Where it starts: at a checkpoint of this run, at another model's weights, or at random weights.
    restarted = from_rank_0("restarted", lambda: world.restart_count > 0)  # Other nodes can count otherwise.
    url = config.checkpoint.remote
    remote = None if url is None else RemoteCheckpoints(url, name)
    checkpoint = find_checkpoint(config, directory, peers, restarted=restarted, warn=show_line, remote=remote)
    state = None if checkpoint is None else resumable_state(checkpoint, config.train.steps)
    saved = {} if checkpoint is None or state is None else saved_values(state, directory, checkpoint)
    done = 0 if state is None else state["step"]
    resolved = replace(resolved, optim=resolve_schedule(config, saved, done))
    compilation = choose_compilation(resolved, plan.layout, process.device)
    recorded = recorded_values(resolved, model, plan.layout, process)
    notes = [note for note in (warning, compilation.note, exposure(world)) if note is not None]
    if checkpoint is not None and state is not None:
        same_tokens = state["loader"]["corpus"] == tokens.train.key
        changes = changed_keys(recorded, saved, config.router, checkpoint, same_tokens=same_tokens)
        notes += [f"changed since the checkpoint: {', '.join(changes)}"] if changes else []
        for plugin in changed_plugins(state.get("plugins", {})):
            notes.append(f"warning: plugin {plugin} has changed since the checkpoint {checkpoint} was written")
    notes += schedule_lines(resolved.optim, config.train.steps, saved, done)
    init_from = config.run.init_from if checkpoint is None or model.adapter is not None else None
    initial = from_rank_0("initial", lambda: find_initial(init_from, warn=show_line))
    base = from_rank_0("base", lambda: None if model.adapter is None else find_base(initial))
    if base is not None and checkpoint is not None and state is not None:
        check_base(base, state, checkpoint, init_from)
    return AgreedRun(
        config=resolved,
        name=name,
        directory=directory,
        lock=lock,
        tokens=tokens,
        model=model,
        counts=counts,
        trained_parameters=trained_parameters,
        trained=[] if trained_parameters == counts.total else describe_choice(whole, choice),
        costs=matmul_costs(whole),
        plan=plan,
        recorded=recorded,
        notes=notes,
        checkpoint=checkpoint,
        state=state,
        remote=remote,
        initial_directory=initial,
        base=base,
        finished_result=from_rank_0("finished", lambda: finished_result(directory, config.train.steps)),
    )


def expect_full_precision(whole: Transformer, choice: Choice, config: Config) -> None:
    """Raise ConfigError if a weight that is stored in few bits is to train, or no weight is to be stored so."""
    packed = any(config.quantize.packing(target_of(name), weight.shape) for name, weight in whole.named_parameters())
    expect(
        config.quantize.kind is None or packed,
        "quantize.targets",
        config.quantize.targets,
        "weights that this model has",
    )
    for name, weight in whole.named_parameters():
        if name in choice.whole or name in choice.experts:
            expect(
                config.quantize.packing(target_of(name), weight.shape) is None,
                "optim.train",
                format_patterns(config.optim.train),
                f"weights in full precision (quantize.kind={config.quantize.kind} has {name} in few bits)",
            )


def find_base(initial: str) -> dict[str, str]:
    """Return how checkpoints name the model directory `initial`, which adapters are added to."""
    return describe_base(open_model(initial, check=False))


def check_base(base: dict[str, str], state: dict[str, Any], checkpoint: str, init_from: str | None) -> None:
    """Check that a run with adapters continues on the weights that its checkpoint was trained with.

    Raises:
        CheckpointError: the weights are others.
    """
    try:
        expect_same_base(base, state[BASE], f"run.init_from={init_from}", checkpoint)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: expected the state of a run with adapters ('{BASE}')") from error
    except ModelError as error:
        raise CheckpointError(str(error)) from error


def check_shared(from_rank_0: Callable[[str, Callable[[], Any]], Any], directory: Path, tokens: str) -> None:
    """Check that this rank sees the run directory and the tokens of rank 0, and can write in the directory.

    Otherwise the run would fail at its first checkpoint. Nothing is written: only the owner of the directory writes
    there before the run has started.

    Args:
        from_rank_0: `from_rank_0(key, choose)` calls `choose` on rank 0 only and returns its result on every rank.
        tokens: the hash of this rank's training tokens.

    Raises:
        RunError, DataError: on the ranks that see another directory than rank 0, cannot write it, or have other tokens.
    """
    token = from_rank_0("token", lambda: run_token(directory))
    tokens_of_rank_0 = from_rank_0("tokens", lambda: tokens)
    require(
        run_token(directory) == token != "",
        RunError,
        f"run.root={directory.parent}: expected a directory that all nodes share; rank 0 sees another one",
    )
    require(
        os.access(directory, os.W_OK | os.X_OK),
        RunError,
        f"run.root={directory.parent}: expected a directory that every rank can write",
    )
    require(
        tokens_of_rank_0 == tokens,
        DataError,
        f"data (tokens {tokens[:12]}): expected the text of rank 0 (tokens {tokens_of_rank_0[:12]}) on every node",
    )


def find_checkpoint(
    config: Config,
    directory: Path,
    peers: Peers,
    *,
    restarted: bool,
    warn: Callable[[str], None],
    remote: RemoteCheckpoints | None = None,
) -> str | None:
    """Return the newest undamaged checkpoint of the run in `directory`, or None if the run starts at step 0.

    Collective: the ranks divide the files of a checkpoint between them to verify it.

    Args:
        restarted: whether the launcher has restarted the workers. The run then continues even with `run.resume=never`.
        warn: receives one line for each damaged checkpoint, on rank 0.
        remote: the copies of the checkpoints. A newer one than those in `directory` is copied there.

    Raises:
        CheckpointError: on all ranks, if `run.resume=never` and there is a checkpoint, `run.resume=must` and there is
            none, all checkpoints are damaged, or the remote store does not answer and `checkpoint.on_error=stop` or
            `directory` has no checkpoint.
    """
    root = directory / CHECKPOINTS
    resume = config.run.resume
    must_be_new = resume == "never" and not restarted
    if must_be_new:
        found = newest_committed(root)
        if found is not None:
            raise CheckpointError(
                f"run.resume=never: expected the name of a new run; {directory} has checkpoints up to {found.name}"
            )
    try:
        if remote is not None:
            remote.check(peers)
        if must_be_new:
            step = None if remote is None else remote.newest(peers)
            if remote is not None and step is not None:
                raise CheckpointError(
                    f"run.resume=never: expected the name of a new run; {remote.url} has checkpoints up to step-{step}"
                )
            return None
        newest = newest_verified(root, warn, peers, remote)
    except RemoteError as error:
        problem = (
            f"checkpoint.remote={config.checkpoint.remote}: expected a store that can be read and written ({error})"
        )
        newest = newest_verified(root, warn, peers) if config.checkpoint.on_error == "warn" else None
        if newest is None:  # The store may have checkpoints of the run, so it does not start at step 0.
            raise CheckpointError(problem) from error
        if peers.rank == 0:
            warn(f"warning: {problem}; the run continues from {newest}")
    require(
        newest is not None or resume != "must",
        CheckpointError,
        f"run.resume=must: expected a checkpoint in {root}{'' if remote is None else f' or {remote.url}'}; found none",
    )
    return None if newest is None else str(newest)


def find_initial(directory: str | None, warn: Callable[[str], None]) -> str | None:
    """Return the path that `run.init_from` stands for. For a run, this is its newest undamaged checkpoint.

    It reads the whole checkpoint. Only rank 0 calls it, and shares the result.

    Args:
        warn: receives one line for each damaged checkpoint.

    Raises:
        ModelError: there is no model directory or no undamaged checkpoint.
    """
    return None if directory is None else str(open_model(directory, warn=warn).path)
