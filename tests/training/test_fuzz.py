"""Damaged model directories and files of a run: only an error of the user's, of one line, leaves the readers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from common.errors import ConfigError, DataError, ModelError, RunError, UserError
from data.corpora.messages import Message
from data.tokens.conversation import encode_conversation, end_token_ids
from data.tokens.files import find_tokenizer
from data.tokens.tokenizer import train_tokenizer
from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.model import Transformer
from tests.mutations import mutated_bytes, mutated_values
from tests.tokenizers import byte_level, write_tokenizer
from tests.training.test_reader import export, run_directory
from training.formats.reader import open_model
from training.generation.config import GenerateConfig
from training.generation.request import read_request
from training.report.metrics import read_metrics
from training.report.sweep import sweep_table
from training.run import finished_result

COUNT = 25
"""Mutations of each file; `fuzz` was also run by hand with thousands."""
MODEL = ModelConfig(
    dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=12, num_experts=3, top_k=2, vocab_size=300,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one small model in every format; the exported ones are split into several files."""
    root = tmp_path_factory.mktemp("models")
    model = Transformer(MODEL, RouterConfig(), torch.float32)
    init_parameters(model, 0)
    (root / "run").mkdir()
    run_directory(root / "run", model, config=MODEL, router=RouterConfig())
    words = " ".join(f"{a}{b}{c}" for a in "abcdef" for b in "ghijkl" for c in "mnopqr")
    (root / "run" / "tokenizer.model").write_bytes(train_tokenizer([words] * 9, 300))
    reader = open_model(root / "run")
    export(reader, root / "hf", shard_bytes=20_000)
    first, index = min((root / "hf").glob("*.safetensors")), root / "hf" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first.name, "first.safetensors"))
    first.rename(root / "hf" / "first.safetensors")
    export(reader, root / "mistral", form="mistral")
    (root / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "x": 1}))
    marks = ["<|begin|>", "<|end|>"]
    decoder = {"320": {"content": marks[0], "special": True}, "321": {"content": marks[1], "special": True}}
    write_tokenizer(root / "chat", byte_level(marks, bos=marks[0]), eos_token=marks[1], added_tokens_decoder=decoder)
    (root / "chat" / "added_tokens.json").write_text(json.dumps({marks[1]: 321}))
    (root / "chat" / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": marks[0]}}))
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    (root / "chat" / "chat_template.jinja").write_text(template)
    (root / "messages.json").write_text(json.dumps([{"role": "user", "content": "abc"}]))
    (root / "sweep" / "0").mkdir(parents=True)
    result = {
        "status": "finished",
        "step": 3,
        "eval/loss": 1.5,
        "total_params": 5,
        "router/max_vio": None,
        "error": None,
    }
    (root / "sweep" / "0" / "result.json").write_text(json.dumps(result))
    (root / "sweep" / "0" / "config.yaml").write_text(yaml.safe_dump({"model": {"dim": 3}, "run": {"name": "x"}}))
    rows = [{"step": step, "train/loss": 0.5 / step, "router/load": [0.5, 0.5], "x": "NaN"} for step in (1, 2, 3)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def read_model(directory: Path) -> None:
    reader = open_model(directory, warn=lambda line: None)
    reader.fill(Transformer(reader.model, reader.router, torch.float32))


def read_tokenizer(directory: Path) -> None:
    files = find_tokenizer(directory)
    assert files is not None
    tokenizer = files.open()
    assert tokenizer.decode(tokenizer.encode("abc def")).strip() == "abc def"
    end_token_ids(tokenizer)
    encode_conversation([Message("user", "abc"), Message("assistant", "def", learn=True)], tokenizer)


READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "hf/config.json": (read_model, "hf"),
    "hf/model.safetensors.index.json": (read_model, "hf"),
    "hf/first.safetensors": (read_model, "hf"),
    "hf/generation_config.json": (read_tokenizer, "hf"),
    "chat/tokenizer.json": (read_tokenizer, "chat"),
    "chat/tokenizer_config.json": (read_tokenizer, "chat"),
    "chat/special_tokens_map.json": (read_tokenizer, "chat"),
    "chat/added_tokens.json": (read_tokenizer, "chat"),
    "chat/chat_template.jinja": (read_tokenizer, "chat"),
    "mistral/params.json": (read_model, "mistral"),
    "run/config.yaml": (read_model, "run"),
    "run/checkpoints/step-3/manifest.json": (read_model, "run"),
    "run/tokenizer.model": (read_tokenizer, "run"),
    "messages.json": (
        lambda root: read_request(GenerateConfig(str(root / "run"), messages=str(root / "messages.json"))),
        "",
    ),
    "metrics.jsonl": (read_metrics, "metrics.jsonl"),
    "sweep/0/result.json": (lambda folder: (finished_result(folder / "0", 3), sweep_table(folder)), "sweep"),
    "sweep/0/config.yaml": (sweep_table, "sweep"),
}
"""File -> the function that reads it, and the path that the function gets."""


def fuzz(root: Path, file: str, count: int) -> set[str]:
    """Read `count` damaged versions of a file, and as many with other values if it is JSON. Return the outcomes."""
    read, argument = READERS[file]
    content = (root / file).read_bytes()
    versions = [*mutated_bytes(content, file, count)]
    if file.endswith(".json"):
        versions += mutated_values(json.loads(content), file, count)
    if file.endswith(".yaml"):
        versions += mutated_values(yaml.safe_load(content), file, count)
    outcomes = set()
    try:
        for damaged in versions:
            (root / file).write_bytes(damaged)
            try:
                read(root / argument)
                outcomes.add("read")
            except (ConfigError, DataError, ModelError, RunError) as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, error
                outcomes.add("refused")
    finally:
        (root / file).write_bytes(content)
    return outcomes


@pytest.mark.parametrize("file", READERS)
def test_damaged_files_end_in_one_line(models: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.report.sweep.plot_sweep", lambda rows, path: None)  # Drawing takes a second.
    assert "refused" in fuzz(models, file, COUNT) or file.startswith("sweep")
    assert issubclass(RunError, UserError)
