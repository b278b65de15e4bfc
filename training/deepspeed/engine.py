"""ZeRO by DeepSpeed behind the Engine protocol: data and expert parallelism, our model and dispatcher, one checkpoint
format. deepspeed is imported when an engine is built, never before.

Shapes: E experts, e experts held here.

DeepSpeed averages gradients over the world, the experts' too; losses here are globally normalised sums, so each is
multiplied by the world size. The model computes in fp32 or bf16 by itself (weights are cast where they are used), so
DeepSpeed sees fp32 weights and its own mixed precision stays off: numbers are those of the native engine.
"""

import copy
import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from moe.accounting.flops import meta_model
from moe.model import ModelInputs, Output, Transformer
from moe.region import LocalShard
from parallel.mesh import Mesh
from parallel.objective import Objective
from parallel.weight_specs import kind
from training.config import OptimConfig
from training.deepspeed.settings import check_choice, speaks
from training.engine import run_whole
from training.trainable import Trainable, choose_trainable, format_patterns, persistent_buffers

MOMENTS = ("exp_avg", "exp_avg_sq")
MARKER = "deepspeed_marker"


class DeepSpeedEngine:
    """AdamW on weights, gradients and moments that ZeRO partitions: dense ones over the world, experts over the ranks
    that hold the same ones.

    Under stage 3 a parameter outside of a forward or backward pass is empty: ask for its shape before.

    Raises:
        ConfigError: a pattern of `optim.train` matches nothing, or single experts (`check_choice`).
    """

    def __init__(self, parts: Sequence[Transformer], config: OptimConfig, mesh: Mesh, settings: dict[str, Any]) -> None:
        """`settings`: what `deepspeed_settings` returned."""
        (model,) = self.parts = list(parts)
        choice = choose_trainable(meta_model(model.config, model.router_config), config.train)
        check_choice(choice.experts, format_patterns(config.train))
        self.model = model
        located = ((name, model.local_shard(name, parameter)) for name, parameter in model.named_parameters())
        self.places = {name: (held.shape, held.region) for name, held in located}
        """Shape of the whole and region here: asked now, while parameters are whole."""
        self.mesh = mesh
        self.stage: int = settings["zero_optimization"]["stage"]
        self.trained = Trainable(self.parts, config.train).parameters
        deepspeed = _import(mesh.device, quiet=not speaks(settings))
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
    def forward(self, inputs: ModelInputs) -> list[tuple[Transformer, Output]]:
        return [(self.model, self.model(inputs))]

    def backward(self, loss: Tensor) -> None:
        # The model is called directly, so what DeepSpeed's own `forward` would have prepared is done here: without it
        # stage 3 keeps the last micro-batch's gradients only.
        self.zero.clear_backward_seen_flag()
        loss = loss * self.mesh.world.size()
        loss.register_hook(self._begin_backward)
        self.deepspeed.backward(loss)

    def _begin_backward(self, _: Tensor) -> None:
        self.deepspeed._backward_prologue()

    def step(self, lr: float) -> float:
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        # A norm that is not finite is reported as infinite, and no rank has stepped.
        norm = float(self.deepspeed.get_global_grad_norm())
        self._updates += math.isfinite(norm)
        return norm

    def tensors(self) -> dict[str, Tensor | LocalShard]:
        """Weights, buffers and moments under the names the native engine gives them, whole on every rank (experts: the
        rank's own). Gathering is collective. Buffers, and weights below stage 3, are the live ones; the rest are
        copies: after loading into the dict, give it to `finish_loading`.
        """
        found: dict[str, Tensor | LocalShard] = {}
        for name, parameter in self.model.named_parameters():
            found[f"model.{name}"] = LocalShard(self._weight(parameter), *self.places[name])
        found |= {f"model.{name}": buffer for name, buffer in persistent_buffers(self.model).items()}
        for name, parameter in self.trained.items():
            for moment in MOMENTS:
                found[f"{moment}.{name}"] = LocalShard(self._moment(parameter, moment), *self.places[name])
        return found

    @torch.no_grad()
    def finish_loading(self, tensors: Mapping[str, Tensor | LocalShard], updates: int) -> None:
        """Collective."""
        self._updates = updates
        for state in self.zero.optimizer.state.values():
            state["step"].fill_(updates)
        values = {key: found.local if isinstance(found, LocalShard) else found for key, found in tensors.items()}
        if self.stage == 3:
            self._take_partitioned(values)
            return
        for name, parameter in self.trained.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # none of it lies in this rank's partition
                continue
            mapping.update_hp()
            at = mapping.lp_fragment_address
            for moment in MOMENTS:
                part = values[f"{moment}.{name}"].flatten()[at.start : at.start + at.numel]
                mapping.get_optim_state_fragment(moment).copy_(part)

    @property
    def updates(self) -> int:
        return self._updates

    def close(self) -> None:
        """Before the process group goes: DeepSpeed keeps groups at module scope, where they may abort the exit."""
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        self.deepspeed.destroy()
        if hasattr(self.model, MARKER):
            delattr(self.model, MARKER)
        groups._release_process_group_references()
        comm.cdb = None

    def _allocate_moments(self) -> None:
        """All of them at once: DeepSpeed links only the first group's when the first step makes them."""
        zero, state = self.zero, self.zero.optimizer.state
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            state[flat] = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
            state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return parameter.detach()  # fp32: equal to the partitioned master weights after every step
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment)

    def _take_partitioned(self, values: dict[str, Tensor]) -> None:
        """Stage 3: this rank's partition of every weight and moment, then the copies that forward passes use."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        self.zero.checkpoint_event_prologue()
        for name, parameter in self.model.named_parameters():
            own = _partition(values[f"model.{name}"], parameter)
            parameter.ds_tensor.copy_(own)  # type: ignore[attr-defined]
            if name in self.trained:
                safe_set_local_fp32_param(parameter, own)
                for moment in MOMENTS:
                    part = _partition(values[f"{moment}.{name}"], parameter)
                    safe_set_local_optimizer_state(parameter, part, moment)
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero.checkpoint_event_epilogue()


def _partition(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's flat part of `value`, padded with zeros at the end as ZeRO-3 pads."""
    group, size = parameter.ds_process_group, parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    flat = F.pad(value.flatten(), (0, size * group.size() - value.numel()))
    return flat[size * group.rank() : size * (group.rank() + 1)]


