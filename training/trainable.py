"""Which weights train: `optim.train` as a choice of parameters, and of single experts inside the stacked ones.

Shapes: E experts, e experts held here, D model, F expert hidden.

The choice is made on names, so that every rank makes the same one. A stacked parameter of which one expert trains
requires a gradient on every rank, also on those that hold none of the experts that train: autograd then walks the same
graph everywhere, and so does the all-to-all in it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from moe.experts import Experts
from moe.model import Transformer
from moe.router import Router
from training.strict import ConfigError, nearest

EVERYTHING = "all"
OF_EXPERT = re.compile(r"expert:(\d+)")


@dataclass(frozen=True)
class Choice:
    """What trains, by global names; the same on all ranks."""

    whole: frozenset[str]
    """Parameters that train in full."""
    experts: dict[str, frozenset[int]]
    """Stacked parameters that train in part -> the experts (global indices) that do."""


@dataclass(frozen=True)
class ExpertPart:
    """One expert's matrix inside a stacked parameter [e, ., .], as a parameter of its own for the optimizer."""

    name: str
    """`<stacked parameter>.<global expert index>`"""
    stacked: nn.Parameter
    row: int
    parameter: nn.Parameter
    """[., .]: shares the stacked parameter's memory."""

    def take_gradient(self) -> None:
        """A view of the stacked gradient becomes this part's."""
        grad = self.stacked.grad
        self.parameter.grad = None if grad is None else grad[self.row]


class Trainable:
    """Sets `requires_grad` all over `model` (possibly sharded) and holds what its optimizer is to step on.

    Raises:
        ConfigError: a pattern matches nothing.
    """

    def __init__(self, model: Transformer, train: str | tuple[str, ...]) -> None:
        choice = choose(model, train)
        of_experts = expert_modules(model)
        self.parts: list[ExpertPart] = []
        self.dense: dict[str, nn.Parameter] = {}
        """What every rank holds."""
        self.experts: dict[str, nn.Parameter] = {}
        """What belongs to the routed experts held here: stacked parameters or, where only some train, parts of them."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in choice.whole or name in choice.experts)
            if name in choice.whole:
                (self.experts if name in of_experts else self.dense)[name] = parameter
            elif name in choice.experts:
                self.parts += _parts(name, parameter, of_experts[name], choice.experts[name])
        self.experts |= {part.name: part.parameter for part in self.parts}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.dense.values(), *self.experts.values()]

    def take_gradients(self) -> None:
        """After the last backward pass of a step: parts get theirs."""
        for part in self.parts:
            part.take_gradient()

    def drop_gradients(self) -> None:
        """Free every gradient, those of stacked parameters that train in part included."""
        for parameter in self.parameters:
            parameter.grad = None
        for part in self.parts:
            part.stacked.grad = None


def choose(model: Transformer, train: str | tuple[str, ...]) -> Choice:
    """What `train` means for `model` (on the meta device, sharded or whole).

    Raises:
        ConfigError: a pattern matches nothing; names the nearest that would.
    """
    num_experts = model.config.num_experts or 0
    stacked = expert_modules(model)
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


def shown(train: str | Iterable[str]) -> str:
    """`optim.train` as one writes it on the command line."""
    return train if isinstance(train, str) else f"[{','.join(train)}]"


def check_resumed(train: str | tuple[str, ...], saved: str | Iterable[str], checkpoint: str) -> None:
    """Raise ConfigError unless `optim.train` is what the checkpoint was saved with: its moments are of that choice."""
    if patterns(train) != patterns(saved):
        raise ConfigError(
            f"optim.train={shown(train)}: expected {shown(saved)} as in the checkpoint {checkpoint}, or another "
            "run.name (its optimizer state is of the weights that train)"
        )


def expert_modules(model: nn.Module) -> dict[str, Experts]:
    """Name of each stacked parameter -> the module of routed experts it belongs to."""
    return {
        f"{prefix}.{name}": module
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    }


def trained_elements(model: Transformer, choice: Choice) -> int:
    """Parameter elements of the whole (not sharded) `model` that train."""
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    in_part = sum(len(some) * torch.Size(sizes[name][1:]).numel() for name, some in choice.experts.items())
    return in_part + sum(sizes[name].numel() for name in choice.whole)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the weights (a router's selection bias), by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _parts(name: str, stacked: nn.Parameter, module: Experts, chosen: frozenset[int]) -> list[ExpertPart]:
    held = range(module.first_expert, module.first_expert + module.held)
    return [
        ExpertPart(f"{name}.{index}", stacked, row, nn.Parameter(stacked.detach()[row]))
        for row, index in enumerate(held)
        if index in chosen
    ]


def _matches_nothing(pattern: str, model: Transformer) -> ConfigError:
    names = [name for name, _ in model.named_parameters()]
    keywords = [EVERYTHING]
    if model.config.num_experts is not None:
        keywords += ["router", "experts", *(f"expert:{index}" for index in range(model.config.num_experts))]
    return ConfigError(
        f"optim.train={pattern}: expected all, router, experts, expert:<index> or a glob over the names of this "
        f"model's parameters; the nearest is {nearest(pattern, keywords + names)}"
    )
