"""Tokenizers of published kinds: the ids of transformers, exact bytes, and refusals of contradictory files."""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from data.config import DataConfig
from data.packing import IGNORE
from data.tokens.files import find_tokenizer, given_tokenizer
from data.tokens.store import prepare, store_key
from data.tokens.tokenizer import TextTokenizer
from tests.data.test_tokenizer import HARD
from tests.tokenizers import (
    DEEPSEEK_SPLITS,
    QWEN_SPLITS,
    byte_level,
    sample_lines,
    sentencepiece_like,
    sentencepiece_model,
    write_tokenizer,
)

CHATML = ["<|im_start|>", "<|im_end|>"]
WITH_PREFIX = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
KINDS: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "gpt2": (lambda: byte_level(["<|end|>"]), {"bos_token": "<|end|>", "eos_token": "<|end|>"}),
    "qwen": (
        lambda: byte_level(CHATML, normalizer={"type": "NFC"}, pre_tokenizer=QWEN_SPLITS),
        {"bos_token": None, "eos_token": "<|im_end|>"},
    ),
    "deepseek": (
        lambda: byte_level(["<|b|>", "<|e|>"], bos="<|b|>", pre_tokenizer=DEEPSEEK_SPLITS),
        {"bos_token": "<|b|>", "eos_token": "<|e|>"},
    ),
    "llama3": (lambda: byte_level(["<|b|>", "<|e|>"], bos="<|b|>"), {"bos_token": "<|b|>", "eos_token": "<|e|>"}),
    "prefix": (lambda: byte_level(["<|e|>"], pre_tokenizer=WITH_PREFIX), {"eos_token": "<|e|>"}),
    "llama": (lambda: sentencepiece_like(CHATML, legacy=False), {"bos_token": "<s>", "eos_token": "<|im_end|>"}),
    "llama-legacy": (lambda: sentencepiece_like(CHATML, legacy=True), {"bos_token": "<s>", "eos_token": "</s>"}),
}


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content, config = KINDS[request.param]
    return write_tokenizer(tmp_path_factory.mktemp(request.param), content(), **config)


def opened(directory: Path) -> TextTokenizer:
    files = find_tokenizer(directory)
    assert files is not None
    return files.open()


def test_ids_are_those_of_transformers_and_bytes_are_exact(directory: Path) -> None:
    import transformers

    ours, theirs = opened(directory), transformers.AutoTokenizer.from_pretrained(directory)
    assert (ours.vocab_size, ours.eos_id, ours.end_ids) == (len(theirs), theirs.eos_token_id, (theirs.eos_token_id,))
    sizes = ours.token_bytes()
    for text in [*HARD, *sample_lines(20), "<|im_start|>user", "a<|e|> b <|end|>", " x"]:
        # transformers takes this character for a space, and changes text that is not in the Unicode form NFC.
        if "▁" not in text and unicodedata.is_normalized("NFC", text):
            assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
            assert ours.encode_prompt(text) == theirs(text).input_ids
        ids = ours.encode(text, continues=True)
        assert ours.decode(ids) == text and sizes[ids].sum() == len(text.encode())
        assert ours.decode(ours.encode(text)) in (text, ours.prefix + text)
    assert not any(sizes[token.id] for token in ours.specials.values())


def test_a_store_of_such_a_tokenizer_has_the_documents_and_its_files(directory: Path, tmp_path: Path) -> None:
    lines = [f"{line} é\n" * 3 for line in sample_lines(60)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config = {"kind": "files", "paths": (str(path),), "cache": str(tmp_path / "cache"), "heldout_fraction": 0.2}
    store = prepare(DataConfig(**config, tokenizer=str(directory)))
    tokenizer = store.tokenizer
    ids = store.train.tokens(0, store.train.num_tokens)
    texts = [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)[:-1]]
    assert set(texts) <= {tokenizer.prefix + line for line in lines} and len(texts) > 30
    # Without a token before a text, its first token is no label.
    row = store.train.row(0, 64)
    first = int(tokenizer.bos_id is None)
    ends = np.flatnonzero(row.tokens_S == tokenizer.eos_id)
    assert (row.labels_S[ends] == IGNORE).all() and (row.labels_S[ends + 1] != IGNORE).all() and len(ends) and first < 2
    assert {name for name, _ in store.tokenizer_files.contents()} == {"tokenizer.json", "tokenizer_config.json"}
    # Another file is another store.
    changed = shutil.copytree(directory, tmp_path / "changed")
    (changed / "chat_template.jinja").write_text("{{ bos_token }}")
    keys = {store_key(DataConfig(**config, tokenizer=str(d)), "x") for d in (directory, changed, directory)}
    assert len(keys) == 2
    assert given_tokenizer(str(directory / "tokenizer.json")).sha256() == given_tokenizer(str(directory)).sha256()


