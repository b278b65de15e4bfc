"""A corpus read once, from wherever it comes, into a local file that can be read again and again."""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import DataError
from common.text import show_value
from data.config import DataConfig
from data.corpora.document import Corpus
from data.tokens.heldout import HeldoutChoice

HEADER = struct.Struct("<32sBQQ")
"""Of each document in the file: SHA-256 of its text, domain id, bytes, number of turns; the turns follow, then it."""
TURN = np.dtype("<u8")
MAX_DOMAINS = 255
"""A domain id is one byte."""
SOURCE_KEY = {"embedded": "code_bytes", "files": "paths", "hub": "hub_path", "sft": "paths"}
"""The key to look at when a corpus of that kind has too little text."""


class Ingested(NamedTuple):
    domain: int
    text: str
    size: int
    """UTF-8 bytes."""
    turns: tuple[int, ...]
    """As in `Document`."""


class Ingest:
    """Reads `corpus` into `path` and decides what is held out. Documents of white space alone are left out.

    Raises:
        DataError: text that cannot be read or encoded, too many domains, or a side without a document.
    """

    def __init__(self, corpus: Corpus, path: Path, config: DataConfig) -> None:
        self.path = path
        self.domains: list[str] = []
        key = SOURCE_KEY[config.kind]
        source = f"data.{key}={show_value(getattr(config, key))}"
        choice = HeldoutChoice(config.heldout_fraction, config.heldout_max_bytes)
        found = 0
        with path.open("wb") as file:
            for number, (text, domain, turns) in enumerate(corpus.documents(), start=1):
                if not text or text.isspace():
                    continue
                try:
                    content = text.encode()
                except UnicodeEncodeError as error:
                    raise DataError(f"{source}: expected Unicode text, document {number} has {error.reason}") from error
                digest = hashlib.sha256(content).digest()
                choice.see(digest, domain, len(content))
                file.write(HEADER.pack(digest, self._domain_id(domain, config), len(content), len(turns)))
                file.write(np.array(turns, dtype=TURN).tobytes() + content)
                found += 1
        self._heldout = choice.digests()
        if not found:
            raise DataError(f"{source}: expected text, found none")
        if not self._heldout:
            raise DataError(f"{source}: expected at least two documents in a domain, one to hold out, found {found}")
        self.train_bytes = sum(document.size for document in self.train())
        if not self.train_bytes:
            fraction = f"data.heldout_fraction={config.heldout_fraction}"
            raise DataError(f"{fraction}: expected a share that leaves documents to train on, held out all {found}")

    def _domain_id(self, domain: str, config: DataConfig) -> int:
        if domain not in self.domains:
            if len(self.domains) == MAX_DOMAINS:
                key = f"data.domain_key={config.domain_key or 'null'}"
                raise DataError(f"{key}: expected at most {MAX_DOMAINS} domains, found another: {domain}")
            self.domains.append(domain)
        return self.domains.index(domain)

    def _records(self) -> Iterator[tuple[bytes, Ingested]]:
        with self.path.open("rb") as file:
            while header := file.read(HEADER.size):
                digest, domain, size, num_turns = HEADER.unpack(header)
                turns = tuple(np.frombuffer(file.read(num_turns * TURN.itemsize), dtype=TURN).tolist())
                yield digest, Ingested(domain, file.read(size).decode(), size, turns)

    def train(self) -> Iterator[Ingested]:
        return (document for digest, document in self._records() if digest not in self._heldout)

    def heldout(self) -> Iterator[Ingested]:
        """Each held-out document once: a copy would be evaluated twice, and flatter the compressor beside it."""
        seen: set[bytes] = set()
        for digest, document in self._records():
            if digest in self._heldout and digest not in seen:
                seen.add(digest)
                yield document
