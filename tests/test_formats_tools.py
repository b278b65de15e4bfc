"""import_hf, export_hf and run.init_from as a user runs them, and exported tokenizers in AutoTokenizer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from data.config import DataConfig
from data.corpora.corpus import open_corpus
from data.corpora.messages import read_messages
from data.tokens.conversation import encode_conversation
from data.tokens.files import find_tokenizer
from data.tokens.tokenizer import Tokenizer, train_tokenizer
from scripts import export_hf, import_hf
from scripts.cli.command_line import CONF
from tests.deepseek import write_released
from tests.foreign import load_model, save_reference
from tests.test_train import TINY, numbers
from tests.tokenizers import sentencepiece_like, sentencepiece_model, write_tokenizer
from training.formats.export import export_model
from training.formats.reader import open_model

VOCAB = 503
"""The vocabulary of the models in these tests. The tokenizer has 500 ids."""


def call(tool, monkeypatch, *arguments):
    """Run the tool, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    return ended.value.code


@pytest.fixture(scope="module")
def documents() -> list[str]:
    config = DataConfig(kind="embedded", code_bytes=2_000_000, prose_bytes=800_000, arithmetic_bytes=50_000)
    return [document.text for document in open_corpus(config).documents()]


@pytest.fixture(scope="module")
def model(tmp_path_factory, documents) -> Path:
    """A Mixtral that transformers wrote, with a tokenizer.model that Mixwright trained. Tests must not change it."""
    directory = tmp_path_factory.mktemp("model") / "hf"
    save_reference("mixtral", directory, VOCAB)
    (directory / "tokenizer.model").write_bytes(train_tokenizer(documents[:60], 500))
    return directory


def test_import_and_export_by_command(model, tmp_path, monkeypatch, capsys):
    assert call(import_hf, monkeypatch, f"source={model}", f"out={tmp_path}/imported", "shard_size=50KB") == 0
    assert "23 tensors" in capsys.readouterr().out
    imported = tmp_path / "imported"
    assert sorted(path.name for path in imported.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "generation_config.json",
        "tokenizer.model",
    ]
    assert yaml.safe_load((imported / "config.yaml").read_text()).keys() == {"model", "router"}
    for source in (imported, imported / "checkpoints" / "step-0"):
        out = tmp_path / f"out-{source.name}"
        assert call(export_hf, monkeypatch, f"checkpoint={source}", f"out={out}", "shard_size=60KB") == 0
        config = json.loads((out / "config.json").read_text())
        assert config["dtype"] == "bfloat16" and config["architectures"] == ["MixtralForCausalLM"]
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
        assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in load_model(imported).state_dict().values())
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    official = ["format=mistral", "dtype=fp32"]
    assert call(export_hf, monkeypatch, f"checkpoint={imported}", f"out={tmp_path}/official", *official) == 0
    names = sorted(path.name for path in (tmp_path / "official").iterdir())
    assert names == ["consolidated.safetensors", "params.json", "tokenizer.model"]
    assert call(import_hf, monkeypatch, f"source={tmp_path}/official", f"out={tmp_path}/back", "dtype=keep") == 0
    a, b = load_model(tmp_path / "back").state_dict(), load_model(model).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_token_ids_are_equal_through_autotokenizer(model, tmp_path, monkeypatch, documents):
    import transformers

    assert call(export_hf, monkeypatch, f"checkpoint={model}", f"out={tmp_path}/out") == 0
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer = Tokenizer(model / "tokenizer.model")
    odd = [
        "",
        " ",
        "  two  spaces ",
        "\n\n\tx",
        "naïve café 你好 🙂",
        "a\u2028b\r\n",
        "1234567890",
        "[INST] hi [/INST]",
    ]
    texts = [text[:20_000] for text in documents[:400]] + odd
    assert len(texts) > 300
    for text in texts:
        # By default, the tokenizers of transformers read a literal <s> in a text as the begin mark.
        ids = hf_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == tokenizer.encode(text), text[:200]
        if not any(mark in text for mark in ("<s>", "</s>", "<unk>")):
            assert ids == hf_tokenizer(text, add_special_tokens=False).input_ids
    assert hf_tokenizer("x").input_ids == [tokenizer.bos_id, *tokenizer.encode("x")]
    assert hf_tokenizer.decode(tokenizer.encode(documents[0])) == documents[0]
    assert (hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_the_chat_template_is_that_of_training(model, tmp_path, monkeypatch):
    import transformers

    assert call(export_hf, monkeypatch, f"checkpoint={model}", f"out={tmp_path}/out", "chat=true") == 0
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer = Tokenizer(model / "tokenizer.model")
    turns = [("user", "What is  2 + 2?\n"), ("assistant", "4, I think."), ("user", "Sure?")]
    for messages in (turns, turns[:1], [("system", "Be brief."), *turns]):
        messages = [{"role": role, "content": content} for role, content in messages]
        ids = hf_tokenizer.apply_chat_template(messages, return_dict=False)
        assert ids == encode_conversation(read_messages(messages, last="user"), tokenizer)[0]


def test_a_tokenizer_that_adds_a_space_before_a_text_still_does_after_export(model, tmp_path, monkeypatch, documents):
    import sentencepiece
    import transformers
    from sentencepiece import sentencepiece_model_pb2

    shutil.copytree(model, tmp_path / "model")
    schema = sentencepiece_model_pb2.ModelProto()
    schema.ParseFromString((model / "tokenizer.model").read_bytes())
    schema.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "model" / "tokenizer.model").write_bytes(schema.SerializeToString())
    assert call(export_hf, monkeypatch, f"checkpoint={tmp_path}/model", f"out={tmp_path}/out") == 0
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model" / "tokenizer.model"))
    for text in documents[:50]:
        ids = hf_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == tokenizer.encode(text)


