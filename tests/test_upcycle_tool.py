"""`scripts/upcycle.py` as a user runs it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.model import ModelInputs, Transformer
from moe.region import Region
from scripts import upcycle
from scripts.cli.command_line import CONF
from tests.deepseek import loop_logits
from tests.foreign import load_reference, logits_of, random_tokens, save_reference
from training.formats.export import export_model
from training.formats.model_directory import Block, write_model
from training.formats.reader import open_model
from training.report.metrics import read_metrics

DENSE = ModelConfig(
    dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    vocab_size=61,
    sliding_window=(7, None),
)


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["upcycle.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        upcycle.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def write(out: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Path:
    """A model directory with random weights."""
    model = Transformer(config, RouterConfig(), torch.float32)
    init_parameters(model, 0)
    blocks = [
        Block(name, tuple(t.shape), Region((0,) * t.dim(), tuple(t.shape)), dtype, lambda t=t: t.detach().to(dtype))
        for name, t in model.state_dict().items()
    ]
    write_model(out, config, RouterConfig(), blocks, None)
    return out


def load(path: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    source = open_model(path)
    model = Transformer(source.model, source.router, dtype).to(dtype)
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    source.fill(model)
    return model


def logits(model: Transformer) -> torch.Tensor:
    tokens_BS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ModelInputs(tokens_BS, torch.arange(20).expand(2, 20))).logits_BSV


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "dense", DENSE)


@pytest.mark.parametrize("extra", [[], ["top_k=4", "granularity=2", "router=sigmoid_topk", "first_k_dense=1"]])
def test_the_upcycled_model_computes_what_the_dense_model_does(dense, tmp_path, monkeypatch, capsys, extra):
    # With files of a few kB, the experts of one matrix are in several files.
    arguments = [f"source={dense}", f"out={tmp_path / 'moe'}", "num_experts=8", "shard_size=5kB", *extra]
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert (status, err) == (0, "")
    model = load(tmp_path / "moe", torch.float64)
    assert f"parameters: {sum(p.numel() for p in model.parameters()):,}, " in out
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
    source = open_model(tmp_path / "moe")
    assert (source.model.num_experts, source.model.sliding_window) == (8, (7, None))
    assert source.router == RouterConfig(kind="sigmoid_topk" if extra else "softmax_topk")
    torch.testing.assert_close(logits(model), logits(load(dense, torch.float64)), atol=1e-12, rtol=1e-12)


NORMED = dataclasses.replace(DENSE, sliding_window=None, qk_norm="width", num_kv_heads=4)
LATENT = dataclasses.replace(
    NORMED,
    qk_norm=None,
    norm_eps=1e-6,
    head_dim=10,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=7,
)
DENSE_MODELS = {"normed": NORMED, "latent": LATENT}
SHARED = ["num_shared_experts=1", "shared_hidden_dim=5", "shared_gate=true"]


@pytest.mark.parametrize(
    ("source", "family", "extra"),
    [
        ("llama-gqa-tied", "mixtral", ["num_experts=4"]),
        ("qwen2", "qwen2_moe", ["num_experts=4", *SHARED, "first_k_dense=1"]),
        ("llama-gqa-tied", "qwen2_moe", ["num_experts=6", "top_k=3", *SHARED]),
        ("qwen3", "qwen3_moe", ["num_experts=5", "top_k=4"]),
        ("normed", "olmoe", ["num_experts=8", "top_k=4", "granularity=2"]),
        ("latent", "deepseek_v3", ["router=sigmoid_topk", "num_shared_experts=1", "first_k_dense=1"]),
    ],
)
def test_an_upcycled_model_of_a_family_computes_the_same_in_transformers(
    source, family, extra, tmp_path, monkeypatch, capsys
):
    if source in DENSE_MODELS:
        write(tmp_path / "dense", DENSE_MODELS[source])
    else:
        save_reference(source, tmp_path / "dense")
    capsys.readouterr()
    arguments = [f"source={tmp_path / 'dense'}", f"out={tmp_path / 'moe'}", f"family={family}", *extra]
    assert run(monkeypatch, capsys, *arguments)[::2] == (0, "")
    export_model(
        open_model(tmp_path / "moe"), tmp_path / "out", form="hf", dtype="fp32", shard_bytes=10**9, positions=64
    )
    reference = load_reference(tmp_path / "out")
    assert reference.config.model_type == family
    tokens_BS = random_tokens(13)
    expected_BSV = logits_of(load(tmp_path / "dense"), tokens_BS)
    torch.testing.assert_close(reference(tokens_BS).logits, expected_BSV, rtol=0, atol=2e-5)


def test_an_upcycled_deepseek_model_computes_the_same_in_its_loop(tmp_path, monkeypatch, capsys):
    save_reference("llama-mha", tmp_path / "dense")
    extra = ["family=deepseek", "num_experts=6", "num_shared_experts=2", "first_k_dense=1"]
    capsys.readouterr()
    assert run(monkeypatch, capsys, f"source={tmp_path / 'dense'}", f"out={tmp_path / 'moe'}", *extra)[0] == 0
    export_model(
        open_model(tmp_path / "moe"), tmp_path / "out", form="hf", dtype="fp32", shard_bytes=10**9, positions=64
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["n_shared_experts"]) == ("deepseek", 2)
    weights = {name: tensor.double() for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    assert not weights["model.layers.1.mlp.shared_experts.down_proj.weight"].any()
    assert weights["model.layers.1.mlp.shared_experts.up_proj.weight"].std() == pytest.approx(0.02, rel=0.2)
    tokens_BS = random_tokens(6)
    expected_BSV = logits_of(load(tmp_path / "dense", torch.float64), tokens_BS)
    torch.testing.assert_close(loop_logits(config, weights, tokens_BS), expected_BSV, rtol=0, atol=1e-9)


def test_dtype_keep_keeps_the_stored_dtype(tmp_path, monkeypatch, capsys):
    small = write(tmp_path / "bf16", DENSE, torch.bfloat16)
    for dtype in ("keep", "fp32"):
        arguments = [f"source={small}", f"out={tmp_path / dtype}", f"dtype={dtype}", "top_k=4", "granularity=2"]
        assert run(monkeypatch, capsys, *arguments)[0] == 0
    kept, wide = open_model(tmp_path / "keep"), open_model(tmp_path / "fp32")
    assert {kept.dtype(name) for name in kept.shapes if ".router." not in name} == {torch.bfloat16}
    assert {wide.dtype(name) for name in wide.shapes} == {torch.float32}
    for name, tensor in load(tmp_path / "keep").state_dict().items():
        assert torch.equal(tensor, load(tmp_path / "fp32").state_dict()[name]), name  # Multiplying by 2 is exact.


def test_noise_depends_on_the_seed(dense, tmp_path, monkeypatch, capsys):
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = [f"source={dense}", f"out={tmp_path / name}", "noise=0.01", f"seed={seed}"]
        assert run(monkeypatch, capsys, *arguments)[0] == 0
        weights[name] = load(tmp_path / name).state_dict()
    for name, tensor in weights["a"].items():
        assert torch.equal(tensor, weights["b"][name])
        drawn = ".ffn.experts." in name or ".ffn.router." in name
        assert torch.equal(tensor, weights["c"][name]) is not drawn, name
        if ".ffn.experts." in name:
            assert not torch.equal(tensor[0], tensor[1])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["num_experts=0"], "num_experts=0: expected an integer >= 2"),
        (["family=olmoe"], "family=olmoe: model.qk_norm=null: expected width, as in OlmoeForCausalLM"),
        (["family=deepseek_v3"], "family=deepseek_v3: model.kv_lora_rank=null: expected an integer, as in DeepseekV3"),
        (["family=gpt2"], "family=gpt2: expected one of llama, mistral"),
        (["shared_gate=true"], "shared_gate=true: expected false with num_shared_experts=0"),
        (["shared_hidden_dim=4"], "num_shared_experts=0: expected 1 with shared_hidden_dim"),
        (["top_k=9"], "top_k=9: expected an integer from 2 to num_experts=8"),
        (["granularity=3"], "granularity=3: expected a divisor of num_experts=8 and of top_k=2"),
        (["num_experts=10", "top_k=5", "granularity=5"], "granularity=5: expected a divisor of hidden_dim=48, "),
        (["noise=-1"], "noise=-1.0: expected a number >= 0"),
        (["moe_every=3"], "moe_every=3: expected at most 2"),
        (["num_expert=4"], "num_expert=4: unknown key; the nearest valid key is num_experts"),
        (["router=expert_choice"], "router=expert_choice: expected one of softmax_topk, sigmoid_topk"),
        (["source=nowhere"], "source=nowhere: expected a model directory; none found"),
        (["source={moe}"], "source={moe}: expected a dense model; found 4 experts"),
        (["out={dense}"], "out={dense}: expected a path that does not exist yet"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(dense, tmp_path, monkeypatch, capsys, arguments, line):
    moe = tmp_path / "moe"
    if "source={moe}" in arguments:
        write(moe, ModelConfig(**(vars(DENSE) | {"num_experts": 4, "top_k": 2})))
    before = sorted(tmp_path.iterdir())
    places = {"dense": dense, "moe": moe}
    filled = [argument.format(**places) for argument in arguments]
    status, out, err = run(monkeypatch, capsys, f"source={dense}", f"out={tmp_path / 'new'}", *filled)
    assert status == 2 and out == ""
    assert err.startswith(f"error: {line.format(**places)}") and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_source_writes_nothing(dense, tmp_path, monkeypatch, capsys):
    copy = write(tmp_path / "damaged", DENSE)
    [shard] = (copy / "checkpoints" / "step-0").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    status, out, err = run(monkeypatch, capsys, f"source={copy}", f"out={tmp_path / 'new'}")
    assert status == 2 and out == "" and err.splitlines()[-1].startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.slow
def test_upcycled_transformers_weights_compute_the_logits_of_transformers(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    hf_model = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=7, attn_implementation="eager", initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    hf_model.save_pretrained(tmp_path / "hf")
    arguments = [f"source={tmp_path / 'hf'}", f"out={tmp_path / 'moe'}", "num_experts=8", "top_k=4", "granularity=2"]
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    tokens_BS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = hf_model(tokens_BS).logits
    torch.testing.assert_close(logits(load(tmp_path / "moe")), expected, atol=1e-5, rtol=1e-5)


TINY = [
    "data.code_bytes=60000", "data.prose_bytes=40000", "data.arithmetic_bytes=40000", "data.vocab_size=500",
    "data.heldout_max_bytes=2000", "train.seq_len=64", "train.global_batch=8", "train.log_every=1",
    "train.precision=fp32", "run.sample_tokens=0", "launch.threads=1", "tracking.wandb=disabled",
]  # fmt: skip


@pytest.mark.slow
def test_a_dense_run_is_upcycled_and_trained_further(tmp_path, monkeypatch, capsys):
    def train(name: str, *overrides: str) -> list[dict]:
        process = subprocess.run(
            [sys.executable, "train.py", *TINY, f"data.cache={tmp_path / 'cache'}", f"run.root={tmp_path}",
             f"run.name={name}", *overrides],
            cwd=CONF.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180,
            check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return read_metrics(tmp_path / name / "metrics.jsonl")

    dense = ["model=mixtral_tiny", "model.num_experts=null", "model.top_k=null"]
    loss = train("dense", *dense, "train.steps=3", "optim.lr=1e-2")[-1]["eval/loss"]
    for name, arguments in (("plain", ["num_experts=4"]), ("fine", ["num_experts=8", "top_k=4", "granularity=2"])):
        out = tmp_path / f"{name}-start"
        status, _, err = run(monkeypatch, capsys, f"source={tmp_path / 'dense'}", f"out={out}", *arguments)
        assert (status, err) == (0, "")
        # The first evaluation follows the first step. At this learning rate, that step changes no weight.
        rows = train(f"{name}-still", f"run.init_from={out}", "optim.lr=1e-12", "train.steps=1")
        assert rows[0]["eval/loss"] == pytest.approx(loss, rel=1e-5)
    rows = train("fine", f"run.init_from={out}", "train.steps=6", "optim.lr=3e-3", "launch.nproc=2")
    assert rows[0]["train/ce"] > rows[-1]["train/ce"] and rows[-1]["eval/loss"] < loss - 0.1
    assert "expert_hidden_dim: 48\n" in (tmp_path / "fine" / "config.yaml").read_text()
    assert len(rows[-1]["router/load/layer_01"]) == 8
