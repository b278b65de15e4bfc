"""Text to a store of tokens on disk: ingest, tokenizer, shards, manifest.

Legend: T tokens of a document.
"""

import gzip
import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from common.files import fsync, sha256_of
from data.config import DataConfig
from data.corpora.chat import Segment, cut, encode
from data.corpora.document import Corpus
from data.tokens.ingest import Ingest, Ingested
from data.tokens.tokenizer import Tokenizer, sentences, train_tokenizer, without_normalization

FORMAT = 1
"""Part of the store's key: raised whenever the same configuration would give other files."""
SHARD_TOKENS = 2**27
SAMPLE_BYTES = 4_000_000
"""Text that the tokenizer is trained on, spread evenly over the training documents."""
TOKENIZER_FILE = "tokenizer.model"
ANSWERS = "-answers.npy"
"""Behind a split's name: [n, 2] start and end, in its stream of tokens, of each answer with its </s>."""


def build_store(corpus: Corpus, config: DataConfig, directory: Path, key: str, report: Callable[[str], None]) -> None:
    """Write the store of `corpus` into the empty `directory`; all of it is on the disk (fsync) at the return.

    Raises:
        DataError: text that cannot be used, or too little of it for what `config` asks.
    """
    report("reading the corpus")
    spool = directory / "text.tmp"
    text = Ingest(corpus, spool, config)
    tokenizer_file = directory / TOKENIZER_FILE
    if config.tokenizer is None:
        report(f"training a tokenizer of {config.vocab_size} tokens")
        tokenizer_file.write_bytes(train_tokenizer(_sample(text), config.vocab_size))
    else:
        tokenizer_file.write_bytes(without_normalization(config.tokenizer))
    tokenizer = Tokenizer(tokenizer_file)

    report(f"tokenizing {text.train_bytes / 1e6:.1f} MB")
    named = config.tokenizer or "null"
    encoder = _Encoder(tokenizer, named)
    splits = {
        "train": _write_split(directory, "train", encoder, text.train(), text.domains),
        "heldout": _write_split(directory, "heldout", encoder, text.heldout(), text.domains, keep_text=True),
    }
    spool.unlink()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "key": key,
        "dtype": encoder.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "domains": text.domains,
        "splits": splits,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(directory.iterdir())
        },
    }
    manifest["sha256"] = manifest_sha256(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in [*directory.iterdir(), directory]:
        fsync(path)


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """SHA-256 over all of `manifest` but the entry that holds it."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sample(text: Ingest) -> Iterator[str]:
    seen = taken = 0
    for document in text.train():
        for piece in sentences(document.text):
            size = len(piece.encode())
            seen += size
            if taken * text.train_bytes <= seen * SAMPLE_BYTES:
                taken += size
                yield piece


class _Encoder:
    """Documents to ids with their marks, checked to stand for exactly the bytes of the text."""

    def __init__(self, tokenizer: Tokenizer, named: str) -> None:
        self.tokenizer = tokenizer
        self.named = named
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32).newbyteorder("<")
        self._bytes_V = tokenizer.token_bytes()

    def __call__(self, document: Ingested, round_trip: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids [T], and [T] whether each is a label (all are in a plain text, <s> aside)."""
        segments = cut(document.text, document.turns) if document.turns else [Segment(document.text, supervised=True)]
        ids, supervised = encode(segments, self.tokenizer)
        ids_T = np.array(ids, dtype=self.dtype)
        exact = int(self._bytes_V[ids_T].sum()) == document.size
        if not exact or (round_trip and self.tokenizer.decode(ids) != document.text):
            start = document.text[:40].encode("unicode_escape").decode()
            raise DataError(
                f"data.tokenizer={self.named}: expected a model that keeps text as it is (identity normalization,"
                f" byte_fallback), found a change in the document that starts with '{start}'"
            )
        return ids_T, np.array(supervised)


def _write_split(
    directory: Path,
    name: str,
    encoder: _Encoder,
    documents: Iterator[Ingested],
    domains: list[str],
    keep_text: bool = False,
) -> dict[str, Any]:
    """Write shards and index of one split; its part of the manifest. `keep_text`: with baselines of each domain.

    Of conversations, `<name>-answers.npy` tells which tokens are labels, and baselines are those of the answers alone.
    """
    writer = _ShardWriter(directory, name)
    starts, domain_ids, answers = array("q"), bytearray(), array("q")
    counts: list[Counter[str]] = [Counter() for _ in domains]
    digests = [hashlib.sha256() for _ in domains]
    texts = [bytearray() for _ in domains]
    for document in documents:
        ids_T, supervised_T = encoder(document, round_trip=keep_text)
        if document.turns:
            answers.extend((_runs(supervised_T) + writer.tokens).flatten().tolist())
        starts.append(writer.tokens)
        domain_ids.append(document.domain)
        writer.write(ids_T)
        counts[document.domain].update(documents=1, bytes=document.size, tokens=len(ids_T))
        content = document.text.encode()
        digests[document.domain].update(content)
        if keep_text:
            texts[document.domain] += _said(document).encode()
    writer.close()
    np.save(directory / f"{name}-starts.npy", np.frombuffer(starts, dtype=np.int64))
    np.save(directory / f"{name}-domains.npy", np.frombuffer(domain_ids, dtype=np.uint8))
    if answers:
        np.save(directory / f"{name}{ANSWERS}", np.frombuffer(answers, dtype=np.int64).reshape(-1, 2))
    per_domain: dict[str, dict[str, Any]] = {}
    for domain, count, digest, text in zip(domains, counts, digests, texts, strict=True):
        per_domain[domain] = {key: count[key] for key in ("documents", "bytes", "tokens")}
        per_domain[domain] |= {"sha256": digest.hexdigest()}
        if keep_text:
            per_domain[domain] |= ({"label_bytes": len(text)} if answers else {}) | baselines(bytes(text))
    return {"tokens": writer.tokens, "max_token": writer.max_token, "shards": writer.shards, "domains": per_domain}


def _runs(supervised_T: np.ndarray) -> np.ndarray:
    """[n, 2]: start and end (exclusive) of each run of true values."""
    edges = np.flatnonzero(np.diff(supervised_T.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2)


def _said(document: Ingested) -> str:
    """The text that is evaluated: all of a plain one, the answers of a conversation."""
    if not document.turns:
        return document.text
    return "".join(segment.text for segment in cut(document.text, document.turns) if segment.supervised)


class _ShardWriter:
    """Appends tokens to `<name>-00000.bin` and on, each of `SHARD_TOKENS`; a document may span two."""

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
    """Bits per byte that need no training: `gzip -9`, and the entropy of the byte histogram. `None` without text."""
    if not text:
        return {"gzip_bits_per_byte": None, "unigram_bits_per_byte": None}
    shares = [count / len(text) for count in Counter(text).values()]
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "unigram_bits_per_byte": -sum(share * math.log2(share) for share in shares),
    }
