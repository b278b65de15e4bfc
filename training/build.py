"""From a configuration to the engine that it names, around the part of the model that lies here."""

from collections.abc import Sequence

import torch

from moe.config import ModelConfig
from moe.model import Transformer
from parallel.apply import build_model
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from parallel.stages import stage_layers, stages_of
from training.config import Config
from training.deepspeed.settings import deepspeed_settings
from training.engine import Engine, NativeEngine


def build_parts(
    config: Config, model: ModelConfig, mesh: Mesh, dtype: torch.dtype, seed: int | None
) -> list[Transformer]:
    """This rank's part of the model: one module, or one for each of its pipeline stages.

    Args:
        dtype: of the computation.
        seed: of the initial weights; None leaves them to the caller.
    """
    parallel = config.parallel
    layers: list[range] | list[None] = [None]
    if mesh.pipeline.size() > 1:
        of_stages = stage_layers(model, mesh.pipeline.size() * parallel.stages_per_rank, parallel.stage_layers)
        layers = [of_stages[stage] for stage in stages_of(mesh.pipeline.rank(), mesh.layout, parallel.schedule)]
    return [
        build_model(
            model,
            config.router,
            mesh,
            compute_dtype=dtype,
            seed=seed,
            layers=of_part,
            recompute=parallel.recompute,
            offload=parallel.offload,
        )
        for of_part in layers
    ]


def build_engine(config: Config, parts: Sequence[Transformer], mesh: Mesh) -> Engine:
    """The engine around `parts`, whose weights it takes as they are. Collective."""
    if config.engine.kind == "deepspeed":
        from training.deepspeed.engine import DeepSpeedEngine

        settings = deepspeed_settings(config.engine, config.train, config.optim, mesh.world_size)
        return DeepSpeedEngine(parts, config.optim, mesh, settings)
    if mesh.pipeline.size() == 1:
        return NativeEngine(parts, config.optim, mesh)
    schedule = config.parallel.schedule
    stages = stages_of(mesh.pipeline.rank(), mesh.layout, schedule)
    return NativeEngine(parts, config.optim, mesh, Pipeline(parts, stages, mesh, schedule))
