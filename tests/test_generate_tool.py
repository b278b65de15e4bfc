"""`scripts/generate.py` as a user runs it, and the text of a row while it is generated."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch

from common.errors import ModelError
from data.tokens.tokenizer import Tokenizer, train_tokenizer
from moe.config import ModelConfig, RouterConfig
from moe.generation.generate import generate
from moe.init import init_parameters
from moe.model import Transformer
from moe.region import Region
from scripts.cli.command_line import CONF
from scripts.generate import main
from tests.foreign import save_reference
from training.formats.model_directory import Block, write_model
from training.formats.reader import open_model
from training.generation.request import HuggingFaceTokenizer, end_token_ids
from training.generation.worker import StreamedText, TextPrinter

TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b  # sums\n" for i in range(200)]
CONFIG = ModelConfig(
    dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=16, num_experts=4, top_k=2,
    vocab_size=320, init_std=0.5, sliding_window=5,
)  # fmt: skip


def write(path, config=CONFIG, tokenizer=None):
    model = Transformer(config, RouterConfig(), torch.float32)
    init_parameters(model, 0)
    blocks = [
        Block(name, tuple(x.shape), Region((0,) * x.dim(), tuple(x.shape)), x.dtype, lambda x=x: x.detach())
        for name, x in model.state_dict().items()
    ]
    write_model(path, config, RouterConfig(), blocks, tokenizer)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXTS, 320))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "m"
    return path, write(path, tokenizer=tokenizer.path)


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the tool in this process and returns (exit status, stdout, stderr)."""

    def start(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["scripts/generate.py", "precision=fp32", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return start


def test_json_of_several_prompts_equals_the_library(run, directory, tokenizer):
    path, model = directory
    prompts = ["def a, 'b': [1]", "x"]
    code, out, _ = run(f"checkpoint={path}", "prompts=['x']", f"prompt={prompts[0]}", "max_tokens=9", "format=json")
    result = json.loads(out)
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in reversed(prompts)]
    expected = generate(model, ids, max_tokens=9, stop=[tokenizer.eos_id])
    assert code == 0
    assert [row["tokens"] for row in result["results"]] == expected
    assert [row["text"] for row in result["results"]] == [tokenizer.decode(tokens) for tokens in expected]
    assert result["prompt_tokens"] == sum(map(len, ids)) and result["tokens_per_s"] > 0


def test_text_stops_before_a_stop_string_and_the_speed_goes_to_stderr(run, directory):
    path, _ = directory
    arguments = (f"checkpoint={path}", "prompt=-", "max_tokens=12")
    code, out, err = run(*arguments, stdin="def\nreturn\n")
    titles = [line for line in out.splitlines() if line in ("[1/2] def", "[2/2] return")]
    assert code == 0 and len(titles) == 2 and "tokens/s; " in err
    texts = out.removeprefix("[1/2] def\n").removesuffix("\n").split("\n[2/2] return\n")
    stop = texts[0][5:7]
    _, out, _ = run(*arguments, f"stop={stop}", stdin="def\n")
    assert out == texts[0][: texts[0].index(stop)] + "\n"
    _, out, _ = run(*arguments, "format=json", f"stop={stop}", stdin="def\n")
    assert json.loads(out)["results"][0]["finish"] == "stop"


def test_chat_turns(run, directory, tokenizer, tmp_path):
    path, model = directory
    file = tmp_path / "turns.json"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    file.write_text(json.dumps([{"role": role, "content": text} for role, text in turns]))
    first = [tokenizer.bos_id, *tokenizer.encode("[INST] a [/INST]")]
    whole = [*first, *tokenizer.encode(" b"), tokenizer.eos_id, *tokenizer.encode("[INST] c [/INST]")]
    common = (f"checkpoint={path}", "max_tokens=5", "format=json")
    for arguments, ids in (((f"messages={file}",), whole), (("chat=true", "prompt=a"), first)):
        code, out, _ = run(*common, *arguments)
        assert code == 0
        assert json.loads(out)["results"][0]["tokens"] == generate(model, [ids], max_tokens=5)[0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prompt=x", "top_p=1.5"], "top_p=1.5: expected a number in (0, 1]"),
        (["prompt=x", "temperatur=1"], "temperatur=1: unknown key; the nearest valid key is temperature"),
        (["prompt="], "prompt='': expected at least one token"),
        ([], 'prompt=null: expected a text ("-" for lines of stdin), prompts=[...], or messages=FILE alone'),
        (["prompt=x", "messages=y"], 'prompt=x: expected a text ("-" for lines of stdin), prompts'),
        (["prompt=-"], "prompt=-: expected at least one line on stdin"),
        (["prompt=x", "stop="], "stop='': expected a text of at least one character"),
        (["prompt=x", "max_tokens=0"], "max_tokens=0: expected an integer >= 1"),
        (["prompt=x", "checkpoint=/no/where"], "checkpoint=/no/where: expected a model directory; none found"),
        (["messages=/no/where"], "messages=/no/where: expected a JSON file that can be read (No such file"),
        (["messages=-"], "messages=-: expected a JSON list of messages"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, directory, arguments, line):
    code, out, err = run(f"checkpoint={directory[0]}", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {line}")


def test_a_missing_tokenizer_and_one_larger_than_the_vocabulary_are_refused(run, tokenizer, tmp_path):
    write(tmp_path / "without")
    code, _, err = run(f"checkpoint={tmp_path}/without", "prompt=x")
    assert code == 2 and err.startswith(f"error: {tmp_path}/without: expected a tokenizer.model in it")
    write(tmp_path / "small", ModelConfig(**(CONFIG.__dict__ | {"vocab_size": 300})), tokenizer.path)
    code, _, err = run(f"checkpoint={tmp_path}/small", "prompt=x")
    assert code == 2 and "expected a tokenizer of at most 300 tokens, the model's vocab_size; found 320" in err


def test_without_a_sentencepiece_model_transformers_reads_the_tokenizer(tokenizer, tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    with pytest.raises(ModelError, match="expected a tokenizer that transformers can read"):
        HuggingFaceTokenizer(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    text = HuggingFaceTokenizer(tmp_path)
    assert (text.vocab_size, text.bos_id, text.eos_id) == (320, 0, 1)
    sample = "def f(a):  é 你好\n"
    assert text.decode([0, *text.encode(sample), 1]) == sample


def test_generation_config_json_adds_end_token_ids(tmp_path, tokenizer):
    save_reference("mixtral", tmp_path)
    file = tmp_path / "generation_config.json"
    for given, expected in (("null", {2}), ("5", {2, 5}), ("[7, 5]", {2, 5, 7})):
        file.write_text(f'{{"eos_token_id": {given}}}')
        assert set(end_token_ids(open_model(tmp_path), tokenizer)) == expected
    file.write_text('{"eos_token_id": "x"}')
    with pytest.raises(ModelError, match="eos_token_id=x: expected a token id, or a list of them"):
        end_token_ids(open_model(tmp_path), tokenizer)


@pytest.mark.parametrize("sample", ["a é 你好 🙂 def f(a, b):\n    return", "🙂🙂", " x", "\ufffd\ufffd y"])
def test_text_is_released_in_whole_characters(tokenizer, sample):
    growing = StreamedText(tokenizer.decode, [tokenizer.bos_id, *tokenizer.encode("def")], [])
    parts = [growing.add(token) for token in [*tokenizer.encode(sample), tokenizer.eos_id]]
    assert "".join(parts) + growing.end() == growing.text == sample
    assert sample.startswith("\ufffd") or not any("\ufffd" in part for part in parts)
    cut = StreamedText(tokenizer.decode, [], [])
    assert [cut.add(token) for token in tokenizer.encode("é")[:1]] == [""]
    assert cut.end() == "\ufffd"  # Only half of the character was added.


def test_stop_strings_end_a_text_anywhere_in_its_tokens(tokenizer):
    for stops, expected in (
        (["\n"], "def f(a):"),
        (["a):\n  r", "zz"], "def f("),
        (["f(b"], None),
        (["f(", "ef"], "d"),
    ):
        growing = StreamedText(tokenizer.decode, [tokenizer.bos_id], stops)
        parts = []
        for token in tokenizer.encode("def f(a):\n  return def"):
            parts.append(growing.add(token))
            if growing.stopped:
                break
        parts.append(growing.end())
        assert "".join(parts) == growing.text == (expected if expected is not None else "def f(a):\n  return def")
        assert growing.stopped == (expected is not None)


def test_rows_are_printed_one_after_the_other(capsys):
    printer = TextPrinter(["one", "two\nlines", "three"])
    for row, text in ((0, "a"), (1, "b"), (2, "c"), (0, "A")):
        printer.add(row, text)
    assert capsys.readouterr().out == "[1/3] one\naA"
    printer.end(1)
    printer.add(2, "C")
    printer.end(0)
    assert capsys.readouterr().out == "\n[2/3] two lines\nb\n[3/3] three\ncC"
    printer.add(2, "!")
    printer.end(2)
    assert capsys.readouterr().out == "!\n"


@pytest.mark.slow
def test_two_processes_generate_what_one_generates(run, directory):
    arguments = [f"checkpoint={directory[0]}", "prompt=def f", "max_tokens=8", "temperature=0.9", "format=json"]
    _, one_process, _ = run(*arguments)
    done = subprocess.run(
        [sys.executable, "scripts/generate.py", "precision=fp32", *arguments, "launch.nproc=2"],
        cwd=CONF.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"] == json.loads(one_process)["results"]
