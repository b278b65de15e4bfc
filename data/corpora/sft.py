"""Conversations in JSON lines as a corpus, for supervised fine-tuning."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from data.corpora.chat import TEMPLATE, conversation_text
from data.corpora.document import Document
from data.corpora.files import fingerprint_of, folder_name, is_jsonl, json_lines, matching_files, open_text
from data.corpora.messages import read_conversation


class SftCorpus:
    """Conversations, one per line, as `data.corpora.messages.read_conversation` reads them.

    Args:
        paths: files or globs, `.jsonl` or `.jsonl.gz`.
        messages_key: the key of a line's messages.
        domain_key: the key of a line's domain. None: the domain is the name of the file's folder.
        max_documents: the maximum number of conversations to read.
        ignore_keys: keys of lines and messages to ignore.

    Raises:
        DataError: a file does not exist, is empty, or has another suffix.
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        messages_key: str,
        domain_key: str | None,
        max_documents: int | None,
        ignore_keys: tuple[str, ...],
    ) -> None:
        self.files = matching_files(paths)
        for path in self.files:
            if not is_jsonl(path):
                raise DataError(f"data.paths={path}: expected a file of conversations, .jsonl or .jsonl.gz")
        self.messages_key = messages_key
        self.domain_key = domain_key
        self.max_documents = max_documents
        self.ignore_keys = ignore_keys

    def fingerprint(self) -> str:
        """Return the SHA-256 of the files, of the keys that choose what is read, and of the chat template's version."""
        keys = (self.messages_key, self.domain_key, self.max_documents, self.ignore_keys)
        return fingerprint_of(self.files, ("sft", TEMPLATE, *keys))

    def documents(self) -> Iterator[Document]:
        """Yield one document per line that is not blank. No invalid line is skipped.

        Raises:
            DataError: a line is not a conversation, or a file cannot be read. The message names the file and the line.
        """
        conversations = itertools.chain.from_iterable(map(self._conversations, self.files))
        return itertools.islice(conversations, self.max_documents)

    def _conversations(self, path: Path) -> Iterator[Document]:
        with open_text(path) as file:
            for number, line in json_lines(file, path):
                where = f"data.paths={path}: line {number}"
                domain = folder_name(path) if self.domain_key is None else line.pop(self.domain_key, None)
                try:
                    messages = tuple(read_conversation(line, self.messages_key, self.ignore_keys))
                except DataError as error:
                    raise DataError(f"{where}: {error}") from error
                if domain in (None, ""):
                    raise DataError(f"{where}: expected a value of data.domain_key={self.domain_key}, found none")
                yield Document(conversation_text(messages), str(domain), messages)
