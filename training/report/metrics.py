"""The file `metrics.jsonl`, and the metrics of the router.

Shape suffixes: L MoE layers, E experts.
"""

import base64
import hashlib
import itertools
import math
import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from common.errors import RunError, require
from common.files import atomic_file, open_binary
from common.text import parse_json, shorten, show_ranges, to_json

if TYPE_CHECKING:  # the launcher checks the section `tracking` without importing torch
    from torch import Tensor

METRICS_FILE = "metrics.jsonl"
Value: TypeAlias = float | int | list[float] | str
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How numbers that JSON does not have are written."""
TAIL_BYTES = 2**20
"""The most bytes of rows that a checkpoint has a copy of."""
MAX_LINE_BYTES = 2**26
"""The most bytes of a row."""
Row: TypeAlias = dict[str, Value]
"""Metrics of one optimizer step by name."""


@dataclass(frozen=True)
class MetricsRecord:
    """What a checkpoint knows about `metrics.jsonl` at its step: how long it is, its hash, and a copy of its end."""

    rows: int
    """Number of rows."""
    size: int
    """Number of bytes."""
    sha256: str
    """Hash of all bytes."""
    tail: tuple[bytes, ...]
    """The last rows, at most `TAIL_BYTES` of them, as the lines of the file. They are all rows if the file is small."""

    def to_state(self) -> dict[str, Any]:
        """Return the record as JSON values. The tail is compressed."""
        tail = base64.b64encode(zlib.compress(b"".join(self.tail), level=1)).decode()
        return {"rows": self.rows, "size": self.size, "sha256": self.sha256, "tail": tail}

    @classmethod
    def from_state(cls, state: Any) -> Self | None:
        """Return the record that `to_state` has converted, or None if `state` is something else."""
        try:
            tail = zlib.decompressobj().decompress(base64.b64decode(state["tail"], validate=True), TAIL_BYTES)
            lines = tuple(tail.splitlines(keepends=True))
            record = cls(int(state["rows"]), int(state["size"]), str(state["sha256"]), lines)
            steps = [_step_of(line) for line in record.tail]
        except (KeyError, TypeError, ValueError, zlib.error):
            return None
        if record.rows < 0:
            return None
        return record if steps == sorted(set(steps)) and all(line.endswith(b"\n") for line in record.tail) else None


class MetricsWriter:
    """Writes `metrics.jsonl`: one JSON object per line, flushed after each row, so that a killed run loses no row.

    Every row has an integer `step`, and the rows are sorted by it. Floats are written with full precision: reading a
    row gives the same bits. JSON has no NaN and no infinities, so they are written as the strings "NaN", "Infinity" and
    "-Infinity", which `float()` reads. Other strings are text.

    A file that is continued is compared with the record in the checkpoint. Rows that are missing or damaged are taken
    from the record, if it has them.

    Args:
        path: the file.
        resume_step: None starts an empty file. A number removes the rows of later steps, damaged lines, and a last line
            that is incomplete because the process was killed. The file is replaced atomically: a kill leaves either the
            old file or the new one.
        record: the checkpoint's record of the file at `resume_step`. None: the checkpoint has none.

    Attributes:
        problems: a line for the user if the file differed from the record when it was opened, or had damaged lines.

    Raises:
        OSError: the file cannot be written, or is not a regular file.
    """

    def __init__(self, path: Path, resume_step: int | None, record: MetricsRecord | None = None) -> None:
        self.path = path
        self._open(resume_step, record)

    def _open(self, resume_step: int | None, record: MetricsRecord | None) -> None:
        self.problems: list[str] = []
        self._rows, self._size, self._hash = 0, 0, hashlib.sha256()
        self._tail, self._tail_size = deque[bytes](), 0
        with atomic_file(self.path) as file:
            for line in () if resume_step is None else self._kept(resume_step, record):
                file.write(line)
                self._count(line)
        self._waiting = deque[bytes]()
        # Without a buffer, because a buffer would keep what a full disk has refused.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def _kept(self, resume_step: int, record: MetricsRecord | None) -> Iterator[bytes]:
        """Yield the lines up to `resume_step`: those of the file, and those of the record where the file differs.

        The bytes are copied rather than encoded again, so that the file of a resumed run equals, byte for byte, the
        file of an uninterrupted run.
        """
        if record is not None and _starts_with(self.path, record):
            yield from itertools.islice(_complete_lines(self.path), record.rows)
            return
        damaged: list[int] = []
        lines = _lines_up_to(self.path, resume_step, damaged)
        if record is None:
            yield from lines
            if damaged:
                self.problems.append(left_out(self.path, damaged))
            return
        copies = {_step_of(line): line for line in record.tail}
        first_copy = min(copies, default=resume_step + 1)
        intact, found, last, digest = 0, 0, -1, hashlib.sha256()
        for line in lines:
            step = _step_of(line)
            intact += copies.get(step) == line
            if last < step < first_copy:
                last = step
                found += 1
                digest.update(line)
                yield line
        yield from record.tail
        digest.update(b"".join(record.tail))
        restored, missing = len(copies) - intact, record.rows - found - len(copies)
        said = [f"rows restored from the checkpoint: {restored} of {record.rows}"] if restored > 0 else []
        if missing > 0:
            said.append(f"rows missing before step {first_copy}, of which the checkpoint has no copy: {missing}")
        elif digest.hexdigest() != record.sha256:
            said.append(f"rows before step {first_copy} are not those that the run wrote")
        if said:
            self.problems.append(f"{self.path}: damaged; {'; '.join(said)}")

    def _count(self, line: bytes) -> None:
        """Take a line of the file into the record."""
        self._rows += 1
        self._size += len(line)
        self._hash.update(line)
        self._tail.append(line)
        self._tail_size += len(line)
        while self._tail_size > TAIL_BYTES:
            self._tail_size -= len(self._tail.popleft())

    def write(self, row: Row) -> None:
        """Append `row`, which must have an integer `step`, and pass it to the operating system.

        Raises:
            OSError: the row cannot be written. The file has no part of it, and the next call writes it first.
        """
        assert isinstance(row.get("step"), int), row
        self._waiting.append(to_json({name: _encode(value) for name, value in row.items()}).encode() + b"\n")
        self._write_waiting()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                rest = memoryview(self._waiting[0])
                while rest:
                    rest = rest[self._file.write(rest) :]
                self._count(self._waiting.popleft())
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, self._size)
            raise

    def record(self) -> MetricsRecord:
        """Return the record of the file for a checkpoint."""
        return MetricsRecord(self._rows, self._size, self._hash.hexdigest(), tuple(self._tail))

    def go_back(self, step: int, record: MetricsRecord | None = None) -> None:
        """Remove the rows after `step`, as if the run had been resumed from a checkpoint of this step."""
        self.close()
        self._open(step, record)

    def sync(self) -> None:
        """Flush the rows to the disk, so that they survive a power cut as the checkpoint written after them does."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write the rows that could not be written before, if they can be now, and close the file."""
        if not self._file.closed:
            with suppress(OSError):
                self._write_waiting()
            self._file.close()


