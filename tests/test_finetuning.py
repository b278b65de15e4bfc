"""Fine-tuning as a user does it: a run on conversations that starts from another run and trains few of its weights."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.config import DataConfig
from data.tokens.store import Store, prepare
from moe.model import ModelInputs, Transformer
from scripts.cli.command_line import CONF
from training.formats.reader import open_model
from training.report.metrics import read_metrics

SHAPE = ["train.seq_len=96", "train.log_every=1", "train.precision=fp64", "tracking=disabled", "launch.threads=1"]


def run(*overrides: str) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", *SHAPE, *overrides],
        cwd=CONF.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def model_of(directory: Path) -> Transformer:
    source = open_model(directory)
    model = Transformer(source.model, source.router, torch.float64).double()
    source.fill(model)
    return model


def lines() -> list[dict]:
    pairs = [(f"Double of {n}?", f"{2 * n}.") for n in range(80)]
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]


def answers_loss(model: Transformer, store: Store, heldout: bool) -> tuple[float, float]:
    """Return nats per answer token and bits per answer byte, computed per conversation, without packing and masks."""
    split = store.heldout if heldout else store.train
    conversations = set(store.tokenizer.decode(split.tokens(0, split.num_tokens)).split("[INST] ")[1:])
    nats, tokens, size = 0.0, 0, 0
    for line in lines():
        question, answer = (message["content"] for message in line["messages"])
        if f"{question} [/INST] {answer}" not in conversations:
            continue
        question_ids = [1, *store.tokenizer.encode(f"[INST] {question} [/INST]")]
        answer_ids = [*store.tokenizer.encode(f" {answer}"), 2]
        ids = torch.tensor([question_ids + answer_ids])
        with torch.no_grad():
            log_p = model(ModelInputs(ids, torch.arange(ids.shape[1]).unsqueeze(0))).logits_BSV[0].log_softmax(-1)
        nats -= sum(log_p[len(question_ids) + i - 1, token].item() for i, token in enumerate(answer_ids))
        tokens += len(answer_ids)
        size += len(f" {answer}".encode())
    return nats / tokens, nats / math.log(2) / size


@pytest.mark.slow
def test_fine_tuning_from_a_run_on_conversations(tmp_path):
    """The run reports the losses of the answers only, and only the selected weights change."""
    root, cache = f"run.root={tmp_path}", f"data.cache={tmp_path}/cache"
    base_sizes = ["data.code_bytes=60000", "data.prose_bytes=30000", "data.arithmetic_bytes=60000"]
    run("model=mixtral_tiny", *base_sizes, root, cache, "data.vocab_size=500", "train.steps=2", "train.global_batch=8",
        "run.name=base", "run.sample_tokens=0")  # fmt: skip
    tokenizer = tmp_path / "base" / "tokenizer.model"
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines()))
    store = prepare(
        DataConfig(kind="sft", paths=(str(chats),), cache=f"{tmp_path}/cache", tokenizer=str(tokenizer), vocab_size=500)
    )
    rows = store.train.num_rows(96)
    run("data=sft", f"data.paths=[{chats}]", root, cache, "run.name=tuned", f"run.init_from={tmp_path}/base",
        "train.steps=2", f"train.global_batch={rows}", "optim.train=[router,expert:1]", "run.sample_tokens=3",
        "run.prompt=Double of 3?")  # fmt: skip

    first = read_metrics(tmp_path / "tuned" / "metrics.jsonl")[0]
    base, tuned = model_of(tmp_path / "base"), model_of(tmp_path / "tuned")
    assert first["train/ce"] == pytest.approx(answers_loss(base, store, heldout=False)[0], rel=1e-9)
    result = json.loads((tmp_path / "tuned" / "result.json").read_text())
    loss, bits = answers_loss(tuned, store, heldout=True)
    assert result["eval/loss"] == pytest.approx(loss, rel=1e-9)
    assert result[f"eval/bits_per_byte/{tmp_path.name}"] == pytest.approx(bits, rel=1e-9)

    for (name, before), after in zip(base.named_parameters(), tuned.parameters(), strict=True):
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        if ".experts." in name:
            assert same == [True, False, True, True], name
        else:
            assert all(same) != ("router" in name), name
