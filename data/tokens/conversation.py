"""Conversations as token ids, and the tokens of the answers as labels.

A chat template makes one text of a conversation. Its special tokens become ids only where the template wrote them: in a
message they are text. To tell one from the other, the contents of the messages are given to the template with marks in
them, characters that occur nowhere else.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain, pairwise
from typing import NamedTuple

from common.errors import DataError, require
from data.corpora.messages import Message
from data.tokens.chat_template import GENERATION_MARKS, TEXT_TEMPLATE, TOKEN_TEMPLATE, render
from data.tokens.tokenizer import TextTokenizer

NONCHARACTERS = range(0xFDD0, 0xFDF0)
PRIVATE_USE = range(0xE000, 0xF900)


class Span(NamedTuple):
    """What the assistant says in one answer, with the token that ends it, in the text of a conversation."""

    start: int
    stop: int
    learn: bool


class _Marks(NamedTuple):
    """Four characters that occur neither in a message nor in the template."""

    guard: str
    """Before and in a text that is spelled as a token, in a message."""
    end: str
    """After an answer."""
    opening: str
    """Where `{% generation %}` begins."""
    closing: str
    """Where it ends."""


def encode_conversation(messages: Sequence[Message], tokenizer: TextTokenizer) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, as its tokenizer's chat template says.

    Each answer is tokenized separately. So the ids of a prompt are the first ids of every answer to it.

    Args:
        messages: as `data.corpora.messages.read_messages` returns them. The last one is the assistant's, or the user's
            if the assistant is to answer.

    Returns:
        The ids, and for each id whether it is a label. The labels are the answers that are to be learned, each with the
        token that ends it.

    Raises:
        DataError: the template refuses the conversation, gives no text for it, or does not show which part of its text
            is an answer.
    """
    ids, is_label = _Conversation(messages, tokenizer).encode()
    require(ids, DataError, "expected a conversation that the chat template takes, found: it gives no text")
    return ids, is_label


