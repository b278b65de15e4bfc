"""The optimizer: AdamW, or one that a plugin registers. Matrices decay, norms do not."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from common.registry import Registry

if TYPE_CHECKING:  # the command line checks `optim.kind` without importing torch
    import torch


class OptimizerSpec(NamedTuple):
    """One kind of optimizer."""

    build: "Callable[[list[dict[str, Any]], Any], torch.optim.Optimizer]"
    """(parameter groups with `weight_decay`, the section `optim`) -> an optimizer. A learning rate is written into its
    groups before every step."""
    moments: tuple[str, ...]
    """Names of the state tensors that have the parameter's shape. They start at 0 and are saved in checkpoints."""


OPTIMIZERS: Registry[OptimizerSpec] = Registry("optim.kind")
"""Optimizers by the name that `optim.kind` takes."""


def _build_adamw(groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
    import torch

    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


OPTIMIZERS.add("adamw", OptimizerSpec(_build_adamw, ("exp_avg", "exp_avg_sq")))


def build_optimizer(parameters: "Sequence[torch.nn.Parameter]", config: Any) -> "torch.optim.Optimizer":
    """The optimizer of `parameters`, with its state allocated, so that a checkpoint can be loaded into it.

    Args:
        parameters: this rank's trainable parameters; empty if all of them are on other ranks.
        config: the section `optim`, a `training.config.OptimConfig`. Its default is AdamW, whose weight decay is
            decoupled (arXiv 1711.05101).
    """
    import torch

    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    spec = OPTIMIZERS[config.kind]
    optimizer = spec.build(groups, config)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{name: torch.zeros_like(parameter) for name in spec.moments},
        }
    return optimizer
