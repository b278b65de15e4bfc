"""Measure the best layouts of a plan on this machine, and print which one is the fastest.

    python scripts/tune.py model=small gpus=8 budget=10
    python scripts/tune.py model=mixtral_tiny gpus=2 train.seq_len=128 candidates=2    on two CPU cores

Each candidate is a run of `train.py` with some steps on embedded text, without checkpoints. The directory `out` has the
runs and hardware.json, which `calibration=` of this tool and of scripts/plan.py reads. docs/planning.md explains it.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import ConfigError, expect, require
from common.text import to_json
from moe.config import ModelConfig, RouterConfig
from parallel.config import ParallelConfig
from parallel.planning.hardware import Hardware, preset_of_device, read_preset
from scripts.cli.command_line import run_tool
from scripts.plan import PlanConfig, PlanTrain, find_layouts
from training.run import FORECAST_STEPS

OWN_KEYS = (
    "gpus=", "gpu=", "gpu.", "budget=", "steps=", "candidates=", "out=", "train.", "recompute=", "calibration=",
    "margin=", "verify=", "vocab_size=", "format=", "parallel.", "parallel=",
)  # fmt: skip
"""The start of arguments that are not passed on to the runs as they are."""


@dataclass(frozen=True)
class TuneConfig:
    """The keys of this tool. conf/tune.yaml has the same keys and explains each."""

    model: ModelConfig
    router: RouterConfig
    parallel: ParallelConfig
    gpu: Hardware
    train: PlanTrain
    gpus: int = 2
    budget: float = 10.0
    steps: int = 12
    candidates: int = 3
    out: str = "tune"
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    calibration: str | None = None
    margin: float = 0.05
    verify: int = 1
    vocab_size: int = 4096
    format: Literal["table", "json"] = "table"

    def __post_init__(self) -> None:
        expect(self.budget > 0, "budget", self.budget, "a number of minutes > 0")
        expect(self.steps >= FORECAST_STEPS, "steps", self.steps, f"an integer >= {FORECAST_STEPS}")
        expect(self.candidates >= 1, "candidates", self.candidates, "an integer >= 1")
        self.plan  # noqa: B018  It checks all other keys.

    @property
    def plan(self) -> PlanConfig:
        """The keys as `scripts/plan.py` takes them."""
        return PlanConfig(
            model=self.model,
            router=self.router,
            parallel=self.parallel,
            gpu=self.gpu,
            train=self.train,
            gpus=self.gpus,
            recompute=self.recompute,
            calibration=self.calibration,
            margin=self.margin,
            top=self.candidates,
            verify=self.verify,
            vocab_size=self.vocab_size,
        )


def tune(config: TuneConfig) -> None:
    """Measure the candidates, and print the table and the winner.

    Raises:
        ConfigError: no layout fits, `out` cannot be written, or `gpu` is not what this machine has.
        KeyboardInterrupt: Ctrl-C, after the table of what was measured until then.
    """
    from training.report.planned import show_tuned
    from training.tuning import Measurement, measure, write_calibration

    deadline = time.monotonic() + 60 * config.budget
    config = replace(config, gpu=device_of_this_machine(config.gpu, config.gpus))
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out}: expected a directory that can be written ({error.strerror})") from error
    found = find_layouts(config.plan)
    rows = [Measurement(layout) for layout in found["layouts"]]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    stopped = None
    try:
        for number, row in enumerate(rows, start=1):
            measure(row, arguments_of(config, found["precision"], f"{stamp}-{number}", row), out, deadline)
    except KeyboardInterrupt as error:
        stopped = error
    calibration = write_calibration(config.plan.hardware, rows, out)
    found = {"gpus": config.gpus, "gpu": found["gpu"], "rows": [row.content for row in rows]}
    found["calibration"] = None if calibration is None else str(calibration)
    if config.format == "json":
        print(to_json(found, indent=2))
    else:
        show_tuned(found)
    if stopped is not None:
        raise stopped


def device_of_this_machine(given: Hardware, gpus: int) -> Hardware:
    """Return the kind of the devices on which the candidates run: GPUs if there are enough, or else CPUs.

    Raises:
        ConfigError: `given` is a GPU, and this machine has fewer than `gpus` of them.
    """
    import torch

    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number < gpus:
        fits = given.capability is None
        require(fits, ConfigError, f"gpu={given.name}: expected cpu, because gpus={gpus} and this machine has {number}")
        return given
    if given.capability is not None:
        return given
    about = torch.cuda.get_device_properties(0)
    return read_preset(preset_of_device(about.name, about.major, about.total_memory)[0])


def arguments_of(config: TuneConfig, precision: str, name: str, row: Any) -> list[str]:
    """Return the arguments of `train.py` for a candidate."""
    train = config.train
    # A smaller text is ready sooner.
    text = max(300_000, min(6_000_000, 4 * config.steps * train.global_batch * train.seq_len))
    return [
        *(argument for argument in sys.argv[1:] if not argument.startswith(OWN_KEYS)),
        *row.layout["overrides"],
        f"launch.nproc={config.gpus}",
        f"train.device={'cpu' if config.gpu.capability is None else 'cuda'}",
        f"train.seq_len={train.seq_len}",
        f"train.global_batch={train.global_batch}",
        f"train.precision={precision}",
        f"train.steps={config.steps}",
        "train.log_every=1",
        "data=embedded",
        f"data.vocab_size={config.vocab_size}",
        f"data.code_bytes={text}",
        f"data.prose_bytes={text // 3}",
        f"data.arithmetic_bytes={text // 3}",
        "checkpoint.every=0",
        "checkpoint.at_end=false",
        "tracking=disabled",
        "telemetry.every=0",
        "telemetry.probe_tokens=0",
        "telemetry.forecast=true",
        "run.sample_tokens=0",
        f"run.root={config.out}",
        f"run.name={name}",
    ]


def main() -> None:
    """Run this tool with the command line's arguments. `conf/tune.yaml` has its keys."""
    run_tool("tune", TuneConfig, tune)


if __name__ == "__main__":
    main()
