"""Builds a token store: the spooled text, the tokenizer, the token shards, the manifest.

Legend: T tokens of a document.
"""

import gzip
import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from common.files import fsync, sha256_of
from common.text import show_value, to_json
from data.config import DataConfig
from data.corpora.document import Corpus
from data.tokens.conversation import encode_conversation
from data.tokens.files import SENTENCEPIECE, given_tokenizer
from data.tokens.spool import CorpusSpool, SpooledDocument
from data.tokens.tokenizer import TextTokenizer, Tokenizer, sentences, train_tokenizer

FORMAT = 1
"""Part of the store's key. Raise it when a change gives the same configuration other files."""
SHARD_TOKENS = 2**27
SAMPLE_BYTES = 4_000_000
"""Bytes of text that the tokenizer is trained on, spread evenly over the training documents."""
ANSWERS_SUFFIX = "-answers.npy"
"""`<split>-answers.npy` contains, for each of n answers with its </s>, the start and the end (exclusive) in the split's
token stream: int64 [n, 2]."""


def build_store(corpus: Corpus, config: DataConfig, directory: Path, key: str, report: Callable[[str], None]) -> None:
    """Write the token store of `corpus` into the empty `directory`. On return, all files are on the disk (fsync).

    `report` is called with a line at the start of each stage. `key` is written to the manifest.

    Raises:
        DataError: text cannot be used, or there is too little of it for this configuration.
    """
    given = None if config.tokenizer is None else given_tokenizer(config.tokenizer)
    tokenizer = None if given is None else given.open()
    report("reading the corpus")
    spool = CorpusSpool(corpus, directory / "text.tmp", config)
    if given is None or tokenizer is None:
        report(f"training a tokenizer of {config.vocab_size} tokens")
        (directory / SENTENCEPIECE).write_bytes(train_tokenizer(_sample(spool), config.vocab_size))
        tokenizer = Tokenizer(directory / SENTENCEPIECE)
    else:
        given.copy_to(directory)

    report(f"tokenizing {spool.train_bytes / 1e6:.1f} MB")
    encoder = _Encoder(tokenizer, show_value(config.tokenizer))
    splits = {
        "train": _write_split(directory, "train", encoder, spool.train(), spool.domains),
        "heldout": _write_split(directory, "heldout", encoder, spool.heldout(), spool.domains, keep_text=True),
    }
    spool.path.unlink()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "key": key,
        "dtype": encoder.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "domains": spool.domains,
        "splits": splits,
        "files": {
            path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        },
    }
    if spool.num_skipped:
        manifest["skipped"] = {"total": spool.num_skipped, "listed": [fault._asdict() for fault in spool.skipped]}
    manifest["sha256"] = manifest_sha256(manifest)
    (directory / "manifest.json").write_text(to_json(manifest, indent=1) + "\n", encoding="utf-8")
    for path in [*directory.rglob("*"), directory]:
        fsync(path)


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of `manifest` without its entry `sha256`."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(to_json(rest, sort_keys=True).encode()).hexdigest()


def _sample(spool: CorpusSpool) -> Iterator[str]:
    """Yield parts of the training text, spread evenly over it, of about `SAMPLE_BYTES` in total."""
    seen = taken = 0
    for document in spool.train():
        for piece in sentences(document.text):
            size = len(piece.encode())
            seen += size
            if taken * spool.train_bytes <= seen * SAMPLE_BYTES:
                taken += size
                yield piece


