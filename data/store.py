"""Tokens on disk: written once, opened by every process of a run, memory-mapped, verified.

Legend: T tokens of a slice of the stream.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.build import FORMAT, TOKENIZER_FILE, build_store, fsync, manifest_sha256, sha256
from data.config import DataConfig
from data.corpus import open_corpus
from data.errors import DataError
from data.packing import Row, pack_row
from data.tokenizer import Tokenizer, as_it_is


def prepare(config: DataConfig, *, verify: bool = True, report: Callable[[str], None] | None = None) -> "Store":
    """Open the store of `config`, or build it first: in one process, while others that call this wait.

    Args:
        verify: read all files and compare their checksums; else only their sizes.
        report: is told what is being done, when there is something to do.

    Raises:
        DataError: text that cannot be read or used, a cache that cannot be written, a damaged store.
    """
    from filelock import FileLock

    corpus = open_corpus(config)
    key = store_key(config, corpus.fingerprint())
    cache = Path(config.cache)
    directory = cache / f"{config.kind}-{key[:16]}"
    if not directory.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f".{directory.name}.lock"):
                if not directory.exists():
                    temporary = cache / f".{directory.name}.tmp"  # debris of a builder that was killed may lie there
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir()
                    try:
                        build_store(corpus, config, temporary, key, report or (lambda line: None))
                        os.rename(temporary, directory)
                        fsync(cache)
                    finally:
                        shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            reason = f"{error.strerror or error}"
            raise DataError(
                f"data.cache={config.cache}: expected a directory that can be written ({reason})"
            ) from error
    return Store(directory, verify=verify)


def store_key(config: DataConfig, fingerprint: str) -> str:
    """SHA-256 over all that decides the tokens: a store found under it is the store that would be built."""
    if config.tokenizer is None:
        tokenizer = f"train {config.vocab_size}"
    else:
        tokenizer = hashlib.sha256(as_it_is(config.tokenizer)).hexdigest()
    parts = (FORMAT, fingerprint, tokenizer, config.heldout_fraction, config.heldout_max_bytes)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class Store:
    """A tokenized corpus in two splits, and the tokenizer that made it.

    Raises:
        DataError: a file that is missing, cut, or (with `verify`) not the one that was written.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.manifest: dict[str, Any] = self._read_manifest()
        for name, written in self.manifest["files"].items():
            path = self.directory / name
            if not path.is_file():
                raise self._damaged(path, "a file", "none")
            if path.stat().st_size != written["bytes"]:
                raise self._damaged(path, f"{written['bytes']} bytes", str(path.stat().st_size))
            if verify and (found := sha256(path)) != written["sha256"]:
                raise self._damaged(path, f"sha256 {written['sha256']}", found)
        self.domains: tuple[str, ...] = tuple(self.manifest["domains"])
        self.tokenizer = Tokenizer(self.directory / TOKENIZER_FILE)
        self.train = TokenSplit(self.directory, self.manifest, "train")
        self.heldout = TokenSplit(self.directory, self.manifest, "heldout", keep_last_row=True)
        if verify:
            self.train.check_vocab(self.tokenizer.vocab_size)
            self.heldout.check_vocab(self.tokenizer.vocab_size)

    def _read_manifest(self) -> dict[str, Any]:
        path = self.directory / "manifest.json"
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found = manifest_sha256(manifest)
        except OSError as error:
            raise self._damaged(path, "a file that can be read", error.strerror or "none") from error
        except (ValueError, AttributeError) as error:
            raise self._damaged(path, "a JSON object", "something else") from error
        if found != manifest.get("sha256"):
            raise self._damaged(path, f"sha256 {manifest.get('sha256')}", found)
        if manifest["format"] != FORMAT:
            raise self._damaged(path, f"format {FORMAT}", str(manifest["format"]))
        return manifest

    def _damaged(self, path: Path, expected: str, found: str) -> DataError:
        return DataError(f"{path}: expected {expected}, found {found}; delete {self.directory} to build it again")

    def summary(self) -> list[dict[str, Any]]:
        """One row a domain: documents, bytes and tokens of both splits, a hash of the text, the held-out baselines."""
        rows = []
        for domain in self.domains:
            train, heldout = (self.manifest["splits"][name]["domains"][domain] for name in ("train", "heldout"))
            counts = {name: train[name] + heldout[name] for name in ("documents", "bytes", "tokens")}
            both = hashlib.sha256((train["sha256"] + heldout["sha256"]).encode()).hexdigest()
            rows.append(
                {"domain": domain}
                | counts
                | {"sha256": both[:12], "heldout_bytes": heldout["bytes"]}
                | {name: heldout[name] for name in ("gzip_bits_per_byte", "unigram_bits_per_byte")}
            )
        return rows


class TokenSplit:
    """The documents of one split as one stream of tokens, <s> document </s> <s> ..., that rows are cut from.

    Row i of length S has the tokens i*S ... i*S + S: S inputs and, one further, S labels. `keep_last_row`: what is
    left at the end becomes a padded row (held-out: every token is a label once, <s> aside); else it is dropped.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], name: str, *, keep_last_row: bool = False) -> None:
        entry = manifest["splits"][name]
        self.name = name
        self.key: str = manifest["key"]
        self.num_tokens: int = entry["tokens"]
        self.keep_last_row = keep_last_row
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shards = [np.memmap(directory / shard, dtype=dtype, mode="r") for shard in entry["shards"]]
        self._shard_starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self._starts = np.load(directory / f"{name}-starts.npy", mmap_mode="r", allow_pickle=False)
        self._domain_ids = np.load(directory / f"{name}-domains.npy", mmap_mode="r", allow_pickle=False)

    def check_vocab(self, vocab_size: int) -> None:
        """Raises: DataError: a token id outside of the vocabulary of `vocab_size`."""
        for shard in self._shards:
            highest = max((int(shard[i : i + 2**24].max()) for i in range(0, len(shard), 2**24)), default=0)
            if highest >= vocab_size:
                file = shard.filename
                raise DataError(f"{file}: expected token ids below vocab_size {vocab_size}, found {highest}")

    def num_rows(self, seq_len: int) -> int:
        """Rows of S = `seq_len`; the last token of the stream can only be a label."""
        pairs = max(self.num_tokens - 1, 0)
        return -(-pairs // seq_len) if self.keep_last_row else pairs // seq_len

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` ... `stop` - 1 of the stream, [T]."""
        first = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = start - int(self._shard_starts[first])
            parts.append(self._shards[first][offset : offset + stop - start])
            start += len(parts[-1])
            first += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def row(self, i: int, seq_len: int, cross_documents: bool = False) -> Row:
        """Row `i`, 0 <= i < `num_rows(seq_len)`; `cross_documents`: see `pack_row`."""
        start = i * seq_len
        tokens_T = self.tokens(start, min(start + seq_len + 1, self.num_tokens))
        first, last = np.searchsorted(self._starts, [start, start + len(tokens_T) - 1], side="right")
        starts = self._starts[first:last] - start
        return pack_row(tokens_T, starts, self._domain_ids[first - 1 : last], seq_len, cross_documents)
