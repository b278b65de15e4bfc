"""DeepSeekMoE from its released files, which transformers reads only with remote code, compared with a loop in fp64."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from common.errors import ModelError
from moe.generation.generate import generate
from tests.deepseek import CONFIG, Loop, loop_logits, write_released
from tests.foreign import assert_trains_as, load_model, random_tokens
from training.formats import huggingface as hf
from training.formats.export import export_model, import_model
from training.formats.huggingface import FAMILIES
from training.formats.reader import open_model

CHANGES = [
    {},
    pytest.param({"norm_topk_prob": True, "num_key_value_heads": 1}, marks=pytest.mark.slow),
    pytest.param(
        {
            "n_shared_experts": None,
            "first_k_dense_replace": 0,
            "attention_bias": True,
            "rope_scaling": {"type": "linear", "factor": 2.5},
        },
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("changes", CHANGES)
def test_logits_gradients_and_ten_steps_equal_a_loop_in_fp64(changes, tmp_path):
    loop = Loop(*write_released(tmp_path / "released", changes))
    assert_trains_as(loop, load_model(tmp_path / "released"), FAMILIES["deepseek"].per_expert, length=6)


def test_generated_tokens_are_those_of_the_loop(tmp_path):
    config, tensors = write_released(tmp_path / "released", {"num_key_value_heads": 1})
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    prompt = random_tokens(5, rows=1)[0].tolist()
    expected = list(prompt)
    for _ in range(8):
        expected.append(int(loop_logits(config, weights, torch.tensor([expected]))[0, -1].argmax()))
    assert generate(load_model(tmp_path / "released"), [prompt], max_tokens=8) == [expected[5:]]


def test_import_and_export_keep_every_bit_and_every_key_that_has_a_meaning(tmp_path):
    config, tensors = write_released(tmp_path / "released", {"torch_dtype": "float32"}, parts=3)
    reader = open_model(tmp_path / "released")
    assert (reader.model.num_experts, reader.model.top_k, reader.model.num_shared_experts) == (9, 4, 2)
    assert (reader.model.first_k_dense, reader.model.moe_every, reader.router.normalize) == (1, 1, False)
    import_model(reader, tmp_path / "imported", "fp32", 4_000)
    for shard_bytes in (10**9, 5_000):
        out = tmp_path / f"exported-{shard_bytes}"
        export_model(
            open_model(tmp_path / "imported"), out, form="hf", dtype="fp32", shard_bytes=shard_bytes, positions=64
        )
        files = sorted(out.glob("*.safetensors"))
        assert (len(files) > 3) == (shard_bytes < 10**9)
        exported = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert exported.keys() == tensors.keys()
        assert all(torch.equal(exported[name], tensors[name]) for name in tensors)
        raw = json.loads((out / "config.json").read_text())
        training_only = {"aux_loss_alpha", "seq_aux", "auto_map", "transformers_version", "pretraining_tp"}
        kept = config.keys() - training_only - {"bos_token_id", "eos_token_id", "rope_scaling", "attention_bias"}
        assert {key: raw[key] for key in kept} == {key: config[key] for key in kept}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "sigmoid"}, "c: scoring_func=sigmoid: expected softmax"),
        ({"norm_topk_prob": None}, "c: norm_topk_prob=null: expected true or false"),
        ({"n_routed_experts": None}, "c: n_routed_experts=null: expected an integer >= 1"),
        ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "c: num_experts_per_tok=1: expected at least 2"),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 0}, "c: moe_layer_freq=2: expected that, after"),
        ({"moe_layer_freq": 2**40, "num_hidden_layers": 2**41}, "c: num_hidden_layers=2199023255552: expected at most"),
        ({"first_k_dense_replace": 3}, "c: moe_layer_freq=1: expected that, after"),
        ({"first_k_dense_replace": -1}, "c: first_k_dense_replace=-1: expected an integer >= 0"),
        ({"head_dim": 8}, "c: head_dim=8: expected 4, hidden_size / num_attention_heads"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "c: rope_scaling={type:yarn,factor:2.0}: expected a rope_ty",
        ),
        ({"mlp_bias": True}, "c: mlp_bias=true: expected false"),
        ({"routed_scaling_factor": 2.0}, "c: routed_scaling_factor=2.0: expected a known key"),
        ({"topk_method": "group_limited_greedy"}, "c: topk_method=group_limited_greedy: expected a known key"),
        ({"sliding_window": 4}, "c: sliding_window=4: expected null in a DeepseekForCausalLM"),
        ({"model_type": "deepseek_next"}, "c: model_type=deepseek_next: expected one of llama"),
    ],
)
def test_a_key_that_changes_what_is_computed_is_an_error_that_names_it(changes, message):
    with pytest.raises(ModelError) as caught:
        hf.read_config(CONFIG | {"num_hidden_layers": 3} | changes, "c")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_the_layers_of_moe_layer_freq():
    # Layers 2, 4 and 6 of 7 are MoE layers: of those after the first, every second one.
    changes = {"first_k_dense_replace": 1, "moe_layer_freq": 2, "num_hidden_layers": 7}
    model, router = hf.read_config(CONFIG | changes, "c")
    assert [layer for layer in range(7) if model.is_moe_layer(layer)] == [2, 4, 6]
    raw = hf.write_config(model, router, "float32", 64)
    assert hf.read_config(raw, "c") == (model, router)
    with pytest.raises(ModelError, match=r"^family=deepseek: model.moe_every=2: expected 1, or a divisor of 3, the"):
        hf.check_family("deepseek", dataclasses.replace(model, first_k_dense=2), router)


def test_remote_code_is_refused_if_the_family_is_not_known():
    raw = CONFIG | {"model_type": "other", "architectures": ["OtherForCausalLM"]}
    with pytest.raises(ModelError, match=r"^c: model_type=other: expected one of .*; the code that auto_map names is"):
        hf.read_config(raw, "c")
