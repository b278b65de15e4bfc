"""Check that every layout computes what one process computes, on the machines at hand.

    python scripts/parity.py layouts=all launch.nproc=4
    python scripts/parity.py layouts=expert,tensor models=mixtral,switch launch.nproc=2
    python scripts/parity.py layouts=tensor=2+expert=4,pipeline=2+schedule=zero_bubble models=all launch.nproc=4
    python scripts/parity.py model=mixtral_tiny router=switch launch.nproc=2
    python scripts/parity.py model=mixtral_tiny router=softmax_topk router.kind=mine plugins=[my_router.py]
    python scripts/parity.py layouts=all launch.nproc=8

Exit status 0: all differences are within the tolerance; 1: some are not. docs/parity.md explains the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from common.errors import expect
from data.config import DataConfig
from moe.config import NO_ADAPTER, AdapterConfig, ModelConfig, RopeScaling, RouterConfig
from moe.quantization import FULL_PRECISION, QuantizeConfig
from parallel.config import ParallelConfig
from training.config import (
    CheckpointConfig,
    Config,
    EngineConfig,
    LaunchConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)

Precision = Literal["fp64", "fp32"]
EngineKind = Literal["native", "deepspeed-1", "deepspeed-2", "deepspeed-3"]
"""The number is the ZeRO stage."""
ENGINES: tuple[EngineKind, ...] = get_args(EngineKind)

LENGTH, VOCABULARY, ACCUMULATION, STEPS, SEED = 16, 40, 4, 5, 3
"""Tokens of a row, token ids in the data, micro-batches of a step, optimizer steps, and the seed of a run."""
MODEL = ModelConfig(
    dim=16, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=4, hidden_dim=16, num_experts=8, top_k=2,
    vocab_size=VOCABULARY, sliding_window=5, init_std=0.2, expert_kernel="loop",
)  # fmt: skip
OPTIM = OptimConfig(lr=5e-3, warmup_steps=2, max_grad_norm=0.5)
ONE_PROCESS = ParallelConfig(expert=1)
COVER, EVERY = "cover", "all"
"""Values of `models` that name no model: one model for each layout in turn, and every model under every layout."""
GIVEN = "given"
"""The name of the model that the user gives with `model=`."""


@dataclass(frozen=True)
class Case:
    """A model to train, with its router."""

    model: ModelConfig
    router: RouterConfig
    train: str | tuple[str, ...] = "all"
    """What trains, as `optim.train` says it."""
    quantize: QuantizeConfig = FULL_PRECISION
    """The weights that are stored in few bits."""
    last_expert_idle: bool = False
    """Whether the routers are initialised so that the last expert gets no token before the first update."""


MIXTRAL = Case(MODEL, RouterConfig(balance_coef=0.05, z_coef=0.01), last_expert_idle=True)
CASES: Mapping[str, Case] = {
    "mixtral": MIXTRAL,
    "capacity": Case(
        replace(MODEL, sliding_window=None),
        RouterConfig(balance_coef=0.05, capacity_factor=0.75, balance_scope="sequence"),
    ),
    "deepseek": Case(
        replace(MODEL, top_k=3, expert_hidden_dim=8, num_shared_experts=2, first_k_dense=1, expert_kernel="auto"),
        RouterConfig(
            kind="sigmoid_topk", scale=2.5, num_groups=4, topk_groups=2, bias_update_rate=0.01, balance_scope="sequence"
        ),
    ),
    "latent": Case(
        replace(MODEL, num_shared_experts=1, first_k_dense=1, num_kv_heads=8, kv_lora_rank=7, q_lora_rank=9,
                qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=5, head_dim=7, sliding_window=(5, None),
                rope_scaling=RopeScaling("yarn", 4.0, 8, mscale=0.7, mscale_all_dim=0.7)),
        RouterConfig(balance_coef=0.05),
    ),
    "switch": Case(
        replace(MODEL, top_k=1, ffn="geglu", expert_ffn="relu", moe_every=2, tie_embeddings=True, sliding_window=None),
        RouterConfig(jitter=0.1, capacity_factor=1.25, layer_reduction="sum"),
    ),
    "expert_choice": Case(
        replace(MODEL, sliding_window=None),
        RouterConfig(kind="expert_choice", allow_noncausal=True, balance_coef=0.0),
    ),
    "pooled": Case(
        replace(MODEL, sliding_window=(3, None), expert_ffn="gelu"),
        RouterConfig(layer_reduction="hf_pooled", balance_coef=0.05, capacity_factor=0.75, drop_policy="prob",
                     allow_noncausal=True),
    ),
    "uneven": Case(
        replace(MODEL, num_kv_heads=2, hidden_dim=13, expert_hidden_dim=7, num_shared_experts=1, first_k_dense=1,
                vocab_size=VOCABULARY + 1),
        RouterConfig(balance_coef=0.05, z_coef=0.01),
    ),
    "multi_query": Case(
        replace(MODEL, num_kv_heads=1, vocab_size=VOCABULARY + 3, tie_embeddings=True, sliding_window=None),
        RouterConfig(balance_coef=0.05),
    ),
    "head_norm": Case(
        replace(MODEL, qk_norm="head", attention_bias="qkv", num_kv_heads=1),
        RouterConfig(balance_coef=0.05, layer_reduction="sum"),
    ),
    "width_norm": Case(
        replace(MODEL, qk_norm="width", attention_bias="all", num_kv_heads=2, sliding_window=None,
                num_shared_experts=1, shared_hidden_dim=11, shared_gate=True, rotary_dim=2,
                rope_scaling=RopeScaling("yarn", 4.0, original_positions=8)),
        RouterConfig(balance_coef=0.05, normalize=False),
    ),
    "partly_frozen": replace(MIXTRAL, train=("router", "expert:3")),
    "adapters": Case(
        replace(MODEL, num_shared_experts=1, shared_gate=True, first_k_dense=1, expert_kernel="auto", qk_norm="head",
                attention_bias="all", adapter=AdapterConfig(kind="lora", rank=3, targets=("*",), scaling="rslora")),
        RouterConfig(balance_coef=0.05),
        train="*norm.weight",
    ),
    "quantised": Case(
        replace(MODEL, num_shared_experts=1, first_k_dense=1, expert_hidden_dim=7,
                adapter=AdapterConfig(kind="lora", rank=2, targets=("attention", "router", "experts"))),
        RouterConfig(balance_coef=0.05),
        train="layers.*norm.weight",
        quantize=QuantizeConfig("nf4", block_size=32),
    ),
    "latent_adapters": Case(
        replace(MODEL, num_kv_heads=8, kv_lora_rank=7, q_lora_rank=9, qk_nope_head_dim=3, qk_rope_head_dim=4,
                v_head_dim=5, head_dim=7, sliding_window=None,
                adapter=AdapterConfig(kind="lora", rank=3, targets=("attention", "experts.w_down"))),
        RouterConfig(balance_coef=0.05),
    ),
    "dora": Case(
        replace(MODEL, num_kv_heads=2, hidden_dim=13, expert_hidden_dim=7, num_shared_experts=1,
                adapter=AdapterConfig(kind="lora", rank=3, targets=("attention", "router", "shared"), dora=True,
                                      dropout=0.2)),
        RouterConfig(balance_coef=0.05),
    ),
}  # fmt: skip
"""The built-in models by name. Tensor parallelism does not divide the vocabulary of `uneven` and `multi_query`, nor the
hidden widths of `uneven` and `dora`. In `partly_frozen`, most ranks store no expert that trains if the experts are
spread."""


def rows_for(world_size: int) -> int:
    """Return a number of rows per step that any number of data ranks in a world of this size divides evenly."""
    return ACCUMULATION * world_size * -(-4 // world_size)


def configuration(
    case: Case,
    parallel: ParallelConfig,
    *,
    rows: int,
    steps: int = STEPS,
    precision: Precision = "fp64",
    engine: EngineKind = "native",
) -> Config:
    """Return the configuration with which `train.py` would train `case` under a layout.

    Args:
        rows: sequences per optimizer step, over all ranks and micro-batches.

    Raises:
        ConfigError: the model, the router and the precision do not go together.
    """
    kind, _, stage = engine.partition("-")
    return Config(
        run=RunConfig(experiment="parity", seed=SEED),
        model=case.model,
        router=case.router,
        data=DataConfig(kind="embedded"),
        train=TrainConfig(
            steps=steps, seq_len=LENGTH, global_batch=rows, accumulation=ACCUMULATION, precision=precision
        ),
        optim=replace(OPTIM, train=case.train),
        parallel=parallel,
        engine=EngineConfig(kind, int(stage)) if stage else EngineConfig(),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(),
        tracking=TrackingConfig(wandb="disabled"),
        launch=LaunchConfig(),
        quantize=case.quantize,
        adapter=case.model.adapter or NO_ADAPTER,
    )


@dataclass(frozen=True)
class ParityConfig:
    """The keys of `scripts/parity.py`. conf/parity.yaml has the same keys and explains each."""

    layouts: str = "all"
    models: str = COVER
    engines: str = "native"
    precision: Literal["fp64", "fp32"] = "fp64"
    steps: int = 3
    device: Literal["auto", "cpu", "cuda"] = "auto"
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    model: ModelConfig | None = None
    router: RouterConfig | None = None

    def __post_init__(self) -> None:
        expect(self.steps >= 2, "steps", self.steps, "an integer >= 2")
        size = None if self.model is None else self.model.vocab_size
        expect(
            size is None or size >= VOCABULARY,
            "model.vocab_size",
            size,
            f"an integer >= {VOCABULARY}, the token ids in the data, or null",
        )
        expect(self.router is None or self.model is not None, "model", None, "a preset of conf/model beside router=...")

    def cases(self) -> Mapping[str, Case]:
        """The models to train, by name: the one that `model` and `router` give, or else the built-in ones."""
        if self.model is None:
            return CASES
        model = replace(self.model, vocab_size=self.model.vocab_size or VOCABULARY)
        return {GIVEN: Case(model, self.router or RouterConfig())}
