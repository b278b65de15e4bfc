"""Conversations in the `[INST]` format: which characters a model reads, and which of them it is asked to produce.

    <s>[INST] system, blank line, user [/INST] assistant</s>[INST] user [/INST] assistant</s>

(Mistral and Mixtral Instruct, arXiv 2310.06825 and 2401.04088; the course's chat format.) `<s>` and `</s>` are the
tokenizer's marks, never text: a `</s>` that somebody types stays four characters. The space before an answer belongs
to the answer, so that a prompt ends in `[/INST]` and no piece of text lies on both sides of a boundary.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from common.errors import DataError
from data.tokens.tokenizer import Tokenizer

TEMPLATE = 1
"""Part of a token store's key: raised whenever the same messages would give other segments."""
ROLES = ("system", "user", "assistant")


class Segment(NamedTuple):
    """Text that is tokenized by itself."""

    text: str
    supervised: bool
    """What the assistant says: its tokens and the `</s>` behind them are labels. Everything else is only read."""


def render(messages: Any) -> list[Segment]:
    """A whole conversation: what the assistant reads and what it says, in turn, from the first to the last.

    Args:
        messages: `[{"role": "user", "content": "..."}, ...]`: users and assistants in turn, the assistant last; one
            system message may come first. Other keys of a message are not looked at.

    Raises:
        DataError: anything else; the text says which message and what was expected (no file: the caller knows it).
    """
    return _segments(messages, last="assistant")


def prompt(messages: Any) -> list[Segment]:
    """A conversation that the assistant is to go on with: as `render`, with the user last. See `encode`."""
    return _segments(messages, last="user")


def instruction(text: str) -> str:
    """What a user says, as a segment's text."""
    return f"[INST] {text} [/INST]"


def cut(text: str, turns: Sequence[int]) -> list[Segment]:
    """The segments that `text` consists of, given their lengths (`Document.turns`)."""
    ends = list(itertools.accumulate(turns))
    assert ends[-1] == len(text), (ends, len(text))
    starts = [0, *ends[:-1]]
    return [Segment(text[start:end], i % 2 == 1) for i, (start, end) in enumerate(zip(starts, ends, strict=True))]


def encode(segments: Sequence[Segment], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids, `<s>` first and `</s>` behind each answer, and for each whether it is a label.

    Each segment is tokenized by itself: the ids of a prompt are exactly the first ids of every answer to it.
    """
    ids, supervised = [tokenizer.bos_id], [False]
    for text, is_answer in segments:
        of_text = tokenizer.encode(text) + ([tokenizer.eos_id] if is_answer else [])
        ids += of_text
        supervised += [is_answer] * len(of_text)
    return ids, supervised


def _segments(messages: Any, last: str) -> list[Segment]:
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"expected a list of messages, found {_shown(messages)}")
    segments: list[Segment] = []
    system = ""
    awaited: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(messages, start=1):
        role, content = _checked(message, number)
        if role not in awaited:
            raise DataError(f"message {number}: expected role {' or '.join(awaited)}, found {role}")
        if role == "system":
            system = f"{content}\n\n"
        elif role == "user":
            segments.append(Segment(instruction(system + content), supervised=False))
            system = ""
        else:
            segments.append(Segment(f" {content}", supervised=True))
        awaited = ("assistant",) if role == "user" else ("user",)
    if role != last:
        raise DataError(f"message {len(messages)}: expected the last message to be the {last}'s, found role {role}")
    return segments


def _checked(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"message {number}: expected an object with role and content, found {_shown(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"message {number}: expected role to be one of {', '.join(ROLES)}, found {_shown(role)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"message {number}: expected content to be text, found {_shown(content)}")
    return role, content


def _shown(value: Any) -> str:
    """`value` in a few characters on one line."""
    if value is None or value == "" or value == []:
        return "none"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
