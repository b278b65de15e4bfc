"""Reading a model directory into quantised weights: the bytes of every format, and the memory that it takes."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from moe.config import ModelConfig, RouterConfig
from moe.model import Transformer
from moe.packed import pack
from moe.quantization import QuantizeConfig
from moe.region import Region
from tests.foreign import load_model, save_reference
from training.formats.model_directory import Block, write_model
from training.formats.reader import open_model

pytest.importorskip("bitsandbytes", reason="needs the extra [quantize]")


def quantised(reader, kind: str) -> Transformer:
    """Return the model of a reader with quantised weights, which are not filled."""
    with torch.device("meta"):
        model = Transformer(reader.model, reader.router, torch.float32)
    model.quantize(QuantizeConfig(kind))
    return model.to_empty(device="cpu")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_hugging_face_directory_gives_the_bytes_of_its_matrices(kind, tmp_path):
    save_reference("mixtral-window", tmp_path)
    reader = open_model(tmp_path)
    plain, model = load_model(reader), quantised(reader, kind)
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
from moe.quantization import Packing
from tests.training.test_quantized import quantised
from training.formats.reader import open_model

def resident(field="VmRSS"):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

pack(torch.zeros(64, 64), Packing("nf4", 64, 64, 64, True))  # The library is loaded.
reader = open_model(sys.argv[1], check=False)
model = quantised(reader, "nf4")
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
