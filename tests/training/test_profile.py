"""Traces of training steps, and their time by groups of operators."""

from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from moe.accounting.flops import matmul_costs
from moe.config import ModelConfig, RouterConfig
from moe.model import ModelInputs, Transformer
from training.due import is_due
from training.loop import step_flops
from training.report import profile as profiles
from training.report.profile import group_of, mark_parts, read_trace, summarize_trace
from training.step import StepResult

MODEL = ModelConfig(
    dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=31, num_experts=4,
    top_k=2, first_k_dense=1,
)  # fmt: skip


def traced_model(directory: Path) -> list[dict]:
    """Return the events of a forward and a backward pass of a small model."""
    torch.manual_seed(0)
    model = Transformer(MODEL, RouterConfig(), torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens_BS = torch.randint(31, (2, 12))
    inputs = ModelInputs(tokens_BS, torch.arange(12).expand(2, 12))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with mark_parts([model]), profile() as profiler:
        model(inputs).logits_BSV.square().sum().backward()
        optimizer.step()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    file = directory / "trace.json.gz"
    profiler.export_chrome_trace(str(file))
    return read_trace(file)


def test_operators_of_a_real_trace_belong_to_the_part_of_the_model_that_calls_them(tmp_path, monkeypatch):
    found: dict[tuple[str, str | None], int] = {}

    def count(names, part, *, copies=False):
        found[names[0], part] = found.get((names[0], part), 0) + 1
        return group_of(names, part, copies=copies)

    monkeypatch.setattr(profiles, "group_of", count)
    summary = summarize_trace(traced_model(tmp_path), 1)
    # A matmul has two in the backward pass, which have no hooks. Attention has four projections in each of two layers.
    matmuls = {part: number for (name, part), number in found.items() if name == "aten::mm"}
    experts = 4 * 3  # w_gate, w_up and w_down of each expert, also of those without rows
    expected = {"head": 3, "attention": 2 * 4 * 3, "dense": 3 * 3, "routing": 3}
    assert {part: matmuls[part] for part in expected} == expected and matmuls["experts"] >= 3 * 9
    assert matmuls["experts"] <= 3 * experts and None not in matmuls
    assert found["_ScatterBackward", "dispatch"] == found["_CombineBackward", "dispatch"] == 1
    assert sum(summary.group_ms.values()) == pytest.approx(summary.step_ms)
    assert {profiles.OPTIMIZER, profiles.NORMS, profiles.ATTENTION} <= summary.group_ms.keys()


def test_blocks_that_are_compiled_get_no_hooks():
    model = Transformer(MODEL, RouterConfig(), torch.float32)
    model.run_block = lambda block, *arguments: block(*arguments)
    with mark_parts([model]):
        hooked = [name for name, module in model.named_modules() if module._forward_hooks]
    assert hooked == ["norm", "head", "lookup"]


@pytest.mark.parametrize(
    ("names", "part", "group"),
    [
        (["void cutlass::device_kernel<GroupProblemShape>", "aten::_grouped_mm"], None, profiles.EXPERTS),
        (["nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "aten::mm", "aten::linear"], "experts", profiles.EXPERTS),
        (["nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "aten::mm", "aten::linear"], "attention", profiles.DENSE),
        (["sm90_xmma_gemm_f32f32", "aten::mm"], "routing", profiles.ROUTING),
        (["nvjet_tst", "aten::mm", "autograd::engine::evaluate_function: MmBackward0"], "head", profiles.HEAD),
        (["pytorch_flash::flash_fwd_kernel<>", "aten::_flash_attention_forward"], "core", profiles.ATTENTION),
        (["triton_tem_fused_flex_attention_0"], None, profiles.ATTENTION),
        (["vectorized_elementwise_kernel<4, silu_kernel>", "aten::silu"], "experts", profiles.ELEMENTWISE),
        (["bfloat16tofloat32_copy_kernel", "aten::copy_", "aten::_to_copy", "aten::to"], "experts", profiles.CASTS),
        (["triton_poi_fused__to_copy_t_3"], None, profiles.CASTS),
        (["triton_poi_fused__to_copy_mul_silu_3"], None, profiles.ELEMENTWISE),
        (["triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_2"], None, profiles.NORMS),
        (["multi_tensor_apply_kernel<>", "aten::_fused_adamw_", "Optimizer.step#AdamW.step"], None, profiles.OPTIMIZER),
        (["indexSelectLargeIndex<>", "aten::index_select", "_Scatter"], "dispatch", profiles.DISPATCH),
        (["scatter_kernel", "mixwright::scatter_rows"], None, profiles.DISPATCH),
        (["top_k_kernel", "mixwright::top_k"], None, profiles.ROUTING),
        (["matmul_kernel", "mixwright::wide_linear_grad_weight"], None, profiles.ROUTING),
        (["sm90_xmma_gemm_bf16bf16", "aten::mm", "mixwright::wide_linear_grad_input"], None, profiles.ROUTING),
        (["forward_kernel", "mixwright::swiglu"], None, profiles.ELEMENTWISE),
        (["gradient_kernel", "mixwright::write_logit_gradient"], None, profiles.HEAD),
        (["indexSelectLargeIndex<>", "aten::index_select", "aten::embedding"], "embedding", profiles.EMBEDDING),
        (["DeviceRadixSortOnesweepKernel", "aten::sort"], None, profiles.ROUTING),
        (["CatArrayBatchedCopy<>", "aten::cat"], "attention", profiles.NORMS),
        (["ncclDevKernel_AllReduce_Sum_f32_RING_LL"], None, profiles.COMMUNICATION),
        (["vectorized_elementwise_kernel<4, FillFunctor>", "aten::fill_", "aten::zero_"], None, profiles.COPIES),
    ],
)  # fmt: skip
def test_groups_by_hand(names, part, group):
    assert group_of(names, part) == group


def kernel(name: str, start: float, length: float, correlation: int, kind: str = "kernel") -> dict:
    return {
        "ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "pid": 0, "tid": 7,
        "args": {"correlation": correlation},
    }  # fmt: skip


def host(name: str, start: float, length: float, kind: str = "cpu_op", thread: int = 1, **arguments: object) -> dict:
    return {
        "ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "pid": 9, "tid": thread, "args": arguments,
    }  # fmt: skip


def test_the_time_of_a_gpu_is_that_of_its_kernels_and_of_its_waits():
    forward, backward = {"Sequence number": 5, "Fwd thread id": 0}, {"Sequence number": 5, "Fwd thread id": 1}
    events = [
        host("part: data", 0, 30, "user_annotation"),
        host("part: experts", 40, 20, "user_annotation"),
        host("aten::mm", 41, 10, **forward),
        host("cudaLaunchKernel", 42, 1, "cuda_runtime", correlation=1),
        host("autograd::engine::evaluate_function: MmBackward0", 70, 20, thread=2, **backward),
        host("aten::mm", 71, 10, thread=2),
        host("part: routing", 82, 5, "user_annotation", thread=2),
        host("aten::mm", 83, 2, thread=2, **forward),  # recomputed
        host("cuLaunchKernel", 72, 1, "cuda_driver", thread=2, correlation=2),
        kernel("other", 10, 5, 3),
        kernel("nvjet", 50, 20, 1),
        kernel("nvjet", 60, 30, 2),  # It starts on another stream before the one before it ends.
        kernel("Memcpy DtoH", 95, 5, 4, "gpu_memcpy"),
        {"ph": "X", "cat": "gpu_user_annotation", "name": "part: experts", "ts": 10, "dur": 90, "pid": 0, "tid": 7},
    ]
    summary = summarize_trace(events, steps=2)
    assert summary.step_ms == pytest.approx(0.045)
    expected = {"experts' matmul": 20, "other": 2.5, "copies": 2.5, "data": 7.5, "idle": 12.5}
    assert {group: time * 1e3 for group, time in summary.group_ms.items()} == pytest.approx(expected)
    assert summary.names[0][:2] == ("experts' matmul", "nvjet")


def test_the_flops_of_the_groups_are_those_of_the_step():
    costs = matmul_costs(Transformer(MODEL, RouterConfig(), torch.float32))
    counts_LE = torch.tensor([[20, 10, 10, 8]])
    result = StepResult(1.0, 1.0, 1.0, 1.0, 1.0, 24, 150, counts_LE, counts_LE - torch.tensor([[3, 0, 0, 0]]))
    flops = profiles.flops_by_group(result, costs, MODEL)
    assert sum(flops.values()) == step_flops(result, costs) and min(flops.values()) > 0


@pytest.mark.parametrize(("steps", "traced"), [(1, [1]), (2, [2]), (4, [2, 3, 4]), (20, [5, 6, 7])])
def test_a_run_of_any_length_is_traced(tmp_path, steps, traced):
    model = Transformer(MODEL, RouterConfig(), torch.float32)
    counts_LE = torch.tensor([[20, 10, 10, 8]])
    result = StepResult(1.0, 1.0, 1.0, 1.0, 1.0, 24, 150, counts_LE, counts_LE)
    profiler = profiles.StepProfiler(
        [model], torch.device("cpu"), tmp_path, steps=steps, first_step=0, costs=matmul_costs(model), ranks=1,
        peak=1e12, about={"run": "x"},
    )  # fmt: skip
    with profiler:
        for _ in range(steps):
            torch.zeros(1).asinh()
            profiler.step(result)
    text = (tmp_path / "profile.md").read_text()
    assert f"- steps: {traced[0]} to {traced[-1]}\n" in text and "of the peak" in text
    events = read_trace(tmp_path / "profile" / "trace.json.gz")
    assert sum(event.get("name") == "aten::asinh" for event in events) == len(traced)


def test_a_checkpoint_at_the_end_can_be_left_out():
    assert is_due(10, 0, 10) and not is_due(10, 0, 10, at_end=False)
    assert is_due(10, 5, 10, at_end=False) and not is_due(9, 5, 10, at_end=False)