def cut(directory):
    with open(directory / "model.safetensors", "rb+") as file:
        file.truncate(1000)


def rename_architecture(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "a header of"),
        (rename_architecture, "model_type=gpt2: expected one of llama, mistral"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: damaged: not JSON"),
        (lambda d: (d / "tokenizer.model").write_bytes(b"x"), "expected a sentencepiece model that can be read"),
        (lambda d: shutil.rmtree(d), "expected a model directory; none found"),
    ],
)
@pytest.mark.parametrize("tool", [import_hf, export_hf])
def test_bad_input_is_one_line_and_nothing_is_written(tool, change, message, model, tmp_path, monkeypatch, capsys):
    shutil.copytree(model, tmp_path / "bad")
    change(tmp_path / "bad")
    key = "source" if tool is import_hf else "checkpoint"
    assert call(tool, monkeypatch, f"{key}={tmp_path}/bad", f"out={tmp_path}/out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {key}={tmp_path}/bad: ") or "tokenizer.model" in error
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "bad"] == []


def remove_a_shard(directory):
    (directory / "model-00002-of-00003.safetensors").unlink()


def add_a_file_of_weights(directory):
    shutil.copy(directory / "model-00001-of-00003.safetensors", directory / "model.safetensors")


def leave_only_pickles(directory):
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def add_keys(**keys):
    def change(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | keys))

    return change


BAD = (
    (remove_a_shard, "model-00002-of-00003.safetensors: cannot be read: No such file"),
    (add_a_file_of_weights, "found model.safetensors and model.safetensors.index.json: expected one of them"),
    (leave_only_pickles, "found pytorch_model.bin: pickle, which runs code when it is loaded"),
    (
        add_keys(quantization_config={"quant_method": "unknown"}),
        "quantization_config={quant_method:unknown}: expected null",
    ),
    (
        add_keys(model_type="other", architectures=["OtherForCausalLM"], auto_map={"AutoModel": "x.Y"}),
        "model_type=other: expected one of llama",
    ),
    (add_keys(auto_map={"AutoModel": "x.Y"}, unknown_key=2), "unknown_key=2: expected a known key"),
)


OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in ("olmoe", "qwen3-moe", "deepseek")]


