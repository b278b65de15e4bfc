"""Documents, what is wrong in a source of documents, and the protocol that every corpus implements."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from data.corpora.messages import Message


class Document(NamedTuple):
    """A text and the domain that its tokens are counted under."""

    text: str
    """For a conversation, `data.corpora.chat.conversation_text` of its messages. The choice of the held-out documents
    and the training of a tokenizer use it."""
    domain: str
    messages: tuple[Message, ...] = ()
    """The messages of a conversation. `()`: a plain text, of which every token is a label."""


class Fault(NamedTuple):
    """A place in a source that is not a document. With `data.on_error=skip`, a corpus yields it and goes on."""

    source: str
    """The file, or the name of the dataset."""
    place: str
    """Such as `line 3`. Empty: the whole source, or what is left of it."""
    reason: str
    """What was expected and what was found."""

    def __str__(self) -> str:
        return ": ".join(filter(None, self))


class Corpus(Protocol):
    """A source of documents."""

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes when any document may have changed: the key of the cached tokens.

        It must cover the corpus's configuration keys too. It should be fast compared to reading the documents, because
        every start of a run computes it.
        """

    def documents(self) -> Iterator[Document | Fault]:
        """Yield all documents, in the same order on each call, and the places that were skipped.

        Raises:
            DataError: text that cannot be read.
        """
