"""Which weights of a model have adapters, and the first values of the adapters (`moe.low_rank` has the mathematics)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.errors import ConfigError, require
from common.text import nearest_name
from moe.config import AdapterConfig, matches_part
from moe.experts import Experts
from moe.linear import Head, Linear
from moe.low_rank import LowRank
from moe.noise import fill_uniform
from moe.region import LocalShard
from moe.router import Router


def adaptable_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield every weight of `model` that can have an adapter: those of linear maps, routers and experts, not the head.

    Yields:
        (the name that patterns are compared with, the module, the name of its parameter).
    """
    for name, module in model.named_modules():
        if isinstance(module, Router) or (isinstance(module, Linear) and not isinstance(module, Head)):
            yield name, module, "weight"
        elif isinstance(module, Experts):
            for weight, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    yield f"{name}.{weight}", module, weight


def install_adapters(model: nn.Module, config: AdapterConfig) -> None:
    """Give the weights that `config.targets` names their adapters, with uninitialised parameters.

    Raises:
        ConfigError: a pattern matches no weight, or DoRA or dropout is to be applied to experts.
    """
    weights = list(adaptable_weights(model))
    for pattern in config.targets:
        used = any(matches_part(pattern, name) for name, _, _ in weights)
        require(used, ConfigError, _matches_nothing(pattern, weights))
    for name, module, weight in weights:
        if not config.chooses(name):
            continue
        adapter = LowRank(module.get_parameter(weight).shape, config, name)
        if isinstance(module, Experts):
            require(
                not config.dora,
                ConfigError,
                f"adapter.dora=true: expected false with an adapter of {name} (the rows of experts have no magnitudes)",
            )
            require(
                not config.dropout,
                ConfigError,
                f"adapter.dropout={config.dropout}: expected 0 with an adapter of {name} (the rows of experts are not "
                "those of the tokens)",
            )
            module.adapters = module.adapters or nn.ModuleDict()
            module.adapters[weight] = adapter
            module.fused = False
        elif isinstance(module, Linear | Router):
            module.adapter = adapter


def _matches_nothing(pattern: str, weights: list[tuple[str, nn.Module, str]]) -> str:
    parts = {part for name, _, _ in weights for part in (name, *name.split("."), ".".join(name.split(".")[2:]))}
    near = nearest_name(pattern, sorted(part for part in parts if not part.isdigit()))
    return (
        f"adapter.targets={pattern}: expected part of the name of a weight, such as attention, router, shared, experts "
        f"or attention.wq, or a glob; it matches nothing in this model{f'; the nearest is {near}' if near else ''}"
    )


def init_adapter(shards: dict[str, LocalShard], weight: Tensor, identity: str) -> None:
    """Fill this rank's shards of an adapter's parameters.

    A is uniform within 1/sqrt(I), as `torch.nn.Linear` and the library peft initialise it. B is 0.

    Args:
        shards: name -> shard of `a`, `b` and `magnitude`.
        weight: this rank's shard of the weight, of which magnitudes are computed. Its rows are those of the magnitudes.
        identity: what the numbers of A depend on: the seed and the name of the weight.
    """
    bound = 1 / math.sqrt(shards["a"].shape[-1])
    fill_uniform(shards["a"], f"{identity}/adapter", bound)
    shards["b"].local.zero_()
    if "magnitude" in shards:
        shards["magnitude"].local.copy_(torch.linalg.vector_norm(weight, dim=-1))
