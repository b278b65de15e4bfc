"""A Hugging Face dataset as a corpus, streamed."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from common.files import sha256_of
from data.corpora.document import Document
from data.corpora.rows import Columns, documents_of, streamed_rows


class HubCorpus:
    """`path`: a dataset's name on the hub, or a local directory laid out like one. One domain, or a column of them."""

    def __init__(
        self,
        path: str,
        name: str | None,
        split: str,
        revision: str | None,
        text_key: str,
        domain_key: str | None,
        max_documents: int | None,
    ) -> None:
        self.path = path
        self.name = name
        self.split = split
        self.revision = revision
        self.text_key = text_key
        self.domain_key = domain_key
        self.max_documents = max_documents

    def fingerprint(self) -> str:
        """SHA-256 over what was asked for, and over the contents of a local directory.

        What the hub holds is not looked at: a dataset that changes there under one revision keeps its cached tokens.
        """
        digest = hashlib.sha256(repr(sorted(vars(self).items())).encode())
        for file in sorted(path for path in Path(self.path).rglob("*") if path.is_file()):
            digest.update(f"{file}\n{sha256_of(file)}".encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        rows = streamed_rows(
            f"data.hub_path={self.path}: expected a dataset that can be read"
            f" with data.hub_name={self.name or 'null'} data.hub_split={self.split}",
            self.path,
            self.name,
            split=self.split,
            revision=self.revision,
        )
        columns = Columns(self.text_key, self.domain_key, Path(self.path).name)
        every = documents_of(rows, columns, self.path)
        return itertools.islice(every, self.max_documents)
