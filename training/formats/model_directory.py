"""Models that tools write: a directory like a run's, with its configuration, tokenizer and one checkpoint of weights.

    <out>/config.yaml             sections `model` and `router`
    <out>/tokenizer.model         where there is one
    <out>/checkpoints/step-0/     tensors `model.<name>` and nothing of an optimizer

`training.formats.reader.open_model` reads it, and so does everything that takes a model directory.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from common.errors import CheckpointError, ModelError
from common.files import fsync
from common.strict import to_dict
from moe.config import ModelConfig, RouterConfig
from moe.region import Region
from training.checkpoint.manifest import CHECKPOINTS, FORMAT, write_manifest
from training.checkpoint.shards import DTYPES, Part, describe, write_parts
from training.formats.reader import PREFIX, ModelReader
from training.run import TOKENIZER_FILE, save_config

T = TypeVar("T")

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Block(NamedTuple):
    """A rectangle of one tensor of the model, made when it is written. A tensor's blocks together are all of it."""

    name: str
    """Of the parameter or buffer."""
    whole: tuple[int, ...]
    region: Region
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_model(
    out: Path,
    model: ModelConfig,
    router: RouterConfig,
    blocks: Iterable[Block],
    tokenizer: Path | None,
    *,
    shard_bytes: int = 5 * 10**9,
) -> int:
    """Write the directory `out`, whole or not at all; returns the bytes of its weights.

    Raises:
        ModelError: `out` exists, or cannot be written.
    """
    with new_directory(out) as directory:
        save_config(directory, {"model": to_dict(model), "router": to_dict(router)})
        if tokenizer is not None:
            shutil.copyfile(tokenizer, directory / TOKENIZER_FILE)
            fsync(directory / TOKENIZER_FILE)
        checkpoint = directory / CHECKPOINTS / "step-0"
        checkpoint.mkdir(parents=True)
        files: dict[str, dict[str, Any]] = {}
        tensors: dict[str, dict[str, Any]] = {}
        for number, group in enumerate(grouped(list(blocks), _nbytes, shard_bytes)):
            parts = [Part(b.region.key(PREFIX + b.name), b.dtype, b.region.shape, b.make) for b in group]
            file, files_record = write_parts(checkpoint, number, parts)
            files[file] = files_record
            for block in group:
                record = {"dtype": DTYPES[block.dtype], "shape": block.whole, "chunks": []}
                chunk = {"file": file, "offset": block.region.offset, "shape": block.region.shape}
                tensors.setdefault(PREFIX + block.name, record)["chunks"].append(chunk)
        state = {"step": 0, "updates": 0, "model": to_dict(model), "router": to_dict(router)}
        body = {"format": FORMAT, "torch": torch.__version__, "state": state, "files": files, "tensors": tensors}
        write_manifest(checkpoint, body)
        fsync(checkpoint.parent)
    return sum(record["size"] for record in files.values())


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write in, which becomes `out` at the end; after an error nothing is left of it.

    Raises:
        ModelError: `out` exists, or cannot be written.
    """
    if os.path.lexists(out):
        raise ModelError(f"out={out}: expected a path where nothing is yet")
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise ModelError(f"out={out}: expected a path that can be written ({error.strerror})") from error
    try:
        yield temporary
        fsync(temporary)
        temporary.rename(out)
        fsync(out.parent)
    except OSError as error:
        raise ModelError(f"out={out}: {describe(error, out.parent)}") from error
    except CheckpointError as error:
        raise ModelError(f"out={out}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def grouped(items: list[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """`items` in order, in groups of at most `limit` together; one that is larger is a group of its own."""
    groups: list[list[T]] = []
    total = 0
    for item in items:
        if not groups or total + size(item) > limit:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size(item)
    return groups


def parse_size(text: str) -> int:
    """Bytes of a `shard_size`: `5GB`, `500 MB`, `2GiB`, or a plain number.

    Raises:
        ModelError: it is no such size, or less than a byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    factor = UNITS.get(found[2].upper()) if found else None
    if found is None or factor is None or float(found[1]) * factor < 1:
        raise ModelError(f"shard_size={text}: expected a size such as 5GB or 500MB")
    return int(float(found[1]) * factor)


def check_tokenizer(source: ModelReader) -> None:
    """Refuse a tokenizer that makes ids beyond the embedding.

    Raises:
        ModelError: so it does, or it is no sentencepiece model.
    """
    import sentencepiece

    file, vocab_size = source.tokenizer, source.model.vocab_size
    assert vocab_size is not None
    if file is None:
        return
    try:
        ids = sentencepiece.SentencePieceProcessor(model_file=str(file)).vocab_size()
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{file}: expected a sentencepiece model that can be read") from error
    if ids > vocab_size:
        raise ModelError(f"{file}: expected at most {vocab_size} ids, the rows of the embedding; found {ids}")


def _nbytes(block: Block) -> int:
    return block.region.numel * block.dtype.itemsize
