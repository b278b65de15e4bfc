"""The formats of local files: which one a file has, and its rows or its text.

A format is chosen by the file's name, regardless of case, and by a look at its first bytes. A file is decompressed if
its first bytes are those of a known compression, whatever its name is.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

from common.errors import DataError, require
from common.files import open_binary
from common.text import first_line, printable, without_advice
from data.config import FileFormat

PIECE_CHARS = 16_384
"""Approximate length of the documents that a text file is split into, so that a single large file has documents for
both the training and the held-out part."""
HEAD_BYTES = 65_536
"""The number of (decompressed) bytes at the start of a file that its format is recognized by."""
SUFFIXES: dict[str, FileFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
"""Suffix -> format. Every other suffix is that of a text."""
COMPRESSIONS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0"}
"""Suffix of a compression -> the first bytes of its files."""
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The start of what a clone without Git LFS has in place of a large file."""
JSON_OBJECT = re.compile(r'\s*\{\s*(\}|"(?:[^"\\]|\\.)*"\s*:)')
"""The start of a JSON object. No text that is meant as text starts like this."""
JSON_ARRAY = re.compile(r"\s*\[" + JSON_OBJECT.pattern)
"""The start of a JSON array of objects."""
JSON_SPACE = re.compile(r"[ \t\n\r]*")
PARQUET_ROWS = 1024
"""Rows of a parquet file that are in memory at once."""
MAX_ROW = 2**26
"""The most characters of a row of a table (of parquet: bytes). A few kilobytes of a compressed file can expand to a row
of gigabytes."""
MAX_JSON_TEXT = 2**30
"""The most bytes of a JSON file that is not one object per line. It is in memory at once."""
MAX_XZ_MEMORY = 2**28
"""The most memory that a `.xz` file can ask for."""
UNDECODABLE = re.compile("[\udc80-\udcff]")
"""What Python's error handler `surrogateescape` gives for a byte that is not UTF-8."""

Row: TypeAlias = dict[str, Any]
Item: TypeAlias = Row | str | DataError
"""A row, a part of a text, or what is wrong at this place."""


class FileKind(NamedTuple):
    """What is known of a file before it is read."""

    compression: str
    """A key of `COMPRESSIONS`, or `""`."""
    format: FileFormat


