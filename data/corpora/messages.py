"""Conversations: messages with roles, read from the objects of a file and checked."""

from typing import Any, NamedTuple

from common.errors import DataError
from common.text import shorten

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One message of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    learn: bool = False
    """Whether the content is a label: the model learns to produce it. Only for messages of the assistant."""


def read_messages(messages: Any, last: str = "assistant") -> list[Message]:
    """Check a list of messages as JSON gives it, and return it as `Message`s.

    Args:
        messages: `[{"role": "user", "content": "..."}, ...]`: user and assistant messages alternate. One system message
            may come first.
        last: the role of the last message: `assistant` for a conversation to learn from, `user` for one that the
            assistant is to answer.

    Raises:
        DataError: `messages` is something else. The error names the message, but not the file, which the caller knows.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"expected a list of messages, found {_show(messages)}")
    read: list[Message] = []
    next_roles: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(messages, start=1):
        read.append(_read_message(message, number))
        role = read[-1].role
        if role not in next_roles:
            raise DataError(f"message {number}: expected role {' or '.join(next_roles)}, found {role}")
        next_roles = ("assistant",) if role == "user" else ("user",)
    if role != last:
        raise DataError(f"message {len(messages)}: expected the last message to be the {last}'s, found role {role}")
    return read


def _read_message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"message {number}: expected an object with role and content, found {_show(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"message {number}: expected role to be one of {', '.join(ROLES)}, found {_show(role)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"message {number}: expected content to be text, found {_show(content)}")
    return Message(role, content, learn=role == "assistant")


def _show(value: Any) -> str:
    """Return `value` in a few characters on one line; `none` for an absent or empty value."""
    return "none" if value is None or value == "" or value == [] else shorten(repr(value), 43)
