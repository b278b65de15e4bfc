"""Generate text from a trained model: the command line of `training/generation`.

    python scripts/generate.py checkpoint=runs/quickstart-1 prompt="def main("

`--help` prints more examples and all keys; they are in training/generation/config.py and conf/generate.yaml.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel.startup.launch import begin_process

if __name__ in ("__main__", "__mp_main__"):  # This process, or a worker that it has started.
    begin_process()

from moe.quantization import expect_library
from scripts.cli.command_line import run_tool
from scripts.cli.workers import on_every_rank
from training.generation.config import GenerateConfig


def generate_text(config: GenerateConfig) -> None:
    """Generate on every rank."""
    from training.generation.request import read_request
    from training.generation.worker import generate_on_rank

    expect_library(config.quantize)
    on_every_rank(generate_on_rank, config, lambda: (read_request(config),))


def main() -> None:
    """Run this tool with the command line's arguments. `conf/generate.yaml` has its keys."""
    run_tool("generate", GenerateConfig, generate_text)


if __name__ == "__main__":
    main()
