"""Converting model directories, one tensor at a time: between formats, and from a dense model to a MoE model.

After an error, the output does not exist. The mathematics of upcycling is in `moe.upcycle`.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import ModelError, require
from common.files import fsync, write_atomically
from common.text import to_json
from data.tokens.conversation import effective_template, end_token_ids
from data.tokens.files import HUGGING_FACE, SENTENCEPIECE, TEKKEN, TokenizerFiles
from data.tokens.marks import GENERATION, TEMPLATE
from data.tokens.tokenizer import TextTokenizer, Tokenizer
from moe.config import ModelConfig
from moe.region import Region
from moe.upcycle import Upcycling, dense_name, expert_matrix, moe_config, new_tensor, router_config
from training.checkpoint.shards import LazyTensor, write_safetensors
from training.formats import huggingface as hf
from training.formats import mistral
from training.formats.foreign_tensors import Piece, interleave, list_pieces, read_json, tensor_shapes
from training.formats.model_directory import Block, group_by_size, new_directory, open_tokenizer, write_model
from training.formats.reader import ModelReader, split_experts

FORMATS = {
    "hf": (hf.CONFIG, hf.INDEX, hf.SINGLE),
    "mistral": (mistral.CONFIG, mistral.INDEX, mistral.SINGLE),
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ReadTensor = Callable[[str], Tensor]


def parse_size(text: str) -> int:
    """Return the number of bytes of a `shard_size`, such as `5GB`, `500 MB`, `2GiB` or `1000`.

    Raises:
        ModelError: `text` is not such a size, or is less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    factor = UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or float(match[1]) * factor < 1:
        raise ModelError(f"shard_size={text}: expected a size such as 5GB or 500MB")
    return int(float(match[1]) * factor)


def import_model(reader: ModelReader, out: Path, dtype: Literal["fp32", "keep"], shard_bytes: int) -> int:
    """Write the reader's model as a model directory like a run's.

    Args:
        out: the directory to write.
        dtype: `fp32`, the dtype that training uses for weights, or `keep` for each tensor's stored dtype.
        shard_bytes: the most bytes of weights in one file.

    Returns:
        The size of the weights' files in bytes.

    Raises:
        ModelError: a tensor cannot be read, or `out` exists or cannot be written.
    """
    open_tokenizer(reader)

    def block(name: str, region: Region) -> Block:
        stored = torch.float32 if dtype == "fp32" else reader.dtype(name)
        return Block(name, reader.shapes[name], region, stored, partial(reader.read, name, region, stored))

    blocks = [
        block(name, region) for name, shape in reader.shapes.items() for region in split_experts(Region.whole(shape))
    ]
    return write_model(out, reader.model, reader.router, blocks, reader.tokenizer, shard_bytes=shard_bytes)


