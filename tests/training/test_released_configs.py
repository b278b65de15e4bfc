"""`config.json` as models are released: each is read as the preset of the model, and written with the same meaning."""

import json

import pytest

from moe.accounting.flops import count_parameters, meta_model
from tests.test_conf import composed
from training.formats import huggingface as hf
from training.formats.meaning import meaning

COMMON = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False,
          "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True}  # fmt: skip
QWEN = COMMON | {"bos_token_id": 151643, "eos_token_id": 151645, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
                 "use_sliding_window": False, "vocab_size": 151936}  # fmt: skip
DEEPSEEK = COMMON | {"attention_bias": False, "bos_token_id": 100000, "eos_token_id": 100001, "rms_norm_eps": 1e-6,
                     "rope_theta": 10000, "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True,
                     "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"}}  # fmt: skip
YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
RELEASED = {
    "olmoe_1b_7b": COMMON | {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False, "clip_qkv": None,
        "eos_token_id": 50279, "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
        "vocab_size": 50304,
    },
    "qwen2_moe_a2_7b": QWEN | {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 2048,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "num_attention_heads": 16,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "sliding_window": 32768, "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4,
        "num_experts": 60, "norm_topk_prob": False, "output_router_logits": False, "router_aux_loss_coef": 0.001,
    },
    "qwen2_57b_a14b": QWEN | {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "sliding_window": 65536,
        "decoder_sparse_step": 1, "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480,
        "num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False, "mlp_only_layers": [],
    },
    "qwen3_moe_30b": QWEN | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rope_scaling": None, "sliding_window": None,
    },
    "deepseek_moe_16b": DEEPSEEK | {
        "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 10944, "max_position_embeddings": 4096,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28, "num_key_value_heads": 16,
        "pretraining_tp": 1, "rope_scaling": None, "scoring_func": "softmax", "vocab_size": 102400,
    },
    "deepseek_v2_lite": DEEPSEEK | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy",
        "v_head_dim": 128, "vocab_size": 102400,
    },
    "deepseek_v3": DEEPSEEK | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                "weight_block_size": [128, 128]},
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc",
        "v_head_dim": 128, "vocab_size": 129280,
    },
    "mixtral_8x7b": COMMON | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "vocab_size": 32000,
    },
}  # fmt: skip
"""Preset of `conf/model` -> the keys and values of the released file."""
LLAMA_3_1 = COMMON | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 128000, "eos_token_id": 128001, "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
QWEN2_0_5B = QWEN | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 131072, "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "sliding_window": 131072, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_0_6B = QWEN | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None,
    "sliding_window": None, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("preset", RELEASED)
def test_a_released_config_is_the_preset_and_is_written_with_the_same_meaning(preset):
    raw = RELEASED[preset]
    read = hf.read_config(raw, "config.json")
    config = composed([f"model={preset}"])
    assert meaning(*read) == meaning(config.model, config.router)
    written = json.loads(json.dumps(hf.write_config(config.model, config.router, "bfloat16", 4096)))
    assert (written["model_type"], written["architectures"]) == (raw["model_type"], raw["architectures"])
    assert meaning(*hf.read_config(written, "config.json")) == meaning(*read)


@pytest.mark.parametrize(
    ("raw", "parameters"), [(LLAMA_3_1, 8_030_261_248), (QWEN2_0_5B, 494_032_768), (QWEN3_0_6B, 596_049_920)]
)
def test_a_released_dense_model_has_the_published_number_of_parameters(raw, parameters):
    model, router = hf.read_config(raw, "config.json")
    assert count_parameters(meta_model(model, router)).total == parameters
    written = hf.write_config(model, router, "bfloat16", 4096)
    assert written["model_type"] == raw["model_type"]
    assert hf.read_config(written, "config.json") == (model, router)
