"""Reading a model directory into quantised weights: the bytes of every format, and the memory that it takes."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from moe.config import ModelConfig, RouterConfig
from moe.model import Transformer
from moe.packed import pack, unpack
from moe.quantization import QuantizeConfig
from moe.region import Region
from tests.foreign import load_model, logits_of, random_tokens, save_reference
from training.formats.model_directory import Block, write_model
from training.formats.reader import open_model

pytest.importorskip("bitsandbytes", reason="needs the extra [quantize]")


def quantised(reader, config: QuantizeConfig) -> Transformer:
    """Return the model of a reader with quantised weights, which are not filled."""
    with torch.device("meta"):
        model = Transformer(reader.model, reader.router, torch.float32)
    model.quantize(config)
    return model.to_empty(device="cpu")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_hugging_face_directory_gives_the_bytes_of_its_matrices(kind, tmp_path):
    save_reference("mixtral-window", tmp_path)
    reader = open_model(tmp_path)
    plain, model = load_model(reader), quantised(reader, QuantizeConfig(kind))
    reader.fill(model)
    assert len(model.packings) == 2 * 7
    for name, weight in model.named_parameters():
        values = plain.get_parameter(name)
        if name not in model.packings:
            assert torch.equal(weight, values)
            continue
        packing = model.packings[name]
        matrices, rows = values.view(-1, *values.shape[-2:]), weight.view(-1, packing.nbytes)
        for matrix, row in zip(matrices, rows, strict=True):
            assert torch.equal(row, pack(matrix, packing)), name


LARGE = ModelConfig(
    dim=1024, num_layers=1, num_heads=8, num_kv_heads=8, head_dim=128, hidden_dim=4096, num_experts=4, top_k=2,
    vocab_size=64,
)  # fmt: skip
MEASURE = """
import json, re, sys
import torch
from moe.packed import pack
from moe.quantization import Packing, QuantizeConfig
from tests.training.test_quantized import quantised
from training.formats.reader import open_model

def resident(field="VmRSS"):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

