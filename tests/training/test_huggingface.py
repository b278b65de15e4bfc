"""Llama, Mistral and Mixtral compared with transformers: logits, gradients, training, generation, configurations."""

import dataclasses
import json
import re

import pytest
import torch

from common.errors import ModelError
from moe.config import ModelConfig, RopeScaling, RouterConfig
from moe.generation.generate import generate
from tests.foreign import (
    assert_trains_as,
    cases,
    load_model,
    load_reference,
    random_tokens,
    save_reference,
)
from training.formats import huggingface as hf
from training.formats import mistral
from training.formats.export import export_model
from training.formats.foreign_tensors import PairedRows, interleave, list_pieces, split_halves, tensor_shapes
from training.formats.huggingface import FAMILIES
from training.formats.meaning import differences, meaning
from training.formats.reader import open_model

DENSE = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
SPARSE = DENSE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize("case", cases())
def test_logits_gradients_and_ten_steps_equal_transformers(case, tmp_path):
    reference = save_reference(case, tmp_path)
    assert_trains_as(reference, load_model(tmp_path), FAMILIES[reference.config.model_type].fused)


@pytest.mark.parametrize("case", cases())
def test_an_exported_model_is_the_same_model_in_transformers(case, tmp_path):
    reference = save_reference(case, tmp_path / "reference")
    reader = open_model(tmp_path / "reference")
    export_model(reader, tmp_path / "exported", form="hf", dtype="fp32", shard_bytes=20_000, positions=64)
    exported = load_reference(tmp_path / "exported")
    assert exported.dtype == torch.float32
    expected, actual = reference.state_dict(), exported.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    tokens = random_tokens(9)
    torch.testing.assert_close(exported(tokens).logits, reference(tokens).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "case", ["llama-gqa-tied", "llama-3.1", "mixtral-window", "qwen2", "olmoe", "qwen2-moe", "qwen3-moe"]
)
def test_transformers_generates_the_same_tokens(case, tmp_path):
    save_reference(case, tmp_path / "reference")
    reader = open_model(tmp_path / "reference")
    export_model(reader, tmp_path / "out", form="hf", dtype="fp32", shard_bytes=10**9, positions=64)
    tokens = random_tokens(7, rows=1)
    reference = load_reference(tmp_path / "out")
    expected = reference.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    generated = generate(load_model(tmp_path / "out"), tokens.tolist(), max_tokens=20)
    assert [*tokens[0].tolist(), *generated[0]] == expected[0].tolist()


IN_TRANSFORMERS = [name for name, family in FAMILIES.items() if name != "deepseek" and not family.latent]
"""Families that transformers has without remote code. (`test_latent_formats.py` has those with latent attention.)"""


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_missing_keys_have_the_defaults_of_transformers(family):
    import transformers

    config = transformers.AutoConfig.for_model(family)
    expected = (
        config.rope_parameters["rope_theta"],
        config.rms_norm_eps,
        getattr(config, "sliding_window", None) or None,
    )
    defaults = dict(FAMILIES[family].DEFAULTS)
    assert defaults.pop("rope_theta") == expected[0]
    assert (defaults.pop("num_key_value_heads", None) or config.num_attention_heads) == config.num_key_value_heads
    # Keys of other versions are None by default, and not attributes of the configuration in transformers 5.
    assert defaults == {key: getattr(config, key) for key in defaults if defaults[key] is not None} | {
        key: None for key in defaults if defaults[key] is None
    }
    raw = DENSE | {"num_key_value_heads": 2}
    model, _ = hf.read_config(raw | {"model_type": family}, "config.json")
    assert (model.rope_theta, model.norm_eps, model.sliding_window) == expected
    assert (model.tie_embeddings, model.head_dim) == (config.tie_word_embeddings, defaults.get("head_dim", 4))


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_a_null_number_of_key_value_heads_is_that_of_the_query_heads(family):
    raw = DENSE | {"model_type": family, "num_attention_heads": 4}
    assert hf.read_config(raw | {"num_key_value_heads": None}, "c")[0].num_kv_heads == 4
    assert hf.read_config(raw | {"num_key_value_heads": 2}, "c")[0].num_kv_heads == 2


def test_missing_numbers_of_experts_have_the_defaults_of_transformers_and_its_alias():
    import transformers

    missing = {key: value for key, value in SPARSE.items() if not key.startswith("num_experts_per")}
    del missing["num_local_experts"]
    for change in ({}, {"num_experts": 6}):
        model, config = hf.read_config(missing | change, "c")[0], transformers.MixtralConfig(**change)
        assert (model.num_experts, model.top_k) == (config.num_local_experts, config.num_experts_per_tok)


