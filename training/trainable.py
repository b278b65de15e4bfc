"""Which weights train: `optim.train` as a choice of parameters, and of single experts of the stacked parameters.

With adapters (`adapter.kind`), these train, and besides them only what `optim.train` names.

Shapes: E experts, e experts of this rank, D model, F expert hidden.

The choice is made on parameter names, so that every rank makes the same choice. If one expert of a stacked parameter
trains, the parameter requires a gradient on every rank, also on ranks without a trainable expert: autograd then walks
the same graph on all ranks, and so does the all-to-all in it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.errors import ConfigError, ModelError
from common.text import nearest_name
from moe.accounting.flops import meta_model
from moe.config import split_adapter_name
from moe.model import Transformer
from moe.region import LocalShard, Region
from moe.router import Router
from parallel.weight_shards import local_of
from parallel.weight_specs import kind

EVERYTHING = "all"
_LAYER, _PART = re.compile(r"^layers\.\d+\."), re.compile(r"\.(a|b|magnitude)$")
SINGLE_EXPERT = re.compile(r"expert:(\d+)")


@dataclass(frozen=True)
class Choice:
    """The names of the parameters that train; the same on all ranks."""

    whole: frozenset[str]
    """Parameters that train in full."""
    experts: dict[str, frozenset[int]]
    """Stacked parameters of which some experts train -> the global indices of these experts."""


@dataclass(frozen=True)
class TrainableWeight:
    """One tensor that the optimizer updates: this rank's shard of a parameter, or of one expert of it."""

    name: str
    """The parameter's name; for a single expert `<stacked parameter>.<global expert index>`."""
    source: nn.Parameter
    """The model's parameter. It is larger than the weight if FSDP shards it, or if it stacks experts [e, ., .]."""
    row: int | None
    """For a single expert, its index among the experts of this rank."""
    shard: LocalShard
    parameter: nn.Parameter
    """The source itself, or a plain tensor that shares its memory."""

    def collect_gradient(self) -> None:
        """Point `parameter.grad` to the source's gradient, or to the part of it that belongs to this weight."""
        if self.parameter is self.source:
            return
        grad = None if self.source.grad is None else local_of(self.source.grad)[0]
        self.parameter.grad = grad if grad is None or self.row is None else grad[self.row]


class Trainable:
    """Sets `requires_grad` on all parameters of `models`, and lists the weights that the optimizer updates.

    Args:
        models: this rank's part of the model.
        train: `optim.train`.

    Raises:
        ConfigError: a pattern matches no parameter.
        ModelError: a parameter that the model built from the same configuration does not have, so that no choice
            covers it.
    """

    def __init__(self, models: Sequence[Transformer], train: str | tuple[str, ...]) -> None:
        reference = meta_model(models[0].config, models[0].router_config)
        choice = choose_trainable(reference, train)
        self.models = models
        self.names = {name for name, _ in reference.named_parameters()}
        self.check_claimed()
        self.weights: dict[str, TrainableWeight] = {}
        self.sources: list[nn.Parameter] = []
        """Parameters that require a gradient. Some of them can have no trainable weight on this rank."""
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in choice.whole or name in choice.experts)
                if parameter.requires_grad:
                    self.sources.append(parameter)
                shard = model.local_shard(name, parameter)
                if name in choice.whole:
                    plain = nn.Parameter(shard.local) if isinstance(parameter, DTensor) else parameter
                    self.weights[name] = TrainableWeight(name, parameter, None, shard, plain)
                elif name in choice.experts:
                    self.weights |= {
                        expert.name: expert for expert in _single_experts(name, parameter, shard, choice.experts[name])
                    }

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> the parameter that the optimizer updates."""
        return {name: weight.parameter for name, weight in self.weights.items()}

    def check_claimed(self) -> None:
        """Raise ModelError if a model has a parameter that no choice covers, also one that a forward pass created."""
        for model in self.models:
            for name, _ in model.named_parameters():
                if name not in self.names:
                    raise ModelError(f"{name}: expected a parameter of the configured model; none has this name")

    def collect_gradients(self) -> None:
        """Give weights that are not the model's parameters themselves their gradients, after the backward passes.

        Raises:
            ModelError: a forward pass has created a parameter, which would never train.
        """
        self.check_claimed()
        for weight in self.weights.values():
            weight.collect_gradient()

    def clear_gradients(self) -> None:
        """Free every gradient, including those of stacked parameters of which single experts train."""
        for weight in self.weights.values():
            weight.parameter.grad = None
        for source in self.sources:
            source.grad = None


def is_of_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return split_adapter_name(name)[1] is not None


def saved_parameters(model: Transformer) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that a checkpoint contains: all, or those that train if the model has adapters.

    The weights that adapters are added to are read from `run.init_from` whenever a run starts or continues.
    """
    for name, parameter in model.named_parameters():
        if model.config.adapter is None or parameter.requires_grad:
            yield name, parameter