def detect(path: Path, forced: FileFormat | None = None) -> FileKind:
    """Return the compression and the format of the file `path`.

    Args:
        forced: the format, if the user has chosen it.

    Raises:
        DataError: the file cannot be read, is empty, or does not look like what its name says. The message does not
            name the file, which the caller knows.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    promised = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    try:
        require(path.is_file(), DataError, "expected a regular file")
        with open_binary(path) as file:
            start = file.read(8)
        require(start, DataError, "expected a file with text, found an empty one")
        compression = next((name for name, magic in COMPRESSIONS.items() if start.startswith(magic)), "")
        require(
            not promised or compression, DataError, f"expected a file that can be read as {promised}, found other bytes"
        )
        with _open_bytes(path, compression) as stream:
            head = stream.read(HEAD_BYTES)
    except DataError:
        raise
    except Exception as error:  # Each compression has its own type of errors.
        raise _unreadable(error) from error
    by_name = SUFFIXES.get(suffixes[-1] if suffixes else "", "text")
    return FileKind(compression, forced or _format_of(head, by_name))


def _format_of(head: bytes, by_name: FileFormat) -> FileFormat:
    """Return the format of a file that starts with `head`.

    Raises:
        DataError: the file has the name of a text, and another content.
    """
    require(not head.startswith(LFS_POINTER), DataError, "expected data, found a Git LFS pointer (run git lfs pull)")
    if head.startswith(b"PAR1") or by_name == "parquet":
        return "parquet"
    require(
        not head.startswith(UTF16_MARKS),
        DataError,
        "expected UTF-8 text, found UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)",
    )
    text = head.decode("utf-8-sig", errors="replace")
    if by_name == "text":
        json_like = JSON_OBJECT.match(text) or JSON_ARRAY.match(text)
        require(
            not json_like,
            DataError,
            "expected text, found JSON (data.format=json reads its objects as rows, data.format=text keeps the text)",
        )
        require(b"\0" not in head, DataError, f"expected text, found a zero byte at byte {head.find(0)}")
    return "json" if by_name == "jsonl" and JSON_ARRAY.match(text) else by_name


def items_of(path: Path, kind: FileKind) -> Iterator[tuple[str, Item]]:
    """Yield the place (such as `line 3`) and the value of each row of a table, or of each part of a text.

    What is wrong at a place is yielded as a DataError, whose message does not name the file and the place. The rows
    after it follow, except where nothing can be read after it.
    """
    readers = {"text": _text, "jsonl": _json_lines, "json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet}
    place = ""
    try:
        for place, item in readers[kind.format](path, kind):
            yield place, item
    except Exception as error:  # The libraries that decompress and parse raise many types of errors.
        yield f"after {place}" if place else "", error if isinstance(error, DataError) else _unreadable(error)


def _unreadable(error: Exception) -> DataError:
    return DataError(f"expected a file that can be read ({first_line(error)})")


def _open_bytes(path: Path, compression: str) -> IO[bytes]:
    open_binary(path).close()  # The libraries would wait for a named pipe.
    if compression == ".gz":
        import gzip

        return gzip.open(path)  # type: ignore[return-value]
    if compression == ".bz2":
        import bz2

        return bz2.open(path)
    if compression == ".xz":
        return io.BufferedReader(_XzReader(open_binary(path)))
    if compression == ".zst":
        import pyarrow

        stream: IO[bytes] = pyarrow.input_stream(str(path), compression="zstd")
        return stream
    return open_binary(path)


class _XzReader(io.RawIOBase):
    """Decompresses a `.xz` file. `lzma.open` has no limit of the memory, of which a file can ask for 4 GiB."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._decompressor = file, self._new_decompressor()

    def _new_decompressor(self) -> Any:
        import lzma

        return lzma.LZMADecompressor(memlimit=MAX_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the start of `buffer`, and return the number of bytes. 0: the end."""
        content = compressed = b""
        while not content:
            if self._decompressor.eof:
                # Several streams can follow one another, with zeros between them.
                compressed = self._decompressor.unused_data.lstrip(b"\0")
                while not compressed:
                    block = self._file.read(2**16)
                    if not block:
                        return 0
                    compressed = block.lstrip(b"\0")
                self._decompressor = self._new_decompressor()
            elif self._decompressor.needs_input:
                compressed = self._file.read(2**16)
                if not compressed:
                    raise EOFError("the file ends before its end marker")
            content = self._decompressor.decompress(compressed, len(buffer))
            compressed = b""
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Close the compressed file."""
        self._file.close()
        super().close()


def _open_text(path: Path, kind: FileKind, newline: str | None = None) -> IO[str]:
    """Open a file as UTF-8 text, in which each byte that is not UTF-8 is one character of `UNDECODABLE`."""
    stream = _open_bytes(path, kind.compression)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _undecodable(text: str) -> DataError | None:
    """Return what is wrong with `text` if it has bytes that are not UTF-8."""
    if text.isascii() or not (found := UNDECODABLE.search(text)):
        return None
    return DataError(f"expected UTF-8 text, found the byte 0x{ord(found[0]) - 0xDC00:02x}")


def _text(path: Path, kind: FileKind) -> Iterator[tuple[str, Item]]:
    with _open_text(path, kind) as file:
        line = 1
        for piece in split_text(file):
            if error := _undecodable(piece):
                found = UNDECODABLE.search(piece)
                assert found is not None
                yield f"line {line + piece.count(chr(10), 0, found.start())}", error
                return
            yield f"line {line}", piece
            line += piece.count("\n")


def split_text(file: IO[str]) -> Iterator[str]:
    """Split the text of `file` into parts, which concatenated are the text.

    A part ends at the first end of a paragraph after `PIECE_CHARS` characters, or at the first end of a line after
    1.5 times as many. A line that is longer than `PIECE_CHARS` can be split within.
    """
    lines: list[str] = []
    length = 0
    while line := file.readline(PIECE_CHARS):
        lines.append(line)
        length += len(line)
        if length >= PIECE_CHARS and (line.isspace() or length >= PIECE_CHARS * 3 // 2):
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


def _json_lines(path: Path, kind: FileKind) -> Iterator[tuple[str, Item]]:
    # The `datasets` library is not used here: it infers one schema for all rows, and cannot name an invalid line.
    with _open_text(path, kind) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW + 1), ""), start=1):
            if len(line) > MAX_ROW:
                yield f"line {number}", _too_long()
                return
            if not line.isspace():
                yield f"line {number}", _undecodable(line) or _json_row(line.rstrip("\n"), number)


def _too_long() -> DataError:
    return DataError(f"expected a row of at most {MAX_ROW} characters, found a longer one")


def _json_row(line: str, number: int) -> Row | DataError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _not_json(error, number)
    return row if isinstance(row, dict) else _not_an_object(row)


def _not_json(error: ValueError | RecursionError, first_line: int = 1) -> DataError:
    """Return the error about text that starts in line `first_line` of its file."""
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg}: line {first_line + error.lineno - 1} column {error.colno}"
    else:
        reason = without_advice(error)
    return DataError(f"expected a JSON object, found text that is not JSON ({reason})")


def _json(path: Path, kind: FileKind) -> Iterator[tuple[str, Item]]:
    """Read a JSON array of objects, one object, or several objects one after another (such as JSON lines)."""
    with _open_text(path, kind) as file:
        first = next((line for line in iter(lambda: file.readline(MAX_ROW), "") if not line.isspace()), "")
    if JSON_OBJECT.match(first) and isinstance(_json_row(first, 1), dict):
        yield from _json_lines(path, kind)
        return
    limit = f"expected at most {MAX_JSON_TEXT} bytes of JSON that is not one object per line (.jsonl), found more"
    content = _content(path, kind, limit)
    text = content.decode("utf-8-sig", errors="surrogateescape")
    del content
    error = _undecodable(text)
    yield from [("", error)] if error else _json_values(text)


