"""The whole configuration of a run: one frozen dataclass a section, mirrored name for name by `conf/`.

Sections validate their own fields; `Config` validates what only two sections together can know.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.checks import expect
from common.errors import ConfigError
from common.strict import located
from data.config import DataConfig
from moe.config import ModelConfig, RouterConfig
from parallel.config import ParallelConfig


@dataclass(frozen=True)
class RunConfig:
    """What the run is called, where it lies, and how it starts."""

    experiment: str
    name: str | None = None
    """`null`: `<experiment>-<n>` with the next free n. An explicit name resumes the run of that name."""
    root: str = "runs"
    seed: int = 0
    resume: Literal["auto", "never", "must"] = "auto"
    init_from: str | None = None
    """Directory of a model (a run, a checkpoint, Hugging Face, Mistral) whose weights the first step starts from. The
    section `model`, the router's meaning and, if none is given, the tokenizer are that model's."""
    deterministic: bool = False
    """Refuse kernels whose result depends on timing (costs speed on GPUs; CPU kernels always repeat)."""
    prompt: str = "The "
    sample_tokens: int = 96
    """Tokens generated from `prompt` when training ends; 0 for none."""

    def __post_init__(self) -> None:
        name = self.name
        legal = name is None or (bool(name) and all(c.isalnum() or c in "._-/" for c in name) and ".." not in name)
        expect(
            legal and not str(name).startswith("/"), "name", repr(name), "letters, digits, '.', '_', '-', '/', no '..'"
        )
        expect(0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2**63 - 1")
        expect(self.init_from != "", "init_from", "''", "a directory, or null")
        expect(self.sample_tokens >= 0, "sample_tokens", self.sample_tokens, "an integer >= 0")
        expect(self.resume != "must" or name is not None, "resume", self.resume, "an explicit run.name beside it")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and precision. Batches are global: the layout changes no number."""

    steps: int
    seq_len: int
    global_batch: int
    """Sequences per optimizer step, over all ranks and micro-batches."""
    accumulation: int = 1
    """Micro-batches an optimizer step is cut into."""
    precision: Literal["auto", "fp64", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass. `auto`: bf16 where the hardware has it, else fp32.
    Weights and optimizer state are fp32 (fp64 under `fp64`)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = 10
    eval_every: int = 0
    """Steps between evaluations on held-out text; 0: only at the end."""
    peak_tflops: float | None = None
    """Peak of one device at this precision, for `speed/mfu`; `null`: known for some GPUs, else no MFU."""

    def __post_init__(self) -> None:
        for field in ("steps", "seq_len", "global_batch", "accumulation", "log_every"):
            expect(getattr(self, field) >= 1, field, getattr(self, field), "an integer >= 1")
        expect(self.eval_every >= 0, "eval_every", self.eval_every, "an integer >= 0 (0: only at the end)")
        expect(
            self.global_batch % self.accumulation == 0,
            "accumulation",
            self.accumulation,
            f"a divisor of train.global_batch={self.global_batch}",
        )
        peak = self.peak_tflops
        expect(peak is None or peak > 0, "peak_tflops", peak, "a number > 0, or null")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) and its learning-rate schedule."""

    lr: float
    train: str | tuple[str, ...] = "all"
    """What trains: `all`, `router`, `experts`, `expert:3` (number 3 of every MoE layer), a glob over parameter names,
    or a list of these. Everything else keeps its weights, bit for bit, and has no optimizer state."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only: never on norms."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this; `null`: no clipping."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int | None = None
    """Steps of linear warm-up; `null`: a twentieth of the run."""
    decay_steps: int | None = None
    """`wsd` only: steps of the final linear decay; `null`: a tenth of the run."""
    min_lr_ratio: float = 0.1
    """The schedule ends at this share of `lr`."""

    def __post_init__(self) -> None:
        expect(self.lr > 0, "lr", self.lr, "a number > 0")
        named = (self.train,) if isinstance(self.train, str) else self.train
        shown = repr(self.train) if isinstance(self.train, str) else f"[{','.join(named)}]"
        expect(bool(named) and all(named), "train", shown, "all, router, experts, expert:<index>, a glob, or a list")
        for field in ("beta1", "beta2"):
            expect(0 <= getattr(self, field) < 1, field, getattr(self, field), "a number in [0, 1)")
        expect(self.eps > 0, "eps", self.eps, "a number > 0")
        expect(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")
        norm, warmup, decay = self.max_grad_norm, self.warmup_steps, self.decay_steps
        expect(norm is None or norm > 0, "max_grad_norm", norm, "a number > 0, or null")
        expect(warmup is None or warmup >= 0, "warmup_steps", warmup, "an integer >= 0, or null")
        expect(decay is None or decay >= 0, "decay_steps", decay, "an integer >= 0, or null")
        expect(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "a number in [0, 1]")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints kept; at least two, so that a damaged newest one is not the only one."""

    def __post_init__(self) -> None:
        expect(self.every >= 0, "every", self.every, "an integer >= 0 (0: only at the end)")
        expect(self.keep >= 2, "keep", self.keep, "an integer >= 2")


@dataclass(frozen=True)
class TrackingConfig:
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "mixwright"
    entity: str | None = None


@dataclass(frozen=True)
class EngineConfig:
    """Who owns weights, gradients and optimizer state."""

    kind: Literal["native", "deepspeed"] = "native"
    zero_stage: Literal[1, 2, 3] = 2
    """`deepspeed` only: what is partitioned over the ranks that hold the same weights (arXiv 1910.02054). 1: optimizer
    state; 2: gradients, too; 3: weights, too."""
    ds_config: str | None = None
    """`deepspeed` only: path of a JSON file in DeepSpeed's format, for what Mixwright leaves to it; `null`: none."""

    def __post_init__(self) -> None:
        expect(self.kind in ("native", "deepspeed"), "kind", self.kind, "native or deepspeed")
        expect(self.zero_stage in (1, 2, 3), "zero_stage", self.zero_stage, "one of 1, 2, 3")
        expect(self.ds_config != "", "ds_config", "''", "a JSON file of DeepSpeed's, or null")
        expect(
            self.ds_config is None or self.kind == "deepspeed", "ds_config", self.ds_config, "null with engine=native"
        )


NATIVE = EngineConfig()


@dataclass(frozen=True)
class LaunchConfig:
    """Used when `python train.py` starts the workers itself; torchrun and deepspeed bring their own."""

    nproc: int = 1
    max_restarts: int = 0
    threads: int | None = None
    """CPU threads of one process; `null`: the cores divided by the processes."""

    def __post_init__(self) -> None:
        expect(self.nproc >= 1, "nproc", self.nproc, "an integer >= 1")
        expect(self.max_restarts >= 0, "max_restarts", self.max_restarts, "an integer >= 0")
        expect(self.threads is None or self.threads >= 1, "threads", self.threads, "an integer >= 1, or null")


@dataclass(frozen=True)
class Config:
    run: RunConfig
    model: ModelConfig
    router: RouterConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    launch: LaunchConfig
    engine: EngineConfig = NATIVE
    plugins: tuple[str, ...] = ()
    """Python modules to import before anything else: paths of `.py` files, entry points of `mixwright.plugins`, or
    module names. They register routers, corpora, optimizers and so on (docs/extending.md)."""

    def __post_init__(self) -> None:
        try:
            self.router.check(self.model.num_experts, self.model.top_k)
        except ValueError as error:
            raise located(error, "router") from error
        expect(
            not (self.model.expert_kernel == "grouped" and self.train.precision == "fp64"),
            "model.expert_kernel",
            "grouped",
            "auto or loop with train.precision=fp64 (torch's grouped matmul has no fp64)",
        )
        expect(
            (self.optim.warmup_steps or 0) <= self.train.steps,
            "optim.warmup_steps",
            self.optim.warmup_steps,
            f"at most train.steps={self.train.steps}",
        )


def with_vocabulary(model: ModelConfig, tokenizer_ids: int) -> ModelConfig:
    """`model` with its vocabulary taken from the tokenizer where it is null.

    Raises:
        ConfigError: the model knows fewer ids than the tokenizer makes.
    """
    if model.vocab_size is None:
        return replace(model, vocab_size=tokenizer_ids)
    if model.vocab_size < tokenizer_ids:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: expected at least {tokenizer_ids}, the ids of the tokenizer (a "
            "token id beyond the vocabulary has no embedding), or null to take its size"
        )
    return model
