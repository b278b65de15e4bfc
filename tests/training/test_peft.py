"""Adapters in peft's format, in both directions: peft computes what Mixwright computes.

Shapes: B batch, S sequence, V vocabulary.
"""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from moe.config import AdapterConfig
from moe.model import ModelInputs
from moe.region import Region
from tests.adapters import write_run
from tests.foreign import VOCAB, load_model, load_reference, save_reference
from training.formats.peft import CONFIG, WEIGHTS, export_adapter, import_adapter
from training.formats.reader import open_model

peft = pytest.importorskip("peft", reason="needs the extra [dev]")

TOKENS_BS = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(3))
LORA = AdapterConfig(kind="lora", rank=3, alpha=5.0)
OURS = {
    "attention": ("mixtral", {"targets": ("attention",)}),
    "rslora of everything": ("mixtral", {"targets": ("*",), "scaling": "rslora"}),
    "experts and routers": ("mixtral-window", {"targets": ("experts", "router")}),
    "one matrix of the experts": ("mixtral", {"targets": ("experts.w_up", "layers.1.attention.w[qv]")}),
    "only the last matrix": ("mixtral", {"targets": ("experts.w_down",)}),
    "the gate of one layer": ("mixtral", {"targets": ("layers.0.ffn.experts.w_gate", "experts.w_down")}),
    "dora, dense": ("llama-geglu", {"targets": ("attention", "ffn"), "dora": True}),
    "rslora and dora": ("mixtral", {"targets": ("attention.w[ko]",), "dora": True, "scaling": "rslora"}),
}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("mixtral", {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "use_rslora": True}),
    "dense": ("mistral-mqa-odd", {"target_modules": "all-linear"}),
    "experts share A": (
        "mixtral",
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"]},
    ),
    "other ranks and factors": (
        "mixtral",
        {
            "target_modules": ["q_proj", "k_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"k_proj": 5, "mlp.experts.down_proj": 2},
            "alpha_pattern": {r".*\.k_proj": 7, "mlp.experts.gate_up_proj": 11},
        },
    ),
}


@cache
def base_directory(case: str, root: Path) -> Path:
    directory = root / f"base-{case}"
    save_reference(case, directory)
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peft")


def our_logits(directory: Path) -> torch.Tensor:
    model = load_model(directory)
    positions_BS = torch.arange(TOKENS_BS.shape[1]).expand_as(TOKENS_BS)
    with torch.no_grad():
        return model(ModelInputs(TOKENS_BS, positions_BS)).logits_BSV


def their_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(load_reference(base), adapter)
    with torch.no_grad():
        return model(TOKENS_BS).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor, without: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    assert (expected - without).abs().max() > 0.5


@pytest.mark.parametrize("case", OURS)
def test_peft_computes_our_adapters_and_gives_them_back(case, root, tmp_path):
    family, changes = OURS[case]
    base = base_directory(family, root)
    write_run(base, AdapterConfig(**{**vars(LORA), **changes}), tmp_path / "run")
    source = open_model(tmp_path / "run")
    export_adapter(source, tmp_path / "adapter")
    assert_same(their_logits(base, tmp_path / "adapter"), our_logits(tmp_path / "run"), our_logits(base))

    import_adapter(tmp_path / "adapter", open_model(base), tmp_path / "back")
    back = open_model(tmp_path / "back")
    for name in source.stored:
        region = Region.whole(source.shapes[name])
        assert torch.equal(source.read(name, region, torch.float32), back.read(name, region, torch.float32)), name
    assert source.stored == back.stored or set(source.stored) == set(back.stored)
    assert back.model.adapter.scale == pytest.approx(source.model.adapter.scale, rel=1e-12)


@pytest.mark.parametrize("case", THEIRS)
def test_we_compute_the_adapters_of_peft(case, root, tmp_path):
    family, options = THEIRS[case]
    base = base_directory(family, root)
    model = peft.get_peft_model(load_reference(base), peft.LoraConfig(r=3, lora_alpha=4, **options))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise if "lora_B" in name else 0.3 * noise
    model.save_pretrained(tmp_path / "adapter")
    import_adapter(tmp_path / "adapter", open_model(base), tmp_path / "run")
    assert_same(our_logits(tmp_path / "run"), their_logits(base, tmp_path / "adapter"), our_logits(base))


def test_adapters_with_one_tensor_per_expert_are_read(root, tmp_path):
    """The names of Mixtral's modules before transformers 5: peft converts them, too."""
    base = base_directory("mixtral", root)
    generator, rank, tensors = torch.Generator().manual_seed(4), 2, {}
    for layer in range(2):
        for expert in range(4):
            for matrix, (outputs, inputs) in {"w1": (19, 24), "w3": (19, 24), "w2": (24, 19)}.items():
                name = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
                tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    import_adapter(tmp_path / "adapter", open_model(base), tmp_path / "run")
    assert_same(our_logits(tmp_path / "run"), their_logits(base, tmp_path / "adapter"), our_logits(base))