def read_metrics(path: Path, damaged: list[int] | None = None) -> list[Row]:
    """Return the rows of a `metrics.jsonl`, without a last line that is incomplete because the process was killed.

    Args:
        damaged: receives the numbers of the lines that are not rows. None: they raise.

    Raises:
        RunError: a complete line is not a row.
        OSError: the file cannot be read, or is not a regular file.
    """
    rows = []
    for number, line in enumerate(_complete_lines(path), 1):
        try:
            rows.append(decode_row(line, path, number))
        except RunError:
            if damaged is None:
                raise
            damaged.append(number)
    return rows


def left_out(path: Path, damaged: Sequence[int]) -> str:
    """Return the line that says which lines of a file are `damaged`."""
    return f"{path}: damaged lines are left out: {shorten(show_ranges(damaged), 80)}"


def _complete_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, without a last line that is incomplete. A line that is too long is cut into several,
    which are no rows."""
    with open_binary(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            if line.endswith(b"\n") or len(line) == MAX_LINE_BYTES:
                yield line


def _starts_with(path: Path, record: MetricsRecord) -> bool:
    """Return whether the file begins with the bytes of which `record` has the hash."""
    if not os.path.lexists(path):
        return record.size == 0
    with open_binary(path) as file:
        digest, left = hashlib.sha256(), record.size
        while left > 0 and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return left == 0 and digest.hexdigest() == record.sha256


def _lines_up_to(path: Path, last_step: int, damaged: list[int]) -> Iterator[bytes]:
    """Yield the lines of the file that are rows of steps up to `last_step`.

    Args:
        damaged: receives the numbers of the lines that are not rows.
    """
    for number, line in enumerate(_complete_lines(path) if os.path.lexists(path) else (), 1):
        try:
            step = decode_row(line, path, number)["step"]
        except RunError:
            damaged.append(number)
            continue
        if step <= last_step:  # type: ignore[operator]
            yield line


def _step_of(line: bytes) -> int:
    step = parse_json(line)["step"]
    require(type(step) is int, TypeError, "step")
    return int(step)


def max_vio(counts_LE: "Tensor") -> list[float]:
    """Return MaxVio (arXiv 2408.15664) of each layer: `max_e n_e / mean_e n_e - 1` for the counts `n_e`.

    0 means that all experts get the same number of tokens, 1 that the fullest expert gets twice its share. The largest
    value is `E / k - 1` for top-k routing.
    """
    counts_LE = counts_LE.double()
    return (counts_LE.amax(dim=1) / counts_LE.mean(dim=1) - 1).tolist()


def load_shares(counts_LE: "Tensor") -> list[list[float]]:
    """Return, for each layer, the share of the layer's assignments that each expert gets: L lists of E numbers."""
    counts_LE = counts_LE.double()
    return (counts_LE / counts_LE.sum(dim=1, keepdim=True)).tolist()


