"""What the DeepSpeed engine supports, and the configuration that DeepSpeed gets. This module does not import torch.

The user's JSON file (`engine.ds_config`) decides how DeepSpeed communicates and what it prints. The run's configuration
decides everything else. Each key of the file is therefore passed on, must agree with the run's configuration, or is an
error that names it. No key is ignored.
"""

from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from common.errors import ConfigError, expect, require
from common.files import read_file
from common.text import MAX_JSON, nearest, parse_json_object, shorten, to_json
from parallel.config import ParallelConfig
from training.config import EngineConfig, OptimConfig, TrainConfig

ZERO = "zero_optimization."
"""Prefix of the keys in the section `zero_optimization`."""

FIXED_VALUES: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (False, "Mixwright counts the micro-batches"),
    ZERO + "reduce_scatter": (True, "experts need it"),
    ZERO + "contiguous_gradients": (True, "experts need it"),
    ZERO + "compute_grad_norm": (True, "every step logs it"),
    ZERO + "memory_efficient_linear": (False, "it would replace torch.nn.functional.linear everywhere"),
    ZERO + "zero_hpz_partition_size": (1, "experts have no second partition"),
    ZERO + "mics_shard_size": (-1, "experts have their own partition"),
    "gradient_allreduce_op": ("mean", "the loss is scaled for it"),
    "prescale_gradients": (False, "the loss is already scaled"),
    "gradient_predivide_factor": (1.0, "the loss is already scaled"),
    "communication_data_type": ("fp32", "gradients are fp32"),
    "sequence_parallel_size": (1, "data and expert parallelism only"),
}
"""Key -> the only accepted value, and the reason. `deepspeed_settings` adds the keys whose value depends on the run."""

_CAST = "train.precision decides; weights are fp32 and are cast where they are used"
_NOT_TRIED = "it was not tried with experts"
_CHECKPOINTS = "checkpoints are Mixwright's, with one format for all engines"
_MODEL = "the model is Mixwright's"
MUST_BE_OFF = {
    "fp16": _CAST,
    "bf16": _CAST,
    "bfloat16": _CAST,
    "amp": _CAST,
    "torch_autocast": _CAST,
    "sparse_gradients": "experts need reduce_scatter",
    "disable_allgather": "every rank needs the updated weights",
    "tensorboard": "section tracking",
    "wandb": "section tracking",
    "csv_monitor": "section tracking",
    "comet": "section tracking",
    "flops_profiler": _NOT_TRIED,
    "autotuning": "it starts other runs",
    "elasticity": "it changes the batch",
    "hybrid_engine": "generation is Mixwright's",
    "data_efficiency": "section data",
    "curriculum_learning": "section data",
    "progressive_layer_drop": _MODEL,
    "eigenvalue": _MODEL,
    ZERO + "offload_optimizer": _NOT_TRIED,
    ZERO + "offload_param": _NOT_TRIED,
    ZERO + "cpu_offload": _NOT_TRIED,
    ZERO + "cpu_offload_param": _NOT_TRIED,
    ZERO + "zenflow": "its updates are delayed",
    ZERO + "round_robin_gradients": _NOT_TRIED,
    ZERO + "parameter_alignment": _NOT_TRIED,
    ZERO + "elastic_checkpoint": _CHECKPOINTS,
    ZERO + "stage3_gather_16bit_weights_on_model_save": _CHECKPOINTS,
    ZERO + "stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
    ZERO + "pipeline_loading_checkpoint": _CHECKPOINTS,
    ZERO + "legacy_stage1": "DeepSpeed removed it",
    ZERO + "zero_quantized_weights": "it rounds weights when they are gathered",
    ZERO + "zero_quantized_nontrainable_weights": "it rounds weights",
    ZERO + "zero_quantized_gradients": "it rounds gradients when they are reduced",
}
"""Key -> the reason why it must be switched off or left out."""

_AXES = "data and expert parallelism only"
MUST_BE_ABSENT = {
    "optimizer": "section optim: AdamW",
    "scheduler": "section optim: schedule, warmup_steps, decay_steps, min_lr_ratio",
    "checkpoint": _CHECKPOINTS,
    "load_universal_checkpoint": _CHECKPOINTS,
    ZERO + "load_from_fp32_weights": _CHECKPOINTS,
    "data_types": "weights, gradients and moments are fp32",
    "dataloader_drop_last": "section data",
    "pipeline": _AXES,
    "tensor_parallel": _AXES,
    "data_parallel_size": "the number of ranks divided by parallel.expert",
    "use_data_before_expert_parallelism": "parallel.expert decides",
    "expert_parallel": "parallel.expert decides; the experts are Mixwright's",
    "moe": "section model and parallel.expert; the experts are Mixwright's",
    "activation_checkpointing": _MODEL,
    "compression_training": _MODEL,
    "sparse_attention": _MODEL,
    "weight_quantization": _MODEL,
    "compile": "the hooks of ZeRO were not tried under a compiler",
    "zero_force_ds_cpu_optimizer": "there is no offload",
    ZERO + "leaf_module": "no module of the model needs it",
    ZERO + "override_module_apply": _MODEL,
}
"""Key -> what decides instead: the key must be left out."""

