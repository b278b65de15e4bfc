"""Conversations: messages with roles, read from the objects of a file and checked.

A key that changes what a conversation means is either followed or refused. It is never ignored in silence, because the
model would then learn something else than the file says. docs/finetuning.md lists the keys.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from common.errors import DataError
from common.text import printable, shorten

MESSAGES_KEY = "messages"
"""The default of `data.messages_key`. Only with it are the other formats of rows looked for."""
FORMATS = ((MESSAGES_KEY,), ("conversations",), ("instruction", "output"), ("prompt", "completion"))
"""The keys by which the format of a row is recognised: OpenAI's, ShareGPT's, Alpaca's, prompt and completion."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""The names of roles in files, and the roles of `Message`."""
SYSTEM_KEYS = ("system", "system_prompt")
"""Keys of a row whose value is the system message."""
_METADATA = """
id uuid message_id timestamp created_at date model language lang source
"""
METADATA_KEYS = frozenset(_METADATA.split())
"""Keys of a message that do not change its meaning."""
_REFUSED = """
tools functions function_call tool_choice parallel_tool_calls chosen rejected history context image images audio audios
video videos documents chat_template chat_template_kwargs weight loss train trainable
"""
REFUSED_ROW_KEYS = frozenset(_REFUSED.split())
"""Keys of a row that change its meaning and that are not supported. All other keys of a row are metadata."""


class Message(NamedTuple):
    """One message of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    learn: bool = False
    """Whether the content is a label: the model learns to produce it. Only for messages of the assistant."""


def read_conversation(
    row: Mapping[str, Any],
    messages_key: str = MESSAGES_KEY,
    ignore_keys: Collection[str] | None = None,
    last: str = "assistant",
) -> list[Message]:
    """Return the conversation of a row in any of `FORMATS`.

    Args:
        row: a JSON object.
        messages_key: the key of the list of messages. With the default, `FORMATS` decides.
        ignore_keys: keys of the row and of its messages to ignore, `data.ignore_keys`. None: none, and messages about
            keys do not name `data.ignore_keys`.
        last: as in `read_messages`.

    Raises:
        DataError: the row is not a conversation, or has a key that changes its meaning and is not supported. The error
            names the message and the key, but not the file, which the caller knows.
    """
    kept = {key: value for key, value in row.items() if key not in (ignore_keys or ())}
    for key, value in kept.items():
        is_refused = key in REFUSED_ROW_KEYS and key != messages_key and not _is_empty(value)
        # In data of preferences (KTO), `"label": false` marks a completion that is not wanted. Tables have 0 or a text.
        is_false = value is False or ("completion" in kept and str(value).lower() in ("false", "0"))
        if is_refused or (key == "label" and is_false):
            raise _unsupported("", key, value, ignore_keys)
    listed, num_context = _messages_of(kept, messages_key)
    messages = read_messages(listed, last, ignore_keys, num_context)
    for key in SYSTEM_KEYS:
        if _is_empty(kept.get(key)):
            continue
        system = Message("system", _text(kept[key], f"{key}: ", ignore_keys))
        if messages[0].role != "system":
            messages.insert(0, system)
        elif messages[0] != system:
            raise DataError(f"{key}: expected the text of the system message, found {_show(kept[key])}")
    return messages


def read_messages(
    messages: Any, last: str = "assistant", ignore_keys: Collection[str] | None = None, num_context: int = 0
) -> list[Message]:
    """Check a list of messages as JSON gives it, and return it as `Message`s.

    Args:
        messages: `[{"role": "user", "content": "..."}, ...]`: user and assistant messages alternate. One system message
            may come first. The keys can also be `from` and `value`.
        last: the role of the last message: `assistant` for a conversation to learn from, `user` for one that the
            assistant is to answer.
        ignore_keys: as in `read_conversation`.
        num_context: the number of first messages whose answers are read but not learned.

    Raises:
        DataError: as `read_conversation`.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"expected a list of messages, found {_show(messages)}")
    read: list[Message] = []
    next_roles: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(messages, start=1):
        role, content, learn = _read_message(message, f"message {number}: ", ignore_keys)
        read.append(Message(role, content, learn and number > num_context))
        if role not in next_roles:
            raise DataError(f"message {number}: expected role {' or '.join(next_roles)}, found {role}")
        next_roles = ("assistant",) if role == "user" else ("user",)
    if role != last:
        raise DataError(f"message {len(messages)}: expected the last message to be the {last}'s, found role {role}")
    if last == "assistant" and not any(message.learn for message in read):
        raise DataError("expected a message of the assistant with weight 1, found none")
    return read


