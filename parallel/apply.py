"""From a configuration to the module that runs here, in one visible order.

Build on the meta device -> apply parallelism -> materialise -> initialise: no rank ever holds more than its share.
"""

import torch

from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.model import Transformer
from moe.router import Router
from parallel.expert import shard_experts
from parallel.mesh import Mesh


def build_model(
    config: ModelConfig,
    router: RouterConfig,
    mesh: Mesh,
    *,
    compute_dtype: torch.dtype,
    seed: int | None,
    lean: bool = False,
) -> Transformer:
    """This rank's part of the model; weights are fp32 (fp64 where `compute_dtype` is).

    Args:
        seed: of the initial weights. None leaves them to the caller, who fills every one of them.
        lean: weights in `compute_dtype`, to which every forward pass would cast them anyway: the results are the same.
            For models that do not train. Routers, which compute in at least fp32, keep theirs.
    """
    with torch.device("meta"):
        model = Transformer(config, router, compute_dtype)
    if mesh.expert.size() > 1:
        shard_experts(model, mesh.expert)
    wide = torch.promote_types(compute_dtype, torch.float32)
    model.to(compute_dtype if lean else wide)
    for module in model.modules():
        if isinstance(module, Router):
            module.to(wide)
    model.to_empty(device=mesh.device)
    if seed is not None:
        init_parameters(model, seed)
    return model
