"""What a corpus is: text in documents, each of a domain, and a hash of it all."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Document(NamedTuple):
    text: str
    domain: str
    turns: tuple[int, ...] = ()
    """For a conversation (`data.corpora.chat`): the lengths in characters of the parts that the model reads and of the
    parts that it learns to produce, alternating, from the start of `text` to its end. `()`: plain text, of which every
    token is a label."""


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
