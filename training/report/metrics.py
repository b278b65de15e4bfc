"""What a run says about itself: the rows of `metrics.jsonl`, and the router's telemetry.

Shape suffixes: L MoE layers, E experts.
"""

import json
import math
import os
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

Value: TypeAlias = float | int | list[float]
Row: TypeAlias = dict[str, Value]


class MetricsWriter:
    """Writes `metrics.jsonl`: one strict-JSON object a line, flushed per row, so that a killed run loses no row.

    Floats keep full precision (`repr`, which reads back to the same bits); NaN and infinities are the strings "NaN",
    "Infinity" and "-Infinity", which strict JSON lacks and `float()` reads back. Every row has an integer `step`, and
    rows are in order of it.

    With `resume_step` the rows of later steps are cut off first, and so is a last line that was torn by a kill: the
    file is replaced in one step, so that a kill meanwhile leaves either the old one or the new one. Without it the file
    starts empty.

    Raises:
        ValueError: a line that is to be kept, before the last, is no row.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        if resume_step is None or not path.exists():
            kept = b""
        else:
            lines = path.read_bytes().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                lines.pop()
            # Kept as they stand, not written anew: a resumed run's file equals the uninterrupted run's.
            kept = b"".join(line for i, line in enumerate(lines, 1) if _step_of(line, path, i) <= resume_step)
        replacement = path.with_name(path.name + ".tmp")
        with open(replacement, "wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(replacement, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, row: Row) -> None:
        """Append `row`, which has an integer `step`, and hand it to the operating system."""
        assert isinstance(row.get("step"), int), row
        self._file.write(json.dumps({name: _encode(value) for name, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make the rows survive a power cut: a checkpoint that does must not be without them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`, numbers as they were written; a torn last line is left out.

    Raises:
        ValueError: a line before the last is no row.
        OSError: the file cannot be read.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return [_decode_row(line, path, number) for number, line in enumerate(whole, 1)]


def max_vio(counts_LE: Tensor) -> list[float]:
    """MaxVio per layer (arXiv 2408.15664), `max_e n_e / mean_e n_e - 1`: 0 is balance, E - 1 is a single expert."""
    counts_LE = counts_LE.double()
    return (counts_LE.amax(dim=1) / counts_LE.mean(dim=1) - 1).tolist()


def load_shares(counts_LE: Tensor) -> list[list[float]]:
    """Per layer, the share of all assignments that each expert got."""
    counts_LE = counts_LE.double()
    return (counts_LE / counts_LE.sum(dim=1, keepdim=True)).tolist()


def load_entropy(counts_LE: Tensor) -> list[float]:
    """Per layer, the entropy of the load over ln E: 1 is perfect balance, 0 a single expert. 1 where E = 1."""
    num_experts = counts_LE.shape[1]
    if num_experts == 1:
        return [1.0] * counts_LE.shape[0]
    load_LE = counts_LE.double() / counts_LE.double().sum(dim=1, keepdim=True)
    return (torch.special.entr(load_LE).sum(dim=1) / math.log(num_experts)).tolist()


def router_metrics(counts_LE: Tensor, dropped: float) -> Row:
    """The router's part of a row, from one optimizer step.

    Args:
        counts_LE: [L, E] assignments before any drop, summed over micro-batches and ranks, padding excluded.
        dropped: assignments dropped for lack of capacity, summed alike and over layers.

    Returns:
        `router/max_vio`, `router/load_entropy` (means over layers), `router/max_vio/layer_XX`, `router/load/layer_XX`
        (E shares), `router/dead` (experts without an assignment, summed over layers), `router/drop_rate` (dropped
        assignments over all). Layers count from 00 among MoE layers. A layer without any assignment gives NaN.
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


def _encode(value: Value) -> Value | str | list[float | str]:
    if isinstance(value, list):
        return [_encode_number(number) for number in value]
    return _encode_number(value)


def _encode_number(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _decode_row(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
        if not isinstance(row["step"], int):
            raise TypeError("step")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: line {number} is damaged: expected a JSON object with an integer step") from error
    return {name: _decode(value) for name, value in row.items()}


def _decode(value: Value | str | list[float | str]) -> Value:
    if isinstance(value, list):
        return [float(number) for number in value]
    return float(value) if isinstance(value, str) else value


def _step_of(line: bytes, path: Path, number: int) -> int:
    step = _decode_row(line, path, number)["step"]
    assert isinstance(step, int)
    return step
