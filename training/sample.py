"""A sample of text from the model that was just trained."""

from functools import partial
from pathlib import Path

import torch.distributed as dist

from data.corpora.chat import instruction
from data.tokens.tokenizer import Tokenizer
from moe.accounting.flops import count_parameters, meta_model
from moe.generation.generate import generate
from moe.generation.sampling import Sampling
from parallel.apply import build_whole_model
from parallel.mesh import broadcast_from_first
from training.config import Config
from training.device import free_bytes
from training.engine import Engine
from training.formats.reader import open_model

TEMPERATURE = 0.8


def sample_text(config: Config, tokenizer: Tokenizer, engine: Engine, directory: Path) -> str | None:
    """Generate `run.sample_tokens` tokens after `run.prompt`. Collective.

    Generation needs whole sequences and whole weights. If the layout shards either, rank 0 reads the whole model from
    the run's newest checkpoint.

    Args:
        directory: the run's directory, which has a checkpoint of the engine's weights.

    Returns:
        The text after the prompt. None if no sample is wanted. If the layout shards sequences or weights, also None on
        ranks other than 0, and on rank 0 if the whole model does not fit beside what its device stores.
    """
    if not config.run.sample_tokens:
        return None
    prompt = instruction(config.run.prompt) if config.data.kind == "sft" else config.run.prompt
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    sampling = Sampling(temperature=TEMPERATURE, seed=config.run.seed)
    continue_text = partial(
        generate, prompts=[tokens], max_tokens=config.run.sample_tokens, sampling=sampling, stop=[tokenizer.eos_id]
    )
    mesh = engine.mesh
    if mesh.layout.sequence == mesh.layout.pipeline == mesh.layout.shard == 1:
        (model,) = engine.parts
        [ids] = continue_text(model, agree=lambda logits_BV: broadcast_from_first(logits_BV, mesh))
        return tokenizer.decode(ids)
    text = None
    if mesh.rank == 0:
        source = open_model(directory, check=False)
        dtype = engine.parts[0].compute_dtype
        needed = count_parameters(meta_model(source.model, source.router)).total * dtype.itemsize
        if needed < free_bytes(mesh.device) / 2:
            model = build_whole_model(source.model, source.router, mesh.device, dtype)
            source.fill(model)
            [ids] = continue_text(model)
            text = tokenizer.decode(ids)
    dist.barrier(mesh.world)
    return text
