"""Names in Hugging Face's files: the keys of `config.json`, and the tensors of Llama, Mistral and Mixtral."""

from collections.abc import Iterable
from typing import Any

from training.formats.mapping import Format

_READ = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
hidden_act rms_norm_eps tie_word_embeddings sliding_window rope_theta rope_parameters num_local_experts
num_experts_per_tok
"""
_IGNORED = """
architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path _attn_implementation
_attn_implementation_autoset attn_implementation auto_map use_cache cache_implementation initializer_range
max_position_embeddings pretraining_tp bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id
decoder_start_token_id unk_token_id output_router_logits router_aux_loss_coef router_jitter_noise attention_dropout
output_attentions output_hidden_states return_dict return_dict_in_generate torchscript use_bfloat16
chunk_size_feed_forward is_decoder id2label label2id problem_type task_specific_params tokenizer_class prefix
finetuning_task pruned_heads tie_encoder_decoder cross_attention_hidden_size max_length min_length do_sample
early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
begin_suppress_tokens tf_legacy_loss _experts_implementation experts_implementation
"""
READ_KEYS = frozenset(_READ.split())
"""Keys that `training.formats.huggingface.read_config` reads."""
IGNORED_KEYS = frozenset(_IGNORED.split())
"""Keys that do not change what a forward pass without dropout computes."""
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "layer_types": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
"""Keys that can change what is computed -> the values with which they do not."""

_BLOCK = {
    "embedding": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "layers.N.attention_norm.weight": "model.layers.{n}.input_layernorm.weight",
    "layers.N.attention.wq.weight": "model.layers.{n}.self_attn.q_proj.weight",
    "layers.N.attention.wk.weight": "model.layers.{n}.self_attn.k_proj.weight",
    "layers.N.attention.wv.weight": "model.layers.{n}.self_attn.v_proj.weight",
    "layers.N.attention.wo.weight": "model.layers.{n}.self_attn.o_proj.weight",
    "layers.N.ffn_norm.weight": "model.layers.{n}.post_attention_layernorm.weight",
    "layers.N.ffn.w_gate.weight": "model.layers.{n}.mlp.gate_proj.weight",
    "layers.N.ffn.w_up.weight": "model.layers.{n}.mlp.up_proj.weight",
    "layers.N.ffn.w_down.weight": "model.layers.{n}.mlp.down_proj.weight",
}
_COMMON = {"ignored": r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)", "tied_head": "lm_head.weight"}
PER_EXPERT = Format(
    _BLOCK
    | {
        "layers.N.ffn.router.weight": "model.layers.{n}.block_sparse_moe.gate.weight",
        "layers.N.ffn.experts.w_gate": "model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight",
        "layers.N.ffn.experts.w_down": "model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight",
        "layers.N.ffn.experts.w_up": "model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight",
    },
    **_COMMON,  # type: ignore[arg-type]
)
"""One tensor per expert: the names in files since Mixtral's release. Export writes these names, because other readers,
such as vLLM, expect them."""
FUSED = Format(
    _BLOCK
    | {
        "layers.N.ffn.router.weight": "model.layers.{n}.mlp.gate.weight",
        "layers.N.ffn.experts.w_gate": "model.layers.{n}.mlp.experts.gate_up_proj",
        "layers.N.ffn.experts.w_up": "model.layers.{n}.mlp.experts.gate_up_proj",
        "layers.N.ffn.experts.w_down": "model.layers.{n}.mlp.experts.down_proj",
    },
    parts={"layers.N.ffn.experts.w_gate": (0, 2), "layers.N.ffn.experts.w_up": (1, 2)},
    **_COMMON,  # type: ignore[arg-type]
)
"""Experts stacked, with the gate's rows before the up projection's: the names in transformers 5's modules. Some files
have them too."""


def detect_format(names: Iterable[str]) -> Format:
    """Return the format, `FUSED` or `PER_EXPERT`, that a file with these tensor names has."""
    return FUSED if any(name.endswith(".mlp.experts.gate_up_proj") for name in names) else PER_EXPERT
