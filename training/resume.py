"""What a resumed run keeps, may change, and must not change: a rule for every key of the configuration.

A checkpoint records the configuration that it was written with, and the values that `auto` and null stood for. A run
that continues from it is compared with this record, key by key.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, ConfigError, DataError, expect, require
from common.files import read_file
from common.plugins import missing_plugins
from common.strict import from_dict, to_dict
from common.text import MAX_YAML, parse_yaml, printable, shorten, show_value, to_json
from moe.config import ModelConfig, RouterConfig
from parallel.layout import Layout
from parallel.startup.preflight import flatten
from training.checkpoint.manifest import read_state
from training.compilation import choose_compilation
from training.config import Config, OptimConfig
from training.device import DTYPE_NAMES, Process
from training.initial import FREE_MODEL_KEYS
from training.run import CONFIG_FILE
from training.schedule import learning_rate
from training.trainable import patterns

FIXED = "fixed"
"""The value must be that of the checkpoint: the weights, the optimizer state or the order of the data depend on it."""
LISTED = "listed"
"""The value may change. A change is printed, because it changes what the run computes."""
CONTENT = "content"
"""The value may change if the tokens stay the same, e.g. because the files were moved. A hash of the tokens decides."""
FREE = "free"
"""The value may change, and is not printed: it does not change what the remaining steps compute."""

RULES: dict[str, dict[str, str]] = {
    "run": {
        FIXED: "seed init_from",
        LISTED: "deterministic",
        FREE: "experiment name root resume prompt sample_tokens",
    },
    "model": {
        FIXED: "dim num_layers num_heads num_kv_heads head_dim hidden_dim ffn qk_norm attention_bias num_experts top_k "
        "expert_hidden_dim expert_ffn num_shared_experts shared_hidden_dim shared_gate first_k_dense moe_every "
        "vocab_size kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim sliding_window "
        "rope_theta rotary_dim rope_scaling norm_eps tie_embeddings",
        FREE: " ".join(FREE_MODEL_KEYS),
    },
    "router": {
        FIXED: " ".join(RouterConfig.MEANING),
        LISTED: "jitter capacity_factor drop_policy allow_noncausal balance_coef balance_scope z_coef layer_reduction "
        "bias_update_rate",
    },
    "adapter": {FIXED: "kind rank alpha targets scaling dora", LISTED: "dropout"},
    "data": {
        CONTENT: "kind vocab_size tokenizer heldout_fraction heldout_max_bytes code_bytes prose_bytes "
        "arithmetic_bytes paths format on_error text_key domain_key hub_path hub_name hub_split hub_revision "
        "max_documents messages_key ignore_keys",
        LISTED: "cross_documents",
        FREE: "cache",
    },
    "train": {
        FIXED: "seq_len",
        LISTED: "steps global_batch accumulation precision device compile",
        FREE: "log_every eval_every peak_tflops profile",
    },
    "optim": {
        FIXED: "kind train",
        LISTED: "lr beta1 beta2 eps weight_decay max_grad_norm schedule schedule_steps schedule_start warmup_steps "
        "decay_steps min_lr_ratio",
    },
    "parallel": {
        LISTED: "expert tensor pipeline context shard replicate expert_tensor schedule stage_layers recompute offload "
        "overlap",
        FREE: "start_timeout_s timeout_s",
    },
    "checkpoint": {FREE: "every keep at_end io_timeout_s background keep_every keep_best on_error remote"},
    "health": {LISTED: "on_nan on_spike spike_z dead_steps max_vio logit_range entropy", FREE: "every recheck_every"},
    "telemetry": {FREE: "every probe_tokens forecast"},
    "tracking": {FREE: "wandb project entity group job_type tags notes diff tensorboard csv per_expert trackers"},
    "quantize": {FIXED: "kind block_size double_quant targets"},
    "launch": {FREE: "nproc max_restarts threads"},
    "engine": {LISTED: "kind zero_stage ds_config"},
    "": {FREE: "plugins"},  # Their names and hashes are compared (common/plugins.py).
}
"""Section -> rule -> keys. A key whose value can be a section of keys is compared as a whole. The keys that plugins add
have a rule too: see `rule_of`."""
RULE_OF = {
    f"{section}.{key}" if section else key: rule
    for section, rules in RULES.items()
    for rule, keys in rules.items()
    for key in keys.split()
}


def by_key(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration by dotted keys, as `RULE_OF` has them."""
    return flatten(config, RULE_OF)


def rule_of(key: str, router: RouterConfig) -> str:
    """Return the rule of a configuration key, e.g. `optim.lr`.

    A key that a plugin adds to `router` is fixed if it is in the `MEANING` of the plugin's configuration, and listed
    otherwise. A key that a plugin adds to `data` is compared by content.
    """
    section, _, name = key.partition(".")
    added = CONTENT if section == "data" else FIXED if name in type(router).MEANING else LISTED
    return RULE_OF.get(key, added)