def _content(path: Path, kind: FileKind, message: str) -> bytes:
    """Return the decompressed content of a file, or raise DataError with `message` if it is above `MAX_JSON_TEXT`."""
    with _open_bytes(path, kind.compression) as stream:
        content = stream.read(MAX_JSON_TEXT + 1)
    require(len(content) <= MAX_JSON_TEXT, DataError, message)
    return content


def _json_values(text: str) -> Iterator[tuple[str, Item]]:
    """Yield the items of the array `text`, or the values that follow one another in `text`."""
    decoder, position = json.JSONDecoder(), _after_space(text, 0)
    is_array = text.startswith("[", position)
    position = _after_space(text, position + is_array)
    number, line, counted = 0, 1, 0
    while position < len(text) and not (is_array and text[position] == "]"):
        number, line, counted = number + 1, line + text.count("\n", counted, position), position
        place = f"item {number} in line {line}"
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield place, _not_json(error)
            return
        yield place, value if isinstance(value, dict) else _not_an_object(value)
        position = _after_space(text, end)
        if is_array and text.startswith(",", position):
            position = _after_space(text, position + 1)
        elif is_array and not text.startswith("]", position):
            yield f"after {place}", DataError("expected a comma or the end of the array")
            return
    if is_array and _after_space(text, position + 1) != len(text):
        yield "", DataError("expected one JSON array and nothing after it, or one object per line")


def _after_space(text: str, position: int) -> int:
    """Return the first position from `position` on that is not white space of JSON."""
    found = JSON_SPACE.match(text, position)
    return found.end() if found else position


def _not_an_object(value: Any) -> DataError:
    return DataError(f"expected a JSON object, found {type(value).__name__}")


def _csv(path: Path, kind: FileKind) -> Iterator[tuple[str, Item]]:
    csv.field_size_limit(MAX_ROW)  # The default is 131,072 characters, which a document can exceed.
    header: list[str] = []
    left = MAX_ROW  # characters that the lines of the current row can have

    def lines(file: IO[str]) -> Iterator[str]:
        nonlocal left
        while line := file.readline(left + 1):
            left -= len(line)
            if left < 0:
                raise _too_long()
            yield line

    with _open_text(path, kind, newline="") as file:
        reader = csv.reader(lines(file), "excel-tab" if kind.format == "tsv" else "excel", strict=True)
        while True:
            place, left = f"line {reader.line_num + 1}", MAX_ROW
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, DataError(f"expected {kind.format}, found {printable(str(error))}")
                continue
            if not header:
                require(
                    len(set(fields)) == len(fields), DataError, f"expected a header with different names, in {place}"
                )
                header = fields
            elif len(fields) == len(header):
                yield place, _undecodable("".join(fields)) or dict(zip(header, fields, strict=True))
            elif fields:
                yield place, DataError(f"expected {len(header)} fields as in the header, found {len(fields)}")


def _parquet(path: Path, kind: FileKind) -> Iterator[tuple[str, Item]]:
    import pyarrow.parquet

    source: Any = path
    if kind.compression:
        limit = f"expected parquet of at most {MAX_JSON_TEXT} bytes inside {kind.compression}, found more"
        source = io.BytesIO(_content(path, kind, limit))
    with pyarrow.parquet.ParquetFile(source) as file:
        # Repeated values stay in a dictionary: written out, a thousand rows of one large value are gigabytes.
        columns = [file.schema.column(number) for number in range(len(file.schema.names))]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    with pyarrow.parquet.ParquetFile(source, read_dictionary=texts) as file:
        rows = (row for batch in file.iter_batches(batch_size=PARQUET_ROWS) for row in _rows_of(batch))
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row


def _rows_of(batch: Any) -> Iterator[Row | DataError]:
    """Yield the rows of a batch of a parquet file: one by one if they are large."""
    if _size_of(batch) <= MAX_ROW:
        yield from batch.to_pylist()
        return
    for row in (batch.slice(number, 1) for number in range(len(batch))):
        if _size_of(row) > MAX_ROW:
            yield DataError(f"expected a row of at most {MAX_ROW} bytes, found a larger one")
        else:
            yield from row.to_pylist()


def _size_of(values: Any) -> int:
    """Return the bytes of a batch or an array of pyarrow, in which each row has its own copy of its values."""
    import pyarrow
    import pyarrow.compute

    if isinstance(values, pyarrow.RecordBatch):
        return sum(map(_size_of, values.columns))
    kind = values.type
    if pyarrow.types.is_dictionary(kind):
        lengths = pyarrow.compute.binary_length(values.dictionary).cast(pyarrow.int64())
        return int(pyarrow.compute.sum(lengths.take(values.indices)).as_py() or 0)
    if pyarrow.types.is_struct(kind):
        return sum(map(_size_of, values.flatten()))
    if pyarrow.types.is_map(kind):
        return _size_of(values.keys) + _size_of(values.items)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        return _size_of(values.flatten())
    return int(values.nbytes)
