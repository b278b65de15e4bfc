"""Where the tensors of another format are in Mixwright's tensors: a list of pieces that can be read in both directions.

Shapes: E experts, F expert hidden, D model, C head dim.

Import copies each piece out of the foreign tensor, and export copies it into the foreign tensor. A rank that stores
some of the experts reads only the pieces that intersect its shards. One list serves all three.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from common.errors import ModelError, expect_no_tensors, require
from moe.accounting.flops import meta_model
from moe.config import ModelConfig, RouterConfig
from training.formats.safetensors import StoredTensor

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A block of elements that is in a Mixwright tensor and in a tensor of another format, the foreign tensor."""

    name: str
    """Mixwright's name of its tensor."""
    offset: Shape
    """First element of the block in Mixwright's tensor."""
    shape: Shape
    """The block's shape in Mixwright's tensor. The foreign tensor can lack leading dims of size 1."""
    foreign_name: str
    foreign_offset: Shape
    """First element of the block in the foreign tensor."""
    foreign_shape: Shape
    """Shape of the whole foreign tensor."""
    head_dim: int | None = None
    """Number of rows per head, if the foreign rows are interleaved rotary pairs. Mixwright's rows are half-split. None
    if the rows have the same order in both."""


class Format(NamedTuple):
    """The tensor names of one format."""

    names: Mapping[str, str]
    """Mixwright's name, with `N` for the layer's number -> the foreign name, with `{n}` for the layer's number. The
    foreign name also has `{e}`, the expert's number, if the format has one tensor per expert."""
    parts: Mapping[str, tuple[int, int]] = {}
    """Mixwright's name -> (i, n): the tensor is the i-th of n equal parts of the foreign tensor, along the second-last
    dim."""
    interleaved: frozenset[str] = frozenset()
    """Mixwright's names of the tensors whose foreign rows are interleaved rotary pairs."""
    ignored: str = r"(?!)"
    """Pattern of foreign names that are not weights."""
    tied_head: str = ""
    """The foreign name of the output head. A file can contain it even if the model ties it to the embedding."""


def tensor_shapes(config: ModelConfig, router: RouterConfig) -> dict[str, Shape]:
    """Return the name and shape of every tensor that is saved with a model: its parameters and persistent buffers."""
    return {name: tuple(tensor.shape) for name, tensor in meta_model(config, router).state_dict().items()}


def list_pieces(shapes: Mapping[str, Shape], form: Format, head_dim: int) -> list[Piece]:
    """Return the pieces of a model with the tensors `shapes`. Each element of the model is in exactly one piece.

    Args:
        shapes: Mixwright's name -> shape.

    Raises:
        ModelError: the format has no name for a tensor.
    """
    pieces = []
    for name, shape in shapes.items():
        key = re.sub(r"^layers\.\d+\.", "layers.N.", name)
        require(key in form.names, ModelError, f"{name}: this format has no place for this tensor")
        layer = name.split(".")[1] if key != name else ""
        foreign, zeros = form.names[key], (0,) * len(shape)
        if "{e}" in foreign:
            for expert in range(shape[0]):
                pieces.append(
                    Piece(name, (expert, *zeros[1:]), (1, *shape[1:]), foreign.format(n=layer, e=expert), zeros[1:], shape[1:])
                )  # fmt: skip
            continue
        part, parts = form.parts.get(key, (0, 1))
        foreign_shape = (*shape[:-2], shape[-2] * parts, shape[-1]) if parts > 1 else shape
        offset = (*zeros[:-2], shape[-2] * part, 0) if parts > 1 else zeros
        rows = head_dim if key in form.interleaved else None
        pieces.append(Piece(name, zeros, shape, foreign.format(n=layer), offset, foreign_shape, rows))
    return pieces


def check_tensors(where: Path, stored: Mapping[str, StoredTensor], pieces: list[Piece], form: Format) -> None:
    """Check that the directory `where` has exactly the tensors that the model needs.

    Raises:
        ModelError: lists tensors that are missing, that the model does not use, or that have another shape.
    """
    expected = {piece.foreign_name: piece.foreign_shape for piece in pieces}
    expect_no_tensors(where, "missing", expected.keys() - stored.keys(), ModelError)
    unused = {name for name in stored.keys() - expected.keys() if not re.fullmatch(form.ignored, name)}
    expect_no_tensors(where, "that the model has no place for", unused - {form.tied_head}, ModelError)
    different = [
        f"{name} (found {list(stored[name].shape)}, expected {list(shape)})"
        for name, shape in expected.items()
        if stored[name].shape != shape
    ]
    expect_no_tensors(where, "of another shape", different, ModelError)


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows from Mixwright's half-split layout to interleaved rotary pairs.

    In each head of C rows, the rows i and i + C/2 become the rows 2i and 2i + 1.

    Args:
        weight: [heads·C, D].
        head_dim: C.
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def split_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows from interleaved rotary pairs to Mixwright's half-split layout: the inverse of `interleave`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
