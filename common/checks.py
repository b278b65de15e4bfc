"""Checks that raise a one-line error."""

from collections.abc import Iterable
from pathlib import Path

from common.errors import ConfigError, UserError
from common.text import printable, shorten, show_value


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
    if not holds:
        raise ConfigError(f"{field}={show_value(value)}: expected {expected}")


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
