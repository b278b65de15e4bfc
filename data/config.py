"""Where text comes from and how it becomes tokens, mirrored name for name by `conf/data`.

A `ValueError` raised here starts with `<field>=<value>: expected ...`; the Hydra boundary puts the section before it.
"""

from dataclasses import dataclass
from typing import Literal

from common.checks import expect


@dataclass(frozen=True)
class DataConfig:
    """A corpus (`kind` and the keys of that kind), its tokenizer, its held-out part, and where the tokens are kept."""

    kind: Literal["embedded", "files", "hub", "sft"]
    """`embedded`: text that every Python brings along; `files`: your own; `hub`: a Hugging Face dataset; `sft`: your
    own conversations, of which only the answers are labels."""
    cache: str = ".cache/data"
    """Directory of the token stores."""
    vocab_size: int = 4096
    """Of the tokenizer to train; ignored when `tokenizer` names one."""
    tokenizer: str | None = None
    """Path of a sentencepiece `.model`; `null`: train one on the corpus."""
    cross_documents: bool = False
    """Attention and positions run across the documents packed into a row."""
    heldout_fraction: float = 0.02
    """Share of the documents, chosen by their hash, that is never trained on."""
    heldout_max_bytes: int = 200_000
    """Held-out text kept per domain; what is beyond goes to training."""

    code_bytes: int = 6_000_000
    """`embedded`: source code of the standard library, at most."""
    prose_bytes: int = 2_000_000
    """`embedded`: documentation and docstrings of the standard library, at most."""
    arithmetic_bytes: int = 2_000_000
    """`embedded`: generated exercises."""

    paths: tuple[str, ...] = ()
    """`files`: files or globs. `.jsonl` and `.parquet` (also `.jsonl.gz`) hold one document a row; the rest is text.
    `sft`: `.jsonl` (or `.jsonl.gz`), one conversation a line."""
    text_key: str = "text"
    """`files`, `hub`: column of the text."""
    domain_key: str | None = None
    """`files`, `hub`, `sft`: column of the domain; `null`: the name of the file's folder, or of the dataset."""

    hub_path: str | None = None
    """`hub`: name of a dataset, or a local directory laid out like one."""
    hub_name: str | None = None
    """`hub`: its configuration, where it has several."""
    hub_split: str = "train"
    hub_revision: str | None = None
    """`hub`: a commit or tag; name one, since the cached tokens are those of the revision first seen."""
    max_documents: int | None = None
    """`files`, `hub`, `sft`: stop after so many documents."""
    messages_key: str = "messages"
    """`sft`: the entry of a line that holds the messages (`data.corpora.chat`)."""

    def __post_init__(self) -> None:
        expect(bool(self.cache), "cache", repr(self.cache), "a directory")
        expect(self.vocab_size >= 300, "vocab_size", self.vocab_size, "an integer >= 300 (256 bytes and some pieces)")
        expect(0 < self.heldout_fraction < 1, "heldout_fraction", self.heldout_fraction, "a number between 0 and 1")
        expect(self.heldout_max_bytes >= 1, "heldout_max_bytes", self.heldout_max_bytes, "an integer >= 1")
        for field in ("code_bytes", "prose_bytes", "arithmetic_bytes"):
            expect(getattr(self, field) >= 0, field, getattr(self, field), "an integer >= 0 (0: leave that domain out)")
        if self.kind == "embedded":
            total = self.code_bytes + self.prose_bytes + self.arithmetic_bytes
            expect(total > 0, "code_bytes", self.code_bytes, "at least one of the embedded domains to have bytes")
        else:
            expect(bool(self.text_key), "text_key", repr(self.text_key), "the name of a column")
        expect(self.kind not in ("files", "sft") or bool(self.paths), "paths", self.paths, "at least one file or glob")
        expect(self.kind != "hub" or bool(self.hub_path), "hub_path", self.hub_path, "a dataset's name or directory")
        expect(bool(self.messages_key), "messages_key", repr(self.messages_key), "the name of an entry")
        limit = self.max_documents
        expect(limit is None or limit >= 1, "max_documents", limit, "an integer >= 1, or null")
