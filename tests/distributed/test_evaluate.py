"""Held-out figures over ranks equal a loop over single tokens."""

import math

import torch

from data.batch import IGNORE
from data.config import DataConfig
from data.loader import evaluation_batches
from data.tokens.store import prepare
from moe.config import ModelConfig, RouterConfig
from moe.model import ModelInputs
from parallel.apply import build_model
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.distributed.harness import run_ranks
from tests.tokenizers import sentencepiece_model
from training.config import OptimConfig
from training.engine import NativeEngine
from training.step import Evaluation, evaluate

LENGTH = 24


def run(rank: int, world: int, cache: str) -> tuple[Evaluation, dict]:
    store = prepare(DataConfig(kind="embedded", cache=cache, tokenizer=f"{cache}/with_prefix.model", **SIZES))
    mesh = build_mesh(torch.device("cpu"), Layout(replicate=world, expert=world))
    config = ModelConfig(
        dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=8, num_experts=4, top_k=2,
        vocab_size=400, sliding_window=9, init_std=0.3,
    )  # fmt: skip
    model = build_model(config, RouterConfig(), mesh, compute_dtype=torch.float64, seed=0)
    token_bytes = torch.from_numpy(store.tokenizer.token_bytes())
    prefix_bytes = torch.zeros_like(token_bytes)
    prefix_bytes[store.tokenizer.bos_id] = 1  # The tokenizer puts a space after <s>, which is no byte of the text.
    batches = evaluation_batches(
        store.heldout, seq_len=LENGTH, batch_rows=3, rank=rank, world_size=world, cross_documents=False
    )
    engine = NativeEngine([model], OptimConfig(lr=1e-3), mesh)
    result = evaluate(engine, batches, (*store.domains, "without held-out text"), token_bytes, prefix_bytes)
    return result, reference(model, store, token_bytes) if world == 1 else {}


SIZES = {"code_bytes": 30_000, "prose_bytes": 30_000, "arithmetic_bytes": 20_000, "heldout_max_bytes": 750}


def reference(model, store, token_bytes) -> dict:
    """Row by row, token by token."""
    nats, size, labels = [0.0] * len(store.domains), [0] * len(store.domains), 0
    for i in range(store.heldout.num_rows(LENGTH)):
        row = store.heldout.row(i, LENGTH)
        tokens, targets, positions, documents, domains = (
            torch.from_numpy(column.copy()).unsqueeze(0) for column in row
        )
        with torch.no_grad():
            log_p = model(ModelInputs(tokens, positions, documents, documents >= 0)).logits_BSV.log_softmax(-1)[0]
        for s in range(LENGTH):
            target = int(targets[0, s])
            if target != IGNORE:
                nats[domains[0, s]] -= log_p[s, target].item()
                size[domains[0, s]] += int(token_bytes[target]) - int(tokens[0, s] == store.tokenizer.bos_id)
                labels += 1
    return {
        "loss": sum(nats) / labels,
        "bits": {d: n / math.log(2) / b for d, n, b in zip(store.domains, nats, size, strict=True)},
        "bytes": dict(zip(store.domains, size, strict=True)),
        "heldout": {row["domain"]: row["heldout_bytes"] for row in store.summary()},
        "tokens": sum(int((store.heldout.row(i, LENGTH)[3] >= 0).sum()) for i in range(store.heldout.num_rows(LENGTH))),
    }


def test_bits_per_byte_and_load_equal_a_loop(tmp_path):
    (tmp_path / "with_prefix.model").write_bytes(sentencepiece_model())
    [(single, expected)] = run_ranks(run, 1, str(tmp_path))
    assert abs(single.loss - expected["loss"]) < 1e-9
    assert single.bits_per_byte.keys() == expected["bits"].keys()  # Without the domain that has no held-out text.
    for domain, bits in expected["bits"].items():
        assert abs(single.bits_per_byte[domain] - bits) < 1e-9
    # Rows cut documents, and the first token of a row has no context: it is a label of the row before.
    assert expected["bytes"] == expected["heldout"]
    assert single.load_GLE.sum(dim=(0, 2)).tolist() == [2 * expected["tokens"]] * 2
    for result, _ in run_ranks(run, 2, str(tmp_path)):
        assert abs(result.loss - single.loss) < 1e-9
        assert torch.equal(result.load_GLE, single.load_GLE)