def export_model(
    reader: ModelReader,
    out: Path,
    *,
    form: Literal["hf", "mistral"],
    dtype: Literal["bf16", "fp32"],
    shard_bytes: int,
    positions: int,
    chat: bool = False,
) -> int:
    """Write the reader's model in Hugging Face's or Mistral's format.

    Args:
        out: the directory to write.
        dtype: dtype of all weights.
        shard_bytes: the most bytes of weights in one file.
        positions: `max_position_embeddings` of a Hugging Face configuration.
        chat: give the Hugging Face tokenizer the chat template of `data=sft`, if it has none of its own.

    Returns:
        The size of the weights in bytes.

    Raises:
        ModelError: the format cannot describe the model (the message starts with the key that it does not support), a
            tensor cannot be read, `out` exists or cannot be written, or transformers, which makes the
            `tokenizer.json`, is not installed.
    """
    config_file, index_file, single = FORMATS[form]
    stored = DTYPES[dtype]
    config = (
        hf.write_config(reader.model, reader.router, str(stored).removeprefix("torch."), positions)
        if form == "hf"
        else mistral.write_params(reader.model, reader.router)
    )
    names = hf.family_of(config, Path(config_file)).per_expert if form == "hf" else mistral.FORMAT
    tokenizer = open_tokenizer(reader)
    if reader.tokenizer is not None and tokenizer is not None and form == "mistral":
        _check_mistral_can_store(reader.tokenizer, tokenizer)
    elif reader.tokenizer is not None and not reader.tokenizer.has_json:
        _import_llama_tokenizer()  # A missing package is reported before hours of writing.

    pieces_by_tensor: dict[str, list[Piece]] = {}
    for piece in list_pieces(reader.shapes, names, reader.model.head_dim):
        pieces_by_tensor.setdefault(piece.foreign_name, []).append(piece)
    tensors = []
    for name, pieces in pieces_by_tensor.items():
        its = torch.float32 if pieces[0].fp32 else stored
        tensors.append(LazyTensor(name, its, pieces[0].foreign_shape, partial(_assemble, reader, pieces, its)))
    groups = group_by_size(tensors, lambda tensor: tensor.nbytes, shard_bytes)
    stem = single.removesuffix(".safetensors")
    numbered = [f"{stem}-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    files = [single] if len(groups) == 1 else numbered
    with new_directory(out) as directory:
        for file, group in zip(files, groups, strict=True):
            write_safetensors(directory / file, group, {"format": "pt"})
        total = sum(tensor.nbytes for tensor in tensors)
        if len(files) > 1:
            file_of = {tensor.key: file for file, group in zip(files, groups, strict=True) for tensor in group}
            _write_json(directory / index_file, {"metadata": {"total_size": total}, "weight_map": file_of})
        special_ids = _special_token_ids(tokenizer) if form == "hf" else {}
        _write_json(directory / config_file, config | special_ids)
        if reader.tokenizer is not None and tokenizer is not None and form == "hf":
            _write_tokenizer(directory, reader.tokenizer, tokenizer, chat)
        elif reader.tokenizer is not None:
            _write_mistral_tokenizer(directory, reader.tokenizer)
        if form == "hf":
            path = directory / GENERATION
            _write_json(path, (read_json(path) if path.exists() else {"_from_model_config": True}) | special_ids)
        for path in directory.iterdir():
            fsync(path)
    return total


def _assemble(reader: ModelReader, pieces: list[Piece], dtype: torch.dtype) -> Tensor:
    """Make one foreign tensor from all of its pieces."""
    foreign = torch.empty(pieces[0].foreign_shape, dtype=dtype)
    for piece in pieces:
        block = reader.read(piece.name, Region(piece.offset, piece.shape), dtype)
        if piece.pairs is not None:
            block = interleave(block, piece.pairs)
        block = block.reshape(piece.shape[len(piece.shape) - foreign.dim() :])
        foreign[tuple(slice(o, o + n) for o, n in zip(piece.foreign_offset, block.shape, strict=True))] = block
    return foreign


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, to_json(content, indent=2) + "\n")


def _special_token_ids(tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """Return the ids of the tokens before and after a text, as a Hugging Face configuration has them.

    They are None without a tokenizer, because transformers would use 1 and 2 if the keys were missing.
    """
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    ends = list(end_token_ids(tokenizer))
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}


def _import_llama_tokenizer() -> Any:
    try:
        from transformers import LlamaTokenizer
    except ImportError as error:
        raise ModelError(
            "format=hf: expected the package transformers, which makes the tokenizer.json; pip install 'mixwright[hf]'"
        ) from error
    return LlamaTokenizer


def _write_tokenizer(directory: Path, files: TokenizerFiles, tokenizer: TextTokenizer, chat: bool) -> None:
    """Write the tokenizer as AutoTokenizer reads it. transformers makes the `tokenizer.json` if there is none.

    Without it, AutoTokenizer assumes that a `tokenizer.model` puts a space before a text, and returns other ids.
    """
    files.copy_to(directory)
    for name in files.models[:1]:
        (directory / name).rename(directory / SENTENCEPIECE)
    if not files.has_json:
        fast = _import_llama_tokenizer().from_pretrained(
            directory,
            add_prefix_space=bool(tokenizer.prefix),
            legacy=tokenizer.prefix_after_special,
            add_bos_token=tokenizer.bos_id is not None,
        )
        fast.save_pretrained(directory)
    if chat:
        write_atomically(directory / TEMPLATE, effective_template(tokenizer))


