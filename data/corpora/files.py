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
"""A text file is cut into documents of about this length, so that one large file can be split into two sides."""


class FilesCorpus:
    """Files in the order of `paths`, the matches of a glob sorted; a file matched twice is read once.

    The format goes by the suffix: `.jsonl` and `.parquet` hold a document a row, a `.gz` behind anything but
    `.parquet` is unpacked, and all else is UTF-8 text, cut into documents at the ends of paragraphs or lines.
    The domain is the column `domain_key` (of rows), or else the name of the folder the file lies in.

    Raises:
        DataError: a file that is not there, a glob without a match, an empty file.
    """

    def __init__(
        self, paths: tuple[str, ...], text_key: str, domain_key: str | None, max_documents: int | None
    ) -> None:
        self.files = matching_files(paths)
        self.text_key = text_key
        self.domain_key = domain_key
        self.max_documents = max_documents

    def fingerprint(self) -> str:
        """SHA-256 over contents, suffixes and folders of the files, and over the keys that choose what is read."""
        return fingerprint_of(self.files, (self.text_key, self.domain_key, self.max_documents))

    def documents(self) -> Iterator[Document]:
        every = itertools.chain.from_iterable(map(self._documents_in, self.files))
        return itertools.islice(every, self.max_documents)

    def _documents_in(self, path: Path) -> Iterator[Document]:
        columns = Columns(self.text_key, self.domain_key, folder(path))
        if path.suffix == ".parquet":
            yield from documents_of(parquet_rows(path), columns, str(path))
            return
        with open_text(path) as file:
            if is_jsonl(path):
                yield from documents_of((row for _, row in json_lines(file, path)), columns, str(path))
            else:
                yield from (Document(text, folder(path)) for text in pieces(file))


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """The files that `patterns` (paths or globs) name, each once, a glob's in alphabetical order.

    Raises:
        DataError: a file that is not there, a glob without a match, an empty file.
    """
    return list(dict.fromkeys(path for pattern in patterns for path in _matches(pattern)))


def fingerprint_of(files: Sequence[Path], keys: tuple[object, ...]) -> str:
    """SHA-256 over contents, suffixes and folders of `files`, and over `keys`.

    Raises:
        DataError: a file that cannot be read.
    """
    digest = hashlib.sha256(repr(keys).encode())
    for path in files:
        try:
            content = sha256_of(path)
        except OSError as error:
            raise DataError(f"data.paths={path}: expected a file that can be read ({error.strerror})") from error
        digest.update(f"\n{folder(path)}/*{''.join(path.suffixes[-2:])} {content}".encode())
    return digest.hexdigest()


def is_jsonl(path: Path) -> bool:
    """`.jsonl` or `.jsonl.gz`."""
    return (path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix) == ".jsonl"


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.exists():
        found = [path]
    elif glob.has_magic(pattern):
        found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if Path(match).is_file()]
        if not found:
            raise DataError(f"data.paths={pattern}: expected a glob that matches a file, found none")
    else:
        raise DataError(f"data.paths={pattern}: expected a file, found none of this name")
    for path in found:
        if path.is_dir():
            raise DataError(f"data.paths={path}: expected a file, found a directory; {path}/** matches what lies in it")
        if path.stat().st_size == 0:
            raise DataError(f"data.paths={path}: expected a file with text, found an empty one")
    return [path.resolve() for path in found]


def folder(path: Path) -> str:
    """The domain of a file that names none."""
    return path.parent.name or "root"


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """`path` as UTF-8 text, unpacked if it ends in `.gz`.

    Raises:
        DataError: it cannot be read, also while the caller reads on.
    """
    try:
        how: Any = gzip.open if path.suffix == ".gz" else open
        with how(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"data.paths={path}: expected UTF-8 text ({first_line(error)})") from error
    except (OSError, EOFError) as error:  # EOFError: a truncated .gz
        raise DataError(f"data.paths={path}: expected a file that can be read ({first_line(error)})") from error


def json_lines(file: IO[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of each line that is not blank.

    Raises:
        DataError: a line that is no JSON object.
    """
    # Read here and not through `datasets`, which infers one schema for all rows and cannot name a broken line.
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


def pieces(file: IO[str]) -> Iterator[str]:
    """The text of `file`, cut where a paragraph ends after `PIECE_CHARS`, or a line after half as much again.

    Joined, the pieces are the text. A line longer than `PIECE_CHARS` is cut within.
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
