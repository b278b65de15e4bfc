"""Show what a model is and what it costs: parameters, FLOPs, memory, reach. No weight is allocated.

    python scripts/describe.py model=mixtral_8x7b
    python scripts/describe.py model=mixtral_8x7b model.sliding_window=4096 batch=8 context=131072 dtype=fp16
    python scripts/describe.py model=switch_c format=json

docs/models.md lists the presets with their papers, and explains how each figure is counted.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import expect, located
from common.text import to_json
from moe.config import NO_ADAPTER, AdapterConfig, ModelConfig, RouterConfig
from scripts.cli.command_line import run_tool


@dataclass(frozen=True)
class DescribeConfig:
    """The keys of this tool. conf/describe.yaml has the same keys and explains each."""

    model: ModelConfig
    router: RouterConfig
    adapter: AdapterConfig = NO_ADAPTER
    format: Literal["table", "json"] = "table"
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    batch: int = 1
    context: int = 32768
    window: int = 4096
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        for field in ("batch", "context", "window", "vocab_size"):
            expect(getattr(self, field) >= 1, field, getattr(self, field), "an integer >= 1")
        try:
            self.router.check(self.model.num_experts, self.model.top_k)
        except ValueError as error:
            raise located(error, "router") from error

    @property
    def whole_model(self) -> ModelConfig:
        """`model`, with its adapters, and with `vocab_size` where the preset leaves the vocabulary to the tokenizer."""
        return replace(self.model.with_adapter(self.adapter), vocab_size=self.model.vocab_size or self.vocab_size)


def figures(config: DescribeConfig) -> dict[str, Any]:
    """Return all figures, as `format=json` prints them."""
    from moe.accounting.figures import model_figures

    return model_figures(
        config.whole_model,
        config.router,
        context=config.context,
        batch=config.batch,
        dtype=config.dtype,
        window=config.window,
    )


def describe(config: DescribeConfig) -> None:
    """Print the figures as tables or as JSON."""
    from training.report.tables import show_figures

    if config.format == "json":
        print(to_json(figures(config), indent=2))
    else:
        show_figures(
            config.whole_model,
            config.router,
            figures(config),
            vocabulary_is_assumed=config.model.vocab_size is None,
        )


def main() -> None:
    """Run this tool with the command line's arguments. `conf/describe.yaml` has its keys."""
    run_tool("describe", DescribeConfig, describe)


if __name__ == "__main__":
    main()
