"""From a configuration to the module that runs here, in one visible order.

Build on the meta device -> apply parallelism -> materialise -> initialise: no rank ever holds more than its share.
"""

import torch

from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.model import Transformer
from parallel.expert import shard_experts
from parallel.mesh import Mesh


def build_model(
    config: ModelConfig, router: RouterConfig, mesh: Mesh, *, compute_dtype: torch.dtype, seed: int
) -> Transformer:
    """This rank's part of the model, initialised; weights are fp32 (fp64 where `compute_dtype` is)."""
    with torch.device("meta"):
        model = Transformer(config, router, compute_dtype)
    if mesh.expert.size() > 1:
        shard_experts(model, mesh.expert)
    model.to(torch.promote_types(compute_dtype, torch.float32))
    model.to_empty(device=mesh.device)
    init_parameters(model, seed)
    return model
