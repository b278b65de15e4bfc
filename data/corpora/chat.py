"""Conversations in the `[INST]` format, divided into segments that a model reads and segments that it produces.

    <s>[INST] system, blank line, user [/INST] assistant</s>[INST] user [/INST] assistant</s>

This is the format of Mistral and Mixtral Instruct (arXiv 2310.06825 and 2401.04088). `<s>` and `</s>` are token ids of
the tokenizer and never text: `</s>` in a message is tokenized as four characters. The space before an answer belongs
to the answer. A prompt therefore ends in `[/INST]`, and no piece of the vocabulary crosses the start of an answer.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from common.errors import DataError
from common.text import shorten

TEMPLATE = 1
"""Part of a token store's key. Raise it when a change gives the same messages other segments."""
ROLES = ("system", "user", "assistant")


class Segment(NamedTuple):
    """A part of a conversation. Each segment is tokenized separately."""

    text: str
    supervised: bool
    """Whether the assistant says the text. Its tokens, and the `</s>` after them, are then labels."""


class ChatTokenizer(Protocol):
    """The part of a tokenizer that `encode` uses."""

    bos_id: int
    """Token id of `<s>`."""
    eos_id: int
    """Token id of `</s>`."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without `<s>` and `</s>`."""


def conversation_segments(messages: Any) -> list[Segment]:
    """Return the segments of a whole conversation. Prompts and answers alternate; the last segment is an answer.

    Args:
        messages: `[{"role": "user", "content": "..."}, ...]`: user and assistant messages alternate, the last is the
            assistant's. One system message may come first. Other keys of a message are ignored.

    Raises:
        DataError: `messages` is something else. The error names the message, but not the file, which the caller knows.
    """
    return _segments(messages, last="assistant")


def prompt_segments(messages: Any) -> list[Segment]:
    """Return the segments of a conversation that the assistant is to answer. The last message is the user's.

    Otherwise as `conversation_segments`.
    """
    return _segments(messages, last="user")


def instruction(text: str) -> str:
    """Return a user's message as the text of a segment."""
    return f"[INST] {text} [/INST]"


def split_segments(text: str, turns: Sequence[int]) -> list[Segment]:
    """Return the segments of the conversation `text`, given their lengths (`Document.turns`)."""
    bounds = [0, *itertools.accumulate(turns)]
    assert bounds[-1] == len(text), (bounds, len(text))
    return [Segment(text[start:end], i % 2 == 1) for i, (start, end) in enumerate(itertools.pairwise(bounds))]


def encode(segments: Sequence[Segment], tokenizer: ChatTokenizer) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, with `<s>` first and `</s>` after each answer.

    Because each segment is tokenized separately, the ids of a prompt are the first ids of every answer to it.

    Returns:
        The ids, and for each id whether it is a label.
    """
    ids, supervised = [tokenizer.bos_id], [False]
    for text, is_answer in segments:
        segment_ids = tokenizer.encode(text) + ([tokenizer.eos_id] if is_answer else [])
        ids += segment_ids
        supervised += [is_answer] * len(segment_ids)
    return ids, supervised


def _segments(messages: Any, last: str) -> list[Segment]:
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"expected a list of messages, found {_show(messages)}")
    segments: list[Segment] = []
    system = ""
    next_roles: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(messages, start=1):
        role, content = _role_and_content(message, number)
        if role not in next_roles:
            raise DataError(f"message {number}: expected role {' or '.join(next_roles)}, found {role}")
        if role == "system":
            system = f"{content}\n\n"
        elif role == "user":
            segments.append(Segment(instruction(system + content), supervised=False))
            system = ""
        else:
            segments.append(Segment(f" {content}", supervised=True))
        next_roles = ("assistant",) if role == "user" else ("user",)
    if role != last:
        raise DataError(f"message {len(messages)}: expected the last message to be the {last}'s, found role {role}")
    return segments


def _role_and_content(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"message {number}: expected an object with role and content, found {_show(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"message {number}: expected role to be one of {', '.join(ROLES)}, found {_show(role)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"message {number}: expected content to be text, found {_show(content)}")
    return role, content


def _show(value: Any) -> str:
    """Return `value` in a few characters on one line; `none` for an absent or empty value."""
    return "none" if value is None or value == "" or value == [] else shorten(repr(value), 43)
