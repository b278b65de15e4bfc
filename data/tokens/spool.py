"""A corpus in a temporary local file, so that a source that can be slow (a network) is read only once."""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.text import parse_json, printable, shorten, show_value, to_json
from data.config import DataConfig
from data.corpora.corpus import CORPORA
from data.corpora.document import Corpus, Fault
from data.corpora.messages import Message
from data.tokens.heldout import HeldoutChoice

HEADER = struct.Struct("<32sBQQ")
"""The header of a document in the spool file: SHA-256 of its text, domain id, UTF-8 bytes of the text, bytes of the
messages. The text and the messages as JSON follow. (pickle would need no format, but no code of this project unpickles
a file.)"""
MAX_LISTED = 100
"""The most skipped places that a store's manifest lists."""
MAX_DOMAINS = 255
"""A domain id is stored in one byte."""


class SpooledDocument(NamedTuple):
    """A document in the spool file."""

    digest: bytes
    """SHA-256 of the text."""
    domain_id: int
    """Index into `CorpusSpool.domains`."""
    text: str
    size: int
    """UTF-8 bytes."""
    messages: tuple[Message, ...]
    """As in `Document`."""


class CorpusSpool:
    """Reads `corpus` once, writes it to the file `path`, and chooses the held-out documents.

    Documents that consist of white space are left out.

    Attributes:
        domains: the names of the domains, in the order in which they first appear.
        skipped: the first `MAX_LISTED` places that the corpus skipped.
        num_skipped: how many places the corpus skipped.
        train_bytes: UTF-8 bytes of all training documents.

    Raises:
        DataError: text cannot be read or encoded, there are too many domains, or no document is left for the training
            or for the held-out part.
    """

    def __init__(self, corpus: Corpus, path: Path, config: DataConfig) -> None:
        self.path = path
        self.domains: list[str] = []
        self.skipped: list[Fault] = []
        self.num_skipped = 0
        key = CORPORA[config.kind].source_key
        source = f"data.{key}={show_value(getattr(config, key))}"
        choice = HeldoutChoice(config.heldout_fraction, config.heldout_max_bytes)
        num_documents = 0
        with path.open("wb") as file:
            for number, item in enumerate(corpus.documents(), start=1):
                if isinstance(item, Fault):
                    self.num_skipped += 1
                    self.skipped += [item] if self.num_skipped <= MAX_LISTED else []
                    continue
                text, domain, messages = item
                if not text or text.isspace():
                    continue
                try:
                    content = text.encode()
                except UnicodeEncodeError as error:
                    raise DataError(
                        f"{source}: expected Unicode text, found none in document {number} ({error.reason})"
                    ) from error
                digest = hashlib.sha256(content).digest()
                choice.add_document(digest, domain, len(content))
                messages_json = to_json(messages).encode()
                file.write(HEADER.pack(digest, self._domain_id(domain, config), len(content), len(messages_json)))
                file.write(content + messages_json)
                num_documents += 1
        self._heldout = choice.choose()
        if not num_documents:
            skipped = f" ({self.num_skipped} skipped: {self.skipped[0]})" if self.skipped else ""
            raise DataError(f"{source}: expected text, found none{skipped}")
        if not self._heldout:
            found = f"{num_documents} equal ones" if num_documents > 1 else "1"
            raise DataError(
                f"{source}: expected at least two different documents, one of them to hold out, found {found}"
            )
        self.train_bytes = sum(document.size for document in self.train())
        if not self.train_bytes and config.heldout_fraction < 1:
            raise DataError(
                f"data.heldout_fraction={config.heldout_fraction}: expected a fraction that leaves documents to train "
                f"on, found none left of all {num_documents}"
            )

    def _domain_id(self, domain: str, config: DataConfig) -> int:
        domain = printable(domain)  # A line break would break tables.
        if domain not in self.domains:
            if len(self.domains) == MAX_DOMAINS:
                key = f"data.domain_key={show_value(config.domain_key)}"
                raise DataError(f"{key}: expected at most {MAX_DOMAINS} domains, found another: {shorten(domain, 60)}")
            self.domains.append(domain)
        return self.domains.index(domain)

    def _documents(self) -> Iterator[SpooledDocument]:
        with self.path.open("rb") as file:
            while header := file.read(HEADER.size):
                digest, domain_id, size, messages_size = HEADER.unpack(header)
                text = file.read(size).decode()
                messages = tuple(Message(*fields) for fields in parse_json(file.read(messages_size)))
                yield SpooledDocument(digest, domain_id, text, size, messages)

    def train(self) -> Iterator[SpooledDocument]:
        """Yield the training documents in the order of the corpus."""
        return (document for document in self._documents() if document.digest not in self._heldout)

    def heldout(self) -> Iterator[SpooledDocument]:
        """Yield each held-out document once. A copy would be evaluated twice, and would improve the gzip baseline."""
        seen: set[bytes] = set()
        for document in self._documents():
            if document.digest in self._heldout and document.digest not in seen:
                seen.add(document.digest)
                yield document
