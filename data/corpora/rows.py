"""Rows of a table (JSON lines, parquet, a Hugging Face dataset) as documents."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import DataError
from common.text import first_line
from data.corpora.document import Document


class Columns(NamedTuple):
    """The columns of a table that make a document."""

    text: str
    domain: str | None
    """None: every row has `default_domain`."""
    default_domain: str


def documents_of(rows: Iterable[Mapping[str, Any]], columns: Columns, source: str) -> Iterator[Document]:
    """Yield one document per row.

    Args:
        source: the name of the table in messages.

    Raises:
        DataError: a row does not have these columns, or its text is not a string.
    """
    for number, row in enumerate(rows, start=1):
        text = row.get(columns.text)
        if not isinstance(text, str):
            found = f"found {type(text).__name__}" if columns.text in row else f"columns are {', '.join(row) or 'none'}"
            raise DataError(
                f"data.text_key={columns.text}: expected a column of strings in {source}, row {number} ({found})"
            )
        if columns.domain is None:
            yield Document(text, columns.default_domain)
        elif row.get(columns.domain) in (None, ""):
            raise DataError(f"data.domain_key={columns.domain}: expected a value in {source}, row {number}, found none")
        else:
            yield Document(text, str(row[columns.domain]))


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file without loading it as a whole.

    Raises:
        DataError: the file is not a parquet file, or is damaged.
    """
    return streamed_rows(f"data.paths={path}: expected a parquet file", "parquet", data_files=str(path), split="train")


def streamed_rows(message: str, *args: str | None, **kwargs: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of `datasets.load_dataset(*args, **kwargs, streaming=True)`.

    Raises:
        DataError: the dataset cannot be read; `message`, followed by the first line of the library's error.
    """
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    try:
        # An error in the code that consumes these rows is not raised inside this generator, and so not caught here.
        yield from datasets.load_dataset(*args, **kwargs, streaming=True)
    except Exception as error:  # The library's readers and transports raise many types of errors.
        raise DataError(f"{message} ({first_line(error)})") from error