def load_entropy(counts_LE: "Tensor") -> list[float]:
    """Return, for each layer, the entropy of the load shares divided by ln E.

    1 means that all experts get the same number of tokens, 0 that one expert gets all. With E = 1 it is 1.
    """
    import torch

    num_experts = counts_LE.shape[1]
    if num_experts == 1:
        return [1.0] * counts_LE.shape[0]
    load_LE = counts_LE.double() / counts_LE.double().sum(dim=1, keepdim=True)
    return (torch.special.entr(load_LE).sum(dim=1) / math.log(num_experts)).tolist()


def layer_keys(rows: Iterable[Mapping[str, Any]], prefix: str) -> list[str]:
    """Return the metrics `<prefix>/layer_XX` of all rows, in the order of the layers."""
    keys = {key for row in rows for key in row if key.startswith(f"{prefix}/layer_")}
    numbered = [(int(key.rpartition("_")[2]), key) for key in keys if key.rpartition("_")[2].isdecimal()]
    return [key for _, key in sorted(numbered)]


def rank_load_max(rows_LE: "Tensor", ranks: int) -> list[float]:
    """Return, for each layer, the rows that the fullest of `ranks` expert-parallel ranks receives over their mean.

    A step waits for the fullest rank, so this is a lower bound of the slowdown of its experts. 1 is balance, and
    `ranks` means that one rank receives all rows.

    Args:
        rows_LE: [L, E] rows that each expert receives. Each rank has E / ranks neighbouring experts.
    """
    rows_LR = rows_LE.double().unflatten(1, (ranks, -1)).sum(dim=2)
    return (rows_LR.amax(dim=1) / rows_LR.mean(dim=1)).tolist()