@pytest.mark.parametrize("family", ["qwen2-moe", *OTHERS])
def test_a_bad_directory_of_every_family_is_refused_in_one_line(family, tmp_path, monkeypatch, capsys):
    good = tmp_path / "good"
    if family == "deepseek":
        write_released(good, {}, parts=3)
    else:
        save_reference(family, tmp_path / "single")
        size = (tmp_path / "single" / "model.safetensors").stat().st_size
        export_model(
            open_model(tmp_path / "single"), good, form="hf", dtype="fp32", shard_bytes=int(size * 0.45), positions=64
        )
    capsys.readouterr()
    for tool, key in ((import_hf, "source"), (export_hf, "checkpoint")):
        assert call(tool, monkeypatch, f"{key}={good}", f"out={tmp_path}/out") == 0
        shutil.rmtree(tmp_path / "out")
        capsys.readouterr()
        for change, message in BAD:
            bad = shutil.copytree(good, tmp_path / "bad")
            change(bad)
            assert call(tool, monkeypatch, f"{key}={bad}", f"out={tmp_path}/out") == 2
            error = capsys.readouterr().err
            assert error.startswith(f"error: {key}={bad}: ") and message in error and error.count("\n") == 1, error
            shutil.rmtree(bad)
            assert {path.name for path in tmp_path.iterdir()} <= {"good", "single"}


def test_other_refusals(model, tmp_path, monkeypatch, capsys):
    save_reference("mixtral", tmp_path / "small", 400)
    shutil.copy(model / "tokenizer.model", tmp_path / "small")
    capsys.readouterr()
    out = f"out={tmp_path}/out"
    for tool, arguments, message in (
        (
            import_hf,
            [f"source={tmp_path}/small", out],
            "expected a tokenizer of at most 400 ids, the rows of the embedding; found 500",
        ),
        (export_hf, [f"checkpoint={tmp_path}/small", out], "expected a tokenizer of at most 400 ids"),
        (import_hf, [f"source={model}"], "out=???: expected a string"),
        (import_hf, [f"source={model}", f"out={model}"], "expected a path that does not exist yet"),
        (import_hf, [f"source={model}", out, "shard_size=many"], "shard_size=many: expected a size"),
        (import_hf, [f"source={model}", out, "dtype=fp8"], "dtype=fp8: expected one of fp32, keep"),
        (export_hf, [f"checkpoint={model}", out, "format=gguf"], "format=gguf: expected one of hf, mistral"),
        (export_hf, [f"checkpoint={model}", out, "max_positions=0"], "max_positions=0: expected"),
        (export_hf, [f"chekpoint={model}", out], "the nearest valid key is checkpoint"),
    ):
        assert call(tool, monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_transformers_a_tokenizer_is_not_exported_and_the_package_is_named(
    model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert call(export_hf, monkeypatch, f"checkpoint={model}", f"out={tmp_path}/out") == 2
    assert "pip install 'mixwright[hf]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert call(export_hf, monkeypatch, f"checkpoint={model}", f"out={tmp_path}/out", "format=mistral") == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixtral", "qwen2-moe"])
def test_training_starts_from_a_foreign_model_under_every_layout(case, model, tmp_path):
    """At a learning rate that changes no weight, the checkpoint must be equal to the model bit for bit."""
    if case != "mixtral":
        tokenizer = model / "tokenizer.model"
        model = tmp_path / "model"
        save_reference(case, model, VOCAB)
        shutil.copy(tokenizer, model)

    def train(name, *overrides):
        tiny = [word for word in TINY if not word.startswith(("data.vocab_size", "model="))]
        places = [f"data.cache={tmp_path}/cache", f"run.root={tmp_path}/runs", f"run.name={name}"]
        command = [sys.executable, "train.py", *tiny, *places, f"run.init_from={model}", *overrides]
        return subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, check=False)

    runs = tmp_path / "runs"
    for nproc in (1, 2):
        still = ["train.steps=1", "optim.lr=1e-30", "optim.weight_decay=0", "train.precision=fp32"]
        done = train(f"on-{nproc}", *still, f"launch.nproc={nproc}")
        assert done.returncode == 0, done.stderr
        a, b = load_model(runs / f"on-{nproc}").state_dict(), load_model(model).state_dict()
        assert all(torch.equal(a[name], b[name]) for name in b)
    experts_by_rank = [rank["experts"] for rank in json.loads((runs / "on-2" / "result.json").read_text())["ranks"]]
    half = open_model(model).model.num_experts // 2
    assert experts_by_rank == [list(range(half)), list(range(half, 2 * half))]
    assert (runs / "on-1" / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()
    one, two = (numbers(runs / f"on-{nproc}")[0]["train/loss"] for nproc in (1, 2))
    assert one == pytest.approx(two, abs=1e-5)

    refused = train("no", "model.dim=32")
    assert refused.returncode == 2 and "error: model.dim=32: expected 24, as in run.init_from=" in refused.stderr
    assert not (runs / "no").exists()


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_chatml(directory: Path) -> Path:
    """Write a Mixtral whose Llama tokenizer has the tokens of ChatML in its tokenizer.json."""
    save_reference("mixtral", directory, VOCAB)
    content = sentencepiece_like(["<|im_start|>", "<|im_end|>"], legacy=False)
    write_tokenizer(directory, content, bos_token="<s>", eos_token="<|im_end|>")
    (directory / "chat_template.jinja").write_text(CHATML)
    end = next(token["id"] for token in content["added_tokens"] if token["content"] == "<|im_end|>")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end], "temperature": 0.5}))
    return directory


