"""Errors that the user can correct, and the checks that raise them.

The errors form one tree, so that one `except UserError` covers them all.
"""

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from common.text import one_line, printable, shorten, show_value

FIELD = re.compile(r"[A-Za-z_][\w.]*(?==)")
"""The key at the start of a message of the form `<field>=<value>: expected ...`."""


class UserError(ValueError):
    """A mistake that the user can correct. The message is one line: what was found, where, and what was expected.

    Attributes:
        field: the configuration key at fault, e.g. `model.dim`. It is read from the start of the message, and is None
            where the message does not start with `<field>=<value>`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        found = FIELD.match(message)
        self.field = found[0] if found else None


class ConfigError(UserError):
    """A value in the configuration cannot be used. The message starts with the key."""


class RunError(UserError):
    """The run cannot be written where the configuration says."""


class DataError(UserError):
    """Text, tokens or a token store cannot be used."""


class ModelError(UserError):
    """A model directory or file cannot be read, or does not have the expected content."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, is damaged, or does not fit the model it is loaded into."""


class TrainingFailure(RuntimeError):
    """Training cannot go on, and no key of the configuration is wrong. The message is one line, the exit status 1.

    Attributes:
        alone: whether only this rank has failed. Otherwise all ranks raise the same message.
    """

    def __init__(self, message: str, *, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


class PreflightError(UserError):
    """The ranks were not started alike, or some did not start. Every rank that started raises the same message."""


def expect(holds: bool, field: str, value: object, expected: str) -> None:
    """Raise an error that names the field, its value and what was expected, unless `holds`.

    Raises:
        ConfigError: `<field>=<value>: expected <expected>`.

    >>> expect(3 >= 1, "steps", 3, "an integer >= 1")
    >>> expect(0 >= 1, "steps", 0, "an integer >= 1")
    Traceback (most recent call last):
    ...
    common.errors.ConfigError: steps=0: expected an integer >= 1
    """
    require(holds, ConfigError, f"{field}={show_value(value)}: expected {expected}")


def expect_fields(config: object, **conditions: tuple[bool, str]) -> None:
    """Check fields of a configuration dataclass, in the given order.

    Args:
        conditions: name of the field -> whether its value is allowed, and what was expected.

    Raises:
        ConfigError: as `expect`, for the first field whose value is not allowed.
    """
    for field, (holds, expected) in conditions.items():
        expect(holds, field, getattr(config, field), expected)


def expect_defaults(config: Any, given: str) -> None:
    """Check that every field of a configuration dataclass has its default. Another value would have no effect.

    Args:
        given: the key and the value that switch the section off, for the message.

    Raises:
        ConfigError: as `expect`, for the first field that has another value: the user has forgotten the key.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        expect(value == field.default, field.name, value, f"{show_value(field.default)} with {given}")


def require(holds: object, error: type[Exception], message: str) -> None:
    """Raise `error` with `message`, unless `holds`, which is tested for truth."""
    if not holds:
        raise error(message)


def located(error: ValueError, section: str) -> ConfigError:
    """`error`, whose text starts with `<field>=<value>`, with `section` put before the field, on one line."""
    return ConfigError(f"{section}.{one_line(str(error))}" if section else one_line(str(error)))


def expect_no_tensors(where: Path, problem: str, names: Iterable[str], error: type[UserError]) -> None:
    """Raise `error` if there are `names`, which are the names of tensors that have a problem.

    Args:
        where: the file or directory at fault. The message starts with it.
        problem: completes the phrase "3 tensors ...", e.g. `missing`.
        names: names from a file. The message lists the first five in alphabetical order and counts the others.

    Raises:
        UserError: of the class `error`, e.g. `runs/a: 7 tensors missing: b, c, d, e, f, and 2 more`.
    """
    names = sorted(names)
    if names:
        listed = ", ".join(shorten(printable(name), 120) for name in names[:5])
        rest = f", and {len(names) - 5} more" if len(names) > 5 else ""
        raise error(f"{where}: {len(names)} tensor{'s' * (len(names) > 1)} {problem}: {listed}{rest}")
