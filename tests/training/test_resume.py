"""What a resumed run keeps, may change and must not change, and the schedule of the learning rate that it continues."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from common.errors import CheckpointError, ConfigError, UserError
from common.strict import from_dict, leaf_keys, to_dict
from data.config import DataConfig
from moe.config import AdapterConfig, ModelConfig, RopeScaling, RouterConfig
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.startup.launch import World
from parallel.startup.preflight import flatten
from scripts.cli.workers import check_before_start
from training.agree import check_base
from training.checkpoint import checkpoint
from training.config import (
    CheckpointConfig,
    Config,
    LaunchConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from training.initial import FREE_MODEL_KEYS
from training.resume import (
    CONTENT,
    FIXED,
    FREE,
    LISTED,
    RULE_OF,
    by_key,
    changed_keys,
    recorded_values,
    resolve_schedule,
    resumable_state,
    rule_of,
    saved_values,
    schedule_lines,
)
from training.schedule import learning_rate

MODEL = ModelConfig(
    dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=8, num_experts=4, top_k=2, vocab_size=9,
    sliding_window=(4, None),
)  # fmt: skip
CPU: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


def config_of(**optim: Any) -> Config:
    """A run of 20 steps; `steps` overrides the number."""
    steps = optim.pop("steps", 20)
    return Config(
        run=RunConfig("exp"),
        model=replace(MODEL, vocab_size=None),
        router=RouterConfig(),
        data=DataConfig(kind="files", paths=("a.txt",)),
        train=TrainConfig(steps=steps, seq_len=8, global_batch=4),
        optim=OptimConfig(**{"lr": 1.0, "min_lr_ratio": 0.1, "warmup_steps": 0} | optim),
        parallel=ParallelConfig(),
        checkpoint=CheckpointConfig(),
        tracking=TrackingConfig(),
        launch=LaunchConfig(),
    )


def record(config: Config, done: int = 0, saved: dict[str, Any] | None = None) -> dict[str, Any]:
    resolved = replace(config, optim=resolve_schedule(config, saved or {}, done))
    return recorded_values(resolved, replace(config.model, vocab_size=9), Layout(), CPU)


def changed(config: Config, saved: dict[str, Any], done: int = 20, same_tokens: bool = True) -> list[str]:
    return changed_keys(record(config, done, saved), saved, config.router, "c/step-20", same_tokens=same_tokens)


def with_value(config: Config, key: str, value: Any) -> Config:
    section, _, name = key.partition(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def test_every_key_has_exactly_one_rule() -> None:
    # A section that can be null has one rule for all of its keys.
    sections = {f"{key}.": key for key in RULE_OF}
    keys = {next((sections[start] for start in sections if key.startswith(start)), key) for key in leaf_keys(Config)}
    assert sorted(RULE_OF) == sorted(keys)
    assert {key for key, rule in RULE_OF.items() if key.startswith("router.") and rule == FIXED} == {
        f"router.{key}" for key in RouterConfig.MEANING
    }
    assert [key for key in FREE_MODEL_KEYS if RULE_OF[f"model.{key}"] != FREE] == []


def test_another_scaling_of_the_frequencies_is_refused() -> None:
    """Also if only one of the two has a scaling, and if the checkpoint's version did not have the key."""
    plain, linear, other = (
        with_value(config_of(), "model.rope_scaling", scaling)
        for scaling in (None, RopeScaling("linear", 2.0), RopeScaling("linear", 4.0))
    )
    old_model = {key: value for key, value in to_dict(MODEL).items() if key not in ("rope_scaling", "rotary_dim")}
    loader = {"seed": 0, "seq_len": 8}
    state = {"model": old_model, "router": to_dict(RouterConfig()), "loader": loader, "config": {"model": old_model}}
    old = saved_values(state, Path("runs/x"), "c")
    for before, after in ((by_key(record(plain)), linear), (by_key(record(linear)), other), (old, linear)):
        with pytest.raises(CheckpointError, match=r"^model.rope_scaling=\{kind:linear,.*: expected "):
            changed(after, before)
    with pytest.raises(CheckpointError, match=r"^model.rope_scaling=null: expected {kind:linear,factor:2.0,"):
        changed(plain, by_key(record(linear)))
    assert changed(linear, by_key(record(linear))) == [] and changed(plain, old) == []


