"""Documents, and the protocol that every corpus implements."""

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