Kind = Literal["switch", "section", "count", "positive", "even"]

USER_KEYS: dict[str, Kind] = {
    "steps_per_print": "positive",
    "wall_clock_breakdown": "switch",
    "memory_breakdown": "switch",
    "dump_state": "switch",
    "zero_allow_untested_optimizer": "switch",
    "comms_logger": "section",
    "timers": "section",
    "aio": "section",
    "zero_optimization": "section",
    ZERO + "allgather_partitions": "switch",
    ZERO + "overlap_comm": "switch",
    ZERO + "use_multi_rank_bucket_allreduce": "switch",
    ZERO + "ignore_unused_parameters": "switch",
    ZERO + "log_trace_cache_warnings": "switch",
    ZERO + "enable_sanity_checks": "switch",
    ZERO + "stage3_use_all_reduce_for_fetch_params": "switch",
    ZERO + "stage3_allgather_sequential": "switch",
    ZERO + "allgather_bucket_size": "even",
    ZERO + "reduce_bucket_size": "positive",
    ZERO + "sub_group_size": "positive",
    ZERO + "stage3_prefetch_bucket_size": "count",
    ZERO + "stage3_param_persistence_threshold": "count",
    ZERO + "stage3_model_persistence_threshold": "count",
    ZERO + "stage3_max_live_parameters": "count",
    ZERO + "stage3_max_reuse_distance": "count",
    ZERO + "stage3_module_granularity_threshold": "count",
}
"""Key -> the kind of its value. The user decides these keys. They change how DeepSpeed communicates and what it prints,
and no result."""

EXPECTED: dict[Kind, str] = {
    "switch": "true or false",
    "section": "a section of keys",
    "count": "an integer >= 0",
    "positive": "an integer >= 1",
    "even": "an even integer >= 2",
}
"""Kind of value -> its description in messages."""

DIAGNOSTICS = ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger")
"""The keys that make DeepSpeed print during training."""
VERSION = "0.19.8"
"""The one release of deepspeed whose internals training/deepspeed/engine.py relies on."""
NATIVE_AXES = ("tensor", "pipeline", "context", "shard", "expert_tensor")
"""Keys of `parallel` that only the native engine supports."""


def has_kind(value: Any, kind: Kind) -> bool:
    """Return whether `value`, as parsed from JSON, is of this kind. The number 5e8 is an integer."""
    if kind == "switch":
        return isinstance(value, bool)
    if kind == "section":
        return isinstance(value, dict)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:  # also NaN and infinity
        return False
    return {"count": value >= 0, "positive": value >= 1, "even": value >= 2 and value % 2 == 0}[kind]


def is_off(key: str, value: Any) -> bool:
    """Return whether `value` switches off the key, which is one of `MUST_BE_OFF`, in any way that DeepSpeed accepts."""
    if not isinstance(value, dict):
        return value is None or value is False
    return value.get("device") == "none" if key.startswith(ZERO) else value.get("enabled", False) is False


def check_engine(engine: EngineConfig, parallel: ParallelConfig, train: TrainConfig) -> None:
    """Check that the engine supports the layout and the precision of the run.

    Raises:
        ValueError: it does not. The message starts with the whole key.
    """
    if engine.kind == "native":
        return
    for axis in NATIVE_AXES:
        size = getattr(parallel, axis, 1)
        expected = "1 with engine=deepspeed (data and expert parallelism only)"
        expect(size in (1, "auto"), f"parallel.{axis}", size, expected)
    expect(not parallel.offload, "parallel.offload", True, "false with engine=deepspeed")
    expect(
        train.precision != "fp64",
        "train.precision",
        train.precision,
        "auto, bf16 or fp32 with engine=deepspeed (its master weights and its reduction are fp32)",
    )


def check_choice(single_experts: Collection[str], train: str) -> None:
    """Check that no parameter trains in part.

    A single expert is a slice of a stacked parameter, and DeepSpeed updates whole parameters. Setting the gradients of
    the other slices to zero would not help, because AdamW's weight decay changes them, too.

    Args:
        single_experts: names of the stacked parameters that train in part (`training.trainable.Choice.experts`).
        train: `optim.train`, as the user writes it.

    Raises:
        ConfigError: there are such parameters.
    """
    if single_experts:
        raise ConfigError(
            f"optim.train={train}: expected whole parameters with engine=deepspeed, which cannot update a slice of one "
            f"(single experts are slices of {min(single_experts)}); engine=native trains single experts"
        )