class _Encoder:
    """Encodes documents with <s> and </s>, and checks that the ids represent exactly the bytes of the text.

    Args:
        shown_tokenizer: the value of `data.tokenizer`, for messages.
    """

    def __init__(self, tokenizer: TextTokenizer, shown_tokenizer: str) -> None:
        self.tokenizer = tokenizer
        self.shown_tokenizer = shown_tokenizer
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32).newbyteorder("<")
        self._bytes_V = tokenizer.token_bytes()

    def __call__(self, document: SpooledDocument, round_trip: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids [T], and bool [T], whether each id is a label. In a plain text, all except <s> are labels.

        Args:
            round_trip: check also that decoding the ids gives the text.

        Raises:
            DataError: the ids do not represent the text.
        """
        if document.messages:
            return self._encode_messages(document)
        before = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        text = self.tokenizer.prefix + document.text
        ids = [*before, *self.tokenizer.encode(text, continues=True), self.tokenizer.eos_id]
        ids_T = np.array(ids, dtype=self.dtype)
        same_size = int(self._bytes_V[ids_T].sum()) == document.size + len(self.tokenizer.prefix)
        if not same_size or (round_trip and self.tokenizer.decode(ids) != text):
            kept = "expected a model that keeps text as it is (identity normalization, byte_fallback), found a change"
            raise self._error(document, kept)
        return ids_T, np.arange(len(ids)) >= len(before)

    def _encode_messages(self, document: SpooledDocument) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids, is_label = encode_conversation(document.messages, self.tokenizer)
        except DataError as error:
            raise self._error(document, str(error)) from error
        return np.array(ids, dtype=self.dtype), np.array(is_label)

    def _error(self, document: SpooledDocument, message: str) -> DataError:
        start = document.text[:40].encode("unicode_escape").decode()
        return DataError(
            f"data.tokenizer={self.shown_tokenizer}: {message}, in the document that starts with '{start}'"
        )


def _write_split(
    directory: Path,
    name: str,
    encoder: _Encoder,
    documents: Iterator[SpooledDocument],
    domains: list[str],
    keep_text: bool = False,
) -> dict[str, Any]:
    """Write the shards and the index files of one split, and return its entry in the manifest.

    For conversations, `<name>-answers.npy` says which tokens are labels.

    Args:
        keep_text: compute the baselines of each domain. For conversations, they are baselines of the answers only.
    """
    writer = _ShardWriter(directory, name)
    starts, domain_ids, answers = array("q"), bytearray(), array("q")
    conversations = False
    totals = [_DomainTotals() for _ in domains]
    for document in documents:
        ids_T, is_label_T = encoder(document, round_trip=keep_text)
        if document.messages:
            conversations = True
            answers.extend((_runs(is_label_T) + writer.tokens).flatten().tolist())
        starts.append(writer.tokens)
        domain_ids.append(document.domain_id)
        writer.write(ids_T)
        totals[document.domain_id].add(document, len(ids_T))
        if keep_text:
            labels = encoder.tokenizer.decode(ids_T[is_label_T]) if document.messages else document.text
            totals[document.domain_id].evaluated_text += labels.encode()
    writer.close()
    np.save(directory / f"{name}-starts.npy", np.frombuffer(starts, dtype=np.int64))
    np.save(directory / f"{name}-domains.npy", np.frombuffer(domain_ids, dtype=np.uint8))
    if conversations:
        np.save(directory / f"{name}{ANSWERS_SUFFIX}", np.array(answers, dtype=np.int64).reshape(-1, 2))
    per_domain: dict[str, dict[str, Any]] = {}
    for domain, total in zip(domains, totals, strict=True):
        per_domain[domain] = {**total.counts, "sha256": total.digest.hexdigest()}
        if keep_text:
            text = bytes(total.evaluated_text)
            per_domain[domain] |= ({"label_bytes": len(text)} if conversations else {}) | baselines(text)
    return {"tokens": writer.tokens, "max_token": writer.max_token, "shards": writer.shards, "domains": per_domain}


def _runs(is_label_T: np.ndarray) -> np.ndarray:
    """Return the start and the end (exclusive) of each run of true values, int64 [n, 2]."""
    return np.flatnonzero(np.diff(is_label_T.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)


class _DomainTotals:
    """Adds up the documents of one domain of a split.

    Attributes:
        evaluated_text: the text whose tokens are labels: all of a plain text, the answers of a conversation.
    """

    def __init__(self) -> None:
        self.counts = Counter(documents=0, bytes=0, tokens=0)
        self.digest = hashlib.sha256()
        self.evaluated_text = bytearray()

    def add(self, document: SpooledDocument, num_tokens: int) -> None:
        self.counts.update(documents=1, bytes=document.size, tokens=num_tokens)
        self.digest.update(document.text.encode())


class _ShardWriter:
    """Appends tokens to the files `<name>-00000.bin`, `<name>-00001.bin` and so on, each of `SHARD_TOKENS` tokens.

    The tokens of a document can be in several files.

    Attributes:
        shards: names of the files.
        tokens: number of tokens written.
        max_token: largest token id written.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.shards: list[str] = []
        self.tokens = 0
        self.max_token = 0
        self._next_shard()

    def _next_shard(self) -> None:
        self.shards.append(f"{self.name}-{len(self.shards):05d}.bin")
        self._file = (self.directory / self.shards[-1]).open("wb", buffering=2**20)
        self._room = SHARD_TOKENS

    def write(self, ids_T: np.ndarray) -> None:
        self.tokens += len(ids_T)
        self.max_token = max(self.max_token, int(ids_T.max()))
        while len(ids_T) > self._room:
            self._file.write(ids_T[: self._room].tobytes())
            ids_T = ids_T[self._room :]
            self._file.close()
            self._next_shard()
        self._file.write(ids_T.tobytes())
        self._room -= len(ids_T)

    def close(self) -> None:
        self._file.close()


def baselines(text: bytes) -> dict[str, float | None]:
    """Return the bits per byte of two methods without training: `gzip -9`, and the entropy of the byte histogram.

    Both are None if `text` is empty.
    """
    if not text:
        return {"gzip_bits_per_byte": None, "unigram_bits_per_byte": None}
    shares = [count / len(text) for count in Counter(text).values()]
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "unigram_bits_per_byte": -sum(share * math.log2(share) for share in shares),
    }
