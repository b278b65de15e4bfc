import importlib
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from common.aliases import ALIASES
from common.errors import ConfigError, located
from common.strict import from_dict, leaf_keys, suggested_key, to_dict, unknown_key
from common.text import nearest
from training.config import Config
from training.generation.config import GenerateConfig
from training.parity.config import ParityConfig


@dataclass(frozen=True)
class Inner:
    width: int
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    flag: Literal["auto"] | bool = "auto"
    limit: int | None = None
    paths: tuple[str, ...] = ()
    share: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: expected\nan integer >= 1")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str = "x"

    def __post_init__(self) -> None:
        if self.name == self.inner.kind:
            raise ValueError(f"name={self.name}: expected another name than inner.kind={self.inner.kind}")


def test_values_arrive_unchanged_and_to_dict_inverts() -> None:
    raw = {"inner": {"width": 3, "rate": 2, "flag": True, "limit": 7, "paths": ["p", "q"], "share": {"c": 1}}}
    config = from_dict(Outer, raw)
    assert config == Outer(Inner(3, 2.0, "a", True, 7, ("p", "q"), {"c": 1.0}), "x")
    assert type(config.inner.rate) is float and config.inner.flag is True
    assert from_dict(Outer, to_dict(config)) == config
    assert to_dict(config)["inner"]["paths"] == ["p", "q"]


def test_yaml_1_1_reads_1e_minus_3_as_a_string() -> None:
    assert from_dict(Inner, {"width": 1, "rate": "1e-3"}).rate == 0.001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widht": 3}, "inner.widht=3: unknown key; the nearest valid key is inner.width"),
        ({"width": "eight"}, "inner.width=eight: expected an integer"),
        ({"width": True}, "inner.width=true: expected an integer"),
        ({"width": 1.0}, "inner.width=1.0: expected an integer"),
        ({"width": None}, "inner.width=null: expected an integer"),
        ({"width": "???"}, "inner.width=???: expected an integer, and no value was given"),
        ({"width": 0}, "inner.width=0: expected an integer >= 1"),
        ({"limit": "eight"}, "inner.limit=eight: expected an integer or null"),
        ({"rate": "fast"}, "inner.rate=fast: expected a number"),
        ({"rate": float("nan")}, "inner.rate=nan: expected a number"),
        ({"rate": False}, "inner.rate=false: expected a number"),
        ({"kind": "c"}, "inner.kind=c: expected one of a, b"),
        ({"kind": ""}, "inner.kind='': expected one of a, b"),
        ({"flag": 1}, "inner.flag=1: expected one of auto, true, false"),
        ({"paths": ["p", 3]}, "inner.paths=[p,3]: expected a list, each item a string"),
        ({"paths": "p"}, "inner.paths=p: expected a list, each item a string"),
    ],
)
def test_bad_value_is_one_line_with_key_value_and_expectation(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, {"inner": {"width": 1} | changes})
    assert str(caught.value) == message


def test_section_errors() -> None:
    with pytest.raises(ConfigError, match=r"^inner=3: expected a section of keys$"):
        from_dict(Outer, {"inner": 3})
    with pytest.raises(ConfigError, match=r"^inner=\?\?\?: expected a section of keys, and no value was given$"):
        from_dict(Outer, {})
    with pytest.raises(ConfigError, match=r"^iner: unknown key; the nearest valid key is inner$"):
        from_dict(Outer, {"iner": {"width": 1}})
    with pytest.raises(ConfigError, match=r"^name=a: expected another name than inner.kind=a$"):
        from_dict(Outer, {"inner": {"width": 1}, "name": "a"})


def test_located_puts_the_section_before_the_field() -> None:
    assert str(located(ValueError("expert=3: expected 4"), "parallel")) == "parallel.expert=3: expected 4"


def test_nearest_looks_at_the_last_part_too() -> None:
    assert "inner.limit" in list(leaf_keys(Outer))
    assert nearest("model.lr", ["model.dim", "optim.lr"]) == "optim.lr"
    assert nearest("warmup", ["optim.warmup_steps", "optim.lr"]) == "optim.warmup_steps"
    assert nearest("relu", ["glam", "switch", "expert_choice"]) is None and nearest("x", []) is None


def test_words_of_other_programs_are_known_and_nonsense_is_not() -> None:
    keys = [*leaf_keys(Config), "max_tokens"]
    meant = {
        "train.batch_size": "train.global_batch", "lr": "optim.lr", "train.lr": "optim.lr", "epochs": "train.steps",
        "max_steps": "train.steps", "wd": "optim.weight_decay", "tp": "parallel.tensor",
        "parallel.pp": "parallel.pipeline",
        "ep": "parallel.expert", "cp": "parallel.context", "tensor-model-parallel-size": "parallel.tensor",
        "model.hidden_size": "model.dim", "num_experts_per_tok": "model.top_k",
        "moe_aux_loss_coef": "router.balance_coef",
        "grad_clip": "optim.max_grad_norm", "bf16": "train.precision", "output_dir": "run.root", "seed": "run.seed",
        "resume": "run.resume", "save_every": "checkpoint.every", "max_seq_len": "train.seq_len", "optimizer": "optim",
        "max_new_tokens": "max_tokens", "trian.steps": "train.steps", "modle": "model",
        "model.name": "model", "train.model": "model", "optimizer.name": "optim.kind", "model.eps": "model.norm_eps",
        "parallel.data": "parallel.replicate", "data.revision": "data.hub_revision", "wandb.mode": "tracking.wandb",
        "checkpoint.interval": "checkpoint.every",
        "xyzzy": None, "train.ema": None,
    }  # fmt: skip
    assert {word: suggested_key(word, keys) for word in meant} == meant
    assert str(unknown_key("train.ema", 1, keys)) == "train.ema=1: unknown key"


def test_every_alias_means_a_key_of_some_command() -> None:
    tools = [importlib.import_module(f"scripts.{tool}") for tool in ("describe", "export_hf", "import_hf", "upcycle")]
    tool_classes = [getattr(tool, name) for tool in tools for name in dir(tool) if name.endswith("Config")]
    keys = {key for cls in (Config, GenerateConfig, ParityConfig, *tool_classes) for key in leaf_keys(cls)}
    sections = {key.partition(".")[0] for key in keys}
    assert {key for meant in ALIASES.values() for key in meant} <= keys | sections
    # An alias that is itself the last part of a key of train.py would never be looked up there.
    assert not {key.rpartition(".")[2] for key in leaf_keys(Config)} & {
        word for word, meant in ALIASES.items() if set(meant) & set(leaf_keys(Config))
    }
