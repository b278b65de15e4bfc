"""The engine stores weights, gradients and optimizer state, and turns micro-batches into an update.

The optimizer step (`training.step`) is written against the protocol `Engine`, so that it is the same for every engine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import ConfigError
from moe.device import on_gpu
from moe.linear import Predict, linear
from moe.model import ModelInputs, Output, Transformer
from moe.region import LocalShard
from parallel.fsdp import free_gathered_weights
from parallel.gradients import GradientReducer
from parallel.mesh import Mesh
from parallel.objective import Objective
from parallel.pipeline import Pipeline
from parallel.weight_shards import replica_group
from training.config import OptimConfig
from training.norms import SquareSums
from training.optimizer import OPTIMIZERS, build_optimizer
from training.trainable import Trainable, persistent_buffers, saved_parameters


class Engine(Protocol):
    """What the training loop needs of an engine."""

    parts: list[Transformer]
    """This rank's part of the model: one module, or in a pipeline one per stage of this rank."""
    mesh: Mesh

    def run(self, micro_batches: Sequence[ModelInputs], objective: Objective) -> None:
        """Run the forward and backward passes of all micro-batches, and add their gradients."""

    def forward(self, inputs: ModelInputs, predict: Predict = linear) -> list[tuple[Transformer, Output]]:
        """Run one batch through all parts without gradients; returns each part of this rank with its output.

        Args:
            predict: the argument of the last part's forward pass (`moe.model.Transformer.forward`).
        """

    def step(self, lr: float, squares: SquareSums | None = None) -> Tensor:
        """Reduce, clip and apply the gradients; returns their global norm before clipping, an fp64 scalar.

        If the norm is not finite, no weight changes on any rank.

        Args:
            squares: receives this rank's part of the weights before the update, and of the gradients before clipping.
        """

    def gradient_norms(self) -> Mapping[str, Tensor]:
        """The L2 norm of this rank's gradient of each parameter in the last step, before the sum over ranks.

        Scalars on the device. Empty if the engine does not know them.
        """

    def tensors(self) -> dict[str, Tensor | LocalShard]:
        """Weights, buffers and moments under engine-neutral names, for saving and for loading in place."""

    def replicas(self) -> dict[str, tuple[Tensor, dist.ProcessGroup]]:
        """This rank's tensors of `tensors()`, each with the ranks that store the same, bit for bit."""

    @property
    def updates(self) -> int:
        """The number of updates applied so far, on which AdamW's bias correction depends."""

    def finish_loading(self, tensors: Mapping[str, Tensor | LocalShard], updates: int) -> None:
        """Take over the values that a checkpoint was loaded into.

        Args:
            tensors: the dictionary that `tensors()` returned, filled.
            updates: the number of updates before the checkpoint.
        """

    def close(self) -> None:
        """Release everything, before the process group is destroyed."""


