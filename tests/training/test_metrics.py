"""`metrics.jsonl`, and the metrics of the router against numbers computed by hand."""

import base64
import errno
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import RunError, UserError
from training.report import metrics
from training.report.metrics import (
    MetricsRecord,
    MetricsWriter,
    Row,
    load_entropy,
    read_metrics,
    router_metrics,
    straggler_metrics,
)


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
    damaged: list[int] = []
    assert read_metrics(path, damaged) == [{"step": 1}, {"step": 3}] and damaged == [2]
    # A checkpoint of an older version has no record of the file.
    writer = MetricsWriter(path, 3)
    assert writer.problems == [f"{path}: damaged lines are left out: 2"]
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def recorded(path: Path, steps: int) -> MetricsRecord:
    """Write a file of `steps` rows, and return the record of a checkpoint as it is read back from the manifest."""
    writer = MetricsWriter(path, None)
    for step in range(1, steps + 1):
        writer.write({"step": step, "train/loss": 1 / (step + 3)})
    state = json.loads(json.dumps(writer.record().to_state()))
    writer.write({"step": steps + 1, "train/loss": 0.5})  # after the checkpoint
    writer.close()
    record = MetricsRecord.from_state(state)
    assert record is not None and (record.rows, record.size) == (
        steps,
        len(b"".join(path.read_bytes().splitlines(True)[:-1])),
    )
    return record