def place_greedily(rows_LE: "Tensor", ranks: int) -> "Tensor":
    """Return an assignment of experts to ranks that balances the rows of the ranks, [L, E] of ranks.

    In each layer, from the fullest expert to the emptiest, an expert goes to the rank with the fewest rows among those
    that have less than E / ranks experts. Of equal ranks and experts, the first one is taken.
    """
    import torch

    layers, experts = rows_LE.shape
    rank_LE = torch.zeros(layers, experts, dtype=torch.int64)
    load_LR = torch.zeros(layers, ranks, dtype=torch.float64)
    free_LR = torch.full((layers, ranks), experts // ranks)
    for expert_L in rows_LE.argsort(dim=1, descending=True, stable=True).t():
        expert_L1 = expert_L.unsqueeze(1)
        rank_L1 = load_LR.masked_fill(free_LR == 0, math.inf).argmin(dim=1, keepdim=True)
        rank_LE.scatter_(1, expert_L1, rank_L1)
        load_LR.scatter_add_(1, rank_L1, rows_LE.double().gather(1, expert_L1))
        free_LR.scatter_add_(1, rank_L1, torch.full_like(rank_L1, -1))
    return rank_LE


def expert_parallel_sizes(experts: int) -> list[int]:
    """Return the numbers of expert-parallel ranks to consider: the powers of two that divide `experts`, and `experts`.

    >>> expert_parallel_sizes(8), expert_parallel_sizes(12), expert_parallel_sizes(1)
    ([2, 4, 8], [2, 4, 12], [])
    """
    powers = (2**exponent for exponent in range(1, experts.bit_length()))
    return [*(size for size in powers if size < experts and experts % size == 0), *([experts] if experts > 1 else [])]


def straggler_metrics(rows_LE: "Tensor") -> Row:
    """Return what the load of a step would cost under expert parallelism over N = 2, 4, ..., E ranks.

    Args:
        rows_LE: [L, E] rows that each expert receives.

    Returns:
        `router/straggler/ep_N`, `rank_load_max` over N ranks, and `router/straggler_placed/ep_N`, the same after
        `place_greedily`. Both are means over layers.
    """
    row: Row = {}
    for ranks in expert_parallel_sizes(rows_LE.shape[1]):
        # The experts in the order of their ranks: each rank has equally many, so they are neighbours.
        placed_LE = rows_LE.gather(1, place_greedily(rows_LE, ranks).argsort(dim=1, stable=True))
        row[f"router/straggler/ep_{ranks}"] = _mean(rank_load_max(rows_LE, ranks))
        row[f"router/straggler_placed/ep_{ranks}"] = _mean(rank_load_max(placed_LE, ranks))
    return row


def norm_metrics(norms_2LF: "Tensor") -> Row:
    """Return the norms of routers and experts.

    Args:
        norms_2LF: `training.step.StepResult.norms_2LF`.

    Returns:
        `router/weight_norm/layer_XX`, `router/grad_norm/layer_XX`, and `experts/weight_norm/layer_XX` and
        `experts/grad_norm/layer_XX` (E numbers).
    """
    row: Row = {}
    for of, norms_LF in zip(("weight_norm", "grad_norm"), norms_2LF, strict=True):
        row |= layer_metrics(of, norms_LF[:, 0].tolist())
        row |= layer_metrics(of, norms_LF[:, 1:].tolist(), "experts")
    return row


def router_metrics(counts_LE: "Tensor", kept_LE: "Tensor", expert_parallel: int = 1) -> Row:
    """Return the router's metrics of one optimizer step that follow from the assignments of tokens to experts.

    Args:
        counts_LE: [L, E] assignments before any drop, without padding tokens, summed over micro-batches and ranks.
        kept_LE: those that were not dropped because an expert was full.
        expert_parallel: the ranks over which the experts are spread.

    Returns:
        `router/max_vio`, `router/load_entropy` and `router/rank_load_max` (means over layers), `router/dead` (experts
        without an assignment, summed over layers), `router/drop_rate` (the share of assignments that were dropped), and
        each of them as `<name>/layer_XX`; `router/load/layer_XX` (E shares). XX counts the MoE layers from 00. A layer
        without any assignment gives NaN.
    """
    counts_LE, kept_LE = counts_LE.detach().cpu(), kept_LE.detach().cpu()
    dead_LE, counts_L, dropped_L = counts_LE == 0, counts_LE.sum(dim=1), (counts_LE - kept_LE).sum(dim=1)
    row: Row = {
        "router/dead": int(dead_LE.sum()),
        "router/drop_rate": float(dropped_L.sum() / counts_L.sum().clamp(min=1)),
    }
    for name, values_L in (
        ("max_vio", max_vio(counts_LE)),
        ("load_entropy", load_entropy(counts_LE)),
        ("rank_load_max", rank_load_max(kept_LE, expert_parallel)),
    ):
        row |= {f"router/{name}": _mean(values_L)} | layer_metrics(name, values_L)
    row |= layer_metrics("dead", dead_LE.sum(dim=1).tolist())
    row |= layer_metrics("drop_rate", (dropped_L / counts_L.clamp(min=1)).tolist())
    return row | layer_metrics("load", load_shares(counts_LE))


def telemetry_metrics(telemetry: Mapping[str, Sequence[float]]) -> Row:
    """Return `router/<name>`, a mean over layers, and `router/<name>/layer_XX`.

    Args:
        telemetry: name -> one value per MoE layer (`moe.figures.TOKEN_FIGURES`, `Router.TELEMETRY`).
    """
    row: Row = {}
    for name, values_L in telemetry.items():
        row |= {f"router/{name}": _mean(values_L)} | layer_metrics(name, values_L)
    return row


def layer_metrics(name: str, values_L: Sequence[Value], section: str = "router") -> Row:
    """Return `<section>/<name>/layer_XX` for one value per MoE layer."""
    return {f"{section}/{name}/layer_{layer:02d}": value for layer, value in enumerate(values_L)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _encode(value: Value) -> Value | str | list[float | str]:
    if isinstance(value, str):
        return value
    return [_encode_number(number) for number in value] if isinstance(value, list) else _encode_number(value)


def _encode_number(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def decode_row(line: bytes, path: Path, number: int) -> Row:
    """Return the row that a line of a `metrics.jsonl` has.

    Args:
        path, number: the file and the number of the line, for the message.

    Raises:
        RunError: the line is not a row.
    """
    try:
        row = {name: _decode(value) for name, value in parse_json(line).items()}
        if type(row["step"]) is not int:
            raise TypeError("step")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: line {number} is damaged: expected a JSON object with an integer step") from error
    return row


def _decode(value: Any) -> Value:
    if isinstance(value, list):
        return [float(_decode(number)) for number in value]  # type: ignore[arg-type]
    return math.nan if value is None else NOT_FINITE.get(value, value) if isinstance(value, str) else value
