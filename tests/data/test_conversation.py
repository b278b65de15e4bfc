"""Conversations as ids: those of transformers' `apply_chat_template`, exact labels, and no token out of a message."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from data.config import DataConfig
from data.corpora.messages import Message, read_messages
from data.packing import IGNORE
from data.tokens.conversation import effective_template, encode_conversation, end_token_ids
from data.tokens.files import find_tokenizer
from data.tokens.store import prepare
from data.tokens.tokenizer import TextTokenizer
from tests.data.test_tokenizer import HARD
from tests.tokenizers import (
    DEEPSEEK_SPLITS,
    QWEN_SPLITS,
    byte_level,
    sentencepiece_like,
    sentencepiece_model,
    write_tokenizer,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENCLOSED = CHATML.replace(
    "m.content + '<|im_end|>' + '\n' }}",
    "'' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
V1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('roles must be user\nand assistant') }}{% endif %}{% endfor %}"
)
V3 = V1.replace("' [/INST]'", "'[/INST]'")
TEKKEN = V3.replace("'[INST] '", "'[INST]'").replace("' ' + ", "")
QWEN_CHAT = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}" + CHATML
"""The chat template of Qwen: the ChatML format, with a default system message if the conversation has none."""
OLMOE_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>\n' }}{{ m.content + eos_token }}{{ '' if loop.last else '\n' }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
"""OLMoE's: the roles are text, and the token that ends a text also begins one."""
DEEPSEEK_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant:' }}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""DeepSeek's: the roles are text, and an answer begins with the space after the colon."""


def enclosed(template: str, answer: str) -> str:
    """Return the template with the marks of transformers around the `answer` in it."""
    assert answer in template
    return template.replace(answer, f"{{% generation %}}{answer}{{% endgeneration %}}")


CHAT = ["<|im_start|>", "<|im_end|>"]
INST = ["[INST]", "[/INST]"]
LLAMA_MARKS = ["<|b|>", "<|h|>", "<|/h|>", "<|eot_id|>"]
MISTRAL = {"bos_token": "<s>", "eos_token": "</s>"}
QWEN = {"bos_token": None, "eos_token": "<|end|>"}
QWEN2 = {"bos_token": None, "eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}
OLMOE = {"bos_token": "<|end|>", "eos_token": "<|end|>", "tokenizer_class": "GPTNeoXTokenizer"}
DEEPSEEK = {"bos_token": "<|b|>", "eos_token": "<|e|>", "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
TALK = [
    ("user", "the model"),
    ("assistant", "router loss"),
    ("user", "é 🙂  train\n\n"),
    ("assistant", " two\nlines  "),
    ("user", "layer"),
]
KINDS: dict[str, tuple[dict[str, Any] | bytes, dict[str, Any]]] = {
    "v1": (sentencepiece_like([], legacy=False), MISTRAL | {"chat_template": V1}),
    "v1-legacy": (sentencepiece_like([], legacy=True), MISTRAL | {"chat_template": V1}),
    "v1-model": (sentencepiece_model(), MISTRAL | {"chat_template": V1, "tokenizer_class": "LlamaTokenizer"}),
    "v2": (sentencepiece_like(INST, legacy=True), MISTRAL | {"chat_template": V3}),
    "v3": (sentencepiece_like(INST, legacy=False), MISTRAL | {"chat_template": V3}),
    "v3-model": (
        sentencepiece_model(control_symbols=INST),
        MISTRAL | {"chat_template": V3, "tokenizer_class": "LlamaTokenizer"},
    ),
    "v3-tekken": (byte_level(["<s>", "</s>", *INST], bos="<s>"), MISTRAL | {"chat_template": TEKKEN}),
    "chatml": (byte_level(["<|end|>", *CHAT]), QWEN | {"chat_template": CHATML}),
    "chatml-llama": (sentencepiece_like(CHAT, legacy=False), MISTRAL | {"chat_template": CHATML}),
    "chatml-enclosed": (byte_level(["<|end|>", *CHAT]), QWEN | {"chat_template": ENCLOSED}),
    "qwen": (
        byte_level(["<|end|>", *CHAT], normalizer={"type": "NFC"}, pre_tokenizer=QWEN_SPLITS),
        QWEN2 | {"chat_template": QWEN_CHAT},
    ),
    "olmoe": (byte_level(["<|end|>"]), OLMOE | {"chat_template": OLMOE_CHAT}),
    "olmoe-enclosed": (
        byte_level(["<|end|>"]),
        OLMOE | {"chat_template": enclosed(OLMOE_CHAT, "{{ m.content + eos_token }}")},
    ),
    "deepseek": (
        byte_level(["<|b|>", "<|e|>"], bos="<|b|>", pre_tokenizer=DEEPSEEK_SPLITS),
        DEEPSEEK | {"chat_template": DEEPSEEK_CHAT},
    ),
    "deepseek-enclosed": (
        byte_level(["<|b|>", "<|e|>"], bos="<|b|>", pre_tokenizer=DEEPSEEK_SPLITS),
        DEEPSEEK | {"chat_template": enclosed(DEEPSEEK_CHAT, "{{ ' ' + m.content + eos_token }}")},
    ),
    "llama3": (
        byte_level(LLAMA_MARKS, bos="<|b|>"),
        {"bos_token": "<|b|>", "eos_token": "<|b|>", "chat_template": LLAMA3},
    ),
}


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def write(directory: Path, vocabulary: dict[str, Any] | bytes, config: dict[str, Any]) -> Path:
    write_tokenizer(directory, None if isinstance(vocabulary, bytes) else vocabulary, **config)
    if isinstance(vocabulary, bytes):
        (directory / "tokenizer.model").write_bytes(vocabulary)
    return directory


def opened(directory: Path) -> TextTokenizer:
    files = find_tokenizer(directory)
    assert files is not None
    return files.open()


def sp(tmp_path: Path, **options: Any) -> TextTokenizer:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    return opened(tmp_path)


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), *KINDS[request.param])


def test_ids_are_those_of_apply_chat_template(directory: Path) -> None:
    import transformers

    ours, theirs = opened(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for count in range(1, len(TALK) + 1):
        messages = turns(*TALK[:count])
        last = messages[-1]["role"]
        ids, is_label = encode_conversation(read_messages(messages, last=last), ours)
        asks = last == "user"
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=asks, return_dict=False)
        assert any(is_label) == (not asks)
    if "{% generation" in str(ours.template):
        ids, is_label = encode_conversation(read_messages(turns(*TALK[:4])), ours)
        masked = theirs.apply_chat_template(turns(*TALK[:4]), return_dict=True, return_assistant_tokens_mask=True)
        assert (ids, is_label) == (masked["input_ids"], [bool(mask) for mask in masked["assistant_masks"]])


def test_labels_are_the_answers_with_their_ends_and_prompts_are_prefixes(directory: Path) -> None:
    tokenizer = opened(directory)
    messages = read_messages(turns(*TALK[:4]))
    ids, is_label = encode_conversation(messages, tokenizer)
    labels = [number for number, label in zip(ids, is_label, strict=True) if label]
    [end] = {labels[-1]} & {token.id for token in tokenizer.specials.values()}
    parts = tokenizer.decode([ord("\n") if number == end else number for number in labels])
    assert labels.count(end) == 2 and end in end_token_ids(tokenizer)
    first, second = (labels[: labels.index(end)], labels[labels.index(end) + 1 : -1])
    assert tokenizer.decode(first).strip() == "router loss" and tokenizer.decode(second).strip() == "two\nlines", parts
    for count in (1, 3):
        prompt, none = encode_conversation(messages[:count], tokenizer)
        assert (
            prompt == ids[: len(prompt)] and is_label[len(prompt)] and not is_label[len(prompt) - 1] and not any(none)
        )
    unlearned = [messages[0], messages[1]._replace(learn=False), *messages[2:]]
    assert encode_conversation(unlearned, tokenizer)[0] == ids
    assert sum(encode_conversation(unlearned, tokenizer)[1]) == len(second) + 1


def test_no_text_of_a_message_becomes_a_special_token(directory: Path) -> None:
    tokenizer = opened(directory)
    special = {token.id: text for text, token in tokenizer.specials.items()}

    def marks(user: str, assistant: str) -> list[str]:
        ids, _ = encode_conversation([Message("user", user), Message("assistant", assistant, True)], tokenizer)
        assert user.strip() in tokenizer.decode(ids) and assistant.strip() in tokenizer.decode(ids)
        return [special[number] for number in ids if number in special]

    expected = marks("x", "y")
    for text in tokenizer.specials:
        for shown in (text, f"a {text} b", f"{text}{text}", text[:-1], text[1:], f"{text[:2]}{text}"):
            assert marks(shown, "y") == marks("x", shown) == expected
    for text in (*HARD, "\ufdd0\ufdd1\ufdd2", "{{ bos_token }}{% raw %}"):
        if text.strip():
            assert marks(text, text) == expected


def test_added_words_that_a_template_uses_are_tokens_in_answers_only(tmp_path: Path) -> None:
    content = byte_level(["<|end|>", *CHAT])
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 323, "content": "<think>", "special": False})
    talk = [Message("user", "a <think> b"), Message("assistant", "<think> c", True)]
    for template, count in ((CHATML, 2), (CHATML + "{% if messages[9] %}<think>{% endif %}", 1)):
        tokenizer = opened(write(tmp_path, content, QWEN | {"chat_template": template}))
        ids, _ = encode_conversation(talk, tokenizer)
        assert ids.count(323) == count and tokenizer.decode(ids).count("<think>") == 2
    assert tokenizer.encode("<think>") == [323]


def test_white_space_that_a_token_takes_is_left_out(tmp_path: Path) -> None:
    import transformers

    content = byte_level(["<|end|>", *CHAT])
    for entry in content["added_tokens"]:
        entry |= {"rstrip": True, "lstrip": entry["content"] == "<|im_end|>"}
    directory = tmp_path
    messages = turns(("user", "the model "), ("assistant", " \n loss  "), ("user", " x"))
    # With the second template, the white space before an answer is that of the template and of the answer.
    for template in (CHATML, CHATML.replace("assistant\n", "\n").replace("+ m.role + '\n'", "+ '\n'")):
        write(tmp_path, content, QWEN | {"chat_template": template})
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert encode_conversation(read_messages(messages, last="user"), opened(directory))[0] == expected


def test_an_answer_that_is_enclosed_with_a_line_break_ends_with_its_special_token(tmp_path: Path) -> None:
    import transformers

    template = ENCLOSED.replace("{% endgeneration %}", "{{ '\n' }}{% endgeneration %}").replace(
        "{{ '\n' }}{% endfor", "{% endfor"
    )
    directory = write(tmp_path, byte_level(["<|end|>", *CHAT]), QWEN | {"chat_template": template})
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    masked = theirs.apply_chat_template(turns(*TALK[:4]), return_dict=True, return_assistant_tokens_mask=True)
    ids, is_label = encode_conversation(read_messages(turns(*TALK[:4])), opened(directory))
    assert (ids, is_label) == (masked["input_ids"], [bool(mask) for mask in masked["assistant_masks"]])
    assert end_token_ids(opened(directory)) == (320, 322)


def test_control_pieces_of_mistral_are_used_without_a_template(tmp_path: Path) -> None:
    tokenizer = sp(tmp_path, control_symbols=INST)
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    begin, end = map(model.piece_to_id, INST)

    def prompt(*pairs: tuple[str, str]) -> list[int]:
        return encode_conversation(read_messages(turns(*pairs), last="user"), tokenizer)[0]

    # The rules of mistral-common for v2 and v3: every part is encoded alone, with the model's space before it, and the
    # system message is in the last message of the user.
    assert prompt(("user", "the model")) == [1, begin, *model.encode("the model"), end]
    literal = "the [/INST] </s>"
    assert prompt(("user", literal)) == [1, begin, *model.encode(literal), end]
    asked = prompt(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    second = [begin, *model.encode("s\n\nc"), end]
    assert asked == [1, begin, *model.encode("a"), end, *model.encode("b"), 2, *second]
    ids, is_label = encode_conversation(read_messages(turns(("user", "a"), ("assistant", "b"))), tokenizer)
    assert ids[-len(model.encode("b")) - 1 :] == [*model.encode("b"), 2] and sum(is_label) == len(model.encode("b")) + 1
    # So the prompt of the first answer is not the beginning of such a conversation.
    whole = turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(DataError, match=r"^expected a chat template in which each prompt is the beginning[^\n]*$"):
        encode_conversation(read_messages(whole), tokenizer)
    last_only = read_messages([*whole[:2], {**whole[2], "weight": 0}, *whole[3:]])
    assert sum(encode_conversation(last_only, tokenizer)[1]) == len(model.encode("d")) + 1


def test_text_format_of_mistral_v1_without_template_or_pieces(tmp_path: Path) -> None:
    tokenizer = sp(tmp_path)
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    messages = read_messages(turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")), last="user")
    first = [1, *model.encode("[INST] s\n\na [/INST]"), *model.encode("b"), 2]
    assert encode_conversation(messages, tokenizer)[0] == [*first, *model.encode("[INST] c [/INST]")]


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (V1, "expected a conversation that the chat template takes, found: roles must be user and assistant"),
        ("{% for m in messages %}", "expected a conversation that the chat template takes, found: Unexpected end of"),
        ("{{ messages[9].role.x }}", "expected a conversation that the chat template takes, found: "),
        ("{{ ''.__class__.__mro__ }}", "expected a conversation that the chat template takes, found: access to attr"),
        ("{{ messages.append(1) }}", "expected a conversation that the chat template takes, found: "),
        ("{{ messages[-1].content }}", "expected a chat template in which each prompt is the beginning"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "expected a chat template in which each prompt"),
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path: Path, template: str, complaint: str) -> None:
    tokenizer = opened(write(tmp_path, byte_level(["<s>", "</s>"]), MISTRAL | {"chat_template": template}))
    with pytest.raises(DataError, match=rf"^{complaint}[^\n]*$"):
        encode_conversation(read_messages(turns(("system", "s"), *TALK[:2])), tokenizer)


def test_a_prompt_without_text_is_refused(tmp_path: Path) -> None:
    template = MISTRAL | {"chat_template": "{{ missing }}", "add_bos_token": False}
    tokenizer = opened(write(tmp_path, byte_level(["<s>", "</s>"]), template))
    with pytest.raises(DataError, match=r"^expected a conversation .*, found: it gives no text$"):
        encode_conversation(read_messages(turns(("user", "x")), last="user"), tokenizer)


def test_a_store_of_conversations_names_tokenizer_and_conversation(tmp_path: Path) -> None:
    lines = [turns(("user", f"the {i} model"), ("assistant", f"loss {i}")) for i in range(40)]
    path = tmp_path / "chats.jsonl"
    directory = write(tmp_path / "t", *KINDS["chatml"])
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    config = {"kind": "sft", "paths": (str(path),), "cache": str(tmp_path / "cache"), "heldout_fraction": 0.2}
    store = prepare(DataConfig(**config, tokenizer=str(directory)))
    [row] = store.summary()
    ids = [encode_conversation(read_messages(messages), store.tokenizer)[0] for messages in lines]
    assert store.train.num_tokens + store.heldout.num_tokens == sum(map(len, ids))
    labels = np.concatenate([store.heldout.row(i, 64).labels_S for i in range(store.heldout.num_rows(64))])
    assert row["heldout_bytes"] == store.tokenizer.token_bytes()[labels[labels != IGNORE]].sum()
    assert row["heldout_bytes"] in range(6 * len(labels[labels == 322]), 7 * len(labels[labels == 322]) + 1)
    assert effective_template(store.tokenizer) == CHATML
    refusing = write(tmp_path / "r", KINDS["chatml"][0], QWEN | {"chat_template": "{{ raise_exception('no') }}"})
    with pytest.raises(DataError, match=rf"^data.tokenizer={refusing}: expected a conversation .* starts with '\[INST"):
        prepare(DataConfig(**config, tokenizer=str(refusing)))


def test_marks_that_are_no_special_tokens_are_text_in_a_question(tmp_path: Path) -> None:
    """A tokenizer.json can have [INST] as a word, and a sentencepiece model as a user-defined piece."""
    content = byte_level(["<s>", "</s>", *INST, "<h1>"], bos="<s>")
    for entry in content["added_tokens"][2:]:
        entry["special"] = False
    json_one = opened(write(tmp_path / "json", content, MISTRAL | {"chat_template": TEKKEN}))
    model = sentencepiece_model(user_defined_symbols=[*INST, "<h1>"])
    model_one = opened(write(tmp_path / "model", model, MISTRAL | {"chat_template": TEKKEN}))
    for tokenizer in (json_one, model_one):
        begin, end, heading = (tokenizer.words[text].id for text in (*INST, "<h1>"))
        talk = [Message("user", "a [/INST] b <h1> [INST]"), Message("assistant", "c", learn=True)]
        ids, _ = encode_conversation(talk, tokenizer)
        assert (ids.count(begin), ids.count(end), ids.count(heading)) == (1, 1, 1)
        assert tokenizer.decode(ids).count("[/INST]") == 2


def test_tokens_that_only_the_config_calls_special_are_special(tmp_path: Path) -> None:
    content = byte_level(["<s>", *CHAT])
    for entry in content["added_tokens"]:
        entry["special"] = False
    decoder = {str(entry["id"]): {"content": entry["content"], "special": True} for entry in content["added_tokens"]}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder, "chat_template": CHATML}
    tokenizer = opened(write(tmp_path, content, config))
    assert tokenizer.specials.keys() == {"<s>", *CHAT} and tokenizer.decode(tokenizer.encode("<s>")) == "<s>"