def test_old_and_new_spellings_of_a_configuration_are_equal():
    new = SPARSE | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "dtype": "bfloat16", "architectures": ["MixtralForCausalLM"]}  # fmt: skip  # noqa: E501
    old = SPARSE | {"rope_theta": 7.0, "rope_scaling": None, "torch_dtype": "bfloat16", "use_cache": True}
    assert hf.read_config(new, "c") == hf.read_config(old, "c")
    assert hf.read_config(new, "c")[0].rope_theta == 7
    # transformers takes an object in rope_scaling in place of rope_parameters.
    scaling = new | {"rope_scaling": {"rope_theta": 8.0}}
    assert hf.read_config(scaling, "c")[0].rope_theta == 8
    assert hf.read_config(scaling | {"rope_scaling": {}}, "c") == hf.read_config(new, "c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "c: model_type=gpt2: expected one of llama"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "c: architectures=[LlamaForSequenceClassification]: expected [LlamaForCausalLM]",
        ),
        ({"model_type": ["llama"]}, "c: model_type="),
        ({"hidden_act": "relu"}, "c: hidden_act=relu: expected one of silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "c: rope_scaling={type:dynamic,"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1]}}, "c: rope_scaling={type:longrope,"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2}},
            "c: rope_parameters.original_max_position_embeddings=null: expected an integer >= 1",
        ),
        ({"rope_scaling": {"type": "linear"}}, "c: rope_scaling.factor=null: expected a number > 0"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "c: rope_scaling: factor=0.5: expected a number >= 1"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
            "c: rope_scaling={rope_type:linear,",
        ),
        ({"rope_scaling": YARN | {"finetuned": True}}, "c: rope_scaling={rope_type:yarn,"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "c: rope_scaling: mscale_all_dim=null: expected"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "c: rope_theta=-1: expected a number > 0"),
        ({"rope_parameters": {"rope_theta": None}}, "c: rope_theta=null: expected a number > 0"),
        ({"rope_scaling": {"rope_theta": 5.0, "mrope_section": [1, 1]}}, "c: rope_scaling="),
        ({"is_causal": False}, "c: is_causal=false: expected true"),
        ({"is_causal": None}, "c: is_causal=null: expected true"),
        ({"norm_topk_prob": False}, "c: norm_topk_prob=false: expected a known key"),
        ({"per_layer_config": {}}, "c: per_layer_config={}: expected a known key"),
        ({"sliding_window": 4}, "c: sliding_window=4: expected null in a LlamaForCausalLM"),
        (SPARSE | {"sliding_window": 4, "use_sliding_window": False}, "c: use_sliding_window=false: expected true"),
        (SPARSE | {"num_experts": 5}, "c: num_experts=5: expected 4, as num_local_experts"),
        ({"rms_norm_eps": None}, "c: rms_norm_eps=null: expected a number > 0"),
        (SPARSE | {"attention_bias": True}, "c: attention_bias=true: expected false"),
        ({"attention_bias": 1}, "c: attention_bias=1: expected true or false"),
        ({"quantization_config": {"bits": 4}}, "c: quantization_config="),
        ({"qk_norm": True}, "c: qk_norm=true: expected a known key; this one can change what the model computes"),
        ({"hidden_size": "8"}, "c: hidden_size=8: expected an integer >= 1"),
        ({"num_hidden_layers": 0}, "c: num_hidden_layers=0: expected an integer >= 1"),
        ({"num_hidden_layers": None}, "c: num_hidden_layers=null: expected an integer >= 1"),
        ({"num_attention_heads": 0}, "c: num_attention_heads=0: expected an integer >= 1"),
        ({"num_key_value_heads": 3}, "c: as Mixwright's configuration: num_kv_heads=3: expected a divisor"),
        ({"rms_norm_eps": True}, "c: rms_norm_eps=true: expected a number > 0"),
        ({"tie_word_embeddings": 1}, "c: tie_word_embeddings=1: expected true or false"),
        (SPARSE | {"num_experts_per_tok": 1}, "c: num_experts_per_tok=1: expected at least 2"),
        (SPARSE | {"num_experts_per_tok": 5}, "c: as Mixwright's configuration: top_k=5"),
        (SPARSE | {"num_local_experts": None}, "c: num_local_experts=null"),
        (SPARSE | {"sliding_window": "4096"}, "c: sliding_window=4096: expected an integer"),
    ],
)
def test_an_unsupported_configuration_is_an_error_of_one_line(changes, message):
    with pytest.raises(ModelError) as caught:
        hf.read_config(DENSE | changes, "c")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


