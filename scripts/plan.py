"""Plan a run before it costs anything: which layout fits, how fast it is, what limits it, what it costs.

    python scripts/plan.py model=mixtral_8x7b gpus=64 gpu=h100 train.seq_len=8192 train.global_batch=1024
    python scripts/plan.py model=mixtral_8x7b gpus=8 gpu=a100-80 parallel.tensor=2 parallel.expert=8
    python scripts/plan.py model=mixtral_8x7b gpus=2 gpu=rtx4090 task=generate

The second line prices one layout, and the third line shows the memory that serving a model takes. No GPU is needed.
docs/planning.md explains each figure, and how well the figures agree with real runs.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import ConfigError, expect, expect_fields, located
from common.strict import from_dict
from common.text import to_json
from moe.config import NO_ADAPTER, AdapterConfig, ModelConfig, RouterConfig
from moe.quantization import FULL_PRECISION, QuantizeConfig, expect_adapters
from parallel.config import ParallelConfig
from parallel.planning.hardware import Hardware, with_rates
from scripts.cli.command_line import compose_config, run_tool

ITEMSIZES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class PlanTrain:
    """The batch and the precision of the run."""

    seq_len: int
    global_batch: int
    accumulation: Literal["auto"] | int
    precision: Literal["auto", "fp32", "bf16"]

    def __post_init__(self) -> None:
        for field in ("seq_len", "global_batch"):
            expect(getattr(self, field) >= 1, field, getattr(self, field), "an integer >= 1")
        number = self.accumulation
        divides = number == "auto" or (number >= 1 and self.global_batch % number == 0)
        expect(divides, "accumulation", number, f"auto, or a divisor of train.global_batch={self.global_batch}")


@dataclass(frozen=True)
class PlanConfig:
    """The keys of this tool. conf/plan.yaml has the same keys and explains each."""

    model: ModelConfig
    router: RouterConfig
    parallel: ParallelConfig
    gpu: Hardware
    train: PlanTrain
    quantize: QuantizeConfig = FULL_PRECISION
    adapter: AdapterConfig = NO_ADAPTER
    gpus: int = 8
    task: Literal["train", "generate"] = "train"
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    skew: str = "balanced"
    document: int | None = None
    calibration: str | None = None
    margin: float = 0.05
    tokens: float | None = None
    top: int = 5
    verify: int = 1
    batch: int = 1
    context: int = 32768
    prefill_chunk: int = 512
    vocab_size: int = 32000
    format: Literal["table", "json"] = "table"
    picture: str | None = None

    def __post_init__(self) -> None:
        for field in ("gpus", "top", "batch", "context", "prefill_chunk", "vocab_size"):
            expect(getattr(self, field) >= 1, field, getattr(self, field), "an integer >= 1")
        picture = self.picture
        expect_fields(
            self,
            verify=(self.verify >= 0, "an integer >= 0"),
            margin=(0 <= self.margin < 1, "a number from 0 to below 1"),
            tokens=(self.tokens is None or self.tokens > 0, "a number > 0, or null"),
            document=(self.document is None or self.document >= 1, "an integer >= 1, or null"),
            picture=(picture is None or picture.endswith((".png", ".svg")), "the name of a .png or .svg file, or null"),
        )
        fixed = self.parallel.recompute
        agree = fixed == "none" or self.recompute in ("auto", fixed)
        expect(agree, "recompute", self.recompute, f"auto or {fixed}, because of parallel.recompute={fixed}")
        try:
            self.router.check(self.model.num_experts, self.model.top_k)
        except ValueError as error:
            raise located(error, "router") from error

    @property
    def whole_model(self) -> ModelConfig:
        """`model`, with its adapters, and with `vocab_size` where the preset leaves the vocabulary to the tokenizer."""
        return replace(self.model.with_adapter(self.adapter), vocab_size=self.model.vocab_size or self.vocab_size)

    @property
    def hardware(self) -> Hardware:
        """The device, with the rates of `calibration`."""
        return self.gpu if self.calibration is None else with_rates(self.gpu, Path(self.calibration))


def plan(config: PlanConfig) -> None:
    """Print the plan, as tables or as JSON."""
    if config.picture is not None and not (directory := Path(config.picture).parent).is_dir():
        raise _unwritable(Path(config.picture), f"{directory} is not a directory")
    if config.task == "generate":
        plan_generation(config)
    else:
        plan_training(config)


def plan_training(config: PlanConfig) -> None:
    """Print the ranked layouts."""
    show(config, find_layouts(config))


def find_layouts(config: PlanConfig) -> dict[str, Any]:
    """Return the ranked layouts (`training.planning.answer.answer`), with the batch.

    Raises:
        ConfigError: the model fits on none of them, or none is possible.
    """
    from training.config import Config
    from training.planning.answer import Budget, answer
    from training.planning.search import RECOMPUTE, Question, nowhere
    from training.planning.skew import read_skew

    model, train, hardware = config.whole_model, config.train, config.hardware
    expect_adapters(config.quantize, model.adapter is not None)
    precision = hardware.precision if train.precision == "auto" else train.precision
    if config.recompute == "auto" and config.parallel.recompute == "none":
        modes = RECOMPUTE
    else:
        modes = (config.parallel.recompute if config.recompute == "auto" else config.recompute,)
    question = Question(
        model=model,
        router=config.router,
        parallel=config.parallel,
        gpus=config.gpus,
        hardware=hardware,
        seq_len=train.seq_len,
        global_batch=train.global_batch,
        accumulation=None if train.accumulation == "auto" else train.accumulation,
        recompute=modes,
        itemsize=ITEMSIZES[precision],
        moments=2,
        margin=config.margin,
        loads=read_skew(config.skew, model.num_moe_layers, model.num_experts or 0),
        quantize=config.quantize,
    )
    base = from_dict(Config, compose_config("config", []))
    sizes = replace(base.train, seq_len=train.seq_len, global_batch=train.global_batch, accumulation=1)
    base = replace(base, model=model, router=config.router, train=sizes, adapter=config.adapter)
    if config.quantize.kind is not None:
        base = replace(base, quantize=config.quantize, run=replace(base.run, init_from="base"))
    try:
        found = answer(
            question,
            base,
            top=config.top,
            verify=config.verify,
            document=config.document,
            budget=Budget(config.tokens, hardware.price),
        )
    except ValueError as error:
        section = "train" if str(error).startswith("global_batch") else "parallel"
        raise (ConfigError(str(error)) if str(error).startswith("gpus") else located(error, section)) from error
    if not found["fits"]:
        raise nowhere(question, found["smallest"])
    return found | {
        "seq_len": train.seq_len,
        "global_batch": train.global_batch,
        "precision": precision,
        "skew": config.skew,
    }


def show(config: PlanConfig, found: dict[str, Any]) -> None:
    """Draw the picture, and print what was found."""
    from training.report.plan_picture import plot_plan
    from training.report.planned import show_plan

    if config.picture is not None:
        path = Path(config.picture)
        try:
            plot_plan(found, path)
        except OSError as error:
            raise _unwritable(path, error.strerror or str(error)) from error

    if config.format == "json":
        print(to_json(found, indent=2))
    else:
        show_plan(found, sys.argv[1:])


def _unwritable(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"picture={path}: expected a file that can be written ({reason})")


def plan_generation(config: PlanConfig) -> None:
    """Print the memory that serving the model takes."""
    from training.planning.serving import serving_figures
    from training.report.planned import show_serving

    found = serving_figures(
        config.whole_model,
        config.router,
        config.gpus,
        config.hardware,
        quantize=config.quantize,
        batch=config.batch,
        context=config.context,
        prefill_chunk=config.prefill_chunk,
        margin=config.margin,
    )
    if config.format == "json":
        print(to_json(found, indent=2))
    else:
        show_serving(found)


def main() -> None:
    """Run this tool with the command line's arguments. `conf/plan.yaml` has its keys."""
    run_tool("plan", PlanConfig, plan)


if __name__ == "__main__":
    main()
