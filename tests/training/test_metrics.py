"""`metrics.jsonl`, and the metrics of the router against numbers computed by hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from common.errors import RunError
from training.report.metrics import MetricsWriter, Row, load_entropy, read_metrics, router_metrics


def write(path: Path, steps: range, resume_step: int | None = None) -> None:
    writer = MetricsWriter(path, resume_step)
    for step in steps:
        writer.write({"step": step, "train/loss": 1 / (step + 3), "router/load/layer_00": [0.1 + 0.2, 0.7]})
    writer.close()


def test_rows_read_back_to_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row: Row = {"step": 1, "a": 0.1 + 0.2, "b": 5e-324, "c": 2**60, "inf": math.inf, "low": [-math.inf, 1 / 3]}
    writer = MetricsWriter(path, None)
    writer.write(row)
    # The file is read while the writer still has it open, because rows are flushed.
    assert read_metrics(path) == [row]
    writer.write({"step": 2, "a": math.nan})
    assert math.isnan(read_metrics(path)[1]["a"])  # type: ignore[arg-type]


def test_file_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path, None).write({"step": 1, "a": math.nan, "b": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == {"step": 1, "a": "NaN", "b": "-Infinity"}


def test_resume_gives_the_file_of_the_uninterrupted_run(tmp_path: Path) -> None:
    write(tmp_path / "whole.jsonl", range(1, 9))
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 7))
    with open(path, "a") as file:
        file.write('{"step": 7, "train/lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    write(path, range(5, 9), resume_step=4)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "whole.jsonl"]


def test_without_resume_the_file_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    write(path, range(0))
    assert path.read_bytes() == b""
    write(tmp_path / "new.jsonl", range(2), resume_step=0)
    assert len(read_metrics(tmp_path / "new.jsonl")) == 2


def test_null_is_a_number_that_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "a": null, "b": [null, 1]}\n')
    [row] = read_metrics(tmp_path / "m.jsonl")
    assert row["step"] == 1 and math.isnan(row["a"]) and math.isnan(row["b"][0]) and row["b"][1] == 1  # type: ignore[index, arg-type]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2 is damaged"):
        read_metrics(path)
    with pytest.raises(RunError, match="line 2 is damaged"):
        MetricsWriter(path, 3)


def test_router_metrics_by_hand() -> None:
    # Layer 0: 12 assignments over 4 experts, mean 3, largest 6. Layer 1: 12 assignments, all to expert 2.
    row = router_metrics(torch.tensor([[6, 3, 3, 0], [0, 0, 12, 0]]), dropped=6.0)
    assert row == {
        "router/max_vio": 2.0,
        "router/max_vio/layer_00": 1.0,
        "router/max_vio/layer_01": 3.0,
        "router/load/layer_00": [0.5, 0.25, 0.25, 0.0],
        "router/load/layer_01": [0.0, 0.0, 1.0, 0.0],
        "router/dead": 4,
        "router/drop_rate": 0.25,
        # The entropy of (1/2, 1/4, 1/4) is 1.5 bits of 2, and that of a single expert is 0.
        "router/load_entropy": pytest.approx(0.375, abs=1e-15),
    }


def test_balance_is_zero_vio_and_full_entropy() -> None:
    row = router_metrics(torch.full((3, 8), 5), dropped=0.0)
    assert row["router/max_vio"] == 0
    assert row["router/load_entropy"] == pytest.approx(1, abs=1e-15)
    assert row["router/dead"] == 0
    assert load_entropy(torch.tensor([[7]])) == [1.0]


def test_counts_beyond_float32_are_exact() -> None:
    row = router_metrics(torch.tensor([[2**24 + 1, 2**24 - 1]]), dropped=0.0)
    assert row["router/max_vio"] == 2.0**-24