def recorded_values(config: Config, model: ModelConfig, layout: Layout, process: Process) -> dict[str, Any]:
    """Return the configuration as a checkpoint records it: plain containers, with the values that `auto` stood for.

    Args:
        config: with the schedule that `resolve_schedule` returned.
        model: `config.model` with its vocabulary.
        process: its device and data type replace `auto`.
    """
    values = to_dict(replace(config, model=model))
    compiled = choose_compilation(config, layout, process.device).on
    axes = {key: getattr(layout, key) for key in values["parallel"] if hasattr(layout, key)}
    return values | {
        "parallel": values["parallel"] | axes,
        "train": values["train"]
        | {"device": process.device.type, "precision": DTYPE_NAMES[process.dtype], "compile": compiled},
        "router": values["router"] | {"normalize": config.router.normalizes(model.top_k or 1)},
    }


def saved_values(state: Mapping[str, Any], directory: Path, checkpoint: str) -> dict[str, Any]:
    """Return the configuration that the checkpoint was written with, by dotted keys.

    A checkpoint of version 0.1.0 does not record all of it. What it lacks is read from the run's `config.yaml`, which
    the last launch wrote; keys that this file lacks, too, are left out.

    Args:
        state: the checkpoint's state.
        directory: the run's directory.

    Raises:
        CheckpointError: the state is not that of a run.
    """
    try:
        model = from_dict(ModelConfig, state["model"], "model")
        router = from_dict(RouterConfig, state["router"], "router") if model.is_moe else None
        loader = {"run.seed": state["loader"]["seed"], "train.seq_len": state["loader"]["seq_len"]}
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{checkpoint}: expected the state of a run ({error})") from error
    optimizer = {"optim.train": state.get("train", "all"), "optim.kind": state.get("optimizer", "adamw")}
    recorded = by_key(state["config"]) if "config" in state else by_key(_read_config(directory)) | optimizer | loader
    meaning = by_key({"model": to_dict(model)} | ({} if router is None else {"router": to_dict(router)}))
    # The router of a dense model has no effect.
    values = {key: value for key, value in recorded.items() if router is not None or not key.startswith("router.")}
    values |= meaning
    if router is not None:
        values["router.normalize"] = router.normalizes(model.top_k or 1)
    if "train.steps" in values and not values.get("optim.schedule_steps"):
        # In version 0.1.0 a schedule had the length of the run.
        values |= {"optim.schedule_steps": values["train.steps"], "optim.schedule_start": 0}
    return values


def _read_config(directory: Path) -> dict[str, Any]:
    """The valid `config.yaml` of a run, without keys that this version does not have; empty if there is none."""
    try:
        values = parse_yaml(read_file(directory / CONFIG_FILE, MAX_YAML))
        known = {
            section: {key: value for key, value in keys.items() if f"{section}.{key}" in RULE_OF}
            for section, keys in values.items()
            if section in RULES
        }
        return to_dict(from_dict(Config, known))
    except (OSError, ValueError, AttributeError):
        return {}


def resumable_state(path: str, steps: int) -> dict[str, Any]:
    """Return the state in the checkpoint `path`, which a run of `steps` steps can continue with the loaded plugins.

    Raises:
        CheckpointError: the checkpoint needs a plugin that is not loaded, or is of a later step than the run's last.
    """
    state = read_state(Path(path))
    plugins = state.get("plugins", {})
    require(_is_table(plugins), CheckpointError, f"{path}: expected the state of a run ('plugins')")
    missing = missing_plugins(plugins)
    require(not missing, CheckpointError, f"{path}: {shorten(printable(missing), 400)}")
    loader, health = state.get("loader", {}), state.get("health", {})
    for holds, keys in (
        (_is_count(state.get("step")), "step"),
        (_is_count(state.get("updates")), "updates"),
        (isinstance(loader, dict), "loader"),
        (isinstance(state.get("config", {}), dict), "config"),
        (isinstance(health, dict), "health"),
    ):
        require(holds, CheckpointError, f"{path}: expected the state of a run ('{keys}')")
    routers = health.get("routers", {})
    skipped, losses = loader.get("skipped", []), health.get("losses", [])
    for holds, keys in (
        (all(_is_count(loader.get(name)) for name in ("rows", "seed", "seq_len")), "loader"),
        (isinstance(loader.get("corpus"), str), "loader.corpus"),
        (isinstance(skipped, list) and all(map(_is_range, skipped)), "loader.skipped"),
        (isinstance(losses, list) and all(type(loss) in (int, float) for loss in losses), "health.losses"),
        (isinstance(routers, dict), "health.routers"),
    ):
        require(holds, CheckpointError, f"{path}: expected the state of a run ('{keys}')")
    require(
        state["step"] <= steps,
        CheckpointError,
        f"train.steps={steps}: expected at least {state['step']}, the step of the checkpoint {path}",
    )
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def changed_keys(
    recorded: Mapping[str, Any], saved: Mapping[str, Any], router: RouterConfig, checkpoint: str, *, same_tokens: bool
) -> list[str]:
    """Compare a run with the checkpoint that it continues from.

    Args:
        recorded: what `recorded_values` returned.
        saved: what `saved_values` returned. Keys that it lacks are not compared.
        same_tokens: whether the training tokens are those of the checkpoint.

    Returns:
        `<key>: <old value> -> <new value>` for every change that is to be printed.

    Raises:
        CheckpointError: a key has changed that must not change.
        DataError: the tokens have changed. The message names the first key of `data` that has changed, if one has.
    """
    changes = []
    values = by_key(recorded)
    rules = {key: rule_of(key, router) for key in values}
    # `data` comes first, because other tokens can change `model.vocab_size`, too.
    for key, value in sorted(values.items(), key=lambda item: rules[item[0]] != CONTENT):
        rule = rules[key]
        before = saved.get(key, value)
        if key == "run.init_from" and recorded["adapter"]["kind"] is not None:
            continue  # The weights decide, which can have been moved (training/agree.py:check_base).
        if rule == FREE or before == "auto" or _same(key, value, before) or (rule == CONTENT and same_tokens):
            continue
        if rule == LISTED:
            changes.append(f"{key}: {show_value(before)} -> {show_value(value)}")
            continue
        raise (DataError if rule == CONTENT else CheckpointError)(
            f"{key}={show_value(value)}: expected {show_value(before)} as in the checkpoint {checkpoint}, or another "
            "run.name"
        )
    require(same_tokens, DataError, f"data: expected the text of the checkpoint {checkpoint}, or another run.name")
    return changes


