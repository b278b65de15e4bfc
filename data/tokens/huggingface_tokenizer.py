"""Tokenizers that are a `tokenizer.json`: byte-level BPE (GPT-2, Llama 3) and sentencepiece-like ones (Llama, Mistral).

The library `tokenizers` encodes. Decoding uses a table of the bytes of every id, so that it is exact.

Legend: V vocabulary size.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError, require
from common.text import one_line, parse_json_object, printable, shorten, show_value, to_json
from data.tokens.marks import AddedToken, Marks, added_token
from data.tokens.tokenizer import SPACE, Tokenizer

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
PROBE = "A b  c\n\n\tdéfi 你好 🙂 e\u0301 ﬁ ½ 1234 \x7f don't"
"""A tokenizer must give these characters back."""
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


class HuggingFaceTokenizer:
    """A `tokenizer.json` that keeps text as it is. It implements `TextTokenizer`.

    Unicode normalisation is left out: text in another Unicode form is encoded as it is. So the ids differ from the
    library's for such text only.

    Args:
        content: the content of the `tokenizer.json`.
        marks: what the files beside it say.
        shown: how messages name the tokenizer.

    Raises:
        DataError: the file cannot be read, contradicts the files beside it, changes text, or has no end of a text.
    """

    def __init__(self, content: bytes, marks: Marks, shown: str) -> None:
        self.shown = shown
        try:
            spec = parse_json_object(content)
            _prepare(spec, marks)
            self._encoder = _build(spec, marks)
            self._continuing = _build(_without_prefix(spec), marks)
            added = {entry["content"]: added_token(entry) for entry in spec.get("added_tokens") or []}
            byte_level = "ByteLevel" in _types(spec["decoder"])
        except Exception as error:  # The library raises exceptions of the type Exception itself.
            reason = shorten(one_line(str(error)), 200)
            raise DataError(f"{shown}: expected a tokenizer.json that can be read ({reason})") from error
        self._check_added(added, marks)
        self.vocab_size = 1 + max(self._encoder.get_vocab(with_added_tokens=True).values())
        self.specials: Mapping[str, AddedToken] = self._special_tokens(added, marks)
        self.words: Mapping[str, AddedToken] = {
            text: token for text, token in added.items() if text not in self.specials
        }
        self.named, self.template = marks.named, marks.template
        special_ids = {token.id for token in self.specials.values()}
        self._special_ids = special_ids
        table = _byte_table(self._encoder, self.vocab_size, byte_level)
        table |= {token.id: text.encode() for text, token in added.items()} | dict.fromkeys(special_ids, b"")
        self._table = [table.get(i, b"") for i in range(self.vocab_size)]
        self._bytes_V = np.array([len(piece) for piece in self._table], dtype=np.int32)
        literal = [self._encoder.token_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._literal_space_ids = None if byte_level or None in literal else literal
        first = self._encoder.encode("x", add_special_tokens=True)
        before = first.special_tokens_mask.index(0) if 0 in first.special_tokens_mask else 0
        require(before < 2, DataError, f"{shown}: tokenizer.json: expected at most one token before a text")
        self.bos_id: int | None = first.ids[0] if before else None
        self.eos_id, self.end_ids = self._ends(marks)
        self.prefix = self.decode(self.encode("x"))[:-1]
        require(
            marks.prefix in (None, self.prefix != ""),
            DataError,
            f"{shown}: tokenizer_config.json: add_prefix_space={show_value(marks.prefix)}: expected the same as in "
            f"tokenizer.json, found {'a' if self.prefix else 'no'} space before a text",
        )
        self.prefix_after_special = self._puts_prefix_after_specials()
        self._check_text_is_kept(spec)

    def _check_added(self, added: dict[str, AddedToken], marks: Marks) -> None:
        """Compare the tokens that the other files name with those of the `tokenizer.json`."""
        ends = [marks.named[key] for key in ("bos_token", "eos_token") if key in marks.named]
        ids = {text: None for text in ends} | {text: token.id for text, token in marks.added.items()}
        for text, number in ids.items():
            found = self._encoder.token_to_id(text)
            require(
                found is not None and number in (None, found),
                DataError,
                f"{self.shown}: expected the same special tokens in all its files, found "
                f"{shorten(printable(text), 80)} with id {found} in tokenizer.json and id {number} beside it",
            )

    def _special_tokens(self, added: dict[str, AddedToken], marks: Marks) -> dict[str, AddedToken]:
        """Return the tokens that text must not turn into: the special, the named, and those that end a text."""
        tokens = {text: token for text, token in {**added, **marks.added}.items() if token.special}
        texts = [*marks.named.values(), *map(self._encoder.id_to_token, marks.end_ids)]
        ids = {text: self._encoder.token_to_id(text) for text in texts if text is not None}
        return {text: AddedToken(number) for text, number in ids.items() if number is not None} | tokens

    def _ends(self, marks: Marks) -> tuple[int, tuple[int, ...]]:
        text = marks.named.get("eos_token")
        ends = {*marks.end_ids, *([] if text is None else [self._encoder.token_to_id(text)])}
        require(
            ends and max(ends) < self.vocab_size,
            DataError,
            f"{self.shown}: expected eos_token in a tokenizer_config.json or eos_token_id in a generation_config.json, "
            f"that is a token of tokenizer.json, found {max(ends, default=None)}",
        )
        return (marks.end_ids[0] if text is None else self._encoder.token_to_id(text)), tuple(sorted(ends))

    def _puts_prefix_after_specials(self) -> bool:
        [text] = [text for text, token in self.specials.items() if token.id == self.eos_id][:1]
        self._encoder.encode_special_tokens = False
        ids = self._encoder.encode(f"{text}x", add_special_tokens=False).ids
        self._encoder.encode_special_tokens = True
        return bool(self.prefix) and self.decode(ids) != "x"

    def _check_text_is_kept(self, spec: dict[str, Any]) -> None:
        for text in (PROBE, *self.specials):
            ids = self.encode(text)
            kept = self.decode(ids) == self.prefix + text and self._special_ids.isdisjoint(ids)
            parts = {key: sorted(_types(spec.get(key))) for key in ("normalizer", "pre_tokenizer", "decoder")}
            shown = ", ".join(f"{key} {'+'.join(names) or 'none'}" for key, names in parts.items())
            require(
                kept,
                DataError,
                f"{self.shown}: expected a tokenizer.json that keeps text as it is (byte-level or with byte_fallback), "
                f"found one that changes {text[:20]!r} ({shown})",
            )

    def check_same_pieces(self, path: Path) -> None:
        """Check that the sentencepiece model `path` gives its pieces the same ids as the `tokenizer.json`.

        Control pieces can have other names.

        Raises:
            DataError: it does not, or cannot be read.
        """
        for number, piece in Tokenizer(path, shown=f"{self.shown}: {path.name}").pieces():
            found = self._encoder.id_to_token(number)
            require(
                found == piece,
                DataError,
                f"{self.shown}: expected the same pieces in tokenizer.json and {path.name}, found {found!r} and "
                f"{piece!r} for id {number}; move the file that does not belong to the model away",
            )

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """See `TextTokenizer`."""
        if self._literal_space_ids is None:
            return self._encode(text, continues)
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            # A literal `SPACE` in the text would be decoded as a space. It is encoded as three byte tokens.
            ids += (self._literal_space_ids if i else []) + self._encode(part, continues or bool(i))
        return ids

    def _encode(self, text: str, continues: bool) -> list[int]:
        encoder = self._continuing if continues else self._encoder
        ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """See `TextTokenizer`."""
        self._encoder.encode_special_tokens = False
        try:
            ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        finally:
            self._encoder.encode_special_tokens = True
        return [*([] if self.bos_id is None else [self.bos_id]), *ids]

    def decode(self, ids: Iterable[int]) -> str:
        """See `TextTokenizer`."""
        pieces = (self._table[i] for i in map(int, ids) if 0 <= i < self.vocab_size)
        return b"".join(pieces).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """See `TextTokenizer`."""
        return self._bytes_V.copy()


def _prepare(spec: dict[str, Any], marks: Marks) -> None:
    """Remove what changes a text, cuts it, or makes its ids random. Mark the special tokens that other files name."""

    def change(part: dict[str, Any]) -> dict[str, Any] | None:
        return None if part["type"] in UNICODE_FORMS else part

    spec |= {"truncation": None, "padding": None, "normalizer": _map_parts(spec.get("normalizer"), change)}
    special = {*marks.named.values(), *(text for text, token in marks.added.items() if token.special)}
    for entry in spec.get("added_tokens") or []:
        entry["special"] = entry["special"] or entry["content"] in special
    if "dropout" in spec["model"]:
        spec["model"]["dropout"] = None
    _check_post_processor(spec.get("post_processor"))


def _check_post_processor(part: Any) -> None:
    """Check that a template for special tokens has the ids of its tokens, because the library ends the process if not.

    Raises:
        ValueError: it does not.
    """
    if isinstance(part, dict):
        used = [
            item["SpecialToken"]["id"]
            for key in ("single", "pair")
            for item in part.get(key) or []
            if "SpecialToken" in item
        ]
        missing = sorted(set(used) - set(part.get("special_tokens") or {}))
        if missing:
            raise ValueError(f"post_processor: expected {missing[0]} in special_tokens")
        for inner in part.get("processors") or []:
            _check_post_processor(inner)


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the description of the tokenizer that puts no space before a text."""

    def change(part: dict[str, Any]) -> dict[str, Any] | None:
        if part["type"] == "Prepend" or (part["type"] == "Replace" and part["pattern"].get("Regex") == rf"\A{SPACE}"):
            return None
        changes: dict[str, dict[str, Any]] = {
            "Metaspace": {"prepend_scheme": "never"},
            "ByteLevel": {"add_prefix_space": False},
        }
        kept = {key: value for key, value in part.items() if part["type"] != "Metaspace" or key != "add_prefix_space"}
        return kept | changes.get(part["type"], {})

    parts = {key: _map_parts(spec.get(key), change) for key in ("normalizer", "pre_tokenizer")}
    return spec | parts


