"""Token stores: built once per configuration, then verified and memory-mapped by every process of a run."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import fsync, read_file, sha256_of
from common.text import MAX_JSON, parse_json
from data.config import DataConfig
from data.corpora.corpus import open_corpus
from data.corpora.document import Fault
from data.tokens.build import FORMAT, build_store, manifest_sha256
from data.tokens.files import SENTENCEPIECE, find_tokenizer, given_tokenizer
from data.tokens.split import TokenSplit


def prepare(config: DataConfig, *, verify: bool = True, report: Callable[[str], None] | None = None) -> "Store":
    """Open the token store of `config`, and build it first if it does not exist.

    If several processes call this at the same time, one of them builds the store while the others wait.

    Args:
        verify: read all files and compare their checksums. Otherwise only the sizes are compared.
        report: called with a line at the start of each stage of building.

    Raises:
        DataError: text cannot be read or used, the cache cannot be written, or the store is damaged.
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
                    temporary = cache / f".{directory.name}.tmp"  # A process that was killed can have left it behind.
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir()
                    try:
                        build_store(corpus, config, temporary, key, report or (lambda line: None))
                        os.rename(temporary, directory)
                        fsync(cache)
                    finally:
                        shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise DataError(
                f"data.cache={config.cache}: expected a directory that can be written ({error.strerror or error})"
            ) from error
    return Store(directory, verify=verify)


def store_key(config: DataConfig, fingerprint: str) -> str:
    """Return the SHA-256 of everything that the files of a store depend on.

    Args:
        fingerprint: the corpus's fingerprint.

    Raises:
        DataError: `config.tokenizer` is no tokenizer.
    """
    given = config.tokenizer
    tokenizer = f"train {config.vocab_size}" if given is None else given_tokenizer(given).sha256()
    parts = (FORMAT, fingerprint, tokenizer, config.heldout_fraction, config.heldout_max_bytes)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class Store:
    """An opened token store: the two splits of a corpus, and the tokenizer.

    Args:
        directory: the directory of the store.
        verify: read all files and compare their checksums. Otherwise only the sizes are compared.

    Attributes:
        domains: the names of the domains; `Batch.domains_BS` contains indices into them.
        train: the rows to train on.
        heldout: the rows that are never trained on.
        tokenizer: the tokenizer of the tokens.
        tokenizer_files: its files, in the directory of the store.

    Raises:
        DataError: a file is missing or has another size or, with `verify`, another content than when it was written.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.manifest: dict[str, Any] = self._read_manifest()
        for name, entry in self.manifest["files"].items():
            path = self.directory / name
            if not path.is_file():
                raise self._damaged(path, "a file", "none")
            if path.stat().st_size != entry["bytes"]:
                raise self._damaged(path, f"{entry['bytes']} bytes", str(path.stat().st_size))
            if verify and (found := sha256_of(path)) != entry["sha256"]:
                raise self._damaged(path, f"sha256 {entry['sha256']}", found)
        self.domains: tuple[str, ...] = tuple(self.manifest["domains"])
        files = find_tokenizer(self.directory)
        if files is None:
            raise self._damaged(self.directory / SENTENCEPIECE, "a file", "none")
        self.tokenizer_files, self.tokenizer = files, files.open()
        self.train = TokenSplit(self.directory, self.manifest, "train")
        self.heldout = TokenSplit(self.directory, self.manifest, "heldout", keep_last_row=True)
        if verify:
            self.train.check_vocab(self.tokenizer.vocab_size)
            self.heldout.check_vocab(self.tokenizer.vocab_size)

    def _read_manifest(self) -> dict[str, Any]:
        path = self.directory / "manifest.json"
        try:
            manifest: dict[str, Any] = parse_json(read_file(path, MAX_JSON))
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

    def skipped(self, shown: int = 10) -> list[str]:
        """Return lines about the places that `data.on_error=skip` left out: their number, and the first `shown`."""
        skipped = self.manifest.get("skipped")
        if skipped is None:
            return []
        total, listed = skipped["total"], [str(Fault(**fault)) for fault in skipped["listed"]]
        more = [f"and {total - shown} more; manifest.json lists the first {len(listed)}"] if total > shown else []
        return [
            f"data.on_error=skip left out {total} place{'s' * (total > 1)}:",
            *(f"  {line}" for line in [*listed[:shown], *more]),
        ]

    def summary(self) -> list[dict[str, Any]]:
        """Return one row per domain: documents, bytes and tokens of both splits, a hash of the text, the baselines.

        `heldout_bytes` and the baselines cover the evaluated text: for conversations, the answers only.
        """
        rows = []
        for domain in self.domains:
            train, heldout = (self.manifest["splits"][name]["domains"][domain] for name in ("train", "heldout"))
            counts = {name: train[name] + heldout[name] for name in ("documents", "bytes", "tokens")}
            both = hashlib.sha256((train["sha256"] + heldout["sha256"]).encode()).hexdigest()
            rows.append(
                {"domain": domain}
                | counts
                | {"sha256": both[:12], "heldout_bytes": heldout.get("label_bytes", heldout["bytes"])}
                | {name: heldout[name] for name in ("gzip_bits_per_byte", "unigram_bits_per_byte")}
            )
        return rows
