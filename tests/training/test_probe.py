"""Probes of a run: they change nothing, are the same after a resumption, and a full disk does not end the run.

`tests/training/test_faults.py` has a run that goes back, and `tests/distributed/test_evaluate.py` the layouts.
"""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError
from moe.routers import ExpertChoiceRouter
from tests.test_train import numbers
from tests.training import test_faults
from tests.training.test_faults import cache, no_plots  # noqa: F401 - fixtures
from tests.training.test_resume import config_of
from training.config import TelemetryConfig
from training.due import Due
from training.report import probe
from training.report.probe import PROBE, TOKENS_FILE, churn, read_probe

PROBED = [0, 1, 2, 4, 6, 8, 9]
"""The steps of a run of 9 steps that saves every second."""
# What a run stores besides weights: the bias of a router, and draws of noise.
STATEFUL = (
    "router.kind=sigmoid_topk",
    "router.jitter=0.1",
    "router.bias_update_rate=0.01",
    "router.capacity_factor=1.0",
)


def run(root: Path, cache: str, name: str, *overrides: str) -> dict[str, Any]:  # noqa: F811
    return test_faults.run(root, cache, name, "data.heldout_max_bytes=500", *overrides)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / PROBE).iterdir())}


def tensors(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((directory / "checkpoints" / "step-9").glob("rank-*.safetensors"))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:  # noqa: F811
    root = tmp_path_factory.mktemp("runs")
    run(root, cache, "whole", *STATEFUL)
    return root / "whole"


def test_a_probe_changes_no_number_of_the_run(tmp_path, cache, whole):  # noqa: F811
    run(tmp_path, cache, "without", *STATEFUL, "telemetry.probe_tokens=0")
    assert not (tmp_path / "without" / PROBE).exists()
    rows = [{key: value for key, value in row.items() if "churn" not in key} for row in numbers(whole)]
    assert numbers(tmp_path / "without") == rows
    assert tensors(tmp_path / "without") == tensors(whole) != []


def test_what_a_run_writes(whole):
    found = read_probe(whole)
    assert found is not None and found.steps == PROBED and found.domains == ("code", "prose", "arithmetic")
    assert np.bincount(found.domain_T).tolist() == [86, 85, 85]
    routings = [found.routing(step) for step in PROBED]
    assert routings[0].experts_LTK.shape == (1, 256, 2) and routings[0].margin_LT.min() > 0
    by_step = {row["step"]: row for row in numbers(whole)}
    assert [step for step in by_step if "router/churn" in by_step[step]] == PROBED[1:]
    for before, after, step in zip(routings, routings[1:], PROBED[1:], strict=False):
        [expected] = churn(before, after)
        assert by_step[step]["router/churn"] == by_step[step]["router/churn/layer_00"] == expected
    assert any(row.get("router/churn") for row in by_step.values())


def test_a_resumed_run_has_the_same_files(tmp_path, cache, whole):  # noqa: F811
    directory = tmp_path / "whole"
    shutil.copytree(whole, directory)
    for step in (8, 9):
        shutil.rmtree(directory / "checkpoints" / f"step-{step}")
    (directory / "result.json").unlink()
    (directory / PROBE / "step-7.safetensors").write_bytes(b"of steps that are repeated")
    (directory / PROBE / TOKENS_FILE).unlink()
    run(tmp_path, cache, "whole", *STATEFUL)
    assert files(directory) == files(whole)
    assert numbers(directory) == numbers(whole)


def test_other_tokens_replace_the_files_of_a_run(tmp_path, cache, whole, capsys):  # noqa: F811
    directory = tmp_path / "whole"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints" / "step-9")
    (directory / "result.json").unlink()
    run(tmp_path, cache, "whole", *STATEFUL, "telemetry.probe_tokens=30000")
    out = capsys.readouterr().out
    assert f"{directory / PROBE}: the tokens have changed; files of others are removed: 7\n" in out
    found = read_probe(directory)
    assert found is not None and found.steps == [9]
    assert 256 < len(found.tokens_T) < 30000  # The held-out split has no more.
    assert "router/churn" not in numbers(directory)[-1]


def test_when_a_probe_is_due() -> None:
    config = config_of(steps=20)
    config = replace(config, checkpoint=replace(config.checkpoint, every=6, at_end=False))
    due = Due(config)
    probed = [done for done in range(21) if due.probes(done)]
    assert probed == [0, 1, 2, 4, 6, 8, 12, 16, 18, 20]
    assert all(map(due.pauses, probed))  # No later step has been started.
    none = replace(config, telemetry=replace(config.telemetry, probe_tokens=0))
    dense = replace(config, model=replace(config.model, num_experts=None, top_k=None))
    assert not any(Due(other).probes(done) for other in (none, dense) for done in range(21))
    for tokens in (-1, 2**15 + 1):
        with pytest.raises(ConfigError, match=f"probe_tokens={tokens}: expected an integer from 0"):
            TelemetryConfig(probe_tokens=tokens)


@pytest.mark.slow
def test_routers_that_leave_tokens_without_experts_are_not_probed(tmp_path, cache, monkeypatch, capsys):  # noqa: F811
    choice = ("router.kind=expert_choice", "router.allow_noncausal=true", "router.balance_coef=0")
    run(tmp_path, cache, "choice", "train.steps=1", *choice)
    found = read_probe(tmp_path / "choice")
    assert found is not None and found.steps == [0, 1] and "is not probed" not in capsys.readouterr().out
    monkeypatch.setattr(ExpertChoiceRouter, "tokens_choose", False)
    run(tmp_path, cache, "none", "train.steps=1", *choice)
    found = read_probe(tmp_path / "none")
    assert found is not None and found.steps == []
    assert "warning: step 1 is not probed: its routers do not give every token 2 experts\n" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path, cache, monkeypatch, capsys):  # noqa: F811
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(probe, "write_atomically", refuse)
    result = run(tmp_path, cache, "full", "train.steps=1")
    assert result["status"] == "finished"
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == 1 and "No space left" in lines[0] and lines[0].endswith("the run goes on"), lines
    assert "router/churn" in numbers(tmp_path / "full")[0]
