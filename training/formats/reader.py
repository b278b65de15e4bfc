"""Models on disk, whoever wrote them: `open_model(path)` says what one is, and fills a model with its weights.

Shapes: E experts, F expert hidden, D model.

A model directory is a run's (or one of its checkpoints), a Hugging Face directory, or Mistral's own format. Opening
reads configurations and headers, and holds every name and shape against what the model needs: nothing is filled from a
directory that lacks a tensor or holds one that no one asked for. Tensors are read slice by slice, by each rank the ones
that it holds; no rank waits for another.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from common.errors import CheckpointError, ConfigError, ModelError
from common.strict import from_dict
from moe.config import ModelConfig, RouterConfig
from moe.model import Transformer
from moe.region import Region
from training.checkpoint.manifest import CHECKPOINTS, MANIFEST, committed, newest_verified, read_manifest, verify
from training.checkpoint.shards import DTYPES, Read, plan_reads, read_shard
from training.formats import huggingface as hf
from training.formats import huggingface_names as hf_names
from training.formats import mistral
from training.formats.mapping import Format, Piece, Shape, check_tensors, list_pieces, split_halves, tensor_shapes
from training.formats.safetensors import TensorDirectory, read_json, refuse
from training.run import CONFIG_FILE, TOKENIZER_FILE

PREFIX = "model."
"""What precedes a weight's name in a checkpoint of ours, beside the optimizer's state."""
COMPARED_ROWS = 4096

T = TypeVar("T")


class Fill(NamedTuple):
    """A block of one of our tensors, and where it goes."""

    name: str
    region: Region
    target: Tensor


class ModelReader(ABC):
    """A model directory that was found whole as far as names and shapes go."""

    kind: Literal["run", "hf", "mistral"]
    path: Path
    """For a run: the checkpoint."""
    model: ModelConfig
    router: RouterConfig
    tokenizer: Path | None
    """A sentencepiece model."""
    shapes: dict[str, Shape]
    """Of every tensor of ours, in the model's order."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """In which the tensor that we call `name` is stored."""

    @abstractmethod
    def copy(self, fills: Iterable[Fill]) -> None:
        """Fill each target, cast to its dtype.

        Raises:
            ModelError: a file that cannot be read.
        """

    def read(self, name: str, region: Region, dtype: torch.dtype) -> Tensor:
        """The block `region` of the tensor that we call `name`, as `dtype`.

        Raises:
            ModelError: a file that cannot be read.
        """
        target = torch.empty(region.shape, dtype=dtype)
        self.copy([Fill(name, region, target)])
        return target

    def fill(self, model: Transformer) -> None:
        """Fill every parameter and buffer of `model`, or the parts of them that lie here.

        Raises:
            ModelError: it is another model than this one, or a file cannot be read.
        """
        state = model.state_dict()
        refuse(self.path, "missing", state.keys() - self.shapes.keys())
        if all(layer is not None for layer in model.layers):  # else a pipeline stage, which lacks what others have
            refuse(self.path, "that the model has no place for", self.shapes.keys() - state.keys())
        fills = []
        for name, tensor in state.items():
            local, shape, region = model.local_shard(name, tensor)
            if shape != tuple(self.shapes[name]):
                raise ModelError(f"{self.path}: {name}: found {list(self.shapes[name])}, expected {list(shape)}")
            if region.numel == 0:
                continue
            fills += [Fill(name, block, local[block.slices(region)]) for block in blocks(region)]
        with torch.no_grad():
            self.copy(fills)


def blocks(region: Region) -> list[Region]:
    """`region` in parts to hold in memory one at a time: stacked experts one by one, anything else whole."""
    if len(region.shape) < 3:
        return [region]
    offset, shape = region
    return [Region((offset[0] + i, *offset[1:]), (1, *shape[1:])) for i in range(shape[0])]


