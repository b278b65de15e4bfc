"""Parts of the training loop: schedules, optimizer groups, throughput."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.errors import ConfigError
from data.batch import Batch
from data.packing import pack_row
from moe.accounting.flops import matmul_costs, training_flops_per_token
from moe.config import ModelConfig, RouterConfig, attended_pairs
from moe.figures import LAYER_FIGURES, METRICS
from moe.model import ModelInputs, Transformer
from training.config import OptimConfig
from training.due import is_due
from training.host import check_memory
from training.loop import Throughput, speed_row, step_flops, step_row
from training.optimizer import build_optimizer
from training.schedule import SCHEDULES, learning_rate
from training.step import StepResult


def test_a_model_beyond_the_memory_of_the_host_is_refused(monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 16}.__getitem__)
    check_memory(1000, state=8000, local_ranks=2)
    with pytest.raises(ConfigError, match=r"^train.device=cpu: expected a model that fits this host's .* 1,000 param"):
        check_memory(1000, state=8001, local_ranks=2)


def test_cosine_by_hand():
    config = OptimConfig(lr=1.0, warmup_steps=2, min_lr_ratio=0.1)
    rates = [learning_rate(step, 7, config) for step in range(7)]
    half = 0.1 + 0.9 * 0.5
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[4] == pytest.approx(half) and rates[6] == pytest.approx(0.1)
    assert rates[3] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_flat_then_linear():
    config = OptimConfig(lr=1.0, warmup_steps=0, schedule="wsd", decay_steps=4, min_lr_ratio=0.0)
    assert [learning_rate(step, 8, config) for step in range(8)] == [1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


def test_warmup_defaults_to_a_twentieth():
    config = OptimConfig(lr=1.0, schedule="constant")
    assert [learning_rate(step, 40, config) for step in range(3)] == [0.5, 1.0, 1.0]


def test_only_matrices_decay():
    module = torch.nn.ModuleList([torch.nn.LayerNorm(4, bias=False), torch.nn.Linear(4, 4, bias=False)])
    decayed, plain = build_optimizer(list(module.parameters()), OptimConfig(lr=1.0, weight_decay=0.3)).param_groups
    assert decayed["params"] == [module[1].weight] and decayed["weight_decay"] == 0.3
    assert plain["params"] == [module[0].weight] and plain["weight_decay"] == 0.0


def test_throughput_of_an_interval_and_of_all_steps():
    throughput = Throughput()
    assert throughput.of_all_steps() is None
    throughput.add(10, 70, 2.0)
    assert throughput.of_interval() == (5.0, 35.0) and throughput.of_all_steps() == 5.0
    throughput.start_interval()
    throughput.add(20, 60, 1.0)
    assert (throughput.of_interval(), throughput.of_all_steps()) == ((20.0, 60.0), 10.0)
    assert speed_row(throughput, None) == {"speed/tokens_per_s": 20.0}
    assert speed_row(throughput, 240.0) == {"speed/tokens_per_s": 20.0, "speed/mfu": 0.25}


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(capacity_factor=0.5),
        RouterConfig(kind="expert_choice", allow_noncausal=True, balance_coef=0.0, capacity_factor=1.5),
    ],
    ids=lambda router: router.kind,
)
def test_the_flops_of_a_step_are_those_that_torch_counts(router):
    """torch counts the matmuls that run, forward and backward. Attention is counted pair by pair, with the mask."""
    config = ModelConfig(
        dim=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=31, num_experts=4,
        top_k=2, num_shared_experts=1, first_k_dense=1, sliding_window=(3, None, 5), expert_kernel="loop",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config, router, torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = np.random.default_rng(0).integers(31, size=(2, 13))
    rows = [pack_row(tokens[0], np.array([4, 9]), np.zeros(3, int), 12, cross_documents=False)]
    rows.append(pack_row(tokens[1], np.array([10]), np.zeros(2, int), 12, cross_documents=False))
    batch = Batch.stack(rows)
    with FlopCounterMode(display=False) as counter:
        output = model(ModelInputs(batch.tokens_BS, batch.positions_BS, batch.documents_BS))
        output.logits_BSV.sum().backward()
    matmuls = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")

    visible = 0
    for document in batch.documents_BS.tolist():
        for window in (3, 12, 5):
            visible += sum(document[q] == document[k] and q - k < window for q in range(12) for k in range(q + 1))
    pairs = sum(map(batch.attended_pairs, (3, None, 5)))
    assert pairs == visible < sum(attended_pairs(window, 12) for window in (3, None, 5)) * 2

    stats = output.stats
    result = StepResult(0, 0, None, None, 0, batch.num_valid, pairs, stats.counts_BE.sum(1), stats.kept_BE.sum(1))
    assert (result.dropped > 0) == (router.kind == "softmax_topk")
    flops = step_flops(result, matmul_costs(model))
    assert flops == matmuls + 3 * 4 * 2 * 8 * visible
    # `describe` assumes full rows of one document. With a balanced load it has the same number of experts per token.
    one_document = training_flops_per_token(model, 12) * 24 - 3 * 4 * 2 * 8 * 2 * sum(
        attended_pairs(window, 12) for window in (3, None, 5)
    )
    assert one_document == pytest.approx(matmuls, rel=0.1 if result.dropped else 1e-12)


def test_what_is_due_every_few_steps_and_at_the_end():
    assert [done for done in range(1, 9) if is_due(done, 3, 8)] == [3, 6, 8]
    assert [done for done in range(1, 9) if is_due(done, 0, 8)] == [8]


@pytest.mark.parametrize("factor", [math.nan, -1, None, "x"])
def test_a_schedule_that_returns_no_learning_rate_is_refused(monkeypatch, factor):
    monkeypatch.setitem(SCHEDULES._entries, "mine", lambda at: factor)
    config = OptimConfig(lr=1.0, schedule="mine", warmup_steps=0)
    with pytest.raises(ConfigError, match=rf"^optim.schedule=mine: .* a number >= 0, found {factor!r} at step 2$"):
        learning_rate(2, 6, config)


@pytest.mark.parametrize("top_k", [2, 4])
def test_every_metric_of_a_router_has_a_name_that_no_plugin_can_take(top_k):
    layers = {name: [1.0, 2.0] for name in LAYER_FIGURES if name != "margin" or top_k < 4}
    counts_LE = torch.tensor([[3, 1, 0, 0], [1, 1, 1, 1]])
    norms_2LF = torch.arange(20.0).view(2, 2, 5)
    row = step_row(StepResult(1, 1, 1, 1, 1, 4, 9, counts_LE, counts_LE, layers, norms_2LF=norms_2LF), 0.1, 2)
    names = {key.removeprefix("router/").split("/")[0] for key in row if key.startswith("router/")}
    assert names <= {*METRICS} and set(layers) <= names and "straggler_placed" in names
    assert row["router/entropy"] == 1.5 and row["router/entropy/layer_01"] == 2
    assert ("router/margin" in row) == (top_k < 4)
    assert row["router/weight_norm/layer_01"] == 5 and row["router/grad_norm/layer_00"] == 10
    assert row["experts/weight_norm/layer_00"] == [1, 2, 3, 4] and row["experts/grad_norm/layer_01"] == [16, 17, 18, 19]
    assert row["router/balance_loss"] == 1 and row["router/balance_loss/layer_01"] == 2
