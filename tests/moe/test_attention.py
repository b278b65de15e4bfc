"""Attention against a float64 mask, and RoPE against its definition."""

import gc
import math
import weakref

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.utils.flop_counter import FlopCounterMode

from moe.attention.attention import AttentionCore, GroupedQueryAttention
from moe.attention.flex import _compiled, block_mask, flex
from moe.attention.varlen import segments_of
from moe.config import ModelConfig
from moe.token_context import TokenContext, apply_rotary, rotary_table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rotation_has_the_bits_of_its_formula_forward_and_backward(dtype):
    x_BHSC = torch.randn(2, 33, 3, 10, dtype=dtype).transpose(1, 2)
    grad_BHSC = torch.randn(2, 3, 33, 10, dtype=dtype)
    cos, sin = rotary_table(torch.randint(10_000, (2, 33)), 10, 1e4, dtype)

    def formula(x, table):
        first, second = x.chunk(2, dim=-1)
        return x * table[0] + torch.cat((-second, first), dim=-1) * table[1]

    results = []
    for rotate in (formula, apply_rotary):
        leaf_BHSC = x_BHSC.clone().requires_grad_()
        y_BHSC = rotate(leaf_BHSC, (cos, sin))
        y_BHSC.backward(grad_BHSC)
        results.append((y_BHSC.detach(), leaf_BHSC.grad))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


def masked_reference(q, k, v, documents, window):
    """Every query against every key in float64, one softmax over an explicit mask. Queries stand at the end."""
    groups, earlier = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    i, j = torch.arange(earlier, k.shape[2]).unsqueeze(1), torch.arange(k.shape[2]).unsqueeze(0)
    mask = (j <= i) & (j > i - (window or k.shape[2]))
    mask = mask & (documents[:, earlier:].unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    ("length", "window"), [(1, 4), (7, 4), (8, 4), (9, 4), (16, 1), (13, 13), (13, 64), (12, None), (33, 5)]
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_core_equals_the_mask_forward_and_backward(length, window, kv_heads):
    torch.manual_seed(length)
    q, k, v = (torch.randn(3, h, length, 6, dtype=torch.float64, requires_grad=True) for h in (4, kv_heads, kv_heads))
    documents = torch.randint(0, 2, (3, length)).cumsum(1)
    documents[2, length // 2 :] = -1  # padding attends to padding, and nobody looks at it
    grad = torch.randn(3, 4, length, 6, dtype=torch.float64)
    expected = masked_reference(q, k, v, documents, window)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    got = AttentionCore(window)(q, k, v, TokenContext(documents_BS=documents))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for mine, reference in zip(torch.autograd.grad(got, (q, k, v), grad), expected_grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 5, 20, 40, 64, None])
@pytest.mark.parametrize(("earlier", "length"), [(1, 1), (3, 30), (30, 3), (39, 1), (25, 40)])
def test_queries_that_end_the_row_see_the_keys_in_front_of_them(earlier, length, window):
    torch.manual_seed(length)
    places = earlier + length
    shapes = [(3, 4, length, 6), (3, 2, places, 6), (3, 2, places, 6)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    documents = (torch.rand(3, places) < 0.1).cumsum(1)
    documents[2, places // 2 :] = -1
    grad = torch.randn_like(q)
    for given in (documents, None):
        expected = masked_reference(q, k, v, documents * (given is not None), window)
        got = AttentionCore(window)(q, k, v, TokenContext(documents_BS=given))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        pairs = zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (got, expected)), strict=True)
        for mine, reference in pairs:
            torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


def test_window_wastes_no_work_on_keys_without_queries():
    k = torch.randn(1, 2, 4096 + 16, 32)
    with FlopCounterMode(display=False) as counter:
        AttentionCore(48)(k[:, :, -16:], k, k, TokenContext())
    assert counter.get_total_flops() == 2 * 2 * 2 * 16 * (48 + 16) * 32  # two products of 2 heads, one block of 16


@pytest.mark.parametrize("window", [None, 4])
def test_bf16_on_cpus_goes_another_way_to_the_same_place(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 13, 8).bfloat16().requires_grad_() for h in (4, 2, 2))
    documents = torch.randint(0, 2, (2, 13)).cumsum(1)
    grad = torch.randn(2, 4, 13, 8)
    got = AttentionCore(window)(q, k, v, TokenContext(documents_BS=documents))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = masked_reference(*wide, documents, window)
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)
    grads = torch.autograd.grad(got, (q, k, v), grad.bfloat16())
    for mine, reference in zip(grads, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=0.05, atol=0.05)


