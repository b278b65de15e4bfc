"""Writing model directories: the same files as a run's directory, with one checkpoint that has only weights.

    <out>/config.yaml             sections `model` and `router`, and `plugins` if any are loaded
    <out>/tokenizer.model, ...    the files of the tokenizer, if the model has one
    <out>/checkpoints/step-0/     tensors `model.<name>`, and no optimizer state

`training.formats.reader.open_model` opens such a directory, as does every tool that takes a model directory.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from common.errors import CheckpointError, ModelError, require
from common.files import explain_os_error, fsync
from common.plugins import loaded_plugins
from common.strict import to_dict
from data.tokens.files import TokenizerFiles
from data.tokens.tokenizer import TextTokenizer
from moe.config import ModelConfig, RouterConfig
from moe.region import Region
from training.checkpoint.manifest import CHECKPOINTS, FORMAT, write_manifest
from training.checkpoint.shards import DTYPES, LazyTensor, write_lazy_shard
from training.formats.reader import BASE, PREFIX, ModelReader
from training.run import save_config

T = TypeVar("T")


class Block(NamedTuple):
    """A region of one of the model's tensors. It is made when it is written. The blocks of a tensor cover it once."""

    name: str
    """Name of the parameter or buffer."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    region: Region
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Returns the region's elements, in its shape and dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes of the slice in the file."""
        return self.region.numel * self.dtype.itemsize


def write_model(
    out: Path,
    model: ModelConfig,
    router: RouterConfig,
    blocks: Iterable[Block],
    tokenizer: TokenizerFiles | None,
    *,
    shard_bytes: int = 5 * 10**9,
    base: dict[str, str] | None = None,
) -> int:
    """Write the model directory `out`. After an error, `out` does not exist.

    Args:
        blocks: all tensors of the model, or those of its adapters.
        base: the model that the adapters are added to (`training.formats.reader.describe_base`).
        tokenizer: the files of the tokenizer, to copy.
        shard_bytes: a file has at most this many bytes of weights, unless a single block is larger.

    Returns:
        The size of the weights' files in bytes.

    Raises:
        ModelError: `out` exists, or cannot be written.
    """
    with new_directory(out) as directory:
        plugins = loaded_plugins()
        sections = {"model": to_dict(model), "router": to_dict(router)}
        sections |= {} if model.adapter is None else {"adapter": to_dict(model.adapter)}
        save_config(directory, sections | ({"plugins": list(plugins)} if plugins else {}))
        if tokenizer is not None:
            tokenizer.copy_to(directory)
        checkpoint = directory / CHECKPOINTS / "step-0"
        checkpoint.mkdir(parents=True)
        files: dict[str, dict[str, Any]] = {}
        tensors: dict[str, dict[str, Any]] = {}
        for number, group in enumerate(group_by_size(list(blocks), lambda block: block.nbytes, shard_bytes)):
            lazy = [LazyTensor(b.region.key(PREFIX + b.name), b.dtype, b.region.shape, b.make) for b in group]
            file, file_record = write_lazy_shard(checkpoint, number, lazy)
            files[file] = file_record
            for block in group:
                record = {"dtype": DTYPES[block.dtype], "shape": block.shape, "chunks": []}
                chunk = {"file": file, "offset": block.region.offset, "shape": block.region.shape}
                tensors.setdefault(PREFIX + block.name, record)["chunks"].append(chunk)
        state = {"step": 0, "updates": 0} | sections | ({"plugins": plugins} if plugins else {})
        state |= {} if base is None else {BASE: base}
        body = {"format": FORMAT, "torch": torch.__version__, "state": state, "files": files, "tensors": tensors}
        write_manifest(checkpoint, body)
        fsync(checkpoint.parent)
    return sum(record["size"] for record in files.values())


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `out`, and rename it to `out` at the end. After an error, it is deleted.

    Raises:
        ModelError: `out` exists, or cannot be written.
    """
    require(not os.path.lexists(out), ModelError, f"out={out}: expected a path that does not exist yet")
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
        raise ModelError(f"out={out}: {explain_os_error(error, out.parent)}") from error
    except CheckpointError as error:
        raise ModelError(f"out={out}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def group_by_size(items: list[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Divide `items`, in order, into groups whose total size is at most `limit`.

    An item that is larger than `limit` is in a group with no other item.
    """
    groups: list[list[T]] = []
    total = 0
    for item in items:
        if not groups or total + size(item) > limit:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size(item)
    return groups


def open_tokenizer(reader: ModelReader) -> TextTokenizer | None:
    """Open the reader's tokenizer, or return None if it has none.

    Raises:
        ModelError: the tokenizer has ids for which the embedding has no row.
        DataError: it cannot be used.
    """
    if reader.tokenizer is None:
        return None
    tokenizer, rows = reader.tokenizer.open(), reader.model.vocab_size or 0
    require(
        tokenizer.vocab_size <= rows,
        ModelError,
        f"{reader.shown or reader.directory}: expected a tokenizer of at most {rows} ids, the rows of the embedding; "
        f"found {tokenizer.vocab_size}",
    )
    return tokenizer


def open_given_tokenizer(source: ModelReader) -> TextTokenizer:
    """Open the tokenizer of a model directory.

    Raises:
        ModelError: there is no tokenizer, or it has more token ids than the model's vocabulary.
        DataError: the tokenizer cannot be used.
    """
    tokenizer = open_tokenizer(source)
    if tokenizer is None:
        raise ModelError(
            f"{source.shown or source.directory}: expected a tokenizer.model or a tokenizer.json in it; runs of older "
            "versions left it in their token store below data.cache: copy it from there"
        )
    return tokenizer
