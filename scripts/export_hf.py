"""Export a model directory to one that transformers and vLLM read: Llama, Mistral or Mixtral, with its tokenizer.

    python scripts/export_hf.py checkpoint=runs/quickstart-1 out=exported
    python scripts/export_hf.py checkpoint=runs/quickstart-1 out=exported format=mistral dtype=fp32
    python scripts/export_hf.py checkpoint=runs/tuned-1 out=adapter format=peft

Tensors are copied one at a time, so a model can be larger than the memory. If none of the three architectures can
compute the model, the error names the configuration key that prevents it. The adapters of a run are merged into the
weights, or with `format=peft` written alone, for the library peft.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import expect
from scripts.cli.command_line import run_tool


@dataclass(frozen=True)
class ExportConfig:
    """The keys of this tool. conf/export_hf.yaml has the same keys and explains each."""

    checkpoint: str
    out: str
    format: Literal["hf", "mistral", "peft"] = "hf"
    dtype: Literal["bf16", "fp32"] = "bf16"
    shard_size: str = "5GB"
    max_positions: int = 32768
    chat: bool = False

    def __post_init__(self) -> None:
        expect(self.max_positions >= 1, "max_positions", self.max_positions, "an integer >= 1")


def export_hf(config: ExportConfig) -> None:
    """Write the directory `config.out`, and print its size."""
    from common.errors import ModelError, require
    from training.formats.export import export_model, parse_size
    from training.formats.merge import without_adapters
    from training.formats.peft import export_adapter
    from training.formats.reader import open_model_for_key

    shard_bytes = parse_size(config.shard_size)
    source = open_model_for_key("checkpoint", config.checkpoint)
    if config.format == "peft":
        require(
            source.model.adapter is not None,
            ModelError,
            f"checkpoint={config.checkpoint}: expected a run with adapters with format=peft; found a model without any",
        )
        size = export_adapter(source, Path(config.out))
        print(f"{config.out}: the adapters of {source.path}, {size / 1e9:.4f} GB in fp32")
        return
    source = without_adapters(source)
    size = export_model(
        source,
        Path(config.out),
        form=config.format,
        dtype=config.dtype,
        shard_bytes=shard_bytes,
        positions=config.max_positions,
        chat=config.chat,
    )
    tokenizer = "no tokenizer" if source.tokenizer is None else "its tokenizer"
    print(f"{config.out}: from {source.path}, {size / 1e9:.2f} GB in {config.dtype}, {tokenizer}")


def main() -> None:
    """Run this tool with the command line's arguments. `conf/export_hf.yaml` has its keys."""
    run_tool("export_hf", ExportConfig, export_hf)


if __name__ == "__main__":
    main()
