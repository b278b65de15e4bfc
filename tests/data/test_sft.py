"""Conversations in a token store and in rows: only answers are labels, and no row splits a conversation that fits."""

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError, DataError
from data.config import DataConfig
from data.corpora.chat import conversation_text
from data.corpora.messages import read_messages
from data.loader import Loader
from data.packing import IGNORE, pack_row, whole_document_rows
from data.tokens import build
from data.tokens.build import baselines
from data.tokens.conversation import encode_conversation
from data.tokens.store import Store, prepare

SEQ_LEN = 256


def conversation(number: int) -> list[dict[str, Any]]:
    """Return one to three questions with answers of different lengths.

    Every seventh has a system message. In every fifth, only the last answer is learned.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Answer in words."}] if number % 7 == 0 else []
    for turn in range(number % 3 + 1):
        question = f"What is {number} plus {turn}" + " and no less" * (number % 4) + "?"
        messages.append({"role": "user", "content": question})
        messages.append(
            {"role": "assistant", "content": f"It is {number + turn}, or ▁{number}\n" + "so " * (number % 5)}
        )
        if number % 5 == 0 and turn < number % 3:
            messages[-1]["weight"] = 0
    return messages


def write(path: Path, lines: Iterable[Any]) -> str:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    directory = tmp_path_factory.mktemp("chats")
    path = write(directory / "a.jsonl", ({"messages": conversation(i), "id": i} for i in range(200)))
    cache = str(tmp_path_factory.mktemp("cache"))
    return DataConfig(kind="sft", paths=(path,), cache=cache, vocab_size=360, heldout_fraction=0.1)


@pytest.fixture(scope="module")
def chats(config: DataConfig) -> Store:
    return prepare(config)


@pytest.mark.parametrize("side", ["train", "heldout"])
def test_rows_hold_whole_conversations_whose_answers_are_the_labels(chats: Store, side: str) -> None:
    """The rows contain every conversation once, undivided, with exactly the tokens of its answers as labels."""
    split, tokenizer = getattr(chats, side), chats.tokenizer
    written = {}
    for number in range(200):
        ids, supervised = encode_conversation(read_messages(conversation(number)), tokenizer)
        labels = [i if is_answer else IGNORE for i, is_answer in zip(ids[1:], supervised[1:], strict=True)]
        written[tuple(ids)] = [*labels, IGNORE]
    found = []
    for i in range(split.num_rows(SEQ_LEN)):
        row = split.row(i, SEQ_LEN)
        for document in range(row.documents_S.max() + 1):
            where = row.documents_S == document
            ids, labels = row.tokens_S[where].tolist(), row.labels_S[where].tolist()
            if len(ids) + np.flatnonzero(where)[0] == SEQ_LEN and ids[-1] != tokenizer.eos_id:
                # The last token of the conversation was only a label of this row, not an input.
                ids, labels = [*ids, tokenizer.eos_id], [*labels, IGNORE]
            assert row.positions_S[where].tolist() == list(range(where.sum()))
            assert labels == written[tuple(ids)]
            found.append(tuple(ids))
        assert (row.labels_S[row.documents_S < 0] == IGNORE).all()
    assert (
        len(found) == len(set(found)) == sum(d["documents"] for d in chats.manifest["splits"][side]["domains"].values())
    )


def test_bits_per_byte_and_baselines_are_of_the_answers(chats: Store) -> None:
    rows = [chats.heldout.row(i, SEQ_LEN) for i in range(chats.heldout.num_rows(SEQ_LEN))]
    labels = np.concatenate([row.labels_S for row in rows])
    [row] = chats.summary()
    starts = np.load(chats.directory / "heldout-starts.npy").tolist()
    conversations = {conversation_text(each): each for each in map(read_messages, map(conversation, range(200)))}
    size = chats.tokenizer.token_bytes()[labels[labels != IGNORE]].sum()
    assert 0 < size == row["heldout_bytes"] < chats.manifest["splits"]["heldout"]["domains"][row["domain"]]["bytes"]
    bounds = zip(starts, [*starts[1:], chats.heldout.num_tokens], strict=True)
    texts = [chats.tokenizer.decode(chats.heldout.tokens(start, stop)) for start, stop in bounds]
    answers = (f" {message.content}" for text in texts for message in conversations[text] if message.learn)
    assert row["gzip_bits_per_byte"] == baselines("".join(answers).encode())["gzip_bits_per_byte"]


def test_the_store_is_found_again_and_shards_change_nothing(
    config: DataConfig, chats: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(config, verify=False).directory == chats.directory
    assert "train-answers.npy" in chats.manifest["files"]
    monkeypatch.setattr(build, "SHARD_TOKENS", 1000)
    small = prepare(DataConfig(**{**vars(config), "cache": str(tmp_path)}))
    assert len(small.manifest["splits"]["train"]["shards"]) > 3
    for i in range(chats.train.num_rows(SEQ_LEN)):
        for mine, other in zip(small.train.row(i, SEQ_LEN), chats.train.row(i, SEQ_LEN), strict=True):
            assert mine.tolist() == other.tolist()


def test_whole_document_rows_by_hand() -> None:
    # Documents of 3, 2, 4, 9 and 2 tokens in rows of S = 4 inputs (5 tokens). The document of 9 tokens takes two rows:
    # its fifth token is the last label of the first row and the first input of the second.
    starts = np.array([0, 3, 5, 9, 18])
    assert whole_document_rows(starts, 20, 4).tolist() == [[0, 5], [5, 9], [9, 14], [13, 18], [18, 20]]
    by_three = [[0, 3], [3, 5], [5, 9], [9, 13], [12, 16], [15, 18], [18, 20]]
    assert whole_document_rows(starts, 20, 3).tolist() == by_three
    assert whole_document_rows(starts, 20, 100).tolist() == [[0, 20]]


@pytest.mark.parametrize("seq_len", [1, 2, 5, 16, 61])
def test_every_answer_token_is_a_label_once_however_short_the_rows(chats: Store, seq_len: int) -> None:
    split = chats.train
    labels = np.concatenate([split.row(i, seq_len).labels_S for i in range(split.num_rows(seq_len))])
    stream = split.tokens(0, split.num_tokens)
    answers = np.load(chats.directory / "train-answers.npy")
    assert labels[labels != IGNORE].tolist() == [int(t) for low, high in answers for t in stream[low:high]]


def test_supervision_masks_labels_and_nothing_else() -> None:
    tokens, starts = np.array([1, 5, 6, 2, 1, 7, 2]), np.array([4])
    domains = np.array([0, 1], dtype=np.uint8)
    supervised = np.array([0, 0, 1, 1, 0, 1, 1], dtype=bool)
    for cross in (False, True):
        plain = pack_row(tokens, starts, domains, 6, cross)
        masked = pack_row(tokens, starts, domains, 6, cross, supervised)
        assert masked.labels_S.tolist() == [IGNORE, 6, 2, IGNORE, 7, 2]
        for field in ("tokens_S", "positions_S", "documents_S", "domains_S"):
            assert getattr(masked, field).tolist() == getattr(plain, field).tolist()


def test_the_order_is_the_seeds_and_resuming_is_exact(chats: Store) -> None:
    def loader(rank: int = 0, world_size: int = 1) -> Loader:
        sizes = {"seq_len": SEQ_LEN, "global_batch": 4, "accumulation": 1, "rank": rank, "world_size": world_size}
        return Loader(chats.train, **sizes, seed=5, cross_documents=False)  # type: ignore[arg-type]

    alone = loader()
    whole = [alone.next_step()[0] for _ in range(30)]
    halves = [loader(rank, 2) for rank in range(2)]
    for half in halves:
        half.load_state_dict({**alone.state_dict(), "rows": 4 * 20})
    for expected in whole[20:]:
        labels = [row for half in halves for row in half.next_step()[0].labels_BS.tolist()]
        assert labels == expected.labels_BS.tolist()


def test_domains_keys_limits_and_gz(tmp_path: Path) -> None:
    lines = [{"chat": conversation(i), "topic": ("sums", "words")[i % 2], "note": None} for i in range(60)]
    path = write(tmp_path / "b.jsonl.gz", lines)
    shared: dict[str, Any] = {"kind": "sft", "paths": (path,), "cache": str(tmp_path), "vocab_size": 350}
    store = prepare(DataConfig(**shared, messages_key="chat", domain_key="topic", max_documents=40))
    assert store.domains == ("sums", "words")
    assert sum(row["documents"] for row in store.summary()) == 40


GOOD = json.dumps({"messages": conversation(1)})


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: expected a JSON object, found text that is not JSON (Expecting property name"),
        ("[]", "line 2: expected a JSON object, found list"),
        ('{"text": "a"}', "line 2: expected one of: messages; conversations; instruction and output; prompt"),
        ('{"messages": []}', "line 2: expected a list of messages, found none"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: message 1: expected the last message to be"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "line 2: message 1: expected role to be one of "),
        (GOOD.replace('"}]', '", "tool_calls": [{"id": "x"}]}]'), "line 2: message 4: tool_calls=[{'id': 'x'}]: "),
        ('{"messages": [{"role": "user", "content": ""}]}', "line 2: message 1: content: expected text, found none"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(DataError, match=f"^data.paths={path}: {re.escape(complaint)}") as caught:
        prepare(DataConfig(kind="sft", paths=(str(path),), cache=str(tmp_path / "cache")))
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a.txt: expected conversations in rows .*, found text$"):
        prepare(DataConfig(kind="sft", paths=(f"{tmp_path}/a.txt",), cache=str(tmp_path / "cache")))
    with pytest.raises(ConfigError, match=r"^paths=\[\]: expected at least one file, folder or glob$"):
        DataConfig(kind="sft")
