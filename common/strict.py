"""Strict conversion between plain containers, as a YAML file has them, and the frozen configuration dataclasses.

No key is ignored, and no value is coerced to another type, with two exceptions: a float can be given as an integer, and
as a string such as `1e-3`, which YAML 1.1 does not read as a number.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union

from common.aliases import ALIASES
from common.errors import ConfigError, located, require
from common.text import nearest, one_line, show_value

T = TypeVar("T")

MISSING_VALUE = "???"
"""What OmegaConf writes for a mandatory value that is missing."""


FREE_TEXT = "free text"
FreeText = Annotated[str, FREE_TEXT]
"""A string such as a prompt, in which a command line gives no character a meaning. `${` is not an interpolation."""


DERIVED = {"derived": True}
"""The metadata of a field that is no key of the configuration. A program fills it from other sections."""


class _WrongTypeError(Exception):
    """Internal: the value fits no branch of the annotation."""


def from_dict(cls: type[T], raw: Any, path: str = "", keys: list[str] | None = None) -> T:
    """Build the dataclass `cls`, and the dataclasses inside it, from plain dicts, lists and scalars.

    Args:
        cls: a dataclass whose annotations are made of int, float, str, bool, None, Literal, unions, `tuple[X, ...]`,
            `dict[str, X]` and further dataclasses. If it has a class method `class_for(raw)`, that method chooses the
            subclass to build.
        raw: the mapping from the names of the fields to their values.
        path: the key of the section in the whole configuration, e.g. `model`. Messages put it before the keys.
        keys: the valid keys to suggest from; by default those of `cls`.

    Raises:
        ConfigError: an unknown key, a missing key, a value of the wrong type, or a value that the dataclass refuses.
    """
    if keys is None:
        keys = list(leaf_keys(cls, path))
    require(isinstance(raw, dict), ConfigError, f"{path or cls.__name__}={_show(raw)}: expected a section of keys")
    if hasattr(cls, "class_for"):
        cls = cls.class_for(raw)  # type: ignore[attr-defined]
        keys = [*keys, *leaf_keys(cls, path)]
    fields = {field.name: field for field in key_fields(cls)}
    for name, value in raw.items():
        if name not in fields:
            raise unknown_key(_join(path, str(name)), value, keys)
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        key, hint = _join(path, name), hints[name]
        if name not in raw and not _is_required(field):
            continue
        if raw.get(name, MISSING_VALUE) == MISSING_VALUE:
            raise ConfigError(f"{key}={MISSING_VALUE}: expected {describe_type(hint)}, and no value was given")
        try:
            values[name] = _convert(raw[name], hint, key, keys)
        except _WrongTypeError:
            raise ConfigError(f"{key}={_show(raw[name])}: expected {describe_type(hint)}") from None
    try:
        return cls(**values)
    except ValueError as error:
        raise located(error, path) from error


def to_dict(config: Any) -> dict[str, Any]:
    """Return the dataclass as plain dicts, lists and scalars. `from_dict` builds an equal dataclass from them."""
    return {field.name: _plain(getattr(config, field.name)) for field in key_fields(type(config))}


def key_fields(cls: type) -> list["dataclasses.Field[Any]"]:
    """Return the fields of the dataclass `cls` that are keys of the configuration: all but `DERIVED` ones."""
    return [field for field in dataclasses.fields(cls) if not field.metadata.get("derived")]


def unknown_key(key: str, value: Any, keys: Iterable[str]) -> ConfigError:
    """Return the error for `key`, which is not one of `keys`. It names the key that was probably meant, if any."""
    shown = "" if isinstance(value, dict) else f"={_show(value)}"
    meant = suggested_key(key, keys)
    return ConfigError(f"{key}{shown}: unknown key{f'; the nearest valid key is {meant}' if meant else ''}")


def suggested_key(key: str, keys: Iterable[str]) -> str | None:
    """Return the one of `keys`, or the section, that the unknown `key` probably means; None if nothing is near.

    The order is: a key that other programs call by the whole name (`common.aliases`), a key or section whose last part
    is the same, a key that other programs call by the last part, the most similar key of the same section, the most
    similar key.
    """
    keys = list(keys)
    word = key.rpartition(".")[2].lower().replace("-", "_")
    sections = {valid.partition(".")[0] for valid in keys}
    known = [*keys, *sections]
    same = [valid for valid in known if valid.rpartition(".")[2] == word]
    section = [valid for valid in keys if valid.startswith(f"{key.rpartition('.')[0]}.")]
    return (
        _alias(key, known) or nearest(key, same) or _alias(word, known) or nearest(key, section) or nearest(key, known)
    )


def _alias(word: str, known: Sequence[str]) -> str | None:
    return next((valid for valid in ALIASES.get(word, ()) if valid in known), None)


def leaf_keys(cls: type, path: str = "") -> Iterator[str]:
    """Yield the dotted name of every value in the dataclass `cls` and in the dataclasses inside it."""
    return (key for key, _ in leaf_hints(cls, path))


def leaf_hints(cls: type, path: str = "", *, subclasses: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the annotation of every value in the dataclass `cls` and in the dataclasses inside it.

    Args:
        path: as in `from_dict`.
        subclasses: also yield the values that subclasses add, such as those of plugins.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    for name in (field.name for field in key_fields(cls)):
        inner = [branch for branch in _branches(hints[name]) if dataclasses.is_dataclass(branch)]
        if inner:
            yield from leaf_hints(typing.cast(type, inner[0]), _join(path, name), subclasses=subclasses)
        else:
            yield _join(path, name), hints[name]
    if subclasses:
        added: list[type] = cls.__subclasses__()
        for subclass in added:
            yield from leaf_hints(subclass, path, subclasses=True)


def _convert(value: Any, hint: Any, key: str, keys: list[str]) -> Any:
    for branch in _branches(hint):
        try:
            return _convert_branch(value, branch, key, keys)
        except _WrongTypeError:
            continue
    raise _WrongTypeError


def _convert_branch(value: Any, branch: Any, key: str, keys: list[str]) -> Any:
    origin, arguments = typing.get_origin(branch), typing.get_args(branch)
    if dataclasses.is_dataclass(branch):
        if not isinstance(value, dict):
            raise _WrongTypeError
        return from_dict(typing.cast(type, branch), value, key, keys)
    if origin is Literal:
        matches = [choice for choice in arguments if type(choice) is type(value) and choice == value]
        if matches:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(item, arguments[0], key, keys) for item in value)
    elif origin is dict:
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return {name: _convert(item, arguments[1], f"{key}.{name}", keys) for name, item in value.items()}
    elif branch is float:
        return _to_float(value)
    elif type(value) is branch:
        return value
    raise _WrongTypeError


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _WrongTypeError
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _WrongTypeError from None
    if not math.isfinite(number):
        raise _WrongTypeError
    return number


def _branches(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union. Floats are last, because an integer also fits them."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    members = tuple(typing.get_args(each)[0] if typing.get_origin(each) is Annotated else each for each in members)
    return tuple(sorted(members, key=lambda member: member is float))


def describe_type(hint: Any) -> str:
    """Return what an annotation accepts, e.g. `an integer or null`, as messages say it."""
    branches = _branches(hint)
    literals = [branch for branch in branches if typing.get_origin(branch) is Literal]
    choices = [_show(choice) for branch in literals for choice in typing.get_args(branch)]
    if bool in branches:
        choices += ["true", "false"]
    parts = [f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]] if choices else []
    names = {int: "an integer", float: "a number", str: "a string"}
    for branch in branches:
        if branch in names:
            parts.append(names[branch])
        elif typing.get_origin(branch) is tuple:
            parts.append(f"a list, each item {describe_type(typing.get_args(branch)[0])}")
        elif typing.get_origin(branch) is dict or dataclasses.is_dataclass(branch):
            parts.append("a section of keys")
    return " or ".join(parts + ["null"] * (types.NoneType in branches))


def _show(value: Any) -> str:
    """Return the value as a user writes it in YAML, on one line. It is quoted if it is empty or would need several
    lines or spaces in a row."""
    text = show_value(value)
    return text if text and text == one_line(text) else repr(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