def open_model(path: str | Path, *, check: bool = True, warn: Callable[[str], None] | None = None) -> ModelReader:
    """The model in the directory `path`.

    Args:
        check: read the whole checkpoint of a run and compare its hashes; else only its manifest's. One rank is enough.
        warn: gets one line per damaged checkpoint of a run that is passed over; the default prints it to stderr.

    Raises:
        ModelError: no model directory, or one that is damaged or unknown.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"{path}: expected a model directory; {'not a directory' if path.exists() else 'none found'}")
    if (path / MANIFEST).exists():
        return RunReader(path.parent.parent, path, check)
    if (path / CONFIG_FILE).exists():
        return RunReader(path, _newest(path / CHECKPOINTS, check, warn or _to_stderr), check=False)
    if (path / hf.INDEX).exists() or (path / hf.SINGLE).exists():
        return ForeignReader("hf", path)
    if (path / mistral.CONFIG).exists() and ((path / mistral.INDEX).exists() or (path / mistral.SINGLE).exists()):
        return ForeignReader("mistral", path)
    if (path / hf.CONFIG).exists() or (path / mistral.CONFIG).exists():
        pickles = sorted(file.name for end in ("*.bin", "*.pth", "*.pt") for file in path.glob(end))
        seen = f"found {pickles[0]}: pickle, which runs code when it is loaded" if pickles else "found neither"
        raise ModelError(f"{path}: expected {hf.SINGLE} or {mistral.SINGLE}, or their index; {seen}")
    raise ModelError(
        f"{path}: expected a run ({CONFIG_FILE}), a checkpoint of one ({MANIFEST}), a Hugging Face model "
        f"({hf.CONFIG}) or one in Mistral's format ({mistral.CONFIG})"
    )


def open_model_for_key(key: str, path: str, *, check: bool = True) -> ModelReader:
    """`open_model` for what a user gave as `key=path`, which its errors then start with.

    Raises:
        ModelError: as `open_model`.
    """
    try:
        return open_model(path, check=check)
    except ModelError as error:
        raise ModelError(f"{key}={path}: {str(error).removeprefix(f'{path}: ')}") from error


class RunReader(ModelReader):
    """A run's directory, or what a tool wrote like one: the weights of a checkpoint, without optimizer state."""

    def __init__(self, root: Path, checkpoint: Path, check: bool) -> None:
        self.kind, self.path = "run", checkpoint
        self.model, self.router = read_run_config(root / CONFIG_FILE)
        tokenizer = root / TOKENIZER_FILE
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        if check:
            _as_model_error(lambda: verify(checkpoint))
        saved = _as_model_error(lambda: read_manifest(checkpoint))["tensors"]
        self._saved = {name.removeprefix(PREFIX): record for name, record in saved.items() if name.startswith(PREFIX)}
        _limit_layers(self.model, len(self._saved), root / CONFIG_FILE)
        self.shapes = _shapes_of(self.model, self.router, root / CONFIG_FILE)
        refuse(checkpoint, "missing", self.shapes.keys() - self._saved.keys())
        refuse(checkpoint, "that the model has no place for", self._saved.keys() - self.shapes.keys())
        different = [
            f"{name} (found {self._saved[name]['shape']}, expected {list(shape)})"
            for name, shape in self.shapes.items()
            if tuple(self._saved[name]["shape"]) != shape
        ]
        refuse(checkpoint, "of another shape", different)

    def dtype(self, name: str) -> torch.dtype:
        stored = self._saved[name]["dtype"]
        found = next((dtype for dtype, code in DTYPES.items() if code == stored), None)
        if found is None or not found.is_floating_point:
            raise ModelError(f"{self.path}: {name}: found dtype {stored}, expected a floating-point one")
        return found

    def copy(self, fills: Iterable[Fill]) -> None:
        by_file: dict[str, list[Read]] = {}

        def read_all() -> None:
            for name, region, target in fills:
                for file, read in plan_reads(PREFIX + name, self._saved[name], target, region):
                    by_file.setdefault(file, []).append(read)
            for file, reads in by_file.items():
                read_shard(self.path / file, reads)

        _as_model_error(read_all)