def _optimizer_groups(
    model: Transformer, trained: dict[str, nn.Parameter], config: OptimConfig, mesh: Mesh, stage: int
) -> list[dict[str, Any]]:
    """AdamW's parameter groups, after DeepSpeed has been told which parameters are experts.

    It knows experts only by modules of its own classes, and partitions the parameters of others over the world, as if
    all ranks held the same: so the model gets a module of such a class that has no parameters and is never called.
    """
    apart: set[str] = set()
    if mesh.expert.size() > 1:
        apart = {name for name, _ in model.named_parameters() if kind(name) == "experts"}
    if apart:
        name = _mark_experts(model, apart, mesh)
        if stage == 3 or apart & trained.keys():  # below stage 3, experts that are frozen are none of ZeRO's business
            setattr(model, MARKER, _marker(model, name))
    groups = []
    for expert in (False, True):
        for matrix in (True, False):
            chosen = [p for key, p in trained.items() if (key in apart) == expert and (p.dim() >= 2) == matrix]
            if chosen:
                group = {"params": chosen, "weight_decay": config.weight_decay if matrix else 0.0}
                groups.append(group | ({"name": name, "moe": True} if expert else {"name": "dense"}))
    return groups


def _mark_experts(model: nn.Module, names: set[str], mesh: Mesh) -> str:
    """Mark the parameters and register our groups under the name that the marks give."""
    from deepspeed.utils import groups

    name = f"ep_size_{mesh.expert.size()}"
    for key, parameter in model.named_parameters():
        if key in names:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = name  # type: ignore[attr-defined]
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = name  # type: ignore[attr-defined]
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.expert
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(mesh.expert)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.expert_data
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(mesh.expert_data)
    return name


def _marker(model: Transformer, group_name: str) -> nn.Module:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class Marker(AutoEPMoELayer):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = model.config.num_experts
            self.num_local_experts = 0
            self.ep_group_name = group_name

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """Nothing: the groups are ours."""

    return Marker()


def _import(device: torch.device, *, quiet: bool) -> Any:
    """deepspeed, for `device`, printing errors only if `quiet`."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    level = logging.ERROR if quiet else logging.INFO
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(level)
    for handler in logger.handlers:
        handler.setLevel(level)
    # It calls torch by names that torch 2.13 is giving up, in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    if device.type == "cpu":
        # Nothing to compile: training needs no operator of its own, and a killed build leaves a lock behind.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed
