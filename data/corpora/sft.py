"""Conversations in the rows of files as a corpus, for supervised fine-tuning."""

from pathlib import Path

from data.config import FileFormat
from data.corpora.chat import TEMPLATE, conversation_text
from data.corpora.document import Document
from data.corpora.files import FileCorpus, folder_name
from data.corpora.formats import Row
from data.corpora.messages import read_conversation
from data.corpora.rows import domain_of


class SftCorpus(FileCorpus):
    """Conversations, one per row, as `data.corpora.messages.read_conversation` reads them.

    Args:
        messages_key: the key of a row's messages.
        domain_key: the key of a row's domain. None: the domain is the name of the file's folder.
        ignore_keys: keys of rows and messages to ignore.
    """

    reads_text = False

    def __init__(
        self,
        paths: tuple[str, ...],
        messages_key: str,
        domain_key: str | None,
        max_documents: int | None,
        ignore_keys: tuple[str, ...],
        format: FileFormat | None = None,
        on_error: str = "fail",
    ) -> None:
        super().__init__(paths, max_documents, format, on_error)
        self.messages_key = messages_key
        self.domain_key = domain_key
        self.ignore_keys = ignore_keys

    def keys(self) -> tuple[object, ...]:
        """Return the keys of a row, the limit, and the version of the chat template."""
        return "sft", TEMPLATE, self.messages_key, self.domain_key, self.max_documents, self.ignore_keys

    def document(self, path: Path, row: Row | str) -> Document:
        """Return the conversation that a row is."""
        assert not isinstance(row, str)
        rest = {key: value for key, value in row.items() if key != self.domain_key}
        messages = tuple(read_conversation(rest, self.messages_key, self.ignore_keys))
        return Document(conversation_text(messages), domain_of(row, self.domain_key, folder_name(path)), messages)