class NativeEngine:
    """A PyTorch optimizer on this rank's shards of the weights, with or without a pipeline.

    Raises:
        ConfigError: a pattern of `optim.train` matches no parameter.
    """

    def __init__(
        self, parts: Sequence[Transformer], config: OptimConfig, mesh: Mesh, pipeline: Pipeline | None = None
    ) -> None:
        """
        Args:
            pipeline: the pipeline that runs `parts`; None: `parts` is one model with all layers.
        """
        self.parts, self.mesh, self.pipeline = list(parts), mesh, pipeline
        self.max_grad_norm = config.max_grad_norm
        self.trainable = Trainable(self.parts, config.train)
        self.parameters = self.trainable.parameters
        self.optimizer = build_optimizer(list(self.parameters.values()), config)
        self.kind, self.moments = config.kind, OPTIMIZERS[config.kind].moments
        tied = frozenset(["embedding"] if pipeline is not None and self.parts[0].config.tie_embeddings else [])
        self.gradients = GradientReducer(self.parameters, mesh, tied)
        self.updates_on_device = config.kind == "adamw" and all(
            parameter.dtype == torch.float32 and on_gpu(parameter) for parameter in self.parameters.values()
        )
        """Whether the optimizer clips without the host. Its factor is fp32, which is too coarse for fp64 weights."""
        self._updates = torch.zeros((), dtype=torch.int64, device=mesh.device)

    def run(self, micro_batches: Sequence[ModelInputs], objective: Objective) -> None:
        if self.pipeline is not None:
            self.pipeline.run(micro_batches, objective)
        else:
            run_whole(self.parts[0], micro_batches, objective, self.backward)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to those of the weights."""
        loss.backward()

    @torch.no_grad()
    def forward(self, inputs: ModelInputs, predict: Predict = linear) -> list[tuple[Transformer, Output]]:
        if self.pipeline is not None:
            return self.pipeline.forward(inputs, predict)
        (model,) = self.parts
        output = model(inputs, predict=predict)
        free_gathered_weights(model)
        return [(model, output)]

    def step(self, lr: float, squares: SquareSums | None = None) -> Tensor:
        self.trainable.collect_gradients()
        self.gradients.sum()
        norm = self.gradients.norm()
        if squares is not None:
            self._measure(squares)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.updates_on_device:
            self._update_on_device(norm)
        else:
            self._update(norm)
        self._check_state()
        self._updates += norm.isfinite()
        self.trainable.clear_gradients()
        return norm

    def _measure(self, squares: SquareSums) -> None:
        for model in self.parts:
            for name, parameter in model.named_parameters():
                squares.add("weight", name, model.local_shard(name, parameter))
        for name, weight in self.trainable.weights.items():
            if weight.parameter.grad is not None:
                squares.add("gradient", name, weight.shard.like(weight.parameter.grad))

    def _update(self, norm: Tensor) -> None:
        """Clip the gradients and update the weights, unless `norm` is not finite. The host reads `norm`."""
        value = norm.item()
        if math.isfinite(value):
            if self.max_grad_norm is not None and value > self.max_grad_norm:
                self.gradients.scale(self.max_grad_norm / norm)
            self.optimizer.step()

    def _update_on_device(self, norm: Tensor) -> None:
        """The same as `_update`, up to rounding, but the host does not wait for a GPU.

        torch's fused AdamW divides the gradients by `grad_scale`. If `found_inf` is 1, it changes nothing.
        """
        if self.max_grad_norm is not None:
            self.optimizer.grad_scale = (norm / self.max_grad_norm).clamp(min=1).float()  # type: ignore[attr-defined]
        self.optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
        self.optimizer.step()

    def gradient_norms(self) -> Mapping[str, Tensor]:
        return self.gradients.local_norms

    def tensors(self) -> dict[str, Tensor | LocalShard]:
        """The shards of the weights that are saved (`saved_parameters`) and of persistent buffers, and the optimizer
        state of the trainable weights.

        If a single expert of a stacked weight trains, its state is named `exp_avg.<weight>.<expert>`, and only the
        ranks that have the expert name it.
        """
        found: dict[str, Tensor | LocalShard] = {}
        for model in self.parts:
            found |= {
                f"model.{name}": model.local_shard(name, parameter) for name, parameter in saved_parameters(model)
            }
            found |= {f"model.{name}": buffer for name, buffer in persistent_buffers(model).items()}
        for name, weight in self.trainable.weights.items():
            for moment in self.moments:
                found[f"{moment}.{name}"] = weight.shard.like(self.optimizer.state[weight.parameter][moment])
        return found

    def replicas(self) -> dict[str, tuple[Tensor, dist.ProcessGroup]]:
        found = {}
        weights = {
            f"model.{name}": model.local_shard(name, parameter)
            for model in self.parts
            for name, parameter in model.named_parameters()
        }
        for key, tensor in (weights | self.tensors()).items():
            name, local = key.partition(".")[2], tensor.local if isinstance(tensor, LocalShard) else tensor
            found[key] = (local, replica_group(name, self.mesh))
            if name in self.gradients.tied:
                assert self.mesh.ends is not None
                found[f"{key} (first and last stage)"] = (local, self.mesh.ends)
        return found

    @property
    def updates(self) -> int:
        return int(self._updates)

    def finish_loading(self, tensors: Mapping[str, Tensor | LocalShard], updates: int) -> None:
        self._updates.fill_(updates)
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)

    def close(self) -> None:
        """There is nothing to release."""

    def _check_state(self) -> None:
        """Raise ConfigError if the optimizer has state that no checkpoint would contain. One parameter is enough."""
        state = next(iter(self.optimizer.state.values()), None)
        if state is not None and state.keys() != {"step", *self.moments}:
            raise ConfigError(
                f"optim.kind={self.kind}: expected an optimizer whose state tensors are its `moments` "
                f"{list(self.moments)}, found {[name for name in state if name != 'step']}"
            )


def run_whole(
    model: Transformer, micro_batches: Sequence[ModelInputs], objective: Objective, backward: Callable[[Tensor], None]
) -> None:
    """`Engine.run` for a model that has all layers on this rank.

    Args:
        backward: called with the loss of every micro-batch.
    """
    for number, inputs in enumerate(micro_batches):
        output: Output = model(inputs, predict=partial(objective.compute_prediction_loss, micro_batch=number))
        loss = output.result
        if output.stats is not None:
            loss = loss + objective.compute_routing_loss(output.stats, model.moe_layers, number)
        backward(loss)