def _check_mistral_can_store(files: TokenizerFiles, tokenizer: TextTokenizer) -> None:
    """Check that Mistral's format has a file for the tokenizer: a sentencepiece model, or Mistral's own `tekken.json`.

    Raises:
        ModelError: it has none, because the tokenizer is a `tokenizer.json`, or has more tokens there.
    """
    added = tokenizer.vocab_size - Tokenizer(files.directory / files.models[0]).vocab_size if files.models else 0
    require(
        not added and (files.models or TEKKEN in files.others),
        ModelError,
        f"format=mistral: expected a {SENTENCEPIECE} with all tokens; {files.shown} has "
        + (f"{added} more in {HUGGING_FACE}" if added else f"only a {HUGGING_FACE}"),
    )


def _write_mistral_tokenizer(directory: Path, files: TokenizerFiles) -> None:
    for name in (*files.models, *([TEKKEN] if TEKKEN in files.others else [])):
        write_atomically(directory / name, files.content(name))


def upcycle_model(
    reader: ModelReader,
    out: Path,
    plan: Upcycling,
    *,
    dtype: Literal["fp32", "keep"],
    shard_bytes: int,
    family: str | None = None,
) -> tuple[ModelConfig, int]:
    """Write the MoE model that `plan` makes from the reader's model, which must be dense.

    Args:
        out: the directory to write. After an error, it does not exist.
        dtype: `fp32`, the dtype that training uses for weights, or `keep` for the stored dtype of the dense tensors.
            New routers and shared experts are fp32.
        shard_bytes: the most bytes of weights in one file.
        family: the `model_type` of the family that must compute the MoE model, for its export. None: any or none.

    Returns:
        The configuration of the MoE model, and the size of the weights' files in bytes.

    Raises:
        ModelError: a tensor cannot be read, `out` exists or cannot be written, or `family` does not compute the model.
        ValueError: the plan does not fit the model. The message starts with `<field>=<value>`.
    """
    model = moe_config(reader.model, plan)
    if family is not None:
        hf.check_family(family, model, router_config(plan))
    open_tokenizer(reader)
    return model, write_model(
        out,
        model,
        router_config(plan),
        list(_list_blocks(reader, model, plan, dtype)),
        reader.tokenizer,
        shard_bytes=shard_bytes,
    )


def _list_blocks(
    reader: ModelReader, model: ModelConfig, plan: Upcycling, dtype: Literal["fp32", "keep"]
) -> Iterator[Block]:
    # The experts that are made from one dense matrix are written one after another, so caching one matrix is enough.
    read = lru_cache(maxsize=1)(partial(_read_wide, reader))
    for name, shape in tensor_shapes(model, router_config(plan)).items():
        whole = Region.whole(shape)
        origin = dense_name(name)
        stored = torch.float32 if dtype == "fp32" or origin is None else reader.dtype(origin)
        if origin is None:
            yield Block(name, shape, whole, stored, partial(new_tensor, name, shape, model.init_std, plan))
        elif origin == name:
            yield Block(name, shape, whole, stored, partial(_copy, read, name, stored))
        else:
            for region in split_experts(whole):
                make = partial(_make_expert, read, origin, name, region.offset[0], plan, stored)
                yield Block(name, shape, region, stored, make)


def _copy(read: ReadTensor, name: str, stored: torch.dtype) -> Tensor:
    return read(name).to(stored)


def _make_expert(read: ReadTensor, origin: str, name: str, expert: int, plan: Upcycling, stored: torch.dtype) -> Tensor:
    """Return the matrix of one expert, made from the tensor `origin`, as a block of the tensor `name`, [1, ., .]."""
    return expert_matrix(read(origin), name, expert, plan).to(stored).unsqueeze(0)


def _read_wide(reader: ModelReader, name: str) -> Tensor:
    """Read the dense model's tensor `name`, as fp32 or as its stored dtype if that is wider."""
    wide = torch.promote_types(reader.dtype(name), torch.float32)
    return reader.read(name, Region.whole(reader.shapes[name]), wide)
