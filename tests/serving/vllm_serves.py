"""vLLM's greedy tokens for exported models are equal to those of transformers and Mixwright.

`make test-serving` runs this file. pytest does not collect it by default, because its name does not start with `test_`:
it needs vLLM in a separate environment, .venv-serving, and takes minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.strict import to_dict
from data.tokens.tokenizer import Tokenizer, train_tokenizer
from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.model import Transformer
from tests.foreign import load_model, load_reference, logits_of
from training.checkpoint import checkpoint
from training.formats.export import export_model
from training.formats.reader import open_model
from training.run import save_config

SERVER = Path(__file__).with_name("vllm_worker.py")
PYTHON = Path(".venv-serving/bin/python")
NEW_TOKENS = 24
PROMPTS = ["The quick brown fox", "def main():\n    return", "1 + 1 ="]


def write_run(root: Path, window: int | None, dense: bool) -> None:
    """Write a run with random weights, sizes that vLLM's kernels support, and a tokenizer trained on this file."""
    text = Path(__file__).read_text()
    root.mkdir(parents=True)
    (root / "tokenizer.model").write_bytes(train_tokenizer([text], 400))
    experts = {} if dense else {"num_experts": 4, "top_k": 2}
    config = ModelConfig(
        dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, hidden_dim=128, vocab_size=400,
        sliding_window=window, init_std=0.15, **experts,
    )  # fmt: skip
    router = RouterConfig()
    model = Transformer(config, router, torch.float32)
    init_parameters(model, seed=3)
    save_config(root, {"model": to_dict(config), "router": to_dict(router)})
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.save(root / "checkpoints", 1, tensors, {"step": 1}, keep=2)


@pytest.mark.parametrize(
    ("window", "dense"), [(None, False), (8, False), (8, True)], ids=["mixtral", "mixtral-window", "mistral-window"]
)
def test_vllm_generates_the_same_tokens_as_transformers_and_mixwright(window, dense, tmp_path):
    assert PYTHON.exists(), "run make test-serving, which installs it"
    write_run(tmp_path / "run", window, dense)
    out = tmp_path / "exported"
    export_model(open_model(tmp_path / "run"), out, form="hf", dtype="fp32", shard_bytes=200_000, positions=256)
    tokenizer = Tokenizer(out / "tokenizer.model")
    expected = []
    model, reference = load_model(tmp_path / "run"), load_reference(out)
    for prompt in PROMPTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        tokens = torch.tensor([ids])
        for _ in range(NEW_TOKENS):
            tokens = torch.cat((tokens, logits_of(model, tokens)[:, -1:].argmax(-1)), dim=1)
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert reference.generate(torch.tensor([ids]), **options)[0].tolist() == tokens[0].tolist()
        expected.append({"prompt": ids, "new": tokens[0, len(ids) :].tolist()})

    request = {"model": str(out), "prompts": PROMPTS, "max_tokens": NEW_TOKENS}
    served = subprocess.run(
        [PYTHON, SERVER, json.dumps(request), tmp_path / "served.json"],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    sys.stdout.write(served.stdout[-3000:])
    assert served.returncode == 0, served.stderr[-5000:]
    assert json.loads((tmp_path / "served.json").read_text()) == expected
