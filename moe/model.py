"""The decoder-only transformer: embed -> blocks -> norm -> head. A pipeline stage has some of these only.

Shapes: B batch, S sequence, D model, V vocabulary, L MoE layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.adapter import install_adapters
from moe.attention.cache import Cache
from moe.attention.varlen import Segments
from moe.config import ModelConfig, RouterConfig
from moe.experts import Experts
from moe.layer import Block
from moe.linear import Head, Linear, Lookup, Predict, RMSNorm, linear
from moe.quantization import Packing, QuantizeConfig, target_of
from moe.region import LocalShard, whole_shard
from moe.router import RouterStats
from moe.token_context import TokenContext, rotary_table


class ModelInputs(NamedTuple):
    """The inputs of one forward pass, on the model's device."""

    tokens_BS: Tensor
    """Token ids, int64."""
    positions_BS: Tensor
    """The position of each token in its document, int64."""
    documents_BS: Tensor | None = None
    """Attention (causal) stays between equal numbers; None: each row is one document."""
    valid_BS: Tensor | None = None
    """False on padding; None: no padding."""
    noise_keys_BS: Tensor | None = None
    """One key per token (`moe.noise.noise_keys`), from which routers draw noise in training."""
    segments: Segments | None = None
    """Where documents begin and end (`segments_of`). GPUs compute attention faster with it; None: not known."""


class Output(NamedTuple):
    """The result of one forward pass."""

    result: Tensor
    """What `predict` returned. A pipeline stage that is not the last returns its hidden states [B, S, D] here."""
    stats: RouterStats | None
    """Router statistics, stacked over the MoE layers of this module (a leading L); None if it has no MoE layer."""

    @property
    def logits_BSV(self) -> Tensor:
        """The result of a forward pass without `predict`, in the compute dtype."""
        return self.result


