"""The files that make up a tokenizer: finding them in a directory, copying them, and opening the tokenizer.

A tokenizer travels as all its files. `tokenizer.model` or `tokenizer.json` has the vocabulary; the others say which
tokens begin and end a text, which tokens were added, and how a conversation is written (`data.tokens.marks`).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError, require
from common.files import read_file, write_atomically
from common.text import MAX_JSON, parse_json_object, to_json
from data.tokens import marks as companions
from data.tokens.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokens.marks import Marks
from data.tokens.tokenizer import MAX_TOKENIZER, TextTokenizer, Tokenizer

SENTENCEPIECE = "tokenizer.model"
HUGGING_FACE = "tokenizer.json"
TEKKEN = "tekken.json"
COMPANIONS = (
    companions.CONFIG,
    companions.SPECIAL,
    companions.ADDED,
    companions.TEMPLATE,
    companions.TEMPLATE_JSON,
    companions.GENERATION,
    "additional_chat_templates/*.jinja",
)
"""Files beside the vocabulary, as globs."""
UNREADABLE = (TEKKEN, "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken")
"""Vocabularies that Mixwright cannot read. A `tekken.json` is copied where another vocabulary is beside it."""
MODEL_CONFIG = "config.json"
"""A Hugging Face model without `generation_config.json` has its ids here."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of one tokenizer. It has a sentencepiece model, a `tokenizer.json`, or both."""

    directory: Path
    models: tuple[str, ...]
    """Names of the sentencepiece models, which have the same content."""
    has_json: bool
    """Whether there is a `tokenizer.json`."""
    others: tuple[str, ...]
    """Names of the other files. The parts of a name are separated by `/`."""
    shown: str
    """How messages name the tokenizer, e.g. `data.tokenizer=DIR`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all files."""
        return (*self.models, *([HUGGING_FACE] if self.has_json else []), *self.others)

    def content(self, name: str) -> bytes:
        """Return the content of a file, or b"" if there is none.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            path = self.directory / name
            if name == companions.GENERATION and not path.exists():
                return _ids_of_model(self.directory / MODEL_CONFIG)
            return read_file(path, MAX_TOKENIZER) if name in self.names else b""
        except OSError as error:
            kind = "file" if name not in self.models else "sentencepiece model"
            raise DataError(f"{self._where(name)}: expected a {kind} that can be read ({error.strerror})") from error

    def _where(self, name: str) -> str:
        """Return how messages name the file `name`."""
        return self.shown if self.shown.endswith(f"/{name}") else f"{self.shown}: {name}"

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name that each file has in a directory that it is copied to, and its content."""
        for name in dict.fromkeys((*self.names, companions.GENERATION)):
            if content := self.content(name):
                yield SENTENCEPIECE if name in self.models and not name.startswith(SENTENCEPIECE) else name, content

    def copy_to(self, directory: Path) -> None:
        """Copy all files into `directory`, each in one step."""
        for name, content in self.contents():
            (directory / name).parent.mkdir(exist_ok=True)
            write_atomically(directory / name, content)

    def sha256(self) -> str:
        """Return a SHA-256 of all files. That of a sentencepiece model alone is the file's."""
        contents = dict(self.contents())
        if contents.keys() == {SENTENCEPIECE}:
            return hashlib.sha256(contents[SENTENCEPIECE]).hexdigest()
        digests = [(name, hashlib.sha256(content).hexdigest()) for name, content in sorted(contents.items())]
        return hashlib.sha256(repr(digests).encode()).hexdigest()

    def open(self) -> TextTokenizer:
        """Open the tokenizer. If there are both kinds, the `tokenizer.json` counts, and the other is compared with it.

        Raises:
            DataError: a file is damaged, the files contradict each other, or the tokenizer does not keep text as it is.
        """
        marks = Marks.read(self.content, self.shown)
        path = self.directory / self.models[0] if self.models else None
        if not self.has_json:
            assert path is not None
            return Tokenizer(path, marks, self._where(path.name))
        tokenizer = HuggingFaceTokenizer(self.content(HUGGING_FACE), marks, self.shown)
        if path is not None:
            tokenizer.check_same_pieces(path)
        return tokenizer


def find_tokenizer(directory: Path, shown: str | None = None) -> TokenizerFiles | None:
    """Return the files of the tokenizer in `directory`, or None if it has no vocabulary.

    Args:
        shown: how messages name the tokenizer. None: the directory.

    Raises:
        DataError: the only vocabulary is one that Mixwright cannot read, or two sentencepiece models differ.
    """
    shown = shown or str(directory)
    files = TokenizerFiles(
        directory,
        _matches(directory, SENTENCEPIECE, f"{SENTENCEPIECE}.v*"),
        (directory / HUGGING_FACE).is_file(),
        _matches(directory, *COMPANIONS, TEKKEN),
        shown,
    )
    if not files.models and not files.has_json:
        for found in _matches(directory, *UNREADABLE):
            raise DataError(
                f"{shown}: expected a {SENTENCEPIECE} or a {HUGGING_FACE}, found only {found}; convert it with "
                "transformers, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), or move it away"
            )
        return None
    require(
        len({files.content(name) for name in files.models}) < 2,
        DataError,
        f"{shown}: expected one sentencepiece model, found different ones: {', '.join(files.models)}",
    )
    return files


def given_tokenizer(path: str) -> TokenizerFiles:
    """Return the tokenizer that the user gave as `data.tokenizer=path`.

    A directory stands for all its files. A `tokenizer.json` stands for itself and the files beside it, except a
    sentencepiece model. Any other file is a sentencepiece model alone.

    Raises:
        DataError: there is no tokenizer.
    """
    shown, file = f"data.tokenizer={path}", Path(path)
    if file.is_dir():
        files = find_tokenizer(file, shown)
        if files is None:
            raise DataError(f"{shown}: expected a directory with a {SENTENCEPIECE} or a {HUGGING_FACE}, found neither")
        return files
    if file.suffix == ".json":
        require(file.name == HUGGING_FACE, DataError, f"{shown}: expected a file named {HUGGING_FACE}")
        return TokenizerFiles(file.parent, (), True, _matches(file.parent, *COMPANIONS), shown)
    return TokenizerFiles(file.parent, (file.name,), False, (), shown)


def _matches(directory: Path, *patterns: str) -> tuple[str, ...]:
    found = (path for pattern in patterns for path in sorted(directory.glob(pattern)) if path.is_file())
    return tuple(path.relative_to(directory).as_posix() for path in found)


def _ids_of_model(config: Path) -> bytes:
    """Return the token ids of a Hugging Face `config.json` as a `generation_config.json`, or b"" if it names none."""
    try:
        raw: dict[str, Any] = parse_json_object(read_file(config, MAX_JSON)) if config.is_file() else {}
    except ValueError:
        return b""  # The reader of the model's configuration reports the damage.
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id") if raw.get(key) is not None}
    return to_json({"_from_model_config": True} | ids, indent=2).encode() + b"\n" if ids else b""
