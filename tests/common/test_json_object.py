"""Strict JSON objects, and the helpers that show names from files in messages."""

from pathlib import Path

import pytest

from common.errors import CheckpointError, ModelError, expect_no_tensors
from common.text import parse_json_object, printable


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
