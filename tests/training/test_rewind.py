"""A run that goes back to a checkpoint when its gradients or losses have gone wrong."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from common.errors import TrainingFailure
from common.strict import from_dict
from scripts.cli.command_line import compose_config
from tests.test_train import TINY, numbers
from training import loop, steps
from training.config import Config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache={tmp_path_factory.mktemp('cache')}"


def run(root: Path, cache: str, name: str, *overrides: str) -> dict[str, Any]:
    """Train in this process."""
    small = ["model.num_layers=1", "train.seq_len=16", "train.global_batch=2", "tracking=disabled", "train.steps=9"]
    given = [*TINY, *small, "run.sample_tokens=0", "checkpoint.every=2", "checkpoint.keep=9", *overrides]
    values = compose_config("config", [*given, cache, f"run.root={root}", f"run.name={name}", "train.compile=false"])
    try:
        return loop.train(from_dict(Config, values))
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
    run(tmp_path, cache, "back", "health.on_nan=rewind")
    out = capsys.readouterr().out
    assert "the run goes back to" in out and "step-2 and skips the rows of steps 3 to 8\n" in out
    assert spoiled.seen == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28]
    again = numbers(tmp_path / "back")
    assert [row["step"] for row in again] == list(range(1, 10))
    assert again[:2] == rows[:2] and all(math.isfinite(row["optim/grad_norm"]) for row in again)
