"""Reading model directories of every kind: `open_model(path)` returns a reader, which fills a model with the weights.

Shapes: E experts, F expert hidden, D model.

A model directory is a run's directory, one of its checkpoints, a Hugging Face model, or a model in Mistral's format.
Opening reads the configuration and the headers, and checks every tensor's name and shape against the model's. A
directory that lacks a tensor, or that has a tensor which the model does not use, or weights in a file that is not read,
cannot be opened. Filling reads the tensors slice by slice. Each rank reads only its own shards, and does not wait for
other ranks.
"""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, reduce
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common.errors import CheckpointError, ConfigError, DataError, ModelError, expect_no_tensors, require
from common.files import read_file
from common.plugins import missing_plugins, plugin_name
from common.strict import from_dict
from common.text import MAX_YAML, one_line, parse_yaml, printable, shorten, show_value
from data.tokens.files import TokenizerFiles, find_tokenizer
from moe.config import ROUTER_CONFIGS, AdapterConfig, ModelConfig, RouterConfig, split_adapter_name
from moe.model import Transformer
from moe.packed import QUANTISED_DTYPES, matrices_in, pack
from moe.quantization import Packing
from moe.region import Region
from training.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    SHARD_FILE,
    newest_committed,
    newest_verified,
    read_manifest,
    verify,
)
from training.checkpoint.shards import DTYPES, SliceRead, find_slices, read_shard
from training.formats import huggingface as hf
from training.formats import mistral
from training.formats.families.fp8 import read_block
from training.formats.fields import Fields
from training.formats.fingerprint import fingerprint
from training.formats.foreign_tensors import (
    Format,
    Piece,
    Shape,
    TensorDirectory,
    check_shapes,
    check_tensors,
    list_pieces,
    read_json,
    split_halves,
    tensor_shapes,
    weight_files,
)
from training.formats.four_bits import read_four_bits
from training.run import CONFIG_FILE

PREFIX = "model."
"""A checkpoint's name of a weight is this prefix and the weight's name. Optimizer state has other prefixes."""
BASE = "base"
"""Key of a checkpoint's state: the model that its adapters are added to (`describe_base`)."""
COMPARED_ROWS = 4096
"""Rows of the output head and the embedding that are compared at a time."""


class ReadRequest(NamedTuple):
    """A region of one of the model's tensors, and the memory to copy it into."""

    name: str
    region: Region
    target: Tensor
    """Has the region's shape, and any floating-point dtype."""


