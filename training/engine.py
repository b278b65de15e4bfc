"""The engine: who owns weights, gradients and optimizer state, and turns a loss into an update.

The step (training/step.py) is written against the protocol, so that another engine changes nothing around it.
"""

import math
from typing import Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe.model import Transformer
from parallel.gradients import global_grad_norm, scale_gradients, split_parameters, sum_gradients
from parallel.mesh import Mesh
from training.config import OptimConfig
from training.optimizer import build_optimizer


class Engine(Protocol):
    model: Transformer
    mesh: Mesh

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients."""
        ...

    def step(self, lr: float) -> float:
        """Reduce, clip and apply the gradients; returns their global norm before clipping.

        A norm that is not finite (on any rank) changes no weight on any rank.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments under engine-neutral names, for saving and for loading in place."""
        ...

    @property
    def updates(self) -> int:
        """Updates applied so far (AdamW's bias correction counts them)."""
        ...

    def set_updates(self, updates: int) -> None: ...


class NativeEngine:
    """PyTorch's own AdamW on replicated dense weights and expert-parallel experts."""

    def __init__(self, model: Transformer, config: OptimConfig, mesh: Mesh) -> None:
        self.model = model
        self.mesh = mesh
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = build_optimizer(model, config)
        self.dense, self.experts = split_parameters(model)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        sum_gradients(self.dense, self.experts, self.mesh)
        norm = global_grad_norm(self.dense, self.experts, self.mesh)
        value = norm.item()
        if math.isfinite(value):
            if self.max_grad_norm is not None and value > self.max_grad_norm:
                scale_gradients(self.dense + self.experts, self.max_grad_norm / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def tensors(self) -> dict[str, Tensor]:
        of_experts = {id(parameter) for parameter in self.experts}
        result: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            held = {"model": parameter.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for kind, tensor in held.items():
                result[f"{kind}.{name}"] = self._placed(tensor) if id(parameter) in of_experts else tensor
        return result

    def _placed(self, shard: Tensor) -> Tensor:
        """This rank's experts as a part of the whole [E, ...]."""
        return DTensor.from_local(shard, self.mesh.device_mesh, [Replicate(), Shard(0)], run_check=False)

    @property
    def updates(self) -> int:
        return int(next(iter(self.optimizer.state.values()))["step"])

    def set_updates(self, updates: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)
