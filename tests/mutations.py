"""Damaged files for fuzz tests: random mutations of bytes, and of the values of a JSON document."""

import json
import random
from collections.abc import Iterator
from typing import Any

CHUNKS = (
    b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b"\xed\xa0\x80", b"\r", b"\n", b"\n\n", b'"', b"'", b"\\",
    b"{", b"}", b"[", b"]", b",", b":", b"\t", b"&a ", b"*a ", b"!!int ", b"!!timestamp ", b"- ",
    b"9" * 5000, b"[" * 5000, b'{"a":' * 5000,
    b"\\ud800", b"1e999", b"-1", b"NaN", b"Infinity", b"null", b"2024-99-99", b"0x", b"PAR1", b"\x1f\x8b", b"BZh9",
)  # fmt: skip
"""Bytes that parsers treat specially."""
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 10**400, -(10**400), 0.5, 1e308, float("nan"), float("inf"), "",
    "x", "\ud800", "a\nb", [], {}, [None], [[]], {"": None}, {"x": [1]}, "9" * 100, [0] * 9,
)  # fmt: skip
"""Values that a reader of a configuration does not expect."""


def mutated_bytes(content: bytes, seed: str, count: int) -> Iterator[bytes]:
    """Yield `count` damaged versions of `content`, each with one to three changes."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(damaged) + 1)
            stop = min(len(damaged), start + rng.choice((0, 1, 1, 4, 40)))
            kind = rng.randrange(5)
            if kind == 0:  # Cut off the end.
                del damaged[start:]
            elif kind == 1:  # Repeat a part.
                damaged[stop:stop] = damaged[start:stop] * rng.randint(1, 3)
            elif kind == 2:  # Delete a part.
                del damaged[start:stop]
            elif kind == 3:  # Overwrite a part by random bytes.
                damaged[start:stop] = rng.randbytes(stop - start)
            else:
                damaged[start:stop] = rng.choice(CHUNKS)
        yield bytes(damaged)


def mutated_values(document: Any, seed: str, count: int) -> Iterator[bytes]:
    """Yield `count` versions of the JSON value `document`, each with one value replaced, removed, or added."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = json.loads(json.dumps(document))
        places = list(_containers(changed))
        container = rng.choice(places)
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        value = rng.choice(VALUES)
        if isinstance(container, dict) and (not keys or rng.random() < 0.1):
            container[rng.choice(("", "x", "\ud800"))] = value
        elif keys and rng.random() < 0.1:
            del container[rng.choice(keys)]
        elif keys:
            container[rng.choice(keys)] = value
        yield json.dumps(changed).encode()


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)
