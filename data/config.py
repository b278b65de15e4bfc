"""The configuration section `data`: where text comes from and how it becomes tokens. `conf/data` has the same names.

The message of a `ValueError` raised here starts with `<field>=<value>: expected ...`. The code that reads the
configuration puts the section's name before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from common.errors import expect
from common.registry import Registry

FileFormat: TypeAlias = Literal["text", "jsonl", "json", "csv", "tsv", "parquet"]
"""The formats of local files. `json` is an array of objects, one object, or several; `jsonl` has one in each line."""


@dataclass(frozen=True)
class DataConfig:
    """A corpus (`kind` and the keys of that kind), its tokenizer, its held-out part, and the cache of its tokens.

    The built-in kinds share this dataclass. A plugin that adds a kind can register a subclass with further keys
    (`CORPUS_CONFIGS`).
    """

    kind: str
    """`embedded`: text that every Python installation contains; `files`: local files; `hub`: a Hugging Face dataset;
    `sft`: local conversations, in which only the answers are labels; or a kind that a plugin registers."""
    cache: str = ".cache/data"
    """Directory of the token stores."""
    vocab_size: int = 4096
    """Size of the tokenizer that is trained on the corpus; ignored when `tokenizer` is given."""
    tokenizer: str | None = None
    """Path of a sentencepiece `.model`, of a `tokenizer.json` (with the files beside it), or of a directory with all
    files of a tokenizer; `null`: train one on the corpus."""
    cross_documents: bool = False
    """Let attention and positions cross the boundaries of the documents that are packed into a row."""
    heldout_fraction: float = 0.02
    """Fraction of the documents, chosen by their hash, that is never trained on. 1 leaves nothing to train on: only
    `scripts/evaluate.py` uses it."""
    heldout_max_bytes: int = 200_000
    """Maximum bytes of held-out text per domain. Further documents are trained on."""

    code_bytes: int = 6_000_000
    """`embedded`: maximum bytes of the standard library's source code."""
    prose_bytes: int = 2_000_000
    """`embedded`: maximum bytes of the standard library's documentation and docstrings."""
    arithmetic_bytes: int = 2_000_000
    """`embedded`: maximum bytes of generated exercises."""

    paths: tuple[str, ...] = ()
    """`files`, `sft`: files, globs, or folders with all files below them. `.jsonl`, `.json`, `.csv`, `.tsv` and
    `.parquet` contain one document (`sft`: one conversation) per row; every other file is text. Each can be compressed
    (`.gz`, `.zst`, `.bz2`, `.xz`)."""
    format: FileFormat | None = None
    """`files`, `sft`: the format of all files; `null`: that of each file's name, compared with its content."""
    on_error: Literal["fail", "skip"] = "fail"
    """`files`, `hub`, `sft`: what happens where a file or a row cannot be read. `skip` leaves it out, counts it, and
    lists it at the start of the run."""
    text_key: str = "text"
    """`files`, `hub`: column of the text."""
    domain_key: str | None = None
    """`files`, `hub`, `sft`: column of the domain; `null`: the name of the file's folder, or of the dataset."""

    hub_path: str | None = None
    """`hub`: name of a dataset, or a local directory with the same structure."""
    hub_name: str | None = None
    """`hub`: name of the dataset's configuration, if it has several."""
    hub_split: str = "train"
    """`hub`: name of the split."""
    hub_revision: str | None = None
    """`hub`: a commit or tag. Without one, the cached tokens stay those of the revision that was read first."""
    max_documents: int | None = None
    """`files`, `hub`, `sft`: maximum number of documents to read."""
    messages_key: str = "messages"
    """`sft`: the key of a line's messages. With `messages`, lines in the formats of ShareGPT, Alpaca, and prompt and
    completion are recognised too (`data.corpora.messages`)."""
    ignore_keys: tuple[str, ...] = ()
    """`sft`: keys of lines and of their messages to ignore. Other keys that can change the meaning are refused."""

    def __post_init__(self) -> None:
        CORPUS_CONFIGS.check(self.kind)
        expect(bool(self.cache), "cache", repr(self.cache), "a directory")
        expect(self.vocab_size >= 300, "vocab_size", self.vocab_size, "an integer >= 300 (256 bytes and some pieces)")
        expect(0 < self.heldout_fraction <= 1, "heldout_fraction", self.heldout_fraction, "a number above 0, at most 1")
        expect(self.heldout_max_bytes >= 1, "heldout_max_bytes", self.heldout_max_bytes, "an integer >= 1")
        for field in ("code_bytes", "prose_bytes", "arithmetic_bytes"):
            expect(getattr(self, field) >= 0, field, getattr(self, field), "an integer >= 0 (0: leave that domain out)")
        if self.kind == "embedded":
            total = self.code_bytes + self.prose_bytes + self.arithmetic_bytes
            expect(total > 0, "code_bytes", self.code_bytes, "an integer > 0, or prose_bytes or arithmetic_bytes > 0")
        else:
            expect(bool(self.text_key), "text_key", repr(self.text_key), "the name of a column")
        expect(
            self.kind not in ("files", "sft") or bool(self.paths),
            "paths",
            self.paths,
            "at least one file, folder or glob",
        )
        expect(self.kind != "hub" or bool(self.hub_path), "hub_path", self.hub_path, "a dataset's name or directory")
        expect(bool(self.messages_key), "messages_key", repr(self.messages_key), "the name of a key")
        limit = self.max_documents
        expect(limit is None or limit >= 1, "max_documents", limit, "an integer >= 1, or null")

    @classmethod
    def class_for(cls, raw: Mapping[str, Any]) -> "type[DataConfig]":
        """Return the dataclass to build from the plain section `raw`: the one that is registered for its `kind`.

        Raises:
            ConfigError: the kind is unknown. The other keys are not looked at: they can be those of a plugin.
        """
        kind = raw.get("kind")
        return CORPUS_CONFIGS[kind] if isinstance(kind, str) else cls


CORPUS_CONFIGS: Registry[type[DataConfig]] = Registry("data.kind")
"""The configuration dataclass of every kind of corpus; `data.corpora.corpus.CORPORA` has the code that opens it."""
for _kind in ("embedded", "files", "hub", "sft"):
    CORPUS_CONFIGS.add(_kind, DataConfig)
