"""Documents, and the protocol that every corpus implements."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Document(NamedTuple):
    """A text and the domain that its tokens are counted under."""

    text: str
    domain: str
    turns: tuple[int, ...] = ()
    """For a conversation: the lengths in characters of its segments (`data.corpora.chat`), which together are `text`.
    Segments that the model only reads and segments that it learns to produce alternate, and the first is only read.
    `()`: a plain text, of which every token is a label."""


class Corpus(Protocol):
    """A source of documents."""

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes when any document may have changed: the key of the cached tokens.

        It must cover the corpus's configuration keys too. It should be fast compared to reading the documents, because
        every start of a run computes it.
        """

    def documents(self) -> Iterator[Document]:
        """Yield all documents, in the same order on each call.

        Raises:
            DataError: text that cannot be read.
        """
