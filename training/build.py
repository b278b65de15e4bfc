"""From a configuration to this rank's part of the model and to the engine around it."""

from collections.abc import Sequence

import torch

from moe.compiled import CompiledBlocks
from moe.config import ModelConfig, RouterConfig
from moe.model import Transformer
from moe.router import Router, balance_reaches
from parallel.apply import Storage, build_model
from parallel.collectives import all_gather_json
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from parallel.stages import stage_layers, stages_of
from parallel.startup.launch import world_from_env
from training.compilation import choose_compilation, separate_caches
from training.config import Config
from training.deepspeed.settings import deepspeed_settings
from training.engine import Engine, NativeEngine


def build_parts(
    config: Config, model: ModelConfig, mesh: Mesh, dtype: torch.dtype, seed: int | None
) -> list[Transformer]:
    """Build this rank's part of the model: one module, or one for each of its pipeline stages.

    Args:
        dtype: compute dtype.
        seed: seed of the initial weights. None leaves the weights uninitialised, and the caller has to fill them.
    """
    parallel = config.parallel
    layers: list[range] | list[None] = [None]
    if mesh.pipeline.size() > 1:
        by_stage = stage_layers(model, config.router, parallel.num_stages(mesh.layout), parallel.stage_layers)
        layers = [by_stage[stage] for stage in stages_of(mesh.pipeline.rank(), mesh.layout, parallel.schedule)]
    parts = [
        build_model(
            model,
            config.router,
            mesh,
            compute_dtype=dtype,
            seed=seed,
            layers=layers_of_part,
            recompute=parallel.recompute,
            storage=Storage(quantize=config.quantize, offload=parallel.offload),
        )
        for layers_of_part in layers
    ]
    if choose_compilation(config, mesh.layout, mesh.device).on:
        separate_caches(world_from_env())
        for part in parts:
            part.run_block = CompiledBlocks(alone=mesh.world_size == 1)
    return parts


def unreached_routers(parts: Sequence[Transformer], router: RouterConfig, mesh: Mesh) -> list[int]:
    """Return the MoE layers whose router the balance loss does not change, if there is a balance loss. Collective.

    Args:
        parts: this rank's part of the model, before an engine shards it further.
    """
    if not router.balance_coef:
        return []
    unreached = []
    for part in parts:
        routers = [module for module in part.modules() if isinstance(module, Router)]
        layers = range(part.config.num_moe_layers)[part.moe_layers]
        for layer, module in zip(layers, routers, strict=True):
            if module.num_experts > 1 and not balance_reaches(module, part.compute_dtype):
                unreached.append(layer)
    return sorted({layer for layers in all_gather_json(unreached, mesh.world) for layer in layers})


def build_engine(config: Config, parts: Sequence[Transformer], mesh: Mesh) -> Engine:
    """Build the engine that the configuration names around `parts`. It keeps their weights. Collective."""
    if config.engine.kind == "deepspeed":
        from training.deepspeed.engine import DeepSpeedEngine

        settings = deepspeed_settings(config.engine, config.train, config.optim, mesh.world_size)
        return DeepSpeedEngine(parts, config.optim, mesh, settings)
    if mesh.pipeline.size() == 1:
        return NativeEngine(parts, config.optim, mesh)
    schedule = config.parallel.schedule
    stages = stages_of(mesh.pipeline.rank(), mesh.layout, schedule)
    return NativeEngine(parts, config.optim, mesh, Pipeline(parts, stages, mesh, schedule))
