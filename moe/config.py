"""What a model is: frozen dataclasses that validate themselves, mirrored by `conf/model` and `conf/router`.

A `ValueError` raised here starts with `<field>=<value>: expected ...`; the Hydra boundary puts the section before it.
"""

from dataclasses import dataclass
from typing import Literal


def expect(holds: bool, field: str, value: object, expected: str) -> None:
    """Raise `ValueError("<field>=<value>: expected <expected>")` unless `holds`."""
    if not holds:
        raise ValueError(f"{field}={value}: expected {expected}")


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts, and the auxiliary losses on that choice (docs/losses.md has the formulas)."""

    kind: Literal["softmax_topk"] = "softmax_topk"
    normalize: Literal["auto"] | bool = "auto"
    """Renormalise the k probabilities to sum 1. `auto`: for k > 1 yes, for k = 1 no (Switch)."""
    capacity_factor: float | None = None
    """Expert capacity per sequence, C = ceil(capacity_factor * k * S / E). `null`: dropless."""
    balance_coef: float = 0.01
    balance_scope: Literal["global", "sequence", "rank"] = "global"
    z_coef: float = 0.001
    layer_reduction: Literal["mean", "sum"] = "mean"
    """How the per-layer auxiliary losses are combined over layers."""

    def __post_init__(self) -> None:
        capacity = self.capacity_factor
        expect(capacity is None or capacity > 0, "capacity_factor", capacity, "a number > 0, or null for dropless")
        expect(self.balance_coef >= 0, "balance_coef", self.balance_coef, "a number >= 0")
        expect(self.z_coef >= 0, "z_coef", self.z_coef, "a number >= 0")

    def normalizes(self, top_k: int) -> bool:
        """Whether the `top_k` selected probabilities are renormalised to sum 1."""
        return top_k > 1 if self.normalize == "auto" else self.normalize


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Mistral/Mixtral family; dense when `num_experts` is null."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    """Width of one expert's (or of the dense) SwiGLU."""
    num_experts: int | None = None
    top_k: int | None = None
    vocab_size: int | None = None
    """`null`: the tokenizer's."""
    sliding_window: int | None = None
    """Keys a query sees, itself included. `null`: all earlier ones."""
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    expert_kernel: Literal["auto", "grouped", "loop"] = "auto"
    """`grouped`: torch's grouped matmul; `loop`: the readable reference; `auto`: the faster of both here."""

    def __post_init__(self) -> None:
        for field in ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_dim"):
            expect(getattr(self, field) >= 1, field, getattr(self, field), "an integer >= 1")
        for field in ("num_experts", "top_k", "vocab_size", "sliding_window"):
            value = getattr(self, field)
            expect(value is None or value >= 1, field, value, "an integer >= 1, or null")
        heads, kv_heads = self.num_heads, self.num_kv_heads
        expect(heads % kv_heads == 0, "num_kv_heads", kv_heads, f"a divisor of num_heads={heads}")
        expect(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (rotary embedding turns pairs)")
        expect(self.rope_theta > 0, "rope_theta", self.rope_theta, "a number > 0")
        expect(self.norm_eps > 0, "norm_eps", self.norm_eps, "a number > 0")
        expect(self.init_std > 0, "init_std", self.init_std, "a number > 0")
        for field in ("dim", "hidden_dim") if self.expert_kernel == "grouped" else ():
            expect(
                getattr(self, field) % 8 == 0, field, getattr(self, field), "a multiple of 8 with expert_kernel=grouped"
            )
        if self.num_experts is None:
            expect(self.top_k is None, "top_k", self.top_k, "null in a dense model (num_experts is null)")
        else:
            expect(
                self.top_k is not None and self.top_k <= self.num_experts,
                "top_k",
                self.top_k,
                f"an integer from 1 to num_experts={self.num_experts}",
            )

    @property
    def is_moe(self) -> bool:
        return self.num_experts is not None
