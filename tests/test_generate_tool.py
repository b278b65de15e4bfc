"""`scripts/generate.py` as a user runs it, and the text of a row while it is generated."""

import copy
import dataclasses
import io
import json
import os
import random
import subprocess
import sys

import pytest
import torch

from common.errors import DataError
from data.tokens.files import find_tokenizer
from data.tokens.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokens.tokenizer import Tokenizer, train_tokenizer
from moe.config import ModelConfig, RouterConfig
from moe.generation.generate import generate
from moe.init import init_parameters
from moe.model import Transformer
from moe.packed import pack, unpack
from moe.quantization import QuantizeConfig, target_of
from moe.region import Region
from scripts.cli.command_line import CONF
from scripts.generate import main
from tests import tokenizers
from tests.test_formats_tools import write_chatml
from tests.tokenizers import write_tokenizer
from training.formats.model_directory import Block, write_model
from training.generation.config import GenerateConfig
from training.generation.request import read_request
from training.generation.worker import StreamedText, TextPrinter

TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b  # sums\n" for i in range(200)]
CONFIG = ModelConfig(
    dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=16, num_experts=4, top_k=2,
    vocab_size=320, init_std=0.5, sliding_window=5,
)  # fmt: skip

ROUTER = RouterConfig()


def write(path, config=CONFIG, tokenizer=None, router=ROUTER):
    model = Transformer(config, router, torch.float32)
    init_parameters(model, 0)
    blocks = [
        Block(name, tuple(x.shape), Region((0,) * x.dim(), tuple(x.shape)), x.dtype, lambda x=x: x.detach())
        for name, x in model.state_dict().items()
    ]
    write_model(path, config, router, blocks, tokenizer)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXTS, 320))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "m"
    return path, write(path, tokenizer=find_tokenizer(tokenizer.path.parent))


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


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_generates_what_its_dequantised_weights_do(kind, run, directory, tokenizer):
    pytest.importorskip("bitsandbytes", reason="needs the extra [quantize]")
    path, model = directory
    arguments = (f"checkpoint={path}", "prompt=def a", "max_tokens=9", "format=json")
    code, out, err = run(*arguments, f"quantize={kind}")
    assert code == 0, err
    ids = [tokenizer.bos_id, *tokenizer.encode("def a")]
    expected = generate(dequantised(model, QuantizeConfig(kind)), [ids], max_tokens=9, stop=[tokenizer.eos_id])
    assert [row["tokens"] for row in json.loads(out)["results"]] == expected


def dequantised(model, config):
    """Return a copy of a model whose weights have the values of the quantised ones."""
    copied = copy.deepcopy(model)
    for name, weight in copied.named_parameters():
        packing = config.packing(target_of(name), weight.shape)
        if packing is not None:
            for matrix in weight.detach().view(-1, *weight.shape[-2:]):
                matrix.copy_(unpack(pack(matrix, packing), packing, matrix.dtype))
    return copied


def test_a_missing_package_is_one_line(run, directory, monkeypatch):
    monkeypatch.setattr("moe.quantization.find_spec", lambda name: None)
    code, out, err = run(f"checkpoint={directory[0]}", "prompt=x", "quantize=nf4")
    expected = "quantize.kind=nf4: expected the package bitsandbytes (pip install 'mixwright[quantize]')"
    assert (code, out, err) == (2, "", f"error: {expected}\n")


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


