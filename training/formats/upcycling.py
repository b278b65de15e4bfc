"""A MoE model directory out of a dense one, streamed: memory holds a few matrices at a time."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.region import Region
from moe.upcycle import Upcycling, dense_name, expert_matrix, moe_config, router_config, router_matrix
from training.formats.mapping import tensor_shapes
from training.formats.model_directory import Block, check_tokenizer, write_model
from training.formats.reader import ModelReader, blocks

Read = Callable[[str], Tensor]


def upcycle_model(
    source: ModelReader, out: Path, plan: Upcycling, *, dtype: Literal["fp32", "keep"], shard_bytes: int
) -> tuple[ModelConfig, int]:
    """Write the directory `out`, whole or not at all; returns its model and the bytes of its weights.

    Args:
        source: a dense model.
        dtype: of the weights: fp32, as training keeps them, or what the dense model's are stored in.

    Raises:
        ModelError: a tensor that cannot be read, or an `out` that exists or cannot be written.
        ValueError: the plan does not fit the model; starts with `<field>=<value>`.
    """
    model = moe_config(source.model, plan)
    check_tokenizer(source)
    parts = list(_parts(source, model, plan, dtype))
    return model, write_model(out, model, router_config(plan), parts, source.tokenizer, shard_bytes=shard_bytes)


def _parts(source: ModelReader, model: ModelConfig, plan: Upcycling, dtype: Literal["fp32", "keep"]) -> Iterator[Block]:
    # A matrix's experts are written one after another: the last matrix read serves them all.
    read = lru_cache(maxsize=1)(partial(_read, source))
    for name, shape in tensor_shapes(model, router_config(plan)).items():
        whole = Region.whole(shape)
        origin = dense_name(name)
        if origin is None:
            weight = partial(router_matrix, name, model.dim, model.init_std, plan)
            bias = partial(torch.zeros, shape)
            yield Block(name, shape, whole, torch.float32, weight if len(shape) == 2 else bias)
            continue
        stored = torch.float32 if dtype == "fp32" else source.dtype(origin)
        if origin == name:
            yield Block(name, shape, whole, stored, partial(_copied, read, name, stored))
            continue
        for region in blocks(whole):
            yield Block(name, shape, region, stored, partial(_expert, read, name, region.offset[0], plan, stored))


def _copied(read: Read, name: str, stored: torch.dtype) -> Tensor:
    return read(name).to(stored)


def _expert(read: Read, name: str, expert: int, plan: Upcycling, stored: torch.dtype) -> Tensor:
    """One expert's matrix as a block of the stacked tensor, [1, ., .]."""
    origin = dense_name(name)
    assert origin is not None
    return expert_matrix(read(origin), name, expert, plan).to(stored).unsqueeze(0)


def _read(source: ModelReader, name: str) -> Tensor:
    """The dense model's tensor `name`, in fp32 or, where it is stored wider, in that."""
    wide = torch.promote_types(source.dtype(name), torch.float32)
    return source.read(name, Region.whole(source.shapes[name]), wide)
