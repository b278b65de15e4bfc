"""Values, names and numbers as text, for messages and tables; and JSON and YAML, written and read strictly."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

MAX_YAML = 2**19
"""The most characters of a YAML file that is read. A parser needs seconds for them."""
MAX_YAML_DEPTH = 100
"""The deepest nesting of a YAML file that is read. A parser's time grows with the square of the depth."""
MAX_JSON = 2**26
"""The most bytes of a JSON file that is read whole, unless its reader has another limit."""
SIMILAR = 0.75
"""Ratio of `difflib.SequenceMatcher` from which one word is suggested in place of another."""
ALMOST = 0.9
"""Ratio from which one word is almost equal to another."""


def one_line(text: str) -> str:
    """`text` with every run of white space replaced by one space."""
    return " ".join(text.split())


def first_line(error: BaseException) -> str:
    """The type of `error` and the first line of its message, at most 200 characters of it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def shorten(text: str, length: int) -> str:
    """`text`, cut to `length` characters; a cut text ends in `...`."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def printable(text: str) -> str:
    """`text` as it is, or its `repr` if it has characters that are not printable, such as line breaks and escapes.

    For text that comes from a file and goes to a terminal.
    """
    return text if text.isprintable() else repr(text)


def escaped(text: str) -> str:
    """`text` with a backslash escape in place of every character that is not printable. Newlines and tabs stay.

    For text that goes to a terminal, whose settings an escape sequence can change.
    """
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show_value(value: object) -> str:
    """`value` as a user writes it in YAML or on the command line.

    >>> show_value(None), show_value(True), show_value((64, None)), show_value({"factor": 4.0})
    ('null', 'true', '[64,null]', '{factor:4.0}')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{show_value(inner)}' for key, inner in value.items())}}}"
    return f"[{','.join(map(show_value, value))}]" if isinstance(value, list | tuple) else str(value)


def flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values in nested dicts with their dotted keys.

    >>> list(flat({"model": {"top_k": 2}, "plugins": []}))
    [('model.top_k', 2), ('plugins', [])]
    """
    for key, value in section.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of the dotted `words` that is most similar to `word`, or None if none is similar.

    The last parts are compared first. The whole words only choose between equally similar last parts. A last part is
    also similar to one that it begins, as `warmup` begins `warmup_steps`.
    """

    def similarity(candidate: str) -> tuple[float, float]:
        last, other = word.rpartition(".")[2], candidate.rpartition(".")[2]
        begins = len(last) > 3 and other.startswith(f"{last}_")
        return max(_ratio(last, other), SIMILAR if begins else 0.0), _ratio(word, candidate)

    best = max(words, key=similarity, default=None)
    return None if best is None or similarity(best)[0] < SIMILAR else best


def nearest_presets(name: str, presets: Iterable[str]) -> list[str]:
    """The presets that `name` probably means, in their order; none if no preset is similar.

    They are those that contain `name`, or else those whose first part is the most similar one, as `mixtral` is that of
    `mixtral_8x7b`, or else the one of them that is almost equal to `name`. Case and separators do not matter.

    >>> nearest_presets("A100", ["a100-40", "a100-80", "h100"])
    ['a100-40', 'a100-80']
    >>> nearest_presets("h100-40", ["a100-40", "a100-80", "h100"])
    ['h100']
    """

    def parts(text: str) -> list[str]:
        return re.split("[-_]", text.lower())

    words = {preset: parts(preset) for preset in presets}
    first, word = parts(name)[0], "".join(parts(name))
    containing = [preset for preset in words if len(word) > 2 and word in "".join(words[preset])]
    if containing:
        return containing
    similar = {preset: _ratio(first, words[preset][0]) for preset in words}
    found = [preset for preset in words if similar[preset] == max(similar.values()) >= SIMILAR]
    best = max(found, key=lambda preset: _ratio(name, preset), default="")
    return [best] if found and _ratio(name, best) >= ALMOST else found


def nearest_name(pattern: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is most similar to a glob as a whole, or None if none is similar."""
    best = max(names, key=lambda name: _ratio(pattern, name), default=None)
    return None if best is None or _ratio(pattern, best) < 0.5 else best