@pytest.fixture(scope="module")
def exported(root: Path) -> Path:
    write_run(base_directory("mixtral", root), LORA, root / "run")
    export_adapter(open_model(root / "run"), root / "exported")
    return root / "exported"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "bias=all: expected none"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\[lm_head\]: expected null; this key can change what"),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\]: expected null"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa: expected true, false or gaussian"),
        ({"peft_type": "IA3"}, "peft_type=IA3: expected LORA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=true: expected null"),
        ({"some_new_key": 3}, "some_new_key=3: expected null"),
        ({"r": 0}, "r=0: expected an integer >= 1"),
        ({"alpha_pattern": {"(a|b)+": 3}}, "alpha_pattern=.*: expected names of modules"),
        ({"r": 10**9}, "found rank 3, expected 1000000000, as r and rank_pattern say"),
        ({"rank_pattern": {"q_proj": "3"}}, r"rank_pattern=\{q_proj:3\}: expected an object of integers"),
        ({"use_rslora": "yes"}, "use_rslora=yes: expected true or false"),
        ({"use_dora": True}, r"missing: base_model.model.model.layers.*lora_magnitude"),
    ],
)
def test_keys_that_are_not_implemented_are_refused_by_name(changes, message, exported, root, tmp_path):
    adapter = shutil.copytree(exported, tmp_path / "adapter")
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=message) as caught:
        import_adapter(adapter, open_model(base_directory("mixtral", root)), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_adapter_of_another_model_is_refused(exported, root, tmp_path):
    """By the fingerprint of the base, and without one by names and shapes."""
    other = base_directory("mixtral-window", root)
    with pytest.raises(
        ModelError, match=r"base-mixtral-window: expected the weights that the adapter in .*fingerprint"
    ):
        import_adapter(exported, open_model(other), tmp_path / "run")
    adapter = shutil.copytree(exported, tmp_path / "adapter")
    tensors = load_file(exported / WEIGHTS)
    wide = {name: torch.cat((t, t), dim=1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wide, adapter / WEIGHTS)
    with pytest.raises(ModelError, match=r"\w_proj: found A \[3, 48\], expected \[3, 24\] for .*base-mixtral"):
        import_adapter(adapter, open_model(base_directory("mixtral", root)), tmp_path / "run")
    renamed = {re.sub("layers.1", "layers.7", name): t for name, t in tensors.items()}
    save_file(renamed, adapter / WEIGHTS)
    with pytest.raises(ModelError, match=r"layers.7.self_attn.\w_proj: the model .* has no weight of this name"):
        import_adapter(adapter, open_model(base_directory("mixtral", root)), tmp_path / "run")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, adapter / WEIGHTS)
    with pytest.raises(ModelError, match=r"not those of a LoRA adapter: base_model.model.lm_head.weight"):
        import_adapter(adapter, open_model(base_directory("mixtral", root)), tmp_path / "run")


@pytest.mark.parametrize(
    ("module", "shapes", "dora", "message"),
    [
        ("lm_head", {"A.weight": (3, 24), "B.weight": (VOCAB, 3)}, False, "lm_head: the model .* can have an adapter"),
        ("model.embed_tokens", {"A.weight": (3, 24), "B.weight": (VOCAB, 3)}, False, "embed_tokens: the model"),
        ("model.norm", {"A.weight": (3, 24), "B.weight": (24, 3)}, False, "norm: the model .* can have an adapter"),
        (
            "model.layers.0.self_attn.q_proj",
            {"A.weight": (), "B.weight": (24, 3)},
            False,
            r"lora_A.weight: found shape \[\], expected 2 dimensions",
        ),
        (
            "model.layers.0.mlp.experts",
            {"A.weight": (12, 24), "B.weight": (38, 12), "magnitude_vector": (38,)},
            True,
            "mlp.experts: expected use_dora=false with an adapter of experts",
        ),
    ],
)
def test_an_adapter_without_a_place_is_refused(module, shapes, dora, message, exported, root, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = json.loads((exported / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"use_dora": dora}))
    save_file(
        {f"base_model.model.{module}.lora_{part}": torch.ones(shape) for part, shape in shapes.items()},
        adapter / WEIGHTS,
    )
    with pytest.raises(ModelError, match=message) as caught:
        import_adapter(adapter, open_model(base_directory("mixtral", root)), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_what_peft_cannot_describe_is_not_exported(root, tmp_path):
    base = base_directory("mixtral", root)
    write_run(base, AdapterConfig(**{**vars(LORA), "targets": ("router",), "dora": True}), tmp_path / "run")
    with pytest.raises(ModelError, match=r"^adapter.dora=true: expected adapters of linear maps only; peft has none"):
        export_adapter(open_model(tmp_path / "run"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
