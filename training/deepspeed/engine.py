"""The engine that uses DeepSpeed's ZeRO, for data and expert parallelism. It implements `training.engine.Engine`.

The model, the dispatcher and the checkpoint format are the native engine's. deepspeed is imported only when an engine
is built.

DeepSpeed divides the sum of the gradients by the number of all ranks, also for experts. Mixwright's losses are
normalised by global counts, so gradients must be summed and not averaged. Each loss is therefore multiplied by the
number of ranks. The model casts its fp32 weights to the compute dtype where they are used. DeepSpeed therefore sees
fp32 weights, its own mixed precision stays off, and the results are those of the native engine.
"""

import copy
import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from moe.accounting.flops import meta_model
from moe.linear import Predict, linear
from moe.model import ModelInputs, Output, Transformer
from moe.region import LocalShard
from parallel.mesh import Mesh
from parallel.objective import Objective
from parallel.weight_shards import replica_group
from parallel.weight_specs import kind
from training.config import OptimConfig
from training.deepspeed.settings import check_choice, prints_diagnostics
from training.engine import run_whole
from training.norms import SquareSums
from training.trainable import (
    Trainable,
    choose_trainable,
    format_patterns,
    persistent_buffers,
    saved_parameters,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
EXPERT_MARKER = "deepspeed_marker"
"""Name of the submodule that tells DeepSpeed that the model has experts (`_optimizer_groups`)."""


class DeepSpeedEngine:
    """AdamW on weights, gradients and moments that ZeRO partitions.

    Dense weights are partitioned over all ranks. Experts are partitioned over the ranks that store the same experts.

    Under stage 3 a parameter is empty outside of a forward or backward pass. Read its shape before the engine is built.

    Args:
        parts: the whole model, as a list of one module.
        settings: the result of `deepspeed_settings`.

    Raises:
        ConfigError: a pattern of `optim.train` matches nothing, or matches single experts (`check_choice`).
    """

    def __init__(self, parts: Sequence[Transformer], config: OptimConfig, mesh: Mesh, settings: dict[str, Any]) -> None:
        (model,) = self.parts = list(parts)
        check_choice(
            choose_trainable(meta_model(model.config, model.router_config), config.train).experts,
            format_patterns(config.train),
        )
        self.model, self.mesh = model, mesh
        shards = ((name, model.local_shard(name, parameter)) for name, parameter in model.named_parameters())
        self.shard_places = {name: (shard.shape, shard.region) for name, shard in shards}
        """Parameter -> the shape of the whole tensor, and this rank's region. Read while parameters are not empty."""
        self.stage: int = settings["zero_optimization"]["stage"]
        self.trained = Trainable(self.parts, config.train).parameters
        _set_environment(mesh)
        deepspeed = _import(mesh.device, quiet=not prints_diagnostics(settings))
        groups = _optimizer_groups(model, self.trained, config, mesh, self.stage)
        optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=copy.deepcopy(settings), dist_init_required=False
        )
        self.zero = self.deepspeed.optimizer
        self._updates = 0
        self._allocate_moments()

    def run(self, micro_batches: Sequence[ModelInputs], objective: Objective) -> None:
        run_whole(self.model, micro_batches, objective, self.backward)

    @torch.no_grad()
    def forward(self, inputs: ModelInputs, predict: Predict = linear) -> list[tuple[Transformer, Output]]:
        return [(self.model, self.model(inputs, predict=predict))]

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of `loss` through DeepSpeed, which adds the gradients."""
        # The model is called directly, so the preparations of DeepSpeed's `forward` are made here. Without them, stage
        # 3 keeps the gradients of the last micro-batch only.
        self.zero.clear_backward_seen_flag()
        loss = loss * self.mesh.world.size()
        loss.register_hook(self._begin_backward)
        self.deepspeed.backward(loss)

    def _begin_backward(self, _: Tensor) -> None:
        self.deepspeed._backward_prologue()

    def step(self, lr: float, squares: SquareSums | None = None) -> Tensor:
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        with nullcontext() if squares is None else self._measured(squares):
            self.deepspeed.step()
        # DeepSpeed reports a norm that is not finite as infinite. No rank has changed its weights then.
        norm = float(self.deepspeed.get_global_grad_norm())
        self._updates += math.isfinite(norm)
        return torch.tensor(norm, dtype=torch.float64, device=self.mesh.device)

    @contextmanager
    def _measured(self, squares: SquareSums) -> Iterator[None]:
        """Add this rank's weights, and the gradients before DeepSpeed's step clips them, to `squares`. Collective,
        because ZeRO's partitions are gathered one by one.

        Below stage 3, the partitions of the gradients are complete from the computation of their norm on. DeepSpeed
        can skip it if a gradient is not finite. The gradients in `squares` are NaN then.
        """
        from deepspeed.utils import get_full_hp_grad, safe_get_full_grad

        taken = {name: parameter for name, parameter in self.model.named_parameters() if squares.take(name)}

        def add_gradients() -> None:
            squares.sums_2LF[1] = 0
            for name, parameter in taken.items():
                if name in self.trained:
                    full_gradient = safe_get_full_grad if self.stage == 3 else get_full_hp_grad
                    squares.add("gradient", name, LocalShard(full_gradient(parameter), *self.shard_places[name]))

        for name, parameter in taken.items():
            squares.add("weight", name, LocalShard(self._weight(parameter), *self.shard_places[name]))
        squares.sums_2LF[1] = torch.nan
        if self.stage == 3:
            add_gradients()
            yield
            return
        norm = self.zero.scaled_global_norm

        def norm_after_adding(*arguments: Any) -> Any:
            add_gradients()
            return norm(*arguments)

        self.zero.scaled_global_norm = norm_after_adding
        try:
            yield
        finally:
            del self.zero.scaled_global_norm

    def gradient_norms(self) -> Mapping[str, Tensor]:
        """Return nothing: DeepSpeed sums gradients during the backward pass."""
        return {}

    def tensors(self) -> dict[str, Tensor | LocalShard]:
        """Return weights, buffers and moments under the native engine's names. Collective, because they are gathered.

        Each rank gets all elements of its model: dense tensors whole, and its experts. Buffers, and weights below stage
        3, share the model's memory. All other tensors are copies. To load a checkpoint, fill the returned dict and pass
        it to `finish_loading`.
        """
        result: dict[str, Tensor | LocalShard] = {}
        for name, parameter in saved_parameters(self.model):
            result[f"model.{name}"] = LocalShard(self._weight(parameter), *self.shard_places[name])
        result |= {f"model.{name}": buffer for name, buffer in persistent_buffers(self.model).items()}
        for name, parameter in self.trained.items():
            for moment in MOMENTS:
                result[f"{moment}.{name}"] = LocalShard(self._moment(parameter, moment), *self.shard_places[name])
        return result

    def replicas(self) -> dict[str, tuple[Tensor, dist.ProcessGroup]]:
        """Return the weights below stage 3, and the buffers. ZeRO partitions everything else."""
        weights = self.model.named_parameters() if self.stage < 3 else ()
        stored = {name: weight.detach() for name, weight in weights} | persistent_buffers(self.model)
        return {f"model.{name}": (tensor, replica_group(name, self.mesh)) for name, tensor in stored.items()}

    @torch.no_grad()
    def finish_loading(self, tensors: Mapping[str, Tensor | LocalShard], updates: int) -> None:
        """Copy the loaded `tensors` into DeepSpeed's partitions. Collective.

        Args:
            tensors: the dict that `tensors` returned, filled from a checkpoint.
            updates: number of updates before the checkpoint.
        """
        self._updates = updates
        for state in self.zero.optimizer.state.values():
            state["step"].fill_(updates)
        values = {key: tensor.local if isinstance(tensor, LocalShard) else tensor for key, tensor in tensors.items()}
        if self.stage == 3:
            self._load_stage_3(values)
            return
        for name, parameter in self.trained.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # This rank's partition has no element of the parameter.
                continue
            mapping.update_hp()
            address = mapping.lp_fragment_address
            for moment in MOMENTS:
                fragment = values[f"{moment}.{name}"].flatten()[address.start : address.start + address.numel]
                mapping.get_optim_state_fragment(moment).copy_(fragment)

    @property
    def updates(self) -> int:
        return self._updates

    def close(self) -> None:
        """Release DeepSpeed's references to process groups. Call this before the process groups are destroyed.

        DeepSpeed keeps process groups at module scope, and they can abort the process when it exits.
        """
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        self.deepspeed.destroy()
        if hasattr(self.model, EXPERT_MARKER):
            delattr(self.model, EXPERT_MARKER)
        groups._release_process_group_references()
        comm.cdb = None

    def _allocate_moments(self) -> None:
        """Allocate the moments of all optimizer groups.

        If the first step allocated them, DeepSpeed would link only those of the first group to their parameters.
        """
        zero, state = self.zero, self.zero.optimizer.state
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            state[flat] = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
            state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return parameter.detach()  # In fp32 it is equal to the partitioned master weights after every step.
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment)

    def _load_stage_3(self, values: dict[str, Tensor]) -> None:
        """Copy this rank's partition of every weight and moment, then update the copies that forward passes use."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        self.zero.checkpoint_event_prologue()
        for name, parameter in saved_parameters(self.model):
            weight = _partition(values[f"model.{name}"], parameter)
            parameter.ds_tensor.copy_(weight)  # type: ignore[attr-defined]
            if name in self.trained:
                safe_set_local_fp32_param(parameter, weight)
                for moment in MOMENTS:
                    safe_set_local_optimizer_state(parameter, _partition(values[f"{moment}.{name}"], parameter), moment)
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero.checkpoint_event_epilogue()


