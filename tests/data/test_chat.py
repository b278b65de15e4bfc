"""Conversations: reading their messages, and the [INST] format."""

import pytest

from common.errors import DataError
from data.corpora.chat import conversation_text
from data.corpora.messages import Message, read_conversation, read_messages
from data.tokens.conversation import encode_conversation
from data.tokens.store import Store


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([] if system is None else [{"role": "system", "content": system}]) + messages


def test_a_conversation_as_text() -> None:
    messages = read_messages(turns("Hi", "Hello.", "2 + 2?", "4", system="Be brief."))
    assert conversation_text(messages) == "[INST] Be brief.\n\nHi [/INST] Hello.[INST] 2 + 2? [/INST] 4"
    assert conversation_text(read_messages(turns("Hi"), last="user")) == "[INST] Hi [/INST]"


def test_the_text_is_that_of_the_built_in_template_without_special_tokens(store: Store) -> None:
    for system in (None, "Be brief."):
        for contents, last in ((("Hi",), "user"), (("Hi", "Hello.", "2 + 2?", "4"), "assistant")):
            messages = read_messages(turns(*contents, system=system), last=last)
            ids, _ = encode_conversation(messages, store.tokenizer)
            assert store.tokenizer.decode(ids) == conversation_text(messages)


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
        ([{"role": "bot", "content": "x"}], "message 1: expected role to be one of .*assistant, gpt, found 'bot'"),
        ([{"content": "x"}], "message 1: expected role to be one of system, .*, found none"),
        ([{"role": ["user"], "content": "x"}], "message 1: expected role to be one of .* found \\['user'\\]"),
        (turns("a", " \n"), "message 2: content: expected text, found ' \\\\n'"),
        ([{"role": "user", "content": ["a"]}], "message 1: content: part 1: expected type text and a text, found 'a'"),
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


