"""A Hugging Face dataset as a corpus, streamed."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.files import sha256_of
from data.corpora.document import Document, Fault
from data.corpora.rows import Columns, checked_documents, document_of, documents_of, streamed_rows


@dataclass
class HubCorpus:
    """The rows of one split of a dataset."""

    path: str
    """The name of a dataset on the hub, or a local directory with the same structure."""
    name: str | None
    """The dataset's configuration, if it has several."""
    split: str
    revision: str | None
    """A commit or tag."""
    text_key: str
    """The column of the text."""
    domain_key: str | None
    """The column of the domain. None: the dataset is one domain, named by the last part of `path`."""
    max_documents: int | None
    """The maximum number of documents to read."""
    on_error: str = "fail"
    """`fail`, or `skip` to leave out rows that are not documents."""

    def fingerprint(self) -> str:
        """Return the SHA-256 of the fields, and of the files of a local directory.

        The content of a dataset on the hub is not part of it: if the dataset changes and `revision` does not, the
        cached tokens are used.
        """
        # The names of the fields are part of the fingerprint: with another name, cached tokens would not be found.
        fields = {name: value for name, value in vars(self).items() if (name, value) != ("on_error", "fail")}
        digest = hashlib.sha256(repr(sorted(fields.items())).encode())
        for file in sorted(path for path in Path(self.path).rglob("*") if path.is_file()):
            digest.update(f"{file}\n{sha256_of(file)}".encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document | Fault]:
        """Yield one document per row, and with `on_error=skip` the rows that are not documents.

        Raises:
            DataError: the dataset cannot be read, or does not have these columns.
        """
        rows = streamed_rows(
            f"data.hub_path={self.path}: expected a dataset that can be read"
            f" with data.hub_name={self.name or 'null'} data.hub_split={self.split}",
            self.path,
            self.name,
            split=self.split,
            revision=self.revision,
        )
        items = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        columns = Columns(self.text_key, self.domain_key, Path(self.path).name)
        documents = documents_of(self.path, items, partial(document_of, columns=columns))
        return checked_documents([documents], "data.hub_path", self.on_error, self.max_documents)