OLMOE = DENSE | {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = DENSE | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2,
                     "moe_intermediate_size": 5, "head_dim": 4}  # fmt: skip

QWEN2_MOE = QWEN3_MOE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 7}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (OLMOE | {"clip_qkv": 8.0}, "clip_qkv=8.0: expected null"),
        (OLMOE | {"head_dim": 8}, "head_dim=8: expected 4, hidden_size / num_attention_heads"),
        (OLMOE | {"num_local_experts": 5}, "num_local_experts=5: expected 4, as num_experts"),
        (OLMOE | {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok=1: expected at least 2"),
        (OLMOE | {"sliding_window": 4}, "sliding_window=4: expected null in a OlmoeForCausalLM"),
        (OLMOE | {"moe_intermediate_size": 4}, "moe_intermediate_size=4: expected a known key"),
        (QWEN3_MOE | {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window=true: expected false"),
        (
            QWEN3_MOE | {"layer_types": ["sliding_attention"]},
            "layer_types=[sliding_attention]: expected full_attention",
        ),
        (QWEN3_MOE | {"layer_types": ["full_attention"] * 2}, "layer_types=[full_attention,full_attention]: expected"),
        (
            QWEN3_MOE | {"mlp_only_layers": [0]},
            "mlp_only_layers=[0]: expected that, after some dense layers, every n-th",
        ),
        (
            QWEN3_MOE | {"mlp_only_layers": [1, 2], "num_hidden_layers": 5},
            "mlp_only_layers=[1,2]: expected that, after",
        ),
        (QWEN3_MOE | {"mlp_only_layers": 3}, "mlp_only_layers=3: expected a list of layers"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step=2: expected that, after some dense layers"),
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step=0: expected an integer >= 1"),
        (QWEN3_MOE | {"num_hidden_layers": 2**40}, "num_hidden_layers=1099511627776: expected at most 10000"),
        (QWEN3_MOE | {"norm_topk_prob": None}, "norm_topk_prob=null: expected true or false"),
        (QWEN2_MOE | {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0: expected an integer"),
        (QWEN2_MOE | {"qkv_bias": 1}, "qkv_bias=1: expected true or false"),
        (QWEN2_MOE | {"attention_bias": True}, "attention_bias=true: expected false"),
        (QWEN2_MOE | {"n_shared_experts": 2}, "n_shared_experts=2: expected a known key"),
        (QWEN3_MOE | {"mlp_bias": True}, "mlp_bias=true: expected false"),
        (QWEN3_MOE | {"scoring_func": "sigmoid"}, "scoring_func=sigmoid: expected a known key"),
        (
            QWEN3_MOE | {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config={quant_method:gptq}: expected null, or quant_method fp8",
        ),
        (
            DENSE | {"model_type": "qwen2", "num_key_value_heads": 2, "qkv_bias": False},
            "qkv_bias=false: expected a known key",
        ),
    ],
)
def test_a_key_of_a_family_that_changes_what_is_computed_is_an_error_that_names_it(raw, message):
    with pytest.raises(ModelError) as caught:
        hf.read_config(raw, "c")
    assert str(caught.value).startswith(f"c: {message}") and "\n" not in str(caught.value)


def test_layers_that_are_listed_as_dense_survive_a_round_trip():
    for layers, only, step, expected in (
        (4, [0], 1, [1, 2, 3]),
        (4, [], 2, [1, 3]),
        (5, [0, 1, 3], 1, [2, 4]),
        (6, [1], 2, [3, 5]),
        (3, [0, 2, 9], 1, [1]),
    ):
        raw = QWEN3_MOE | {"num_hidden_layers": layers, "mlp_only_layers": only, "decoder_sparse_step": step}
        model, router = hf.read_config(raw, "c")
        assert [layer for layer in range(layers) if model.is_moe_layer(layer)] == expected
        assert hf.read_config(hf.write_config(model, router, "float32", 64), "c") == (model, router)


MIXTRAL = ModelConfig(
    dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=12, num_experts=4, top_k=2, vocab_size=9
)


NO_FAMILY = [
    ({"ffn": "relu"}, {}, "model.ffn=relu: expected swiglu or geglu"),
    ({"expert_ffn": "gelu"}, {}, "model.expert_ffn=gelu: expected swiglu or geglu"),
    ({"num_experts": None, "top_k": None, "ffn": "gelu"}, {}, "model.ffn=gelu: expected swiglu or geglu"),
    ({"sliding_window": (4, None)}, {}, "model.sliding_window=[4,null]: expected one window for all layers"),
    ({"rotary_dim": 2}, {}, "model.rotary_dim=2: expected 4"),
    ({}, {"kind": "sigmoid_topk"}, "router.kind=sigmoid_topk: expected softmax_topk"),
    ({}, {"scale": 2.5}, "router.scale=2.5: expected 1.0"),
    ({}, {"num_groups": 2, "topk_groups": 1}, "router.num_groups=2: expected null"),
]
BIASES = ({"qk_norm": "head", "attention_bias": "qkv"}, {}, "model.attention_bias=qkv: expected null")
NOT_MISTRALS = [
    ({"qk_norm": "head", "attention_bias": "qkv"}, {}, "model.qk_norm=head: expected null"),
    ({"rope_scaling": RopeScaling("linear", 2.0)}, {}, "model.rope_scaling={kind:linear,"),
    ({"num_shared_experts": 1, "shared_gate": True}, {}, "model.num_shared_experts=1: expected 0"),
    ({"num_shared_experts": 1, "shared_hidden_dim": 5}, {}, "model.num_shared_experts=1: expected 0"),
]
NOT_MIXTRAL = [
    ({"num_shared_experts": 1}, {}, "model.num_shared_experts=1: expected 0"),
    ({"first_k_dense": 1}, {}, "model.first_k_dense=1: expected 0"),
    ({"moe_every": 2}, {}, "model.moe_every=2: expected 1"),
    ({"top_k": 1}, {}, "model.top_k=1: expected at least 2"),
    ({}, {"normalize": False}, "router.normalize=false: expected true"),
]


@pytest.mark.parametrize(("model", "router", "message"), [*NO_FAMILY, BIASES])
def test_exporting_a_model_that_no_family_computes_is_an_error_that_names_the_key(model, router, message):
    with pytest.raises(ModelError, match=f"^{re.escape(message)}.*, as in (Llama|Mixtral|Qwen3Moe)ForCausalLM$"):
        hf.write_config(dataclasses.replace(MIXTRAL, **model), RouterConfig(**router), "bfloat16", 64)


@pytest.mark.parametrize(("model", "router", "message"), NO_FAMILY + NOT_MISTRALS + NOT_MIXTRAL)
def test_exporting_in_mistrals_format_what_it_cannot_describe_is_an_error_that_names_the_key(model, router, message):
    with pytest.raises(ModelError) as caught:
        mistral.write_params(dataclasses.replace(MIXTRAL, **model), RouterConfig(**router))
    start = message.replace(" or geglu", "")
    assert str(caught.value).startswith(start) and str(caught.value).endswith(", as in format=mistral")


DENSE_MODEL = {"num_experts": None, "top_k": None}


@pytest.mark.parametrize(
    ("model", "router", "family"),
    [
        *((model, router, "deepseek") for model, router, _ in NOT_MIXTRAL),
        ({}, {}, "mixtral"),
        ({"attention_bias": "all"}, {}, "deepseek"),
        ({"qk_norm": "head", "first_k_dense": 1}, {}, "qwen3_moe"),
        ({"qk_norm": "width"}, {"normalize": False}, "olmoe"),
        ({"num_shared_experts": 2, "shared_gate": True, "attention_bias": "qkv"}, {}, "qwen2_moe"),
        ({"num_shared_experts": 1, "shared_gate": True, "shared_hidden_dim": 5, "moe_every": 2}, {}, "qwen2_moe"),
        (DENSE_MODEL, {}, "llama"),
        (DENSE_MODEL | {"attention_bias": "all"}, {}, "llama"),
        (DENSE_MODEL | {"num_heads": 3}, {}, "mistral"),
        (DENSE_MODEL | {"sliding_window": 5}, {}, "mistral"),
        (DENSE_MODEL | {"attention_bias": "qkv"}, {}, "qwen2"),
        (DENSE_MODEL | {"qk_norm": "head"}, {}, "qwen3"),
    ],
)
def test_export_takes_a_family_that_computes_the_model(model, router, family):
    config, router = dataclasses.replace(MIXTRAL, **model), RouterConfig(**router)
    raw = hf.write_config(config, router, "bfloat16", 64)
    assert raw["model_type"] == family
    read = hf.read_config(json.loads(json.dumps(raw)), "c")
    assert meaning(*read) == meaning(config, router)


def test_models_with_the_same_meaning_are_the_same_model():
    equal = (
        ({"sliding_window": 4}, {"sliding_window": (4, 4)}),
        ({"moe_every": 2}, {"first_k_dense": 1}),
        ({"expert_hidden_dim": 12}, {"hidden_dim": 12}),
        ({"expert_hidden_dim": 12}, {"expert_hidden_dim": 12, "hidden_dim": 5, "ffn": "relu", "expert_ffn": "swiglu"}),
    )
    for ours, theirs in equal:
        configs = [dataclasses.replace(MIXTRAL, **changes) for changes in (ours, theirs)]
        assert meaning(configs[0], RouterConfig()) == meaning(configs[1], RouterConfig(normalize=True))
    for name in ("norm_eps", "tie_embeddings", "rope_theta", "num_kv_heads", "vocab_size"):
        changed = dataclasses.replace(MIXTRAL, **{name: 2})
        messages = differences(changed, RouterConfig(), (MIXTRAL, RouterConfig()), "x")
        assert [message.split("=")[0] for message in messages] == [f"model.{name}"]


def test_configurations_survive_a_round_trip():
    dense = dataclasses.replace(MIXTRAL, num_experts=None, top_k=None)
    for config in (
        MIXTRAL,
        dataclasses.replace(MIXTRAL, sliding_window=6, tie_embeddings=True, rope_theta=12.5, norm_eps=1e-6),
        dense,
        dataclasses.replace(dense, sliding_window=4096, num_heads=3, rope_theta=1e4),
        dataclasses.replace(dense, num_heads=3),
    ):
        router = RouterConfig(normalize=True) if config.is_moe else RouterConfig()
        raw = json.loads(json.dumps(hf.write_config(config, router, "bfloat16", 64)))
        assert hf.read_config(raw, "c") == (config, router)
        assert {"rope_theta", "rope_parameters", "rms_norm_eps", "dtype", "torch_dtype"} <= raw.keys()
        raw = json.loads(json.dumps(mistral.write_params(config, router)))
        assert mistral.read_params(raw, "p") == (config, router)


def test_the_exported_width_is_that_of_the_experts():
    config = dataclasses.replace(MIXTRAL, expert_hidden_dim=5, rotary_dim=MIXTRAL.head_dim)
    raw = hf.write_config(config, RouterConfig(), "float32", 64)
    assert raw["intermediate_size"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "p: model_type=mamba"),
        ({"lora": {"rank": 4}}, "p: lora="),
        ({"moe": 4}, "p: moe=4: expected an object"),
        ({"moe": {"num_experts": 4, "num_experts_per_tok": 1}}, "p: moe.num_experts_per_tok=1"),
        ({"moe": {"num_experts": 4, "num_experts_per_tok": 2, "shared": 1}}, "p: moe.shared=1"),
        ({"norm_eps": None}, "p: norm_eps=null"),
        ({"multiple_of": 256}, "p: multiple_of=256"),
    ],
)
def test_an_unsupported_params_json_is_an_error(changes, message):
    params = {"dim": 8, "n_layers": 1, "head_dim": 4, "hidden_dim": 12, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5,
              "vocab_size": 9}  # fmt: skip
    assert mistral.read_params(params, "p")[0].rope_theta == 1e6
    assert mistral.read_params(params | {"sliding_window": 4}, "p")[0].rope_theta == 1e4
    with pytest.raises(ModelError) as caught:
        mistral.read_params(params | changes, "p")
    assert str(caught.value).startswith(message)


def test_interleaving_rotary_rows_by_hand():
    rows = torch.arange(8).unsqueeze(1)  # Two heads of four rows, with the halves (0,1 | 2,3) and (4,5 | 6,7).
    assert interleave(rows, PairedRows(4, 4)).squeeze(1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    more = torch.arange(10).unsqueeze(1)  # Of each head of five rows, the last four.
    assert interleave(more, PairedRows(5, 4)).squeeze(1).tolist() == [0, 1, 3, 2, 4, 5, 6, 8, 7, 9]
    for x, pairs in ((rows, PairedRows(4, 4)), (more, PairedRows(5, 4))):
        assert torch.equal(split_halves(interleave(x, pairs), pairs), x)


def test_every_element_is_in_exactly_one_piece():
    mixtral = FAMILIES["mixtral"]
    for form in (mixtral.fused, mixtral.per_expert, mistral.FORMAT):
        shapes = tensor_shapes(MIXTRAL, RouterConfig())
        counts = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
        used: dict[str, int] = {}
        for piece in list_pieces(shapes, form, 4):
            block = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            counts[piece.name][block] += 1
            used[piece.foreign_name] = used.get(piece.foreign_name, 0) + torch.Size(piece.shape).numel()
            assert used[piece.foreign_name] <= torch.Size(piece.foreign_shape).numel()
        assert all(bool((count == 1).all()) for count in counts.values())
    with pytest.raises(ModelError, match="no place for"):
        list_pieces({"layers.0.ffn.shared.w_up.weight": (4, 4)}, mixtral.fused, 4)
