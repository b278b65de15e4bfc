"""Merge the adapters of a run into the weights that they are added to, as a model directory without adapters.

    python scripts/merge.py run=runs/tuned-1 out=runs/merged
    python scripts/merge.py run=runs/tuned-1 out=runs/merged base=/moved/base

The weights are computed one matrix at a time, in fp64, and rounded once. The same adapters and the same base therefore
give the same bytes, whatever layout trained them. Every other tool takes the new directory, e.g. `export_hf.py`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.cli.command_line import run_tool


@dataclass(frozen=True)
class MergeConfig:
    """The keys of this tool. conf/merge.yaml has the same keys and explains each."""

    run: str
    out: str
    base: str | None = None
    dtype: Literal["fp32", "keep"] = "keep"
    shard_size: str = "5GB"


def merge(config: MergeConfig) -> None:
    """Write the model directory `config.out`, and print its size."""
    from common.errors import ModelError, require
    from training.formats.export import import_model, parse_size
    from training.formats.merge import MergedReader
    from training.formats.reader import open_model_for_key

    shard_bytes = parse_size(config.shard_size)
    source = open_model_for_key("run", config.run, base=config.base)
    require(
        source.model.adapter is not None,
        ModelError,
        f"run={config.run}: expected a run with adapters; found a model without any",
    )
    merged = MergedReader(source)
    size = import_model(merged, Path(config.out), config.dtype, shard_bytes)
    print(f"{config.out}: from {source.path}, {len(merged.adapters)} weights with adapters, {size / 1e9:.2f} GB")


def main() -> None:
    """Run this tool with the command line's arguments. `conf/merge.yaml` has its keys."""
    run_tool("merge", MergeConfig, merge)


if __name__ == "__main__":
    main()
