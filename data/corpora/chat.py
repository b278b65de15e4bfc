"""Conversations in the `[INST]` format, as text and as token ids.

    <s>[INST] system, blank line, user [/INST] assistant</s>[INST] user [/INST] assistant</s>

This is the format of Mistral and Mixtral Instruct (arXiv 2310.06825 and 2401.04088). `<s>` and `</s>` are token ids of
the tokenizer and never text: `</s>` in a message is tokenized as four characters. The space before an answer belongs
to the answer. A prompt therefore ends in `[/INST]`, and no piece of the vocabulary crosses the start of an answer.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from data.corpora.messages import Message

TEMPLATE = 2
"""Part of a token store's key. Raise it when a change gives the same conversations other tokens or labels."""


class _Segment(NamedTuple):
    """A part of a conversation that is tokenized separately: one answer, or the text between two answers."""

    text: str
    is_answer: bool
    """Whether the assistant says the text. `</s>` follows it."""
    learn: bool
    """Whether its tokens, and the `</s>` after them, are labels."""


class ChatTokenizer(Protocol):
    """The part of a tokenizer that `encode_conversation` uses."""

    bos_id: int
    """Token id of `<s>`."""
    eos_id: int
    """Token id of `</s>`."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without `<s>` and `</s>`."""


def encode_conversation(messages: Sequence[Message], tokenizer: ChatTokenizer) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, with `<s>` first and `</s>` after each answer.

    Because each answer is tokenized separately, the ids of a prompt are the first ids of every answer to it.

    Args:
        messages: as `data.corpora.messages.read_messages` returns them. The last one is the assistant's, or the user's
            if the assistant is to answer.

    Returns:
        The ids, and for each id whether it is a label.
    """
    ids, is_label = [tokenizer.bos_id], [False]
    for segment in _segments(messages):
        segment_ids = tokenizer.encode(segment.text) + ([tokenizer.eos_id] if segment.is_answer else [])
        ids += segment_ids
        is_label += [segment.learn] * len(segment_ids)
    return ids, is_label


def conversation_text(messages: Sequence[Message]) -> str:
    """Return the text of a conversation: the text whose ids `encode_conversation` returns, without `<s>` and `</s>`."""
    return "".join(segment.text for segment in _segments(messages))


def label_text(messages: Sequence[Message]) -> str:
    """Return the part of `conversation_text` whose tokens are labels."""
    return "".join(segment.text for segment in _segments(messages) if segment.learn)


def _segments(messages: Sequence[Message]) -> Iterator[_Segment]:
    system = ""
    for role, content, learn in messages:
        if role == "system":
            system = f"{content}\n\n"
        elif role == "user":
            yield _Segment(f"[INST] {system}{content} [/INST]", is_answer=False, learn=False)
            system = ""
        else:
            yield _Segment(f" {content}", is_answer=True, learn=learn)