def choose_trainable(model: Transformer, train: str | tuple[str, ...]) -> Choice:
    """The choice that `train` means for `model`, which has all layers and is not sharded (e.g. on the meta device).

    The parameters of adapters always train. Patterns are compared with the names of the other parameters. With
    adapters, `all` adds nothing.

    Raises:
        ConfigError: a pattern matches no parameter; the message names the nearest pattern that does.
    """
    num_experts = model.config.num_experts or 0
    adapters = {name for name, _ in model.named_parameters() if is_of_adapter(name)}
    parameters = {name: parameter for name, parameter in model.named_parameters() if name not in adapters}
    stacked = [name for name in parameters if kind(name) == "experts"]
    routers = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    keywords = {
        EVERYTHING: set(parameters),
        "router": {name for name, parameter in parameters.items() if id(parameter) in routers},
        "experts": set(stacked),
    }
    whole: set[str] = set(adapters)
    experts: dict[str, set[int]] = {name: set() for name in stacked}
    for pattern in patterns(train):
        if adapters and pattern == EVERYTHING:
            continue  # The default. What the adapters are added to stays as it is.
        single_expert = SINGLE_EXPERT.fullmatch(pattern)
        glob = f"*.{int(single_expert[1])}" if single_expert else pattern
        names = keywords.get(pattern) or {name for name in keywords[EVERYTHING] if fnmatchcase(name, pattern)}
        single = {
            (name, index) for name in stacked for index in range(num_experts) if fnmatchcase(f"{name}.{index}", glob)
        }
        if not names and not single:
            raise _matches_nothing(pattern, model)
        whole |= names
        for name, index in single:
            experts[name].add(index)
    whole |= {name for name, indices in experts.items() if len(indices) == num_experts}
    in_part = {name: frozenset(indices) for name, indices in experts.items() if indices and name not in whole}
    return Choice(frozenset(whole), in_part)


def patterns(train: str | Iterable[str]) -> tuple[str, ...]:
    """The patterns of `optim.train` without repetitions, in alphabetical order: their order has no meaning."""
    return tuple(sorted({train} if isinstance(train, str) else set(train)))


def format_patterns(train: str | Iterable[str]) -> str:
    """`optim.train` as a user writes it on the command line."""
    return train if isinstance(train, str) else f"[{','.join(train)}]"


def trained_elements(model: Transformer, choice: Choice) -> int:
    """The number of parameter elements of `model`, which is not sharded, that train."""
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    in_part = sum(len(some) * torch.Size(sizes[name][1:]).numel() for name, some in choice.experts.items())
    return in_part + sum(sizes[name].numel() for name in choice.whole)


def describe_choice(model: Transformer, choice: Choice) -> list[str]:
    """Return two lines about `model`, which is not sharded: what trains, and what stays as it is.

    The parameters of all layers with the same name are one group. An adapter is one group, too.
    """
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        group = _LAYER.sub("", name).removesuffix(".weight")
        group = _PART.sub("", group) if is_of_adapter(name) else group
        some = len(choice.experts.get(name, ())) * parameter[:1].numel()
        number = parameter.numel() if name in choice.whole else some
        if number:
            trained[group] = trained.get(group, 0) + number
        if number < parameter.numel():
            frozen[group] = frozen.get(group, 0) + parameter.numel() - number
    total = sum(trained.values()) + sum(frozen.values())

    def listed(groups: dict[str, int]) -> str:
        return ", ".join(f"{group} {number:,}" for group, number in groups.items())

    share = f"{sum(trained.values()):,} of {total:,} parameters ({sum(trained.values()) / total:.2%})"
    return [f"trains: {listed(trained)}: {share}", f"frozen: {listed(frozen)}"]


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, for the buffers that belong to the weights (a router's selection bias)."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _single_experts(
    name: str, source: nn.Parameter, shard: LocalShard, chosen: frozenset[int]
) -> list[TrainableWeight]:
    (first, *offset), shape = shard.region.offset, shard.local.shape[1:]
    weights = []
    for row, matrix in enumerate(shard.local):
        if first + row in chosen and matrix.numel():
            expert = LocalShard(matrix, shard.shape[1:], Region(tuple(offset), tuple(shape)))
            weights.append(TrainableWeight(f"{name}.{first + row}", source, row, expert, nn.Parameter(matrix)))
    return weights


def _matches_nothing(pattern: str, model: Transformer) -> ConfigError:
    names = [name for name, _ in model.named_parameters()]
    keywords = [EVERYTHING]
    if model.config.num_experts is not None:
        keywords += ["router", "experts", *(f"expert:{index}" for index in range(model.config.num_experts))]
    near = nearest_name(pattern, keywords + names)
    return ConfigError(
        f"optim.train={pattern}: expected all, router, experts, expert:<index> or a glob over the names of this "
        f"model's parameters{f'; the nearest is {near}' if near else ''}"
    )