DAMAGES = {
    "none": lambda lines: lines,
    "cut out": lambda lines: lines[:3] + lines[6:],
    "cut off": lambda lines: lines[:4],
    "gone": None,
    "empty": lambda lines: [],
    "a damaged line": lambda lines: [*lines[:4], lines[4][:9] + b"\n", *lines[5:]],
    "another number": lambda lines: [*lines[:4], lines[4].replace(b"0.1", b"0.2"), *lines[5:]],
    "twice": lambda lines: [*lines[:6], *lines[2:]],
    "another order": lambda lines: [*lines[5:], *lines[:5]],
    "another file": lambda lines: [bytes(range(1, 256))] * 3,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_restored_from_the_checkpoints_record(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    record = recorded(path, 9)
    lines = path.read_bytes().splitlines(keepends=True)
    change = DAMAGES[damage]
    path.unlink() if change is None else path.write_bytes(b"".join(change(lines)))
    writer = MetricsWriter(path, 9, record)
    assert path.read_bytes() == b"".join(lines[:9]) and writer.record() == record
    missing = {"none": 0, "cut out": 3, "cut off": 5, "a damaged line": 1, "another number": 1}.get(damage, 9)
    line = f"{path}: damaged; rows restored from the checkpoint: {missing} of 9"
    quiet = damage in ("none", "twice", "another order")
    assert writer.problems == ([] if quiet else [line])


def test_a_hole_before_the_record_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "TAIL_BYTES", 150)
    path = tmp_path / "metrics.jsonl"
    record = recorded(path, 20)
    lines = path.read_bytes().splitlines(keepends=True)
    kept = len(record.tail)
    first = 21 - kept
    assert 2 <= kept <= 5 and b"".join(record.tail) == b"".join(lines[first - 1 : 20])
    path.write_bytes(b"".join(lines[:2] + lines[5:10]))
    writer = MetricsWriter(path, 20, record)
    assert path.read_bytes() == b"".join([*lines[:2], *lines[5:10], *record.tail])
    assert writer.problems == [
        f"{path}: damaged; rows restored from the checkpoint: {kept} of 20; "
        f"rows missing before step {first}, of which the checkpoint has no copy: {13 - kept}"
    ]
    path.write_bytes(b"".join([lines[0].replace(b"0.2", b"0.3"), *lines[1:]]))
    writer = MetricsWriter(path, 20, record)
    assert writer.problems == [f"{path}: damaged; rows before step {first} are not those that the run wrote"]


def test_a_record_that_was_not_written_here_is_no_record(tmp_path: Path) -> None:
    good = recorded(tmp_path / "metrics.jsonl", 3).to_state()
    bomb = base64.b64encode(zlib.compress(b'{"step": 1}\n' * 2**22)).decode()
    for change in (
        {"rows": None}, {"rows": "x"}, {"rows": -1}, {"size": []}, {"tail": "?"}, {"tail": 3}, {"tail": "AAAA"},
        {"tail": bomb},
        {"tail": base64.b64encode(zlib.compress(b'{"step": 2}\n{"step": 1}\n')).decode()},
        {"tail": base64.b64encode(zlib.compress(b'{"step": true}\n')).decode()},
        {"tail": base64.b64encode(zlib.compress(b"[" * 100_000 + b"\n")).decode()},
    ):  # fmt: skip
        assert MetricsRecord.from_state(good | change) is None
    assert all(MetricsRecord.from_state(state) is None for state in (None, 3, [], {}, "x"))
    assert MetricsRecord.from_state(good) is not None


@pytest.mark.parametrize("kind", ["directory", "named pipe"])
def test_a_file_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if kind == "directory" else os.mkfifo(path)
    for read in (read_metrics, lambda path: MetricsWriter(path, 1)):
        with pytest.raises(UserError, match=r"is a .*, not a regular file$"):
            read(path)


def test_router_metrics_by_hand() -> None:
    # Layer 0: 12 assignments over 4 experts, mean 3, largest 6. Layer 1: 12 assignments, all to expert 2.
    kept_LE = torch.tensor([[6, 3, 3, 0], [0, 0, 6, 0]])
    row = router_metrics(torch.tensor([[6, 3, 3, 0], [0, 0, 12, 0]]), kept_LE, expert_parallel=2)
    assert row == {
        "router/max_vio": 2.0,
        "router/max_vio/layer_00": 1.0,
        "router/max_vio/layer_01": 3.0,
        "router/load/layer_00": [0.5, 0.25, 0.25, 0.0],
        "router/load/layer_01": [0.0, 0.0, 1.0, 0.0],
        "router/dead": 4,
        "router/dead/layer_00": 1,
        "router/dead/layer_01": 3,
        "router/drop_rate": 0.25,
        "router/drop_rate/layer_00": 0.0,
        "router/drop_rate/layer_01": 0.5,
        # The entropy of (1/2, 1/4, 1/4) is 1.5 bits of 2, and that of a single expert is 0.
        "router/load_entropy": pytest.approx(0.375, abs=1e-15),
        "router/load_entropy/layer_00": pytest.approx(0.75, abs=1e-15),
        "router/load_entropy/layer_01": pytest.approx(0, abs=1e-15),
        # Layer 0: ranks with 9 and 3 rows, mean 6. Layer 1: 0 and 6 rows.
        "router/rank_load_max": 1.75,
        "router/rank_load_max/layer_00": 1.5,
        "router/rank_load_max/layer_01": 2.0,
    }


def test_balance_is_zero_vio_and_full_entropy() -> None:
    row = router_metrics(torch.full((3, 8), 5), torch.full((3, 8), 5), 4)
    assert row["router/max_vio"] == 0
    assert row["router/load_entropy"] == pytest.approx(1, abs=1e-15)
    assert row["router/dead"] == 0 and row["router/rank_load_max"] == 1
    assert load_entropy(torch.tensor([[7]])) == [1.0]


def placed_by_hand(rows: list[int], ranks: int) -> float:
    """The largest number of rows of a rank over the mean, after the greedy placement of one layer."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in sorted(range(len(rows)), key=lambda e: -rows[e]):
        open_ranks = [rank for rank in held if len(rank) < len(rows) // ranks]
        min(open_ranks, key=lambda rank: sum(rows[e] for e in rank)).append(expert)
    sums = [sum(rows[e] for e in rank) for rank in held]
    return max(sums) / (sum(sums) / ranks)


@pytest.mark.parametrize("experts", [1, 2, 6, 8, 64])
def test_straggler_factors_equal_a_loop(experts: int) -> None:
    """Layers with random, equal and very unequal loads; the last one sends everything to one expert."""
    rows_LE = torch.randint(0, 50, (4, experts), generator=torch.Generator().manual_seed(0))
    rows_LE[1], rows_LE[2], rows_LE[3] = 7, 2 ** (torch.arange(experts) % 20), 0
    rows_LE[3, experts // 2] = 9
    row, sizes = (
        straggler_metrics(rows_LE),
        {1: [], 2: [2], 6: [2, 6], 8: [2, 4, 8], 64: [2, 4, 8, 16, 32, 64]}[experts],
    )
    names = [f"router/{name}/ep_{ranks}" for ranks in sizes for name in ("straggler", "straggler_placed")]
    assert sorted(row) == sorted(names)
    for ranks in sizes:
        size, factors, placed = experts // ranks, [], []
        for rows in rows_LE.tolist():
            sums = [sum(rows[first : first + size]) for first in range(0, experts, size)]
            factors.append(max(sums) * ranks / sum(sums))
            placed.append(placed_by_hand(rows, ranks))
        assert row[f"router/straggler/ep_{ranks}"] == pytest.approx(sum(factors) / 4, rel=1e-14)
        assert row[f"router/straggler_placed/ep_{ranks}"] == pytest.approx(sum(placed) / 4, rel=1e-14)


def test_counts_beyond_float32_are_exact() -> None:
    counts_LE = torch.tensor([[2**24 + 1, 2**24 - 1]])
    row = router_metrics(counts_LE, counts_LE)
    assert row["router/max_vio"] == 2.0**-24


def test_a_row_that_a_full_disk_refuses_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = tmp_path / "metrics.jsonl", tmp_path / "whole.jsonl"
    writer, expected = MetricsWriter(path, None), MetricsWriter(whole, None)

    class FullDisk:
        """Takes five bytes of a row, and then none."""

        def __init__(self, file: Any) -> None:
            self.file, self.room, self.fileno = file, 5, file.fileno

        def write(self, content: memoryview) -> int:
            if self.room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken, self.room = self.file.write(content[: self.room]), 0
            return taken

    for step in range(1, 6):
        expected.write({"step": step, "train/loss": 1 / step})
        if step == 3:
            file, writer._file = writer._file, FullDisk(writer._file)  # type: ignore[assignment]
        if step in (3, 4):
            with pytest.raises(OSError, match="No space left"):
                writer.write({"step": step, "train/loss": 1 / step})
            assert [row["step"] for row in read_metrics(path)] == [1, 2] and path.read_bytes().endswith(b"\n")
        else:
            writer._file = writer._file if step < 3 else file
            writer.write({"step": step, "train/loss": 1 / step})
    assert path.read_bytes() == whole.read_bytes()
    assert writer.record() == expected.record()
    writer.close(), expected.close()


def test_a_writer_that_could_not_go_back_can_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", None)
    writer.write({"step": 1})
    writer._waiting.append(b'{"step": 2}\n')  # as after a write that was refused
    with monkeypatch.context() as full_disk:

        def refuse(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full_disk.setattr(os, "fsync", refuse)
        full_disk.setattr(writer, "_write_waiting", refuse)
        with pytest.raises(OSError, match="No space left"):
            writer.go_back(0)
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
