"""The whole configuration of a run: one frozen dataclass per section, mirrored name for name by `conf/`.

Each section validates its own fields. `Config` validates the combinations of two sections.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.errors import ConfigError, expect, expect_fields, located, require
from common.strict import FreeText
from data.config import DataConfig
from moe.config import NO_ADAPTER, AdapterConfig, ModelConfig, RouterConfig
from moe.quantization import FULL_PRECISION, QuantizeConfig
from parallel.config import ParallelConfig
from training.checkpoint.remote_files import check_url
from training.optimizer import OPTIMIZERS
from training.schedule import SCHEDULES


@dataclass(frozen=True)
class RunConfig:
    """The run's name, its directory, and how it starts."""

    experiment: str
    """The start of a run's default name. `null` in a preset: the name of the model's preset or of `init_from`."""
    name: str | None = None
    """`null`: `<experiment>-<n>` with the next free n. An explicit name resumes the run of that name."""
    root: str = "runs"
    """Directory of the runs."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, the router's noise and sampling."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto`: continue from the newest checkpoint if the run has one; `never`, `must`: fail if it has one, or none."""
    init_from: str | None = None
    """Model directory (a run, a checkpoint, Hugging Face or Mistral) whose weights the first step starts from. The
    section `model`, the router's keys that belong to the weights and, if none is given, the tokenizer are taken from
    it."""
    deterministic: bool = False
    """Refuse kernels whose result depends on timing. Slower on GPUs; CPU kernels are always deterministic."""
    prompt: FreeText = "The "
    """Text that the model continues when training ends."""
    sample_tokens: int = 96
    """Tokens generated from `prompt` when training ends; 0 for none."""

    def __post_init__(self) -> None:
        for field, name in (("experiment", self.experiment), ("name", self.name)):
            expect(
                name is None or _is_path_below(name),
                field,
                repr(name),
                "the name of a directory below run.root: printable characters, no '.' or '..', no space at the ends",
            )
        expect(self.init_from != "", "init_from", "''", "a directory, or null")
        expect_fields(
            self,
            seed=(0 <= self.seed < 2**63, "an integer from 0 to 2**63 - 1"),
            sample_tokens=(self.sample_tokens >= 0, "an integer >= 0"),
            resume=(self.resume != "must" or name is not None, "an explicit run.name beside it"),
        )


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and precision. Batch sizes are global, so the layout changes no number."""

    steps: int
    """Optimizer steps of the whole run."""
    seq_len: int
    """Tokens of a sequence, which is one packed row."""
    global_batch: int
    """Sequences per optimizer step, over all ranks and micro-batches."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    precision: Literal["auto", "fp64", "fp32", "bf16"] = "auto"
    """Precision of the forward and backward pass. `auto`: bf16 if the hardware supports it, else fp32.
    Weights and optimizer state are fp32 (fp64 with `fp64`)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: GPUs if this host has one for each of its ranks, else CPUs."""
    compile: Literal["auto"] | bool = "auto"
    """Whether blocks run through torch.compile. `auto`: on GPUs. Compilation takes a minute or so, once per machine and
    model; results can differ from those of uncompiled blocks by rounding."""
    log_every: int = 10
    """Steps between rows, which are printed and written to `metrics.jsonl`; the first and the last step have one."""
    eval_every: int = 0
    """Steps between evaluations on held-out text; 0: only at the end."""
    peak_tflops: float | None = None
    """Peak of one device at this precision in TFLOP/s, for `speed/mfu`; `null`: a table of GPUs, else no MFU."""
    profile: bool = False
    """Trace three steps after the first ones on rank 0, and write where their time goes (`profile.md`)."""

    def __post_init__(self) -> None:
        for field in ("steps", "seq_len", "global_batch", "accumulation", "log_every"):
            expect(getattr(self, field) >= 1, field, getattr(self, field), "an integer >= 1")
        divides = self.global_batch % self.accumulation == 0
        expect_fields(
            self,
            eval_every=(self.eval_every >= 0, "an integer >= 0 (0: only at the end)"),
            accumulation=(divides, f"a divisor of train.global_batch={self.global_batch}"),
            peak_tflops=(self.peak_tflops is None or self.peak_tflops > 0, "a number > 0, or null"),
        )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    lr: float
    """Highest learning rate of the schedule."""
    kind: str = "adamw"
    """`adamw` (arXiv 1711.05101), or an optimizer that a plugin registers."""
    train: str | tuple[str, ...] = "all"
    """The parameters that train: `all`, `router`, `experts`, `expert:3` (expert 3 of every MoE layer), a glob over
    parameter names, or a list of these. All others keep their weights, bit for bit, and have no optimizer state. With
    adapters, these train too, and `all` stands for them alone."""
    beta1: float = 0.9
    """Decay of AdamW's mean of the gradients."""
    beta2: float = 0.95
    """Decay of AdamW's mean of the squared gradients."""
    eps: float = 1e-8
    """The number that AdamW adds to the denominator."""
    weight_decay: float = 0.1
    """Applies to matrices, not to norms."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this; `null`: no clipping."""
    schedule: str = "cosine"
    """`cosine`, `wsd` (warm-up, stable, decay), `constant`, or a schedule that a plugin registers."""
    schedule_steps: int | None = None
    """Length of the schedule with its warm-up. Later steps train with the rate of its last step. `null`: the
    `train.steps` of the first launch, which a resumed run keeps."""
    schedule_start: int | None = None
    """The step after which the schedule begins. A resumed run can begin a new schedule here, with a new warm-up.
    `null`: 0, or what the resumed run had."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; `null`: a twentieth of the schedule."""
    decay_steps: int | None = None
    """`wsd` only: steps of the final linear decay; `null`: a tenth of the schedule."""
    min_lr_ratio: float = 0.1
    """The schedule ends at this share of `lr`."""

    def __post_init__(self) -> None:
        expect(self.lr > 0, "lr", self.lr, "a number > 0")
        OPTIMIZERS.check(self.kind)
        SCHEDULES.check(self.schedule)
        named = (self.train,) if isinstance(self.train, str) else self.train
        shown = repr(self.train) if isinstance(self.train, str) else f"[{','.join(named)}]"
        expect(bool(named) and all(named), "train", shown, "all, router, experts, expert:<index>, a glob, or a list")
        expect_fields(
            self,
            beta1=(0 <= self.beta1 < 1, "a number in [0, 1)"),
            beta2=(0 <= self.beta2 < 1, "a number in [0, 1)"),
            eps=(self.eps > 0, "a number > 0"),
            weight_decay=(self.weight_decay >= 0, "a number >= 0"),
            max_grad_norm=(self.max_grad_norm is None or self.max_grad_norm > 0, "a number > 0, or null"),
            schedule_steps=(self.schedule_steps is None or self.schedule_steps >= 1, "an integer >= 1, or null"),
            schedule_start=(self.schedule_start is None or self.schedule_start >= 0, "an integer >= 0, or null"),
            warmup_steps=(self.warmup_steps is None or self.warmup_steps >= 0, "an integer >= 0, or null"),
            decay_steps=(self.decay_steps is None or self.decay_steps >= 0, "an integer >= 0, or null"),
            min_lr_ratio=(0 <= self.min_lr_ratio <= 1, "a number in [0, 1]"),
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Number of newest intact checkpoints to keep; at least two, so that a damaged newest one is not the only one."""
    at_end: bool = True
    """Whether to write a checkpoint after the last step. Without it, the weights of a short trial are lost."""
    io_timeout_s: float = 300.0
    """Seconds without any progress after which reading or writing a checkpoint has failed, and the run ends."""
    background: bool = False
    """Whether training waits only while a checkpoint is copied to the CPU's memory, and a thread writes it. The copy
    takes as much memory as this rank's part of the weights and the optimizer state."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this number are kept for ever; 0: none."""
    keep_best: int = 0
    """Number of checkpoints with the lowest held-out loss that are kept beside the newest. It counts checkpoints after
    whose step the model was evaluated (`train.eval_every`)."""
    on_error: Literal["stop", "warn"] = "stop"
    """What happens if a checkpoint cannot be written, e.g. because the disk is full. `stop`: the run ends; `warn`: a
    line says so, and the run goes on."""
    remote: str | None = None
    """URL of a directory in a store, e.g. `s3://bucket/runs`. Every checkpoint is also copied to
    `<url>/<run.name>/checkpoints`, and a run whose directory is lost continues from there (docs/runs.md). `null`:
    none."""

    def __post_init__(self) -> None:
        expect_fields(
            self,
            io_timeout_s=(self.io_timeout_s > 0, "seconds > 0"),
            keep_every=(self.keep_every >= 0, "an integer >= 0 (0: none)"),
            keep_best=(self.keep_best >= 0, "an integer >= 0 (0: none)"),
            on_error=(self.on_error in ("stop", "warn"), "stop or warn"),
            every=(self.every >= 0, "an integer >= 0 (0: only at the end)"),
            keep=(self.keep >= 2, "an integer >= 2"),
        )
        if self.remote is not None:
            check_url("remote", self.remote)


@dataclass(frozen=True)
class HealthConfig:
    """What a run does if its figures show that something is wrong (docs/reliability.md)."""

    every: int = 200
    """Steps between comparisons of the weights and moments that several ranks store. They are also compared before each
    checkpoint. 0: never."""
    recheck_every: int = 0
    """Steps between steps whose gradients are computed twice and compared bit for bit. The run ends if they differ.
    GPUs need `run.deterministic=true`. 0: never."""
    on_nan: Literal["stop", "rewind"] = "stop"
    """After five steps in a row whose gradient norm is not finite: end the run, or go back to the last checkpoint and
    skip the rows of these steps and of the step before them."""
    on_spike: Literal["warn", "rewind"] = "warn"
    """If the loss jumps: print a warning, or go back to the last checkpoint and skip the rows of this step and of the
    step before it."""
    spike_z: float | None = 10.0
    """The robust z-score, among the losses of the last 64 steps, from which a loss counts as a jump; `null`: none."""
    dead_steps: int = 50
    """Steps without a token after which an expert is dead, which is an alarm. If it is half of the experts of a layer,
    half as many steps. 0: none."""
    max_vio: float | None = 0.9
    """The share of its largest value E/k - 1 from which `router/max_vio` of a layer is an alarm; `null`: none."""
    logit_range: float | None = 30.0
    """The range of a router's logits (also the root of its z-loss) from which its growth is an alarm; `null`: none."""
    entropy: float | None = 0.05
    """The entropy of a router's probabilities, over ln E, below which its fall is an alarm; `null`: none."""

    def __post_init__(self) -> None:
        expect_fields(
            self,
            every=(self.every >= 0, "an integer >= 0 (0: never)"),
            recheck_every=(self.recheck_every >= 0, "an integer >= 0 (0: never)"),
            spike_z=(self.spike_z is None or self.spike_z > 0, "a number > 0, or null"),
            dead_steps=(self.dead_steps >= 0, "an integer >= 0 (0: none)"),
            max_vio=(self.max_vio is None or 0 < self.max_vio <= 1, "a number in (0, 1], or null"),
            logit_range=(self.logit_range is None or self.logit_range > 0, "a number > 0, or null"),
            entropy=(self.entropy is None or 0 < self.entropy <= 1, "a number in (0, 1], or null"),
        )


MAX_PROBE_TOKENS = 2**15
"""The largest `telemetry.probe_tokens`."""


@dataclass(frozen=True)
class TelemetryConfig:
    """What a run records about its routers and experts besides the metrics of every row (docs/losses.md)."""

    every: int = 50
    """Steps between rows with the norms of routers and experts and the straggler factors, which are also in the row of
    the last step; 0: never."""
    probe_tokens: int = 2048
    """Held-out tokens, spread evenly over the domains, whose routing is stored at step 0, after powers of 2, before
    each checkpoint and at the end; 0: none."""
    forecast: bool = True
    """Whether a run of at least 10 steps compares its memory and its step time with a prediction, which a process of
    low priority makes beside rank 0."""

    def __post_init__(self) -> None:
        most = MAX_PROBE_TOKENS
        expect_fields(
            self,
            every=(self.every >= 0, "an integer >= 0 (0: never)"),
            probe_tokens=(0 <= self.probe_tokens <= most, f"an integer from 0 (no probe) to {most}"),
        )


@dataclass(frozen=True)
class TrackingConfig:
    """Where a run's figures are shown besides `metrics.jsonl`."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases: into files of the run's directory, also to the server, or not at all."""
    project: str = "mixwright"
    """The project's name in Weights & Biases."""
    entity: str | None = None
    """The user or team in Weights & Biases; `null`: the default of the account."""
    group: str | None = None
    """The group of the run in Weights & Biases; `null`: the name of its sweep, if it is a job of one."""
    job_type: str = "train"
    """The run's type within its group."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    notes: FreeText | None = None
    """A text about the run, e.g. what it is for."""
    diff: bool = False
    """Whether Weights & Biases also gets the uncommitted changes of this checkout (`code.diff`)."""
    tensorboard: bool = False
    """Whether to write event files for TensorBoard (`<run>/tensorboard`). It needs the extra `[tensorboard]`."""
    csv: bool = False
    """Whether to write `<run>/metrics.csv`."""
    per_expert: bool = False
    """Whether trackers also get one number for each expert and layer. Without it, W&B and TensorBoard show a heatmap of
    the experts for each layer."""
    trackers: tuple[str, ...] = ()
    """Further trackers, by the names under which plugins register them."""

    def __post_init__(self) -> None:
        tags = all(1 <= len(tag) <= 64 for tag in self.tags)
        expect(tags, "tags", f"[{','.join(self.tags)}]", "tags of 1 to 64 characters")
        group = self.group is None or 1 <= len(self.group) <= 128
        expect(group, "group", repr(self.group), "a name of 1 to 128 characters, or null")


@dataclass(frozen=True)
class EngineConfig:
    """The engine, which stores weights, gradients and optimizer state."""

    kind: Literal["native", "deepspeed"] = "native"
    """`native`: PyTorch's AdamW and every parallel axis; `deepspeed`: ZeRO (docs/deepspeed.md)."""
    zero_stage: Literal[1, 2, 3] = 2
    """`deepspeed` only: what is partitioned over the ranks that have the same weights (arXiv 1910.02054). 1: optimizer
    state; 2: also gradients; 3: also weights."""
    ds_config: str | None = None
    """`deepspeed` only: path of a JSON file in DeepSpeed's format, for the keys that Mixwright does not set; `null`:
    none."""

    def __post_init__(self) -> None:
        expect_fields(
            self,
            kind=(self.kind in ("native", "deepspeed"), "native or deepspeed"),
            zero_stage=(self.zero_stage in (1, 2, 3), "one of 1, 2, 3"),
        )
        expect(self.ds_config != "", "ds_config", "''", "a JSON file of DeepSpeed's, or null")
        expect(
            self.ds_config is None or self.kind == "deepspeed", "ds_config", self.ds_config, "null with engine=native"
        )


NATIVE = EngineConfig()
HEALTHY = HealthConfig()
TELEMETRY = TelemetryConfig()


@dataclass(frozen=True)
class LaunchConfig:
    """The processes. Without torchrun and deepspeed, which start their own, `python train.py` starts them."""

    nproc: int = 1
    """Number of worker processes."""
    max_restarts: int = 0
    """How often all workers are restarted after one of them failed."""
    threads: int | None = None
    """CPU threads per process, under every launcher. `null`: the number in the environment (MKL_NUM_THREADS or
    OMP_NUM_THREADS), or without one the usable cores divided by the processes of this machine."""

    def __post_init__(self) -> None:
        expect_fields(
            self,
            nproc=(self.nproc >= 1, "an integer >= 1"),
            max_restarts=(self.max_restarts >= 0, "an integer >= 0"),
            threads=(self.threads is None or self.threads >= 1, "an integer >= 1, or null"),
        )


@dataclass(frozen=True)
class Config:
    """The configuration of a run: every key of `python train.py`."""

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
    health: HealthConfig = HEALTHY
    telemetry: TelemetryConfig = TELEMETRY
    quantize: QuantizeConfig = FULL_PRECISION
    adapter: AdapterConfig = NO_ADAPTER
    plugins: tuple[str, ...] = ()
    """Python modules to import before anything else: paths of `.py` files, entry points of `mixwright.plugins`, or
    module names. They register routers, corpora, optimizers and so on (docs/extending.md)."""

    def __post_init__(self) -> None:
        # The model has the adapters of the section `adapter`, wherever its configuration comes from.
        object.__setattr__(self, "model", self.model.with_adapter(self.adapter))
        try:
            self.router.check(self.model.num_experts, self.model.top_k)
        except ValueError as error:
            raise located(error, "router") from error
        expect(
            self.data.heldout_fraction < 1,
            "data.heldout_fraction",
            self.data.heldout_fraction,
            "a number below 1 (there must be text to train on)",
        )
        expect(
            not (self.model.expert_kernel == "grouped" and self.train.precision == "fp64"),
            "model.expert_kernel",
            "grouped",
            "auto or loop with train.precision=fp64 (torch's grouped matmul has no fp64)",
        )
        expect(
            self.quantize.kind is None or self.engine.kind == "native",
            "engine.kind",
            self.engine.kind,
            f"native with quantize.kind={self.quantize.kind}",
        )
        expect(
            self.quantize.kind is None or not self.adapter.dora,
            "adapter.dora",
            True,
            f"false with quantize.kind={self.quantize.kind} (the length of a row needs the row in full precision)",
        )
        expect(
            self.engine.kind == "native" or self.optim.kind == "adamw",
            "optim.kind",
            self.optim.kind,
            "adamw with engine=deepspeed",
        )
        expect(
            self.checkpoint.keep_best == 0 or self.train.eval_every > 0,
            "checkpoint.keep_best",
            self.checkpoint.keep_best,
            "0 with train.eval_every=0 (no checkpoint but the last would have a held-out loss)",
        )
        expect(
            self.engine.kind == "native" or not self.health.recheck_every,
            "health.recheck_every",
            self.health.recheck_every,
            "0 with engine=deepspeed",
        )
        expect(
            self.checkpoint.remote is None or self.run.name is not None,
            "run.name",
            None,
            "the name of the run with checkpoint.remote (a run finds its checkpoints there by its name)",
        )
        length = "train.steps" if self.optim.schedule_steps is None else "optim.schedule_steps"
        steps = self.optim.schedule_steps or self.train.steps
        expect(
            (self.optim.warmup_steps or 0) <= steps,
            "optim.warmup_steps",
            self.optim.warmup_steps,
            f"at most {length}={steps}",
        )


def _is_path_below(name: str) -> bool:
    """Whether `name` can be the path of a directory below another directory."""
    return not {"", ".", ".."} & set(name.split("/")) and name.isprintable() and name == name.strip()


def with_vocabulary(model: ModelConfig, tokenizer_ids: int) -> ModelConfig:
    """`model`, with the tokenizer's vocabulary size if its own is null.

    Raises:
        ConfigError: the model has fewer token ids than the tokenizer.
    """
    if model.vocab_size is None:
        return replace(model, vocab_size=tokenizer_ids)
    require(
        model.vocab_size >= tokenizer_ids,
        ConfigError,
        f"model.vocab_size={model.vocab_size}: expected at least {tokenizer_ids}, the ids of the tokenizer (a "
        "token id beyond the vocabulary has no embedding), or null to take its size",
    )
    return model
