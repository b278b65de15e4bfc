"""Rows of a table as documents, and what happens where a row is no document."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from common.errors import DataError, require
from common.text import first_line, printable, shorten
from data.corpora.document import Document, Fault

MAX_FAULTS = 100
"""Sources with a fault after which a corpus stops looking for further ones."""
SHOWN_FAULTS = 5
"""The most faults that one message lists."""
MAX_REASON = 300
"""The most characters of a fault's reason, which can contain names from a file."""
Value = TypeVar("Value")


class Columns(NamedTuple):
    """The columns of a table that make a document."""

    text: str
    domain: str | None
    """None: every row has `default_domain`."""
    default_domain: str


def document_of(row: Mapping[str, Any], columns: Columns) -> Document:
    """Return the document that a row of a table is.

    Raises:
        DataError: the row does not have these columns, or its text is not a string. The message does not name the row.
    """
    text = row.get(columns.text)
    if not isinstance(text, str):
        found = type(text).__name__ if columns.text in row else f"the columns {', '.join(map(str, row)) or 'none'}"
        raise DataError(f"expected a string in data.text_key={columns.text}, found {shorten(found, 120)}")
    return Document(text, domain_of(row, columns.domain, columns.default_domain))


def domain_of(row: Mapping[str, Any], key: str | None, default: str) -> str:
    """Return the domain of a row: its value of `key`, or `default` if `key` is None.

    Raises:
        DataError: the row has no such value. The message does not name the row.
    """
    if key is None:
        return default
    value = row.get(key)
    require(value not in (None, ""), DataError, f"expected a value of data.domain_key={key}, found none")
    return str(value)


def documents_of(
    source: str, items: Iterable[tuple[str, Value | DataError]], document: Callable[[Value], Document]
) -> Iterator[Document | Fault]:
    """Yield one document or one fault per item.

    Args:
        source: the name of the file or dataset, for faults.
        items: the place and the value of each row, or what is wrong there.
        document: returns the document that a value is, or raises DataError.
    """
    for place, value in items:
        try:
            if isinstance(value, DataError):
                raise value
            found = document(value)
            found.text.encode(), found.domain.encode()
        except DataError as error:
            yield Fault(source, place, shorten(printable(str(error)), MAX_REASON))
        except UnicodeEncodeError as error:
            yield Fault(source, place, f"expected Unicode text, found a character that is none ({error.reason})")
        else:
            yield found


def checked_documents(
    sources: Iterable[Iterable[Document | Fault]], key: str, on_error: str, max_documents: int | None
) -> Iterator[Document | Fault]:
    """Yield the documents of all sources, and apply `data.on_error`.

    With `skip`, faults are yielded like documents. With `fail`, the first fault of each source is collected, and all
    are raised in one error at the end, so that the user learns of several bad files at once.

    Args:
        sources: the documents of each file or dataset.
        key: the configuration key that names the sources.
        max_documents: the number of documents after which reading stops.

    Raises:
        DataError: there are faults, and `on_error` is `fail`.
    """
    faults: list[Fault] = []
    count = 0
    for items in sources:
        for item in items:
            if isinstance(item, Document):
                count += 1
                if not faults:
                    yield item
                if count == max_documents:
                    break
            elif on_error == "skip":
                yield item
            else:
                faults.append(item)
                break
        if count == max_documents or len(faults) == MAX_FAULTS:
            break
    if faults:
        raise fault_error(key, faults)


def fault_error(key: str, faults: list[Fault]) -> DataError:
    """Return one error about all `faults`, of which the first few are listed. The message starts with `key`."""
    if len(faults) == 1:
        return DataError(f"{key}={faults[0]}")
    listed = "; ".join(map(str, faults[:SHOWN_FAULTS]))
    rest = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
    return DataError(f"{key}=[...]: found {len(faults)} files that cannot be used: {listed}{rest}")


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