@pytest.mark.parametrize(
    ("router", "model", "key"),
    [
        (RouterConfig(capacity_factor=0.5), CONFIG, "router.capacity_factor=0.5: "),
        (RouterConfig(kind="expert_choice", allow_noncausal=True, balance_coef=0.0), CONFIG, "router.kind=expert_choi"),
        (ROUTER, CONFIG, None),
        (RouterConfig(capacity_factor=0.5), dataclasses.replace(CONFIG, num_experts=None, top_k=None), None),
    ],
)
def test_generation_says_once_that_it_is_dropless(router, model, key, run, tokenizer, tmp_path):
    write(tmp_path / "m", model, find_tokenizer(tokenizer.path.parent), router)
    code, out, err = run(f"checkpoint={tmp_path / 'm'}", "prompts=[x,y]", "max_tokens=2", "format=json")
    assert code == 0 and len(json.loads(out)["results"]) == 2
    lines = [line for line in err.splitlines() if "dropless" in line]
    assert [line.startswith(str(key)) for line in lines] == ([] if key is None else [True])


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
    assert code == 2 and err.startswith(
        f"error: checkpoint={tmp_path}/without: expected a tokenizer.model or a tokenizer.json"
    )
    small = ModelConfig(**(CONFIG.__dict__ | {"vocab_size": 300}))
    write(tmp_path / "small", small, find_tokenizer(tokenizer.path.parent))
    code, _, err = run(f"checkpoint={tmp_path}/small", "prompt=x")
    assert code == 2 and "expected a tokenizer of at most 300 ids, the rows of the embedding; found 320" in err


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> HuggingFaceTokenizer:
    """A tokenizer whose tokens are bytes, as GPT-2's and Llama 3's are."""
    content = tokenizers.byte_level(["<s>", "</s>"], bos="<s>")
    return find_tokenizer(write_tokenizer(tmp_path_factory.mktemp("level"), content, eos_token="</s>")).open()


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory) -> HuggingFaceTokenizer:
    """A tokenizer with byte tokens beside its pieces, as Llama 2's and Mixtral's tokenizer.json are."""
    content = tokenizers.sentencepiece_like([], legacy=True)
    return find_tokenizer(write_tokenizer(tmp_path_factory.mktemp("fallback"), content, eos_token="</s>")).open()


def test_generation_config_json_adds_end_token_ids(tmp_path, tokenizer):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    file = tmp_path / "generation_config.json"
    for given, expected in (("null", {2}), ("5", {2, 5}), ("[7, 5]", {2, 5, 7})):
        file.write_text(f'{{"eos_token_id": {given}}}')
        assert set(find_tokenizer(tmp_path).open().end_ids) == expected
    file.write_text('{"eos_token_id": "x"}')
    with pytest.raises(DataError, match="eos_token_id=x: expected a token id, or a list of them"):
        find_tokenizer(tmp_path).open()
    file.unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')  # The ids of a model without generation_config.json.
    assert find_tokenizer(tmp_path).open().end_ids == (2, 9)


def test_prompts_and_chats_have_the_tokens_of_chatml_and_end_with_its_mark(tmp_path):
    import transformers

    path = write_chatml(tmp_path / "chatml")
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    prompt = "<|im_start|>user"
    assert read_request(GenerateConfig(str(path), prompt=prompt)).prompts == [theirs(prompt).input_ids]
    request = read_request(GenerateConfig(str(path), prompt=prompt, chat=True))
    ids = theirs.apply_chat_template([{"role": "user", "content": "@"}], add_generation_prompt=True, return_dict=False)
    start, end = theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [request.prompts[0].count(i) for i in (start, end)] == [ids.count(i) for i in (start, end)] == [2, 1]
    assert request.end_ids == [2, end]


@pytest.mark.parametrize("sample", ["a é 你好 🙂 def f(a, b):\n    return", "🙂🙂", " x", "\ufffd\ufffd y"])
def test_text_is_released_in_whole_characters(tokenizer, sample):
    growing = StreamedText(tokenizer.decode, [tokenizer.bos_id, *tokenizer.encode("def")], [])
    parts = [growing.add(token) for token in [*tokenizer.encode(sample), tokenizer.eos_id]]
    assert "".join(parts) + growing.end() == growing.text == sample
    assert sample.startswith("\ufffd") or not any("\ufffd" in part for part in parts)
    cut = StreamedText(tokenizer.decode, [], [])
    assert [cut.add(token) for token in tokenizer.encode("é")[:1]] == [""]
    assert cut.end() == "\ufffd"  # Only half of the character was added.