def test_a_sentencepiece_model_with_tokens_in_a_config_or_json(tmp_path: Path) -> None:
    import sentencepiece

    directory = write_tokenizer(tmp_path / "a", None, bos_token="<s>", eos_token="<|im_end|>", add_bos_token=True)
    (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    with pytest.raises(DataError, match="expected a model with byte_fallback and ids for <s> and </s>"):
        opened(directory)
    (directory / "added_tokens.json").write_text(json.dumps({text: 320 + i for i, text in enumerate(CHATML)}))
    tokenizer = opened(directory)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (322, 1, 321)
    assert tokenizer.encode("<|im_end|> the") == plain.encode("<|im_end|> the")
    assert tokenizer.encode_prompt("<|im_start|>the")[:2] == [1, 320] and tokenizer.decode([320, 321]) == ""
    # The ids of a tokenizer.json count. It must have the same pieces.
    (directory / "added_tokens.json").unlink()
    write_tokenizer(directory, sentencepiece_like(CHATML, legacy=True), bos_token="<s>", eos_token="<|im_end|>")
    with pytest.raises(DataError, match=r"expected the same pieces in tokenizer.json and tokenizer.model, found"):
        opened(directory)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda spec: spec["model"].update(type="x"), "expected a tokenizer.json that can be read"),
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "keeps text as it is .*normalizer Lowercase"),
        (lambda spec: spec.update(pre_tokenizer={"type": "WhitespaceSplit"}), "keeps text as it is .*WhitespaceSplit"),
        (lambda spec: spec.update(added_tokens=[]), "expected the same special tokens in all its files, found <.e.>"),
    ],
)
def test_a_json_that_changes_text_or_contradicts_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    content = byte_level(["<|e|>"])
    change(content)
    write_tokenizer(tmp_path, content, eos_token="<|e|>")
    with pytest.raises(DataError, match=rf"^data.tokenizer={tmp_path}: .*{complaint}[^\n]*$"):
        given_tokenizer(str(tmp_path)).open()


def test_other_files_are_carried_compared_or_refused_by_name(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level(["<|e|>"]))
    with pytest.raises(DataError, match=r": expected eos_token in a tokenizer_config.json or eos_token_id in a gener"):
        opened(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [320]}')
    assert opened(tmp_path).eos_id == 320
    for name, content, complaint in (
        ("generation_config.json", '{"eos_token_id": 321}', "found 321"),
        ("generation_config.json", "[", "generation_config.json: damaged: not JSON"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template: expected text, found 3"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "added_tokens_decoder: expected an id"),
        ("added_tokens.json", '{"<|x|>": 400}', "found <.x.> with id None in tokenizer.json and id 400"),
    ):
        changed = shutil.copytree(tmp_path, tmp_path / "changed", ignore=shutil.ignore_patterns("changed"))
        (changed / name).write_text(content)
        with pytest.raises(DataError, match=complaint):
            opened(changed)
        shutil.rmtree(changed)
    (tmp_path / "tokenizer.json").unlink()
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(320))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 321]}')
    with pytest.raises(DataError, match=r": expected tokens of the model as eos_token_id .*found 321, and 320 tokens"):
        opened(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"expected a tokenizer.model or a tokenizer.json, found only tekken.json; conv"
    ):
        find_tokenizer(tmp_path)
    for name, seed in (("tokenizer.model", 320), ("tokenizer.model.v3", 330)):
        (tmp_path / name).write_bytes(sentencepiece_model(seed))
    with pytest.raises(
        DataError, match=r"one sentencepiece model, found different ones: tokenizer.model, tokenizer.mod"
    ):
        find_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    files = find_tokenizer(tmp_path)
    assert files is not None and files.open().vocab_size == 330
    assert [name for name, _ in files.contents()] == [
        "tokenizer.model.v3", "tokenizer_config.json", "generation_config.json", "tekken.json"
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"^data.tokenizer=.*x.json: expected a file named tokenizer.json"):
        given_tokenizer(f"{tmp_path}/x.json")


def test_a_padding_token_without_an_id_changes_nothing(tmp_path: Path) -> None:
    tokenizer = opened(write_tokenizer(tmp_path, byte_level(["<|e|>"]), eos_token="<|e|>", pad_token="[PAD]"))
    assert tokenizer.specials.keys() == {"<|e|>"} and tokenizer.vocab_size == 321


def test_add_prefix_space_is_followed_or_refused(tmp_path: Path) -> None:
    import transformers

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    keys: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    for value in (None, True, False):
        write_tokenizer(tmp_path, add_prefix_space=value, **keys)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert opened(tmp_path).encode("the model") == theirs.encode("the model", add_special_tokens=False)
    write_tokenizer(tmp_path / "json", sentencepiece_like([], legacy=False), add_prefix_space=False, **keys)
    with pytest.raises(DataError, match=r"add_prefix_space=false: expected the same as in tokenizer.json, found a sp"):
        opened(tmp_path / "json")
    generic = keys | {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert opened(write_tokenizer(tmp_path / "json", add_prefix_space=False, **generic)).prefix == " "
