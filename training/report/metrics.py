"""The file `metrics.jsonl`, and the metrics of the router.

Shape suffixes: L MoE layers, E experts.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from common.errors import RunError
from common.files import write_atomically
from common.text import parse_json, to_json

if TYPE_CHECKING:  # the launcher checks the section `tracking` without importing torch
    from torch import Tensor

Value: TypeAlias = float | int | list[float] | str
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How numbers that JSON does not have are written."""
Row: TypeAlias = dict[str, Value]
"""Metrics of one optimizer step by name."""


class MetricsWriter:
    """Writes `metrics.jsonl`: one JSON object per line, flushed after each row, so that a killed run loses no row.

    Every row has an integer `step`, and the rows are sorted by it. Floats are written with full precision: reading a
    row gives the same bits. JSON has no NaN and no infinities, so they are written as the strings "NaN", "Infinity" and
    "-Infinity", which `float()` reads. Other strings are text.

    Args:
        path: the file.
        resume_step: None starts an empty file. A number removes the rows of later steps, and a last line that is
            incomplete because the process was killed. The file is replaced atomically: a kill leaves either the old
            file or the new one.

    Raises:
        RunError: a complete line of the existing file is not a row.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        path = self.path
        if resume_step is None or not path.exists():
            kept = b""
        else:
            lines = path.read_bytes().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                lines.pop()
            # The bytes are copied rather than encoded again, so that the file of a resumed run equals, byte for byte,
            # the file of an uninterrupted run.
            steps = [_decode_row(line, path, number)["step"] for number, line in enumerate(lines, 1)]
            kept = b"".join(line for line, step in zip(lines, steps, strict=True) if step <= resume_step)  # type: ignore[operator]
        write_atomically(path, kept)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, row: Row) -> None:
        """Append `row`, which must have an integer `step`, and flush it to the operating system."""
        assert isinstance(row.get("step"), int), row
        self._file.write(to_json({name: _encode(value) for name, value in row.items()}) + "\n")
        self._file.flush()

    def go_back(self, step: int) -> None:
        """Remove the rows after `step`, as if the run had been resumed from a checkpoint of this step."""
        self.close()
        self._open(step)

    def sync(self) -> None:
        """Flush the rows to the disk, so that they survive a power cut as the checkpoint written after them does."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a `metrics.jsonl`, without a last line that is incomplete because the process was killed.

    Raises:
        RunError: a complete line is not a row.
        OSError: the file cannot be read.
    """
    complete = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [_decode_row(line, path, number) for number, line in enumerate(complete, 1)]


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


def router_metrics(counts_LE: "Tensor", dropped: float) -> Row:
    """Return the router's metrics of one optimizer step.

    Args:
        counts_LE: [L, E] assignments of tokens to experts before any drop, without padding tokens, summed over
            micro-batches and ranks.
        dropped: the number of assignments dropped because an expert was full, summed over micro-batches, ranks and
            layers.

    Returns:
        `router/max_vio` and `router/load_entropy` (means over layers), `router/max_vio/layer_XX`,
        `router/load/layer_XX` (E shares), `router/dead` (experts without an assignment, summed over layers) and
        `router/drop_rate` (the share of assignments that were dropped). XX counts the MoE layers from 00. A layer
        without any assignment gives NaN.
    """
    counts_LE = counts_LE.detach().cpu()
    vio_L = max_vio(counts_LE)
    entropy_L = load_entropy(counts_LE)
    row: Row = {
        "router/max_vio": sum(vio_L) / len(vio_L),
        "router/load_entropy": sum(entropy_L) / len(entropy_L),
        "router/dead": int((counts_LE == 0).sum()),
        "router/drop_rate": dropped / max(1.0, float(counts_LE.double().sum())),
    }
    for layer, (vio, load_E) in enumerate(zip(vio_L, load_shares(counts_LE), strict=True)):
        row[f"router/max_vio/layer_{layer:02d}"] = vio
        row[f"router/load/layer_{layer:02d}"] = load_E
    return row


def telemetry_metrics(telemetry: Mapping[str, Sequence[float]]) -> Row:
    """Return the metrics that a kind of router adds: `router/<name>`, a mean over layers, and `router/<name>/layer_XX`.

    Args:
        telemetry: name -> one value per MoE layer (`Router.TELEMETRY`).
    """
    row: Row = {}
    for name, values_L in telemetry.items():
        row[f"router/{name}"] = sum(values_L) / len(values_L)
        row |= {f"router/{name}/layer_{layer:02d}": value for layer, value in enumerate(values_L)}
    return row


def _encode(value: Value) -> Value | str | list[float | str]:
    if isinstance(value, str):
        return value
    return [_encode_number(number) for number in value] if isinstance(value, list) else _encode_number(value)


def _encode_number(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _decode_row(line: bytes, path: Path, number: int) -> Row:
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
