"""Pipeline parallelism: consecutive layers on different ranks, and micro-batches that pass through them.

The schedules are torch's (`torch.distributed.pipelining`): 1F1B and its interleaved form (arXiv 2104.04473), and the
interleaved zero bubble schedule (arXiv 2401.10241). Stages exchange hidden states only: every rank of `mesh.pipeline`
loads the same rows.

Shapes: B rows of a micro-batch, S sequence of this context rank, s the part of it on this tensor rank, D model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from moe.linear import Predict, linear
from moe.model import ModelInputs, Output, Transformer
from parallel.fsdp import free_gathered_weights
from parallel.mesh import Mesh
from parallel.objective import Objective
from parallel.stages import Schedule


class Pipeline:
    """The stages of this rank, and the schedule that passes micro-batches through all stages.

    Gradients are summed over micro-batches, not averaged. A stage without a trainable weight takes part as well.
    """

    def __init__(self, parts: Sequence[Transformer], stages: Sequence[int], mesh: Mesh, schedule: Schedule) -> None:
        """
        Args:
            parts: the model's layers of each stage of this rank.
            stages: the indices of these stages (`parallel.stages.stages_of`).
        """
        self.parts = list(parts)
        self.stages = list(stages)
        self.mesh = mesh
        self.schedule = schedule
        self.total = mesh.pipeline.size() * len(self.stages)
        self._built: tuple[tuple[int, torch.Size], Any, list[_Stage]] | None = None
        # NCCL needs all ranks of a group in the group's first communication; later ones are between two stages.
        dist.all_reduce(torch.zeros(1, device=mesh.device), group=mesh.pipeline)

    def run(self, micro_batches: Sequence[ModelInputs], objective: Objective) -> None:
        """Run the forward and backward passes of all micro-batches, which have one shape. Collective over the world.

        Args:
            micro_batches: the same on all ranks of `mesh.pipeline`. 1F1B needs at least as many as ranks P. The other
                schedules need a number n that is a multiple of max(1, n // P).
        """
        schedule, stages = self._schedule_for(len(micro_batches), micro_batches[0].tokens_BS.shape)
        for stage in stages:
            stage.work = micro_batches, objective
        numbers = torch.arange(len(micro_batches))
        try:
            schedule.step(number=numbers, target=numbers, return_outputs=False)
        finally:
            for stage in stages:
                stage.work = None
                # torch clears them when the next step begins; until then they would keep activations alive.
                stage.clear_runtime_states()

    @torch.no_grad()
    def forward(self, inputs: ModelInputs, predict: Predict = linear) -> list[tuple[Transformer, Output]]:
        """Pass one batch of any size through all stages, without gradients.

        Args:
            predict: the argument of the last part's forward pass.

        Returns:
            Each part of this rank with its output.
        """
        group, ranks = self.mesh.pipeline, self.mesh.pipeline.size()
        results = []
        for number, part in zip(self.stages, self.parts, strict=True):
            hidden_BsD = None
            if number > 0:
                shape = self._hidden_shape(inputs.tokens_BS.shape)
                hidden_BsD = torch.empty(shape, dtype=part.compute_dtype, device=self.mesh.device)
                dist.recv(hidden_BsD, group=group, group_src=(number - 1) % ranks)
            output: Output = part(inputs, hidden_BSD=hidden_BsD, predict=predict)
            if number < self.total - 1:
                dist.send(output.result.contiguous(), group=group, group_dst=(number + 1) % ranks)
            free_gathered_weights(part)
            results.append((part, output))
        return results

    def _hidden_shape(self, tokens: torch.Size) -> tuple[int, int, int]:
        return tokens[0], tokens[1] // self.mesh.tensor.size(), self.parts[0].config.dim

    def _schedule_for(self, micro_batches: int, tokens: torch.Size) -> tuple[Any, list["_Stage"]]:
        """torch's schedules are built for one number of micro-batches of one shape: build another if either changes."""
        key = (micro_batches, tokens)
        if self._built is None or self._built[0] != key:
            shape = self._hidden_shape(tokens)
            stages = [
                _Stage(part, number, self.total, self.mesh, shape)
                for part, number in zip(self.parts, self.stages, strict=True)
            ]
            kind = {"interleaved": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}
            schedule = (
                Schedule1F1B(stages[0], micro_batches, loss_fn=_as_loss, scale_grads=False)
                if self.schedule == "1f1b"
                else kind[self.schedule](list(stages), micro_batches, loss_fn=_as_loss, scale_grads=False)
            )
            self._built = key, schedule, stages
        return self._built[1:]


class _Stage(PipelineStage):
    """A part of the model as torch's schedules need it: it takes hidden states, and returns hidden states or the loss.

    The part is not wrapped in another module, because torch checks whether the part itself is an `FSDPModule`.
    """

    def __init__(self, part: Transformer, number: int, total: int, mesh: Mesh, shape: Sequence[int]) -> None:
        def example(*sizes: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*sizes, dtype=dtype, device="meta", requires_grad=True)

        hidden = example(*shape, dtype=part.compute_dtype)
        self.loss_dtype = torch.promote_types(part.compute_dtype, torch.float32)
        super().__init__(
            part,
            number,
            total,
            mesh.device,
            input_args=(hidden,) if number > 0 else (),
            output_args=(example(1, dtype=self.loss_dtype) if part.is_last else hidden,),
            group=mesh.pipeline,
        )
        self.part = part
        self.work: tuple[Sequence[ModelInputs], Objective] | None = None

    def forward_maybe_with_nosync(self, *received: Tensor, number: Tensor) -> Tensor:
        """Run the forward pass of micro-batch `number`, a tensor of shape (1,). Return hidden states or the loss."""
        assert self.work is not None
        micro_batches, objective = self.work
        micro_batch = int(number)
        hidden_BsD = _with_contiguous_gradient(received[0]) if received else None
        predict = partial(objective.compute_prediction_loss, micro_batch=micro_batch)
        output: Output = self.part(micro_batches[micro_batch], hidden_BSD=hidden_BsD, predict=predict)
        losses = []
        if output.stats is not None:
            losses.append(objective.compute_routing_loss(output.stats, self.part.moe_layers, micro_batch))
        if self.part.is_last:
            losses.append(output.result)
            return torch.stack([loss.to(self.loss_dtype) for loss in losses]).sum(dim=0, keepdim=True)
        hidden_BsD = output.result
        for loss in losses:
            hidden_BsD = _CarryLoss.apply(hidden_BsD, loss)
        if not hidden_BsD.requires_grad:  # nothing up to this stage trains, but torch needs a gradient to send back
            hidden_BsD = hidden_BsD.detach().requires_grad_()
        return hidden_BsD.contiguous()


class _CarryLoss(torch.autograd.Function):
    """Returns the hidden states unchanged. In the backward pass, the loss gets the gradient 1.

    (Megatron-LM's `MoEAuxLossAutoScaler` works in the same way.)
    """

    @staticmethod
    def forward(ctx: Any, hidden_BsD: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden_BsD.clone()  # the zero bubble schedule detaches it in place, which a view does not allow

    @staticmethod
    def backward(ctx: Any, grad_BsD: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_BsD, torch.ones_like(loss)


def _with_contiguous_gradient(hidden_BsD: Tensor) -> Tensor:
    """Return the same tensor, whose gradient will be contiguous, which sending requires."""
    hidden_BsD = hidden_BsD.view_as(hidden_BsD)
    hidden_BsD.register_hook(Tensor.contiguous)
    return hidden_BsD


def _as_loss(output: Tensor, _: Tensor) -> Tensor:
    return output.sum()
