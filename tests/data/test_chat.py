"""Conversations: reading their messages, and the [INST] format."""

import pytest

from common.errors import DataError
from data.corpora.chat import conversation_text, encode_conversation, label_text
from data.corpora.messages import read_messages
from data.tokens.store import Store


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([] if system is None else [{"role": "system", "content": system}]) + messages


def test_a_conversation_as_text() -> None:
    messages = read_messages(turns("Hi", "Hello.", "2 + 2?", "4", system="Be brief."))
    assert conversation_text(messages) == "[INST] Be brief.\n\nHi [/INST] Hello.[INST] 2 + 2? [/INST] 4"
    assert label_text(messages) == " Hello. 4"
    assert conversation_text(read_messages(turns("Hi"), last="user")) == "[INST] Hi [/INST]"


def test_ids_have_marks_and_a_prompt_begins_every_answer_to_it(store: Store) -> None:
    tokenizer = store.tokenizer
    ids, is_label = encode_conversation(read_messages(turns("Hi", "Hello </s> you", "2?", "4")), tokenizer)
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.eos_id) == 2 and ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == "[INST] Hi [/INST] Hello </s> you[INST] 2? [/INST] 4"
    labels = [i for i, learn in zip(ids, is_label, strict=True) if learn]
    assert labels == [
        *tokenizer.encode(" Hello </s> you"), tokenizer.eos_id, *tokenizer.encode(" 4"), tokenizer.eos_id
    ]  # fmt: skip
    history, _ = encode_conversation(read_messages(turns("Hi", "Hello </s> you", "2?"), last="user"), tokenizer)
    assert ids[: len(history)] == history and not any(is_label[: is_label.index(True)])


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (None, "expected a list of messages, found none"),
        ([], "expected a list of messages, found none"),
        ("hello", "expected a list of messages, found 'hello'"),
        (["hello"], "message 1: expected an object with role and content, found 'hello'"),
        ([{"role": "bot", "content": "x"}], "message 1: expected role to be one of .*assistant, found 'bot'"),
        ([{"content": "x"}], "message 1: expected role to be one of system, user, assistant, found none"),
        ([{"role": ["user"], "content": "x"}], "message 1: expected role to be one of .* found \\['user'\\]"),
        (turns("a", " \n"), "message 2: expected content to be text, found ' \\\\n'"),
        ([{"role": "user", "content": ["a"]}], "message 1: expected content to be text, found \\['a'\\]"),
        (turns("a", "b")[1:], "message 1: expected role system or user, found assistant"),
        (turns("a") * 2, "message 2: expected role assistant, found user"),
        (turns("a", "b", system="c")[::2], "message 2: expected role user, found assistant"),
        (turns("a", "b") + turns("a", "b", system="c"), "message 3: expected role user, found system"),
        (turns("a"), "message 1: expected the last message to be the assistant's, found role user"),
        (turns(system="c"), "message 1: expected the last message to be the assistant's, found role system"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_told_in_one_line(messages: object, complaint: str) -> None:
    with pytest.raises(DataError, match=f"^{complaint}$"):
        read_messages(messages)


def test_a_prompt_ends_with_the_user() -> None:
    with pytest.raises(DataError, match=r"^message 2: expected the last message to be the user's, found role assist"):
        read_messages(turns("a", "b"), last="user")
