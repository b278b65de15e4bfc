"""From a configuration to the module that runs on this rank, in one visible order.

Build on the meta device -> pipeline -> tensor -> expert -> quantise -> context -> recompute -> FSDP -> materialise ->
initialise.
No rank ever stores more than its shards.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.model import Transformer
from moe.quantization import FULL_PRECISION, QuantizeConfig
from moe.recompute import Recompute, set_recompute
from moe.router import Router
from parallel.context import install_rows, shard_attention
from parallel.expert import shard_experts
from parallel.fsdp import shard_weights, unsharded_weights
from parallel.mesh import Mesh
from parallel.tensor import shard_tensors
from parallel.weight_shards import shard_locator
from parallel.weight_specs import check_weights, named_weights


class Storage(NamedTuple):
    """How a rank stores the weights."""

    inference: bool = False
    """Keep the weights in the compute dtype, for models that do not train. The results do not change, because every
    forward pass casts the weights to it. Routers compute in at least fp32 and keep their fp32 weights."""
    quantize: QuantizeConfig = FULL_PRECISION
    """The weights that are stored in few bits. The caller fills them."""
    offload: bool = False
    """With FSDP, keep weights in CPU memory."""


TRAINING = Storage()


def build_model(
    config: ModelConfig,
    router: RouterConfig,
    mesh: Mesh,
    *,
    compute_dtype: torch.dtype,
    seed: int | None,
    storage: Storage = TRAINING,
    layers: Sequence[int] | None = None,
    recompute: Recompute = "none",
) -> Transformer:
    """Return this rank's part of the model. Weights that train are fp32, or fp64 if `compute_dtype` is.

    Args:
        seed: seed of the initial weights; None: the caller fills every weight.
        storage: in which dtype and where; by default in fp32 on the device.
        layers: the layers of a pipeline stage; None: all.
        recompute: which activations the backward pass computes again.
    """
    model = _build_on_meta(config, router, compute_dtype, storage.inference)
    if layers is not None:
        model.keep_layers(layers)
    if mesh.tensor.size() > 1:
        shard_tensors(model, mesh)
    if mesh.expert.size() * mesh.expert_tensor.size() > 1:
        shard_experts(model, mesh)
    model.quantize(storage.quantize)
    if mesh.context.size() > 1:
        shard_attention(model, mesh.context, mesh.layout.zigzag)
    if mesh.sequence.size() > 1:
        install_rows(model, mesh.sequence, mesh.layout)
    set_recompute(model, recompute)
    model.local_shard = shard_locator(mesh, named_weights(config, router))
    if mesh.layout.shard > 1:
        shard_weights(model, mesh, offload=storage.offload, keep_gathered=layers is not None)
    model.to_empty(device="cpu" if storage.offload else mesh.device)
    if storage.offload:  # FSDP moves the parameters that it shards between devices, and no others.
        for weight in unsharded_weights(model):
            weight.data = weight.data.to(mesh.device)
        for module in model.modules():
            if isinstance(module, Router):
                module.to(mesh.device)
    if seed is not None:
        init_parameters(model, seed)
    return model


def build_whole_model(
    config: ModelConfig,
    router: RouterConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantize: QuantizeConfig = FULL_PRECISION,
) -> Transformer:
    """Return the whole model on one device, not for training. The caller fills the weights, which have this dtype.

    Args:
        quantize: the weights that are stored in few bits.
    """
    model = _build_on_meta(config, router, dtype, inference_weights=True)
    model.quantize(quantize)
    return model.to_empty(device=device)


def _build_on_meta(
    config: ModelConfig, router: RouterConfig, compute_dtype: torch.dtype, inference_weights: bool
) -> Transformer:
    """Return the model on the meta device, in the dtypes that the weights will have."""
    with torch.device("meta"):
        model = Transformer(config, router, compute_dtype)
    check_weights({name: tuple(weight.shape) for name, weight in model.named_parameters()}, config, router)
    wide = torch.promote_types(compute_dtype, torch.float32)
    model.to(compute_dtype if inference_weights else wide)
    for module in model.modules():
        if isinstance(module, Router):
            module.to(wide)
    return model
