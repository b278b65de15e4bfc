"""The keys of a DeepSpeed configuration file, by who decides them: docs/deepspeed.md in code."""

from typing import Any, Literal

ZERO = "zero_optimization."

AGREED: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (False, "Mixwright counts the micro-batches"),
    ZERO + "reduce_scatter": (True, "experts need it"),
    ZERO + "contiguous_gradients": (True, "experts need it"),
    ZERO + "compute_grad_norm": (True, "every step logs it"),
    ZERO + "memory_efficient_linear": (False, "it would replace torch.nn.functional.linear everywhere"),
    ZERO + "zero_hpz_partition_size": (1, "experts have no second partition"),
    ZERO + "mics_shard_size": (-1, "experts have their own partition"),
    "gradient_allreduce_op": ("mean", "the loss is scaled for it"),
    "prescale_gradients": (False, "the loss is scaled already"),
    "gradient_predivide_factor": (1.0, "the loss is scaled already"),
    "communication_data_type": ("fp32", "gradients are fp32"),
    "sequence_parallel_size": (1, "data and expert parallelism only"),
}
"""Key -> the value it has anyway, and why. (Those that the run's configuration decides: `deepspeed_settings`.)"""

_CAST = "train.precision decides; weights are fp32 and are cast where they are used"
_TRIED = "it was not tried with experts"
_SAVED = "checkpoints are Mixwright's, of one format for all engines"
_MODEL = "the model is Mixwright's"
OFF = {
    "fp16": _CAST,
    "bf16": _CAST,
    "bfloat16": _CAST,
    "amp": _CAST,
    "torch_autocast": _CAST,
    "sparse_gradients": "experts need reduce_scatter",
    "disable_allgather": "updated weights have to arrive",
    "tensorboard": "section tracking",
    "wandb": "section tracking",
    "csv_monitor": "section tracking",
    "comet": "section tracking",
    "flops_profiler": _TRIED,
    "autotuning": "it starts runs of its own",
    "elasticity": "it changes the batch",
    "hybrid_engine": "generation is Mixwright's",
    "data_efficiency": "section data",
    "curriculum_learning": "section data",
    "progressive_layer_drop": _MODEL,
    "eigenvalue": _MODEL,
    ZERO + "offload_optimizer": _TRIED,
    ZERO + "offload_param": _TRIED,
    ZERO + "cpu_offload": _TRIED,
    ZERO + "cpu_offload_param": _TRIED,
    ZERO + "zenflow": "its updates are delayed",
    ZERO + "round_robin_gradients": _TRIED,
    ZERO + "parameter_alignment": _TRIED,
    ZERO + "elastic_checkpoint": _SAVED,
    ZERO + "stage3_gather_16bit_weights_on_model_save": _SAVED,
    ZERO + "stage3_gather_fp16_weights_on_model_save": _SAVED,
    ZERO + "pipeline_loading_checkpoint": _SAVED,
    ZERO + "legacy_stage1": "DeepSpeed has dropped it",
    ZERO + "zero_quantized_weights": "it rounds weights on their way",
    ZERO + "zero_quantized_nontrainable_weights": "it rounds weights",
    ZERO + "zero_quantized_gradients": "it rounds gradients on their way",
}
"""Key -> why it may not be on."""

_AXES = "data and expert parallelism only"
OTHERS = {
    "optimizer": "section optim: AdamW",
    "scheduler": "section optim: schedule, warmup_steps, decay_steps, min_lr_ratio",
    "checkpoint": _SAVED,
    "load_universal_checkpoint": _SAVED,
    ZERO + "load_from_fp32_weights": _SAVED,
    "data_types": "weights, gradients and moments are fp32",
    "dataloader_drop_last": "section data",
    "pipeline": _AXES,
    "tensor_parallel": _AXES,
    "data_parallel_size": "what parallel.expert leaves of the world",
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
"""Key -> who decides it: it must not be there."""

Kind = Literal["switch", "section", "count", "positive", "even"]

PASSED: dict[str, Kind] = {
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
"""Key -> kind of value: how DeepSpeed communicates and what it prints, which changes no number."""

SHOWN: dict[Kind, str] = {
    "switch": "true or false",
    "section": "a section of keys",
    "count": "an integer >= 0",
    "positive": "an integer >= 1",
    "even": "an even integer >= 2",
}

DIAGNOSTICS = ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger")
"""What makes DeepSpeed print as it runs."""


def fits(value: Any, kind: Kind) -> bool:
    """Whether `value`, as JSON gives it, is of that kind; 5e8 is an integer."""
    if kind == "switch":
        return isinstance(value, bool)
    if kind == "section":
        return isinstance(value, dict)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        return False
    return {"count": value >= 0, "positive": value >= 1, "even": value >= 2 and value % 2 == 0}[kind]


def is_off(key: str, value: Any) -> bool:
    """Whether `value` switches the key of `OFF` off, in any of the ways DeepSpeed has for it."""
    if not isinstance(value, dict):
        return value is None or value is False
    if key.startswith(ZERO):
        return value.get("device") == "none"
    return value.get("enabled", False) is False
