"""Strict parsing of a JSON object."""

import json
from typing import Any

from common.text import printable, shorten


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Every object in it must give each of its names once.

    Raises:
        ValueError: `text` is not JSON, is another JSON value than an object, or gives a name twice.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_without_duplicates)
        if not isinstance(parsed, dict):
            raise ValueError(f"expected a JSON object, found {shorten(json.dumps(parsed), 60)}")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"{shorten(printable(name), 120)}: expected once, found several times")
        names.add(name)
    return dict(pairs)
