"""Directories of runs with random adapters, on which reading, merging and exporting are tested."""

from pathlib import Path

import torch

from moe.config import AdapterConfig, split_adapter_name
from moe.init import init_adapters
from moe.model import Transformer
from moe.region import Region
from training.formats.model_directory import Block, write_model
from training.formats.reader import describe_base, open_model


def write_run(base: Path, adapter: AdapterConfig, out: Path) -> Path:
    """Write a run with random adapters of the model `base`, with its tokenizer."""
    reader = open_model(base)
    object.__setattr__(reader.model, "adapter", adapter)  # as training/config.py:Config does
    model = Transformer(reader.model, reader.router, torch.float32)
    init_adapters(model, 1)
    generator = torch.Generator().manual_seed(2)
    blocks = []
    for name, parameter in model.named_parameters():
        part = split_adapter_name(name)[1]
        if part is not None:
            value = parameter.detach() if part == "a" else torch.randn(parameter.shape, generator=generator)
            value = value.abs() + 0.5 if part == "magnitude" else value
            shape = tuple(value.shape)
            blocks.append(Block(name, shape, Region.whole(shape), torch.float32, value.clone))
    write_model(out, reader.model, reader.router, blocks, reader.tokenizer, base=describe_base(open_model(base)))
    return out
