"""Damaged and hostile directories of safetensors files: each is a one-line error before a tensor is read."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from common.errors import ModelError
from training.formats import foreign_tensors
from training.formats.foreign_tensors import MAX_HEADER, TensorDirectory

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def open_directory(directory):
    return TensorDirectory(directory, INDEX, SINGLE)


def file_content(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\x01\x02", "a header of 513 bytes in a file of 2"),
        (b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer"),
        (file_content(b"{}", length=2**63), "a header of 9223372036854775808 bytes in a file of 10"),
        (file_content(b"{}", length=3), "a header of 3 bytes in a file of 10"),
        (file_content(b"not json"), "damaged: not JSON"),
        (file_content(b"\xff\xfe{}"), "damaged: not JSON"),
        (file_content(b"[" * 200_000), "damaged: not JSON"),
        (file_content(b"[1]"), "expected a JSON object"),
        (file_content({"a": 3}, b"x" * 8), "a: damaged: not the entry of a tensor"),
        (file_content({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8), "a: damaged: not the entry of a tensor"),
        (
            file_content({"a": entry(dtype="I8", offsets=(0, 2))}, b"xx"),
            "a: found dtype 'I8', expected one of F64, F32",
        ),
        (file_content({"a": entry(dtype=["F32"])}, b"x" * 8), "a: found dtype"),
        (file_content({"a": entry(shape=(-2,))}, b"x" * 8), "a: damaged: shape (-2,)"),
        (file_content({"a": entry(shape=(True, 2))}, b"x" * 8), "a: damaged: shape"),
        (file_content({"a": entry(shape=(3,))}, b"x" * 8), "a: damaged: 8 bytes for F32 of shape (3,)"),
        (file_content({"a": entry(shape=(2**40, 2**40))}, b"x" * 8), "a: damaged: 8 bytes"),
        (file_content({"a": entry(offsets=(8, 0))}, b"x" * 8), "a: damaged: -8 bytes"),
        (file_content({"a": entry()}, b"x" * 7), "damaged: 7 bytes of data, expected 8"),
        (file_content({"a": entry()}, b"x" * 9), "damaged: 9 bytes of data, expected 8"),
        (file_content({"a": entry(), "b": entry()}, b"x" * 8), "a tensor starts at byte 0 of the data, expected 8"),
        (
            file_content({"a": entry(), "b": entry(offsets=(12, 20))}, b"x" * 20),
            "a tensor starts at byte 12 of the data",
        ),
        (file_content(b'{"a": 1, "a": 2}'), "a: expected once, found several times"),
    ],
)
def test_a_damaged_or_hostile_file_is_an_error_of_one_line(tmp_path, content, message):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        open_directory(tmp_path)
    assert message in str(caught.value) and SINGLE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_beyond_the_limit_is_not_parsed(tmp_path):
    with open(tmp_path / SINGLE, "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)
    with pytest.raises(ModelError, match=f"expected at most {MAX_HEADER}"):
        open_directory(tmp_path)


def test_every_truncation_of_a_real_file_is_an_error(tmp_path):
    save_file({"a": torch.zeros(3), "b": torch.ones(2, 2)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:length])
        with pytest.raises(ModelError):
            open_directory(tmp_path)
    (tmp_path / SINGLE).write_bytes(whole)
    assert sorted(open_directory(tmp_path).tensors) == ["a", "b"]


def test_slices_are_equal_to_slices_of_the_tensor(tmp_path, monkeypatch):
    tensors = {"a": torch.randn(5, 4, 3), "b": torch.randn(6, 2).bfloat16(), "c": torch.tensor(2.0)}
    save_file(tensors, tmp_path / SINGLE)
    files = open_directory(tmp_path)
    assert torch.equal(files.read("a", (1, 0, 2), (3, 4, 1)), tensors["a"][1:4, :, 2:])
    assert torch.equal(files.read("b", (0, 0), (6, 2)), tensors["b"])
    assert torch.equal(files.read("c", (), ()), tensors["c"])
    (tmp_path / SINGLE).unlink()
    assert torch.equal(files.read("c", (), ()), tensors["c"])  # The file is still mapped.
    monkeypatch.setattr(foreign_tensors, "MAPPED_BYTES", 0)
    with pytest.raises(ModelError, match="a: cannot be read"):
        files.read("a", (0, 0, 0), (5, 4, 3))


def write_index(directory, file_of):
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors", "one.bin", "", 3]
)
def test_an_index_can_name_only_safetensors_files_beside_it(tmp_path, name):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": name})
    with pytest.raises(ModelError, match=r"weight_map from|found the file name"):
        open_directory(tmp_path)


def test_index_and_files_must_agree(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(2)}, tmp_path / "two.safetensors")
    file_of = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    write_index(tmp_path, file_of)
    assert open_directory(tmp_path).tensors.keys() == file_of.keys()
    for changes, message in (
        ({"d": "two.safetensors"}, "1 tensor in the index, but not in the file it names: d"),
        ({"a": "two.safetensors"}, "1 tensor in the index, but not in the file it names: a"),
        ({"c": "three.safetensors"}, "three.safetensors: cannot be read"),
    ):
        write_index(tmp_path, file_of | changes)
        with pytest.raises(ModelError, match=message):
            open_directory(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(ModelError, match="1 tensor in the files, but not in the index: b"):
        open_directory(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    write_index(tmp_path, file_of | {"c": "two.safetensors"})
    with pytest.raises(ModelError, match=r"a: expected in one file, found in one.safetensors and two.safetensors"):
        open_directory(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": []}')
    with pytest.raises(ModelError, match="expected a weight_map"):
        open_directory(tmp_path)


def test_a_name_with_line_breaks_is_shown_on_one_line(tmp_path):
    save_file({"a": torch.zeros(2), "evil\nname\x1b[31m": torch.zeros(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(ModelError) as caught:
        open_directory(tmp_path)
    assert str(caught.value).isprintable()