def end_token_ids(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer: the tokenizer's, and the one that the chat template puts after an answer."""
    try:
        ids, is_label = encode_conversation([Message("user", "x"), Message("assistant", "x", learn=True)], tokenizer)
    except DataError:
        return tokenizer.end_ids  # The template takes no such conversation.
    specials = {token.id for token in tokenizer.specials.values()}
    # A template can put a line break after the token, and enclose both.
    ends = [number for number, label in zip(ids, is_label, strict=True) if label and number in specials][-1:]
    return tuple(sorted({*tokenizer.end_ids, *ends}))


def effective_template(tokenizer: TextTokenizer) -> str:
    """Return the tokenizer's chat template, or the built-in one that fits its special tokens."""
    has_tokens = {"[INST]", "[/INST]"} <= tokenizer.specials.keys()
    return tokenizer.template or (TOKEN_TEMPLATE if has_tokens else TEXT_TEMPLATE)


class _Format:
    """How the conversations of a tokenizer are written: the template, and what it needs of the tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.template = effective_template(tokenizer)
        self.specials = tuple(tokenizer.specials)
        self.names = dict(tokenizer.named)
        if tokenizer.template is None:
            texts = {token.id: text for text, token in tokenizer.specials.items()}
            begin = "" if tokenizer.bos_id is None else texts[tokenizer.bos_id]
            self.names = {"bos_token": begin, "eos_token": texts[tokenizer.eos_id]}
        shown = self.template
        with contextlib.suppress(DataError):  # The template can compose its marks, as in '<|' + role + '|>'.
            talk = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
            shown += render(self.template, talk, False, self.names)
        # Only the words that the template uses as marks are kept out of messages.
        self.words = tuple(word for word in tokenizer.words if word in shown and not word.isspace())


_format_of = lru_cache(maxsize=4)(_Format)


class _Conversation:
    """The text of one conversation, and its answers."""

    def __init__(self, messages: Sequence[Message], tokenizer: TextTokenizer) -> None:
        self.messages, self.tokenizer, self.format = messages, tokenizer, _format_of(tokenizer)
        used = self.format.template + "".join(message.content for message in messages)
        # Noncharacters first: text has them least often.
        free = (chr(code) for code in chain(NONCHARACTERS, PRIVATE_USE) if chr(code) not in used)
        self.marks = _Marks(*(next(free) for _ in range(4)))
        self.ordinary = re.compile(f"[{''.join(self.marks)}]")
        self.variables = {**self.format.names, GENERATION_MARKS: (self.marks.opening, self.marks.closing)}
        self.special = _pattern(self.marks.guard, self.format.specials)
        self.guarded = [self._guard(message) for message in messages]
        self.text = self._render(len(messages))

    def encode(self) -> tuple[list[int], list[bool]]:
        """Return the ids, and whether each is a label."""
        spans = self._spans()
        ids: list[int] = []
        is_label: list[bool] = []

        def add(new: list[int], place: int) -> None:
            ids.extend(new)
            is_label.extend([any(s.learn and s.start <= place < s.stop for s in spans)] * len(new))

        position, before = 0, None
        for match in [*self.special.finditer(self.text), None]:
            stop = match.start() if match else len(self.text)
            token = self.tokenizer.specials[match[0]] if match else None
            # A token can be declared to take the white space next to it.
            if before and before.rstrip:
                position = stop - len(self.text[position:stop].lstrip())
            if token and token.lstrip:
                stop = position + len(self.text[position:stop].rstrip())
            places = sorted({position, stop, *(p for s in spans for p in s[:2] if position < p < stop)})
            pieces = [self.text[a:b] for a, b in pairwise(places)]
            continues = before is not None and not self.tokenizer.prefix_after_special
            for place, piece in zip(places, pieces, strict=False):
                add(self._encode(piece, continues), place)
                continues = continues or bool(piece)
            if match and token:
                add([token.id], match.start())
                position, before = match.end(), token
        return ids, is_label

    def _guard(self, message: Message) -> Message:
        """Return the message with marks where its text is spelled as a token, and at the end of an answer.

        What the assistant says can have the added tokens that are not special: they are words of its language.
        Elsewhere, those that the template uses are text.
        """
        texts = self.format.specials + (self.format.words if message.role != "assistant" else ())
        guard, content = self.marks.guard, message.content
        content = _pattern(guard, texts, lookahead=True).sub(rf"{guard}\g<1>{guard}", content)
        # The template could continue what the content begins.
        inner, beginnings, ends = content.strip(), *_parts(texts)
        start = content.index(inner)
        longest = max(map(len, texts), default=0)
        cuts = [i for i in range(max(len(inner) - longest, 0), len(inner)) if inner[i:] in beginnings]
        for cut in reversed(cuts):
            inner = inner[:cut] + guard + inner[cut:]
        if any(inner[:n] in ends for n in range(1, longest)):
            inner = guard + inner
        after = self.marks.end if message.role == "assistant" else ""
        return message._replace(content=content[:start] + inner + after + content[start + len(content.strip()) :])

    def _render(self, count: int) -> str:
        messages = [{"role": role, "content": content} for role, content, _ in self.guarded[:count]]
        prompt = self.guarded[count - 1].role != "assistant"
        return render(self.format.template, messages, prompt, self.variables)

    def _spans(self) -> list[Span]:
        """Return the answers in the text, in order."""
        answers = [number for number, message in enumerate(self.messages) if message.role == "assistant"]
        learning = self.messages[-1].role == "assistant"
        learned = [learning and self.messages[number].learn for number in answers]
        ends = [match.end() for match in re.finditer(self.marks.end, self.text)]
        opening, closing = ([m.start() for m in re.finditer(mark, self.text)] for mark in self.marks[2:])
        found: list[tuple[int, int] | None] = []
        if opening:
            found = [self._enclosed(*places) for places in zip(opening, closing, strict=True)]
        elif len(ends) == len(answers):
            found = [self._between(number, end) for number, end in zip(answers, ends, strict=True)]
        if len(found) != len(answers) or any(learn and not span for learn, span in zip(learned, found, strict=True)):
            require(
                not any(learned),
                DataError,
                "expected a chat template in which each prompt is the beginning of the conversation and a special "
                "token ends each answer, found another text for a prompt, or no such token (with a template that moves "
                "the system message, a conversation can have one question only)",
            )
        pairs = zip(found, learned, strict=False)
        return [Span(*span, learn=learn) for span, learn in pairs if span is not None]

    def _between(self, number: int, end: int) -> tuple[int, int] | None:
        """Return the start of the answer `number` and the end of the token after it, or None if the text has no such.

        The answer starts where its prompt ends.
        """
        prompt = self._render(number)
        token = self.special.search(self.text, end)
        holds = self.text.startswith(prompt) and len(prompt) < end and token is not None
        return (len(prompt), token.end()) if holds and token else None

    def _enclosed(self, start: int, stop: int) -> tuple[int, int]:
        """Return the part that a template encloses, and the special token after it, unless one is after its answer."""
        answer_end = max(self.text.rfind(self.marks.end, start, stop), start)
        token = self.special.match(self.text, stop + 1)
        return start, token.end() if token and not self.special.search(self.text, answer_end, stop) else stop

    def _encode(self, piece: str, continues: bool) -> list[int]:
        """Return the ids of a piece of the text between two special tokens."""
        text = self.ordinary.sub("", piece)
        parts = [text]
        if self.marks.guard in piece and any(word in text for word in self.format.words):
            parts = [self.ordinary.sub("", part) for part in piece.split(self.marks.guard)]
        ids: list[int] = []
        for part in filter(None, parts):
            ids += self.tokenizer.encode(part, continues=continues or bool(ids))
        kept = self.tokenizer.decode(ids) in (text, self.tokenizer.prefix + text)
        require(kept, DataError, f"expected a tokenizer that keeps text as it is, found a change in {text[:40]!r}")
        return ids


@cache
def _pattern(guard: str, texts: tuple[str, ...], lookahead: bool = False) -> re.Pattern[str]:
    """Return the pattern of the longest of `texts` that has no mark before it.

    Args:
        lookahead: match only the first character, and also where the texts overlap.
    """
    alternatives = "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
    if lookahead:
        return re.compile(f"(?=(?:{alternatives}))(.)", re.DOTALL)
    return re.compile(f"(?<!{guard})(?:{alternatives})")


@cache
def _parts(texts: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the proper beginnings and the proper ends of `texts`."""
    inner: Iterator[tuple[str, str]] = ((text[:i], text[i:]) for text in texts for i in range(1, len(text)))
    beginnings, ends = zip(*inner, strict=True) if any(len(text) > 1 for text in texts) else ((), ())
    return frozenset(beginnings), frozenset(ends)
