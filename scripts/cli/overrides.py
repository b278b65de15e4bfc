"""Arguments as the shell gives them, turned into overrides that Hydra's grammar takes.

Hydra parses a value before it knows the type of its key. Without this module, `=`, `(`, `'`, `#` or a letter outside of
ASCII would end in a message about a lexer, and a run with the name 1e5 would get the name 100000.0. The dataclasses
know the types. A key that takes text (a path, a name, a prompt) gets the text that was typed. Every other value that
Hydra cannot parse is passed on as text, so that the check of the dataclass can say what it expected.

What Hydra gives a meaning keeps it: `null` where the key allows it, quotes, lists, `${...}` in a path or a name, and
with `--multirun` commas and sweep functions.
"""

import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import ConfigError, require
from common.strict import FREE_TEXT, leaf_hints

PARSER = OverridesParser.create()
QUOTED = re.compile(r"""\s*(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*(?=,|$)""", re.DOTALL)
"""A quoted item of a list, up to the comma behind it."""
KEY = re.compile(r"(?:\+\+?|~)?[\w$][\w$./@-]*", re.ASCII)
"""What can be before the `=` of an override."""


@dataclass(frozen=True)
class TextKey:
    """What a key that takes text accepts."""

    nullable: bool = True
    """Whether `null` is a value."""
    scalar: bool = True
    """Whether one text is a value."""
    items: bool = True
    """Whether a list of texts is a value."""
    free: bool = False
    """Whether `${` has no meaning, as in a prompt."""


UNKNOWN = TextKey()
"""For keys that no known dataclass has, such as those of a plugin that a preset loads."""


def text_keys(cls: type) -> dict[str, TextKey]:
    """Return the keys of the dataclass `cls`, and of the loaded plugins' subclasses of its sections, that take text."""
    keys = {key: _text_key(hint) for key, hint in leaf_hints(cls, subclasses=True)}
    return {key: text for key, text in keys.items() if text is not None}


def in_grammar(argument: str, keys: Mapping[str, TextKey], *, multirun: bool = False, exact: bool = False) -> str:
    """Return the argument `key=value` as an override with the same meaning that Hydra's grammar takes.

    Args:
        keys: the keys that take text (`text_keys`).
        multirun: whether commas separate the values of a sweep.
        exact: whether quotes and `null` have no meaning in the value of a prompt or another free text.

    Raises:
        ConfigError: the argument is not UTF-8.
    """
    require(_is_utf8(argument), ConfigError, f"{argument!a}: expected text in UTF-8")
    key, equals, value = argument.partition("=")
    if not equals or not KEY.fullmatch(key):
        return argument
    parsed, text = _parse(value), keys.get(key.lstrip("+~"))
    if text is None:
        return argument if parsed else f"{key}={_grammar_value(value, UNKNOWN)}"
    if exact and text.free and text.scalar:
        return f"{key}={quote(value)}"
    if not multirun:
        return f"{key}={_grammar_value(value, text)}"
    parts = split_items(value)
    if parsed and parsed.is_sweep_override() and len(parts) == 1:
        return argument  # A function, such as range(1,3).
    return f"{key}={','.join(_grammar_value(part if len(parts) == 1 else part.strip(), text) for part in parts)}"


