"""DeepSeek-V2 and V3 compared with transformers, weights in FP8 with a loop, and what is refused."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from moe.generation.generate import generate
from moe.region import Region
from tests.foreign import VOCAB, assert_trains_as, load_model, random_tokens
from training.formats import huggingface as hf
from training.formats.export import export_model, import_model
from training.formats.foreign_tensors import TensorDirectory
from training.formats.huggingface import FAMILIES
from training.formats.reader import open_model

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7,
        "mscale_all_dim": 0.6}  # fmt: skip
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 22, "intermediate_size": 19, "moe_intermediate_size": 7, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 10, "q_lora_rank": 11, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 6, "v_head_dim": 7, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-lite": ("DeepseekV2", {"q_lora_rank": None}),
    "v2": ("DeepseekV2", {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2,
                          "routed_scaling_factor": 16.0, "rope_parameters": YARN}),
    # transformers' V2 takes no odd widths here.
    "v3": ("DeepseekV3", {"kv_lora_rank": 9, "qk_nope_head_dim": 5, "n_group": 3, "topk_group": 2,
                          "n_shared_experts": 1, "rope_parameters": YARN}),
}  # fmt: skip
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def reference_model(case: str) -> Any:
    import transformers

    family, changes = CASES[case]
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**COMMON | EAGER | changes)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if parameter.dim() == 1 else 0.25 * drawn)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def export(source, out, dtype="fp32", shard_bytes=10**9):
    export_model(open_model(source), out, form="hf", dtype=dtype, shard_bytes=shard_bytes, positions=64)
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", [pytest.param("v2-lite", marks=pytest.mark.slow), "v2", "v3"])
def test_logits_gradients_and_ten_steps_equal_transformers(case, tmp_path):
    reference = reference_model(case)
    reference.save_pretrained(tmp_path)
    assert_trains_as(reference, load_model(tmp_path), FAMILIES[reference.config.model_type].fused)


@pytest.mark.parametrize("case", CASES)
def test_import_and_export_keep_every_bit_and_generate_the_same_tokens(case, tmp_path):
    import transformers

    reference = reference_model(case)
    reference.save_pretrained(tmp_path / "reference")
    import_model(open_model(tmp_path / "reference"), tmp_path / "imported", "fp32", 4_000)
    whole = export(tmp_path / "imported", tmp_path / "whole")
    parts = export(tmp_path / "imported", tmp_path / "parts", shard_bytes=5_000)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)

    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts", **EAGER)
    expected, found = reference.state_dict(), exported.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)

    save_file(
        {name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "reference/model.safetensors"
    )
    assert open_model(tmp_path / "reference").format.parts  # experts are stacked
    fused = export(tmp_path / "reference", tmp_path / "fused")
    assert whole.keys() == fused.keys() and all(torch.equal(whole[name], fused[name]) for name in whole)

    tokens = random_tokens(7, rows=1)
    theirs = exported.generate(tokens, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours = generate(load_model(tmp_path / "whole"), tokens.tolist(), max_tokens=16)
    assert [*tokens[0].tolist(), *ours[0]] == theirs[0].tolist()


def test_the_selection_bias_stays_in_fp32(tmp_path):
    reference = reference_model("v3")
    reference.save_pretrained(tmp_path / "reference")
    exported = export(tmp_path / "reference", tmp_path / "out", dtype="bf16")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(exported.pop(name), reference.state_dict()[name])
    dtypes = {tensor.dtype for name, tensor in exported.items() if not name.endswith("bias")}
    assert dtypes == {torch.bfloat16}


def dequantised(codes, scales, block):
    """Every element by itself, in float64 and then in fp32, which is exact: a product of 4 and 24 bits."""
    wide = codes.double()
    for i in range(len(wide)):
        for j in range(wide.shape[1]):
            wide[i, j] *= scales[i // block[0], j // block[1]].double()
    return wide.float()


def fp8(shape, block, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(*shape, generator=generator).to(torch.float8_e4m3fn)
    blocks = [-(-size // part) for size, part in zip(shape, block, strict=True)]
    return codes, 0.3 * torch.rand(*blocks, generator=generator)


def released(directory, tensors, block):
    """Write `tensors` with the matrices of attention and networks in FP8. Return the matrices that they stand for."""
    directory.mkdir()
    written, plain = {}, {}
    for number, (name, tensor) in enumerate(tensors.items()):
        quantised = tensor.dim() == 2 and ("_proj" in name)
        if quantised:
            written[name], written[f"{name}_scale_inv"] = fp8(tensor.shape, block, number)
            plain[name] = dequantised(written[name], written[f"{name}_scale_inv"], block)
        else:
            written[name] = plain[name] = tensor
    return written, plain


def write(directory, config, tensors, files=2):
    names = list(tensors)
    file_of = {name: f"model-{1 + index % files}.safetensors" for index, name in enumerate(names)}
    for file in set(file_of.values()):
        save_file({name: tensors[name].contiguous() for name in names if file_of[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", ["v2-lite", "v3"])
def test_weights_in_fp8_are_those_of_a_loop(case, tmp_path):
    reference_model(case).save_pretrained(tmp_path / "reference")
    tensors, block = export(tmp_path / "reference", tmp_path / "plain"), (5, 4)
    quantised, plain = released(tmp_path / "fp8", tensors, block)
    config = json.loads((tmp_path / "plain/config.json").read_text())
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    write(tmp_path / "fp8", config | {"quantization_config": how}, quantised)
    save_file(plain, tmp_path / "plain/model.safetensors")

    ours, expected = load_model(tmp_path / "fp8").state_dict(), load_model(tmp_path / "plain").state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    reader = open_model(tmp_path / "fp8")
    # Parts of a matrix that begin and end within blocks; rows in another order; one expert of a stack.
    for name, region in (
        ("layers.0.ffn.w_up.weight", Region((3, 2), (9, 15))),
        ("layers.1.attention.wkv_down.weight", Region((6, 1), (8, 7))),
        ("layers.2.ffn.experts.w_down", Region((4, 1, 2), (1, 20, 3))),
    ):
        part = tuple(slice(o, o + n) for o, n in zip(*region, strict=True))
        assert torch.equal(reader.read(name, region, torch.float32), expected[name][part])
    import_model(reader, tmp_path / "imported", "keep", 10**9)
    kept = load_model(tmp_path / "imported").state_dict()
    assert all(torch.equal(kept[name], expected[name].bfloat16().float()) for name in kept if "wkv_up" in name)


def test_the_released_size_of_a_block(tmp_path):
    codes, scales = fp8((257, 150), (128, 128))
    save_file({"w.weight": codes, "w.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    files = TensorDirectory(tmp_path, "index.json", "model.safetensors", (128, 128))
    expected = dequantised(codes, scales, (128, 128))
    assert list(files.tensors) == ["w.weight"] and files.tensors["w.weight"].dtype == torch.bfloat16
    assert torch.equal(files.read("w.weight", (0, 0), (257, 150)), expected)
    assert torch.equal(files.read("w.weight", (120, 100), (130, 50)), expected[120:250, 100:150])


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("block", "scales", "message"),
    [
        (
            (128, 128),
            torch.ones(1, 1).to(torch.float8_e4m3fn),
            "w.weight_scale_inv: found dtype F8_E4M3, expected F32, BF16 or F16",
        ),
        ((128, 128), None, "w.weight: found dtype F8_E4M3, expected its scales in w.weight_scale_inv"),
        ((128, 128), (2, 1), "w.weight_scale_inv: found shape [2, 1], expected [1, 1]"),
        (None, (1, 1), "w.weight: found dtype F8_E4M3, expected a quantization_config with quant_method=fp8"),
    ],
)
def test_a_missing_scale_is_one_line(block, scales, message, tmp_path):
    tensors = {"w.weight": torch.zeros(8, 9).to(torch.float8_e4m3fn)}
    if scales is not None:
        tensors["w.weight_scale_inv"] = torch.ones(scales) if isinstance(scales, tuple) else scales
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        TensorDirectory(tmp_path, "index.json", "model.safetensors", block)
    assert str(caught.value) == f"{tmp_path}/model.safetensors: {message}"


@pytest.mark.parametrize("given", [1, 0])
def test_layers_for_multi_token_prediction_are_skipped_with_a_note_if_the_file_says_what_they_are(given, tmp_path):
    reference_model("v3").save_pretrained(tmp_path / "reference")
    tensors = export(tmp_path / "reference", tmp_path / "out")
    extra = {
        "model.layers.3.eh_proj.weight": torch.zeros(2, 2),
        "model.layers.3.self_attn.o_proj.weight": torch.ones(3),
    }
    save_file(tensors | extra, tmp_path / "out/model.safetensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": given}))
    lines = []
    if given == 0:
        with pytest.raises(ModelError, match=r"has no place for: model\.layers\.3\.eh_proj\.weight"):
            open_model(tmp_path / "out", warn=lines.append)
        return
    assert open_model(tmp_path / "out", warn=lines.append).model.num_layers == 3
    assert lines == [
        f"{tmp_path}/out: not reading layer 3, which is for multi-token prediction (num_nextn_predict_layers=1)"
    ]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_missing_keys_have_the_defaults_of_transformers(family):
    import transformers

    config = transformers.AutoConfig.for_model(family)
    defaults = dict(FAMILIES[family].DEFAULTS)
    assert defaults.pop("rope_theta") == config.rope_parameters["rope_theta"]
    # Keys of DeepSeek's code that transformers does not have, and one that says what is in a file.
    others = {"scoring_func", "moe_layer_freq", "num_nextn_predict_layers", "qk_head_dim"}
    others |= {"rope_interleave"} if family == "deepseek_v2" else {"topk_method"}
    for key in defaults.keys() - others:
        assert defaults[key] in (getattr(config, key), None), key


CONFIG_V2 = COMMON | {"model_type": "deepseek_v2"}
CONFIG_V3 = COMMON | {"model_type": "deepseek_v3", "n_group": 3, "topk_group": 2}


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (CONFIG_V2, {"norm_topk_prob": True}, "norm_topk_prob=true: expected false"),
        (CONFIG_V2, {"topk_method": "noaux_tc"}, "topk_method=noaux_tc: expected one of greedy, group_limited_greedy"),
        (CONFIG_V2, {"scoring_func": "sigmoid"}, "scoring_func=sigmoid: expected softmax"),
        (CONFIG_V2, {"moe_layer_freq": 2}, "moe_layer_freq=2: expected 1"),
        (CONFIG_V2, {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05: expected 1e-06"),
        (CONFIG_V2, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1: expected a known key"),
        (CONFIG_V2, {"attention_bias": True}, "attention_bias=true: expected false"),
        (CONFIG_V2, {"head_dim": 10}, "head_dim=10: expected 6, or no such key"),
        (CONFIG_V2, {"num_key_value_heads": 1}, "as Mixwright's configuration: num_kv_heads=1: expected num_heads=2"),
        (CONFIG_V3, {"rope_interleave": False}, "rope_interleave=false: expected true"),
        (CONFIG_V3, {"scoring_func": "softmax"}, "scoring_func=softmax: expected sigmoid"),
        (CONFIG_V3, {"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers=1000000000: expected at most 100"),
        (CONFIG_V3, {"topk_group": 9}, "as Mixwright's configuration: topk_groups=9: expected an integer from 1"),
        (CONFIG_V3, {"n_group": 1}, "topk_group=2: expected 1, or no such key, with n_group=1"),
        (CONFIG_V3, {"index_topk": 2048}, "index_topk=2048: expected a known key"),
        (CONFIG_V3, {"quantization_config": FP8 | {"quant_method": "awq"}}, "quantization_config={quant_method:awq"),
        (CONFIG_V3, {"quantization_config": FP8 | {"activation_scheme": "static"}}, "quantization_config={"),
        (CONFIG_V3, {"quantization_config": FP8 | {"weight_block_size": None}},
         "quantization_config.weight_block_size=null: expected a list of two integers"),
        (CONFIG_V3, {"quantization_config": FP8 | {"other": 1}}, "quantization_config={quant_method:fp8,"),
    ],
)  # fmt: skip
def test_a_key_that_changes_what_is_computed_is_an_error_that_names_it(raw, changes, message):
    hf.read_config(raw, "c")
    with pytest.raises(ModelError) as caught:
        hf.read_config(raw | changes, "c")
    assert str(caught.value).startswith(f"c: {message}") and "\n" not in str(caught.value)


def test_export_names_the_key_that_no_family_has():
    import dataclasses

    from training.formats import mistral

    model, router = hf.read_config(CONFIG_V3, "c")
    assert hf.read_config(hf.write_config(model, router, "float32", 64), "c") == (model, router)
    for changes, message in (
        ({"norm_eps": 1e-5}, "model.norm_eps=1e-05: expected 1e-06, that of the norms of latents"),
        ({"num_shared_experts": 0}, "model.num_shared_experts=0: expected at least 1"),
        ({"sliding_window": 4}, "model.sliding_window=4: expected null"),
    ):
        with pytest.raises(ModelError) as caught:
            hf.write_config(dataclasses.replace(model, **changes), router, "float32", 64)
        assert str(caught.value).startswith(message)
    dense = dict.fromkeys(("num_experts", "top_k", "expert_hidden_dim")) | {"num_shared_experts": 0, "first_k_dense": 0}
    for write_config in (lambda *given: hf.write_config(*given, "float32", 64), mistral.write_params):
        with pytest.raises(ModelError, match=r"^model.kv_lora_rank=10: expected null"):
            write_config(dataclasses.replace(model, **dense), router)
