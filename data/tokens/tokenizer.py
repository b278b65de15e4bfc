"""Text to token ids and back without loss: sentencepiece BPE (arXiv 1808.06226), with byte tokens for rare characters.

Legend: V vocabulary size.
"""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.errors import DataError
from common.files import read_file
from common.text import printable, shorten
from data.tokens.marks import AddedToken, Marks

MAX_TOKENIZER = 2**28
"""The most bytes of a file of a tokenizer."""
SPACE = "\u2581"
"""The character by which sentencepiece represents a space in a piece."""
REPLACEMENT = "\ufffd"
"""What a part of a character is decoded to."""
MAX_CHARACTER_TOKENS = 8
"""The most tokens that stand for one character, which has up to four bytes, or for several that share a token."""
SENTENCE_CHARS = 2_048
"""Approximate length of the sentences for training. They consist of several lines, so that pieces with line ends are
learned too."""


class TextTokenizer(Protocol):
    """Text to token ids and back.

    `decode(encode(text, continues=True)) == text` for every text. Some tokenizers put a space, the `prefix`, before a
    text that does not continue another one (Llama's and Mistral's do). Some of these put none before a space, so that
    only `encode(prefix + text, continues=True)` keeps both texts apart.
    """

    vocab_size: int
    """One more than the highest token id."""
    bos_id: int | None
    """The token before a text, <s>. None: the tokenizer puts none there."""
    eos_id: int
    """The token after a text, </s>."""
    end_ids: tuple[int, ...]
    """The ids that end generated text: `eos_id`, and those that the model's files add."""
    prefix: str
    """What is put before a text: a space, or nothing."""
    prefix_after_special: bool
    """Whether `prefix` is also put before a text that follows a special token."""
    specials: Mapping[str, AddedToken]
    """The text of every special token -> the token."""
    words: Mapping[str, AddedToken]
    """Added tokens that are no special tokens: `encode` recognises them in a text."""
    named: Mapping[str, str]
    """`bos_token`, `eos_token` and other names -> the text of the special token."""
    template: str | None
    """The chat template."""

    def __hash__(self) -> int:
        """Return a hash of the object, because what is derived from a tokenizer is cached."""

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Return the token ids of `text`, without <s> and </s>. No special token is recognised in the text.

        Args:
            continues: the text continues another text, so that no prefix is put before it.
        """

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a text that a user types as a prompt: <s>, if the tokenizer puts it, and the text.

        As in transformers, added tokens are recognised in the text.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Ids without text (<s>, </s>, or outside of the vocabulary) are left out."""

    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of each id, int32 [V]; 0 for special tokens.

        The sum over the ids of a text is the number of its bytes, and of those of `prefix`.
        """


def token_texts(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each of consecutive tokens; for special tokens, their names.

    If several tokens stand for one character, the first of them gets it, and the others get the empty string. A token
    that has a part of a character, without the rest, gets the replacement character.
    """
    names = {token.id: text for text, token in tokenizer.specials.items()}
    texts: list[str] = []
    while len(texts) < len(ids):
        start = len(texts)
        sizes = range(1, min(MAX_CHARACTER_TOKENS, len(ids) - start) + 1)
        whole = next((size for size in sizes if REPLACEMENT not in tokenizer.decode(ids[start : start + size])), 1)
        text = tokenizer.decode(ids[start : start + whole])
        texts += [text or names.get(ids[start], ""), *[""] * (whole - 1)]
    return texts