def _map_parts(part: Any, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer after `change` of each of its parts. None stands for a removed part."""
    if part is None or part["type"] != "Sequence":
        return None if part is None else change(part)
    key = "normalizers" if "normalizers" in part else "pretokenizers"
    parts = [changed for inner in part[key] if (changed := _map_parts(inner, change)) is not None]
    return dict(part, **{key: parts}) if parts else None


def _types(part: Any) -> set[str]:
    """Return the types of a component and of the components in it."""
    if isinstance(part, dict):
        inner = set().union(*map(_types, part.values()))
        return inner | ({part["type"]} - {"Sequence"} if isinstance(part.get("type"), str) else set())
    return set().union(*map(_types, part)) if isinstance(part, list) else set()


def _build(spec: dict[str, Any], marks: Marks) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(to_json(spec))
    # A piece of the vocabulary becomes a special token if another file names it as one.
    named = {text for text in marks.named.values() if tokenizer.token_to_id(text) is not None}
    tokenizer.add_special_tokens(sorted(named - {entry["content"] for entry in spec.get("added_tokens") or []}))
    tokenizer.encode_special_tokens = True  # A special token that is spelled out in a text is text.
    return tokenizer


def _byte_table(tokenizer: Any, vocab_size: int, byte_level: bool) -> dict[int, bytes]:
    """Return the bytes of every piece of the vocabulary. The added tokens are not pieces."""
    byte_of = {character: byte for byte, character in _byte_level_alphabet()} if byte_level else {}
    table = {}
    for piece, number in tokenizer.get_vocab(with_added_tokens=False).items():
        if byte_level:
            table[number] = bytes(byte_of[c] for c in piece) if byte_of.keys() >= set(piece) else piece.encode()
        else:
            byte = BYTE.fullmatch(piece)
            table[number] = bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()
    return table


def _byte_level_alphabet() -> Iterator[tuple[int, str]]:
    """Yield each byte and the character that stands for it in the pieces of GPT-2's BPE (arXiv 1909.03193, 1508.07909).

    Printable bytes of Latin-1 stand for themselves. The others are numbered from U+0100.
    """
    shift = 0
    for byte in range(256):
        printable = 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF
        yield byte, chr(byte if printable else 0x100 + shift)
        shift += not printable
