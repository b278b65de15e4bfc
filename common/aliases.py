"""What other programs call the keys of this project: Megatron-LM, torchtitan, DeepSpeed, Hugging Face and nanoGPT.

An unknown key whose last part is one of these words is answered with the key that means it
(`common.strict.unknown_key`). A word with a dot is compared with the whole key.
"""

_WORDS = {
    "train.global_batch": "batch_size global_batch_size micro_batch_size train_batch_size local_batch_size bs gbs mbs "
    "per_device_train_batch_size per_device_batch_size total_batch_size train_micro_batch_size_per_gpu batch",
    "train.accumulation": "gradient_accumulation_steps gradient_accumulation grad_accumulation grad_accum accum "
    "accumulation_steps accumulate_grad_batches num_microbatches micro_batches microbatches",
    "train.steps": "max_steps epochs epoch num_epochs num_train_epochs max_epochs train_iters iters iterations "
    "max_iters num_steps n_steps train_steps training_steps total_steps num_train_steps num_iterations train_samples",
    "train.seq_len": "seq_length max_seq_len max_seq_length sequence_length seqlen seq context_length "
    "max_length max_position_embeddings model_max_length ctx_len n_ctx context_size cutoff_len",
    "train.precision": "bf16 fp16 fp32 fp64 dtype torch_dtype mixed_precision mixed_precision_param amp autocast half "
    "bfloat16 param_dtype",
    "train.device": "gpu cuda cpu use_cpu no_cuda accelerator",
    "train.log_every": "log_interval logging_steps log_freq log_every_n_steps log_steps print_every log",
    "train.eval_every": "eval_interval eval_steps eval_freq val_check_interval val_interval val_every validation_freq "
    "evaluation_strategy eval_strategy eval",
    "train.peak_tflops": "peak_flops",
    "optim.lr": "learning_rate max_lr base_lr peak_lr",
    "optim.weight_decay": "wd decay",
    "optim.max_grad_norm": "grad_clip clip_grad gradient_clipping gradient_clip_val max_norm clip clip_grad_norm "
    "grad_norm_clip",
    "optim.beta1": "adam_beta1 betas beta",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_epsilon epsilon adam_eps",
    "optim.schedule": "scheduler.name scheduler.type lr_scheduler.name lr_scheduler.type "
    "lr_scheduler_type lr_scheduler lr_decay_style scheduler lr_schedule decay_type",
    "optim.warmup_steps": "warmup warmup_ratio warmup_iters warmup_fraction num_warmup_steps lr_warmup_iters "
    "lr_warmup_steps lr_warmup_fraction",
    "optim.decay_steps": "lr_decay_iters lr_decay_steps lr_wsd_decay_iters decay_ratio",
    "optim.min_lr_ratio": "min_lr lr_min min_lr_factor final_lr",
    "optim.train": "trainable freeze frozen trainable_parameters unfrozen_parameters",
    "optim.kind": "optimizer.name optimizer.type optim.name optim.type",
    "optim": "optimizer optimiser",
    "parallel.tensor": "parallel.model tp tp_size tensor_parallel tensor_parallel_size tensor_parallel_degree "
    "tensor_model_parallel_size",
    "parallel.pipeline": "pp pp_size pipeline_parallel pipeline_parallel_size pipeline_parallel_degree "
    "pipeline_model_parallel_size",
    "parallel.expert": "ep ep_size expert_parallel expert_parallel_size expert_parallel_degree "
    "expert_model_parallel_size",
    "parallel.context": "cp cp_size context_parallel context_parallel_size context_parallel_degree sp "
    "sequence_parallel sequence_parallel_size ulysses_sequence_parallel_size",
    "parallel.replicate": "parallel.data dp dp_size ddp data_parallel data_parallel_size "
    "data_parallel_replicate_degree dp_replicate",
    "parallel.shard": "fsdp fully_shard data_parallel_shard_degree dp_shard sharding_strategy",
    "parallel.expert_tensor": "etp expert_tensor_parallel_size expert_tensor_parallel_degree",
    "parallel.schedule": "pp_schedule pipeline_schedule pipeline_parallel_schedule",
    "parallel.recompute": "gradient_checkpointing activation_checkpointing activation_checkpoint "
    "recompute_granularity checkpoint_activations",
    "parallel.offload": "cpu_offload offload_optimizer optimizer_cpu_offload",
    "parallel.overlap": "overlap_moe_expert_parallel_comm",
    "parallel.timeout_s": "timeout ddp_timeout nccl_timeout distributed_timeout_minutes",
    "model.dim": "hidden_size d_model n_embd embed_dim emb_dim embedding_dim model_dim",
    "model.num_layers": "num_hidden_layers n_layers n_layer layers depth",
    "model.num_heads": "num_attention_heads n_heads n_head heads",
    "model.num_kv_heads": "num_key_value_heads n_kv_heads kv_heads num_query_groups",
    "model.head_dim": "kv_channels d_head head_size",
    "model.hidden_dim": "intermediate_size ffn_hidden_size ffn_dim d_ff mlp_dim",
    "model.ffn": "hidden_act activation act_fn activation_function hidden_activation",
    "model.qk_norm": "qk_layernorm use_qk_norm use_qk_layernorm",
    "model.attention_bias": "qkv_bias add_qkv_bias use_qkv_bias",
    "model.num_experts": "n_experts num_local_experts n_routed_experts num_moe_experts moe_num_experts experts",
    "model.top_k": "num_experts_per_tok num_experts_per_token experts_per_token moe_router_topk router_topk "
    "moe_top_k moe_topk topk k",
    "model.expert_hidden_dim": "moe_intermediate_size moe_ffn_hidden_size moe_hidden_dim expert_dim",
    "model.num_shared_experts": "n_shared_experts shared_experts",
    "model.shared_hidden_dim": "shared_expert_intermediate_size moe_shared_expert_intermediate_size",
    "model.shared_gate": "moe_shared_expert_gate shared_expert_gate",
    "model.first_k_dense": "first_k_dense_replace n_dense_layers",
    "model.moe_every": "moe_layer_freq moe_layer_frequency decoder_sparse_step",
    "model.kv_lora_rank": "multi_latent_attention",
    "model.qk_nope_head_dim": "qk_head_dim",
    "model.qk_rope_head_dim": "qk_pos_emb_head_dim",
    "model.sliding_window": "window_size attention_window window",
    "model.rope_theta": "rotary_base rope_base",
    "model.rotary_dim": "partial_rotary_factor rotary_percent rotary_pct rope_dim",
    "model.rope_scaling.kind": "rope_type",
    "model.rope_scaling.original_positions": "original_max_position_embeddings",
    "model.norm_eps": "model.eps rms_norm_eps layer_norm_eps layernorm_epsilon norm_epsilon",
    "model.tie_embeddings": "tie_word_embeddings tied_embeddings untie_embeddings_and_output_weights",
    "model.init_std": "initializer_range init_method_std",
    "model.expert_kernel": "grouped_gemm moe_grouped_gemm use_grouped_mm",
    "model.vocab_size": "padded_vocab_size make_vocab_size_divisible_by",
    "router.balance_coef": "moe_aux_loss_coef moe_aux_loss_coeff "
    "router_aux_loss_coef aux_loss_coef aux_loss_alpha aux_loss_weight "
    "aux_loss load_balancing_loss_coef load_balance_loss_weight balance_loss",
    "router.z_coef": "moe_z_loss_coef router_z_loss_coef z_loss_coef z_loss_weight z_loss",
    "router.capacity_factor": "moe_expert_capacity_factor expert_capacity_factor expert_capacity capacity",
    "router.jitter": "moe_input_jitter_eps router_jitter_noise jitter_noise noise noise_std",
    "router.bias_update_rate": "moe_router_bias_update_rate load_balance_coeff bias_update_speed",
    "router.scale": "routed_scaling_factor moe_router_topk_scaling_factor route_scale",
    "router.normalize": "norm_topk_prob route_norm",
    "router.num_groups": "n_group moe_router_num_groups num_expert_groups",
    "router.topk_groups": "topk_group moe_router_group_topk num_limited_groups",
    "router.kind": "router.name router.type router_type scoring_func score_func moe_router_score_function gate_type",
    "router.drop_policy": "moe_token_drop_policy token_drop_policy",
    "router.balance_scope": "moe_router_load_balancing_type",
    "data.paths": "data_path dataset_path dataset_dir data_dir train_data train_data_path train_file train_files files "
    "path",
    "data.hub_path": "dataset_name hf_dataset",
    "data.hub_name": "data.subset",
    "data.hub_split": "data.split",
    "data": "data.name data.type dataset",
    "model": "model.name model.type model.flavor model.preset",
    "data.tokenizer": "tokenizer_model tokenizer_path tokenizer_name tokenizer_name_or_path",
    "data.cache": "cache_dir data_cache_path",
    "data.heldout_fraction": "val_fraction val_split validation_split valid_fraction eval_split test_size split",
    "data.max_documents": "max_samples max_train_samples num_samples limit",
    "data.text_key": "text_column dataset_text_field text_field json_keys",
    "data.cross_documents": "reset_attention_mask reset_position_ids packing",
    "checkpoint.every": "checkpoint.interval checkpoint.steps "
    "save_every save_interval save_steps save_freq save_strategy checkpoint_interval "
    "checkpoint_every ckpt_every ckpt_interval",
    "checkpoint.keep": "save_total_limit keep_last keep_last_n keep_latest_k",
    "run.root": "checkpoint.folder checkpoint.dir checkpoint.path "
    "output_dir out_dir save_dir checkpoint_dir ckpt_dir log_dir logdir work_dir outdir output save "
    "dump_folder default_root_dir",
    "run.name": "run_name exp_name experiment_name job_name wandb_name",
    "run.seed": "random_seed data_seed",
    "run.resume": "resume_from_checkpoint resume_from resume_training auto_resume continue",
    "run.init_from": "load load_checkpoint load_dir initial_load_path pretrained pretrained_model from_pretrained "
    "pretrained_checkpoint model_name_or_path model_path base_model init_weights ckpt_path finetune",
    "run.deterministic": "determinism deterministic_mode",
    "run.prompt": "sample_prompt",
    "tracking.wandb": "wandb.mode tracking.mode use_wandb wandb_mode report_to enable_wandb logger",
    "tracking.project": "wandb_project project_name",
    "tracking.entity": "wandb_entity wandb_team",
    "tracking.group": "wandb_group",
    "tracking.tags": "wandb_tags",
    "tracking.notes": "wandb_notes",
    "tracking.tensorboard": "use_tensorboard tensorboard_dir tensorboard_log_dir enable_tensorboard",
    "launch.nproc": "nproc_per_node num_processes nprocs world_size gpus n_gpus ngpus num_gpus devices workers",
    "launch.threads": "omp_num_threads num_threads",
    "launch.max_restarts": "restarts",
    "engine.kind": "engine.name engine.type",
    "engine": "deepspeed backend",
    "engine.zero_stage": "zero zero_optimization stage",
    "engine.ds_config": "deepspeed_config",
    "plugins": "plugin import custom_import",
    # Keys of the tools.
    "checkpoint": "model model_path model_name_or_path ckpt ckpt_path ckpt_dir load",
    "source": "model model_path model_name_or_path input input_dir path checkpoint load",
    "out": "output output_dir out_dir save_dir save target dest",
    "max_tokens": "max_new_tokens max_length max_gen_len num_tokens n_tokens length",
    "temperature": "temp",
    "stop": "stop_string stop_strings stop_sequence eos",
    "prompt": "text input",
    "batch": "batch_size bs rows",
    "context": "seq_len seq_length max_seq_len context_length sequence_length",
    "dtype": "precision torch_dtype bf16 fp16",
    "precision": "dtype torch_dtype bf16 fp16",
    "shard_size": "max_shard_size",
    "max_positions": "max_position_embeddings max_length",
    "steps": "max_steps iters",
    "format": "output_format",
    "num_experts": "n_experts num_local_experts experts",
    "top_k": "topk num_experts_per_tok k",
}
"""Key or section -> the words for it, separated by spaces."""

ALIASES: dict[str, list[str]] = {}
"""A word of another program -> the keys that can mean it. A command has at most a few of them."""
for _key, _words in _WORDS.items():
    for _word in _words.split():
        ALIASES.setdefault(_word, []).append(_key)