class Tokenizer:
    """A sentencepiece model with byte tokens. It implements `TextTokenizer`.

    Args:
        path: the model file.
        marks: what the files beside the model say.
        shown: how messages name the tokenizer. None: `data.tokenizer=<path>`.

    Raises:
        DataError: the file is not a sentencepiece model, or the model has no byte tokens, no <s> or no </s>.
    """

    def __init__(self, path: str | Path, marks: Marks | None = None, shown: str | None = None) -> None:
        self.path = Path(path)
        marks, shown = marks or Marks(), shown or f"data.tokenizer={path}"
        model = _read_model(self.path, shown)
        if marks.prefix is not None:
            model.normalizer_spec.add_dummy_prefix = marks.prefix
        self.prefix = " " if model.normalizer_spec.add_dummy_prefix else ""
        # sentencepiece drops repeated spaces by default. transformers never does.
        model.normalizer_spec.remove_extra_whitespaces = False
        self._model = _processor(model)
        model.normalizer_spec.add_dummy_prefix = False
        self._continuing = _processor(model) if self.prefix else self._model
        self._added = {text: token for text, token in marks.added.items() if self._id_of(text) != token.id}
        pieces: int = self._model.vocab_size()
        self.vocab_size = max([pieces, *(token.id + 1 for token in self._added.values())])
        inside = sorted(text for text, token in self._added.items() if token.id < pieces)
        if inside:
            raise DataError(
                f"{shown}: expected new ids for added tokens, found {shorten(printable(inside[0]), 80)} with the id of "
                "another piece"
            )
        bos_id = self._find(marks.named.get("bos_token"), self._model.bos_id())
        self.eos_id = self._find(marks.named.get("eos_token"), self._model.eos_id())
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if min(bos_id, self.eos_id) < 0 or not all(map(self._model.is_byte, byte_ids)):
            raise DataError(f"{shown}: expected a model with byte_fallback and ids for <s> and </s>")
        self.bos_id: int | None = bos_id if marks.adds_bos else None
        self.end_ids = tuple(sorted({self.eos_id, *marks.end_ids}))
        if self.end_ids[-1] >= self.vocab_size:
            raise DataError(
                f"{shown}: expected tokens of the model as eos_token_id in a generation_config.json or config.json, "
                f"found {self.end_ids[-1]}, and {self.vocab_size} tokens"
            )
        self.template, self.named = marks.template, marks.named
        # Mistral puts the space before each part of a conversation. transformers does if the file says so.
        self.prefix_after_special = marks.template is None or marks.legacy
        controls = {self._model.id_to_piece(i): AddedToken(i) for i in range(pieces) if self._model.is_control(i)}
        self.specials: Mapping[str, AddedToken] = controls | self._added
        self.words: Mapping[str, AddedToken] = {
            piece.piece: AddedToken(i, special=False)
            for i, piece in enumerate(model.pieces)
            if piece.type == piece.USER_DEFINED
        }
        self._bytes_V = np.zeros(self.vocab_size, dtype=np.int32)
        self._bytes_V[:pieces] = [self._bytes_of(i) for i in range(pieces)]
        self._text_ids = frozenset(np.flatnonzero(self._bytes_V).tolist())
        self._literal_space_ids = [byte_ids[byte] for byte in SPACE.encode()]

    def _id_of(self, text: str) -> int | None:
        """Return the id of a piece, or None."""
        number: int = self._model.piece_to_id(text)
        return number if self._model.id_to_piece(number) == text else None

    def _find(self, text: str | None, default: int) -> int:
        """Return the id of a special token. Without `text`: the model's own, `default`, which is -1 if it has none."""
        if text is None:
            return default
        token = self._added.get(text)
        number = self._id_of(text) if token is None else token.id
        return -1 if number is None else number

    def _bytes_of(self, token_id: int) -> int:
        model = self._model
        if model.is_byte(token_id):
            return 1
        if model.is_control(token_id) or model.is_unknown(token_id) or model.is_unused(token_id):
            return 0
        return len(model.id_to_piece(token_id).replace(SPACE, " ").encode())

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """See `TextTokenizer`."""
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            # sentencepiece would decode a literal `SPACE` in the text as a space. It is encoded as three byte tokens.
            model = self._continuing if i or continues else self._model
            ids += (self._literal_space_ids if i else []) + model.encode(part)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """See `TextTokenizer`."""
        ids = [] if self.bos_id is None else [self.bos_id]
        for i, part in enumerate(
            re.split(f"({'|'.join(map(re.escape, self._added))})", text) if self._added else [text]
        ):
            if i % 2:
                ids.append(self._added[part].id)
            elif part:
                ids += self.encode(part, continues=i > 0 and not self.prefix_after_special)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `TextTokenizer`."""
        text: str = self._continuing.decode([i for i in map(int, ids) if i in self._text_ids])
        return text

    def token_bytes(self) -> np.ndarray:
        """See `TextTokenizer`."""
        return self._bytes_V.copy()

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Yield the id and the text of each piece that text can consist of."""
        for number in range(len(self._model)):
            if self._bytes_V[number]:
                yield number, self._model.id_to_piece(number)


def _read_model(path: Path, shown: str) -> Any:
    """Return the sentencepiece model in the file `path` as a protobuf message.

    Raises:
        DataError: the file is not a sentencepiece model.
    """
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # Its classes are created at import time, so type checkers do not see them.
    model = schema.ModelProto()
    try:
        model.ParseFromString(read_file(path, MAX_TOKENIZER))
        processor = _processor(model)
        processor.id_to_piece(list(range(processor.vocab_size())))  # Damaged pieces are not UTF-8.
    except OSError as error:
        raise DataError(f"{shown}: expected a sentencepiece model that can be read ({error.strerror})") from error
    except Exception as error:  # Each protobuf implementation has its own DecodeError.
        raise DataError(f"{shown}: expected a sentencepiece model that can be read") from error
    return model


def _processor(model: Any) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString(deterministic=True))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a sentencepiece model on `texts` and return the content of its file. The same texts give the same bytes.

    Raises:
        DataError: the texts have too few pieces, or too many different characters, for `vocab_size`.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for text in texts for piece in sentences(text)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Pieces of several spaces make indentation short: 2.9 bytes per token of source code instead of 1.9.
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=16 * SENTENCE_CHARS,  # In bytes. A longer sentence would be ignored silently.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"set it to a value <= (\d+)", str(error)):
            expected = f"at most {found[1]}, the number of pieces in this text"
        elif found := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            expected = f"at least {found[1]}, the number of characters and byte tokens that this text needs"
        else:
            expected = f"a size that this text can fill ({str(error).strip().splitlines()[-1]})"
        raise DataError(f"data.vocab_size={vocab_size}: expected {expected}") from error
    return model.getvalue()


def sentences(text: str) -> Iterator[str]:
    """Split `text` into parts of whole lines, of about `SENTENCE_CHARS` characters.

    A part that has more than four times as many characters, because of a long line, is split within the line.
    """
    stream = io.StringIO(text)
    while lines := stream.readlines(SENTENCE_CHARS):
        piece = "".join(lines)
        yield from (piece[start : start + 4 * SENTENCE_CHARS] for start in range(0, len(piece), 4 * SENTENCE_CHARS))
