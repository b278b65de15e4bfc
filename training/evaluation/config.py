"""Compute the loss and the bits per byte of a model on a text.

    python scripts/evaluate.py checkpoint=runs/quickstart-1 'data.paths=[notes.txt]'
    python scripts/evaluate.py checkpoint=DIR data=sft 'data.paths=[chats.jsonl]' split=heldout launch.nproc=2
    python scripts/evaluate.py checkpoint=DIR data=embedded split=heldout format=json

docs/evaluation.md explains the keys and the figures.
"""

from dataclasses import dataclass, field
from typing import Literal

from common.errors import expect_fields
from data.config import DataConfig
from moe.quantization import FULL_PRECISION, QuantizeConfig
from training.config import LaunchConfig

MAX_SEQ_LEN, MAX_BATCH_ROWS = 2**20, 2**12
"""Limits against typing errors. Rows are padded to their full number and length in memory, also for a short text."""


@dataclass(frozen=True)
class EvaluateConfig:
    """The keys of `scripts/evaluate.py`. conf/evaluate.yaml has the same keys and explains each."""

    checkpoint: str
    data: DataConfig
    split: Literal["all", "heldout"] = "all"
    seq_len: int = 1024
    batch_rows: int = 4
    format: Literal["text", "json"] = "text"
    precision: Literal["auto", "fp64", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantize: QuantizeConfig = FULL_PRECISION
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        expect_fields(
            self,
            seq_len=(1 <= self.seq_len <= MAX_SEQ_LEN, f"an integer from 1 to {MAX_SEQ_LEN}"),
            batch_rows=(1 <= self.batch_rows <= MAX_BATCH_ROWS, f"an integer from 1 to {MAX_BATCH_ROWS}"),
        )
