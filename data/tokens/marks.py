"""What the files beside a vocabulary say: special tokens, added tokens, the ends of a text, the chat template."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from common.errors import DataError, require
from common.text import expect_characters, one_line, parse_json_object, shorten

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Values of `tokenizer_class` with which transformers ignores `add_prefix_space`."""


class AddedToken(NamedTuple):
    """A text that is one token wherever it is recognised, beside the pieces that a tokenizer composes text of."""

    id: int
    special: bool = True
    """Whether it is a mark, such as `<|im_end|>`, and not a word of a text."""
    lstrip: bool = False
    """Whether white space before it belongs to it."""
    rstrip: bool = False
    """Whether white space after it belongs to it."""


@dataclass(frozen=True)
class Marks:
    """What the files beside a vocabulary say. The defaults are those of a vocabulary with no file beside it."""

    named: Mapping[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token` and the other named tokens -> their text."""
    added: Mapping[str, AddedToken] = field(default_factory=dict)
    """The text of every added token -> the token."""
    end_ids: tuple[int, ...] = ()
    """The ids at which generation ends, as `generation_config.json` lists them."""
    template: str | None = None
    """The chat template, in Jinja."""
    prefix: bool | None = None
    """`add_prefix_space`: whether a space is put before a text. None: the vocabulary's file says it."""
    adds_bos: bool = True
    """`add_bos_token`: whether a sentencepiece model puts <s> before a text."""
    legacy: bool = False
    """`legacy`: whether a sentencepiece model puts its space after every special token, and not only before a text."""

    @classmethod
    def read(cls, read: Callable[[str], bytes], shown: str) -> "Marks":
        """Read the files.

        Args:
            read: returns the content of the file with this name, or b"" if there is none.
            shown: how messages name the tokenizer.

        Raises:
            DataError: a file does not have the form that transformers gives it.
        """
        files = _Files(read, shown)
        config = files.object(CONFIG)
        named = {
            key: text
            for source in (files.object(SPECIAL), config)
            for key, value in source.items()
            if key.endswith("_token") and (text := _token_text(value)) is not None
        }
        files.expect(
            config.get("add_prefix_space") in (None, False, True),
            CONFIG,
            f"add_prefix_space={config.get('add_prefix_space')}: expected true, false or null",
        )
        cleared = {key for key in ("bos_token", "eos_token") if key in config and config[key] is None}
        value = files.object(GENERATION).get("eos_token_id")
        ends = value if isinstance(value, list) else [] if value is None else [value]
        files.expect(
            all(map(_is_id, ends)),
            GENERATION,
            f"eos_token_id={value}: expected a token id, or a list of them",
        )
        return cls(
            named={key: text for key, text in named.items() if key not in cleared},
            added=files.added(config),
            end_ids=tuple(ends),
            template=files.template(config),
            prefix=config.get("add_prefix_space") if config.get("tokenizer_class") not in GENERIC_CLASSES else None,
            adds_bos=config.get("add_bos_token") is not False,
            legacy=config.get("legacy") is True,
        )


class _Files:
    """Reads the files, with one-line errors."""

    def __init__(self, read: Callable[[str], bytes], shown: str) -> None:
        self.read, self.shown = read, shown

    def expect(self, holds: object, name: str, message: str) -> None:
        """Raise DataError for the file `name`, unless `holds`."""
        require(holds, DataError, f"{self.shown}: {name}: {shorten(one_line(message), 300)}")

    def object(self, name: str) -> dict[str, Any]:
        """Return the JSON object in the file `name`, or an empty one if there is no file."""
        content = self.read(name)
        try:
            parsed = {} if not content else parse_json_object(content)
            expect_characters(parsed)
            return parsed
        except ValueError as error:
            raise DataError(f"{self.shown}: {name}: damaged: {error}") from error

    def added(self, config: dict[str, Any]) -> dict[str, AddedToken]:
        """Return the tokens of `added_tokens.json` and, with more detail, of `added_tokens_decoder`."""
        tokens = {}
        for text, number in self.object(ADDED).items():
            self.expect(_is_id(number), ADDED, f"{text}: expected a token id, found {number}")
            tokens[text] = AddedToken(number)
        decoder = config.get("added_tokens_decoder", {})
        self.expect(isinstance(decoder, dict), CONFIG, "added_tokens_decoder: expected an object")
        for number, entry in decoder.items():
            valid = number.isdecimal() and len(number) < 10 and isinstance(entry, dict)
            valid = valid and isinstance(entry.get("content"), str)
            self.expect(valid, CONFIG, f"added_tokens_decoder: expected an id and a token, found {number}: {entry}")
            tokens[entry["content"]] = added_token(entry | {"id": int(number)})
        return tokens

    def template(self, config: dict[str, Any]) -> str | None:
        """Return the chat template, from the first file that has one, in transformers' order."""
        content = self.read(TEMPLATE)
        if content:
            try:
                return content.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{self.shown}: {TEMPLATE}: expected UTF-8 text ({error})") from error
        value: Any = None
        for name, source in ((CONFIG, config), (TEMPLATE_JSON, self.object(TEMPLATE_JSON))):
            value = source.get("chat_template") if value is None else value
            if isinstance(value, list):
                templates = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
                value = templates.get("default")
            self.expect(value is None or isinstance(value, str), name, f"chat_template: expected text, found {value}")
        return None if value is None else str(value)


def added_token(entry: Mapping[str, Any]) -> AddedToken:
    """Return the token that an entry of `added_tokens` (tokenizer.json) describes."""
    flags = {key: entry.get(key) is True for key in ("special", "lstrip", "rstrip")}
    return AddedToken(entry["id"], **flags)


def _is_id(value: Any) -> bool:
    """Return whether `value` can be a token id. The libraries store ids in 32 bits."""
    return type(value) is int and 0 <= value < 2**31


def _token_text(value: Any) -> str | None:
    """Return the text of a named token, which is the text itself or an object with it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None
