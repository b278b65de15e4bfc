"""Held-out figures and probes over ranks equal a loop over single tokens."""

import math

import numpy as np
import torch

from data.batch import IGNORE
from data.config import DataConfig
from data.loader import evaluation_batches
from data.tokens.split import Excerpt
from data.tokens.store import prepare
from moe.config import ModelConfig, RouterConfig
from moe.model import ModelInputs
from moe.router import Router
from parallel.apply import build_model
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh
from parallel.pipeline import Pipeline
from tests.distributed.harness import run_ranks
from tests.tokenizers import sentencepiece_model
from training.config import OptimConfig
from training.engine import NativeEngine
from training.probe import as_routing, excerpt_rows, probe_batches, route
from training.report.probe import ProbeRouting
from training.step import Evaluation, evaluate

LENGTH = 24


MODEL = ModelConfig(
    dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=8, num_experts=4, top_k=2, vocab_size=400,
    sliding_window=9, init_std=0.3,
)  # fmt: skip


def run(rank: int, world: int, cache: str) -> tuple[Evaluation, dict, list[ProbeRouting]]:
    store = prepare(DataConfig(kind="embedded", cache=cache, tokenizer=f"{cache}/with_prefix.model", **SIZES))
    mesh = build_mesh(torch.device("cpu"), Layout(replicate=world, expert=world))
    config = MODEL
    model = build_model(config, RouterConfig(), mesh, compute_dtype=torch.float64, seed=0)
    token_bytes = torch.from_numpy(store.tokenizer.token_bytes())
    prefix_bytes = torch.zeros_like(token_bytes)
    prefix_bytes[store.tokenizer.bos_id] = 1  # The tokenizer puts a space after <s>, which is no byte of the text.
    batches = evaluation_batches(
        store.heldout, seq_len=LENGTH, batch_rows=3, rank=rank, world_size=world, cross_documents=False
    )
    engine = NativeEngine([model], OptimConfig(lr=1e-3), mesh)
    result = evaluate(engine, batches, (*store.domains, "without held-out text"), token_bytes, prefix_bytes)
    expected = reference(model, store, token_bytes) if world == 1 else {}
    return result, expected, probes(rank, world, store)


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


# Capacity and jitter, which a probe leaves out, would change the routing.
ROUTER = RouterConfig(capacity_factor=0.5, jitter=0.3)
LAYOUTS = {
    1: [ParallelConfig()],
    2: [
        ParallelConfig(**axes) for axes in ({"expert": 2}, {"tensor": 2}, {"context": 2}, {"pipeline": 2}, {"shard": 2})
    ],
}


def probes(rank: int, world: int, store) -> list[ProbeRouting]:
    """The routing under each layout; in one process also that of a loop."""
    excerpts = store.heldout.excerpts(150, LENGTH - 2)
    rows = excerpt_rows(excerpts, LENGTH)
    used = np.array([row.documents_S >= 0 for row in rows]).ravel()
    assert used.sum() == 150 < len(used)
    routings = []
    for parallel in LAYOUTS[world]:
        layout = parallel.layout(world, MODEL)
        mesh = build_mesh(torch.device("cpu"), layout)
        layers = None if layout.pipeline == 1 else [rank]
        parts = [build_model(MODEL, ROUTER, mesh, compute_dtype=torch.float64, seed=0, layers=layers)]
        pipeline = None if layout.pipeline == 1 else Pipeline(parts, [rank], mesh, "1f1b")
        engine = NativeEngine(parts, OptimConfig(lr=1e-3), mesh, pipeline)
        batches = probe_batches(rows, most_rows=2, rank=layout.data_rank(rank), world_size=layout.data)
        routings.append(as_routing(route(engine, batches, len(used)).numpy()[:, used], 4))
        assert parts[0].training
    return [*routings, by_loop(mesh, excerpts)] if world == 1 else routings


@torch.no_grad()
def by_loop(mesh: Mesh, excerpts: list[Excerpt]) -> ProbeRouting:
    """A model without capacity gets each excerpt alone. The choice is made in Python from the routers' inputs."""
    model = build_model(MODEL, RouterConfig(), mesh, compute_dtype=torch.float64, seed=0).eval()
    routers = [module for module in model.modules() if isinstance(module, Router)]
    experts, weights, margins = ([[] for _ in routers] for _ in range(3))

    def choose(router: Router, arguments: tuple) -> None:
        layer = routers.index(router)
        for x_D in arguments[0][0]:
            powers = [math.exp(logit) for logit in (router.weight @ x_D).tolist()]
            best = sorted(range(4), key=lambda expert: (-powers[expert], expert))
            first, second, third = (powers[expert] / sum(powers) for expert in best[:3])
            experts[layer].append(best[:2])
            weights[layer].append([first / (first + second), second / (first + second)])
            margins[layer].append(second - third)

    for router in routers:
        router.register_forward_pre_hook(choose)
    for excerpt in excerpts:
        tokens_BS = torch.from_numpy(excerpt.tokens_T.astype(np.int64)).unsqueeze(0)
        model(ModelInputs(tokens_BS, torch.arange(tokens_BS.shape[1]).unsqueeze(0)))
    return ProbeRouting(np.array(experts), np.array(weights), np.array(margins), 4)


def assert_same_routing(routing: ProbeRouting, expected: ProbeRouting) -> None:
    assert (routing.experts_LTK == expected.experts_LTK).all()
    np.testing.assert_allclose(routing.weights_LTK, expected.weights_LTK, rtol=1e-6)
    np.testing.assert_allclose(routing.margin_LT, expected.margin_LT, atol=1e-7)


def test_bits_per_byte_load_and_probe_equal_a_loop(tmp_path):
    (tmp_path / "with_prefix.model").write_bytes(sentencepiece_model())
    [(single, expected, [alone, counted])] = run_ranks(run, 1, str(tmp_path))
    assert abs(single.loss - expected["loss"]) < 1e-9
    assert single.bits_per_byte.keys() == expected["bits"].keys()  # Without the domain that has no held-out text.
    for domain, bits in expected["bits"].items():
        assert abs(single.bits_per_byte[domain] - bits) < 1e-9
    # Rows cut documents, and the first token of a row has no context: it is a label of the row before.
    assert expected["bytes"] == expected["heldout"]
    assert single.load_GLE.sum(dim=(0, 2)).tolist() == [2 * expected["tokens"]] * 2
    assert_same_routing(alone, counted)
    for result, _, routings in run_ranks(run, 2, str(tmp_path)):
        assert abs(result.loss - single.loss) < 1e-9
        assert torch.equal(result.load_GLE, single.load_GLE)
        for routing in routings:
            assert_same_routing(routing, alone)
