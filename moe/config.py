"""The configuration sections `model`, `router` and `adapter`: frozen dataclasses that check their values. `conf/model`,
`conf/router` and `conf/adapter` have the same names.

The message of a `ValueError` raised here starts with `<field>=<value>: expected ...`. The code that reads the
configuration puts the section's name before it. This module does not import torch, so that a mistake on the command
line is reported at once.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, NamedTuple

from common.errors import expect, expect_defaults
from common.registry import Registry
from common.strict import DERIVED
from common.text import show_value


class FeedForwardSpec(NamedTuple):
    """The shapes of one kind of feed-forward network. `moe.feedforward` has the activation functions."""

    gated: bool
    """True: three matrices, `act(gate) * up` (arXiv 2002.05202). False: two, `act(up)`."""
    label: str
    """The kind's name in tables."""


FEED_FORWARDS: Registry[FeedForwardSpec] = Registry("model.ffn")
"""Kinds of feed-forward networks, by the name that `model.ffn` and `model.expert_ffn` take."""
for _kind, _spec in {
    "swiglu": FeedForwardSpec(gated=True, label="SwiGLU"),
    "geglu": FeedForwardSpec(gated=True, label="GeGLU"),
    "relu": FeedForwardSpec(gated=False, label="ReLU"),
    "gelu": FeedForwardSpec(gated=False, label="GELU"),
}.items():
    FEED_FORWARDS.add(_kind, _spec)


def is_gated(kind: str) -> bool:
    """Return whether a feed-forward network of this kind has a gate matrix."""
    return FEED_FORWARDS[kind].gated


