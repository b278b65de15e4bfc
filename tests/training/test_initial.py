"""run.init_from: what the directory determines, what the user can still choose, and which choices contradict it."""

import json
import re

import pytest

from common.errors import ConfigError, ModelError
from common.strict import to_dict
from moe.config import ModelConfig, RouterConfig
from tests.foreign import save_reference
from training.config import RunConfig
from training.initial import start_from

PRESET = to_dict(ModelConfig(dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=12, init_std=0.5))


def raw(directory, **router):
    return {
        "run": {"init_from": str(directory)},
        "model": dict(PRESET),
        "router": to_dict(RouterConfig(capacity_factor=1.25, jitter=0.1)) | router,
        "data": {"tokenizer": "mine.model"},
    }


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixtral")
    save_reference("mixtral-window", directory)
    return directory


def test_the_model_and_the_meaning_of_its_router_come_from_the_directory(mixtral):
    given = raw(mixtral, kind="sigmoid_topk", scale=3.0)
    result = start_from(given, ["model.init_std=0.5", "model.expert_kernel=auto", "router.capacity_factor=1.25"])
    model = result["model"]
    assert (model["dim"], model["num_experts"], model["top_k"], model["sliding_window"]) == (24, 5, 3, 4)
    assert model["init_std"] == 0.5
    router = result["router"]
    assert (router["kind"], router["normalize"], router["scale"]) == ("softmax_topk", True, 1.0)
    assert (router["capacity_factor"], router["jitter"]) == (1.25, 0.1)
    assert result["data"]["tokenizer"] == "mine.model"
    assert given == raw(mixtral, kind="sigmoid_topk", scale=3.0)


def test_without_a_directory_nothing_changes(tmp_path):
    for value in (None, 3):  # 3: the strict conversion says what is wrong with it
        given = raw(tmp_path)
        given["run"]["init_from"] = value
        assert start_from(given, ["model.dim=8"]) is given


@pytest.mark.parametrize(
    ("typed", "model", "router", "message"),
    [
        ("model.dim=8", {}, {}, "model.dim=8: expected 24, as in run.init_from="),
        ("+model.dim=8", {}, {}, "model.dim=8: expected 24"),
        ("model=small", {}, {}, "model.dim=8: expected 24"),
        ("model.sliding_window=null", {}, {}, "model.sliding_window=null: expected 4"),
        (
            "model.sliding_window=[1,null]",
            {"sliding_window": [1, None]},
            {},
            "model.sliding_window=[1,null]: expected 4",
        ),
        ("model.rope_theta=many", {"rope_theta": "many"}, {}, "model.rope_theta=many: expected 1000000.0"),
        (
            "+model.rope_scaling.factor=2",
            {"rope_scaling": {"factor": 2}},
            {},
            "model.rope_scaling={factor:2}: expected null",
        ),
        ("router.kind=sigmoid_topk", {}, {"kind": "sigmoid_topk"}, "router.kind=sigmoid_topk: expected softmax_topk"),
        ("router=switch", {}, {"normalize": False}, "router.normalize=false: expected true"),
    ],
)
def test_a_choice_that_contradicts_is_named(typed, model, router, message, mixtral):
    given = raw(mixtral, **router)
    given["model"] |= model
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        start_from(given, [typed])


def test_choices_that_agree_are_accepted(mixtral):
    given = raw(mixtral, normalize="auto")
    given["model"] |= {"dim": 24, "rope_theta": "1e6", "norm_eps": 1e-5, "vocab_size": None}
    typed = [
        "model.dim=24",
        "model.rope_theta=1e6",
        "model.norm_eps=1e-5",
        "model.vocab_size=null",
        "router.normalize=auto",
    ]
    assert start_from(given, typed)["model"]["vocab_size"] == 53


def test_a_dense_directory_leaves_the_router_alone(tmp_path):
    save_reference("llama-mha", tmp_path)
    given = raw(tmp_path, kind="sigmoid_topk")
    result = start_from(given, ["router.kind=sigmoid_topk"])
    assert result["router"] == given["router"] and result["model"]["num_experts"] is None


def test_the_tokenizer_is_the_directorys_unless_one_is_given(mixtral, tmp_path):
    given = raw(mixtral)
    given["data"]["tokenizer"] = None
    with pytest.raises(ConfigError, match=r"^data.tokenizer=null: expected a tokenizer, since run.init_from="):
        start_from(given, [])
    save_reference("mixtral", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    given["run"]["init_from"] = str(tmp_path)
    assert start_from(given, [])["data"]["tokenizer"] == str(tmp_path)


def test_a_directory_that_is_no_model_is_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"^run.init_from=[^:]*: expected a run"):
        start_from(raw(tmp_path), [])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="found neither"):
        start_from(raw(tmp_path), [])
    with pytest.raises(ValueError, match="init_from='': expected a directory, or null"):
        RunConfig(experiment="x", init_from="")