def test_the_keys_of_a_plugin_have_rules() -> None:
    class Mine(RouterConfig):
        MEANING = (*RouterConfig.MEANING, "floor")

    rules = [rule_of(key, Mine()) for key in ("router.floor", "router.other_coef", "data.poet")]
    assert rules == [FIXED, LISTED, CONTENT]


OTHER = {
    "run.seed": 1, "run.init_from": "x", "run.deterministic": True, "run.prompt": "Once", "model.rope_theta": 2.0,
    "model.init_std": 0.1, "router.scale": 2.0, "router.jitter": 0.1, "data.paths": ("b.txt",),
    "data.cross_documents": True, "data.cache": "x", "train.seq_len": 4, "train.global_batch": 8, "train.steps": 21,
    "train.log_every": 1, "optim.train": ("router",), "optim.lr": 0.5, "optim.schedule": "wsd",
    "optim.schedule_steps": 40, "parallel.recompute": "full", "parallel.timeout_s": 1.0, "checkpoint.every": 3,
    "tracking.wandb": "disabled", "launch.threads": 2,
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_a_changed_key_is_refused_listed_or_taken(key: str) -> None:
    config = config_of()
    saved = flatten(record(config))
    assert changed(config, saved) == []
    other = with_value(config, key, OTHER[key])
    if RULE_OF[key] == FIXED:
        with pytest.raises(CheckpointError) as refused:
            changed(other, saved)
        line = str(refused.value)
        assert line.startswith(f"{key}=") and line.endswith("as in the checkpoint c/step-20, or another run.name")
    else:
        changes = changed(other, saved)
        assert [line.partition(":")[0] for line in changes] == ([key] if RULE_OF[key] == LISTED else [])


def test_what_a_change_says() -> None:
    saved = flatten(record(config_of()))
    changes = changed(config_of(lr=0.5, max_grad_norm=None, steps=40), saved)
    assert changes == ["train.steps: 20 -> 40", "optim.lr: 1.0 -> 0.5", "optim.max_grad_norm: 1.0 -> null"]


def test_other_tokens_are_refused_by_the_key_of_data_that_changed() -> None:
    config = config_of()
    saved = flatten(record(config))
    with pytest.raises(UserError, match=r"^data.heldout_fraction=0.5: expected 0.02 as in the checkpoint"):
        changed(with_value(config, "data.heldout_fraction", 0.5), saved, same_tokens=False)
    with pytest.raises(UserError, match=r"^data: expected the text of the checkpoint c/step-20, or another run.name"):
        changed(config, saved, same_tokens=False)


def test_equal_values_in_other_words_are_no_change() -> None:
    saved = flatten(record(with_value(config_of(), "optim.train", ("router", "expert:3"))))
    same = with_value(config_of(), "optim.train", ("expert:3", "router"))
    same = replace(with_value(same, "router.normalize", True), train=replace(same.train, device="cpu"))
    assert changed(with_value(same, "parallel.replicate", 1), saved) == []


def test_a_run_that_names_its_initial_weights_can_leave_them_out() -> None:
    saved = flatten(record(with_value(config_of(), "run.init_from", "runs/a")))
    assert changed(config_of(), saved) == []
    assert changed(with_value(config_of(), "run.init_from", "./runs/a"), saved) == []


def state_of(**entries: Any) -> dict[str, Any]:
    model, router = to_dict(MODEL), to_dict(RouterConfig())
    loader = {"seed": 0, "seq_len": 8, "corpus": "k", "rows": 80}
    return {"step": 20, "model": model, "router": router, "loader": loader} | entries


def test_a_checkpoint_that_records_no_configuration_is_read_with_the_runs_config_file(tmp_path) -> None:
    config = config_of(steps=20)
    state = state_of(train="all", optimizer="sgd")
    assert "train.steps" not in saved_values(state, tmp_path, "c/step-20")
    old = to_dict(replace(config, model=MODEL))
    for key in ("schedule_steps", "schedule_start", "kind", "train"):  # keys that version 0.1.0 did not have
        del old["optim"][key]
    old["data"]["removed"] = 1  # and one that this version does not have
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    saved = saved_values(state, tmp_path, "c/step-20")
    assert saved["train.steps"] == 20 and saved["optim.kind"] == "sgd"
    assert changed(config, saved | {"optim.kind": "adamw"}) == []
    assert resolve_schedule(config_of(steps=40), saved, 20).schedule_steps == 20
    with pytest.raises(CheckpointError, match=r"^optim.kind=adamw: expected sgd as in the checkpoint"):
        changed(config_of(steps=40), saved)
    (tmp_path / "config.yaml").write_text("train: {steps: [")
    saved = saved_values(state, tmp_path, "c/step-20")
    optim = resolve_schedule(config_of(steps=40), saved, 20)
    assert optim.schedule_steps == 40
    (line,) = schedule_lines(optim, 40, saved, 20)
    assert line.startswith("the checkpoint does not record the length of its schedule; 40 steps are assumed")
    (tmp_path / "config.yaml").write_text("train: " + "[" * 20_000)
    assert saved_values(state, tmp_path, "c/step-20") == saved


def test_a_dense_model_has_no_keys_of_a_router() -> None:
    dense = replace(MODEL, num_experts=None, top_k=None)
    saved = saved_values(state_of(model=to_dict(dense), config=record(config_of())), None, "c")  # type: ignore[arg-type]
    assert saved["model.dim"] == 8 and not [key for key in saved if key.startswith("router.")]


def test_a_state_that_cannot_be_continued(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkpoints"
    saved = str(checkpoint.save(root, 3, {"w": torch.ones(2)}, {"step": 3, "plugins": {"mine.py": ""}}, keep=2))
    with pytest.raises(CheckpointError, match=r"step-3: it was written with plugins=\[mine.py\]: name them again"):
        resumable_state(saved, 3)
    state = {"step": 4, "updates": 4, "loader": {"rows": 8, "corpus": "x", "seed": 0, "seq_len": 8}}
    saved = str(checkpoint.save(root, 4, {"w": torch.ones(2)}, state, keep=2))
    assert resumable_state(saved, 4)["step"] == 4
    with pytest.raises(CheckpointError, match=r"^train\.steps=3: expected at least 4, the step of the checkpoint"):
        resumable_state(saved, 3)
    with pytest.raises(CheckpointError, match=r"^c: expected the state of a run \('model'\)"):
        saved_values({"step": 4}, tmp_path, "c")


def test_a_longer_run_keeps_its_schedule_and_then_the_last_rate() -> None:
    saved = flatten(record(config_of()))
    optim = resolve_schedule(config_of(steps=40), saved, 20)
    assert (optim.schedule_steps, optim.schedule_start) == (20, 0)
    # By hand: the cosine from 1 to 0.1 over 20 steps is 0.55 in the middle between the steps with index 9 and 10.
    assert learning_rate(9, 40, optim) + learning_rate(10, 40, optim) == pytest.approx(2 * 0.55)
    assert [learning_rate(step, 40, optim) for step in (19, 20, 39)] == [pytest.approx(0.1)] * 3
    assert schedule_lines(optim, 40, saved, 20) == [
        "the schedule ends at step 20; steps 21 to 40 train with the constant rate 1.00e-01"
    ]


def test_a_stretched_schedule_says_how_the_rate_jumps() -> None:
    saved = flatten(record(config_of(schedule="wsd", decay_steps=10)))
    longer = config_of(schedule="wsd", decay_steps=10, steps=40, schedule_steps=40)
    optim = resolve_schedule(longer, saved, 20)
    assert [learning_rate(step, 40, optim) for step in (20, 29, 34, 39)] == pytest.approx([1.0, 1.0, 0.55, 0.1])
    assert schedule_lines(optim, 40, saved, 20) == [
        "the learning rate goes from 1.00e-01 at step 20 to 1.00e+00 at step 21 (the schedule of the checkpoint: "
        "1.00e-01)"
    ]
    # Before the decay has begun, the rate is the same under both lengths, so nothing is said.
    assert schedule_lines(resolve_schedule(longer, saved, 9), 40, saved, 9) == []


def test_a_new_schedule_warms_up_again_and_is_kept() -> None:
    saved = flatten(record(config_of()))
    again = config_of(steps=31, schedule_start=20, warmup_steps=2)
    optim = resolve_schedule(again, saved, 20)
    assert (optim.schedule_steps, optim.schedule_start) == (11, 20)
    rates = [learning_rate(step, 31, optim) for step in range(20, 31)]
    # Two steps of warm-up, then a cosine over the indices 2 to 10, which is in its middle at index 6.
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.55) and rates[10] == pytest.approx(0.1)
    assert schedule_lines(optim, 31, saved, 20)[0].startswith("the learning rate goes from 1.00e-01 at step 20 to 5.00")
    saved = flatten(record(again, 20, saved))
    assert resolve_schedule(config_of(steps=31, warmup_steps=2), saved, 25) == optim
    assert resolve_schedule(replace(again, train=replace(again.train, steps=60)), saved, 31) == optim


def test_schedules_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"^optim.schedule_start=3: expected at most 0, the steps that the run has"):
        resolve_schedule(config_of(schedule_start=3), {}, 0)
    with pytest.raises(ConfigError, match=r"^optim.warmup_steps=6: expected at most optim.schedule_steps=5$"):
        config_of(schedule_steps=5, warmup_steps=6)
    saved = flatten(record(config_of()))
    with pytest.raises(ConfigError, match=r"^optim.warmup_steps=30: expected at most 20, the steps of the schedule$"):
        resolve_schedule(config_of(steps=40, warmup_steps=30), saved, 20)
    with pytest.raises(ConfigError, match=r"^optim.schedule_start=20: expected less than train.steps=20"):
        resolve_schedule(config_of(schedule_start=20), saved, 20)
    for key, value in (("schedule_steps", 0), ("schedule_start", -1)):
        with pytest.raises(ConfigError, match=rf"^optim.{key}={value}: expected an integer >= "):
            from_dict(OptimConfig, {"lr": 1.0, key: value}, "optim")


