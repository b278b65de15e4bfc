"""Attention over segments: where documents begin and end, and the calls of FlashAttention, which needs a GPU."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moe.attention.attention import choose_kernel
from moe.attention.varlen import _attend as varlen_operator
from moe.attention.varlen import _options, flash_backward, flash_forward, segments_of, varlen
from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.model import ModelInputs, Transformer
from moe.token_context import TokenContext
from tests.moe.test_attention import masked_reference


def packings():
    """Yield documents [B, S]: random ones, padding within and after documents, a row of padding, rows of one."""
    generator = torch.Generator().manual_seed(0)
    for rows, length in ((1, 1), (3, 17), (2, 150)):
        documents = (torch.rand(rows, length, generator=generator) < 0.1).cumsum(1)
        yield documents.int()
        documents[-1, length // 2 :] = -1
        documents[0, length // 3 : length // 2] = -1
        yield documents.int()
        documents[-1] = -1
        yield documents.int()
        yield torch.zeros(rows, length, dtype=torch.int32)
    yield torch.arange(40, dtype=torch.int32).expand(2, 40)


def test_segments_are_runs_of_equal_numbers_within_rows():
    for documents in packings():
        rows, length = documents.shape
        starts = [
            row * length + s
            for row in range(rows)
            for s in range(length)
            if s == 0 or documents[row, s] != documents[row, s - 1]
        ]
        segments = segments_of(documents, "cpu")
        assert segments.offsets.dtype == torch.int32
        assert segments.offsets.tolist() == starts + [documents.numel()] * (documents.numel() + 1 - len(starts))
        assert segments.sizes.tolist() == [len(starts), max(segments.offsets.diff())]


def segments_in(q, k, options):
    """Yield the slice and the probabilities [H, Q, K] of each segment, after checks of what the kernel requires."""
    assert options["cum_seq_q"].dtype == torch.int32 and q.stride(-1) == k.stride(-1) == 1
    assert options["is_causal"] == (options["window_size_left"] < 0) and options["window_size_right"] == 0
    offsets, before = options["cum_seq_q"].tolist(), options["window_size_left"]
    assert offsets[0] == 0 and offsets[-1] == len(q)
    for start, end in itertools.pairwise(offsets):
        assert 0 < end - start <= options["max_q"] == options["max_k"]
        scores = torch.einsum("qhc,khc->hqk", q[start:end], k[start:end]) * (options["scale"] or q.shape[-1] ** -0.5)
        distance = torch.arange(end - start).unsqueeze(1) - torch.arange(end - start)
        hidden = (distance < 0) | ((distance > before) if before >= 0 else torch.zeros_like(distance).bool())
        yield slice(start, end), scores.masked_fill(hidden, -torch.inf).softmax(-1)


def forward(q, k, v, **options):
    """Stand in for `aten._flash_attention_forward`, segment by segment."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = torch.cat([torch.einsum("hqk,khc->qhc", p, v[here]) for here, p in segments_in(q, k, options)])
    return out, torch.zeros(q.shape[1], len(q)), torch.empty(0), torch.empty(0), torch.empty(0)


def backward(grad, q, k, v, out, sums, **options):
    """Stand in for `aten._flash_attention_backward`."""
    assert sums.shape == (q.shape[1], len(q))
    groups, scale = k.shape[1], options["scale"] or q.shape[-1] ** -0.5
    k, v = (x.repeat_interleave(q.shape[1] // groups, dim=1) for x in (k, v))
    grads = []
    for here, p in segments_in(q, k, options):
        grad_p = torch.einsum("qhc,khc->hqk", grad[here], v[here])
        weighted = (grad[here] * out[here]).sum(-1).t().unsqueeze(-1)
        grad_s = p * (grad_p - weighted) * scale
        grads.append(
            (
                torch.einsum("hqk,khc->qhc", grad_s, k[here]),
                torch.einsum("hqk,qhc->khc", grad_s, q[here]),
                torch.einsum("hqk,qhc->khc", p, grad[here]),
            )
        )
    grad_q, grad_k, grad_v = (torch.cat(parts) for parts in zip(*grads, strict=True))
    return grad_q, *(x.unflatten(1, (groups, -1)).sum(2) for x in (grad_k, grad_v))


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_segments_give_the_attention_of_documents(window, kv_heads, monkeypatch):
    """Against a float64 mask, forward and backward, with the kernel's own conventions for windows and heads."""
    monkeypatch.setattr("moe.attention.varlen.flash_forward", forward)
    monkeypatch.setattr("moe.attention.varlen.flash_backward", backward)
    torch.manual_seed(0)
    for documents in packings():
        rows, length = documents.shape
        q, k, v = (
            torch.randn(rows, length, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, kv_heads, kv_heads)
        )
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        # Runs have distinct numbers in the reference, too: the two runs of padding of a row are different segments.
        numbered = torch.ones_like(documents).index_fill(1, torch.tensor([0]), 0)
        numbered[:, 1:] = documents[:, 1:] != documents[:, :-1]
        scale = 0.2 if kv_heads == 4 else None
        scaled = heads[0] * (1 if scale is None else scale * 8**0.5)
        expected = masked_reference(scaled, *heads[1:], numbered.cumsum(1), window)
        got = varlen(*heads, segments_of(documents, "cpu"), window, scale)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        grad = torch.randn_like(expected)
        pairs = zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (got, expected)), strict=True)
        for mine, reference in pairs:
            torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [True, False])
