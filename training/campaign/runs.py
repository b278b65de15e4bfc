"""The runs that a campaign disturbs, and their comparison with a run that was not disturbed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from common.errors import CheckpointError, RunError
from common.text import to_json
from data.config import DataConfig
from moe.config import ModelConfig, RouterConfig
from parallel.config import ParallelConfig
from training.checkpoint.manifest import CHECKPOINTS, committed, newest_verified, read_manifest, step_of, verify
from training.config import (
    CheckpointConfig,
    Config,
    LaunchConfig,
    OptimConfig,
    RunConfig,
    TelemetryConfig,
    TrackingConfig,
    TrainConfig,
)
from training.report.metrics import METRICS_FILE, read_metrics

STEPS, EVERY = 40, 2
"""Optimizer steps of a run, and steps between its checkpoints. The reference has a checkpoint of every step."""
TIMEOUT_S = 4.0
"""`parallel.timeout_s` and `checkpoint.io_timeout_s` of the runs of which a rank is stopped."""
OF_THE_LAUNCH = ("config", "metrics")
"""Keys of a checkpoint's state that differ between runs: the run's name, and the hash of rows with timings."""
Launch: TypeAlias = Callable[[Config, Callable[..., dict[str, Any]]], dict[str, Any]]
"""`launch(config, train)` calls `train(config)` in worker processes, and returns the result of rank 0."""


@dataclass
class Tally:
    """What a campaign has counted."""

    campaign: str
    tried: int = 0
    inside: int | None = None
    """Disturbances inside a save; None if the campaign does not count them."""
    unnoticed: list[str] = field(default_factory=list)
    """A line for each disturbance of which the user was not told."""
    lost: list[str] = field(default_factory=list)
    """A line for each thing that was lost: a committed checkpoint, a row of a step that a checkpoint has."""
    corrupted: list[str] = field(default_factory=list)
    """A line for each file that was used, or is there after the disturbance, and is not what it should be."""
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether every disturbance was noticed, nothing was lost, and nothing was corrupted."""
        return not (self.unnoticed or self.lost or self.corrupted)


@dataclass(frozen=True)
class Reference:
    """A run that was not disturbed."""

    directory: Path
    checkpoints: Mapping[int, Mapping[str, Any]]
    """Step -> what `content` returned."""
    rows: Mapping[int, str]
    """Step -> the row of metrics.jsonl, without timings."""


def configuration(
    root: Path,
    name: str,
    *,
    ranks: int,
    seed: int,
    every: int = EVERY,
    keep_every: int = 0,
    background: bool = False,
    timeout_s: float | None = None,
) -> Config:
    """Return the configuration of a run that takes seconds. Runs with the same `ranks` and `seed` are equal.

    Args:
        timeout_s: of collectives and of checkpoints; None: the defaults.
    """
    parallel = ParallelConfig(expert=ranks)
    checkpoint = CheckpointConfig(every=every, keep_every=keep_every, background=background)
    if timeout_s is not None:
        parallel = replace(parallel, timeout_s=timeout_s)
        checkpoint = replace(checkpoint, io_timeout_s=timeout_s)
    return Config(
        run=RunConfig(experiment="campaign", name=name, root=str(root), seed=seed, sample_tokens=0),
        model=ModelConfig(
            dim=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            hidden_dim=24,
            num_experts=2 * ranks,
            top_k=2,
            expert_kernel="loop",
        ),
        router=RouterConfig(balance_coef=0.05, z_coef=0.01),
        data=DataConfig(
            kind="embedded",
            cache=str(root / "cache"),
            vocab_size=500,
            code_bytes=60_000,
            prose_bytes=40_000,
            arithmetic_bytes=40_000,
            heldout_max_bytes=2000,
        ),
        train=TrainConfig(
            steps=STEPS,
            seq_len=32,
            global_batch=2 * ranks,
            precision="fp32",
            device="cpu",
            compile=False,
            log_every=1,
        ),
        optim=OptimConfig(lr=1e-2),
        parallel=parallel,
        checkpoint=checkpoint,
        tracking=TrackingConfig(wandb="disabled"),
        # Probes are made where checkpoints are saved, so that `router/churn` is not that of the reference.
        telemetry=TelemetryConfig(probe_tokens=0, forecast=False),
        launch=LaunchConfig(nproc=ranks, threads=1),
    )


def content(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint consists of, for a comparison bit for bit: hashes of its files, tensors, and state.

    Raises:
        CheckpointError: it is damaged.
    """
    verify(checkpoint)
    body = read_manifest(checkpoint)
    state = {key: value for key, value in body["state"].items() if key not in OF_THE_LAUNCH}
    return {"files": body["files"], "tensors": body["tensors"], "state": state}


def rows_of(directory: Path) -> dict[int, str]:
    """Return the rows of a run's metrics.jsonl by step, without timings.

    Raises:
        RunError: a line is damaged.
    """
    rows = read_metrics(directory / METRICS_FILE)
    kept = ({key: value for key, value in row.items() if not key.startswith("speed/")} for row in rows)
    return {row["step"]: to_json({key: str(value) for key, value in row.items()}) for row in kept}  # type: ignore[misc]


def read_reference(directory: Path) -> Reference:
    """Return the run in `directory`, which must have kept all of its checkpoints."""
    checkpoints = {step_of(path): content(path) for path in committed(directory / CHECKPOINTS)}
    assert checkpoints.keys() == {*range(1, STEPS + 1)}, checkpoints.keys()
    return Reference(directory, checkpoints, rows_of(directory))


def compare(directory: Path, reference: Reference, tally: Tally, what: str, *, at_least: int) -> None:
    """Compare what a disturbed run has on the disk with the reference, and note in `tally` what is not as it should be.

    Args:
        what: the disturbance, for the notes.
        at_least: the step of the newest checkpoint that was complete before the disturbance; 0: there was none.
    """
    said: list[str] = []
    try:
        newest = newest_verified(directory / CHECKPOINTS, said.append)
        step = 0 if newest is None else step_of(newest)
        same = newest is None or content(newest) == reference.checkpoints[step]
        rows = rows_of(directory) if step else {}
    except (CheckpointError, RunError, OSError) as error:
        tally.lost.append(f"{what}: {error}")
        return
    tally.corrupted += [f"{what}: {line}" for line in said]
    if step < at_least:
        tally.lost.append(f"{what}: found step {step} as the newest checkpoint of {directory}, expected {at_least}")
    if not same:
        tally.corrupted.append(f"{what}: {newest} differs from that of the run that was not disturbed")
    missing = [done for done in range(1, step + 1) if done not in rows]
    if missing:
        tally.lost.append(f"{what}: {directory}: rows of {len(missing)} steps are missing, the first is {missing[0]}")
    differing = [done for done in range(1, step + 1) if done in rows and rows[done] != reference.rows[done]]
    if differing:
        tally.corrupted.append(f"{what}: {directory}: {len(differing)} rows differ, the first of step {differing[0]}")