LORA = AdapterConfig(kind="lora", rank=4)


def test_the_base_of_adapters_can_be_moved_and_what_the_adapters_mean_stays() -> None:
    tuned = with_value(replace(config_of(), adapter=LORA), "run.init_from", "runs/base")
    saved = by_key(record(tuned))
    assert changed(with_value(tuned, "run.init_from", "moved/base"), saved) == []
    assert changed(with_value(tuned, "adapter.dropout", 0.1), saved) == ["adapter.dropout: 0.0 -> 0.1"]
    for key, value in (("rank", 8), ("alpha", 1.0), ("targets", ("router",)), ("scaling", "rslora"), ("dora", True)):
        with pytest.raises(CheckpointError, match=rf"^adapter.{key}="):
            changed(with_value(tuned, f"adapter.{key}", value), saved)
    with pytest.raises(CheckpointError, match=r"^adapter.kind=null: expected lora"):
        changed(with_value(config_of(), "run.init_from", "runs/base"), saved)


def test_the_weights_of_the_base_must_be_those_of_the_checkpoint() -> None:
    base = {"path": "/models/base", "fingerprint": "0123456789abcdef"}
    check_base(base, {"base": base | {"path": "elsewhere"}}, "c/step-20", "runs/base")
    with pytest.raises(CheckpointError, match=r"^run.init_from=runs/base: expected the weights that the adapters in"):
        check_base(base, {"base": base | {"fingerprint": "f" * 16}}, "c/step-20", "runs/base")
    for state in ({}, {"base": None}, {"base": {"path": "x"}}):
        with pytest.raises(CheckpointError, match=r"^c/step-20: expected the state of a run with adapters"):
            check_base(base, state, "c/step-20", "runs/base")


def test_adapters_need_a_model_to_be_added_to() -> None:
    with pytest.raises(ConfigError, match=r"^run.init_from=null: expected the model directory that the adapters are"):
        check_before_start(replace(config_of(), adapter=LORA), World())