def as_typed(override: str, keys: Mapping[str, TextKey]) -> str:
    """Return the shortest argument from which `in_grammar` makes this override of a single run."""
    key, _, value = override.partition("=")
    parsed = _parse(value)
    quoted = parsed._value if parsed else None
    if not isinstance(quoted, QuotedString):
        return override
    unescaped = re.sub(r"(\\+)\$\{", lambda found: found[1][: len(found[1]) // 2] + "${", quoted.text)
    plain = f"{key}={unescaped}"
    return plain if in_grammar(plain, keys) == override else override


def quote(text: str, *, literal: bool = True) -> str:
    """Return `text` as a quoted string of Hydra's override grammar.

    Args:
        literal: whether `${` stands for itself. Otherwise it begins an interpolation.
    """
    # Inside quotes Hydra reads a backslash as itself, except before a quote. OmegaConf does so, except before `${`.
    escaped = re.sub(r"(\\*)'", r"\1\1\'", text)
    escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    if literal:
        escaped = re.sub(r"(\\*)\$\{", r"\1\1\${", escaped)
    return f"'{escaped}'"


def split_items(text: str) -> list[str]:
    """Split at the commas that are outside of quotes and brackets. Quotes count only around a whole item.

    >>> split_items("a(1,2).txt,it's,'b, c'")
    ['a(1,2).txt', "it's", "'b, c'"]
    """
    items, start = [], 0
    while True:
        quoted = QUOTED.match(text, start)
        end = quoted.end() if quoted else _end_of_item(text, start)
        items.append(text[start:end])
        if end >= len(text):
            return items
        start = end + 1


def values_of(overrides: Iterable[str]) -> dict[str, Any]:
    """Return the values of overrides in Hydra's grammar, by key. A sweep is left out."""
    parsed = PARSER.parse_overrides(list(overrides))
    return {override.key_or_group: override.value() for override in parsed if not override.is_sweep_override()}


def _end_of_item(text: str, start: int) -> int:
    """The index of the comma that ends the item, or the length of the text. Brackets that never close do not count."""
    depth, first_comma = 0, -1
    for index in range(start, len(text)):
        character = text[index]
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        elif character == "," and text[index - 1 : index] != "\\":
            first_comma = index if first_comma < 0 else first_comma
            if depth == 0:
                return index
    return len(text) if depth == 0 or first_comma < 0 else first_comma


def _grammar_value(value: str, text: TextKey) -> str:
    """The value of a key that takes text, as Hydra's grammar takes it."""
    stripped = value.strip()
    if text.items and stripped.startswith("[") and stripped.endswith("]"):
        return _grammar_list(stripped, text)
    parsed = _parse(value)
    found = parsed._value if parsed and not parsed.is_sweep_override() else ()
    if isinstance(found, QuotedString):
        return _without_interpolation(value) if text.free else value
    if found is None and (text.nullable or not text.free):
        return value
    # Where Hydra finds another text, the value has a backslash of the grammar or a function such as str(3). A backslash
    # at the end would escape the comma behind an item.
    plain = not value.endswith("\\") and not (text.free and "${" in value)
    if isinstance(found, str) and (found == value or found != stripped) and plain:
        return value
    return quote(value, literal=text.free or not _interpolates(value))


def _grammar_list(value: str, text: TextKey) -> str:
    item = TextKey(nullable=False, items=False, free=text.free)
    inner = value[1:-1]
    return value if not inner.strip() else f"[{','.join(_grammar_value(i.strip(), item) for i in split_items(inner))}]"


def _parse(value: str) -> Override | None:
    """The value as Hydra parses it, or None if its grammar does not take it."""
    try:
        return PARSER.parse_override(f"key={value}")
    except HydraException:
        return None


def _without_interpolation(quoted: str) -> str:
    return re.sub(r"(?<!\\)\$\{", r"\\${", quoted)


def _interpolates(value: str) -> bool:
    """Whether OmegaConf can parse the interpolations in `value`."""
    try:
        OmegaConf.create({"key": value})
    except OmegaConfBaseException:
        return False
    return "${" in value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_key(hint: Any) -> TextKey | None:
    """What a field with this annotation accepts; None if it takes another type than text."""
    members = _members(hint)
    lists = [typing.get_args(member)[0] for member in members if typing.get_origin(member) is tuple]
    texts = [member for member in members if _is_text(member)]
    others = [member for member in members if member not in texts and typing.get_origin(member) is not tuple]
    if not (texts or lists) or not all(map(_is_text, lists)) or set(others) - {types.NoneType}:
        return None
    free = any(FREE_TEXT in getattr(member, "__metadata__", ()) for member in (*texts, *lists))
    return TextKey(nullable=types.NoneType in others, scalar=bool(texts), items=bool(lists), free=free)


def _members(hint: Any) -> Sequence[Any]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_text(hint: Any) -> bool:
    return hint is str or (typing.get_origin(hint) is typing.Annotated and typing.get_args(hint)[0] is str)
