"""Evaluate a trained model on a text: the command line of `training/evaluation`.

    python scripts/evaluate.py checkpoint=runs/quickstart-1 'data.paths=[notes.txt]'

`--help` prints more examples and all keys; they are in training/evaluation/config.py and conf/evaluate.yaml.
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
from training.evaluation.config import EvaluateConfig


def evaluate_text(config: EvaluateConfig) -> None:
    """Evaluate on every rank."""
    from training.evaluation.worker import evaluate_on_rank, read_text
    from training.report.terminal import show_line

    expect_library(config.quantize)
    report = show_line if config.format == "text" else None
    on_every_rank(evaluate_on_rank, config, lambda: (read_text(config, report),))


def main() -> None:
    """Run this tool with the command line's arguments. `conf/evaluate.yaml` has its keys."""
    run_tool("evaluate", EvaluateConfig, evaluate_text)


if __name__ == "__main__":
    main()
