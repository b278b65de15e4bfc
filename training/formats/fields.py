"""The values of a configuration file of another format, with checks of their types."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ModelError, require
from common.text import one_line, printable, shorten, show_value


class Fields:
    """The values of a JSON object, with a check of their types.

    A missing key has its default. Without a default, it is an error. A key whose value is null is not missing. Every
    method raises ModelError if the value has another type than the method returns.

    Args:
        raw: the JSON object.
        file: its path, for messages.
        defaults: key -> the value that a missing key has.
    """

    def __init__(self, raw: Mapping[str, Any], file: Path, defaults: Mapping[str, Any] | None = None) -> None:
        self.raw, self.file, self.defaults = raw, file, defaults or {}

    def get(self, key: str) -> Any:
        """Return the value at `key`, of any type, or its default. None if it has neither."""
        return self.raw[key] if key in self.raw else self.defaults.get(key)

    def integer(self, key: str) -> int:
        """Return the positive integer at `key`."""
        value = self.get(key)
        self.expect(type(value) is int and 1 <= value < 2**48, key, value, "an integer >= 1")
        return int(value)

    def integer_or_null(self, key: str) -> int | None:
        """Return the positive integer at `key`, or None if the value or the default is null."""
        return None if self.get(key) is None else self.integer(key)

    def whole(self, key: str) -> int:
        """Return the integer at `key`, which can be 0."""
        value = self.get(key)
        self.expect(type(value) is int and 0 <= value < 2**48, key, value, "an integer >= 0")
        return int(value)

    def number(self, key: str) -> float:
        """Return the positive number at `key`."""
        value = self.get(key)
        holds = type(value) in (int, float) and 0 < value <= sys.float_info.max
        self.expect(holds, key, value, "a number > 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return the boolean at `key`."""
        value = self.get(key)
        self.expect(isinstance(value, bool), key, value, "true or false")
        return bool(value)

    def expect(self, holds: object, key: str, value: Any, expected: str) -> None:
        """Raise ModelError for the key, unless `holds`."""
        require(holds, ModelError, f"{self.file}: {shown(key)}={shown(value)}: expected {expected}")


def shown(value: object) -> str:
    """Return a value from a file as text for a message: one line of at most 80 characters."""
    return shorten(printable(one_line(show_value(value))), 80)
