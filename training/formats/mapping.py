"""How the tensors of another format lie in ours, as data: a list of pieces, read in either direction.

Shapes: E experts, F expert hidden, D model, C head dim.

Import takes each piece from their tensor, export puts it there, and a rank that holds some of the experts reads the
pieces that cut what it holds: one list serves all three.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from common.errors import ModelError
from moe.accounting.flops import meta_model
from moe.config import ModelConfig, RouterConfig
from training.formats.safetensors import Found, refuse

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """One block that both formats have."""

    ours: str
    our_offset: Shape
    shape: Shape
    """Of the block, in our dims. Theirs may lack leading ones, which are 1."""
    theirs: str
    their_offset: Shape
    their_shape: Shape
    """Of their whole tensor."""
    head_dim: int | None = None
    """Their rows are interleaved pairs, ours half-split, in heads of this many rows."""


class Format(NamedTuple):
    """Names of one format. Keys are names of ours with `N` for the layer.

    Values hold `{n}` for the layer, and `{e}` for the expert where a tensor is one expert's and ours are stacked.
    """

    names: Mapping[str, str]
    parts: Mapping[str, tuple[int, int]] = {}
    """`ours: (i, n)`: ours is the i-th of n equal parts of their tensor's second-last dim."""
    interleaved: frozenset[str] = frozenset()
    """Names whose rows are rotary pairs next to each other."""
    ignored: str = r"(?!)"
    """Pattern of their names that hold no weights."""
    tied: str = ""
    """Their name of the head, which a file may hold though the model has tied it to the embedding."""


def tensor_shapes(config: ModelConfig, router: RouterConfig) -> dict[str, Shape]:
    """Name and shape of everything that a model on disk consists of: our parameters and buffers."""
    return {name: tuple(tensor.shape) for name, tensor in meta_model(config, router).state_dict().items()}


def list_pieces(shapes: Mapping[str, Shape], form: Format, head_dim: int) -> list[Piece]:
    """The pieces of a model with tensors `shapes`; each element of ours is in exactly one.

    Raises:
        ModelError: the format has no place for one of them.
    """
    pieces = []
    for ours, shape in shapes.items():
        key = re.sub(r"^layers\.\d+\.", "layers.N.", ours)
        if key not in form.names:
            raise ModelError(f"{ours}: a tensor that this format has no place for")
        layer = ours.split(".")[1] if key != ours else ""
        theirs, none = form.names[key], (0,) * len(shape)
        if "{e}" in theirs:
            for expert in range(shape[0]):
                name = theirs.format(n=layer, e=expert)
                pieces.append(
                    Piece(ours, (expert, *none[1:]), (1, *shape[1:]), name, none[1:], shape[1:])
                )  # fmt: skip
            continue
        part, parts = form.parts.get(key, (0, 1))
        whole = (*shape[:-2], shape[-2] * parts, shape[-1]) if parts > 1 else shape
        offset = (*none[:-2], shape[-2] * part, 0) if parts > 1 else none
        rows = head_dim if key in form.interleaved else None
        pieces.append(Piece(ours, none, shape, theirs.format(n=layer), offset, whole, rows))
    return pieces


def check_tensors(where: Path, found: Mapping[str, Found], pieces: list[Piece], form: Format) -> None:
    """Hold what a directory has against what the model needs.

    Raises:
        ModelError: lists tensors that are missing, that nothing uses, or that have another shape.
    """
    expected = {piece.theirs: piece.their_shape for piece in pieces}
    refuse(where, "missing", expected.keys() - found.keys())
    extra = {name for name in found.keys() - expected.keys() if not re.fullmatch(form.ignored, name)}
    refuse(where, "that the model has no place for", extra - {form.tied})
    different = [
        f"{name} (found {list(found[name].shape)}, expected {list(shape)})"
        for name, shape in expected.items()
        if found[name].shape != shape
    ]
    refuse(where, "of another shape", different)


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (i, i + C/2) of each head, our half-split layout, become rows (2i, 2i + 1)."""
    heads = weight.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)


def split_halves(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave`."""
    heads = weight.unflatten(0, (-1, head_dim // 2, 2))
    return heads.transpose(1, 2).flatten(0, 2)