class ModelReader(ABC):
    """An opened model directory. Its tensors have the names and shapes that the model needs."""

    kind: Literal["run", "hf", "mistral"]
    path: Path
    """The directory. For a run: the checkpoint's directory."""
    model: ModelConfig
    router: RouterConfig
    shown: str | None = None
    """How messages about the tokenizer name the directory. None: its path."""
    directory: Path
    """The directory with the configuration and the tokenizer. For a checkpoint of a run: the run's directory."""
    shapes: dict[str, Shape]
    """Mixwright's name -> shape of every tensor, in the order of the model's state dict."""

    @cached_property
    def tokenizer(self) -> TokenizerFiles | None:
        """The files of the directory's tokenizer, or None if it has none.

        Raises:
            ModelError: the only tokenizer is one that Mixwright cannot read, or two of them contradict each other.
        """
        try:
            return find_tokenizer(self.directory, self.shown)
        except DataError as error:
            raise ModelError(str(error)) from error

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor `name` (Mixwright's name) is stored."""

    @abstractmethod
    def copy(self, requests: Iterable[ReadRequest]) -> None:
        """Read every requested region into its target, converted to the target's dtype.

        Raises:
            ModelError: a file cannot be read.
        """

    def read(self, name: str, region: Region, dtype: torch.dtype) -> Tensor:
        """Return the region of the tensor `name` (Mixwright's name), converted to `dtype`.

        Raises:
            ModelError: a file cannot be read.
        """
        target = torch.empty(region.shape, dtype=dtype)
        self.copy([ReadRequest(name, region, target)])
        return target

    @torch.no_grad()
    def fill(self, model: Transformer) -> None:
        """Fill every parameter and buffer of `model`, or the shards of them that this rank stores.

        Weights that `model` has in few bits are quantised as they are read, one matrix at a time.
        If the model has adapters and the directory has none, their parameters are not filled
        (`moe.init.init_adapters`).

        Raises:
            ModelError: `model` has other tensors than the directory, or a file cannot be read.
        """
        state = model.state_dict()
        if self.model.adapter is None:
            state = {name: tensor for name, tensor in state.items() if split_adapter_name(name)[1] is None}
        expect_no_tensors(self.path, "missing", state.keys() - self.shapes.keys(), ModelError)
        if all(layer is not None for layer in model.layers):  # A pipeline stage lacks the tensors of other stages.
            expect_no_tensors(
                self.path, "that the model has no place for", self.shapes.keys() - state.keys(), ModelError
            )
        requests = []
        for name, tensor in state.items():
            local, shape, region = model.local_shard(name, tensor)
            packing = model.packings.get(name)
            if packing is not None:
                shape = *shape[:-1], packing.rows, packing.columns
            require(
                shape == tuple(self.shapes[name]),
                ModelError,
                f"{self.path}: {name}: found {list(self.shapes[name])}, expected {list(shape)}",
            )
            if region.numel == 0:
                continue
            if packing is not None:
                self._pack(name, packing, local, region)
            else:
                requests += [ReadRequest(name, part, local[part.slices(region)]) for part in split_experts(region)]
        self.copy(requests)

    def repack(self, name: str, matrix: Region, packing: Packing) -> Tensor | None:
        """Return the bytes of a matrix that the directory stores as `packing` says; None: it stores it otherwise.

        Args:
            matrix: a whole matrix, of which there are several in stacked experts.

        Raises:
            ModelError: a file cannot be read.
        """
        return None

    def _pack(self, name: str, packing: Packing, local: Tensor, region: Region) -> None:
        """Read the matrices of which `local` has bytes, and quantise each on the device of `local`, one at a time.

        A matrix is quantised as a whole, also if `local` has a part of its bytes. The bytes are then those of any other
        layout.

        Args:
            local: bytes of a matrix, or of stacked matrices.
            region: where they are in the bytes [P] or [E, P] of the whole parameter.
        """
        dtype = self.dtype(name)
        dtype = dtype if dtype in QUANTISED_DTYPES else torch.float32
        shape = packing.rows, packing.columns
        for index, bytes_P, part in matrices_in(local, region):
            matrix = Region.whole(shape) if index is None else Region((index, 0, 0), (1, *shape))
            stored_P = self.repack(name, matrix, packing)
            if stored_P is None:
                stored_P = pack(self.read(name, matrix, dtype).view(shape).to(local.device), packing)
            bytes_P.copy_(stored_P[part])


def split_experts(region: Region) -> list[Region]:
    """Split a region of stacked experts [E, ., .] into one region per expert. Any other region is not split.

    Only one of the returned regions has to be in memory at a time.
    """
    if len(region.shape) < 3:
        return [region]
    offset, shape = region
    return [Region((offset[0] + i, *offset[1:]), (1, *shape[1:])) for i in range(shape[0])]


def open_model(
    path: str | Path, *, check: bool = True, warn: Callable[[str], None] | None = None, base: str | None = None
) -> ModelReader:
    """Open the model directory `path`.

    If it is a run with adapters, the model that they are added to is opened too, and read with it.

    Args:
        check: for a run or a checkpoint: verify the hashes of all files of the checkpoint, and not only the manifest's.
            For other formats: compare a second set of weights with the one that is read. It is enough that one rank
            does this.
        warn: called with one line for each damaged checkpoint of a run that is skipped, and with one for files of
            weights that are not read. By default the line is printed to stderr.
        base: the directory of the model that adapters are added to. None: the one that the checkpoint names.

    Raises:
        ModelError: `path` is not a model directory, or the directory is damaged, of an unknown kind, or has other
            weights beside those that are read.
    """
    path = Path(path)
    require(
        path.is_dir(),
        ModelError,
        f"{path}: expected a model directory; {'not a directory' if path.exists() else 'none found'}",
    )
    warn = warn or _print_to_stderr
    if (path / MANIFEST).exists():
        return RunReader(path.parent.parent, path, check, base)
    if (path / CONFIG_FILE).exists():
        _expect_no_other_weights(path, CHECKPOINTS, weight_files(path))
        return RunReader(path, _newest_checkpoint(path / CHECKPOINTS, check, warn), check=False, base=base)
    adapters = sorted(file.name for file in path.glob("adapter_[cm]o*"))  # adapter_config.json, adapter_model.*
    require(
        not adapters,
        ModelError,
        f"{path}: found {', '.join(adapters)}: expected the weights of a model; python scripts/import_hf.py "
        f"source={path} base=DIR out=DIR reads an adapter",
    )
    kinds: tuple[tuple[Literal["hf", "mistral"], Any], ...] = (("hf", hf), ("mistral", mistral))
    for kind, module in kinds:
        if (path / module.INDEX).exists() or (path / module.SINGLE).exists():
            return ForeignReader(kind, path, warn if check else None)
    if (path / hf.CONFIG).exists() or (path / mistral.CONFIG).exists():
        found = weight_files(path)
        pickles = [name for name in found if name.endswith((".bin", ".pth", ".pt"))]
        pickle = f"found {pickles[0]}: pickle, which runs code when it is loaded" if pickles else None
        reason = pickle or f"found {_list_files(found) or 'neither'}"
        raise ModelError(f"{path}: expected {hf.SINGLE} or {mistral.SINGLE}, or their index; {reason}")
    raise ModelError(
        f"{path}: expected a run ({CONFIG_FILE}), a checkpoint of one ({MANIFEST}), a Hugging Face model "
        f"({hf.CONFIG}) or one in Mistral's format ({mistral.CONFIG})"
    )


def open_model_for_key(key: str, path: str, *, check: bool = True, base: str | None = None) -> ModelReader:
    """Open the model directory that the user gave as `key=path`. Error messages start with `key=path`.

    The arguments are those of `open_model`.

    Raises:
        ModelError: as in `open_model`.
    """
    try:
        reader = open_model(path, check=check, base=base)
        reader.shown = f"{key}={path}"
        return reader
    except ModelError as error:
        raise ModelError(f"{key}={path}: {str(error).removeprefix(f'{path}: ')}") from error


class RunReader(ModelReader):
    """Reads the weights of a checkpoint, from a run's directory or from a model directory that a tool wrote.

    Args:
        root: the run's directory, with `config.yaml`.
        checkpoint: the checkpoint's directory.
        check: verify the hashes of all files of the checkpoint.
        base: as in `open_model`.

    Attributes:
        base: the model that the adapters are added to, from which all weights are read that the checkpoint lacks. None:
            the model has no adapters.
    """

    def __init__(self, root: Path, checkpoint: Path, check: bool, base: str | None = None) -> None:
        self.kind, self.path, self.directory = "run", checkpoint, root
        self.model, self.router = read_run_config(root / CONFIG_FILE)
        with _raise_model_errors():
            if check:
                verify(checkpoint)
            manifest = read_manifest(checkpoint)
        records = manifest["tensors"]
        # Shards that the manifest does not name can remain after the same step was saved again.
        others = [name for name in weight_files(checkpoint) if not SHARD_FILE.fullmatch(name)]
        _expect_no_other_weights(checkpoint, MANIFEST, others)
        self._records = {name.removeprefix(PREFIX): r for name, r in records.items() if name.startswith(PREFIX)}
        self.base = None if self.model.adapter is None else _open_base(manifest["state"], checkpoint, base)
        shapes = {} if self.base is None else dict(self.base.shapes)
        shapes |= {name: tuple(record["shape"]) for name, record in self._records.items()}
        _check_layer_count(self.model, len(shapes), root / CONFIG_FILE)
        self.shapes = _shapes_of(self.model, self.router, root / CONFIG_FILE)
        check_shapes(checkpoint, shapes, self.shapes)

    @property
    def stored(self) -> list[str]:
        """The names of the tensors in the checkpoint. The others are those of the base."""
        return list(self._records)

    def dtype(self, name: str) -> torch.dtype:
        if self.base is not None and name not in self._records:
            return self.base.dtype(name)
        code = self._records[name]["dtype"]
        dtype = next((dtype for dtype, its_code in DTYPES.items() if its_code == code), None)
        if dtype is None or not dtype.is_floating_point:
            raise ModelError(f"{self.path}: {name}: found dtype {code}, expected a floating-point one")
        return dtype

    def repack(self, name: str, matrix: Region, packing: Packing) -> Tensor | None:
        of_base = self.base is not None and name not in self._records
        return self.base.repack(name, matrix, packing) if self.base is not None and of_base else None

    def copy(self, requests: Iterable[ReadRequest]) -> None:
        slices_by_file: dict[str, list[SliceRead]] = {}
        of_base: list[ReadRequest] = []
        with _raise_model_errors():
            for name, region, target in requests:
                if self.base is not None and name not in self._records:
                    of_base.append(ReadRequest(name, region, target))
                    continue
                for file, read in find_slices(PREFIX + name, self._records[name], target, region):
                    slices_by_file.setdefault(file, []).append(read)
            for file, slices in slices_by_file.items():
                read_shard(self.path / file, slices)
        if self.base is not None:
            self.base.copy(of_base)


def describe_base(reader: ModelReader) -> dict[str, str]:
    """Return how a checkpoint names the model that its adapters are added to: its path, and its fingerprint.

    Raises:
        ModelError: a file cannot be read.
    """
    return {"path": os.path.abspath(reader.path), "fingerprint": fingerprint(reader.shapes, reader.read)}


def _open_base(state: dict[str, Any], checkpoint: Path, given: str | None) -> ModelReader:
    """Open the model that the adapters of a checkpoint are added to.

    Args:
        state: the checkpoint's state.
        given: the directory that the user gives; None: the one that the checkpoint names.

    Raises:
        ModelError: the model cannot be opened, is another one, or the checkpoint names none.
    """
    recorded = state.get(BASE)
    if not isinstance(recorded, dict) or not all(isinstance(recorded.get(key), str) for key in ("path", "fingerprint")):
        raise ModelError(f"{checkpoint}: expected the state of a run with adapters ('{BASE}')")
    path = given or recorded["path"]
    try:
        base = open_model(path, check=False)
    except ModelError as error:
        moved = "" if given else f", the base of the adapters in {checkpoint}"
        raise ModelError(f"base={path}{moved}: {str(error).removeprefix(f'{path}: ')}") from error
    expect_same_base(describe_base(base), recorded, f"base={path}", checkpoint)
    return base


def expect_same_base(found: dict[str, str], recorded: dict[str, str], shown: str, checkpoint: Path | str) -> None:
    """Raise ModelError if a model is not the one that the adapters of a checkpoint are added to.

    Args:
        found: what `describe_base` returned for the model.
        recorded: what the checkpoint's state has.
        shown: the key and the directory, for the message.
    """
    require(
        found["fingerprint"] == recorded["fingerprint"],
        ModelError,
        f"{shown}: expected the weights that the adapters in {checkpoint} were trained with (those of "
        f"{recorded['path']}, fingerprint {recorded['fingerprint'][:12]}); found {found['fingerprint'][:12]}",
    )


class ForeignReader(ModelReader):
    """Reads a model in Hugging Face's or Mistral's format.

    Args:
        warn: called with one line if there are files of weights that are not read. None: a second set of weights, in
            Mistral's format, is not compared with the one that is read.
    """

    def __init__(self, kind: Literal["hf", "mistral"], path: Path, warn: Callable[[str], None] | None) -> None:
        self.kind, self.path, self.directory = kind, path, path
        module = hf if kind == "hf" else mistral
        config = path / module.CONFIG
        require(config.is_file(), ModelError, f"{path}: expected a {module.CONFIG} beside the weights")
        raw = read_json(config)
        read_config = hf.read_config if kind == "hf" else mistral.read_params
        self.model, self.router = read_config(raw, config)
        fp8_block = read_block(Fields(raw, config)) if kind == "hf" else None
        four_bits = kind == "hf" and read_four_bits(Fields(raw, config))
        self.files = TensorDirectory(path, module.INDEX, module.SINGLE, fp8_block, four_bits)
        stored = self.files.tensors
        self.format: Format = hf.family_of(raw, config).format_of(stored, raw) if kind == "hf" else mistral.FORMAT
        per_expert = any("{e}" in name for name in self.format.names.values())
        _check_layer_count(self.model, len(stored), config, per_expert)
        self.shapes = _shapes_of(self.model, self.router, config)
        pieces = list_pieces(self.shapes, self.format, self.model.head_dim)
        self.pieces: dict[str, list[Piece]] = {}
        for piece in pieces:
            self.pieces.setdefault(piece.name, []).append(piece)
        check_tensors(path, stored, pieces, self.format)
        if self.model.tie_embeddings and self.format.tied_head in stored:
            self._check_tied_head()
        self._check_other_files(warn)
        if self.format.note and warn is not None:
            warn(f"{path}: {self.format.note}")

    def dtype(self, name: str) -> torch.dtype:
        dtypes = {self.files.tensors[piece.foreign_name].dtype for piece in self.pieces[name]}
        return reduce(torch.promote_types, dtypes)

    def copy(self, requests: Iterable[ReadRequest]) -> None:
        for name, region, target in requests:
            for piece in self.pieces[name]:
                common = Region(piece.offset, piece.shape).intersect(region)
                if common is not None:
                    target[common.slices(region)].copy_(self._read_part(piece, common))

    def repack(self, name: str, matrix: Region, packing: Packing) -> Tensor | None:
        for piece in self.pieces[name]:
            same = (piece.offset, piece.shape) == tuple(matrix) and piece.pairs is None
            if same and prod(piece.foreign_shape) == matrix.numel:
                return self.files.repack(piece.foreign_name, packing)
        return None

    def _read_part(self, piece: Piece, part: Region) -> Tensor:
        """Read the region `part` of Mixwright's tensor. It must be within `piece`."""
        if piece.pairs is not None:
            # The rows are in another order, so the whole foreign tensor is read.
            foreign = self.files.read(piece.foreign_name, piece.foreign_offset, piece.foreign_shape)
            return split_halves(foreign, piece.pairs)[part.slices(Region(piece.offset, piece.shape))]
        skipped = len(piece.shape) - len(piece.foreign_shape)
        inside = tuple(a - b for a, b in zip(part.offset, piece.offset, strict=True))[skipped:]
        offset = tuple(a + b for a, b in zip(piece.foreign_offset, inside, strict=True))
        return self.files.read(piece.foreign_name, offset, part.shape[skipped:]).reshape(part.shape)

    def _check_tied_head(self) -> None:
        """Check that the output head, which a tied model's file does not need, is equal to the embedding."""
        head, embedding = self.format.tied_head, self.format.names["embedding"]
        rows, width = self.files.tensors[embedding].shape
        same = self.files.tensors[head].shape == (rows, width)
        for start in range(0, rows if same else 0, COMPARED_ROWS):
            block = (start, 0), (min(COMPARED_ROWS, rows - start), width)
            same = same and torch.equal(self.files.read(head, *block), self.files.read(embedding, *block))
        require(
            same,
            ModelError,
            f"{self.path}: {head}: expected the same values as {embedding}, because the configuration ties them",
        )

    def _check_other_files(self, warn: Callable[[str], None] | None) -> None:
        """Check that no file beside those that are read can have other weights of the model.

        Files that transformers does not read either, because it prefers safetensors, are named to `warn`. So are the
        files in Mistral's format beside Hugging Face's, if they have the same weights.
        """
        read = self.files.files
        second = None
        if self.kind == "hf" and any((self.path / name).exists() for name in (mistral.SINGLE, mistral.INDEX)):
            second = TensorDirectory(self.path, mistral.INDEX, mistral.SINGLE)
        others = set(weight_files(self.path)) - set(read)
        ignored = {name for name in others if ".safetensors" not in name.lower()} | set(second.files if second else ())
        _expect_no_other_weights(self.path, read[0], others - ignored)
        if warn is not None and second is not None:
            self._compare_first_rows(second)
        if warn is not None and ignored:
            warn(f"{self.path}: reading {read[0]}, and not {_list_files(ignored)}")

    def _compare_first_rows(self, second: TensorDirectory) -> None:
        """Check that `second`, in Mistral's format, has the same tensors, by their shapes and their first rows.

        Values are compared in bf16, because the two formats can be stored in different dtypes. The formats have other
        orders of the rows of `wq` and `wk`, but the same first row.
        """
        pieces = list_pieces(self.shapes, mistral.FORMAT, self.model.head_dim)
        check_tensors(self.path, second.tensors, pieces, mistral.FORMAT)
        for piece in pieces:
            row = (*(1 for _ in piece.shape[:-1]), piece.shape[-1])
            foreign_row = row[len(piece.shape) - len(piece.foreign_shape) :]
            theirs = second.read(piece.foreign_name, piece.foreign_offset, foreign_row).bfloat16()
            ours = self.read(piece.name, Region(piece.offset, row), torch.bfloat16)
            where = f"{self.path}: {second.files[0]}: {piece.foreign_name}"
            require(
                torch.equal(ours.reshape(foreign_row), theirs),
                ModelError,
                f"{where}: expected the same values as in {self.files.files[0]}",
            )


def _expect_no_other_weights(directory: Path, read: str, others: Iterable[str]) -> None:
    """Raise ModelError if there are `others`: names of files of weights in `directory` beside `read`."""
    found = _list_files(others)
    require(not found, ModelError, f"{directory}: found {found} beside {read}: expected no weights that are not read")


def _list_files(names: Iterable[str]) -> str:
    """Return the first five of the names, in alphabetical order, and the number of the others."""
    names = [shorten(printable(name), 120) for name in sorted(names)]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_run_config(file: Path) -> tuple[ModelConfig, RouterConfig]:
    """Return the sections `model` and `router` of a run's `config.yaml`, the model with its adapters.

    A plugin that the file names is never loaded: only the user decides which code runs. If the file needs a plugin that
    this process has not loaded, the error asks for it.

    Raises:
        ModelError: the file cannot be read, does not have these sections, or has an invalid value.
    """
    try:
        raw = parse_yaml(read_file(file, MAX_YAML))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as YAML: {error}") from error
    require(
        isinstance(raw, dict) and {"model", "router"} <= raw.keys(),
        ModelError,
        f"{file}: expected the sections model and router",
    )
    router = raw["router"]
    try:
        kind = router.get("kind", RouterConfig.kind) if isinstance(router, dict) else RouterConfig.kind
        require(
            isinstance(kind, str) and kind in ROUTER_CONFIGS,
            ConfigError,
            f"router.kind={shorten(printable(show_value(kind)), 80)}: an unknown kind",
        )
        model = from_dict(ModelConfig, raw["model"], "model")
        model = model.with_adapter(from_dict(AdapterConfig, raw.get("adapter", {}), "adapter"))
        return model, from_dict(RouterConfig, router, "router")
    except ConfigError as error:
        raise ModelError(f"{file}: {error}{_request_plugins(raw.get('plugins'))}") from error


def _request_plugins(plugins: Any) -> str:
    """Return the end of a message, which asks for the plugins in `plugins` that this process has not loaded.

    Args:
        plugins: the value of `plugins` in a `config.yaml`, or None.
    """
    request = missing_plugins({plugin_name(str(plugin)): "" for plugin in plugins} if isinstance(plugins, list) else {})
    return f"; {shorten(printable(request), 400)}" if request else ""


def _shapes_of(model: ModelConfig, router: RouterConfig, file: Path) -> dict[str, Shape]:
    try:
        router.check(model.num_experts, model.top_k)
        return tensor_shapes(model, router)
    except ValueError as error:
        raise ModelError(f"{file}: {one_line(str(error))[:200]}") from error


def _check_layer_count(model: ModelConfig, num_tensors: int, file: Path, per_expert: bool = False) -> None:
    """Raise ModelError if the configuration has more layers, or layers times experts, than the files have tensors.

    Without this check, a wrong number in the configuration could make `tensor_shapes` build a billion modules.
    """
    experts = model.num_experts if per_expert and model.num_experts is not None else 1
    fits = model.num_layers <= num_tensors and (experts == 1 or model.num_moe_layers * experts <= num_tensors)
    found = f"{model.num_layers} layers and {experts} experts, and only {num_tensors} tensors"
    require(fits, ModelError, f"{file}: {found}")


def _newest_checkpoint(checkpoints: Path, check: bool, warn: Callable[[str], None]) -> Path:
    with _raise_model_errors():
        newest = newest_verified(checkpoints, warn) if check else newest_committed(checkpoints)
    if newest is None:
        raise ModelError(f"{checkpoints}: expected a checkpoint; found none")
    return newest


@contextmanager
def _raise_model_errors() -> Iterator[None]:
    """Raise ModelError with the same message for every CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
