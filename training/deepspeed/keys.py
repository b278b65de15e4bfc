"""The keys of a DeepSpeed configuration file, by who decides their values. docs/deepspeed.md describes them.

Every key of DeepSpeed's is in one of the tables below, or in `training.deepspeed.settings`. Any other key is an error.
"""

from typing import Any, Literal

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


def has_kind(value: Any, kind: Kind) -> bool:
    """Return whether `value`, as parsed from JSON, is of this kind. The number 5e8 is an integer."""
    if kind == "switch":
        return isinstance(value, bool)
    if kind == "section":
        return isinstance(value, dict)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        return False
    return {"count": value >= 0, "positive": value >= 1, "even": value >= 2 and value % 2 == 0}[kind]


def is_off(key: str, value: Any) -> bool:
    """Return whether `value` switches off the key, which is one of `MUST_BE_OFF`, in any way that DeepSpeed accepts."""
    if not isinstance(value, dict):
        return value is None or value is False
    return value.get("device") == "none" if key.startswith(ZERO) else value.get("enabled", False) is False
