"""The tensors of another format: the files that have them, and where they are in Mixwright's tensors.

Shapes: E experts, F expert hidden, D model, H heads, C head dim, R rotated rows of a head.

The files are safetensors files from any source. Every byte is checked as untrusted input. Headers are read and checked
first. Tensors are read later, slice by slice, so that memory has no more than a caller asks for at once. Pickle files
(`.bin`, `.pth`, `.pt`) are never opened, because loading them can run any code.

A list of pieces, which can be read in both directions, says where the tensors are in Mixwright's. Import copies each
piece out of the foreign tensor, and export copies it into the foreign tensor. A rank that stores some of the experts
reads only the pieces that intersect its shards. One list serves all three.
"""

import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import ModelError, expect_no_tensors, require
from common.files import open_binary, read_file
from common.text import MAX_JSON, one_line, parse_json_object, printable, shorten
from moe.accounting.flops import meta_model
from moe.config import ModelConfig, RouterConfig
from moe.quantization import Packing
from training.formats.four_bits import KEY, MAX_STATE, METHOD, PARTS, STATE, FourBits

FP8 = "F8_E4M3"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    FP8: torch.float8_e4m3fn,
    "U8": torch.uint8,
}
SCALE_SUFFIX = "_scale_inv"
"""A tensor in FP8 has its scales in the tensor of its name and this suffix."""
MAX_HEADER = 32 << 20
"""The most bytes that a header can have. More than 200,000 tensors fit into it."""
MAX_DIMS = 64
"""The most dimensions of a tensor, as in torch."""
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
WEIGHTS = re.compile(r"(?i)[^.].*\.(safetensors(\.index\.json)?|bin|pth?|ckpt|gguf|h5|msgpack|npz|onnx)")
"""Names of files that can have weights. `NO_WEIGHTS` has the exceptions."""
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*\.(bin|pth?)")
"""Names of the state that transformers' Trainer saves beside the weights."""
MAPPED_BYTES = 256 << 20
"""Bytes that are read from one memory mapping of a file. Then the file is mapped again, because all pages that were
read through a mapping count as this process's memory."""
Shape = tuple[int, ...]
T = TypeVar("T")


class StoredTensor(NamedTuple):
    """One tensor in a file, as the file's header describes it."""

    file: Path
    dtype: torch.dtype
    """The dtype that the tensor is read as."""
    shape: tuple[int, ...]
    scales: "StoredTensor | None" = None
    """The scales of a tensor in FP8, one for each block of its last two dims."""
    four_bits: FourBits | None = None
    """How a matrix in 4 bits is stored."""
    parts: "Mapping[str, StoredTensor]" = MappingProxyType({})
    """The parts of a matrix in 4 bits."""