def test_a_model_with_segments_is_the_model_without(packed, monkeypatch):
    """`ModelInputs.segments` reaches the layers: loss and gradients are those of the kernels for CPUs."""
    monkeypatch.setattr("moe.attention.varlen.flash_forward", forward)
    monkeypatch.setattr("moe.attention.varlen.flash_backward", backward)
    config = ModelConfig(
        dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=8, vocab_size=9,
        sliding_window=(5, None), num_experts=None, top_k=None,
    )  # fmt: skip
    model = Transformer(config, RouterConfig(), torch.float64).double()
    init_parameters(model, 0)
    torch.manual_seed(0)
    documents = (torch.rand(3, 20) < 0.2).cumsum(1).int() * packed
    tokens, positions = torch.randint(9, (3, 20)), torch.arange(20).expand(3, -1)
    inputs = ModelInputs(tokens, positions, documents if packed else None)
    results, used = [], []

    def choose(q, k, window, context):
        if context.segments is None or (window is None and not packed):
            return choose_kernel(q, k, window, context)
        used.append(window)
        return "varlen"

    monkeypatch.setattr("moe.attention.attention.choose_kernel", choose)
    for given in (inputs, inputs._replace(segments=segments_of(documents, "cpu"))):
        loss = model(given).logits_BSV.square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert used == ([5, None] if packed else [5])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_torch_has_the_kernel_with_these_arguments():
    """The operators of the installed torch accept the calls, on tensors without data."""
    q, k, v = (torch.empty(2, 6, h, 16, device="meta", dtype=torch.bfloat16).transpose(1, 2) for h in (4, 2, 2))
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    segments = segments_of(torch.zeros(2, 6, dtype=torch.int32), "cpu")
    for window in (None, 3):
        options = _options(segments.offsets.to("meta"), segments.sizes, window, 0.5)
        out, sums, *_ = flash_forward(*flat, **options, return_debug_mask=False)
        fake = varlen_operator(*flat, segments.offsets.to("meta"), segments.sizes, window, 0.5)
        assert [(x.shape, x.dtype, x.stride()) for x in (out, sums)] == [(x.shape, x.dtype, x.stride()) for x in fake]
        unused = torch.empty(0, device="meta")
        grads = flash_backward(flat[0], *flat, out, sums, **options, rng_state=unused, unused=unused)
        assert [x.shape for x in grads] == [x.shape for x in flat]


def test_one_graph_serves_all_documents(monkeypatch):
    """Without breaks, and with sizes as constants, as blocks are compiled."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # torch's needs a GPU.
    torch.manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    attend = torch.compile(lambda *args: varlen(*args, 5).sum(), fullgraph=True, dynamic=False, backend=counter)
    q, k, v = (
        torch.empty(2, 60, h, 16, device="meta", dtype=torch.bfloat16, requires_grad=True).transpose(1, 2)
        for h in (4, 2, 2)
    )
    for rate in (0.0, 0.01, 0.1, 0.5):
        segments = segments_of((torch.rand(2, 60) < rate).cumsum(1), "meta")
        attend(q, k, v, segments).backward()
    assert counter.frame_count == 1


CUDA, CPU = True, False
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("cuda", "dtype", "window", "packed", "known", "expected"),
    [
        (CUDA, BF16, None, False, True, "sdpa"),
        (CUDA, BF16, None, False, False, "sdpa"),
        (CUDA, FP64, None, False, True, "sdpa"),
        (CUDA, FP32, None, False, True, "flex"),  # SDPA would store all scores of grouped heads
        (CUDA, BF16, None, True, True, "varlen"),
        (CUDA, FP16, None, True, True, "varlen"),
        (CUDA, BF16, 7, True, True, "varlen"),
        (CUDA, BF16, 7, False, True, "varlen"),
        (CUDA, BF16, None, True, False, "flex"),
        (CUDA, BF16, 7, False, False, "flex"),
        (CUDA, FP32, None, True, True, "flex"),
        (CUDA, FP32, 7, True, True, "flex"),
        (CUDA, FP64, None, True, True, "masked"),
        (CUDA, FP64, 7, True, True, "blocks"),
        (CPU, BF16, None, False, True, "sdpa"),
        (CPU, BF16, None, True, True, "masked"),
        (CPU, FP32, None, True, False, "masked"),
        (CPU, FP32, 7, False, False, "blocks"),
    ],
)
def test_kernels(cuda, dtype, window, packed, known, expected):
    documents = torch.zeros(2, 12, dtype=torch.int32)
    context = TokenContext(
        documents_BS=documents if packed else None, segments=segments_of(documents, "cpu") if known else None
    )

    def kernel(head_dim=64, places=12, kv_heads=2):
        q = SimpleNamespace(
            device=torch.device("cuda" if cuda else "cpu"), dtype=dtype, shape=torch.Size((2, 4, 12, head_dim))
        )
        return choose_kernel(q, SimpleNamespace(shape=torch.Size((2, kv_heads, places, head_dim))), window, context)

    assert kernel() == expected
    if dtype == FP32 and not packed and window is None:
        assert kernel(kv_heads=4) == "sdpa"
    if expected == "varlen":
        assert kernel(head_dim=256) == "varlen"
        assert {kernel(head_dim=12), kernel(head_dim=264), kernel(places=20)} == {"flex"}