def _messages_of(row: Mapping[str, Any], messages_key: str) -> tuple[Any, int]:
    """Return the arguments `messages` and `num_context` of `read_messages` for a row."""
    formats = FORMATS if messages_key == MESSAGES_KEY else ((messages_key,),)
    found = [keys for keys in formats if all(row.get(key) is not None for key in keys)]
    if len(found) != 1:
        names = [" and ".join(keys) for keys in formats]
        expected = f"one of: {'; '.join(names)}" if len(names) > 1 else f"data.messages_key={messages_key} in it"
        raise DataError(f"expected {expected}; found {printable(shorten(', '.join(row), 200)) or 'none'}")
    first, *rest = (row[key] for key in found[0])
    if not rest:
        return first, 0
    if isinstance(first, list) and isinstance(rest[0], list) and "prompt" in found[0]:
        return first + rest[0], len(first)  # Only the completion is learned, as in TRL.
    if "instruction" in found[0] and row.get("input") not in (None, ""):
        first = f"{_text(first, 'instruction: ')}\n{_text(row['input'], 'input: ')}"
    return [{"role": "user", "content": first}, {"role": "assistant", "content": rest[0]}], 0


def _read_message(message: Any, where: str, ignore_keys: Collection[str] | None) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where}expected an object with role and content, found {_show(message)}")
    is_sharegpt = message.get("from") is not None and message.get("role") is None
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    name = message.get(role_key)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{where}expected {role_key} to be one of {', '.join(ROLES)}, found {_show(name)}")
    rest = {key: value for key, value in message.items() if key not in (role_key, content_key, *(ignore_keys or ()))}
    weight = rest.pop("weight", None)
    expected = "0 or 1" if role == "assistant" else "0 or null, because only answers are learned"
    if weight is not None and (isinstance(weight, bool) or weight not in ((0, 1) if role == "assistant" else (0,))):
        raise DataError(f"{where}weight={_show(weight)}: expected {expected}")
    for key, value in rest.items():
        # `"prefix": false` is the default of Mistral's format.
        if key not in METADATA_KEYS and not _is_empty(value) and (key, value) != ("prefix", False):
            raise _unsupported(where, key, value, ignore_keys)
    content = _text(message.get(content_key), f"{where}{content_key}: ", ignore_keys)
    return Message(role, content, learn=role == "assistant" and weight != 0)


def _text(content: Any, where: str, ignore_keys: Collection[str] | None = None) -> str:
    """Return a text that is given as a string or as a list of parts `{"type": "text", "text": ...}`."""
    if isinstance(content, list) and content:
        parts = enumerate(content, start=1)
        content = "".join(_part_text(part, f"{where}part {number}: ", ignore_keys) for number, part in parts)
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}expected text, found {_show(content)}")
    return content


def _part_text(part: Any, where: str, ignore_keys: Collection[str] | None) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"{where}expected type text and a text, found {_show(part)}")
    for key, value in part.items():
        if key not in ("type", "text", *METADATA_KEYS, *(ignore_keys or ())) and not _is_empty(value):
            raise _unsupported(where, key, value, ignore_keys)
    return str(part["text"])


def _unsupported(where: str, key: str, value: Any, ignore_keys: Collection[str] | None) -> DataError:
    hint = "" if ignore_keys is None else f"; data.ignore_keys=[{key}] ignores it"
    return DataError(
        f"{where}{printable(key)}={_show(value)}: expected no such key, because it can change the meaning{hint}"
    )


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _show(value: Any) -> str:
    """Return `value` in a few characters on one line; `none` for an absent or empty value."""
    return "none" if value is None or value == "" or value == [] else shorten(repr(value), 43)
