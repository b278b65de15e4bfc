"""Reading what the user asks for: the prompts or the conversation, as token ids of the model directory's tokenizer."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import ConfigError, DataError, require
from common.files import read_file
from common.text import MAX_JSON, expect_characters, one_line, parse_json
from data.corpora.messages import Message, read_conversation, read_messages
from data.tokens.conversation import encode_conversation, end_token_ids
from training.formats.model_directory import open_given_tokenizer
from training.formats.reader import open_model_for_key
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
    tokenizer = open_given_tokenizer(source)
    path, end_ids = str(source.path), list(tokenizer.end_ids)
    if config.messages is not None:
        try:
            given = _read_json(config.messages)
            is_row = isinstance(given, dict)
            messages = read_conversation(given, last="user") if is_row else read_messages(given, last="user")
            prompt, _ = encode_conversation(messages, tokenizer)
        except DataError as error:
            raise DataError(f"messages={config.messages}: {error}") from error
        return Request(path, list(end_token_ids(tokenizer)), titles=[messages[-1].content], prompts=[prompt])
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
        end_ids = list(end_token_ids(tokenizer))
        try:
            prompts = [encode_conversation([Message("user", title)], tokenizer)[0] for title in titles]
        except DataError as error:
            raise DataError(f"checkpoint={config.checkpoint}: {error}") from error
    else:
        prompts = [tokenizer.encode_prompt(title) for title in titles]
    return Request(path, end_ids, titles, prompts)


def _read_json(file: str) -> Any:
    try:
        messages = parse_json(sys.stdin.read() if file == STDIN else read_file(Path(file), MAX_JSON))
        expect_characters(messages)
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