def deepspeed_settings(engine: EngineConfig, train: TrainConfig, optim: OptimConfig, world_size: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`: the user's file, checked, and the run's settings.

    Call it before a process group exists, so that an error is one line from one process.

    Raises:
        ConfigError: deepspeed is not installed or has another version, or `engine.ds_config` cannot be read or has a
            key or value that is not accepted.
    """
    _check_version()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": max(1, train.global_batch // train.accumulation // world_size),
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.max_grad_norm or 0.0,  # A missing key would mean 1.
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            # If true, DeepSpeed replaces torch.nn.functional.linear in the whole process.
            "memory_efficient_linear": False,
        },
    }
    if engine.ds_config is None:
        return settings
    fixed_values = {
        **FIXED_VALUES,
        "train_batch_size": (train.global_batch, "train.global_batch"),
        "gradient_accumulation_steps": (train.accumulation, "train.accumulation"),
        "train_micro_batch_size_per_gpu": (
            settings["train_micro_batch_size_per_gpu"],
            f"train.global_batch / train.accumulation / {world_size} ranks",
        ),
        "gradient_clipping": (settings["gradient_clipping"], "optim.max_grad_norm"),
        "zero_optimization.stage": (engine.zero_stage, "engine.zero_stage"),
    }
    if engine.zero_stage == 1:
        fixed_values["zero_optimization.overlap_comm"] = (False, "at stage 1, gradients are reduced once, at the end")
    passed: dict[str, Any] = {}
    for key, value in _flatten(_read(engine.ds_config)):
        expected = _find_expected(key, value, fixed_values)
        if expected is not None:
            raise ConfigError(
                f"engine.ds_config={engine.ds_config}: {key}={shorten(to_json(value), 60)}: expected {expected}"
            )
        if key in USER_KEYS:
            passed[key] = int(value) if isinstance(value, float) else value  # Bucket sizes are often written as 5e8.
    zero = {key.removeprefix(ZERO): value for key, value in passed.items() if key.startswith(ZERO)}
    plain = {key: value for key, value in passed.items() if not key.startswith(ZERO)}
    return {**plain, **settings, "zero_optimization": {**zero, **settings["zero_optimization"]}}


def prints_diagnostics(settings: dict[str, Any]) -> bool:
    """Return whether the settings make DeepSpeed print during training."""
    return any(settings.get(key) for key in DIAGNOSTICS)


def _check_version() -> None:
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        raise ConfigError(
            "engine.kind=deepspeed: expected deepspeed to be installed (pip install -e '.[deepspeed]')"
        ) from None
    require(
        installed == VERSION,
        ConfigError,
        f"engine.kind=deepspeed: expected deepspeed {VERSION}, on whose internals expert parallelism relies, found "
        f"{installed} (pip install -e '.[deepspeed]')",
    )


def _read(path: str) -> dict[str, Any]:
    try:
        return parse_json_object(read_file(Path(path), MAX_JSON))
    except OSError as error:
        raise ConfigError(f"engine.ds_config={path}: expected a JSON file ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"engine.ds_config={path}: {error}") from None


def _find_expected(key: str, value: Any, fixed_values: dict[str, tuple[Any, str]]) -> str | None:
    """Return a description of what is expected in place of `value`, or None if `value` is accepted."""
    if key in fixed_values:
        expected, reason = fixed_values[key]
        # In Python, True == 1. Here 1 equals 1.0, and true equals neither.
        same = isinstance(value, bool) == isinstance(expected, bool) and value == expected
        return None if same or value == "auto" else f"{to_json(expected)} ({reason})"
    if key in MUST_BE_OFF:
        return None if is_off(key, value) else f"it to be off or left out ({MUST_BE_OFF[key]})"
    if key in MUST_BE_ABSENT:
        return f"it to be left out ({MUST_BE_ABSENT[key]})"
    if key in USER_KEYS:
        return None if has_kind(value, USER_KEYS[key]) else EXPECTED[USER_KEYS[key]]
    known = [*fixed_values, *MUST_BE_OFF, *MUST_BE_ABSENT, *USER_KEYS]
    near = nearest(key, known)
    return f"a key of docs/deepspeed.md{f'; the nearest is {near}' if near else ''}"


def _flatten(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the top-level keys with their values, and each key of `zero_optimization` on its own."""
    for key, value in config.items():
        if key == "zero_optimization" and isinstance(value, dict):
            yield from ((ZERO + name, inner) for name, inner in value.items())
        else:
            yield key, value
