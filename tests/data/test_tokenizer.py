import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from data.config import DataConfig
from data.corpora.corpus import open_corpus
from data.tokens.store import Store, prepare
from data.tokens.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
HARD = [
    "",
    " ",
    "  leading",
    "trailing  ",
    "\n",
    "\n\n\tdef f(x):\n        return x\r\n",
    "a\u2581b \u2581\u2581",
    "na\u00efve \U0001f600\U0001f469\u200d\U0001f467 \u6f22\u5b57 e\u0301",
    "<s></s><unk><0x0A>",
    "\0 \x7f \ufeff \u2028 \u00a0",
    "\u2047 \u2585",
    "1234567",
    " " * 1000,
    "x" * 5000,
]


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_every_text_comes_back(store: Store, text: str) -> None:
    ids = store.tokenizer.encode(text)
    assert store.tokenizer.decode(ids) == text
    assert store.tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_bytes_of_tokens_sum_to_the_bytes_of_each_document(store: Store, tiny: DataConfig) -> None:
    sizes = [len(document.text.encode()) for document in open_corpus(tiny).documents()]
    found = []
    for split in (store.train, store.heldout):
        stream = split.tokens(0, split.num_tokens)
        ends = np.flatnonzero(stream == store.tokenizer.eos_id) + 1
        found += [int(store.tokenizer.token_bytes()[ids].sum()) for ids in np.split(stream, ends)[:-1]]
    assert sorted(found) == sorted(sizes)


def test_marks_and_ids_beyond_the_vocabulary_are_no_text(store: Store) -> None:
    tokenizer = store.tokenizer
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hill"), 0, 499_999, tokenizer.eos_id]) == "hill"
    assert tokenizer.token_bytes()[:3].tolist() == [0, 0, 0]


def test_runs_of_spaces_and_line_ends_are_pieces_and_digits_stand_alone() -> None:
    text = ["def f(x):\n        return 1234\n" * 50]
    model = train_tokenizer(text, 300)
    assert model == train_tokenizer(text, 300)
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(300)]
    assert "\u2581" * 8 in pieces and ":\n" in "".join(pieces)
    assert processor.encode("1234", out_type=str) == ["1", "2", "3", "4"]


def test_a_model_that_puts_a_space_before_text_still_does(tmp_path: Path, tiny: DataConfig) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the wind blows leaves over the hill"] * 5),
        model_prefix=str(tmp_path / "given"), vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    small = {"kind": "embedded", "cache": str(tmp_path), "code_bytes": 0, "prose_bytes": 0, "arithmetic_bytes": 9_000}
    store = prepare(DataConfig(**small, tokenizer=str(tmp_path / "given.model")))
    tokenizer = store.tokenizer
    assert tokenizer.prefix == " " and tokenizer.decode(tokenizer.encode(" the  wind")) == "  the  wind"
    assert tokenizer.decode(tokenizer.encode(" the  wind", continues=True)) == " the  wind"
    assert tokenizer.encode("the wind") == sentencepiece.SentencePieceProcessor(f"{tmp_path}/given.model").encode(
        "the wind"
    )
    assert store.manifest["vocab_size"] == Tokenizer(tmp_path / "given.model").vocab_size


def test_models_that_cannot_keep_text_are_refused(tmp_path: Path) -> None:
    import sentencepiece

    def train(name: str, **options: object) -> str:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["The wind blows 0123456789 leaves over the hill\n"] * 5),
            model_prefix=str(tmp_path / name), vocab_size=310, hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
        return str(tmp_path / f"{name}.model")

    common = {"kind": "embedded", "cache": str(tmp_path), "code_bytes": 9_000, "prose_bytes": 0, "arithmetic_bytes": 0}
    with pytest.raises(DataError, match=r"^data.tokenizer=.*lossy.model: expected a model with byte_fallback"):
        Tokenizer(train("lossy"))
    folding = train("folding", byte_fallback=True, normalization_rule_name="nmt_nfkc_cf")
    with pytest.raises(
        DataError,
        match=r"folding.model: expected a model that keeps text as it is .* found a change, in the doc",
    ):
        prepare(DataConfig(**common, tokenizer=folding))
    (tmp_path / "broken.model").write_bytes(b"not a model")
    for name in ("broken", "missing"):
        with pytest.raises(DataError, match=rf"^data.tokenizer=.*{name}.model: expected a sentencepiece model"):
            prepare(DataConfig(**common, tokenizer=str(tmp_path / f"{name}.model")))


@pytest.mark.parametrize(
    ("size", "expected"), [(5000, r"at most \d{3}, the number of pieces"), (300, r"at least \d{3}, the number of char")]
)
def test_a_vocabulary_that_does_not_fit_the_text_names_one_that_does(size: int, expected: str) -> None:
    letters = "".join(map(chr, range(0x400, 0x450)))
    with pytest.raises(DataError, match=rf"^data.vocab_size={size}: expected {expected}[^\n]*$"):
        train_tokenizer([f"{letters} wind\n" * 3], size)


def test_the_embedded_corpus_does_not_depend_on_the_hash_seed(tiny: DataConfig) -> None:
    program = (
        "import hashlib; from data.corpora.embedded import EmbeddedCorpus; c = EmbeddedCorpus(60_000, 40_000, 30_000);"
        "print(c.fingerprint(), hashlib.sha256(repr(list(c.documents())).encode()).hexdigest())"
    )
    run = [sys.executable, "-c", program]
    first, second = (
        subprocess.run(run, env=os.environ | {"PYTHONHASHSEED": seed}, cwd=ROOT, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    )
    assert len(first) > 100 and first == second
    assert open_corpus(tiny).fingerprint() == first.decode().split()[0]
