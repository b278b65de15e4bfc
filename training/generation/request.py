"""Reading what the user asks for: the prompts or the conversation, as token ids of the model directory's tokenizer."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from common.errors import ConfigError, DataError, ModelError, require
from common.text import one_line, parse_json, printable, shorten, to_json
from data.corpora.chat import encode_conversation
from data.corpora.messages import Message, read_conversation, read_messages
from data.tokens.tokenizer import Tokenizer
from training.formats.foreign_tensors import read_json
from training.formats.reader import ModelReader, open_model_for_key
from training.generation.config import STDIN, GenerateConfig


class Request(NamedTuple):
    """What to generate from. All values can be written as JSON, so that rank 0 can send them to the other ranks."""

    path: str
    """The model directory; for a run, the checkpoint in it."""
    end_ids: list[int]
    """Token ids that end a row."""
    titles: list[str]
    """The name of each row in the report: its prompt, or the last message of the conversation."""
    prompts: list[list[int]]
    """The token ids of each row's prompt."""


def read_request(config: GenerateConfig) -> Request:
    """Check the model directory, read the prompts or the conversation, and tokenize them.

    Raises:
        ModelError: the model directory or its tokenizer cannot be read.
        DataError: the conversation does not have the form that the model is trained on.
        ConfigError: the file of `messages` cannot be read, or there is no prompt, or an empty one.
    """
    source = open_model_for_key("checkpoint", config.checkpoint)
    tokenizer = open_tokenizer(source)
    path, end_ids = str(source.path), end_token_ids(source, tokenizer)
    if config.messages is not None:
        try:
            given = _read_json(config.messages)
            is_row = isinstance(given, dict)
            messages = read_conversation(given, last="user") if is_row else read_messages(given, last="user")
        except DataError as error:
            raise DataError(f"messages={config.messages}: {error}") from error
        prompt, _ = encode_conversation(messages, tokenizer)
        return Request(path, end_ids, titles=[messages[-1].content], prompts=[prompt])
    titles = list(config.prompts)
    if config.prompt == STDIN:
        titles += _read_lines()
    elif config.prompt is not None:
        titles.append(config.prompt)
    require(titles, ConfigError, f"prompt={STDIN}: expected at least one line on stdin")
    empty = next((number for number, title in enumerate(titles, start=1) if not title), None)
    require(
        empty is None, ConfigError, f"prompt='': expected at least one token; prompt {empty} of {len(titles)} is empty"
    )
    if config.chat:
        prompts = [encode_conversation([Message("user", title)], tokenizer)[0] for title in titles]
    else:
        prompts = [[tokenizer.bos_id, *tokenizer.encode(title)] for title in titles]
    return Request(path, end_ids, titles, prompts)


def _read_json(file: str) -> Any:
    try:
        messages = parse_json(sys.stdin.read() if file == STDIN else Path(file).read_bytes())
        to_json(messages, ensure_ascii=False).encode()  # JSON can have half of a surrogate pair, which is no character.
    except OSError as error:
        raise ConfigError(f"messages={file}: expected a JSON file that can be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"messages={file}: expected a JSON list of messages ({one_line(str(error))})") from error
    return messages


def _read_lines() -> list[str]:
    try:
        lines = [line.rstrip("\r\n") for line in sys.stdin]
        "".join(lines).encode()  # In some locales, Python reads bytes that are not UTF-8 as half of a surrogate pair.
    except ValueError as error:
        raise ConfigError(f"prompt={STDIN}: expected UTF-8 text on stdin ({one_line(str(error))})") from error
    return lines


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer. `data.tokens.tokenizer.Tokenizer` (sentencepiece) has it too."""

    vocab_size: int
    bos_id: int
    eos_id: int
    byte_run_ids: frozenset[int]
    """Ids of bytes that `decode` decodes run by run: one invalid byte turns the whole run into replacement characters.
    Empty if `decode` decodes bytes character by character."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without begin and end marks."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without begin and end marks."""


def open_tokenizer(source: ModelReader) -> TextTokenizer:
    """Open the tokenizer of a model directory.

    This is its sentencepiece model if there is one. In a Hugging Face directory without one, transformers reads the
    tokenizer.

    Raises:
        ModelError: there is no tokenizer, or it has more token ids than the model's vocabulary.
        DataError: the sentencepiece model cannot be used.
    """
    tokenizer: TextTokenizer
    if source.tokenizer is not None:
        tokenizer = Tokenizer(source.tokenizer)
    elif source.kind == "hf":
        tokenizer = HuggingFaceTokenizer(source.path)
    else:
        directory = source.path.parent.parent if source.kind == "run" else source.path
        raise ModelError(
            f"{directory}: expected a tokenizer.model in it; runs of older versions left it in their token store "
            "below data.cache: copy it from there"
        )
    vocab_size = source.model.vocab_size or 0
    require(
        tokenizer.vocab_size <= vocab_size,
        ModelError,
        f"{source.path}: expected a tokenizer of at most {vocab_size} tokens, the model's vocab_size; "
        f"found {tokenizer.vocab_size}",
    )
    return tokenizer


def end_token_ids(source: ModelReader, tokenizer: TextTokenizer) -> list[int]:
    """Return the token ids that end a row.

    These are the tokenizer's end-of-sequence id and, in a Hugging Face directory, the ids that generation_config.json
    adds.

    Raises:
        ModelError: generation_config.json is not a JSON object, or its `eos_token_id` is not an id or a list of ids.
    """
    file = source.path / "generation_config.json"
    if source.kind != "hf" or not file.is_file():
        return [tokenizer.eos_id]
    value = read_json(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    require(
        all(type(number) is int for number in ids),
        ModelError,
        f"{file}: eos_token_id={shorten(printable(str(value)), 80)}: expected a token id, or a list of them",
    )
    return sorted({tokenizer.eos_id, *ids})


class HuggingFaceTokenizer:
    """A tokenizer that transformers reads. It downloads nothing and runs no code from the directory.

    Raises:
        ModelError: transformers is not installed, or cannot read a tokenizer with begin and end marks from `path`.
    """

    def __init__(self, path: Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ModelError(f"{path}: expected a tokenizer.model, or transformers installed to read others") from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # transformers and the parsers that it calls raise exceptions of any type.
            reason = one_line(str(error))[:200]
            raise ModelError(f"{path}: expected a tokenizer that transformers can read ({reason})") from error
        self.vocab_size = len(self._tokenizer)
        self.bos_id, self.eos_id = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        require(
            None not in (self.bos_id, self.eos_id), ModelError, f"{path}: expected a tokenizer with begin and end marks"
        )
        byte_ids: list[Any] = [self._tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)]
        has_bytes = None not in byte_ids and len(set(byte_ids)) == len(byte_ids)
        decodes_runs = has_bytes and self.decode([byte_ids[ord("a")], byte_ids[0x80]]) == "\ufffd\ufffd"
        self.byte_run_ids = frozenset(byte_ids if decodes_runs else ())

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
