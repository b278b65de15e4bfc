"""Which weights train: `optim.train` as a choice of parameters, and of single experts inside the stacked ones.

Shapes: E experts, e experts held here, D model, F expert hidden.

The choice is made on names, so that every rank makes the same one. A stacked parameter of which one expert trains
requires a gradient on every rank, also on those that hold none of the experts that train: autograd then walks the same
graph everywhere, and so does the all-to-all in it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.errors import ConfigError
from common.text import nearest
from moe.accounting.flops import meta_model
from moe.config import RouterConfig
from moe.model import Transformer
from moe.region import LocalShard, Region
from moe.router import Router
from parallel.weight_shards import local_of
from parallel.weight_specs import kind

EVERYTHING = "all"
OF_EXPERT = re.compile(r"expert:(\d+)")


@dataclass(frozen=True)
class Choice:
    """What trains, by names; the same on all ranks."""

    whole: frozenset[str]
    """Parameters that train in full."""
    experts: dict[str, frozenset[int]]
    """Stacked parameters that train in part -> the experts (global indices) that do."""


@dataclass(frozen=True)
class TrainableWeight:
    """What the optimizer steps on: the part of one of the model's parameters that lies here, or of one expert in it."""

    name: str
    """The parameter's; of a single expert `<stacked parameter>.<global expert index>`."""
    source: nn.Parameter
    """The model's parameter; sharded by FSDP, or stacked over experts [e, ., .], it is more than this."""
    row: int | None
    """Of a single expert: its place among those here."""
    held: LocalShard
    parameter: nn.Parameter
    """A plain tensor that shares the source's memory (or the source itself)."""

    def collect_gradient(self) -> None:
        """The source's gradient, or the view of it that belongs to this weight."""
        if self.parameter is self.source:
            return
        grad = None if self.source.grad is None else local_of(self.source.grad)[0]
        self.parameter.grad = grad if grad is None or self.row is None else grad[self.row]


class Trainable:
    """Sets `requires_grad` all over `models`, this rank's part of the model, and holds what an optimizer steps on.

    Raises:
        ConfigError: a pattern matches nothing.
    """

    def __init__(self, models: Sequence[Transformer], train: str | tuple[str, ...]) -> None:
        choice = choose_trainable(meta_model(models[0].config, RouterConfig()), train)
        self.weights: dict[str, TrainableWeight] = {}
        self.sources: list[nn.Parameter] = []
        """What requires a gradient; it may hold nothing that trains here."""
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in choice.whole or name in choice.experts)
                if parameter.requires_grad:
                    self.sources.append(parameter)
                held = model.local_shard(name, parameter)
                if name in choice.whole:
                    own = nn.Parameter(held.local) if isinstance(parameter, DTensor) else parameter
                    self.weights[name] = TrainableWeight(name, parameter, None, held, own)
                elif name in choice.experts:
                    parts = _parts(name, parameter, held, choice.experts[name])
                    self.weights |= {part.name: part for part in parts}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: weight.parameter for name, weight in self.weights.items()}

    def collect_gradients(self) -> None:
        """After the last backward pass of a step: weights that are not the model's own parameters get theirs."""
        for weight in self.weights.values():
            weight.collect_gradient()

    def clear_gradients(self) -> None:
        """Free every gradient, those of stacked parameters that train in part included."""
        for weight in self.weights.values():
            weight.parameter.grad = None
        for source in self.sources:
            source.grad = None


def choose_trainable(model: Transformer, train: str | tuple[str, ...]) -> Choice:
    """What `train` means for the whole `model` (on the meta device, say).

    Raises:
        ConfigError: a pattern matches nothing; names the nearest that would.
    """
    num_experts = model.config.num_experts or 0
    stacked = [name for name, _ in model.named_parameters() if kind(name) == "experts"]
    routers = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    keywords = {
        EVERYTHING: {name for name, _ in model.named_parameters()},
        "router": {name for name, parameter in model.named_parameters() if id(parameter) in routers},
        "experts": set(stacked),
    }
    whole: set[str] = set()
    parts: dict[str, set[int]] = {name: set() for name in stacked}
    for pattern in patterns(train):
        of_expert = OF_EXPERT.fullmatch(pattern)
        glob = f"*.{int(of_expert[1])}" if of_expert else pattern
        names = keywords.get(pattern) or {name for name in keywords[EVERYTHING] if fnmatchcase(name, pattern)}
        single = {
            (name, index) for name in stacked for index in range(num_experts) if fnmatchcase(f"{name}.{index}", glob)
        }
        if not names and not single:
            raise _matches_nothing(pattern, model)
        whole |= names
        for name, index in single:
            parts[name].add(index)
    whole |= {name for name, indices in parts.items() if len(indices) == num_experts}
    in_part = {name: frozenset(indices) for name, indices in parts.items() if indices and name not in whole}
    return Choice(frozenset(whole), in_part)


def patterns(train: str | Iterable[str]) -> tuple[str, ...]:
    """`optim.train` as the patterns it consists of, each once, in alphabetical order: their order means nothing."""
    return tuple(sorted({train} if isinstance(train, str) else set(train)))


def format_patterns(train: str | Iterable[str]) -> str:
    """`optim.train` as one writes it on the command line."""
    return train if isinstance(train, str) else f"[{','.join(train)}]"


def check_same_choice(train: str | tuple[str, ...], saved: str | Iterable[str], checkpoint: str) -> None:
    """Raise ConfigError unless `optim.train` is what the checkpoint was saved with: its moments are of that choice."""
    if patterns(train) != patterns(saved):
        raise ConfigError(
            f"optim.train={format_patterns(train)}: expected {format_patterns(saved)} as in the checkpoint "
            f"{checkpoint}, or another run.name (its optimizer state is of the weights that train)"
        )


def trained_elements(model: Transformer, choice: Choice) -> int:
    """Parameter elements of the whole (not sharded) `model` that train."""
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    in_part = sum(len(some) * torch.Size(sizes[name][1:]).numel() for name, some in choice.experts.items())
    return in_part + sum(sizes[name].numel() for name in choice.whole)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the weights (a router's selection bias), by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _parts(name: str, source: nn.Parameter, held: LocalShard, chosen: frozenset[int]) -> list[TrainableWeight]:
    (first, *offset), shape = held.region.offset, held.local.shape[1:]
    parts = []
    for row, matrix in enumerate(held.local):
        if first + row in chosen and matrix.numel():
            own = LocalShard(matrix, held.shape[1:], Region(tuple(offset), tuple(shape)))
            parts.append(TrainableWeight(f"{name}.{first + row}", source, row, own, nn.Parameter(matrix)))
    return parts


def _matches_nothing(pattern: str, model: Transformer) -> ConfigError:
    names = [name for name, _ in model.named_parameters()]
    keywords = [EVERYTHING]
    if model.config.num_experts is not None:
        keywords += ["router", "experts", *(f"expert:{index}" for index in range(model.config.num_experts))]
    return ConfigError(
        f"optim.train={pattern}: expected all, router, experts, expert:<index> or a glob over the names of this "
        f"model's parameters; the nearest is {nearest(pattern, keywords + names)}"
    )
