"""Fully sharded data parallelism (FSDP2): `parallel.shard` ranks divide weights, gradients and optimizer state.

Weights are all-gathered where they are used.

Every block is an FSDP unit. Its experts are a separate unit, over the ranks that store the same experts. The rest of
the model (embedding, last norm, head) is the root unit. Weights are all-gathered in the compute dtype. Gradients are
reduce-scattered in the dtype of the weights, and summed instead of averaged, because training/step.py has already
normalised the loss. Routers are not sharded: they are small, and compute in at least fp32.

(FSDP: arXiv 2304.11277; FSDP2: torch.distributed.fsdp.fully_shard.)
"""

import itertools

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from moe.layer import Block, MoELayer
from moe.model import Transformer
from moe.router import Router
from parallel.mesh import Mesh
from parallel.weight_specs import shard_dim


def shard_weights(model: Transformer, mesh: Mesh, *, offload: bool, keep_gathered: bool) -> None:
    """Apply FSDP2 to the model, on the meta device. Call this after the other parallel axes have been applied.

    Args:
        offload: keep parameters, gradients and optimizer state in CPU memory.
        keep_gathered: keep the gathered weights between forward and backward passes. A pipeline needs this, because it
            runs several forward and backward passes per step.
    """
    wide = torch.promote_types(model.compute_dtype, torch.float32)
    # Weights are used in the compute dtype, which inference weights already have.
    policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=wide, cast_forward_inputs=False)
    offloading: OffloadPolicy = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload else OffloadPolicy()
    dense = DeviceMesh.from_group(mesh.shard, mesh.device.type, mesh_dim_names=("shard",))
    experts = DeviceMesh.from_group(mesh.expert_shard, mesh.device.type, mesh_dim_names=("expert_shard",))
    unsharded = unsharded_weights(model)

    def place(parameter: nn.Parameter, ranks: int) -> Shard:
        # Stacked experts have a dim more than others: [e, O, I], or their bytes [e, P] if they are quantised.
        stacked = parameter.dim() == (2 if parameter.dtype == torch.uint8 else 3)
        return Shard(shard_dim(parameter.shape, ranks, stacked=stacked))

    def shard(module: nn.Module, device_mesh: DeviceMesh, reshard: bool) -> None:
        fully_shard(
            module,
            mesh=device_mesh,
            reshard_after_forward=reshard,
            shard_placement_fn=lambda parameter: place(parameter, device_mesh.size()),
            mp_policy=policy,
            offload_policy=offloading,
            ignored_params=unsharded,
        )
        assert isinstance(module, FSDPModule)
        # Gradients are summed. torch's default is the mean over ranks, and needs an operation that gloo lacks.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)

    blocks = [block for block in model.layers if isinstance(block, Block)]
    for block in blocks:
        if isinstance(block.ffn, MoELayer):
            shard(block.ffn.experts, experts, not keep_gathered)
        shard(block, dense, not keep_gathered)
    shard(model, dense, False)
    _set_prefetch(blocks)


def unsharded_weights(model: Transformer) -> set[nn.Parameter]:
    """Return the parameters that FSDP leaves as they are: those of routers, and those of which this rank has no part.

    If a rank has no row of the vocabulary or no hidden unit, its parameter is empty, and FSDP does not take it.
    """
    routers = {weight for module in model.modules() if isinstance(module, Router) for weight in module.parameters()}
    return routers | {weight for weight in model.parameters() if not weight.numel()}


def free_gathered_weights(model: nn.Module) -> None:
    """Free the weights that are still gathered after a forward pass without a backward pass.

    These are the weights of the root unit, and in a pipeline those of every unit.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _set_prefetch(blocks: list[Block]) -> None:
    """Make each block all-gather the weights of the next block and of its experts while it computes."""

    def units(block: Block) -> list[FSDPModule]:
        modules = [block, block.ffn.experts] if isinstance(block.ffn, MoELayer) else [block]
        return [module for module in modules if isinstance(module, FSDPModule)]

    for block, next_block in itertools.pairwise(blocks):
        assert isinstance(block, FSDPModule) and isinstance(next_block, FSDPModule)
        block.set_modules_to_forward_prefetch(units(next_block))
        next_block.set_modules_to_backward_prefetch(list(reversed(units(block))))
