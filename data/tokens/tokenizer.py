"""Text to token ids and back, without loss: sentencepiece BPE (arXiv 1808.06226) with bytes for what is rare.

Legend: V vocabulary.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError

SPACE = "\u2581"
"""How sentencepiece writes a space inside a piece."""
SENTENCE_CHARS = 2_048
"""Training reads text in pieces of whole lines of about this length, so that pieces with line ends are learned too."""


class Tokenizer:
    """A sentencepiece model file whose encoding keeps every character: `decode(encode(text)) == text`.

    Raises:
        DataError: not a sentencepiece model, or one that cannot keep text as it is.
    """

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        self.path = Path(path)
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"data.tokenizer={path}: expected a sentencepiece model that can be read") from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self._bytes_V = np.array([self._bytes_of(i) for i in range(self.vocab_size)], dtype=np.int32)
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if min(self.bos_id, self.eos_id) < 0 or not all(map(self._model.is_byte, byte_ids)):
            raise DataError(f"data.tokenizer={path}: expected a model with byte_fallback and ids for <s> and </s>")
        self._space_mark_ids = [byte_ids[byte] for byte in SPACE.encode()]

    def _bytes_of(self, token_id: int) -> int:
        model = self._model
        if model.is_byte(token_id):
            return 1
        if model.is_control(token_id) or model.is_unknown(token_id) or model.is_unused(token_id):
            return 0
        return len(model.id_to_piece(token_id).replace(SPACE, " ").encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without marks of beginning and end."""
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            # A literal mark in the text would come back as a space: it goes byte by byte.
            ids += (self._space_mark_ids if i else []) + self._model.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; ids that stand for no text (marks, or beyond the vocabulary) are left out."""
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and self._bytes_V[i]]
        text: str = self._model.decode(kept)
        return text

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 [V]; 0 for marks. Over a document's ids they sum to its length."""
        return self._bytes_V.copy()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """The sentencepiece model (a file's content) trained on `texts`; the same texts give the same bytes.

    Raises:
        DataError: the texts are too few for `vocab_size`.
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
            # Indentation is most of what code is: runs of spaces as pieces give 2.9 bytes per token there, not 1.9.
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=16 * SENTENCE_CHARS,  # bytes: a longer piece would be left out without a word
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"set it to a value <= (\d+)", str(error)):
            expected = f"at most {found[1]}, the pieces that so little text has"
        elif found := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            expected = f"at least {found[1]}, the characters and bytes of this text"
        else:
            expected = f"a size that this text can fill ({str(error).strip().splitlines()[-1]})"
        raise DataError(f"data.vocab_size={vocab_size}: expected {expected}") from error
    return model.getvalue()


def without_normalization(path: str) -> bytes:
    """The model at `path` with its text normalisation switched off: no space put before a text, none removed.

    Raises:
        DataError: not a sentencepiece model.
    """
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # made at import time: type checkers see nothing in it
    model = schema.ModelProto()
    try:
        model.ParseFromString(Path(path).read_bytes())
    except Exception as error:  # protobuf's DecodeError has a different home in each of its implementations
        raise DataError(f"data.tokenizer={path}: expected a sentencepiece model that can be read") from error
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized


def sentences(text: str) -> Iterator[str]:
    """`text` in pieces of whole lines of about `SENTENCE_CHARS`; a line of several times that is cut within."""
    stream = io.StringIO(text)
    while lines := stream.readlines(SENTENCE_CHARS):
        piece = "".join(lines)
        yield from (piece[start : start + 4 * SENTENCE_CHARS] for start in range(0, len(piece), 4 * SENTENCE_CHARS))