def test_a_row_of_one_document_needs_no_document_ids():
    q, k, v = (torch.randn(2, 2, 11, 4, dtype=torch.float64) for _ in range(3))
    for window in (None, 4):
        core = AttentionCore(window)
        torch.testing.assert_close(
            core(q, k, v, TokenContext()),
            core(q, k, v, TokenContext(documents_BS=torch.zeros(2, 11, dtype=torch.int32))),
        )


def test_long_rows_are_worked_on_in_parts(monkeypatch):
    """As above where blocks are 128 wide, come several at a time, and the last part has fewer."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 1100, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    documents = (torch.rand(2, 1100) < 0.005).cumsum(1)
    grad = torch.randn(2, 4, 1100, 4, dtype=torch.float64)
    monkeypatch.setattr("moe.attention.window.SCORES_AT_ONCE", 4 * 2 * 4 * 128 * 512)
    for given in (documents, None):
        expected = masked_reference(q, k, v, documents * (given is not None), 300)
        got = AttentionCore(300)(q, k, v, TokenContext(documents_BS=given))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        pairs = zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (got, expected)), strict=True)
        for mine, reference in pairs:
            torch.testing.assert_close(mine, reference, rtol=0, atol=1e-11)


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest tensor that an operator made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.untyped_storage().nbytes() for x in made)])
        return out


@pytest.mark.parametrize("window", [64, 500])
def test_window_memory_does_not_grow_with_the_square_of_the_sequence(window):
    """Nothing that is made, or kept for the backward pass, is larger than a few bytes per element of q, k and v."""
    made, kept = [], []

    def pack(tensor):
        kept[-1] += tensor.nbytes
        return tensor

    for length in (4096, 8192):
        x = torch.randn(1, 2, length, 32, requires_grad=True)
        kept.append(0)
        with (
            Live() as live,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            AttentionCore(window)(
                x, x, x, TokenContext(documents_BS=torch.zeros(1, length, dtype=torch.int32))
            ).sum().backward()
        made.append(live.largest)
        assert kept[-1] <= 3 * x.nbytes + 4 * length
    assert kept[1] == 2 * kept[0] and made[1] <= 2 * made[0] and made[1] < 8192**2 / 4


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("packed", [True, False])
def test_mask_of_the_gpu_kernel(window, packed):
    """flex_attention is compiled on GPUs only; here its plain form runs on the same mask, forward."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, h, 150, 16) for h in (4, 2, 2))
    documents = (torch.rand(2, 150) < 0.05).cumsum(1)
    documents[1, 120:] = -1
    for queries in (150, 130, 7):
        q = q[:, :, -queries:]
        expected = masked_reference(q.double(), k.double(), v.double(), documents * packed, window)
        got = flex(q, k, v, TokenContext(documents_BS=documents if packed else None), window)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_mask_of_the_gpu_kernel_is_made_once_for_all_layers():
    documents = torch.zeros(1, 150, dtype=torch.int32)
    context, device = TokenContext(documents_BS=documents), documents.device
    first = block_mask(context, 5, 150, 150, device)
    assert block_mask(context, 5, 150, 150, device) is first
    assert block_mask(context, None, 150, 150, device) is not first
    assert block_mask(context, 5, 140, 150, device) is not first
    # Every forward pass makes a new context. The mask is made again, even if the tensor is the same object.
    documents[0, 70:] = 1
    assert block_mask(TokenContext(documents_BS=documents), 5, 150, 150, device) is not first
    freed = weakref.ref(first)
    del context, first
    gc.collect()
    assert freed() is None  # a mask lives as long as its context
    whole_rows = TokenContext()
    assert block_mask(whole_rows, 5, 150, 150, device) is block_mask(TokenContext(), 5, 150, 150, device)
    assert block_mask(whole_rows, 5, 140, 150, device) is not block_mask(whole_rows, 5, 150, 150, device)


