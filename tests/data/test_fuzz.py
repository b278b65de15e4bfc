"""Damaged files of every format: only a DataError of one line, which names the file, leaves the readers."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DataError
from data.config import FileFormat
from data.corpora.document import Document, Fault
from data.corpora.files import FileCorpus, FilesCorpus
from data.corpora.sft import SftCorpus
from tests.mutations import mutated_bytes

ROWS = [{"text": f'words "{i}" of é and\nlines', "n": i, "meta": {"tags": ["a"], "b": {"c": i}}} for i in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "It is."}], "n": i}
    for i in range(6)
]
COUNT = 40
"""Mutations of each file; `fuzz` was also run by hand with thousands."""


def zstd(content: bytes) -> bytes:
    import pyarrow

    compressed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return compressed


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def table(rows: list[dict], format: str) -> bytes:
    """Return the content of a file of `rows`."""
    if format == "parquet":
        import pyarrow.parquet

        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file.getvalue()
    if format in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(
            text, ["text", "n"], extrasaction="ignore", dialect="excel" if format == "csv" else "excel-tab"
        )
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    if format == "json":
        return json.dumps(rows, ensure_ascii=False, indent=1).encode()
    separator = "\n\n" if format == "txt" else "\n"
    return separator.join(row["text"] if format == "txt" else json.dumps(row) for row in rows).encode()


def check(corpus: Callable[[str], FileCorpus], path: Path) -> str:
    """Read the file `path` with both values of `data.on_error`, and return what came of it."""
    found = [*corpus("skip").documents()]
    assert all(isinstance(item, Document | Fault) for item in found)
    try:
        documents = list(corpus("fail").documents())
    except DataError as error:
        message = str(error)
        assert message.startswith(f"data.paths={path}: ") and len(message) < 1000, message
        assert message.isprintable() or "\n" not in message, message
        assert any(isinstance(item, Fault) for item in found)
        return "refused"
    assert documents == found and len(corpus("fail").fingerprint()) == 64
    return "read"


def fuzz(folder: Path, name: str, content: bytes, corpus: Callable[[Path, str], FileCorpus], count: int) -> set[str]:
    """Read `count` damaged versions of `content`, and return the outcomes."""
    path = folder / name
    outcomes = set()
    for damaged in mutated_bytes(content, name, count):
        path.write_bytes(damaged)
        outcomes.add(check(lambda on_error: corpus(path, on_error), path))
    return outcomes


def rows_corpus(path: Path, on_error: str, format: FileFormat | None = None) -> FileCorpus:
    return FilesCorpus((str(path),), "text", None, None, format, on_error)


def chats_corpus(path: Path, on_error: str) -> FileCorpus:
    return SftCorpus((str(path),), "messages", None, None, (), None, on_error)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("format", ["txt", "jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_damaged_files_end_in_one_line(tmp_path: Path, format: str, compression: str) -> None:
    content = COMPRESS[compression](table(ROWS, format))
    name = f"a.{format}{compression}"
    (tmp_path / name).write_bytes(content)
    assert check(lambda on_error: rows_corpus(tmp_path / name, on_error), tmp_path / name) == "read"
    outcomes = fuzz(tmp_path, name, content, rows_corpus, COUNT if format != "parquet" else COUNT // 4)
    assert "refused" in outcomes
    if compression:  # Damage the content, and compress it again.
        for damaged in mutated_bytes(table(ROWS, format), name, 4):
            (tmp_path / name).write_bytes(COMPRESS[compression](damaged))
            check(lambda on_error: rows_corpus(tmp_path / name, on_error), tmp_path / name)


@pytest.mark.parametrize("format", ["jsonl", "json", "parquet"])
def test_damaged_conversations_end_in_one_line(tmp_path: Path, format: str) -> None:
    assert "refused" in fuzz(tmp_path, f"a.{format}", table(CHATS, format), chats_corpus, COUNT)
