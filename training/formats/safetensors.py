"""The tensors of a directory of safetensors files from any source. Every byte is checked as untrusted input.

Headers are read and checked first. Tensors are read later, slice by slice, so that memory has no more than a caller
asks for at once. Pickle files (`.bin`, `.pth`, `.pt`) are never opened, because loading them can run any code.
"""

import re
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.checks import expect_no_tensors
from common.errors import ModelError
from common.json_object import parse_json_object
from common.text import printable, shorten

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_HEADER = 32 << 20
"""The most bytes that a header can have. More than 200,000 tensors fit into it."""
MAX_JSON = 64 << 20
"""The most bytes that a JSON file can have."""
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
MAPPED_BYTES = 256 << 20
"""Bytes that are read from one memory mapping of a file. Then the file is mapped again, because all pages that were
read through a mapping count as this process's memory."""


class StoredTensor(NamedTuple):
    """One tensor in a file, as the file's header describes it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorDirectory:
    """The names, dtypes and shapes of all tensors in a directory, and slices of the tensors.

    Args:
        index: name of the index file, whose `weight_map` gives the file of each tensor.
        single: name of the only safetensors file, for a directory without an index file.

    Raises:
        ModelError: a header or the index file is damaged, they do not agree, or a tensor is in two files.
    """

    def __init__(self, directory: Path, index: str, single: str) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        self._mapped: tuple[Path, Any] | None = None
        self._bytes_read = 0
        file_of = _read_index(directory / index) if (directory / index).exists() else None
        files = [single] if file_of is None else sorted(set(file_of.values()))
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
            unlisted = self.tensors.keys() - file_of.keys()
            expect_no_tensors(directory / index, "in the index, but not in the file it names", absent, ModelError)
            expect_no_tensors(directory / index, "in the files, but not in the index", unlisted, ModelError)

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Return the block of `shape` at `offset` of the tensor `name`, in the file's dtype.

        Raises:
            ModelError: the file no longer exists or no longer has the tensor.
        """
        stored = self.tensors[name]
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
            self._mapped = (path, safe_open(path, framework="pt"))
            self._bytes_read = size
        return self._mapped[1]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of the safetensors file `file` and check it against the file's size.

    Returns:
        Name -> tensor, for every tensor in the file.

    Raises:
        ModelError: the file does not exist, or is not a complete safetensors file of floating-point tensors.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(f"{file}: damaged: a header of {length} bytes in a file of {size}")
            if length > MAX_HEADER:
                raise ModelError(f"{file}: found a header of {length} bytes, expected at most {MAX_HEADER}")
            header = _parse(stream.read(length), file)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    header.pop("__metadata__", None)
    tensors, ranges = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file}: {_shown(name)}: damaged: not the entry of a tensor") from error
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ModelError(f"{file}: {_shown(name)}: found dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ModelError(f"{file}: {_shown(name)}: damaged: shape {shape}, bytes {start} to {end}")
        if end - start != prod(shape) * DTYPES[dtype].itemsize:
            raise ModelError(f"{file}: {_shown(name)}: damaged: {end - start} bytes for {dtype} of shape {shape}")
        ranges.append((start, end))
        tensors[name] = StoredTensor(file, DTYPES[dtype], shape)
    expected = 0
    for start, end in sorted(ranges):
        if start != expected:
            raise ModelError(f"{file}: damaged: a tensor starts at byte {start} of the data, expected {expected}")
        expected = end
    if expected != size - 8 - length:
        raise ModelError(f"{file}: damaged: {size - 8 - length} bytes of data, expected {expected}")
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`.

    Raises:
        ModelError: the file cannot be read, or is not a JSON object.
    """
    try:
        with open(file, "rb") as stream:
            text = stream.read(MAX_JSON + 1)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    if len(text) > MAX_JSON:
        raise ModelError(f"{file}: expected at most {MAX_JSON} bytes")
    return _parse(text, file)


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    try:
        return parse_json_object(text)
    except ValueError as error:
        raise ModelError(f"{file}: damaged: {error}") from error


def _read_index(file: Path) -> dict[str, str]:
    """Return tensor name -> file name, as the index file gives them."""
    file_of = read_json(file).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(name, str) for name in file_of.values()):
        raise ModelError(f"{file}: expected a weight_map from tensor names to file names")
    for name in file_of.values():
        if not FILE_NAME.fullmatch(name):
            raise ModelError(f"{file}: found the file name {name!r}, expected <name>.safetensors beside the index")
    return file_of


def _shown(name: str) -> str:
    """Return a tensor name from a file as text for a message."""
    return shorten(printable(name), 120)
