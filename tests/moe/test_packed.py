"""Quantised weights against bitsandbytes itself: bytes, dequantised matrices, products and gradients, bit for bit."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from common.errors import ConfigError
from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.model import ModelInputs, Transformer
from moe.packed import multiply_packed, multiply_packed_experts, pack, unpack
from moe.quantization import FULL_PRECISION, Packing, QuantizeConfig

bnb = pytest.importorskip("bitsandbytes", reason="needs the extra [quantize]")

PACKINGS = [
    Packing("nf4", 96, 64, 64, True),
    Packing("nf4", 33, 77, 64, True),  # an odd number of numbers, and a block that is not full
    Packing("nf4", 130, 512, 128, False),  # several blocks of scales
    Packing("int8", 33, 77, 64, True),
]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dequantised(weight: torch.Tensor, packing: Packing, dtype: torch.dtype) -> torch.Tensor:
    """Quantise and dequantise a matrix with bitsandbytes alone."""
    if packing.kind == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return bnb.functional.int8_vectorwise_dequant(codes, scales).to(dtype)
    codes, state = bnb.functional.quantize_4bit(
        weight, blocksize=packing.block_size, compress_statistics=packing.double_quant, quant_type="nf4"
    )
    state.dtype = torch.float32 if dtype == torch.float64 else dtype
    with torch.compiler.set_stance("force_eager"):  # It compiles its function for matrices of an odd width.
        return bnb.functional.dequantize_4bit(codes, state).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: f"{packing.kind}-{packing.rows}")
def test_products_and_gradients_equal_those_of_the_matrix_that_bitsandbytes_dequantises(packing, dtype):
    weight = 0.02 * drawn(packing.rows, packing.columns)
    reference = dequantised(weight, packing, dtype)
    packed = pack(weight, packing)
    assert packed.dtype == torch.uint8 and packed.shape == (packing.nbytes,)
    assert torch.equal(unpack(packed, packing, dtype), reference)
    assert torch.equal(unpack(packed.to(dtype), packing, dtype), reference)  # as FSDP of older torch gathers it
    x, ours = (drawn(2, 5, packing.columns, dtype=dtype).requires_grad_() for _ in range(2))
    y, expected = multiply_packed(ours, packed, packing), F.linear(x, reference)
    gradient = drawn(*y.shape, dtype=dtype, seed=1)
    y.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(y, expected)
    assert ours.grad is not None and torch.equal(ours.grad, x.grad)


def test_nf4_equals_the_module_of_bitsandbytes():
    weight = drawn(96, 64)
    module = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    module.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", blocksize=64)
    module = module.to("cpu")
    x, ours = (drawn(7, 64).requires_grad_() for _ in range(2))
    y, expected = multiply_packed(ours, pack(weight, PACKINGS[0]), PACKINGS[0]), module(x)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    assert ours.grad is not None and torch.equal(ours.grad, x.grad)


def test_int8_has_the_numbers_and_scales_of_the_parameter_of_bitsandbytes():
    packing, weight = PACKINGS[-1], drawn(33, 77)
    theirs = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    packed = pack(weight, packing)
    offset, length = packing.sections["codes"]
    assert torch.equal(packed[offset : offset + length].view(torch.int8).view(33, 77), theirs.CB)
    offset, length = packing.sections["scales"]
    assert torch.equal(packed[offset : offset + length].view(torch.float32), theirs.SCB.flatten())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_weight_in_bf16_has_the_bytes_of_the_same_values_in_fp32(kind):
    packing, weight = Packing(kind, 48, 80, 64, True), drawn(48, 80, dtype=torch.bfloat16)
    weight[3] = 0  # A scale of 0 makes neither NaN nor another value.
    packed = pack(weight, packing)
    assert torch.equal(packed, pack(weight.float(), packing))
    assert unpack(packed, packing, torch.float32)[3].count_nonzero() == 0


def test_each_expert_multiplies_its_rows_and_one_without_rows_none():
    packing, counts = Packing("nf4", 24, 40, 64, True), torch.tensor([3, 0, 5])
    weights = drawn(3, 24, 40)
    packed = torch.stack([pack(weight, packing) for weight in weights])
    rows, ours = (drawn(8, 40, seed=2).requires_grad_() for _ in range(2))
    parts = rows.split(counts.tolist())
    matrices = [dequantised(weight, packing, torch.float32) for weight in weights]
    expected = torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, matrices, strict=True)])
    y = multiply_packed_experts(ours, packed, counts, packing)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    assert ours.grad is not None and torch.equal(ours.grad, rows.grad)


def test_the_operator_keeps_torchs_rules():
    packing = PACKINGS[0]
    packed = pack(drawn(96, 64), packing).unsqueeze(0)
    arguments = (drawn(3, 64).requires_grad_(), packed, None, False, *packing)
    torch.library.opcheck(torch.ops.mixwright.multiply_packed.default, arguments, test_utils=("test_schema",))
    torch.library.opcheck(torch.ops.mixwright.multiply_packed.default, arguments, test_utils=("test_faketensor",))


@pytest.mark.slow
def test_the_import_downloads_no_code_prints_nothing_and_hides_no_package():
    code = (
        "import sys, types; kernels = sys.modules['kernels'] = types.ModuleType('kernels')\n"
        "def get_kernel(*args, **kwargs): print('downloads')\n"
        "kernels.get_kernel = get_kernel\n"
        "from moe.packed import library; library(); assert sys.modules['kernels'] is kernels"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout + ended.stderr == ""


MODEL = ModelConfig(
    dim=24, num_layers=3, num_heads=3, num_kv_heads=1, head_dim=8, hidden_dim=20, num_experts=4, top_k=2, vocab_size=31,
    expert_hidden_dim=12, num_shared_experts=1, first_k_dense=1,
)  # fmt: skip


def quantised_pair(config: QuantizeConfig) -> tuple[Transformer, Transformer]:
    """Return a quantised model, and one of full precision with the values of its weights."""
    plain = Transformer(MODEL, RouterConfig(), torch.float64).double()
    init_parameters(plain, 0)
    with torch.device("meta"):
        quantised = Transformer(MODEL, RouterConfig(), torch.float64).double()
    quantised.quantize(config)
    quantised.to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in quantised.named_parameters():
            values = plain.get_parameter(name)
            packing = quantised.packings.get(name)
            if packing is None:
                weight.copy_(values)
                continue
            matrices, rows = values.view(-1, *values.shape[-2:]), weight.view(-1, packing.nbytes)
            for row, matrix in zip(rows, matrices, strict=True):
                row.copy_(pack(matrix, packing))
                matrix.copy_(unpack(row, packing, torch.float64))
        for buffer in quantised.buffers():
            buffer.zero_()
    return quantised, plain


@pytest.mark.parametrize("config", [QuantizeConfig("nf4"), QuantizeConfig("int8", targets=("experts",))], ids=str)
def test_a_model_equals_one_with_the_dequantised_weights(config):
    quantised, plain = quantised_pair(config)
    tokens = torch.arange(40).view(2, 20) % 31
    inputs = ModelInputs(tokens, torch.arange(20).expand(2, -1))
    outputs = [model(inputs).logits_BSV for model in (quantised, plain)]
    for logits in outputs:
        logits.square().mean().backward()
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    trained = {name: weight.grad for name, weight in quantised.named_parameters() if weight.requires_grad}
    assert trained.keys() == dict(plain.named_parameters()).keys() - quantised.packings.keys()
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, rtol=1e-10, atol=1e-14)


def test_large_matrices_are_quantised_and_nothing_else():
    with torch.device("meta"):
        model = Transformer(MODEL, RouterConfig(), torch.float32)
    names = dict(model.named_parameters()).keys()
    model.quantize(FULL_PRECISION)
    assert not model.packings
    model.quantize(QuantizeConfig("nf4"))
    kept = {name for name in names if model.packings.get(name) is None}
    assert kept == {name for name in names if "norm" in name or "router" in name} | {"embedding", "head.weight"}
    assert "experts 0-3, swiglu, 24 -> 12 -> 24, nf4" in repr(model)
    assert "in_features=24, out_features=8, bias=False, nf4" in repr(model)


def test_wrong_values_are_refused():
    with pytest.raises(ConfigError, match=r"^block_size=48: expected one of 32, 64"):
        QuantizeConfig("nf4", block_size=48)
    with pytest.raises(ConfigError, match=r"^targets="):
        QuantizeConfig("nf4", targets=())
