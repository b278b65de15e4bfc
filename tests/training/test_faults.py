"""Runs in which something goes wrong: gradients, the loss, memory."""

import copy
import errno
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import CheckpointError, TrainingFailure
from common.strict import from_dict
from scripts.cli.command_line import compose_config
from tests.test_train import TINY, numbers
from training import loop, rewind, steps
from training.config import Config, HealthConfig
from training.health import Finding, LossSpikes
from training.memory import is_out_of_memory
from training.owner import RunOwner
from training.replicas import ReplicaCheck
from training.report import run_report
from training.report.alarms import read_alarms
from training.report.probe import ProbeWriter, churn, read_probe
from training.step import StepResult
from training.steps import FinishedStep


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_curves", "plot_overview", "plot_load"):
        monkeypatch.setattr(run_report, name, lambda *_: None)


def run(root: Path, cache: str, name: str, *overrides: str) -> dict[str, Any]:
    """Train in this process."""
    small = ["model.num_layers=1", "train.seq_len=16", "train.global_batch=2", "tracking=disabled", "train.steps=9"]
    given = [*TINY, *small, "run.sample_tokens=0", "checkpoint.every=2", "checkpoint.keep=9", *overrides]
    values = compose_config("config", [*given, cache, f"run.root={root}", f"run.name={name}", "train.compile=false"])
    try:
        with RunOwner() as owner:
            return loop.train(from_dict(Config, values), owner)
    finally:
        if dist.is_initialized():  # The run has failed.
            dist.destroy_process_group()


class Spoiled:
    """Replaces `start_step`: the gradients of the rows that are in `rows` are not finite."""

    def __init__(self, rows: set[int]) -> None:
        self.rows, self.seen, self.start_step = rows, [], steps.start_step

    def __call__(self, engine: Any, inputs: Any, *arguments: Any) -> Any:
        numbers = [int(batch.numbers_BS[0, 0]) // 16 for batch in inputs.batches]
        self.seen += numbers
        run_micro_batches = engine.run

        def spoil(*given: Any) -> None:
            run_micro_batches(*given)
            if self.rows & set(numbers):
                engine.parts[0].norm.weight.grad[3] = math.nan

        engine.run = spoil
        try:
            return self.start_step(engine, inputs, *arguments)
        finally:
            engine.run = run_micro_batches


def test_refused_steps_are_told_and_end_the_run_or_take_it_back(tmp_path, cache, monkeypatch, capsys):
    spoiled = Spoiled({6, 8, 10, 12, 14})
    monkeypatch.setattr(steps, "start_step", spoiled)
    with pytest.raises(TrainingFailure) as failure:
        run(tmp_path, cache, "stops")
    good = tmp_path / "stops" / "checkpoints" / "step-2"
    assert str(failure.value) == (
        f"step 8: the gradient norm has not been finite for 5 steps in a row; the last good checkpoint is {good}"
    )
    out = capsys.readouterr().out
    assert out.count("changed no weight: its gradient norm is nan; rank 0 (") == 5
    assert "the gradient of norm.weight (3 in a row; after 5 the run ends)\n" in out
    rows = numbers(tmp_path / "stops")
    assert [row.get("health/refused_in_a_row") for row in rows] == [None, None, None, 1, 2, 3, 4, 5]
    assert rows[5]["health/refused_parameter"] == "norm.weight" and rows[5]["health/refused_rank"] == 0

    spoiled.seen.clear()
    account = run(tmp_path, cache, "back", "health.on_nan=rewind")["goodput"]["seconds"]
    assert account["load"] > 0 and account["repeated"] > 0
    out = capsys.readouterr().out
    assert "the run goes back to" in out and "step-2 and skips the rows of steps 3 to 8\n" in out
    assert spoiled.seen == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28]
    again = numbers(tmp_path / "back")
    assert [row["step"] for row in again] == list(range(1, 10))
    assert again[:2] == rows[:2] and all(math.isfinite(row["optim/grad_norm"]) for row in again)


def test_replicas_are_compared_before_every_save(tmp_path, cache, monkeypatch):
    compared, start_step = [], steps.start_step

    def interrupt(*arguments: Any) -> Any:
        if len(compared) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return start_step(*arguments)

    monkeypatch.setattr(steps, "start_step", interrupt)
    monkeypatch.setattr(ReplicaCheck, "compare", lambda self, done: compared.append(done))
    result = run(tmp_path, cache, "interrupted")
    assert (result["signal"], result["step"]) == (signal.SIGTERM, 3)
    assert compared == [2, 3] and (tmp_path / "interrupted" / "checkpoints" / "step-3").is_dir()