@pytest.mark.slow
def test_the_gpu_kernel_never_runs_uncompiled():
    """torch would run a function without a graph, or with too many, in plain operators, which store all scores."""
    torch._dynamo.reset()
    compiled = _compiled(lambda x, size: x.new_ones([4] * size).sum())
    assert torch._dynamo.config.recompile_limit >= 64
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(FailOnRecompileLimitHit):
        for size in range(5):
            compiled(torch.ones(2), size)
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.05), (torch.float64, 1e-10)]
)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("queries", [500, 300])
@pytest.mark.parametrize("known", [True, False])
def test_gpu_kernels_forward_and_backward(dtype, tolerance, window, packed, queries, known):
    torch.manual_seed(1)
    shapes = [(2, 8, queries, 64), (2, 2, 500, 64), (2, 2, 500, 64)]
    inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    documents = (torch.rand(2, 500, device="cuda") < 0.01).cumsum(1)
    grad = torch.randn(2, 8, queries, 64, device="cuda", dtype=dtype)
    wide = [x.detach().double().cpu().requires_grad_() for x in inputs]
    expected = masked_reference(*wide, documents.cpu() * packed, window)
    segments = segments_of(documents.cpu() * packed, "cuda") if known else None
    context = TokenContext(documents_BS=documents if packed else None, segments=segments)
    got = AttentionCore(window)(*inputs, context)
    torch.testing.assert_close(got.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    pairs = zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, wide, grad.double().cpu()), strict=True
    )
    for mine, reference in pairs:
        torch.testing.assert_close(mine.double().cpu(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("window", "kv_heads", "rotary_dim"), [(5, 2, None), (None, 1, 4), (20, 4, 2)])
def test_projections_rotary_grouped_heads_window_and_documents_together(window, kv_heads, rotary_dim):
    """The module against one query at a time, every angle and every key by itself."""
    torch.manual_seed(3)
    config = ModelConfig(
        dim=12, num_layers=1, num_heads=4, num_kv_heads=kv_heads, head_dim=6, hidden_dim=8, vocab_size=9,
        sliding_window=window, num_experts=None, top_k=None, rotary_dim=rotary_dim,
    )  # fmt: skip
    width = config.rotary_width
    attention = GroupedQueryAttention(config, 0).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    length = 37
    documents = torch.tensor([[0] * 15 + [1] * 2 + [2] * 20])
    positions = torch.cat([torch.arange(n) for n in (15, 2, 20)]).unsqueeze(0)
    x = torch.randn(1, length, 12, dtype=torch.float64)
    got = attention(
        x,
        TokenContext(rotary=rotary_table(positions, width, config.rope_theta, torch.float64), documents_BS=documents),
    )[0]

    def turned(vector, position):
        out = vector.clone()
        for i in range(half := width // 2):
            angle = position * config.rope_theta ** (-2 * i / width)
            out[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
            out[i + half] = vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle)
        return out

    q, k, v = ((x[0] @ w.weight.T).view(length, -1, 6) for w in (attention.wq, attention.wk, attention.wv))
    for i in range(length):
        keys = [j for j in range(i + 1) if documents[0, j] == documents[0, i] and (window is None or i - j < window)]
        heads = []
        for head in range(4):
            group = head // (4 // kv_heads)
            query = turned(q[i, head], int(positions[0, i]))
            scores = torch.stack([query @ turned(k[j, group], int(positions[0, j])) for j in keys]) / math.sqrt(6)
            heads.append(scores.softmax(0) @ v[keys, group])
        torch.testing.assert_close(got[i], torch.cat(heads) @ attention.wo.weight.T, rtol=0, atol=1e-10)


def test_rotary_turns_pairs_by_position_times_frequency():
    positions = torch.tensor([[0, 1, 5]])
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    turned = apply_rotary(x, rotary_table(positions, 4, 100.0, torch.float64))
    for s, position in enumerate([0, 1, 5]):
        for pair, frequency in enumerate([1.0, 0.1]):
            angle = position * frequency
            a, b = x[0, 0, s, pair], x[0, 0, s, pair + 2]
            torch.testing.assert_close(turned[0, 0, s, pair], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(turned[0, 0, s, pair + 2], b * math.cos(angle) + a * math.sin(angle))
