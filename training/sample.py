"""Text from the model that was just trained."""

from pathlib import Path

import torch.distributed as dist

from moe.accounting.flops import count_parameters, meta_model
from moe.generation.generate import generate
from moe.generation.sampling import Sampling
from parallel.apply import build_whole_model
from parallel.mesh import broadcast_from_first
from training.device import free_bytes
from training.engine import Engine
from training.formats.reader import open_model


def sample_tokens(
    engine: Engine, prompt: list[int], max_tokens: int, sampling: Sampling, end: int, directory: Path
) -> list[int] | None:
    """Token ids that follow `prompt`. Collective.

    Generation knows whole sequences and whole weights. Where ranks hold parts of either, rank 0 reads the whole model
    from the run's newest checkpoint; None where it does not fit beside what is there, and on other ranks.

    Args:
        end: token id that ends the text.
        directory: of the run, with a checkpoint of these weights.
    """
    mesh = engine.mesh
    if mesh.layout.sequence == mesh.layout.pipeline == mesh.layout.shard == 1:
        (model,) = engine.parts
        [ids] = generate(
            model,
            [prompt],
            max_tokens=max_tokens,
            sampling=sampling,
            stop=[end],
            agree=lambda logits_BV: broadcast_from_first(logits_BV, mesh),
        )
        return ids
    own = None
    if mesh.rank == 0:
        source = open_model(directory, check=False)
        dtype = engine.parts[0].compute_dtype
        needed = count_parameters(meta_model(source.model, source.router)).total * dtype.itemsize
        if needed < free_bytes(mesh.device) / 2:
            model = build_whole_model(source.model, source.router, mesh.device, dtype)
            source.fill(model)
            [own] = generate(model, [prompt], max_tokens=max_tokens, sampling=sampling, stop=[end])
    dist.barrier(mesh.world)
    return own
