"""No operator of a training step makes the host wait for a GPU: the real step on the meta device, without values."""

from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from benchmarks.fake_step import META, Walk, walk_step
from benchmarks.gpu_stages.models import example_batch
from data.batch import Batch
from moe.accounting.flops import meta_model, training_flops_per_token
from moe.config import ModelConfig, RouterConfig
from moe.recompute import Recompute

LENGTH = 16
MODEL = ModelConfig(
    dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, num_experts=4, top_k=2,
    num_shared_experts=1, first_k_dense=1, vocab_size=64, expert_kernel="grouped",
)  # fmt: skip
ROUTERS = {
    "dropless": RouterConfig(jitter=0.1),
    "capacity": RouterConfig(capacity_factor=1.0),
    "bias": RouterConfig(kind="sigmoid_topk", bias_update_rate=0.1, capacity_factor=1.0),
    "by score": RouterConfig(capacity_factor=1.0, drop_policy="prob", allow_noncausal=True),
}


def batch(rows: str) -> Batch:
    found = example_batch(2, LENGTH, 64, padded=rows == "padded")
    if rows != "packed":
        return found
    documents = found.documents_BS.clone()
    documents[:, LENGTH // 2 :] = 1
    return Batch(**{**vars(found), "documents_BS": documents})


@pytest.mark.parametrize(
    ("rows", "kernels"),
    [
        pytest.param(rows, kernels, marks=() if kernels or rows == "packed" else pytest.mark.slow)
        for rows in ("full", "packed", "padded")
        for kernels in ([False, True] if find_spec("triton") else [False])
    ],
)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_host_never_waits(router: str, rows: str, kernels: bool) -> None:
    step = walk_step(MODEL, ROUTERS[router], [batch(rows)] * 2, kernels=kernels, measured=rows == "packed")
    assert step.waits == []
    assert len(step.copies) == 5  # Two micro-batches and their segments to the device, and the figures to the host.
    names = {operator.name for operator in step.operators}
    assert {"_grouped_mm", "_fused_adamw_", "attention_backward"} <= names
    assert ("combine_rows" in names) == kernels
    assert ("linalg_vector_norm" in names) == (rows == "packed")


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_the_host_never_waits_for_what_is_recomputed(mode: Recompute) -> None:
    plain, again = (walk_step(MODEL, RouterConfig(), [batch("full")], recompute) for recompute in ("none", mode))
    assert again.waits == [] and again.saved_bytes < plain.saved_bytes
    assert len(again.operators) > len(plain.operators)


def test_expert_choice_waits_once_in_each_layer() -> None:
    router = RouterConfig(kind="expert_choice", allow_noncausal=True, balance_coef=0.0)
    waits = walk_step(MODEL, router, [batch("full")]).waits
    assert len(waits) == 2 and all(wait.startswith("moe/router.py:") for wait in waits)


WAITS: dict[str, Callable[[Tensor], object]] = {
    "a number": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 0).any()),
    "a mask": lambda x: x[x > 0],
    "an assignment to a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "a list of indices": lambda x: x[[0, 2]],
    "a count": lambda x: torch.bincount(x.long()),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from pageable memory": lambda x: torch.ones(3).to(META, non_blocking=True),
    "a copy that blocks": lambda x: torch.ones(3).pin_memory().to(META),
    "numbers in a tensor": lambda x: torch.tensor([1, 2], device=META),
}


@pytest.mark.parametrize("name", WAITS)
def test_every_kind_of_wait_is_found(name: str) -> None:
    walk, x = Walk(), torch.ones(3, device=META)
    with walk.watch():
        x * 2 + torch.zeros(3).pin_memory().to(META, non_blocking=True)
        x.to("cpu", non_blocking=True)
        assert walk.waits == [] and len(walk.copies) == 2
        with suppress(NotImplementedError):  # The result of some has a shape that depends on values.
            WAITS[name](x)
    assert len(walk.waits) == 1 and walk.waits[0].startswith("tests/test_fake_step.py:")


def test_the_work_of_a_step_is_that_of_the_formulas() -> None:
    """Matmuls are exact. Attention is counted for full rows, with half of the pairs of a causal mask."""
    step = walk_step(MODEL, RouterConfig(), [batch("full")] * 2)
    tokens = 2 * 2 * LENGTH
    wide = ("wide_linear", "wide_linear_grad_input", "wide_linear_grad_weight")
    names = ("mm", "_grouped_mm", "add_bf16_product", *wide)
    matmuls = sum(operator.flops for operator in step.operators if operator.name in names)
    attention = sum(operator.flops for operator in step.operators if operator.name.startswith("attention"))
    pairs = 3 * 2 * 2 * LENGTH * (LENGTH + 1) // 2
    assert attention == 7 * 2 * 4 * 8 * 3 * 2 * 2 * LENGTH * (LENGTH + 1) // 2
    formula = tokens * training_flops_per_token(meta_model(MODEL, RouterConfig()), LENGTH)
    assert matmuls == formula - 3 * 4 * 4 * 8 * pairs