class TensorDirectory:
    """The names, dtypes and shapes of all tensors in a directory, and slices of the tensors.

    Weights in FP8 are read as bf16, the dtype that their publishers convert them to, and weights in 4 bits in the dtype
    that they were quantised from. Their scales are no tensors of their own.

    Args:
        index: name of the index file, whose `weight_map` gives the file of each tensor.
        single: name of the only safetensors file, for a directory without an index file.
        fp8_block: rows and columns of a block of a weight in FP8 that has one scale; None: no weight may be in FP8.
        four_bits: whether weights can be in 4 bits of bitsandbytes (`training.formats.four_bits`).

    Raises:
        ModelError: a header or the index file is damaged, they do not agree, a tensor is in two files, the directory
            has both the index file and the single file, with different tensors, or a weight in FP8 has no scales.

    Attributes:
        files: names of the files with the tensors, and of the index file if there is one.
    """

    def __init__(
        self,
        directory: Path,
        index: str,
        single: str,
        fp8_block: tuple[int, int] | None = None,
        four_bits: bool = False,
    ) -> None:
        self.fp8_block = fp8_block
        self.tensors: dict[str, StoredTensor] = {}
        self._mapped: tuple[Path, Any] | None = None
        self._bytes_read = 0
        file_of = _read_index(directory / index) if (directory / index).exists() else None
        files = [single] if file_of is None else sorted(set(file_of.values()))
        require(
            single in files or not (directory / single).exists(),
            ModelError,
            f"{directory}: found {single} and {index}: expected one of them; the tensors can differ",
        )
        self.files = files if file_of is None else [*files, index]
        for name in files:
            for tensor, stored in read_header(directory / name).items():
                if tensor in self.tensors:
                    both = f"{self.tensors[tensor].file.name} and {name}"
                    raise ModelError(f"{directory}: {_shown(tensor)}: expected in one file, found in {both}")
                self.tensors[tensor] = stored
        if file_of is not None:
            absent = [
                name
                for name, file in file_of.items()
                if name not in self.tensors or self.tensors[name].file.name != file
            ]
            expect_no_tensors(directory / index, "in the index, but not in the file it names", absent, ModelError)
            expect_no_tensors(
                directory / index,
                "in the files, but not in the index",
                self.tensors.keys() - file_of.keys(),
                ModelError,
            )
        for name in [name for name in self.tensors if four_bits and name.endswith(STATE)]:
            self._add_parts(name.removesuffix(STATE))
        for name, stored in list(self.tensors.items()):
            if stored.dtype == torch.float8_e4m3fn:
                self._add_scales(name, stored)
            where = f"{stored.file}: {_shown(name)}"
            expected = f"a matrix in 4 bits that {METHOD} has described" if four_bits else f"{KEY} of {METHOD}"
            require(stored.dtype != torch.uint8, ModelError, f"{where}: found dtype U8, expected {expected}")

    def _add_parts(self, name: str) -> None:
        """Check the parts of a matrix in 4 bits, and store them with it.

        Args:
            name: of the matrix. The tensor of this name and `STATE` exists.
        """
        described = self.tensors.pop(name + STATE)
        where = f"{described.file}: {_shown(name + STATE)}"
        try:
            if described.dtype != torch.uint8 or not 0 < prod(described.shape) <= MAX_STATE:
                raise ValueError(f"expected 1 to {MAX_STATE} bytes")
            text = self._read(name + STATE, described, (0,) * len(described.shape), described.shape)
            four_bits = FourBits.parse(bytes(text.flatten().tolist()))
        except ValueError as error:
            raise ModelError(f"{where}: damaged: {printable(one_line(str(error)))[:200]}") from error
        parts = {part: self.tensors.pop(f"{name}.{part}", None) for part in PARTS} | {"": self.tensors.get(name)}
        found = {part: stored for part, stored in parts.items() if stored is not None}
        sizes = {part: (stored.dtype, prod(stored.shape)) for part, stored in found.items()}
        expected = ", ".join(f"{part or 'codes'} {size}" for part, (_, size) in four_bits.parts().items())
        require(sizes == four_bits.parts(), ModelError, f"{where}: expected the parts {expected}, found others")
        self.tensors[name] = StoredTensor(described.file, four_bits.dtype, four_bits.shape, None, four_bits, found)

    def _add_scales(self, name: str, stored: StoredTensor) -> None:
        """Check the scales of a weight in FP8, and store them with it."""
        where = f"{stored.file}: {_shown(name)}"
        block = self.fp8_block
        if block is None:
            raise ModelError(f"{where}: found dtype {FP8}, expected a quantization_config with quant_method=fp8")
        scales = self.tensors.pop(name + SCALE_SUFFIX, None)
        if scales is None:
            raise ModelError(f"{where}: found dtype {FP8}, expected its scales in {_shown(name + SCALE_SUFFIX)}")
        blocks = tuple(-(-size // part) for size, part in zip(stored.shape[-2:], block, strict=False))
        expected = (*stored.shape[:-2], *blocks)
        require(
            len(blocks) == 2, ModelError, f"{where}: found dtype {FP8} of shape {list(stored.shape)}, expected a matrix"
        )
        code = next(code for code, dtype in DTYPES.items() if dtype == scales.dtype)
        wide = code not in (FP8, "U8")
        require(wide, ModelError, f"{where}{SCALE_SUFFIX}: found dtype {code}, expected F32, BF16 or F16")
        fits = scales.shape == expected
        require(fits, ModelError, f"{where}{SCALE_SUFFIX}: found shape {list(scales.shape)}, expected {list(expected)}")
        self.tensors[name] = stored._replace(dtype=torch.bfloat16, scales=scales)

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Return the block of `shape` at `offset` of the tensor `name`, in the file's dtype, or in fp32 if that is FP8.

        Raises:
            ModelError: the file no longer exists or no longer has the tensor.
        """
        stored = self.tensors[name]
        if stored.four_bits is not None:
            whole = self._of_parts(name, stored.four_bits.dequantise)
            return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        values = self._read(name, stored, offset, shape)
        if stored.scales is None or not values.numel():
            return values
        assert self.fp8_block is not None
        block = (*[1] * (len(shape) - 2), *self.fp8_block)
        first = tuple(o // size for o, size in zip(offset, block, strict=True))
        count = tuple(-(-(o + n) // size) - f for o, n, size, f in zip(offset, shape, block, first, strict=True))
        scales = self._read(name + SCALE_SUFFIX, stored.scales, first, count).float()
        rows, columns = self.fp8_block
        skipped = offset[-1] - first[-1] * columns
        scales = scales.repeat_interleave(columns, dim=-1)[..., skipped : skipped + shape[-1]]
        wide = values.float()
        for number in range(count[-2]):
            start = (first[-2] + number) * rows - offset[-2]
            wide[..., max(start, 0) : start + rows, :] *= scales[..., number : number + 1, :]
        return wide

    def repack(self, name: str, packing: Packing) -> Tensor | None:
        """Return the bytes of a matrix that is stored as `packing` says; None: it is stored in another way.

        Raises:
            ModelError: as `read`.
        """
        four_bits = self.tensors[name].four_bits
        return None if four_bits is None else self._of_parts(name, lambda parts: four_bits.repack(parts, packing))

    def _of_parts(self, name: str, function: Callable[[dict[str, Tensor]], T]) -> T:
        """Return what a function of the parts of a matrix in 4 bits returns."""
        parts, stored = {}, self.tensors[name]
        for part, tensor in stored.parts.items():
            part_name = f"{name}.{part}" if part else name
            parts[part] = self._read(part_name, tensor, (0,) * len(tensor.shape), tensor.shape)
        try:
            return function(parts)
        except ValueError as error:
            raise ModelError(f"{stored.file}: {_shown(name)}.quant_map: {error}") from error

    def _read(self, name: str, stored: StoredTensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Return a block of a tensor as it is stored."""
        try:
            file = self._open(stored.file, prod(shape) * stored.dtype.itemsize)
            if shape == stored.shape:
                return file.get_tensor(name)
            part: Tensor = file.get_slice(name)[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{stored.file}: {_shown(name)}: cannot be read: {error}") from error
        return part

    def _open(self, path: Path, size: int) -> Any:
        """Return the memory-mapped file `path`, from which the caller will read `size` bytes."""
        self._bytes_read += size
        if self._mapped is None or self._mapped[0] != path or self._bytes_read > MAPPED_BYTES:
            self._mapped = None  # Release the old mapping before the new one is made.
            open_binary(path).close()  # The library would wait for a named pipe.
            self._mapped = (path, safe_open(path, framework="pt"))
            self._bytes_read = size
        return self._mapped[1]


def weight_files(directory: Path) -> list[str]:
    """Return the names of the files in `directory` that can have weights, in any format, in alphabetical order.

    Hidden files and subdirectories are not listed.
    """
    names = (path.name for path in directory.iterdir() if not path.is_dir())
    return sorted(name for name in names if WEIGHTS.fullmatch(name) and not NO_WEIGHTS.fullmatch(name))


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of the safetensors file `file` and check it against the file's size.

    Returns:
        Name -> tensor, for every tensor in the file.

    Raises:
        ModelError: the file does not exist, or is not a complete safetensors file of floating-point tensors.
    """

    def check(holds: object, problem: str) -> None:
        require(holds, ModelError, f"{file}: {problem}")

    try:
        size = file.stat().st_size
        with open_binary(file) as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            check(start != b"version ", "found a Git LFS pointer, expected a safetensors file (run git lfs pull)")
            check(size >= 8 and length <= size - 8, f"damaged: a header of {length} bytes in a file of {size}")
            check(length <= MAX_HEADER, f"found a header of {length} bytes, expected at most {MAX_HEADER}")
            header = _parse(stream.read(length), file)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    header.pop("__metadata__", None)
    tensors, ranges = {}, []
    for key, entry in header.items():
        name = _shown(key)
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file}: {name}: damaged: not the entry of a tensor") from error
        check(
            isinstance(dtype, str) and dtype in DTYPES,
            f"{name}: found dtype {dtype!r}, expected one of {', '.join(DTYPES)}",
        )
        check(len(shape) <= MAX_DIMS, f"{name}: damaged: {len(shape)} dimensions, expected at most {MAX_DIMS}")
        check(
            all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, end)),
            f"{name}: damaged: shape {shorten(str(shape), 200)}, bytes {shorten(f'{start} to {end}', 200)}",
        )
        check(
            end - start == prod(shape) * DTYPES[dtype].itemsize,
            f"{name}: damaged: {end - start} bytes for {dtype} of shape {shape}",
        )
        ranges.append((start, end))
        tensors[key] = StoredTensor(file, DTYPES[dtype], shape)
    expected = 0
    for start, end in sorted(ranges):
        check(start == expected, f"damaged: a tensor starts at byte {start} of the data, expected {expected}")
        expected = end
    check(expected == size - 8 - length, f"damaged: {size - 8 - length} bytes of data, expected {expected}")
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`.

    Raises:
        ModelError: the file cannot be read, or is not a JSON object.
    """
    try:
        return _parse(read_file(file, MAX_JSON), file)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    try:
        return parse_json_object(text)
    except ValueError as error:
        raise ModelError(f"{file}: damaged: {error}") from error


def _read_index(file: Path) -> dict[str, str]:
    """Return tensor name -> file name, as the index file gives them."""
    file_of: Any = read_json(file).get("weight_map")
    require(
        isinstance(file_of, dict) and file_of and all(isinstance(name, str) for name in file_of.values()),
        ModelError,
        f"{file}: expected a weight_map from tensor names to file names",
    )
    for name in file_of.values():
        require(
            FILE_NAME.fullmatch(name),
            ModelError,
            f"{file}: found the file name {name!r}, expected <name>.safetensors beside the index",
        )
    return file_of


def _shown(name: str) -> str:
    """Return a tensor name from a file as text for a message."""
    return shorten(printable(name), 120)


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
    pairs: "PairedRows | None" = None
    """The rows that are interleaved rotary pairs in the foreign tensor. Mixwright's are half-split. None if the rows
    have the same order in both."""
    fp32: bool = False
    """Whether export writes the foreign tensor in fp32, whatever dtype is asked for."""


class PairedRows(NamedTuple):
    """Which rows of a tensor are rotary pairs."""

    head: int
    """Rows of a head."""
    rotated: int
    """How many of them are rotated: the last ones, or all."""


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
    fp32: frozenset[str] = frozenset()
    """Mixwright's names of the tensors that export writes in fp32, whatever dtype is asked for."""
    ignored: str = r"(?!)"
    """Pattern of foreign names that are not weights."""
    note: str = ""
    """One line for the user about tensors that match `ignored`; empty if there is nothing to say."""
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
                place, foreign_name = (expert, *zeros[1:]), foreign.format(n=layer, e=expert)
                pieces.append(Piece(name, place, (1, *shape[1:]), foreign_name, zeros[1:], shape[1:]))
            continue
        part, parts = form.parts.get(key, (0, 1))
        foreign_shape = (*shape[:-2], shape[-2] * parts, shape[-1]) if parts > 1 else shape
        offset = (*zeros[:-2], shape[-2] * part, 0) if parts > 1 else zeros
        pairs = _paired_rows(name, shapes, head_dim) if key in form.interleaved else None
        fp32 = key in form.fp32
        pieces.append(Piece(name, zeros, shape, foreign.format(n=layer), offset, foreign_shape, pairs, fp32))
    return pieces


def _paired_rows(name: str, shapes: Mapping[str, Shape], head_dim: int) -> PairedRows:
    """Return which rows of the tensor `name` are rotary pairs.

    With latent attention these are the last ones of each head of the queries, and of the map to the latent, which has
    one head.
    """
    module, _, leaf = name.removesuffix(".weight").rpartition(".")
    down = shapes.get(f"{module}.wkv_down.weight")
    if down is None:
        return PairedRows(head_dim, head_dim)
    rotated = down[0] - shapes[f"{module}.wkv_down_norm.weight"][0]
    return PairedRows(down[0] if leaf == "wkv_down" else head_dim, rotated)


def check_shapes(where: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Check that the directory `where` has exactly the tensors that the model needs, by name and shape.

    Raises:
        ModelError: lists tensors that are missing, that the model does not use, or that have another shape.
    """
    expect_no_tensors(where, "missing", expected.keys() - found.keys(), ModelError)
    expect_no_tensors(where, "that the model has no place for", found.keys() - expected.keys(), ModelError)
    different = [
        f"{name} (found {list(found[name])}, expected {list(shape)})"
        for name, shape in expected.items()
        if found[name] != shape
    ]
    expect_no_tensors(where, "of another shape", different, ModelError)


def check_tensors(where: Path, stored: Mapping[str, StoredTensor], pieces: list[Piece], form: Format) -> None:
    """Check that the directory `where` has exactly the tensors that the model needs.

    Raises:
        ModelError: as `check_shapes`.
    """
    expected = {piece.foreign_name: piece.foreign_shape for piece in pieces}
    optional = {name for name in stored if re.fullmatch(form.ignored, name)} | {form.tied_head}
    found = {name: tensor.shape for name, tensor in stored.items() if name in expected or name not in optional}
    check_shapes(where, found, expected)


def interleave(weight: Tensor, pairs: PairedRows) -> Tensor:
    """Reorder rows from Mixwright's order to interleaved rotary pairs.

    In Mixwright's order, the rows i and i + R/2 of the R rotated rows of a head are a pair. Interleaved, the rows 2i
    and 2i + 1 are.

    Args:
        weight: [heads · rows of a head, D].
    """
    return _reorder(weight, pairs, lambda rows_HRD: rows_HRD.unflatten(1, (2, -1)).transpose(1, 2))


def split_halves(weight: Tensor, pairs: PairedRows) -> Tensor:
    """Reorder rows from interleaved rotary pairs to Mixwright's order. This is the inverse of `interleave`."""
    return _reorder(weight, pairs, lambda rows_HRD: rows_HRD.unflatten(1, (-1, 2)).transpose(1, 2))


def _reorder(weight: Tensor, pairs: PairedRows, reorder: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `weight` with other rotated rows: `reorder` maps these [H, R, D] to [H, ., ., D]."""
    rows_HCD = weight.unflatten(0, (-1, pairs.head))
    others_HCD, rotated_HRD = rows_HCD.split((pairs.head - pairs.rotated, pairs.rotated), dim=1)
    return torch.cat((others_HCD, reorder(rotated_HRD).flatten(1, 2)), dim=1).flatten(0, 1)
