"""Rows of a table (JSON lines, parquet, the hub) as documents."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import DataError
from common.text import first_line
from data.corpora.document import Document


class Columns(NamedTuple):
    text: str
    domain: str | None
    """`None`: every row is of `default_domain`."""
    default_domain: str


def documents_of(rows: Iterable[Mapping[str, Any]], columns: Columns, source: str) -> Iterator[Document]:
    """One document a row. `source` names the table in errors.

    Raises:
        DataError: a row without these columns, or with text that is no string.
    """
    for number, row in enumerate(rows, start=1):
        text = row.get(columns.text)
        if not isinstance(text, str):
            found = f"found {type(text).__name__}" if columns.text in row else f"columns are {', '.join(row) or 'none'}"
            complaint = f"expected a column of strings in {source}, row {number} ({found})"
            raise DataError(f"data.text_key={columns.text}: {complaint}")
        if columns.domain is None:
            yield Document(text, columns.default_domain)
        elif row.get(columns.domain) in (None, ""):
            raise DataError(f"data.domain_key={columns.domain}: expected a value in {source}, row {number}, found none")
        else:
            yield Document(text, str(row[columns.domain]))


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, streamed.

    Raises:
        DataError: not a parquet file, or a damaged one.
    """
    return streamed_rows(f"data.paths={path}: expected a parquet file", "parquet", data_files=str(path), split="train")


def streamed_rows(complaint: str, *what: str | None, **how: Any) -> Iterator[dict[str, Any]]:
    """Rows of `datasets.load_dataset(*what, **how, streaming=True)`.

    Raises:
        DataError: `complaint` and the first line of whatever went wrong there.
    """
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    try:
        # The consumer's own errors do not pass through here: it does not throw into this generator.
        yield from datasets.load_dataset(*what, **how, streaming=True)
    except Exception as error:  # the library raises what its many readers and transports raise
        raise DataError(f"{complaint} ({first_line(error)})") from error
