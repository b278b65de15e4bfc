"""Making a MoE model directory from a dense one (`moe.upcycle`), with a few matrices in memory at a time."""

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
from training.formats.reader import ModelReader, split_experts

ReadTensor = Callable[[str], Tensor]


def upcycle_model(
    reader: ModelReader, out: Path, plan: Upcycling, *, dtype: Literal["fp32", "keep"], shard_bytes: int
) -> tuple[ModelConfig, int]:
    """Write the MoE model that `plan` makes from the reader's model, which must be dense.

    Args:
        out: the directory to write. After an error, it does not exist.
        dtype: `fp32`, the dtype that training uses for weights, or `keep` for the stored dtype of the dense tensors.
            New routers are fp32.
        shard_bytes: the most bytes of weights in one file.

    Returns:
        The configuration of the MoE model, and the size of the weights' files in bytes.

    Raises:
        ModelError: a tensor cannot be read, or `out` exists or cannot be written.
        ValueError: the plan does not fit the model. The message starts with `<field>=<value>`.
    """
    model = moe_config(reader.model, plan)
    check_tokenizer(reader)
    blocks = list(_list_blocks(reader, model, plan, dtype))
    return model, write_model(out, model, router_config(plan), blocks, reader.tokenizer, shard_bytes=shard_bytes)


def _list_blocks(
    reader: ModelReader, model: ModelConfig, plan: Upcycling, dtype: Literal["fp32", "keep"]
) -> Iterator[Block]:
    # The experts that are made from one dense matrix are written one after another, so caching one matrix is enough.
    read = lru_cache(maxsize=1)(partial(_read_wide, reader))
    for name, shape in tensor_shapes(model, router_config(plan)).items():
        whole = Region.whole(shape)
        origin = dense_name(name)
        if origin is None:
            weight = partial(router_matrix, name, model.dim, model.init_std, plan)
            bias = partial(torch.zeros, shape)
            yield Block(name, shape, whole, torch.float32, weight if len(shape) == 2 else bias)
            continue
        stored = torch.float32 if dtype == "fp32" else reader.dtype(origin)
        if origin == name:
            yield Block(name, shape, whole, stored, partial(_copy, read, name, stored))
            continue
        for region in split_experts(whole):
            yield Block(name, shape, region, stored, partial(_make_expert, read, name, region.offset[0], plan, stored))


def _copy(read: ReadTensor, name: str, stored: torch.dtype) -> Tensor:
    return read(name).to(stored)


def _make_expert(read: ReadTensor, name: str, expert: int, plan: Upcycling, stored: torch.dtype) -> Tensor:
    """Return the matrix of one expert as a block of the stacked tensor, [1, ., .]."""
    origin = dense_name(name)
    assert origin is not None
    return expert_matrix(read(origin), name, expert, plan).to(stored).unsqueeze(0)


def _read_wide(reader: ModelReader, name: str) -> Tensor:
    """Read the dense model's tensor `name`, as fp32 or as its stored dtype if that is wider."""
    wide = torch.promote_types(reader.dtype(name), torch.float32)
    return reader.read(name, Region.whole(reader.shapes[name]), wide)
