"""Strict JSON and YAML, and the helpers that show names from files in messages."""

import ast
import json
import math
from pathlib import Path

import pytest

from common.errors import CheckpointError, ModelError, expect_no_tensors
from common.text import finite, parse_json, parse_json_object, parse_yaml, printable, to_json


def test_an_object_is_parsed():
    assert parse_json_object('{"a": {"b": [1, null]}, "c": {"b": 2}}') == {"a": {"b": [1, None]}, "c": {"b": 2}}
    assert parse_json_object(b"{}") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: Expecting property name"),
        (b"\xff{}", "not JSON: 'utf-8' codec can't decode"),
        (b"[" * 200_000, "not JSON: maximum recursion depth"),
        ("[1]", "expected a JSON object, found [1]"),
        (f"[{'1,' * 100}1]", "expected a JSON object, found [1, 1, 1"),
        ('{"a": {"b": 1, "c": 2, "b": 1}}', "b: expected once, found several times"),
        (r'{"a\nb": 1, "a\nb": 1}', r"'a\nb': expected once, found several times"),
    ],
)
def test_anything_else_is_an_error_of_one_line(text, message):
    with pytest.raises(ValueError) as caught:
        parse_json_object(text)
    assert str(caught.value).startswith(message) and len(str(caught.value)) < 140
    assert str(caught.value).isprintable()


def test_numbers_that_are_not_finite_are_written_as_null():
    value = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": "NaN", "d": True, "e": 10**30}
    expected = {"a": [1.5, None, [None, {"b": None}]], "c": "NaN", "d": True, "e": 10**30}

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(to_json(value, indent=2), parse_constant=refuse) == finite(value) == expected
    assert to_json({"x": 0.1 + 0.2, "y": [1, "é"]}) == json.dumps({"x": 0.1 + 0.2, "y": [1, "é"]})


def test_every_json_that_the_project_writes_is_strict():
    root = Path(__file__).parents[2]
    files = [*root.glob("*.py"), *(f for room in ROOMS for f in (root / room).rglob("*.py"))]
    assert len(files) > 100
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps", "dump", "dumps"):
                strict = any(
                    keyword.arg == "allow_nan" and ast.unparse(keyword.value) == "False" for keyword in node.keywords
                )
                assert strict, f"{file}:{node.lineno}: use common.text.to_json"


ROOMS = ("common", "data", "moe", "parallel", "training", "scripts", "benchmarks")


def test_parsing_ends_in_a_value_or_one_line():
    assert parse_json(b"\xef\xbb\xbf[null]") == parse_json("\ufeff[null]") == [None]
    assert parse_yaml("a: [1, null]\nb: x") == {"a": [1, None], "b": "x"}
    for text in (b"\xff\xfe[\0", b"[" * 10_000, b"9" * 5000, b"", b"{} {}"):
        with pytest.raises(ValueError, match=r"^[^\n]{1,120}$"):
            parse_json(text)
    for text in (
        "a: [",
        "[" * 5000,
        "9" * 5000,
        "2024-99-99",
        "a: &a [1]\nb: *a",
        "!!int x",
        "!!python/name:os.system x",
        "\0",
        "{[a]: b}",
    ):
        with pytest.raises(ValueError, match=r"^[^\n]{1,200}$"):
            parse_yaml(text)


def test_tensors_with_a_problem_are_listed_and_counted():
    expect_no_tensors(Path("a"), "missing", [], ModelError)
    with pytest.raises(ModelError, match=r"^a: 1 tensor missing: x$"):
        expect_no_tensors(Path("a"), "missing", {"x"}, ModelError)
    with pytest.raises(CheckpointError, match=r"^a: 7 tensors missing: 0, 1, 2, 3, 4, and 2 more$"):
        expect_no_tensors(Path("a"), "missing", map(str, range(7)), CheckpointError)
    with pytest.raises(ModelError) as caught:
        expect_no_tensors(Path("a"), "missing", ["evil\nname", "long" * 100], ModelError)
    assert str(caught.value) == rf"a: 2 tensors missing: 'evil\nname', {('long' * 100)[:117]}..."


def test_printable_text_is_unchanged():
    assert printable("layers.0.w [2, 3]") == "layers.0.w [2, 3]"
    assert printable("\x1b[31m") == r"'\x1b[31m'"
