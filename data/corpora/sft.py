"""Conversations in JSON lines as a corpus, for supervised fine-tuning."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from data.corpora.chat import TEMPLATE, render
from data.corpora.document import Document
from data.corpora.files import fingerprint_of, folder, is_jsonl, json_lines, matching_files, open_text


class SftCorpus:
    """One conversation a line: `{"messages": [{"role": "user", "content": "..."}, ...]}`, a document each.

    Args:
        paths: files or globs, `.jsonl` or `.jsonl.gz`.
        messages_key: the entry of a line that holds the messages.
        domain_key: the entry that names the domain; None: the folder that the file lies in.
        max_documents: stop after so many.

    Raises:
        DataError: a file that is not there, is empty, or is of another kind.
    """

    def __init__(
        self, paths: tuple[str, ...], messages_key: str, domain_key: str | None, max_documents: int | None
    ) -> None:
        self.files = matching_files(paths)
        for path in self.files:
            if not is_jsonl(path):
                raise DataError(f"data.paths={path}: expected a file of conversations, .jsonl or .jsonl.gz")
        self.messages_key = messages_key
        self.domain_key = domain_key
        self.max_documents = max_documents

    def fingerprint(self) -> str:
        keys = ("sft", TEMPLATE, self.messages_key, self.domain_key, self.max_documents)
        return fingerprint_of(self.files, keys)

    def documents(self) -> Iterator[Document]:
        """Every line; one that is no conversation ends it all, named by file and line.

        Raises:
            DataError: such a line, or a file that cannot be read.
        """
        every = itertools.chain.from_iterable(map(self._conversations, self.files))
        return itertools.islice(every, self.max_documents)

    def _conversations(self, path: Path) -> Iterator[Document]:
        with open_text(path) as file:
            for number, line in json_lines(file, path):
                where = f"data.paths={path}: line {number}"
                if self.messages_key not in line:
                    entries = ", ".join(line) or "none"
                    raise DataError(f"{where}: expected data.messages_key={self.messages_key} in it, found {entries}")
                try:
                    segments = render(line[self.messages_key])
                except DataError as error:
                    raise DataError(f"{where}: {error}") from error
                domain = folder(path) if self.domain_key is None else line.get(self.domain_key)
                if domain in (None, ""):
                    raise DataError(f"{where}: expected a value of data.domain_key={self.domain_key}, found none")
                turns = tuple(len(segment.text) for segment in segments)
                yield Document("".join(segment.text for segment in segments), str(domain), turns)