USER, ANSWER = Message("user", "a"), Message("assistant", "b", learn=True)
A, B = ({"role": message.role, "content": message.content} for message in (USER, ANSWER))
TEXT_PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "\n", "image_url": None}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [A, B], "id": 3, "label": 0, "prompt": "a", "tools": [], "conversations": None}, [USER, ANSWER]),
        ({"messages": [{**A, "role": "developer", "content": "s"}, A, B]}, [Message("system", "s"), USER, ANSWER]),
        ({"messages": [{**A, "content": TEXT_PARTS}, B]}, [Message("user", "a\n"), ANSWER]),
        ({"messages": [A, {**B, "weight": 0}, A, {**B, "weight": 1}]}, [USER, Message("assistant", "b"), USER, ANSWER]),
        ({"messages": [{**A, "weight": 0, "name": None}, {**B, "weight": 1.0, "id": 1}]}, [USER, ANSWER]),
        ({"messages": [A, {**B, "tool_calls": [], "refusal": None, "prefix": False}]}, [USER, ANSWER]),
        ({"system": "s", "messages": [A, B]}, [Message("system", "s"), USER, ANSWER]),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                            {"from": "gpt", "value": "b", "role": None, "weight": None}], "system_prompt": "s"},
         [Message("system", "s"), USER, ANSWER]),
        ({"conversations": [A, B]}, [USER, ANSWER]),
        ({"instruction": "a", "input": "", "output": "b", "text": "### Instruction: a"}, [USER, ANSWER]),
        ({"instruction": "a", "input": "c", "output": "b"}, [Message("user", "a\nc"), ANSWER]),
        ({"prompt": "a", "completion": "b", "label": True}, [USER, ANSWER]),
        ({"prompt": [A, B, A], "completion": [B]}, [USER, Message("assistant", "b"), USER, ANSWER]),
    ],
)  # fmt: skip
def test_formats_of_rows(row: dict[str, object], expected: list[Message]) -> None:
    assert read_conversation(row) == expected


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": [A, {**B, "weight": 0}]}, "expected a message of the assistant with weight 1, found none"),
        ({"messages": [A, {**B, "weight": 0.5}]}, "message 2: weight=0.5: expected 0 or 1"),
        ({"messages": [A, {**B, "weight": "0"}]}, "message 2: weight='0': expected 0 or 1"),
        ({"messages": [A, {**B, "weight": False}]}, "message 2: weight=False: expected 0 or 1"),
        ({"messages": [{**A, "weight": 1}, B]}, "message 1: weight=1: expected 0 or null, because only answers"),
        ({"messages": [A, {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]},
         "message 2: tool_calls=.*: expected no such key"),
        *(({"messages": [A, {**B, key: value}]}, f"message 2: {key}=.*: expected no such key")
          for key, value in (("function_call", {"name": "f"}), ("name", "Bob"), ("prefix", True), ("refusal", "no"),
                             ("audio", {"id": 1}), ("reasoning_content", "hm"), ("train", False), ("loss", 0))),
        ({"messages": [A, B, {"role": "tool", "content": "4", "tool_call_id": "x"}]}, "message 3: expected role to be"),
        ({"messages": [{**A, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, B]},
         "message 1: content: part 1: expected type text and a text, found {'type': 'image_url'"),
        ({"messages": [{**A, "content": [{"type": "text", "text": "a", "cache": 1}]}, B]},
         "message 1: content: part 1: cache=1: expected no such key"),
        ({"messages": [{**A, "content": []}, B]}, "message 1: content: expected text, found none"),
        *(({"messages": [A, B], key: value}, f"{key}=.*: expected no such key")
          for key, value in (("tools", [{"type": "function"}]), ("functions", [{}]), ("parallel_tool_calls", False))),
        ({"chosen": [A, B], "rejected": [A, B]}, "chosen=.*: expected no such key"),
        *(({"prompt": "a", "completion": "b", "label": value}, "label=.*: expected no such key")
          for value in (False, 0, "0", "False")),
        ({"instruction": "a", "output": "b", "context": "c"}, "context=.*: expected no such key"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history=.*: expected no such key"),
        ({"messages": [A, B], "conversations": [A, B]}, "expected one of: .*; found messages, conversations"),
        ({"instruction": "a", "response": "b"}, "expected one of: .*; found instruction, response"),
        ({"messages": None}, "expected one of: .*; found messages"),
        ({"system": "t", "messages": [{"role": "system", "content": "s"}, A, B]}, "system: expected the text of the "),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]},
         "message 2: expected from to be one of .*, found 'observation'"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 1: expected role system or user"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input: expected text, found 3"),
        ({"prompt": "a", "completion": ""}, "message 2: content: expected text, found none"),
        ({"prompt": [A, "x"], "completion": [B]}, "message 2: expected an object with role and content, found 'x'"),
    ],
)  # fmt: skip
def test_rows_whose_meaning_is_not_plain_are_refused(row: dict[str, object], complaint: str) -> None:
    with pytest.raises(DataError, match=f"^{complaint}"):
        read_conversation(row)


def test_a_given_key_is_the_only_one_and_named_keys_are_ignored() -> None:
    row = {"chosen": [A, {**B, "score": 4}], "rejected": [A, B], "messages": [B]}
    with pytest.raises(DataError, match=r"^rejected=.*; data.ignore_keys=\[rejected\] ignores it$"):
        read_conversation(row, "chosen", ())
    with pytest.raises(DataError, match=r"^message 2: score=4: .*; data.ignore_keys=\[score\] ignores it$"):
        read_conversation(row, "chosen", ("rejected",))
    assert read_conversation(row, "chosen", ("rejected", "score")) == [USER, ANSWER]
    with pytest.raises(DataError, match=r"^expected data.messages_key=chat in it; found messages$"):
        read_conversation({"messages": [A, B]}, "chat")


def test_an_answer_of_weight_0_is_read_but_not_learned(store: Store) -> None:
    tokenizer = store.tokenizer
    row = turns("a", "draft", "b", "good")
    ids, is_label = encode_conversation(read_messages([row[0], {**row[1], "weight": 0}, *row[2:]]), tokenizer)
    assert ids == encode_conversation(read_messages(row), tokenizer)[0]
    labels = [i for i, learn in zip(ids, is_label, strict=True) if learn]
    assert labels == [*tokenizer.encode(" good"), tokenizer.eos_id]
