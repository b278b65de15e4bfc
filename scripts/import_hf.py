"""Import a Hugging Face model, or one in Mistral's format, as a Mixwright model directory.

    python scripts/import_hf.py source=models/Mixtral-8x7B-v0.1 out=runs/mixtral
    python scripts/import_hf.py source=adapters/chat base=runs/mixtral out=runs/chat

Tensors are copied one at a time, so a model can be larger than the memory. If the source lacks a tensor that the model
needs, or has one that the model does not use, the error lists these tensors and nothing is written. With `base`, the
source is an adapter of that model in the format of the library peft.
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
class ImportConfig:
    """The keys of this tool. conf/import_hf.yaml has the same keys and explains each."""

    source: str
    out: str
    base: str | None = None
    dtype: Literal["fp32", "keep"] = "fp32"
    shard_size: str = "5GB"


def import_hf(config: ImportConfig) -> None:
    """Write the model directory `config.out`, and print its size."""
    from common.errors import ModelError, require
    from training.formats.export import import_model, parse_size
    from training.formats.merge import expect_no_adapters
    from training.formats.peft import CONFIG, import_adapter
    from training.formats.reader import open_model_for_key

    shard_bytes = parse_size(config.shard_size)
    if config.base is not None:
        directory = Path(config.source)
        found = (directory / CONFIG).is_file()
        require(found, ModelError, f"source={config.source}: expected an adapter ({CONFIG}) beside base=...")
        base = open_model_for_key("base", config.base)
        expect_no_adapters(base, f"base={config.base}")
        size = import_adapter(directory, base, Path(config.out))
        print(f"{config.out}: an adapter of {base.path}, {size / 1e9:.4f} GB")
        return
    source = open_model_for_key("source", config.source)
    require(
        source.kind != "run",
        ModelError,
        f"source={config.source}: expected a model in another format; found a Mixwright model",
    )
    size = import_model(source, Path(config.out), config.dtype, shard_bytes)
    tokenizer = "no tokenizer" if source.tokenizer is None else "its tokenizer"
    print(f"{config.out}: {len(source.shapes)} tensors, {size / 1e9:.2f} GB, {tokenizer}")


def main() -> None:
    """Run this tool with the command line's arguments. `conf/import_hf.yaml` has its keys."""
    run_tool("import_hf", ImportConfig, import_hf)


if __name__ == "__main__":
    main()