def byte_ids(name, text) -> list[int]:
    """Return the token id of each of the 256 bytes."""
    if name == "byte_level":
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return [text._encoder.token_to_id(bytes_to_unicode()[byte]) for byte in range(256)]
    piece_to_id = text._model.piece_to_id if name == "tokenizer" else text._encoder.token_to_id
    return [piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]


def random_ids(rng, text, bytes_256, length) -> list[int]:
    """Return ids of stray bytes, cut and whole characters, other tokens, and tokens without text."""
    ids: list[int] = []
    while len(ids) < length:
        stray = bytes(rng.choice(b"\x80\xbf\xe2\xf0\xed\xc0\xf4\xffa") for _ in range(rng.randrange(1, 5)))
        character = rng.choice("é€😀\u0301\u200d\ufffd▁ a").encode()
        raw = rng.choice([stray, character, character[: rng.randrange(1, 4)], bytes([rng.randrange(256)])])
        other = rng.choice([rng.randrange(text.vocab_size), text.bos_id, text.vocab_size - 1])
        ids += rng.choice([[bytes_256[byte] for byte in raw], [other] * rng.randrange(1, 3)])
    return ids


@pytest.mark.parametrize("name", ["tokenizer", "byte_level", "byte_fallback"])
def test_released_parts_are_the_text_of_all_tokens_for_any_tokens(request, name):
    text = request.getfixturevalue(name)
    bytes_256, rng = byte_ids(name, text), random.Random(0)
    for case in range(250):
        prompt = rng.choice([[], [text.bos_id], [text.bos_id, *text.encode(rng.choice(["ab", "de " * 40, " é"]))]])
        ids = random_ids(rng, text, bytes_256, rng.choice([1, 4, 20, 120]))
        ids = ids[:1] * len(ids) if case % 20 == 0 else ids
        growing = StreamedText(text.decode, prompt, [])
        shown = "".join(map(growing.add, ids)) + growing.end()
        assert shown == growing.text == text.decode(prompt + ids)[len(text.decode(prompt)) :], (case, prompt, ids)


def test_a_long_text_is_decoded_in_short_pieces(tokenizer):
    bytes_256 = byte_ids("tokenizer", tokenizer)
    decoded = 0

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return tokenizer.decode(ids)

    for repeated in (tokenizer.encode("def é "), [bytes_256[0x80]], [bytes_256[0xF0]], [tokenizer.bos_id]):
        ids = repeated * (2000 // len(repeated))
        growing = StreamedText(decode, tokenizer.encode("def"), [])
        decoded = 0
        assert "".join(map(growing.add, ids)) + growing.end() == tokenizer.decode(ids)
        assert decoded < 50 * len(ids)


@pytest.mark.parametrize("name", ["tokenizer", "byte_level", "byte_fallback"])
def test_the_stop_string_that_is_complete_first_ends_the_text_however_it_is_divided(request, name):
    text = request.getfixturevalue(name)
    bytes_256, rng = byte_ids(name, text), random.Random(1)
    for _ in range(200):
        ids = random_ids(rng, text, bytes_256, 30)
        stops = ["".join(rng.choices("a😀\ufffd é", k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4))]
        growing = StreamedText(text.decode, text.encode("ab"), stops)
        shown = "".join(map(growing.add, ids)) + growing.end()
        whole = text.decode([*text.encode("ab"), *ids])[len(text.decode(text.encode("ab"))) :]
        ends = [end for end in range(len(whole) + 1) if whole[:end].endswith(tuple(stops))]
        longest = max((len(stop) for stop in stops if ends and whole[: ends[0]].endswith(stop)), default=0)
        assert shown == growing.text == (whole[: ends[0] - longest] if ends else whole)
        assert growing.stopped == bool(ends)


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
