"""The engine: who owns weights, gradients and optimizer state, and turns a loss into an update.

The step (training/step.py) is written against the protocol, so that another engine changes nothing around it.
"""

import math
from typing import Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe.model import Transformer
from parallel.gradients import global_grad_norm, scale_gradients, sum_gradients
from parallel.mesh import Mesh
from training.config import OptimConfig
from training.optimizer import build_optimizer
from training.trainable import Trainable, expert_modules, persistent_buffers


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
        """Weights, buffers and moments under engine-neutral names, for saving and for loading in place."""
        ...

    @property
    def updates(self) -> int:
        """Updates applied so far (AdamW's bias correction counts them)."""
        ...

    def set_updates(self, updates: int) -> None: ...


class NativeEngine:
    """PyTorch's own AdamW on replicated dense weights and expert-parallel experts.

    Raises:
        ConfigError: a pattern of `optim.train` matches nothing in `model`.
    """

    def __init__(self, model: Transformer, config: OptimConfig, mesh: Mesh) -> None:
        self.model = model
        self.mesh = mesh
        self.max_grad_norm = config.max_grad_norm
        self.trainable = Trainable(model, config.train)
        self.dense = list(self.trainable.dense.values())
        self.experts = list(self.trainable.experts.values())
        self.optimizer = build_optimizer(self.dense + self.experts, config)
        self._updates = 0

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        self.trainable.take_gradients()
        sum_gradients(self.dense, self.experts, self.mesh)
        norm = global_grad_norm(self.dense, self.experts, self.mesh)
        value = norm.item()
        if math.isfinite(value):
            if self.max_grad_norm is not None and value > self.max_grad_norm:
                scale_gradients(self.dense + self.experts, self.max_grad_norm / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._updates += 1
        self.trainable.drop_gradients()
        return value

    def tensors(self) -> dict[str, Tensor]:
        """Weights and persistent buffers of everything, moments of what trains.

        A single expert that trains inside a stacked weight has moments of its own, `exp_avg.<weight>.<expert>`, plain
        tensors that only the ranks that hold it name.
        """
        of_experts = expert_modules(self.model)
        held: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            held[f"model.{name}"] = self._placed(parameter.detach()) if name in of_experts else parameter.detach()
        held |= {f"model.{name}": buffer for name, buffer in persistent_buffers(self.model).items()}
        for name, parameter in (self.trainable.dense | self.trainable.experts).items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensor = self.optimizer.state[parameter][moment]
                held[f"{moment}.{name}"] = self._placed(tensor) if name in of_experts else tensor
        return held

    def _placed(self, shard: Tensor) -> Tensor:
        """This rank's experts as a part of the whole [E, ...]."""
        return DTensor.from_local(shard, self.mesh.device_mesh, [Replicate(), Shard(0)], run_check=False)

    @property
    def updates(self) -> int:
        return self._updates

    def set_updates(self, updates: int) -> None:
        self._updates = updates
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)
