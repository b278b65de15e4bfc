"""Reading what the user asks for: the prompts or the conversation, as token ids."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import ConfigError, DataError
from training.formats.reader import open_model_for_key
from training.generation.config import STDIN, GenerateConfig
from training.generation.tokenizer import encode_chat, encode_prompt, end_token_ids, open_tokenizer


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
        messages = _read_messages(config.messages)
        try:
            ids = encode_chat(tokenizer, messages)
        except DataError as error:
            raise DataError(f"messages={config.messages}: {error}") from error
        return Request(path, end_ids, titles=[messages[-1]["content"]], prompts=[ids])
    titles = list(config.prompts)
    if config.prompt == STDIN:
        titles += [line.rstrip("\r\n") for line in sys.stdin]
    elif config.prompt is not None:
        titles.append(config.prompt)
    if not titles:
        raise ConfigError(f"prompt={STDIN}: expected at least one line on stdin")
    empty = next((number for number, title in enumerate(titles, start=1) if not title), None)
    if empty is not None:
        raise ConfigError(f"prompt='': expected at least one token; prompt {empty} of {len(titles)} is empty")
    if config.chat:
        prompts = [encode_chat(tokenizer, [{"role": "user", "content": title}]) for title in titles]
    else:
        prompts = [encode_prompt(tokenizer, title) for title in titles]
    return Request(path, end_ids, titles, prompts)


def _read_messages(file: str) -> Any:
    try:
        return json.loads(sys.stdin.read() if file == STDIN else Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"messages={file}: expected a JSON file that can be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"messages={file}: expected a JSON list of messages ({reason})") from error