def _partition(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this rank's flat partition of `value`, padded with zeros at the end as ZeRO-3 pads the parameter."""
    group, size = parameter.ds_process_group, parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    flat = F.pad(value.flatten(), (0, size * group.size() - value.numel()))
    return flat[size * group.rank() : size * (group.rank() + 1)]


def _optimizer_groups(
    model: Transformer, trained: dict[str, nn.Parameter], config: OptimConfig, mesh: Mesh, stage: int
) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups, after telling DeepSpeed which parameters are experts.

    DeepSpeed finds experts only in modules of a class that DeepSpeed defines. It partitions all other parameters over
    all ranks, as if every rank stored the same values. The model therefore gets a submodule of such a class, which has
    no parameters and is never called.
    """
    expert_names: set[str] = set()
    if mesh.expert.size() > 1:
        expert_names = {name for name, _ in model.named_parameters() if kind(name) == "experts"}
    if expert_names:
        group_name = _mark_experts(model, expert_names, mesh)
        if stage == 3 or expert_names & trained.keys():  # Below stage 3, ZeRO does not touch frozen experts.
            setattr(model, EXPERT_MARKER, _build_marker(model, group_name))
    groups = []
    for experts in (False, True):
        for matrix in (True, False):
            chosen = [p for key, p in trained.items() if (key in expert_names) == experts and (p.dim() >= 2) == matrix]
            if chosen:
                group = {"params": chosen, "weight_decay": config.weight_decay if matrix else 0.0}
                groups.append(group | ({"name": group_name, "moe": True} if experts else {"name": "dense"}))
    return groups


def _mark_experts(model: nn.Module, names: set[str], mesh: Mesh) -> str:
    """Mark the parameters `names` as experts, and register Mixwright's process groups with DeepSpeed.

    Returns:
        The group name in the marks, under which the process groups are registered.
    """
    from deepspeed.utils import groups

    group_name = f"ep_size_{mesh.expert.size()}"
    for key, parameter in model.named_parameters():
        if key in names:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name  # type: ignore[attr-defined]
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = group_name  # type: ignore[attr-defined]
    groups._EXPERT_PARALLEL_GROUP[group_name] = mesh.expert
    groups._EXPERT_PARALLEL_GROUP_RANKS[group_name] = dist.get_process_group_ranks(mesh.expert)
    groups._EXPERT_DATA_PARALLEL_GROUP[group_name] = mesh.expert_data
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[group_name] = dist.get_process_group_ranks(mesh.expert_data)
    return group_name


def _build_marker(model: Transformer, group_name: str) -> nn.Module:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class ExpertMarker(AutoEPMoELayer):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = model.config.num_experts
            self.num_local_experts = 0
            self.ep_group_name = group_name

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """Do nothing, because the process groups are Mixwright's."""

    return ExpertMarker()


def _set_environment(mesh: Mesh) -> None:
    """Set the environment variables that DeepSpeed reads, because only a launcher sets them.

    A variable that a shell or a cluster exports, without a launcher, does not describe this process.
    """
    if "RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"
    os.environ.setdefault("LOCAL_RANK", str(mesh.device.index or 0))
    os.environ["WORLD_SIZE"] = str(mesh.world.size())
    # DeepSpeed would compare it with LOCAL_RANK.
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    os.environ.setdefault("DS_ACCELERATOR", mesh.device.type)


def _import(device: torch.device, *, quiet: bool) -> Any:
    """Import deepspeed for `device`. With `quiet`, it prints errors only."""
    import deepspeed

    level = logging.ERROR if quiet else logging.INFO
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(level)
    for handler in logger.handlers:
        handler.setLevel(level)
    # In every step, DeepSpeed calls functions that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    if device.type == "cpu":
        # Training needs none of DeepSpeed's operators, so none is compiled. A build that is killed leaves a lock file.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed
