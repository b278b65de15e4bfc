"""The engine: who owns weights, gradients and optimizer state, and turns micro-batches into an update.

The step (training/step.py) is written against the protocol, so that another engine changes nothing around it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe.model import Output, Transformer
from moe.region import LocalShard
from parallel.fsdp import free_gathered_weights
from parallel.gradients import global_grad_norm, scale_gradients, sum_gradients
from parallel.mesh import Mesh
from parallel.objective import Inputs, Objective
from parallel.pipeline import Pipeline
from training.config import OptimConfig
from training.optimizer import build_optimizer
from training.trainable import Trainable, persistent_buffers


class Engine(Protocol):
    parts: list[Transformer]
    """This rank's part of the model: one module, or in a pipeline one for each of its stages."""
    mesh: Mesh

    def run(self, micro_batches: Sequence[Inputs], objective: Objective) -> None:
        """Forward and backward of all micro-batches: adds their gradients."""
        ...

    def forward(self, inputs: Inputs) -> list[tuple[Transformer, Output]]:
        """Each part's output, without gradients; that of the last stage holds logits."""
        ...

    def step(self, lr: float) -> float:
        """Reduce, clip and apply the gradients; returns their global norm before clipping.

        A norm that is not finite (on any rank) changes no weight on any rank.
        """
        ...

    def tensors(self) -> dict[str, Tensor | LocalShard]:
        """Weights, buffers and moments under engine-neutral names, for saving and for loading in place."""
        ...

    @property
    def updates(self) -> int:
        """Updates applied so far (AdamW's bias correction counts them)."""
        ...

    def finish_loading(self, tensors: Mapping[str, Tensor | LocalShard], updates: int) -> None:
        """`tensors`, as `tensors()` returned them, were filled from a checkpoint with so many updates behind it."""
        ...

    def close(self) -> None:
        """The end, before the process group's."""
        ...


class NativeEngine:
    """PyTorch's own AdamW on the parts of weights that lie here, and a pipeline where there is one.

    Raises:
        ConfigError: a pattern of `optim.train` matches nothing in the model.
    """

    def __init__(
        self, parts: Sequence[Transformer], config: OptimConfig, mesh: Mesh, pipeline: Pipeline | None = None
    ) -> None:
        """`pipeline`: of these `parts`; None: they are one whole model."""
        self.parts = list(parts)
        self.mesh = mesh
        self.pipeline = pipeline
        self.max_grad_norm = config.max_grad_norm
        self.trainable = Trainable(self.parts, config.train)
        self.parameters = self.trainable.parameters
        self.optimizer = build_optimizer(list(self.parameters.values()), config)
        shares_ends = pipeline is not None and self.parts[0].config.tie_embeddings
        self.tied = frozenset(["embedding"] if shares_ends else [])
        """LocalShard by the first and by the last stage."""
        self._updates = 0

    def run(self, micro_batches: Sequence[Inputs], objective: Objective) -> None:
        if self.pipeline is not None:
            self.pipeline.run(micro_batches, objective)
            return
        run_whole(self.parts[0], micro_batches, objective, self.backward)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> list[tuple[Transformer, Output]]:
        if self.pipeline is not None:
            return self.pipeline.forward(inputs)
        (model,) = self.parts
        output = model(**inputs)
        free_gathered_weights(model)
        return [(model, output)]

    def step(self, lr: float) -> float:
        self.trainable.collect_gradients()
        sum_gradients(self.parameters, self.mesh, self.tied)
        norm = global_grad_norm(self.parameters, self.mesh, self.tied)
        value = norm.item()
        if math.isfinite(value):
            if self.max_grad_norm is not None and value > self.max_grad_norm:
                scale_gradients(self.parameters.values(), self.max_grad_norm / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._updates += 1
        self.trainable.clear_gradients()
        return value

    def tensors(self) -> dict[str, Tensor | LocalShard]:
        """Weights and persistent buffers of everything, moments of what trains.

        A single expert that trains inside a stacked weight has moments of its own, `exp_avg.<weight>.<expert>`, which
        only the ranks that hold it name.
        """
        found: dict[str, Tensor | LocalShard] = {}
        for model in self.parts:
            found |= {
                f"model.{name}": model.local_shard(name, parameter) for name, parameter in model.named_parameters()
            }
            found |= {f"model.{name}": buffer for name, buffer in persistent_buffers(model).items()}
        for name, weight in self.trainable.weights.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"{moment}.{name}"] = weight.held.like(self.optimizer.state[weight.parameter][moment])
        return found

    @property
    def updates(self) -> int:
        return self._updates

    def finish_loading(self, tensors: Mapping[str, Tensor | LocalShard], updates: int) -> None:
        self._updates = updates
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)

    def close(self) -> None:
        """Nothing outlives it."""


def run_whole(
    model: Transformer, micro_batches: Sequence[Inputs], objective: Objective, backward: Callable[[Tensor], None]
) -> None:
    """`Engine.run` of a model that is whole here, layer by layer."""
    for number, inputs in enumerate(micro_batches):
        output: Output = model(**inputs)
        loss = objective.compute_prediction_loss(output.logits_BSV, number)
        if output.stats is not None:
            loss = loss + objective.compute_routing_loss(output.stats, model.moe_layers, number)
        backward(loss)
