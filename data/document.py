"""What a corpus is: text in documents, each of a domain, and a hash of it all."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Document(NamedTuple):
    text: str
    domain: str
    turns: tuple[int, ...] = ()
    """Of a conversation (`data.chat`): characters that are read and characters that are said, in turn, from the start
    of `text` to its end. `()`: plain text, of which every token is a label."""


class Corpus(Protocol):
    def fingerprint(self) -> str:
        """A SHA-256 that changes when any document may have changed; cheap beside reading the documents."""
        ...

    def documents(self) -> Iterator[Document]:
        """All documents, in the same order each time.

        Raises:
            DataError: text that cannot be read.
        """
        ...