pack(torch.zeros(64, 64), Packing("nf4", 64, 64, 64, True))  # The library is loaded.
reader = open_model(sys.argv[1], check=False)
model = quantised(reader, QuantizeConfig("nf4"))
before = resident()
reader.fill(model)
weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
print(json.dumps({"before": before, "after": resident(), "peak": resident("VmHWM"), "weights": weights}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_the_quantised_weights_and_of_about_one_matrix(tmp_path):
    with torch.device("meta"):
        model = Transformer(LARGE, RouterConfig(), torch.float32)
    blocks = [
        Block(
            name,
            tuple(x.shape),
            Region.whole(x.shape),
            torch.bfloat16,
            partial(torch.ones, x.shape, dtype=torch.bfloat16),
        )
        for name, x in model.state_dict().items()
    ]
    write_model(tmp_path / "m", LARGE, RouterConfig(), blocks, None)
    stored = sum(file.stat().st_size for file in (tmp_path / "m").rglob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "m")]
    # glibc gives blocks above this size back to the system as soon as they are freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    sizes = json.loads(ended.stdout)
    matrix = 2 * LARGE.dim * LARGE.hidden_dim
    assert sizes["weights"] < 0.27 * stored
    assert sizes["after"] - sizes["before"] < sizes["weights"] + matrix
    # One matrix in bf16, and what bitsandbytes needs for a part of it.
    assert sizes["peak"] - sizes["after"] < 4 * matrix < stored / 3


def write_four_bits(directory, *, double: bool, dtype: torch.dtype, block_size: int = 64) -> dict[str, torch.Tensor]:
    """Rewrite a Hugging Face directory as bitsandbytes stores it. Return the dequantised matrices by name."""
    functional = pytest.importorskip("bitsandbytes").functional
    stored, matrices = {}, {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if weight.dim() < 2 or "embed_tokens" in name or "lm_head" in name or ".gate." in name:
            stored[name] = weight
            continue
        codes, state = functional.quantize_4bit(
            weight.to(dtype), blocksize=block_size, compress_statistics=double, quant_type="nf4"
        )
        stored[name] = codes
        stored |= {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        with torch.compiler.set_stance("force_eager"):
            matrices[name] = functional.dequantize_4bit(codes, state)
    save_file(stored, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "float32", "llm_int8_threshold": 6.0,
        "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": None,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return matrices


@pytest.mark.parametrize(("double", "dtype"), [(True, torch.bfloat16), (False, torch.float32)], ids=str)
def test_a_directory_that_bitsandbytes_wrote_is_read_as_its_dequantised_matrices(double, dtype, tmp_path):
    save_reference("llama-gqa-tied", tmp_path)
    plain = load_model(tmp_path)
    matrices = write_four_bits(tmp_path, double=double, dtype=dtype)
    reader = open_model(tmp_path)
    model = load_model(reader)
    assert torch.equal(model.embedding, plain.embedding)
    assert reader.dtype("layers.0.attention.wq.weight") == dtype
    for layer in range(2):
        of_layer = model.layers[layer]
        for ours, theirs in (
            (of_layer.attention.wq, "self_attn.q_proj"),
            (of_layer.attention.wo, "self_attn.o_proj"),
            (of_layer.ffn.w_gate, "mlp.gate_proj"),
            (of_layer.ffn.w_down, "mlp.down_proj"),
        ):
            expected = matrices.pop(f"model.layers.{layer}.{theirs}.weight").float()
            assert torch.equal(ours.weight, expected)
            assert not torch.equal(expected, plain.layers[layer].get_submodule(_path(of_layer, ours)).weight)
    assert len(matrices) == 2 * 3
    part = reader.read("layers.1.ffn.w_up.weight", Region((3, 5), (7, 11)), torch.float32)
    assert torch.equal(part, model.layers[1].ffn.w_up.weight[3:10, 5:16])
    # With the same blocks and kind of scales, the bytes are those of the file. Otherwise the matrix is quantised again.
    name, weight = "layers.0.ffn.w_up.weight", model.layers[0].ffn.w_up.weight
    for config in (QuantizeConfig("nf4", double_quant=double), QuantizeConfig("nf4", block_size=32)):
        again = quantised(reader, config)
        reader.fill(again)
        values = unpack(again.get_parameter(name), again.packings[name], dtype).float()
        same = config.block_size == 64
        assert torch.equal(values, weight) == same
        assert (values - weight).norm() < 0.1 * weight.norm()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama-gqa-tied", "mistral-window", "mixtral"])
def test_a_directory_that_transformers_quantised_gives_its_logits(case, tmp_path):
    pytest.importorskip("accelerate", reason="transformers quantises with it")
    transformers = pytest.importorskip("transformers")
    save_reference(case, tmp_path / "full")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    eager = {"experts_implementation": "eager"} if case == "mixtral" else {}
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=how, device_map="cpu", attn_implementation="eager", **eager
    )
    reference.save_pretrained(tmp_path / "quantised")
    tokens = random_tokens(12)
    reference.train()  # bitsandbytes' kernel for inference on CPUs does not take odd widths.
    expected = reference(tokens).logits.detach()
    logits = logits_of(load_model(tmp_path / "quantised"), tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def _path(block, module) -> str:
    return next(name for name, each in block.named_modules() if each is module)


def _without(part):
    def change(stored, config):
        del stored[f"model.layers.0.mlp.up_proj.weight.{part}"]

    return change


def _state(**changed):
    def change(stored, config):
        name = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
        values = json.loads(bytes(stored[name].tolist())) | changed
        stored[name] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    return change


def _config(**changed):
    def change(stored, config):
        config["quantization_config"] |= changed

    return change


def _codes(stored, config):
    name = "model.layers.0.mlp.up_proj.weight"
    stored[name] = stored[name][:-1].clone()


def _table(stored, config):
    stored["model.layers.0.mlp.up_proj.weight.quant_map"][3] += 0.5


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            _without("absmax"),
            "quant_state.bitsandbytes__nf4: expected the parts codes 228, quant_map 16",
        ),
        (
            _without("quant_state.bitsandbytes__nf4"),
            "found dtype U8, expected a matrix in 4 bits that bitsandbytes",
        ),
        (_state(shape=[19, 24, 1]), "damaged: expected nf4 with a shape of two sizes"),
        (_state(shape=[19, 2**40]), "damaged: expected nf4 with a shape of two sizes"),
        (_state(shape=[19, 2**30]), "expected the parts codes "),
        (_state(nested_offset=float("nan")), "damaged: "),
        (_state(blocksize=63), "damaged: expected nf4"),
        (_state(quant_type="fp4"), "damaged: expected nf4"),
        (_codes, "expected the parts codes 228"),
        (_table, "quant_map: expected the 16 numbers of nf4"),
        (_config(load_in_4bit=False, load_in_8bit=True), "quantization_config={quant_method:bitsandbytes"),
        (_config(bnb_4bit_quant_type="fp4"), "quantization_config={quant_method:bitsandbytes"),
        (_config(unknown=1), "quantization_config={quant_method:bitsandbytes"),
        (_config(quant_method="awq"), "quantization_config={quant_method:awq"),
    ],
)
def test_damaged_and_unknown_4_bit_files_are_one_line(change, line, tmp_path):
    save_reference("llama-gqa-tied", tmp_path)
    write_four_bits(tmp_path, double=True, dtype=torch.bfloat16)
    stored, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    change(stored, config)
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as raised:
        load_model(open_model(tmp_path))
    assert line in str(raised.value) and "\n" not in str(raised.value)