class ForeignReader(ModelReader):
    """A directory in Hugging Face's or Mistral's format."""

    def __init__(self, kind: Literal["hf", "mistral"], path: Path) -> None:
        self.kind, self.path = kind, path
        module = hf if kind == "hf" else mistral
        config = path / module.CONFIG
        if not config.is_file():
            raise ModelError(f"{path}: expected a {module.CONFIG} beside the weights")
        read_config = hf.read_config if kind == "hf" else mistral.read_params
        self.model, self.router = read_config(read_json(config), config)
        self.files = TensorDirectory(path, module.INDEX, module.SINGLE)
        found = self.files.tensors
        self.format: Format = hf_names.format_of(found) if kind == "hf" else mistral.FORMAT
        per_expert = any("{e}" in theirs for theirs in self.format.names.values())
        _limit_layers(self.model, len(found), config, per_expert)
        self.shapes = _shapes_of(self.model, self.router, config)
        self.pieces: dict[str, list[Piece]] = {}
        pieces = list_pieces(self.shapes, self.format, self.model.head_dim)
        for piece in pieces:
            self.pieces.setdefault(piece.ours, []).append(piece)
        check_tensors(path, found, pieces, self.format)
        # Mistral's later releases name the version of their tokenizer (tokenizer.model.v3).
        tokenizers = [path / TOKENIZER_FILE, *sorted(path.glob(f"{TOKENIZER_FILE}.v*"))]
        self.tokenizer = next((file for file in tokenizers if file.is_file()), None)
        if self.model.tie_embeddings and self.format.tied in found:
            self._check_tied()

    def dtype(self, name: str) -> torch.dtype:
        dtypes = {self.files.tensors[piece.theirs].dtype for piece in self.pieces[name]}
        common = dtypes.pop()
        for dtype in dtypes:
            common = torch.promote_types(common, dtype)
        return common

    def copy(self, fills: Iterable[Fill]) -> None:
        for name, region, target in fills:
            for piece in self.pieces[name]:
                common = Region(piece.our_offset, piece.shape).intersect(region)
                if common is not None:
                    target[common.slices(region)].copy_(self._read(piece, common))

    def _read(self, piece: Piece, part: Region) -> Tensor:
        """The elements of the region `part` of our tensor, which lies within `piece`."""
        if piece.head_dim is not None:
            weight = split_halves(self.files.read(piece.theirs, piece.their_offset, piece.their_shape), piece.head_dim)
            return weight[part.slices(Region(piece.our_offset, piece.shape))]
        skipped = len(piece.shape) - len(piece.their_shape)
        inside = tuple(a - b for a, b in zip(part.offset, piece.our_offset, strict=True))[skipped:]
        offset = tuple(a + b for a, b in zip(piece.their_offset, inside, strict=True))
        return self.files.read(piece.theirs, offset, part.shape[skipped:]).reshape(part.shape)

    def _check_tied(self) -> None:
        """A head that a tied model's file holds all the same must be the embedding."""
        head, embedding = self.format.tied, self.format.names["embedding"]
        found, (rows, width) = self.files.tensors[head], self.files.tensors[embedding].shape
        same = found.shape == (rows, width)
        for start in range(0, rows if same else 0, COMPARED_ROWS):
            block = (start, 0), (min(COMPARED_ROWS, rows - start), width)
            same = same and torch.equal(self.files.read(head, *block), self.files.read(embedding, *block))
        if not same:
            raise ModelError(f"{self.path}: {head}: expected {embedding} again, as the configuration ties them")


def read_run_config(file: Path) -> tuple[ModelConfig, RouterConfig]:
    """The sections `model` and `router` of a run's `config.yaml`.

    Raises:
        ModelError: it cannot be read, or holds no such sections.
    """
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ModelError(f"{file}: expected YAML without aliases (a few lines of them can stand for gigabytes)")
        raw = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(raw, dict) or not {"model", "router"} <= raw.keys():
        raise ModelError(f"{file}: expected the sections model and router")
    try:
        return from_dict(ModelConfig, raw["model"], "model"), from_dict(RouterConfig, raw["router"], "router")
    except ConfigError as error:
        raise ModelError(f"{file}: {error}") from error


def _shapes_of(model: ModelConfig, router: RouterConfig, file: Path) -> dict[str, Shape]:
    try:
        router.check(model.num_experts, model.top_k)
        return tensor_shapes(model, router)
    except ValueError as error:
        raise ModelError(f"{file}: {' '.join(str(error).split())[:200]}") from error


def _limit_layers(model: ModelConfig, found: int, file: Path, per_expert: bool = False) -> None:
    """Refuse a model of more layers than `found` tensors can be, before a billion of them are built."""
    experts = model.num_experts if per_expert and model.num_experts is not None else 1
    if model.num_layers * experts > found:
        raise ModelError(f"{file}: {model.num_layers} layers and {experts} experts, and only {found} tensors")


def _newest(checkpoints: Path, check: bool, warn: Callable[[str], None]) -> Path:
    if check:
        newest = _as_model_error(lambda: newest_verified(checkpoints, warn))
    else:
        newest = next(iter(committed(checkpoints)), None)
    if newest is None:
        raise ModelError(f"{checkpoints}: expected a checkpoint; found none")
    return newest


def _as_model_error(work: Callable[[], T]) -> T:
    try:
        return work()
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