def _ratio(word: str, other: str) -> float:
    return difflib.SequenceMatcher(None, word, other).ratio()


def show_ranges(numbers: Iterable[int]) -> str:
    """Integers with runs of neighbours joined.

    >>> show_ranges([0, 4, 8, 9, 10])
    '0,4,8-10'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def finite(value: Any) -> Any:
    """`value`, which consists of JSON values, with None in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, **options: Any) -> str:
    """`value` as strict JSON text, in which NaN and the infinities are `null`. All JSON of this project is written so.

    Args:
        value: dicts, lists, tuples and scalars.
        options: keyword arguments of `json.dumps`.

    Raises:
        TypeError, ValueError: `value` has something that JSON cannot represent.

    >>> to_json({"loss": float("nan"), "steps": (1, 2.5)})
    '{"loss": null, "steps": [1, 2.5]}'
    """
    return json.dumps(finite(value), allow_nan=False, **options)


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Parse a JSON value. A byte order mark of UTF-8 at the start is skipped.

    Args:
        text: the text, or its bytes in UTF-8.
        options: keyword arguments of `json.loads`.

    Raises:
        ValueError: `text` is not UTF-8, not JSON, nested too deeply, or has an integer of too many digits. The message
            is one line.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(decoded.removeprefix("\ufeff"), **options)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(without_advice(error)) from error


def without_advice(error: Exception) -> str:
    """The message of an error of `json`, without the name of a Python function.

    Python refuses integers of more than 4,300 digits, and advises to call one of its functions.
    """
    return str(error).partition("; use sys.")[0]


def expect_characters(value: Any) -> None:
    """Check that every string in a parsed JSON value consists of characters. JSON can have half of a surrogate pair.

    Raises:
        ValueError: a string has something else. The message is one line.
    """
    to_json(value, ensure_ascii=False).encode()


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Every object in it must give each of its names once.

    Raises:
        ValueError: `text` is not JSON, is another JSON value than an object, or gives a name twice.
    """
    parsed = parse_json(text, object_pairs_hook=_without_duplicates)
    if not isinstance(parsed, dict):
        raise ValueError(f"expected a JSON object, found {shorten(to_json(parsed), 60)}")
    return parsed


def parse_yaml(text: str | bytes) -> Any:
    """Parse a YAML document without aliases, of which a few lines can expand to gigabytes.

    Args:
        text: the text, or its bytes in UTF-8.

    Raises:
        ValueError: `text` is not YAML, has an alias, is too long or is nested too deeply. The message is one line.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        check_yaml(decoded, aliases=False)
        return yaml.load(decoded, loader)
    except Exception as error:  # Besides YAMLError, the constructors of dates, numbers and sets raise many types.
        raise ValueError(shorten(one_line(str(error)) or type(error).__name__, 200)) from error


def check_yaml(text: str, *, aliases: bool) -> None:
    """Check that a YAML document can be parsed in bounded time and memory.

    Args:
        aliases: whether the document can have aliases.

    Raises:
        ValueError: `text` is too long, is nested too deeply, or has an alias and must not.
        yaml.YAMLError: `text` is not YAML.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if len(text) > MAX_YAML:
        raise ValueError(f"expected YAML of at most {MAX_YAML} characters, found {len(text)}")
    depth = 0
    for event in yaml.parse(text, loader):
        if isinstance(event, yaml.AliasEvent) and not aliases:
            raise ValueError("expected YAML without aliases (a few lines of them can expand to gigabytes)")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"expected YAML that is nested at most {MAX_YAML_DEPTH} deep")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"{shorten(printable(name), 120)}: expected once, found several times")
        names.add(name)
    return dict(pairs)
