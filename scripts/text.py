"""Text in and out of a model that generates: its tokenizer, text as it grows, stop strings, the terminal."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from common.errors import ModelError
from data.corpora import chat
from training.formats.reader import ModelReader
from training.formats.safetensors import read_json

REPLACEMENT = "\ufffd"
"""What a decoder puts for bytes that are no whole character (yet)."""
LONGEST_CHARACTER = 4
"""Bytes, and so tokens at most."""


class Text(Protocol):
    """A tokenizer."""

    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def open_text(source: ModelReader) -> Text:
    """The tokenizer of a model directory: its sentencepiece model, else (Hugging Face) what transformers makes of it.

    Raises:
        ModelError: there is none, or it has more tokens than the model.
        DataError: its sentencepiece model cannot be used.
    """
    text: Text
    if source.tokenizer is not None:
        from data.tokens.tokenizer import Tokenizer

        text = Tokenizer(source.tokenizer)
    elif source.kind == "hf":
        text = HuggingFaceText(source.path)
    else:
        where = source.path.parent.parent if source.kind == "run" else source.path
        raise ModelError(
            f"{where}: expected a tokenizer.model in it; runs of older versions left it in their token store below "
            "data.cache: copy it from there"
        )
    rows = source.model.vocab_size or 0
    if text.vocab_size > rows:
        raise ModelError(
            f"{source.path}: expected a tokenizer of at most {rows} tokens, the model's vocab_size; "
            f"found {text.vocab_size}"
        )
    return text


def end_marks(source: ModelReader, text: Text) -> list[int]:
    """Token ids that end a text: the tokenizer's, and what a Hugging Face directory's generation_config.json adds.

    Raises:
        ModelError: that file is there, and is no JSON object with ids.
    """
    file = source.path / "generation_config.json"
    if source.kind != "hf" or not file.is_file():
        return [text.eos_id]
    given = read_json(file).get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(number) is int for number in ids):
        raise ModelError(f"{file}: eos_token_id={given}: expected a token id, or a list of them")
    return sorted({text.eos_id, *ids})


class HuggingFaceText:
    """A tokenizer that transformers reads. Nothing is fetched and no code of the directory runs."""

    def __init__(self, path: Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ModelError(f"{path}: expected a tokenizer.model, or transformers installed to read others") from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # transformers and its parsers raise whatever they like
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{path}: expected a tokenizer that transformers can read ({reason})") from error
        self.vocab_size = len(self._tokenizer)
        marks = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        if None in marks:
            raise ModelError(f"{path}: expected a tokenizer with marks of beginning and end")
        self.bos_id, self.eos_id = marks

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def encode_prompt(text: Text, prompt: str) -> list[int]:
    """The mark of the beginning, then `prompt`."""
    return [text.bos_id, *text.encode(prompt)]


def encode_chat(text: Text, messages: Any) -> list[int]:
    """A conversation that ends with the user, in the [INST] format of data/corpora/chat.py.

    Raises:
        DataError: it is no such conversation.
    """
    return chat.encode(chat.prompt_segments(messages), text)[0]


class StreamedText:
    """The text of one row, token by token: whole characters only, and nothing that may be the start of a stop string.

    Attributes:
        text: what has been said for good.
        stopped: a stop string came; what follows is ignored.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.text, self.stopped = "", False
        self._decode, self._stops = decode, stops
        # A piece is decoded behind others, because at a beginning some tokenizers drop its space. Those from `_from` on
        # are decoded again, the ones before `_shown` have been seen.
        self._ids = list(prompt)
        self._from, self._shown = 0, len(self._ids)
        self._held = ""

    def add(self, token: int) -> str:
        """Returns what can be shown now: a continuation of what `add` returned before."""
        self._ids.append(token)
        return self._say(self._decoded(final=False), final=False)

    def end(self) -> str:
        """Returns what was held back, at the end of the row."""
        return self._say(self._decoded(final=True), final=True)

    def _decoded(self, final: bool) -> str:
        before = self._decode(self._ids[self._from : self._shown])
        new = self._decode(self._ids[self._from :])[len(before) :]
        waiting = len(self._ids) - self._shown < LONGEST_CHARACTER and new.endswith(REPLACEMENT) and not final
        if waiting:
            return ""
        if new:
            self._from = self._shown
        self._shown = len(self._ids)
        return new

    def _say(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            said, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stops), default=0)
            said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += said
        return said


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Terminal:
    """Prints growing texts one below the other: the first that has not ended as it grows, the next ones after it."""

    def __init__(self, titles: Sequence[str]) -> None:
        self._titles = titles
        self._waiting = ["" for _ in titles]
        self._ended = [False for _ in titles]
        self._current = 0
        self._title()

    def say(self, row: int, text: str) -> None:
        if row == self._current:
            _show(text)
        else:
            self._waiting[row] += text

    def end(self, row: int) -> None:
        self._ended[row] = True
        while self._current < len(self._titles) and self._ended[self._current]:
            _show("\n")
            self._current += 1
            self._title()
            if self._current < len(self._titles):
                _show(self._waiting[self._current])

    def _title(self) -> None:
        if len(self._titles) > 1 and self._current < len(self._titles):
            title = " ".join(self._titles[self._current].split())
            _show(f"[{self._current + 1}/{len(self._titles)}] {title if len(title) <= 60 else title[:57] + '...'}\n")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
