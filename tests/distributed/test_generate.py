"""Generation under expert parallelism equals that of a single process, also if rows end at different times."""

import pytest
import torch

from moe.config import ModelConfig, RouterConfig
from moe.generation.generate import generate
from moe.generation.sampling import Sampling
from moe.model import ModelInputs
from parallel.apply import Storage, build_model
from parallel.layout import Layout
from parallel.mesh import broadcast_from_first, build_mesh
from tests.distributed.harness import run_ranks

CONFIG = ModelConfig(
    dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=12, num_experts=4, top_k=2,
    vocab_size=40, sliding_window=(4, None), init_std=0.4,
)  # fmt: skip
PROMPTS = [[1, 2, 3], [7], [5, 6, 7, 8, 9, 10, 11]]


def run(rank: int, world: int) -> list[list[list[int]]]:
    mesh = build_mesh(torch.device("cpu"), Layout(replicate=world, expert=world))
    # With this capacity most assignments would be dropped. Generation must ignore it.
    router = RouterConfig(capacity_factor=0.1)
    results = []
    for dtype, inference_weights in ((torch.float64, False), (torch.float64, True)):
        model = build_model(CONFIG, router, mesh, compute_dtype=dtype, seed=3, storage=Storage(inference_weights))
        for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=5)):
            results.append(
                generate(
                    model,
                    PROMPTS,
                    max_tokens=12,
                    sampling=sampling,
                    stop=[4, 17, 30],
                    prefill_chunk=3,
                    on_token=lambda row, token: row == 1 and token % 5 == 0,
                    agree=lambda logits_BV: broadcast_from_first(logits_BV, mesh),
                )
            )
    return results


@pytest.mark.slow
def test_expert_parallel_generation_equals_a_single_process():
    [single] = run_ranks(run, 1)
    assert len({len(tokens) for tokens in single[1]}) > 1  # The rows end at different times.
    for results in run_ranks(run, 2):
        assert results == single


def run_inference_weights(rank: int, world: int) -> list[list[torch.Tensor]]:
    mesh = build_mesh(torch.device("cpu"), Layout(replicate=world, expert=world))
    tokens = torch.arange(30).view(2, 15)
    positions = torch.arange(15).expand(2, -1)
    router = RouterConfig(kind="sigmoid_topk", bias_update_rate=0.001)
    models = [
        build_model(CONFIG, router, mesh, compute_dtype=torch.bfloat16, seed=3, storage=Storage(inference_weights))
        for inference_weights in (True, False)
    ]
    sizes = [torch.tensor(sum(p.nbytes for p in model.parameters())) for model in models]
    with torch.no_grad():
        return [[model(ModelInputs(tokens, positions)).logits_BSV for model in models], sizes]


def test_inference_weights_take_half_the_memory_and_change_no_logit():
    [(logits, sizes)] = run_ranks(run_inference_weights, 1)
    assert torch.equal(*logits) and sizes[0] < 0.55 * sizes[1]