class Jump(Spoiled):
    """The update of the step that has a row of `rows` makes the head a thousand times larger."""

    def __call__(self, engine: Any, inputs: Any, *arguments: Any) -> Any:
        numbers = [int(batch.numbers_BS[0, 0]) // 16 for batch in inputs.batches]
        self.seen += numbers
        pending = self.start_step(engine, inputs, *arguments)
        if self.rows & set(numbers):
            engine.parts[0].head.weight.data.mul_(1e6)
        return pending


def test_a_loss_that_jumps_is_told_or_takes_the_run_back(tmp_path, cache, monkeypatch, capsys):
    jump = Jump({12})
    monkeypatch.setattr(steps, "start_step", jump)
    run(tmp_path, cache, "warned")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("warning: step 8: the loss is ") and "z-score" in lines[0]
    rows = numbers(tmp_path / "warned")
    assert rows[7]["train/loss"] > 1000 and rows[7]["health/loss_z"] > 100
    assert [row["step"] for row in rows if "health/loss_z" in row] == [8]
    (alarm,) = read_alarms(tmp_path / "warned")
    assert (alarm.step, alarm.rule, alarm.layer, alarm.ended) == (8, "loss_spike", None, False)
    assert [row["step"] for row in rows if "alarm/loss_spike" in row] == [8, 9]

    found, probed_again, go_back = [], [], ProbeWriter.go_back
    monkeypatch.setattr(ProbeWriter, "go_back", lambda self, step: (probed_again.append(step), go_back(self, step)))
    for name in ("back", "again"):
        jump.seen.clear()
        run(tmp_path, cache, name, "health.on_spike=rewind")
        found.append(numbers(tmp_path / name))
        out = capsys.readouterr().out
        assert out.count("step 8: the loss is") == 1 and "step-6 and skips the rows of steps 7 to 8\n" in out
        assert jump.seen == [*range(0, 15, 2), *range(16, 21, 2)]
        assert read_alarms(tmp_path / name) == []  # The step of the alarm is repeated with other rows.
    back, again = found
    assert back == again and back[:6] == rows[:6] and max(row["train/loss"] for row in back) < 10
    assert [row["step"] for row in back] == list(range(1, 10))
    # The probes of steps that are repeated are those of the repetition.
    probes = [read_probe(tmp_path / name) for name in ("warned", "back", "again")]
    steps_probed, probed = [0, 1, 2, 4, 6, 8, 9], probes[1]
    assert all(probe.steps == steps_probed for probe in probes)
    for step in steps_probed:
        same = [(probe.routing(step).experts_LTK == probed.routing(step).experts_LTK).all() for probe in probes]
        assert same == [step < 8, True, True], step
    assert probed_again == [-1, 6, -1, 6]  # Each run starts without probes, and goes back to step 6.
    assert back[7]["router/churn"] == churn(probed.routing(6), probed.routing(8)).mean()


def test_a_newer_checkpoint_that_cannot_be_deleted_is_one_line(tmp_path, cache, monkeypatch):
    def refuse(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    monkeypatch.setattr(steps, "start_step", Spoiled({6, 8, 10, 12, 14}))
    monkeypatch.setattr(rewind, "delete_checkpoint", refuse)
    monkeypatch.setattr(rewind, "step_directories", lambda root: [root / "step-4"])
    with pytest.raises(CheckpointError, match=r"step-4: Directory not empty$"):
        run(tmp_path, cache, "full", "health.on_nan=rewind")


def test_a_jump_that_comes_again_without_an_older_checkpoint_is_told(tmp_path, cache, monkeypatch, capsys):
    jump = Jump({12})
    monkeypatch.setattr(steps, "start_step", jump)
    run(tmp_path, cache, "none", "health.on_spike=rewind", "checkpoint.every=7")
    out = capsys.readouterr().out
    assert "step-7 and skips the rows of steps 8 to 8\n" in out
    # The weights of this checkpoint are those that have jumped.
    assert "step-7; the run has gone back 1 time; the run goes on\n" in out
    assert jump.seen == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert len(numbers(tmp_path / "none")) == 9


def step_of_loss(loss: float) -> FinishedStep:
    return FinishedStep(1, 0.0, StepResult(loss, loss, None, None, 1.0, 1, 1, None), 1.0)


def test_the_z_score_by_hand():
    spikes = LossSpikes(HealthConfig(spike_z=3.0))
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        assert spikes.check(step_of_loss(loss)) == Finding()
    assert spikes.z_score(10.0) == pytest.approx((10 - 3) / 1.4826)
    assert spikes.check(step_of_loss(math.nan)) == Finding()  # It has no place among the losses.
    assert spikes.check(step_of_loss(10.0)).row["health/loss_z"] == pytest.approx(7 / 1.4826)
    assert spikes.check(step_of_loss(11.0)) == Finding()  # The same jump.
    (end,) = LossSpikes.check(copy.deepcopy(spikes), step_of_loss(3.0)).alarms
    assert end.ended and end.message == "the loss is 3, as before the jump in step 1"
    restored = LossSpikes(HealthConfig(spike_z=3.0))
    restored.load_state_dict(spikes.state_dict())
    assert restored.losses == spikes.losses and restored.since == 1
    even = LossSpikes(HealthConfig())
    even.losses.extend([2.0] * 9)
    assert even.z_score(2.4) == pytest.approx(10)  # at least 2 % of the median


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shape '[2]' is invalid"), False),
    ],
)
def test_what_counts_as_too_little_memory(error: Exception, known: bool) -> None:
    assert is_out_of_memory(error) == known


def test_too_little_memory_is_one_line_with_ways_out(tmp_path, cache, monkeypatch):
    def allocate(*_: Any) -> None:
        torch.empty(2**46)

    monkeypatch.setattr(steps, "start_step", allocate)
    with pytest.raises(TrainingFailure) as failure:
        run(tmp_path, cache, "large")
    line = str(failure.value)
    assert (
        line.startswith("rank 0 (") and "cpu): out of memory. A step has 1 x 2 rows of 16 tokens on this rank" in line
    )
    assert failure.value.alone and "\n" not in line
    assert "the plan's largest needs: " in line and "optimizer state" in line
    assert "Ways out: train.accumulation=2; parallel.recompute=full; more ranks, and parallel.shard. (" in line
    with pytest.raises(TrainingFailure, match=r": more ranks, and parallel.shard; train.seq_len=8; a smaller model\."):
        run(tmp_path, cache, "larger", "train.accumulation=2", "parallel.recompute=full")
