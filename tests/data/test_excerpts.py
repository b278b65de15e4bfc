"""Excerpts of documents, the rows that they are packed into, and the text of their tokens."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.packing import pack_excerpts
from data.tokens.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokens.marks import Marks
from data.tokens.split import Excerpt, TokenSplit
from data.tokens.store import Store
from data.tokens.tokenizer import Tokenizer, token_texts
from tests.tokenizers import byte_level, sentencepiece_model


def split_of(lengths: list[int], domains: list[int]) -> TokenSplit:
    """A split whose token ids are the numbers of their places in the stream."""
    split = TokenSplit.__new__(TokenSplit)
    split.num_tokens = sum(lengths)
    split._starts, split._domain_ids = np.cumsum([0, *lengths[:-1]]), np.array(domains, dtype=np.uint8)
    split.tokens = lambda start, stop: np.arange(start, stop)  # type: ignore[method-assign]
    return split


LENGTHS, DOMAINS = [100, 3, 50, 700, 1, 60, 200], [0, 2, 0, 1, 1, 2, 0]


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 10, 64, 300, 333, 1000, 1114, 5000])
@pytest.mark.parametrize("longest", [1, 7, 128])
def test_excerpts_have_what_they_say_once_and_even_shares(num_tokens: int, longest: int) -> None:
    excerpts = split_of(LENGTHS, DOMAINS).excerpts(num_tokens, longest)
    places = np.concatenate([excerpt.tokens_T for excerpt in excerpts]) if excerpts else np.zeros(0, int)
    assert len(places) == min(num_tokens, sum(LENGTHS)) == len(set(places.tolist()))
    starts = np.cumsum([0, *LENGTHS])
    for tokens_T, document, domain in excerpts:
        assert 1 <= len(tokens_T) <= longest and (np.diff(tokens_T) == 1).all()
        assert starts[document] <= tokens_T[0] <= tokens_T[-1] < starts[document + 1] and DOMAINS[document] == domain
    sizes = [sum(len(e.tokens_T) for e in excerpts if e.domain == domain) for domain in range(3)]
    available = [350, 701, 63]
    for size, whole in zip(sizes, available, strict=True):
        # A domain has its share, up to rounding, or all of its tokens.
        assert size == whole or size >= num_tokens // 3 >= max(sizes) - num_tokens


def test_excerpts_are_spread_over_the_text_of_a_domain() -> None:
    excerpts = split_of([1000, 1000], [0, 0]).excerpts(80, 20)
    assert [(e.document, int(e.tokens_T[0]), len(e.tokens_T)) for e in excerpts] == [
        (0, 0, 20), (0, 500, 20), (1, 1000, 20), (1, 1500, 20),
    ]  # fmt: skip


def test_a_small_domain_leaves_the_rest_of_its_share() -> None:
    excerpts = split_of([10, 500, 500], [0, 1, 2]).excerpts(100, 64)
    assert [sum(len(e.tokens_T) for e in excerpts if e.domain == domain) for domain in range(3)] == [10, 45, 45]


def test_excerpts_of_a_store(store: Store) -> None:
    split = store.heldout
    excerpts: list[Excerpt] = split.excerpts(600, 50)
    assert sum(len(excerpt.tokens_T) for excerpt in excerpts) == 600
    texts = {}
    for number in range(len(split._starts)):
        stop = split._starts[number + 1] if number + 1 < len(split._starts) else split.num_tokens
        texts[number] = split.tokens(int(split._starts[number]), int(stop)).tolist()
    for tokens_T, document, domain in excerpts:
        tokens = tokens_T.tolist()
        assert any(texts[document][at : at + len(tokens)] == tokens for at in range(len(texts[document])))
        assert split._domain_ids[document] == domain
    assert {excerpt.domain for excerpt in excerpts} == {0, 1, 2}


def test_rows_take_the_next_excerpts_that_fit_whole() -> None:
    assert pack_excerpts([], 8) == []
    rows = pack_excerpts([3, 5, 1, 8, 8, 2, 7], 8)
    assert [list(row) for row in rows] == [[0, 1], [2], [3], [4], [5], [6]]


def test_the_text_of_each_token(tmp_path: Path, store: Store) -> None:
    (tmp_path / "llama.model").write_bytes(sentencepiece_model())
    marks = Marks(named={"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    content = json.dumps(byte_level(["<|begin|>", "<|end|>"], "<|begin|>")).encode()
    for tokenizer in (
        store.tokenizer,
        Tokenizer(tmp_path / "llama.model"),
        HuggingFaceTokenizer(content, marks, "data.tokenizer=x"),
    ):
        text = "the model é 你🙂\n\tuser 12 end"
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        texts = token_texts(tokenizer, ids)
        names = {token.id: name for name, token in tokenizer.specials.items()}
        assert len(texts) == len(ids) and (texts[0], texts[-1]) == (names[ids[0]], names[ids[-1]])
        assert "".join(texts[1:-1]) == tokenizer.prefix + text
        assert "é" in "".join(texts) and max(map(len, texts[1:-1])) < 12
        smile = tokenizer.encode("🙂", continues=True)
        assert token_texts(tokenizer, smile) == ["🙂", *[""] * (len(smile) - 1)]
        assert token_texts(tokenizer, smile[:2]) == ["\ufffd"] * 2
