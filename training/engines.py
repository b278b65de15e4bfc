"""From a configuration to the engine that it names, around the part of the model that lies here."""

from collections.abc import Sequence

import torch

from moe.config import ModelConfig
from moe.model import Transformer
from parallel.apply import build_model
from parallel.mesh import Mesh
from training.config import Config
from training.engine import Engine, NativeEngine


def build_parts(
    config: Config, model: ModelConfig, mesh: Mesh, dtype: torch.dtype, seed: int | None
) -> list[Transformer]:
    """This rank's part of the model: one module, or one for each of its pipeline stages.

    Args:
        dtype: of the computation.
        seed: of the initial weights; None leaves them to the caller.
    """
    return [
        build_model(
            model,
            config.router,
            mesh,
            compute_dtype=dtype,
            seed=seed,
            recompute=config.parallel.recompute,
            offload=config.parallel.offload,
        )
    ]


def build_engine(config: Config, parts: Sequence[Transformer], mesh: Mesh) -> Engine:
    return NativeEngine(parts, config.optim, mesh)