class Transformer(nn.Module):
    """A plain module on one device. `parallel.apply` changes it from outside, through the attributes called seams.

    A pipeline stage keeps its layers under their indices, with None in place of the other layers. Stages that do not
    need the embedding, the last norm or the head have None there too.

    Attributes:
        local_shard: seam: returns this rank's shard of the parameter or buffer of a given name.
        lookup: seam: embeds the tokens that this rank routes (tensor parallelism shards vocabulary and sequence).
        gather: seam: joins the sequence of all tensor-parallel ranks before the head.
        run_block: seam: calls a block (`moe.compiled` installs a compiled form).
        slice_local: seam: takes masks and keys of all tokens to those of the tokens that this rank routes.
        packings: the name of every parameter that is quantised -> how each of its matrices is stored.
    """

    embedding: nn.Parameter
    norm: RMSNorm
    head: Head | None

    def __init__(self, config: ModelConfig, router: RouterConfig, compute_dtype: torch.dtype) -> None:
        """
        Args:
            compute_dtype: the dtype of activations; weights of another dtype are cast where they are used.

        Raises:
            ValueError: `config.vocab_size` is not set.
            ConfigError: a pattern of `config.adapter` matches no weight.
        """
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size=None: expected an integer >= 1 (or a tokenizer to take it from)")
        self.config = config
        self.router_config = router
        self.compute_dtype = compute_dtype
        self.packings: dict[str, Packing] = {}
        self.local_shard: Callable[[str, Tensor], LocalShard] = whole_shard
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.layers = nn.ModuleList(Block(config, router, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Head(config.dim, config.vocab_size)
        self.run_block: Callable[..., tuple[Tensor, RouterStats | None]] = Block.__call__
        self.lookup: nn.Module = Lookup(compute_dtype)
        self.gather: nn.Module = nn.Identity()
        self.slice_local: nn.Module = nn.Identity()
        if config.adapter is not None:
            install_adapters(self, config.adapter)

    def forward(
        self,
        inputs: ModelInputs,
        *,
        cache: Cache | None = None,
        hidden_BSD: Tensor | None = None,
        predict: Predict = linear,
    ) -> Output:
        """Compute the logits of the next token at every position, or what `predict` makes of the last hidden states.

        Args:
            cache: keys and values of earlier tokens, while text is generated; those of these tokens are added.
            hidden_BSD: the hidden states that the previous pipeline stage returned, in place of embedded tokens.
            predict: called with the hidden states after the last norm, and the weight of the head.
        """
        config = self.config
        x_BSD = self.lookup(inputs.tokens_BS, self.embedding) if hidden_BSD is None else hidden_BSD
        context = TokenContext(
            rotary=rotary_table(
                inputs.positions_BS, config.rotary_width, config.rope_theta, self.compute_dtype, config.rope_scaling
            ),
            documents_BS=inputs.documents_BS,
            segments=inputs.segments,
            valid_BS=self.slice_local(inputs.valid_BS),
            noise_keys_BS=self.slice_local(inputs.noise_keys_BS),
        )
        if cache is not None:
            cache.begin(inputs.positions_BS, context.valid_BS)
        collected = []
        for number, layer in enumerate(self.layers):
            if layer is None:
                continue
            x_BSD, stats = self.run_block(layer, x_BSD, context, None if cache is None else cache.layers[number])
            if stats is not None:
                collected.append(stats)
        if cache is not None:
            cache.advance()
        stacked = RouterStats(*(torch.stack(field) for field in zip(*collected, strict=True))) if collected else None
        if self.norm is None:
            return Output(x_BSD, stacked)
        x_BSD = self.gather(self.norm(x_BSD))
        return Output(predict(x_BSD, self.embedding) if self.head is None else self.head(x_BSD, predict), stacked)

    @property
    def moe_layers(self) -> slice:
        """The range, among the model's MoE layers, of those that this module has. (Its layers are consecutive.)"""
        numbers = filter(self.config.is_moe_layer, range(self.config.num_layers))
        places = [place for place, number in enumerate(numbers) if self.layers[number] is not None]
        return slice(places[0], places[-1] + 1) if places else slice(0, 0)

    @property
    def is_last(self) -> bool:
        """Whether the last norm and the head are here: True except in a pipeline stage that another stage follows."""
        return self.norm is not None

    def keep_layers(self, layers: Sequence[int]) -> None:
        """Become the pipeline stage of these consecutive layers: remove all modules that only other stages need."""
        first, last = layers[0] == 0, layers[-1] == self.config.num_layers - 1
        for number in range(self.config.num_layers):
            if number not in layers:
                setattr(self.layers, str(number), None)
        if not first and not (last and self.config.tie_embeddings):
            self.embedding = None  # type: ignore[assignment]
        if not last:
            self.norm = self.head = None  # type: ignore[assignment]

    def numbers_in(self, name: str, shard: LocalShard) -> int:
        """Return how many numbers of a parameter a shard has; of a quantised one, in proportion to its bytes."""
        packing, size = self.packings.get(name), shard.local.numel()
        return size if packing is None else round(size / packing.nbytes * packing.numel)

    def quantize(self, config: QuantizeConfig) -> None:
        """Replace the weights that `config` chooses by bytes, which are not filled. They do not train.

        A matrix becomes a parameter [P] of dtype uint8, and stacked experts become one [e, P]. Call this on the meta
        device, after expert parallelism has taken the experts of this rank.
        """
        for name, parameter in list(self.named_parameters()):
            packing = config.packing(target_of(name), parameter.shape)
            if packing is None:
                continue
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            assert isinstance(module, Linear | Experts), name
            shape = *parameter.shape[:-2], packing.nbytes
            packed = torch.empty(shape, dtype=torch.uint8, device=parameter.device)
            setattr(module, leaf, nn.Parameter(packed, requires_grad=False))
            module.packings[leaf] = self.packings[name] = packing
            if isinstance(module, Experts):
                module.fused = False