def test_a_tokenizer_json_travels_with_its_added_tokens_and_template(tmp_path, monkeypatch, capsys):
    import transformers

    source = write_chatml(tmp_path / "chatml")
    assert call(import_hf, monkeypatch, f"source={source}", f"out={tmp_path}/imported") == 0
    assert call(export_hf, monkeypatch, f"checkpoint={tmp_path}/imported", f"out={tmp_path}/again", "chat=true") == 0
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("chatml", "again"))
    messages = [{"role": "user", "content": "the model"}, {"role": "assistant", "content": "loss"}]
    for call_of in (
        lambda t: (len(t), t.bos_token_id, t.eos_token_id, t.chat_template),
        lambda t: t("<|im_start|>user and </s> text").input_ids,
        lambda t: t.apply_chat_template(messages, return_dict=False),
    ):
        assert call_of(before) == call_of(after)
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (tmp_path / "imported" / name).read_bytes() == (source / name).read_bytes()
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, after.eos_token_id], "temperature": 0.5, "bos_token_id": 1}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [2, after.eos_token_id]
    capsys.readouterr()
    # The formats without such files, and an embedding without such rows, are refused before anything is written.
    for tool, arguments, complaint in (
        (export_hf, [f"checkpoint={source}", "format=mistral"], "format=mistral: expected a tokenizer.model with all"),
        (import_hf, [f"source={source}"], "expected a tokenizer of at most 340 ids, the rows of the embedding"),
    ):
        if tool is import_hf:
            save_reference("mixtral", source, 340)
        assert call(tool, monkeypatch, *arguments, f"out={tmp_path}/out") == 2
        assert complaint in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_exported_control_pieces_and_template_give_the_ids_of_training(model, tmp_path, monkeypatch):
    import transformers

    shutil.copytree(model, tmp_path / "v3", ignore=shutil.ignore_patterns("tokenizer.model"))
    content = sentencepiece_model(control_symbols=["[INST]", "[/INST]"])
    (tmp_path / "v3" / "tokenizer.model.v3").write_bytes(content)
    assert call(export_hf, monkeypatch, f"checkpoint={tmp_path}/v3", f"out={tmp_path}/out", "chat=true") == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [("user", "the model"), ("assistant", "loss  "), ("user", "step?")]
    for messages in (turns[:1], turns, [("system", "train"), *turns]):
        messages = [{"role": role, "content": content} for role, content in messages]
        ids = theirs.apply_chat_template(messages, return_dict=False)
        for directory in ("v3", "out"):
            ours = find_tokenizer(tmp_path / directory).open()
            assert ids == encode_conversation(read_messages(messages, last="user"), ours)[0]
    official = ["format=mistral", f"out={tmp_path}/official"]
    assert call(export_hf, monkeypatch, f"checkpoint={tmp_path}/v3", *official) == 0
    assert (tmp_path / "official" / "tokenizer.model.v3").read_bytes() == content
