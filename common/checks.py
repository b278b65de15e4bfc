"""The check behind most one-line refusals."""

from common.errors import ConfigError
from common.text import show_value


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
