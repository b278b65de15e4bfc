"""Conversations in the `[INST]` format, as text.

    [INST] system, blank line, user [/INST] assistant[INST] user [/INST] assistant

This is the format of Mistral and Mixtral Instruct (arXiv 2310.06825 and 2401.04088), without the special tokens. The
space before an answer belongs to the answer. `data.tokens.conversation` makes the token ids, by the chat template of
the tokenizer.
"""

from collections.abc import Sequence

from data.corpora.messages import Message

TEMPLATE = 2
"""Part of a token store's key. Raise it when a change gives the same conversations other tokens or labels."""


def conversation_text(messages: Sequence[Message]) -> str:
    """Return the text of a conversation, by which it is identified and on which a tokenizer is trained."""
    text = system = ""
    for role, content, _ in messages:
        if role == "system":
            system = f"{content}\n\n"
        elif role == "user":
            text += f"[INST] {system}{content} [/INST]"
            system = ""
        else:
            text += f" {content}"
    return text
