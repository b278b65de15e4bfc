"""The tensors of a directory of safetensors files that somebody else made: every byte is input, and is checked as such.

Headers are read and checked first, without a tensor; then tensors are read slice by slice, so that memory holds no more
than what a caller asks for at once. Pickle files (`.bin`, `.pth`, `.pt`) are never opened: loading them runs code.
"""

import json
import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import ModelError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_HEADER = 32 << 20
"""Bytes of a header that are parsed: more than 200,000 tensors fill."""
MAX_JSON = 64 << 20
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
MAPPED_BYTES = 256 << 20
"""Read from one mapping of a file, before it is mapped anew: what was read counts as this process's memory."""


class Found(NamedTuple):
    """One tensor, as a file's header has it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorDirectory:
    """Names, dtypes and shapes of all tensors, and slices of them.

    Raises:
        ModelError: an index or header that is damaged, or that names what it should not.
    """

    def __init__(self, directory: Path, index: str, single: str) -> None:
        """
        Args:
            index: file whose `weight_map` says which tensor lies in which file, where there are several.
            single: the one file, where there is no index.
        """
        self.directory = directory
        self.tensors: dict[str, Found] = {}
        self._mapped: tuple[Path, Any] | None = None
        self._bytes_read = 0
        placed = _read_index(directory / index) if (directory / index).exists() else None
        files = [single] if placed is None else sorted(set(placed.values()))
        for name in files:
            for tensor, found in read_header(directory / name).items():
                if tensor in self.tensors:
                    both = f"{self.tensors[tensor].file.name} and {name}"
                    raise ModelError(f"{directory}: {shown(tensor)}: expected in one file, found in {both}")
                self.tensors[tensor] = found
        if placed is not None:
            refuse(directory / index, "in the index, not where it says", _misplaced(placed, self.tensors))
            refuse(directory / index, "in the files, not in the index", self.tensors.keys() - placed.keys())

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The block of `shape` at `offset` of the tensor `name`, in the dtype of the file.

        Raises:
            ModelError: the file is gone, or is no longer what its header said.
        """
        found = self.tensors[name]
        try:
            file = self._map(found.file, prod(shape) * found.dtype.itemsize)
            if shape == found.shape:
                return file.get_tensor(name)  # type: ignore[no-any-return]
            part: Tensor = file.get_slice(name)[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{found.file}: {name}: cannot be read: {error}") from error
        return part

    def _map(self, path: Path, size: int) -> Any:
        """The file, of which `size` bytes are about to be read."""
        self._bytes_read += size
        if self._mapped is None or self._mapped[0] != path or self._bytes_read > MAPPED_BYTES:
            self._mapped = None  # the old mapping goes before the new one comes
            self._mapped = (path, safe_open(path, framework="pt"))
            self._bytes_read = size
        return self._mapped[1]


def read_header(file: Path) -> dict[str, Found]:
    """What the safetensors file `file` holds; reads its header only.

    Raises:
        ModelError: no such file, or not a whole safetensors file of floating-point tensors.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(f"{file}: damaged: a header of {length} bytes in a file of {size}")
            if length > MAX_HEADER:
                raise ModelError(f"{file}: found a header of {length} bytes, expected at most {MAX_HEADER}")
            header = parse_json(stream.read(length), file)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    header.pop("__metadata__", None)
    found, ends = {}, []
    for name, entry in header.items():
        try:
            kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file}: {shown(name)}: damaged: not the entry of a tensor") from error
        if not isinstance(kind, str) or kind not in DTYPES:
            raise ModelError(f"{file}: {shown(name)}: found dtype {kind!r}, expected one of {', '.join(DTYPES)}")
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ModelError(f"{file}: {shown(name)}: damaged: shape {shape}, bytes {start} to {end}")
        if end - start != prod(shape) * DTYPES[kind].itemsize:
            raise ModelError(f"{file}: {shown(name)}: damaged: {end - start} bytes for {kind} of shape {shape}")
        ends.append((start, end))
        found[name] = Found(file, DTYPES[kind], shape)
    reached = 0
    for start, end in sorted(ends):
        if start != reached:
            raise ModelError(f"{file}: damaged: a tensor starts at byte {start} of the data, expected {reached}")
        reached = end
    if reached != size - 8 - length:
        raise ModelError(f"{file}: damaged: {size - 8 - length} bytes of data, expected {reached}")
    return found


def parse_json(text: bytes, file: Path) -> dict[str, Any]:
    """The JSON object in `text`, each of its names given once.

    Raises:
        ModelError: it is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in result if names.count(name) > 1)
            raise ModelError(f"{file}: {shown(twice)}: expected once, found several times")
        return result

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: damaged: not JSON") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{file}: expected a JSON object")
    return parsed


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        ModelError: it cannot be read, or is none.
    """
    try:
        with open(file, "rb") as stream:
            text = stream.read(MAX_JSON + 1)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    if len(text) > MAX_JSON:
        raise ModelError(f"{file}: expected at most {MAX_JSON} bytes")
    return parse_json(text, file)


def refuse(where: Path, what: str, names: Iterable[str]) -> None:
    """Raise ModelError that lists the first five of `names`, if there are any."""
    listed = sorted(names)
    if listed:
        first = ", ".join(map(shown, listed[:5]))
        rest = f", and {len(listed) - 5} more" if len(listed) > 5 else ""
        raise ModelError(f"{where}: {len(listed)} tensor{'s' * (len(listed) > 1)} {what}: {first}{rest}")


def shown(name: str) -> str:
    """A name out of a file, fit for a terminal."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _read_index(file: Path) -> dict[str, str]:
    placed = read_json(file).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ModelError(f"{file}: expected a weight_map from tensor names to file names")
    for name in placed.values():
        if not FILE_NAME.fullmatch(name):
            raise ModelError(f"{file}: found the file name {name!r}, expected <name>.safetensors beside the index")
    return placed


def _misplaced(placed: dict[str, str], tensors: dict[str, Found]) -> list[str]:
    return [name for name, file in placed.items() if name not in tensors or tensors[name].file.name != file]
