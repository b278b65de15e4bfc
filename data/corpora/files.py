"""Local files as a corpus. `data.corpora.formats` reads the rows or the text of one file."""

import glob
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

from common.errors import DataError, require
from common.files import sha256_of
from common.text import printable
from data.config import FileFormat
from data.corpora.document import Document, Fault
from data.corpora.formats import COMPRESSIONS, SUFFIXES, FileKind, Row, detect, items_of
from data.corpora.rows import Columns, checked_documents, document_of, documents_of, fault_error


class FileCorpus(ABC):
    """Files in the order of `paths`, and in alphabetical order within a glob or a folder. No file is read twice.

    A subclass says what a row of a table is, and whether a text is something too.

    Args:
        paths: files, globs, or folders, of which all files below them are read.
        max_documents: the maximum number of documents to read.
        format: the format of all files. None: it is detected file by file (`data.corpora.formats.detect`).
        on_error: `fail`, or `skip` to leave out what cannot be read.

    Raises:
        DataError: a file or folder does not exist, or a glob or a folder has no file.
    """

    reads_text: ClassVar[bool]
    """Whether a text file can be part of the corpus."""

    def __init__(
        self, paths: tuple[str, ...], max_documents: int | None, format: FileFormat | None, on_error: str
    ) -> None:
        self.files = matching_files(paths)
        self.max_documents = max_documents
        self.format = format
        self.on_error = on_error

    @abstractmethod
    def keys(self) -> tuple[object, ...]:
        """Return the values of the configuration keys that choose what is read, apart from `format` and `on_error`."""

    @abstractmethod
    def document(self, path: Path, row: Row | str) -> Document:
        """Return the document that a row of `path`, or a part of its text, is.

        Raises:
            DataError: the row is no document. The message names neither the file nor the row.
        """

    def fingerprint(self) -> str:
        """Return the SHA-256 of the files, of what they are read as, and of the keys that choose what is read."""
        return fingerprint_of(self.files, (*self.keys(), *(["skip"] if self.on_error == "skip" else [])), self.format)

    def documents(self) -> Iterator[Document | Fault]:
        """Yield the documents of all files, and with `on_error=skip` the places that are not documents.

        Raises:
            DataError: files that cannot be read, or rows that are not documents. The message names files and lines.
        """
        sources = map(self._documents_in, self.files)
        return checked_documents(sources, "data.paths", self.on_error, self.max_documents)

    def _documents_in(self, path: Path) -> Iterator[Document | Fault]:
        name = printable(str(path))
        try:
            kind = detect(path, self.format)
            require(
                self.reads_text or kind.format != "text",
                DataError,
                "expected conversations in rows (.jsonl, .json, .parquet), found text",
            )
        except DataError as error:
            yield Fault(name, "", str(error))
            return
        yield from documents_of(name, items_of(path, kind), partial(self.document, path))


class FilesCorpus(FileCorpus):
    """Rows of tables, and texts.

    A table contains one document per row. A text is split into documents at the ends of paragraphs or lines.

    Args:
        text_key: the column of the text, in rows.
        domain_key: the column of the domain, in rows. None, and for text: the domain is the name of the file's folder.
    """

    reads_text = True

    def __init__(
        self,
        paths: tuple[str, ...],
        text_key: str,
        domain_key: str | None,
        max_documents: int | None,
        format: FileFormat | None = None,
        on_error: str = "fail",
    ) -> None:
        super().__init__(paths, max_documents, format, on_error)
        self.text_key = text_key
        self.domain_key = domain_key

    def keys(self) -> tuple[object, ...]:
        """Return the columns and the limit."""
        return self.text_key, self.domain_key, self.max_documents

    def document(self, path: Path, row: Row | str) -> Document:
        """Return a part of a text, or the columns of a row."""
        if isinstance(row, str):
            return Document(row, folder_name(path))
        return document_of(row, Columns(self.text_key, self.domain_key, folder_name(path)))


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that `patterns` (files, folders or globs) name, without duplicates.

    The files of a folder or a glob are sorted, and empty texts are not part of it. Files whose name, or whose folder's
    name, starts with a dot are not part of a folder.

    Raises:
        DataError: a file or folder does not exist, or a glob or a folder has no file. All such patterns are named.
    """
    files: dict[Path, None] = {}
    faults = []
    for pattern in patterns:
        try:
            matches = _matches(pattern)
        except OSError as error:
            faults.append(Fault(printable(pattern), "", f"expected a file or folder ({error.strerror})"))
            continue
        if not matches:
            faults.append(Fault(printable(pattern), "", f"expected {_expected(pattern)}, found none"))
        files |= dict.fromkeys(path.resolve() for path in matches)
    if faults:
        raise fault_error("data.paths", faults)
    return list(files)


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        below = (file for file in path.rglob("*") if _is_source(file))
        return sorted(file for file in below if not any(part[0] == "." for part in file.relative_to(path).parts))
    if path.exists():
        return [path]
    return [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if _is_source(Path(match))]


def _is_source(path: Path) -> bool:
    """Return whether `path` is a file that is not an empty text, such as the `__init__.py` of a package.

    An empty table or archive is a source: reading it reports it, because its rows may have been lost.
    """
    return path.is_file() and (path.stat().st_size > 0 or path.suffix.lower() in (*SUFFIXES, *COMPRESSIONS))


def _expected(pattern: str) -> str:
    """Return what the pattern `pattern`, which matches nothing, should have been."""
    if Path(pattern).is_dir():
        return "a folder with files"
    return "a glob that matches a file" if glob.has_magic(pattern) else "a file or folder of this name"


def fingerprint_of(files: Sequence[Path], keys: tuple[object, ...], format: FileFormat | None) -> str:
    """Return the SHA-256 of `keys`, and of the contents, suffixes and folder names of `files`.

    What a file is read as is part of it only if its suffix does not say it, where `.jsonl`, `.parquet` and `.gz` say it
    and every other suffix says text. The fingerprints of such files are those of version 0.1.0, whose token stores can
    therefore be used.
    """
    digest = hashlib.sha256(repr(keys).encode())
    for path in files:
        suffixes = "".join(path.suffixes[-2:])
        try:
            found = f"{sha256_of(path)}{_shown_kind(path, detect(path, format))}"
        except (OSError, DataError):  # `documents` raises the error again, or skips the file.
            found = "unreadable"
        digest.update(f"\n{folder_name(path)}/*{suffixes} {found}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _shown_kind(path: Path, kind: FileKind) -> str:
    compression = ".gz" if path.suffix == ".gz" else ""
    suffix = Path(path.name.removesuffix(compression)).suffix
    by_suffix = {".jsonl": "jsonl"} if compression else {".jsonl": "jsonl", ".parquet": "parquet"}
    return "" if kind == (compression, by_suffix.get(suffix, "text")) else f" {kind.compression} {kind.format}"


def folder_name(path: Path) -> str:
    """Return the name of the file's folder: the domain of documents that have no domain column."""
    return os.fsencode(path.parent.name).decode(errors="backslashreplace") or "root"
