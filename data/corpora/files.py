"""Local files as a corpus: plain text, JSON lines, parquet."""

import glob
import gzip
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from common.errors import DataError
from common.files import sha256_of
from common.text import first_line
from data.corpora.document import Document
from data.corpora.rows import Columns, documents_of, parquet_rows

PIECE_CHARS = 16_384
"""Approximate length of the documents that a text file is split into, so that a single large file has documents for
both the training and the held-out part."""


class FilesCorpus:
    """Files in the order of `paths`, and in alphabetical order within a glob. A file that matches twice is read once.

    The suffix decides the format. `.jsonl` and `.parquet` contain one document per row. Every other file is UTF-8 text
    and is split into documents at the ends of paragraphs or lines. Text and JSON lines that end in `.gz` are
    decompressed.

    Args:
        paths: files or globs.
        text_key: the column of the text, in rows.
        domain_key: the column of the domain, in rows. None, and for text: the domain is the name of the file's folder.
        max_documents: the maximum number of documents to read.

    Raises:
        DataError: a file does not exist or is empty, or a glob matches nothing.
    """

    def __init__(
        self, paths: tuple[str, ...], text_key: str, domain_key: str | None, max_documents: int | None
    ) -> None:
        self.files = matching_files(paths)
        self.text_key = text_key
        self.domain_key = domain_key
        self.max_documents = max_documents

    def fingerprint(self) -> str:
        """Return the SHA-256 of the files, and of the keys that choose what is read."""
        return fingerprint_of(self.files, (self.text_key, self.domain_key, self.max_documents))

    def documents(self) -> Iterator[Document]:
        """Yield the documents of all files.

        Raises:
            DataError: a file cannot be read, or a row does not have the columns.
        """
        documents = itertools.chain.from_iterable(map(self._documents_in, self.files))
        return itertools.islice(documents, self.max_documents)

    def _documents_in(self, path: Path) -> Iterator[Document]:
        columns = Columns(self.text_key, self.domain_key, folder_name(path))
        if path.suffix == ".parquet":
            yield from documents_of(parquet_rows(path), columns, str(path))
            return
        with open_text(path) as file:
            if is_jsonl(path):
                yield from documents_of((row for _, row in json_lines(file, path)), columns, str(path))
            else:
                yield from (Document(text, folder_name(path)) for text in split_text(file))


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that `patterns` (paths or globs) name, without duplicates, those of a glob sorted.

    Raises:
        DataError: a file does not exist or is empty, or a glob matches nothing.
    """
    return list(dict.fromkeys(path for pattern in patterns for path in _matches(pattern)))


def fingerprint_of(files: Sequence[Path], keys: tuple[object, ...]) -> str:
    """Return the SHA-256 of `keys`, and of the contents, suffixes and folder names of `files`.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256(repr(keys).encode())
    for path in files:
        try:
            content = sha256_of(path)
        except OSError as error:
            raise DataError(f"data.paths={path}: expected a file that can be read ({error.strerror})") from error
        digest.update(f"\n{folder_name(path)}/*{''.join(path.suffixes[-2:])} {content}".encode())
    return digest.hexdigest()


def is_jsonl(path: Path) -> bool:
    """Return whether the suffix of `path` is `.jsonl` or `.jsonl.gz`."""
    return (path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix) == ".jsonl"


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.exists():
        matches = [path]
    elif glob.has_magic(pattern):
        matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if Path(match).is_file()]
        if not matches:
            raise DataError(f"data.paths={pattern}: expected a glob that matches a file, found none")
    else:
        raise DataError(f"data.paths={pattern}: expected a file, found none of this name")
    for path in matches:
        if path.is_dir():
            raise DataError(
                f"data.paths={path}: expected a file, found a directory; {path}/** matches the files below it"
            )
        if path.stat().st_size == 0:
            raise DataError(f"data.paths={path}: expected a file with text, found an empty one")
    return [path.resolve() for path in matches]


def folder_name(path: Path) -> str:
    """Return the name of the file's folder: the domain of documents that have no domain column."""
    return path.parent.name or "root"


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open `path` as UTF-8 text, decompressed if it ends in `.gz`.

    Raises:
        DataError: the file cannot be read. This includes errors while the caller reads inside the `with` block.
    """
    try:
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"data.paths={path}: expected UTF-8 text ({first_line(error)})") from error
    except (OSError, EOFError) as error:  # gzip raises EOFError for a truncated file.
        raise DataError(f"data.paths={path}: expected a file that can be read ({first_line(error)})") from error


def json_lines(file: IO[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number (from 1) and the object of each line that is not blank.

    Raises:
        DataError: a line is not a JSON object.
    """
    # The `datasets` library is not used here: it infers one schema for all rows, and cannot name an invalid line.
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"data.paths={path}: expected JSON in line {number} ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"data.paths={path}: expected an object in line {number}, found {type(row).__name__}")
        yield number, row


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
