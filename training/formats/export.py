"""Models between formats, streamed: memory holds one tensor at a time, and an output is whole or not there."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import ModelError
from common.files import fsync, write_atomically
from moe.region import Region
from training.checkpoint.shards import Part, write_safetensors
from training.formats import huggingface as hf
from training.formats import huggingface_names as hf_names
from training.formats import mistral
from training.formats.mapping import Piece, interleave, list_pieces
from training.formats.model_directory import Block, check_tokenizer, grouped, new_directory, write_model
from training.formats.reader import ModelReader, blocks
from training.run import TOKENIZER_FILE

FORMATS = {
    "hf": (hf.CONFIG, hf.INDEX, hf.SINGLE, hf_names.PER_EXPERT),
    "mistral": (mistral.CONFIG, mistral.INDEX, mistral.SINGLE, mistral.FORMAT),
}
CHAT_TEMPLATE = (
    "{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{%- set turns = messages[1:] if system else messages %}"
    "{{- bos_token }}"
    "{%- for turn in turns %}"
    "{%- if turn.role == 'user' %}{{- '[INST] ' + (system if loop.first else '') + turn.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + turn.content + eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
)
"""The conversations of data/corpora/chat.py, in Jinja."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def import_model(source: ModelReader, out: Path, dtype: Literal["fp32", "keep"], shard_bytes: int) -> int:
    """Write `source` as a directory of ours; returns the bytes of its weights.

    Args:
        dtype: of the weights: fp32, as training keeps them, or each tensor's own.

    Raises:
        ModelError: a tensor that cannot be read, or an `out` that exists or cannot be written.
    """
    check_tokenizer(source)

    def block(name: str, region: Region) -> Block:
        stored = torch.float32 if dtype == "fp32" else source.dtype(name)
        return Block(name, source.shapes[name], region, stored, partial(source.read, name, region, stored))

    parts = [block(name, region) for name, shape in source.shapes.items() for region in blocks(Region.whole(shape))]
    return write_model(out, source.model, source.router, parts, source.tokenizer, shard_bytes=shard_bytes)


def export_model(
    source: ModelReader,
    out: Path,
    *,
    form: Literal["hf", "mistral"],
    dtype: Literal["bf16", "fp32"],
    shard_bytes: int,
    positions: int,
    chat: bool = False,
) -> int:
    """Write `source` in Hugging Face's or Mistral's format; returns the bytes of its weights.

    Args:
        positions: `max_position_embeddings` of a Hugging Face configuration.
        chat: give the tokenizer the `[INST]` chat template.

    Raises:
        ModelError: the format cannot say what the model computes (the message starts with the key); a tensor that
            cannot be read; an `out` that exists or cannot be written; no transformers to make a tokenizer.json with.
    """
    config_file, index_file, single, names = FORMATS[form]
    stored = DTYPES[dtype]
    if form == "hf":
        config = hf.write_config(source.model, source.router, str(stored).removeprefix("torch."), positions)
    else:
        config = mistral.write_params(source.model, source.router)
    check_tokenizer(source)
    if form == "hf" and source.tokenizer is not None:
        _llama_tokenizer()  # an import that fails should fail before hours of writing

    by_tensor: dict[str, list[Piece]] = {}
    for piece in list_pieces(source.shapes, names, source.model.head_dim):
        by_tensor.setdefault(piece.theirs, []).append(piece)
    parts = [
        Part(name, stored, pieces[0].their_shape, partial(_assemble, source, pieces, stored))
        for name, pieces in by_tensor.items()
    ]
    groups = grouped(parts, lambda part: part.nbytes, shard_bytes)
    stem = single.removesuffix(".safetensors")
    files = [single] if len(groups) == 1 else _numbered(stem, len(groups))
    with new_directory(out) as directory:
        for file, group in zip(files, groups, strict=True):
            write_safetensors(directory / file, group, {"format": "pt"})
        total = sum(part.nbytes for part in parts)
        if len(files) > 1:
            placed = {part.key: file for file, group in zip(files, groups, strict=True) for part in group}
            _write_json(directory / index_file, {"metadata": {"total_size": total}, "weight_map": placed})
        if source.tokenizer is not None:
            shutil.copyfile(source.tokenizer, directory / TOKENIZER_FILE)
        if form == "hf":
            marks = _marks(source.tokenizer)
            config |= marks
            _write_json(directory / "generation_config.json", {"_from_model_config": True} | marks)
        _write_json(directory / config_file, config)
        if form == "hf" and source.tokenizer is not None:
            _write_fast_tokenizer(directory, chat)
        for path in directory.iterdir():
            fsync(path)
    return total


def _assemble(source: ModelReader, pieces: list[Piece], dtype: torch.dtype) -> Tensor:
    """One tensor of theirs out of ours."""
    whole = torch.empty(pieces[0].their_shape, dtype=dtype)
    for piece in pieces:
        ours = source.read(piece.ours, Region(piece.our_offset, piece.shape), dtype)
        if piece.head_dim is not None:
            ours = interleave(ours, piece.head_dim)
        ours = ours.reshape(piece.shape[len(piece.shape) - whole.dim() :])
        whole[tuple(slice(o, o + n) for o, n in zip(piece.their_offset, ours.shape, strict=True))] = ours
    return whole


def _numbered(stem: str, count: int) -> list[str]:
    return [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def _marks(tokenizer: Path | None) -> dict[str, int | None]:
    """Ids of the beginning and end of a text. Without a tokenizer: null, where transformers would take 1 and 2."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    ids = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id()}
    return {name: None if number < 0 else number for name, number in ids.items()}


def _llama_tokenizer() -> Any:
    try:
        from transformers import LlamaTokenizer
    except ImportError as error:
        raise ModelError(
            "format=hf: expected the package transformers, which makes the tokenizer.json; pip install 'mixwright[hf]'"
        ) from error
    return LlamaTokenizer


def _write_fast_tokenizer(directory: Path, chat: bool) -> None:
    """Beside `tokenizer.model`, what AutoTokenizer reads.

    Left to itself, it takes a tokenizer.model for one that puts a space before a text, and gets other ids.
    """
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2
    model = schema.ModelProto()
    model.ParseFromString((directory / TOKENIZER_FILE).read_bytes())
    prefix = bool(model.normalizer_spec.add_dummy_prefix)
    tokenizer = _llama_tokenizer().from_pretrained(directory, add_prefix_space=prefix, add_bos_token=True)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