def _same(key: str, value: Any, before: Any) -> bool:
    if key == "run.init_from":  # A resumed run does not read it again.
        return value is None or (before is not None and os.path.abspath(value) == os.path.abspath(before))
    if key == "optim.train":
        return patterns(value) == patterns(before)
    return to_json(value) == to_json(before)


def resolve_schedule(config: Config, saved: Mapping[str, Any], done: int) -> OptimConfig:
    """Return the section `optim` with the length and the start of the schedule.

    A resumed run keeps the schedule of its checkpoint. `optim.schedule_steps` gives this schedule another length.
    Another `optim.schedule_start` begins a new one.

    Args:
        saved: what `saved_values` returned; empty for a new run.
        done: the optimizer steps that the run has done.

    Raises:
        ConfigError: the schedule begins after `done` or ends before it begins, or its warm-up is longer than itself.
    """
    optim, steps = config.optim, config.train.steps
    kept_start = saved.get("optim.schedule_start") or 0
    start = kept_start if optim.schedule_start is None else optim.schedule_start
    expect(start <= done, "optim.schedule_start", start, f"at most {done}, the steps that the run has done")
    kept = saved.get("optim.schedule_steps")
    length = optim.schedule_steps or (kept if kept is not None and start == kept_start else steps - start)
    expect(length >= 1, "optim.schedule_start", start, f"less than train.steps={steps}, or optim.schedule_steps")
    expect(
        (optim.warmup_steps or 0) <= length,
        "optim.warmup_steps",
        optim.warmup_steps,
        f"at most {length}, the steps of the schedule",
    )
    return replace(optim, schedule_steps=length, schedule_start=start)


def schedule_lines(optim: OptimConfig, steps: int, saved: Mapping[str, Any], done: int) -> list[str]:
    """Return what a run says at its start about its learning rate, if there is something that a user may not expect.

    Args:
        optim: with the schedule that `resolve_schedule` returned.
        steps: `train.steps`.
        saved, done: as in `resolve_schedule`.
    """
    lines, end = [], (optim.schedule_start or 0) + (optim.schedule_steps or steps)
    if done and "train.steps" not in saved:
        lines.append(
            f"the checkpoint does not record the length of its schedule; {optim.schedule_steps} steps are assumed "
            "(optim.schedule_steps)"
        )
    if 0 < done < steps and "optim.lr" in saved:
        names = [key for key in saved if key.startswith("optim.")]
        before = from_dict(OptimConfig, {key.removeprefix("optim."): saved[key] for key in names}, "optim")
        length = saved.get("train.steps", steps)
        expected, now = learning_rate(done, length, before), learning_rate(done, steps, optim)
        if now != expected:
            last = learning_rate(done - 1, length, before)
            lines.append(
                f"the learning rate goes from {last:.2e} at step {done} to {now:.2e} at step {done + 1} (the schedule "
                f"of the checkpoint: {expected:.2e})"
            )
    if max(end, done) < steps:
        lines.append(
            f"the schedule ends at step {end}; steps {max(end, done) + 1} to {steps} train with the constant rate "
            f"{learning_rate(steps - 1, steps, optim):.2e}"
        )
    return lines