@dataclass(frozen=True)
class RouterConfig:
    """The choice of experts for each token, and the auxiliary losses on that choice (docs/losses.md has the formulas).

    The built-in kinds share this dataclass. A router of a plugin can register a subclass with further keys
    (docs/extending.md).
    """

    MEANING: ClassVar[tuple[str, ...]] = ("kind", "normalize", "scale", "num_groups", "topk_groups")
    """The keys that determine a token's experts and combine weights. The model's weights are trained for their values,
    so a resumed run must not change them. A subclass adds its own keys."""

    kind: str = "softmax_topk"
    """`softmax_topk`, `sigmoid_topk`, `expert_choice`, or a kind that a plugin registers."""
    normalize: Literal["auto"] | bool = "auto"
    """Whether the k combine weights are divided by their sum. `auto`: true for k > 1, false for k = 1 (Switch)."""
    scale: float = 1.0
    """Constant factor on the combine weights (DeepSeek-V3: 2.5)."""
    num_groups: int | None = None
    """Group-limited routing (DeepSeek-V2/V3): the number of groups of experts. `null`: no groups."""
    topk_groups: int | None = None
    """The number of groups, those with the highest scores, from which a token's experts are selected."""
    jitter: float = 0.0
    """Switch: multiply the router's input by U(1 - jitter, 1 + jitter), in training only."""
    capacity_factor: float | None = None
    """Expert capacity per sequence, C = ceil(capacity_factor * k * S / E). `null`: dropless."""
    drop_policy: Literal["position", "prob"] = "position"
    """Which assignments are dropped over capacity: `position`, those of later tokens, or `prob`, the least probable
    ones (this leaks the future)."""
    allow_noncausal: bool = False
    """Permit `expert_choice` and `drop_policy: prob`, with which a later token can change an earlier token's output."""
    balance_coef: float = 0.01
    """Coefficient of the balance loss."""
    balance_scope: Literal["global", "sequence", "rank"] = "global"
    """The tokens that the balance loss is computed over: those of the global micro-batch, of each sequence, or of the
    sequences of each rank."""
    z_coef: float = 0.001
    """Coefficient of the z-loss."""
    layer_reduction: Literal["mean", "sum", "hf_pooled"] = "mean"
    """The combination of the auxiliary losses of all layers. `hf_pooled`: the balance loss of Hugging Face's Mixtral,
    and the mean of the z-losses; for comparisons with that model only."""
    bias_update_rate: float = 0.0
    """Loss-free balancing (arXiv 2408.15664): the step of the selection bias after each optimizer step. Only
    `sigmoid_topk` has this bias."""

    def __post_init__(self) -> None:
        ROUTER_CONFIGS.check(self.kind)
        capacity = self.capacity_factor
        expect(capacity is None or capacity > 0, "capacity_factor", capacity, "a number > 0, or null for dropless")
        expect(self.balance_coef >= 0, "balance_coef", self.balance_coef, "a number >= 0")
        expect(self.z_coef >= 0, "z_coef", self.z_coef, "a number >= 0")
        expect(self.scale > 0, "scale", self.scale, "a number > 0")
        expect(0 <= self.jitter < 1, "jitter", self.jitter, "a number in [0, 1)")
        expect(self.bias_update_rate >= 0, "bias_update_rate", self.bias_update_rate, "a number >= 0")
        expect(
            self.bias_update_rate == 0 or self.kind == "sigmoid_topk",
            "bias_update_rate",
            self.bias_update_rate,
            f"0 with router.kind={self.kind} (only sigmoid_topk has a selection bias)",
        )
        expect(
            self.layer_reduction != "hf_pooled" or self.balance_scope != "sequence",
            "layer_reduction",
            self.layer_reduction,
            "mean or sum with router.balance_scope=sequence",
        )
        self._check_groups()
        self._check_causality()

    def _check_groups(self) -> None:
        groups, best = self.num_groups, self.topk_groups
        expect(groups is None or groups >= 1, "num_groups", groups, "an integer >= 1, or null")
        expect(
            (groups is None) == (best is None),
            "topk_groups",
            best,
            "null without router.num_groups" if groups is None else f"an integer from 1 to num_groups={groups}",
        )
        if groups is not None and best is not None:
            expect(1 <= best <= groups, "topk_groups", best, f"an integer from 1 to num_groups={groups}")
            expect(self.kind != "expert_choice", "num_groups", groups, "null with router.kind=expert_choice")

    def _check_causality(self) -> None:
        leaks = "(a later token changes what an earlier one computes)"
        if self.kind == "expert_choice":
            expect(
                self.allow_noncausal,
                "kind",
                self.kind,
                f"a causal router, or router.allow_noncausal=true beside it {leaks}",
            )
            expect(self.balance_coef == 0, "balance_coef", self.balance_coef, "0 with router.kind=expert_choice")
            expect(self.normalize is not True, "normalize", True, "auto or false with router.kind=expert_choice")
        if self.drop_policy == "prob":
            expect(
                self.allow_noncausal,
                "drop_policy",
                "prob",
                f"position, or router.allow_noncausal=true beside it {leaks}",
            )
            expect(self.capacity_factor is not None, "drop_policy", "prob", "a router.capacity_factor beside it")

    @classmethod
    def class_for(cls, raw: Mapping[str, Any]) -> "type[RouterConfig]":
        """Return the dataclass to build from the plain section `raw`: the one that is registered for its `kind`.

        Raises:
            ConfigError: the kind is unknown. The other keys are not looked at: they can be those of a plugin.
        """
        kind = raw.get("kind", cls.kind)
        return ROUTER_CONFIGS[kind] if isinstance(kind, str) else cls

    def weight_shapes(self, dim: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every parameter of one layer's router.

        The router creates exactly these parameters. Layouts, plans and parameter counts use this method too.
        """
        return {"weight": (num_experts, dim)}

    @property
    def draws_noise(self) -> bool:
        """Whether the router needs noise keys in training."""
        return self.jitter > 0

    def num_extra(self, num_experts: int) -> int:
        """Return the number of columns that this kind adds to its statistics (`moe.router.Router.compute_extra`)."""
        return 0

    def experts_per_token(self, num_experts: int, top_k: int) -> float:
        """Return the number of routed experts that compute a token in training, in the mean over the tokens.

        Without a capacity this is `top_k`. With a capacity, the experts compute at most capacity_factor * k * S
        assignments of a sequence. Experts that choose their tokens always compute all of these. If tokens choose, the
        number is `top_k` or that maximum, whichever is smaller, which is exact if the load is balanced. Imbalance drops
        more, which is known only when the model runs (`router/drop_rate`).
        """
        factor = 1.0 if self.capacity_factor is None else self.capacity_factor
        if self.kind == "expert_choice":
            return min(num_experts, top_k * factor)
        return top_k * min(1.0, factor)

    def generation_note(self, top_k: int) -> str | None:
        """Return one line that says how the experts of a token are chosen in generation, if training chose otherwise.

        `moe.generation` applies neither capacities nor the choice of tokens by experts.
        """
        if self.kind == "expert_choice":
            choice = f"each token takes its top-{top_k} experts, and none is full"
            return (
                f"router.kind=expert_choice: experts chose their tokens in training; generation is dropless: {choice}"
            )
        if self.capacity_factor is not None:
            factor = f"router.capacity_factor={self.capacity_factor:g}"
            return f"{factor}: it applied in training; generation is dropless: no expert is full"
        return None

    def normalizes(self, top_k: int) -> bool:
        """Return whether the `top_k` selected weights are divided by their sum."""
        return top_k > 1 if self.normalize == "auto" else self.normalize

    def check(self, num_experts: int | None, top_k: int | None) -> None:
        """Check the keys whose valid values depend on the model.

        In a dense model, the arguments are None and nothing is checked.

        Raises:
            ValueError: the message starts with a field of the router.
        """
        if num_experts is None or top_k is None:
            return
        expect(
            not (top_k == 1 and self.normalize is True),
            "normalize",
            True,
            "auto or false with model.top_k=1 (a single renormalised weight is 1: the router would get no gradient)",
        )
        if self.num_groups is None or self.topk_groups is None:
            return
        expect(
            num_experts % self.num_groups == 0,
            "num_groups",
            self.num_groups,
            f"a divisor of model.num_experts={num_experts}",
        )
        size = num_experts // self.num_groups
        expect(
            self.kind != "sigmoid_topk" or size >= 2,
            "num_groups",
            self.num_groups,
            f"at most {num_experts // 2}: sigmoid_topk scores a group by its two best experts",
        )
        expect(
            self.topk_groups * size >= top_k,
            "topk_groups",
            self.topk_groups,
            f"at least {-(-top_k // size)}: groups of {size} experts hold model.top_k={top_k} of them",
        )


ROUTER_CONFIGS: Registry[type[RouterConfig]] = Registry("router.kind")
"""The configuration dataclass of every kind of router; `moe.router.ROUTERS` has the modules."""
for _name in ("softmax_topk", "sigmoid_topk", "expert_choice"):
    ROUTER_CONFIGS.add(_name, RouterConfig)


@dataclass(frozen=True)
class RopeScaling:
    """Other frequencies of the rotary embedding, for rows that are longer than those of the first training.

    `moe.token_context.rotary_frequencies` has the formulas.
    """

    kind: Literal["linear", "llama3", "yarn"]
    """`linear`: all frequencies are divided by `factor` (position interpolation, arXiv 2306.15595); `llama3`: those
    with few turns in `original_positions` (Llama 3.1); `yarn`: as `llama3`, by the pair's index (arXiv 2309.00071)."""
    factor: float
    """The number of times that rows are longer."""
    original_positions: int | None = None
    """Length of the rows of the first training. `linear` does not have it."""
    low_freq_factor: float | None = None
    """`llama3`: frequencies with fewer turns are divided by `factor`."""
    high_freq_factor: float | None = None
    """`llama3`: frequencies with more turns stay."""
    beta_fast: float | None = None
    """`yarn`: frequencies with more turns stay. `null`: 32."""
    beta_slow: float | None = None
    """`yarn`: frequencies with fewer turns are divided by `factor`. `null`: 1."""
    mscale: float | None = None
    """`yarn`, beside `mscale_all_dim`: cosine and sine are multiplied by magnitude(mscale) / magnitude(mscale_all_dim)
    (DeepSeek-V2). `null`: by magnitude(1)."""
    mscale_all_dim: float | None = None
    """`yarn`: see `mscale`."""
    attention_factor: float | None = None
    """`yarn`: the factor of cosine and sine. `null`: that of `mscale`."""
    truncate: bool = True
    """`yarn`: whether the range of pairs between the two limits is widened to whole pairs."""

    def __post_init__(self) -> None:
        expect(self.factor >= 1, "factor", self.factor, "a number >= 1")
        optional = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
        used = {
            "linear": (),
            "llama3": ("original_positions", "low_freq_factor", "high_freq_factor"),
            "yarn": ("original_positions", *optional),
        }[self.kind]
        for field in ("original_positions", "low_freq_factor", "high_freq_factor", *optional):
            value = getattr(self, field)
            if field not in used:
                expect(value is None, field, value, f"null with kind={self.kind}")
            elif value is None:
                expect(field in optional, field, None, f"a number > 0 with kind={self.kind}")
            else:
                expect(value > 0, field, value, "a number > 0")
        expect(self.truncate or self.kind == "yarn", "truncate", False, f"true with kind={self.kind}")
        if self.kind == "llama3":
            low, high = self.low_freq_factor or 0, self.high_freq_factor or 0
            expect(low < high, "low_freq_factor", low, f"less than high_freq_factor={high:g}")
        slow, fast = self.turns
        expect(slow < fast, "beta_slow", slow, f"less than beta_fast={fast:g}")
        both = (self.mscale is None) == (self.mscale_all_dim is None)
        expect(both, "mscale_all_dim", self.mscale_all_dim, "a number > 0 beside mscale, and null without it")

    @property
    def turns(self) -> tuple[float, float]:
        """`beta_slow` and `beta_fast`."""
        return 1.0 if self.beta_slow is None else self.beta_slow, 32.0 if self.beta_fast is None else self.beta_fast

    def magnitude(self, weight: float = 1.0) -> float:
        """Return 0.1 · weight · ln(factor) + 1, YaRN's correction of attention for longer rows.

        Multi-head latent attention multiplies its softmax scale by the square of `magnitude(mscale_all_dim)`.
        """
        return 0.1 * weight * math.log(self.factor) + 1.0

    @property
    def rotary_factor(self) -> float:
        """The factor of cosine and sine."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None or self.mscale_all_dim is None:
            return self.magnitude()
        return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters, which train in place of the weights that they are added to (LoRA, arXiv 2106.09685).

    A matrix W [out, in] becomes W + s B A, with A [rank, in], B [out, rank] and the factor s (`scale`).
    """

    kind: Literal["lora"] | None = None
    """`lora`, or `null`: no adapters."""
    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """The numerator of the factor s."""
    dropout: float = 0.0
    """Probability with which an element of the input of A is 0 in training. The other elements grow accordingly."""
    targets: tuple[str, ...] = ("attention",)
    """The weights that get adapters, by parts of their names: `attention`, `router`, `shared`, `experts`,
    `attention.wq`, `experts.w_up`, `layers.0`, or a glob over whole names, such as `layers.*.attention.w[qv]`."""
    scaling: Literal["standard", "rslora"] = "standard"
    """The factor s. `standard`: alpha / rank; `rslora`: alpha / sqrt(rank) (arXiv 2312.03732)."""
    dora: bool = False
    """Whether the length of each row of W + s B A is a trainable parameter (DoRA, arXiv 2402.09353)."""

    def __post_init__(self) -> None:
        expect(1 <= self.rank < 2**31, "rank", self.rank, "an integer from 1 to 2**31 - 1")
        expect(self.alpha > 0, "alpha", self.alpha, "a number > 0")
        expect(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")
        shown = f"[{','.join(self.targets)}]"
        expect(bool(self.targets) and all(self.targets), "targets", shown, "names of weights, or globs")
        if self.kind is None:
            expect_defaults(self, "adapter.kind=null")

    @property
    def scale(self) -> float:
        """The factor s of the product B A."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def chooses(self, weight: str) -> bool:
        """Return whether one of `targets` matches a weight.

        Args:
            weight: its name in `Transformer` without a final `.weight`, as in `layers.0.attention.wq`.
        """
        return matches_any(self.targets, weight)


NO_ADAPTER = AdapterConfig()

_OF_ADAPTER = re.compile(r"(?P<module>.+)\.(adapter|adapters\.(?P<weight>\w+))\.(?P<part>a|b|magnitude)")


def split_adapter_name(name: str) -> tuple[str, str | None]:
    """Return the weight that a parameter of an adapter belongs to, and which of the adapter's parameters it is.

    For every other parameter, return its name and None.

    >>> split_adapter_name("layers.0.attention.wq.adapter.a")
    ('layers.0.attention.wq.weight', 'a')
    >>> split_adapter_name("layers.0.ffn.experts.adapters.w_up.b")
    ('layers.0.ffn.experts.w_up', 'b')
    """
    match = _OF_ADAPTER.fullmatch(name)
    return (name, None) if match is None else (f"{match['module']}.{match['weight'] or 'weight'}", match["part"])


def adapter_shapes(shape: Sequence[int], adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the parameters of the adapter of one weight.

    Args:
        shape: of the weight, [O, I], or of stacked weights, [e, O, I].
    """
    *stack, outputs, inputs = shape
    shapes = {"a": (*stack, adapter.rank, inputs), "b": (*stack, outputs, adapter.rank)}
    return shapes | ({"magnitude": (*stack, outputs)} if adapter.dora else {})


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Return whether one of the patterns matches `name` as `matches_part` does."""
    return any(matches_part(pattern, name) for pattern in patterns)


def matches_part(pattern: str, name: str) -> bool:
    """Return whether a glob matches `name`, or some consecutive parts of it between dots.

    >>> [matches_part(pattern, "layers.0.attention.wq") for pattern in ("attention", "attention.w?", "0.*.wq", "att")]
    [True, True, True, False]
    """
    return any(fnmatchcase(name, glob) for glob in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with RMSNorm and rotary embedding. It has MoE layers unless `num_experts` is null."""

    dim: int
    """Width of the hidden states."""
    num_layers: int
    """Number of layers, each with attention and a feed-forward network."""
    num_heads: int
    """Number of query heads."""
    num_kv_heads: int
    """Number of key/value heads, a divisor of `num_heads` (grouped-query attention, arXiv 2305.13245)."""
    head_dim: int
    """Width of the queries and keys of a head: an even number, or with latent attention the sum of its two parts."""
    hidden_dim: int
    """Hidden width of a dense feed-forward network, and of an expert if `expert_hidden_dim` is null."""
    ffn: str = "swiglu"
    """Feed-forward network of the dense layers. `swiglu`, `geglu`: three matrices (arXiv 2002.05202); `relu`, `gelu`:
    two; or a kind that a plugin registers."""
    qk_norm: Literal["head", "width"] | None = None
    """RMSNorm of queries and keys before the rotary embedding. `head`: of each head, with one weight [C] for all heads
    (Qwen3); `width`: of all heads together (OLMoE, arXiv 2409.02060). `null`: none."""
    attention_bias: Literal["qkv", "all"] | None = None
    """Biases of the projections to queries, keys and values (`qkv`: Qwen2), and of the one back (`all`). `null`:
    none."""
    num_experts: int | None = None
    """Number of routed experts of a MoE layer. `null`: a dense model."""
    top_k: int | None = None
    """Number of routed experts per token."""
    expert_hidden_dim: int | None = None
    """Hidden width of an expert. `null`: `hidden_dim`."""
    expert_ffn: str | None = None
    """Feed-forward network of the experts. `null`: the kind that `ffn` names."""
    num_shared_experts: int = 0
    """Number of additional experts, of the same width, that process every token (DeepSeekMoE)."""
    shared_hidden_dim: int | None = None
    """Hidden width of the network of the shared experts, if it is not that of `num_shared_experts` experts, which is
    then 1 (Qwen2-MoE). `null`: `num_shared_experts` times the width of an expert."""
    shared_gate: bool = False
    """Multiply the output of the shared experts by sigmoid(w x), with one number per token (Qwen2-MoE)."""
    first_k_dense: int = 0
    """The first k layers are dense."""
    moe_every: int = 1
    """Every n-th of the layers after those is a MoE layer, starting with the n-th (2: dense, MoE, dense, MoE, ...)."""
    vocab_size: int | None = None
    """Size of the vocabulary. `null`: that of the tokenizer."""
    kv_lora_rank: int | None = None
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the width of the latent from which the keys and
    values of all heads are computed. The key/value cache stores it. `null`: grouped-query attention."""
    q_lora_rank: int | None = None
    """Width of the latent from which the queries are computed. `null`: from the hidden states. This key and the next
    three are for latent attention."""
    qk_nope_head_dim: int | None = None
    """Width of the part of a head's query and key that has no rotary embedding."""
    qk_rope_head_dim: int | None = None
    """Width of the part with rotary embedding, an even number. All heads share this part of the key."""
    v_head_dim: int | None = None
    """Width of a head's value, at most `head_dim`. `null`, in grouped-query attention: `head_dim`."""
    sliding_window: int | tuple[int | None, ...] | None = None
    """Number of keys that a query attends to, including the key at its own position. `null`: all earlier ones. A list
    has one entry per layer and is repeated over the layers."""
    rope_theta: float = 1e6
    """Base of the angles of the rotary embedding (arXiv 2104.09864)."""
    rotary_dim: int | None = None
    """How many of a head's numbers, the first ones, are rotated: an even number. `null`: all of them."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies, a section of keys. `null`: none."""
    norm_eps: float = 1e-5
    """The number that RMSNorm adds to the mean square."""
    tie_embeddings: bool = False
    """Use the embedding as the weight of the head."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    expert_kernel: Literal["auto", "grouped", "loop"] = "auto"
    """`grouped`: torch's grouped matmul; `loop`: the readable reference; `auto`: the faster of the two on
    this device."""
    adapter: AdapterConfig | None = dataclasses.field(default=None, metadata=DERIVED)
    """The adapters of the model, which are the section `adapter`; None: it has none."""

    def __post_init__(self) -> None:
        for field in ("ffn", "expert_ffn"):
            kind = getattr(self, field)
            if kind is not None:
                FEED_FORWARDS.check(kind, field)
        for field in ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_dim", "moe_every"):
            expect(getattr(self, field) >= 1, field, getattr(self, field), "an integer >= 1")
        for field in ("num_experts", "top_k", "vocab_size", "expert_hidden_dim"):
            value = getattr(self, field)
            expect(value is None or value >= 1, field, value, "an integer >= 1, or null")
        heads, kv_heads = self.num_heads, self.num_kv_heads
        expect(heads % kv_heads == 0, "num_kv_heads", kv_heads, f"a divisor of num_heads={heads}")
        self._check_latent()
        if self.kv_lora_rank is None:
            expect(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (rotary embedding turns pairs)")
        expect(self.rope_theta > 0, "rope_theta", self.rope_theta, "a number > 0")
        expect(
            self.rotary_dim is None or (2 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0),
            "rotary_dim",
            self.rotary_dim,
            f"an even number from 2 to head_dim={self.head_dim}, or null",
        )
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn":
            expect(self.rope_theta > 1, "rope_theta", self.rope_theta, "a number > 1 with rope_scaling.kind=yarn")
        expect(self.norm_eps > 0, "norm_eps", self.norm_eps, "a number > 0")
        expect(self.init_std > 0, "init_std", self.init_std, "a number > 0")
        windows = self.sliding_window if isinstance(self.sliding_window, tuple) else (self.sliding_window,)
        expect(
            bool(windows) and all(window is None or window >= 1 for window in windows),
            "sliding_window",
            show_value(self.sliding_window),
            "an integer >= 1, null, or a list of these",
        )
        expect(
            self.num_layers % max(1, len(windows)) == 0,
            "sliding_window",
            show_value(self.sliding_window),
            f"a list whose length divides num_layers={self.num_layers}",
        )
        self._check_experts()

    def _check_latent(self) -> None:
        """Check the keys of latent attention, and those whose values follow from them."""
        parts = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.kv_lora_rank is None:
            for field in ("q_lora_rank", *parts):
                expect(getattr(self, field) is None, field, getattr(self, field), "null without kv_lora_rank")
            return
        for field in ("kv_lora_rank", *parts):
            value = getattr(self, field)
            expect(value is not None and value >= 1, field, value, "an integer >= 1 with latent attention")
        for field in ("qk_norm", "attention_bias"):
            expect(getattr(self, field) is None, field, getattr(self, field), "null with latent attention")
        rank = self.q_lora_rank
        expect(rank is None or rank >= 1, "q_lora_rank", rank, "an integer >= 1, or null")
        width = (self.qk_nope_head_dim or 0) + self.rotary_width
        even = self.rotary_width % 2 == 0
        expect(even, "qk_rope_head_dim", self.rotary_width, "an even number (rotary embedding turns pairs)")
        expect(self.rotary_dim is None, "rotary_dim", self.rotary_dim, "null with latent attention (qk_rope_head_dim)")
        expect(
            self.head_dim == width,
            "head_dim",
            self.head_dim,
            f"{width}, qk_nope_head_dim + qk_rope_head_dim, with latent attention",
        )
        expect(self.value_dim <= width, "v_head_dim", self.v_head_dim, f"an integer from 1 to head_dim={width}")
        expect(
            self.num_kv_heads == self.num_heads,
            "num_kv_heads",
            self.num_kv_heads,
            f"num_heads={self.num_heads} with latent attention",
        )

    def _check_experts(self) -> None:
        if self.num_experts is None:
            for field in ("top_k", "expert_hidden_dim", "expert_ffn", "shared_hidden_dim"):
                value = getattr(self, field)
                expect(value is None, field, value, "null in a dense model (num_experts is null)")
            defaults = {"num_shared_experts": 0, "shared_gate": False, "first_k_dense": 0, "moe_every": 1}
            for field, default in defaults.items():
                value = getattr(self, field)
                expect(value == default, field, value, f"{show_value(default)} in a dense model (num_experts is null)")
            return
        expect(
            self.top_k is not None and self.top_k <= self.num_experts,
            "top_k",
            self.top_k,
            f"an integer from 1 to num_experts={self.num_experts}",
        )
        shared = self.num_shared_experts
        expect(shared >= 0, "num_shared_experts", shared, "an integer >= 0")
        if self.shared_hidden_dim is not None:
            expect(self.shared_hidden_dim >= 1, "shared_hidden_dim", self.shared_hidden_dim, "an integer >= 1, or null")
            expect(shared == 1, "num_shared_experts", shared, "1 with shared_hidden_dim, the width of the one network")
        expect(shared >= 1 or not self.shared_gate, "shared_gate", True, "false with num_shared_experts=0")
        expect(
            0 <= self.first_k_dense < self.num_layers,
            "first_k_dense",
            self.first_k_dense,
            f"an integer from 0 to {self.num_layers - 1}, less than num_layers",
        )
        expect(
            any(map(self.is_moe_layer, range(self.num_layers))),
            "moe_every",
            self.moe_every,
            f"at most {self.num_layers - self.first_k_dense}, the layers after first_k_dense={self.first_k_dense}",
        )
        for field in ("dim", "expert_width") if self.expert_kernel == "grouped" else ():
            width, key = getattr(self, field), field.replace("expert_width", "expert_hidden_dim")
            expect(width % 8 == 0, key, width, "a multiple of 8 with expert_kernel=grouped")

    @property
    def is_moe(self) -> bool:
        """Whether any layer is a MoE layer."""
        return self.num_experts is not None

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether layer `layer` (from 0) is a MoE layer."""
        index = layer - self.first_k_dense
        return self.is_moe and index >= 0 and (index + 1) % self.moe_every == 0

    @property
    def num_moe_layers(self) -> int:
        """The number of MoE layers."""
        return sum(map(self.is_moe_layer, range(self.num_layers)))

    @property
    def expert_width(self) -> int:
        """Hidden width of one expert."""
        return self.hidden_dim if self.expert_hidden_dim is None else self.expert_hidden_dim

    @property
    def shared_width(self) -> int:
        """Hidden width of the network of the shared experts; 0 without one."""
        return self.num_shared_experts * self.expert_width if self.shared_hidden_dim is None else self.shared_hidden_dim

    @property
    def expert_kind(self) -> str:
        """Kind of the experts' feed-forward networks."""
        return self.ffn if self.expert_ffn is None else self.expert_ffn

    @property
    def rotary_width(self) -> int:
        """How many of a head's numbers are rotated."""
        if self.qk_rope_head_dim is not None:
            return self.qk_rope_head_dim
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def softmax_scale(self) -> float | None:
        """The factor on the scores of attention; None: 1/sqrt(C). Latent attention with YaRN has another one."""
        if self.kv_lora_rank is None or self.rope_scaling is None or self.rope_scaling.mscale_all_dim is None:
            return None
        return math.pow(self.rope_scaling.magnitude(self.rope_scaling.mscale_all_dim), 2) / math.sqrt(self.head_dim)

    @property
    def value_dim(self) -> int:
        """Width of a head's value."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def cached(self) -> tuple[tuple[int, int], ...]:
        """What the key/value cache stores of a token in a layer: (heads, width) of each tensor."""
        if self.kv_lora_rank is None:
            return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.value_dim)
        return ((1, self.kv_lora_rank + self.rotary_width),)

    def with_adapter(self, adapter: AdapterConfig) -> "ModelConfig":
        """Return this model with the adapters that the section `adapter` describes; with none if its kind is null."""
        return dataclasses.replace(self, adapter=None if adapter.kind is None else adapter)

    @property
    def adapts_experts(self) -> bool:
        """Whether a weight of routed experts has an adapter."""
        adapter, layers = self.adapter, filter(self.is_moe_layer, range(self.num_layers))
        names = ("w_up", "w_down", *(("w_gate",) if self.is_moe and is_gated(self.expert_kind) else ()))
        return adapter is not None and any(
            adapter.chooses(f"layers.{layer}.ffn.experts.{name}") for layer in layers for name in names
        )

    def window(self, layer: int) -> int | None:
        """Return the number of keys that a query of layer `layer` attends to; None: all earlier ones."""
        pattern = self.sliding_window
        return pattern[layer % len(pattern)] if isinstance(pattern, tuple) else pattern


def attended_pairs(window: int | None, seq_len: int) -> int:
    """Count the query-key pairs of one row of `seq_len` tokens under a causal mask and a window.

    >>> attended_pairs(None, 4), attended_pairs(2, 4)
    (10, 7)
    """
    reach = min(window or seq_len, seq_len)
    return reach * (reach + 1) // 2 + (seq_len - reach) * reach
