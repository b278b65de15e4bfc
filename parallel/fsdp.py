"""FSDP2: the ranks of `parallel.shard` share out weights, gradients and optimizer state, and gather weights for use.

Every block is a unit, its experts are one of their own over the ranks that hold the same experts, and the rest of the
model (embedding, last norm, head) is the root. Weights travel in the compute dtype, gradients in the dtype of the
weights; they are summed, never averaged (training/step.py has normalised the loss). Routers stay whole: they are small,
and compute in at least fp32.

(FSDP: arXiv 2304.11277; its second form, by parameter: torch.distributed.fsdp.fully_shard.)
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
    """Apply it; call this last, on the meta device.

    Args:
        offload: parameters, gradients and optimizer state lie in CPU memory.
        keep_gathered: keep weights between forward and backward (a pipeline runs many of both in between).
    """
    wide = torch.promote_types(model.compute_dtype, torch.float32)
    # A inference_weights model holds its weights in the compute dtype already; either way they are used in it.
    policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=wide, cast_forward_inputs=False)
    place: OffloadPolicy = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload else OffloadPolicy()
    dense = DeviceMesh.from_group(mesh.shard, mesh.device.type, mesh_dim_names=("shard",))
    experts = DeviceMesh.from_group(mesh.expert_shard, mesh.device.type, mesh_dim_names=("expert_shard",))
    routers = {weight for module in model.modules() if isinstance(module, Router) for weight in module.parameters()}

    def cut(module: nn.Module, over: DeviceMesh, reshard: bool) -> None:
        fully_shard(
            module,
            mesh=over,
            reshard_after_forward=reshard,
            shard_placement_fn=lambda parameter: Shard(shard_dim(parameter.shape, over.size())),
            mp_policy=policy,
            offload_policy=place,
            ignored_params=routers,
        )
        assert isinstance(module, FSDPModule)
        # Sums: torch's own factor is the mean over ranks (and needs an operation that gloo lacks).
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)

    for block in model.layers:
        if not isinstance(block, Block):
            continue
        if isinstance(block.ffn, MoELayer):
            cut(block.ffn.experts, experts, not keep_gathered)
        cut(block, dense, not keep_gathered)
    cut(model, dense, False)
    _prefetch([block for block in model.layers if isinstance(block, Block)])


def free_gathered_weights(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass left gathered: the root, or in a pipeline every unit."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _prefetch(blocks: list[Block]) -> None:
    """While a block computes, the weights of the next one travel, its experts' too."""

    def units(block: Block) -> list[FSDPModule]:
        found = [block, block.ffn.experts] if isinstance(block.ffn, MoELayer) else [block]
        return [unit for unit in found if isinstance(unit, FSDPModule)]

    for block, following in itertools.pairwise(blocks):
        assert isinstance(block, FSDPModule) and isinstance(following, FSDPModule)
        block.set_modules_to_forward_prefetch(units(following))
        following.set_modules_to_backward_prefetch(list(reversed(units(block))))
