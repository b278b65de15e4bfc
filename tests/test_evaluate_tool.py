"""`scripts/evaluate.py` as a user runs it."""

import json
import math
import sys

import pytest
import torch
from torch.nn import functional as F

from data.tokens.files import find_tokenizer
from data.tokens.tokenizer import Tokenizer, train_tokenizer
from moe.model import ModelInputs
from scripts.evaluate import main
from tests.commands import run_python
from tests.test_generate_tool import CONFIG, TEXTS, write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory, its model and its tokenizer."""
    path = tmp_path_factory.mktemp("evaluate")
    (path / "tokenizer.model").write_bytes(train_tokenizer(TEXTS, CONFIG.vocab_size))
    return path / "m", write(path / "m", tokenizer=find_tokenizer(path)), Tokenizer(path / "tokenizer.model")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs the tool in this process and returns (exit status, stdout, stderr)."""

    def start(*arguments):
        given = ["precision=fp32", f"data.cache={tmp_path / 'cache'}", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["scripts/evaluate.py", *given])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return start


@torch.no_grad()
def nats_of(model, tokens, seq_len):
    """The cross-entropy of every token after the first, in rows of `seq_len` tokens without context before them."""
    total = 0.0
    for start in range(0, len(tokens) - 1, seq_len):
        row = torch.tensor([tokens[start : start + seq_len + 1]])
        logits_BSV = model(ModelInputs(row[:, :-1], torch.arange(row.shape[1] - 1).unsqueeze(0))).logits_BSV.double()
        total += F.cross_entropy(logits_BSV[0], row[0, 1:], reduction="sum").item()
    return total


def test_one_text_is_evaluated_whole(run, model, tmp_path):
    path, transformer, tokenizer = model
    text = "def f(a, b):\n    return a * 7 + b  # größer\n" * 3
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.txt").write_text(text, encoding="utf-8")
    code, out, _ = run(f"checkpoint={path}", f"data.paths=[{tmp_path / 'notes'}]", "seq_len=16", "format=json")
    result = json.loads(out)
    tokens = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    nats = nats_of(transformer, tokens, 16)
    assert code == 0 and result["tokens"] == len(tokens) - 1
    assert result["loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-6)
    found = result["domains"]["notes"]
    assert found["documents"] == 1 and found["bytes"] == len(text.encode()) == 138
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-6)
    assert len(result["router"]["max_vio"]) == CONFIG.num_moe_layers

    code, out, _ = run(f"checkpoint={path}", f"data.paths=[{tmp_path / 'notes'}]", "seq_len=16")
    assert code == 0 and f"Text: loss {result['loss']:.4f} nats per token" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "data.paths=[]: expected at least one file, folder or glob"),
        (["data.paths=[none.txt]"], "data.paths=none.txt: expected a file or folder of this name, found none"),
        (["data=embedded", "data.tokenizer=t"], "data.tokenizer=t: expected null, for the tokenizer of checkpoint="),
        (["data=embedded", "seq_len=0"], "seq_len=0: expected an integer from 1 to 1048576"),
        (["data=embedded", f"seq_len={10**12}"], "seq_len=1000000000000: expected an integer from 1 to 1048576"),
        (["data=embedded", "quantize.block_size=32"], "quantize.block_size=32: expected 64 with quantize.kind=null"),
        (["data=embedded", f"batch_rows={10**12}"], "batch_rows=1000000000000: expected an integer from 1 to 4096"),
    ],
)
def test_mistakes_are_one_line(run, model, arguments, line):
    code, _, err = run(f"checkpoint={model[0]}", *arguments)
    assert code == 2 and err.startswith(f"error: {line}") and err.count("\n") == 1


def test_a_run_cannot_hold_out_everything():
    ended = run_python("train.py", "model=mixtral_tiny", "data.heldout_fraction=1")
    assert ended.returncode == 2
    assert (
        ended.stderr == "error: data.heldout_fraction=1.0: expected a number below 1 (there must be text to train on)\n"
    )


@pytest.mark.slow
def test_a_run_and_two_processes_give_the_same_figures(tmp_path):
    data = [f"data.{domain}_bytes=60000" for domain in ("code", "prose", "arithmetic")]
    data += ["data=embedded", f"data.cache={tmp_path / 'cache'}", "data.heldout_max_bytes=2000"]
    model = ["model=mixtral_tiny", "data.vocab_size=500", "train.seq_len=64", "train.global_batch=4", "train.steps=3"]
    given = [*model, *data, "tracking=disabled", "telemetry.forecast=false", f"run.root={tmp_path}", "run.name=r"]
    trained = run_python("train.py", *given, "train.precision=fp64")
    assert trained.returncode == 0, trained.stderr
    expected = json.loads((tmp_path / "r" / "result.json").read_text())
    evaluate = [f"checkpoint={tmp_path / 'r'}", *data, "split=heldout", "seq_len=64", "precision=fp64", "format=json"]
    for processes in (1, 2):
        ended = run_python("scripts/evaluate.py", *evaluate, f"launch.nproc={processes}")
        assert ended.returncode == 0, ended.stderr
        found = json.loads(ended.stdout)
        assert found["loss"] == pytest.approx(expected["eval/loss"], abs=1e-9)
        for domain in ("code", "prose", "arithmetic"):
            bits = found["domains"][domain]["bits_per_byte"]
            assert bits == pytest.approx(expected[f"eval/bits_per_byte/{domain}"], abs=1e-9)
