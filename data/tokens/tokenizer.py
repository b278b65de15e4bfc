"""Text to token ids and back without loss: sentencepiece BPE (arXiv 1808.06226), with byte tokens for rare characters.

Legend: V vocabulary size.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError

SPACE = "\u2581"
"""The character by which sentencepiece represents a space in a piece."""
SENTENCE_CHARS = 2_048
"""Approximate length of the sentences for training. They consist of several lines, so that pieces with line ends are
learned too."""


class Tokenizer:
    """A sentencepiece model that encodes every text without loss: `decode(encode(text)) == text`.

    Attributes:
        bos_id: token id of <s>.
        eos_id: token id of </s>.
        byte_run_ids: empty: `decode` decodes byte tokens character by character.

    Raises:
        DataError: the file is not a sentencepiece model, or the model has no byte tokens, no <s> or no </s>.
    """

    byte_run_ids: frozenset[int] = frozenset()

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        self.path = Path(path)
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.vocab_size: int = self._model.vocab_size()
            self._bytes_V = np.array([self._bytes_of(i) for i in range(self.vocab_size)], dtype=np.int32)
        except Exception as error:  # A damaged model can also have pieces that are not UTF-8.
            raise DataError(f"data.tokenizer={path}: expected a sentencepiece model that can be read") from error
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if min(self.bos_id, self.eos_id) < 0 or not all(map(self._model.is_byte, byte_ids)):
            raise DataError(f"data.tokenizer={path}: expected a model with byte_fallback and ids for <s> and </s>")
        self._literal_space_ids = [byte_ids[byte] for byte in SPACE.encode()]

    def _bytes_of(self, token_id: int) -> int:
        model = self._model
        if model.is_byte(token_id):
            return 1
        if model.is_control(token_id) or model.is_unknown(token_id) or model.is_unused(token_id):
            return 0
        return len(model.id_to_piece(token_id).replace(SPACE, " ").encode())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without <s> and </s>."""
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            # sentencepiece would decode a literal `SPACE` in the text as a space. It is encoded as three byte tokens.
            ids += (self._literal_space_ids if i else []) + self._model.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Ids without text (<s>, </s>, or outside of the vocabulary) are left out."""
        text: str = self._model.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size and self._bytes_V[i]])
        return text

    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of each id, int32 [V]; 0 for <s> and </s>.

        The sum over the ids of a text is the number of its bytes.
        """
        return self._bytes_V.copy()


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


def without_normalization(path: str) -> bytes:
    """Return the content of the model file `path`, changed so that spaces in a text are neither added nor removed.

    Raises:
        DataError: the file is not a sentencepiece model.
    """
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # Its classes are created at import time, so type checkers do not see them.
    model = schema.ModelProto()
    try:
        model.ParseFromString(Path(path).read_bytes())
    except Exception as error:  # Each protobuf implementation has its own DecodeError.
        raise DataError(f"data.tokenizer={path}: expected a sentencepiece model that can be read") from error
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized


def sentences(text: str) -> Iterator[str]:
    """Split `text` into parts of whole lines, of about `SENTENCE_CHARS` characters.

    A part that has more than four times as many characters, because of a long line, is split within the line.
    """
    stream = io.StringIO(text)
    while lines := stream.readlines(SENTENCE_CHARS):
        piece = "".join(lines)
        yield from (piece[start : start + 4 * SENTENCE_CHARS] for start in range(0, len(piece), 4 * SENTENCE_CHARS))
