# SPDX-License-Identifier: MIT
"""Tiny checkpoints' `config.json`, one for each family, with the fields of the published files.

Sources: the `config.json` that each repository in `Family.like` publishes (field names, rope and routing settings;
sizes are made small). Transformers writes other fields today (`rope_parameters` for `rope_theta`), which no published
checkpoint of these families has, so configurations are written from here and not by `save_pretrained`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

Config = dict[str, Any]

N_VOCAB = 640
"""Rows of the embeddings: more than any tokenizer here has tokens, as published checkpoints round theirs up."""

_COMMON = {"torch_dtype": "bfloat16", "transformers_version": "4.57.1", "use_cache": True, "vocab_size": N_VOCAB}
_SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "initializer_range": 0.02}
_PLAIN = {**_COMMON, **_SMALL, "hidden_act": "silu", "attention_dropout": 0.0, "tie_word_embeddings": False}


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family's checkpoint is made of.

    `tokenizer` is a recipe of `vocabularies`, `pre_tokenizer` what llama.cpp calls its pre-tokenizer (None where there
    is none: SentencePiece). `ggml_arch` is `general.architecture` of the converted file. `reference` replaces fields
    of `config` where transformers has no class of that name and another one computes the same function.
    """

    name: str
    like: str
    ggml_arch: str
    tokenizer: str
    pre_tokenizer: str | None
    config: Config
    reference: Config | None = None


def _layer_types(n_layers: int, every: int) -> list[str]:
    """Every `every`-th layer attends to everything, the others to a window."""
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n_layers)]


_MIXTRAL = {
    **_PLAIN,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 32768,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}

_QWEN2_MOE = {
    **_PLAIN,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "intermediate_size": 128,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 32,
    "norm_topk_prob": False,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 96,
    "sliding_window": 32768,
    "use_sliding_window": False,
}

_QWEN3_MOE = {
    **_PLAIN,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 40960,
    "max_window_layers": 3,
    "mlp_only_layers": [],
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "use_sliding_window": False,
}

_OLMOE = {
    **_PLAIN,
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "attention_bias": False,
    "clip_qkv": None,
    "intermediate_size": 32,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
}

_DEEPSEEK_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}

_DEEPSEEK_V2_LITE = {
    **_PLAIN,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 3,
    # llama.cpp tells the Lite models, which have no low rank of queries, by their number of layers.
    "num_hidden_layers": 27,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": _DEEPSEEK_YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 32,
}

_DEEPSEEK_V3 = {
    **_PLAIN,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**_DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "v_head_dim": 32,
}

_DEEPSEEK_MOE = {
    **_PLAIN,
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "scoring_func": "softmax",
    "seq_aux": True,
}

# DeepSeek-MoE has no class in transformers. It is Qwen2-MoE without biases of queries, keys and values, with a first
# dense layer, and with shared experts that no gate scales: `checkpoints` makes the gate 1/2 and doubles their last
# matrix, which changes no bit.
_DEEPSEEK_MOE_AS_QWEN2_MOE = {
    **_DEEPSEEK_MOE,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "mlp_only_layers": [0],
    "num_experts": 8,
    "qkv_bias": False,
    "shared_expert_intermediate_size": 64,
}

_GRANITE_MOE = {
    **_PLAIN,
    "architectures": ["GraniteMoeForCausalLM"],
    "model_type": "granitemoe",
    "attention_bias": False,
    "attention_multiplier": 0.0625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "intermediate_size": 32,
    "logits_scaling": 6.0,
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": True,
}

_GRANITE_MOE_SHARED = {
    **_GRANITE_MOE,
    "architectures": ["GraniteMoeSharedForCausalLM"],
    "model_type": "granitemoeshared",
    "shared_intermediate_size": 64,
}

_GPT_OSS = {
    **_PLAIN,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 2,
    "head_dim": 32,
    "initial_context_length": 4096,
    "intermediate_size": 64,
    "layer_types": _layer_types(4, 2),
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 24,
    "swiglu_limit": 7.0,
}

_GPT_OSS_BF16 = {key: value for key, value in _GPT_OSS.items() if key != "quantization_config"}

_PHIMOE = {
    **_PLAIN,
    "architectures": ["PhiMoEForCausalLM"],
    "model_type": "phimoe",
    "attention_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "input_jitter_noise": 0.01,
    "intermediate_size": 96,
    "lm_head_bias": True,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "original_max_position_embeddings": 4096,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0, 1.1, 1.3, 1.7, 2.9, 5.5, 11.0, 30.0],
        "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0, 1.02, 1.05, 1.1, 1.15, 1.3, 1.6, 2.0],
        "short_mscale": 1.243163121016122,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 131072,
}

_AFMOE = {
    **_PLAIN,
    "architectures": ["AfmoeForCausalLM"],
    "model_type": "afmoe",
    "global_attn_every_n_layers": 4,
    "head_dim": 32,
    "intermediate_size": 96,
    "layer_types": _layer_types(5, 4),
    "load_balance_coeff": 0.001,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 32,
    "mup_enabled": True,
    "n_group": 1,
    "num_dense_layers": 1,
    "num_expert_groups": 1,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "num_limited_groups": 1,
    "num_shared_experts": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "route_norm": True,
    "route_scale": 2.826,
    "score_func": "sigmoid",
    "sliding_window": 24,
    "topk_group": 1,
    "use_grouped_mm": True,
}

_LFM2_MOE = {
    **_COMMON,
    **_SMALL,
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "eos_token_id": 2,
    "intermediate_size": 96,
    "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
    "max_position_embeddings": 128000,
    "moe_intermediate_size": 32,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_dense_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "routed_scaling_factor": 1.0,
    "tie_embedding": True,
    "use_expert_bias": True,
}

_ERNIE = {
    **_COMMON,
    **_SMALL,
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "intermediate_size": 96,
    "max_position_embeddings": 131072,
    "moe_capacity": [8, 8, 8],
    "moe_gate": "topk",
    "moe_intermediate_size": 32,
    "moe_k": 3,
    "moe_layer_end_index": 2,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_experts": 8,
    "moe_num_shared_experts": 2,
    "moe_use_aux_free": True,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "use_bias": False,
    "use_rmsnorm": True,
}

_GLM4_MOE = {
    **_PLAIN,
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_qk_norm": True,
}

FAMILIES = {
    family.name: family
    for family in (
        Family("mixtral", "mistralai/Mixtral-8x7B-v0.1", "llama", "sentencepiece", None, _MIXTRAL),
        Family("qwen2moe", "Qwen/Qwen1.5-MoE-A2.7B", "qwen2moe", "qwen2", "qwen2", _QWEN2_MOE),
        Family("qwen3moe", "Qwen/Qwen3-30B-A3B", "qwen3moe", "qwen2", "qwen2", _QWEN3_MOE),
        Family("olmoe", "allenai/OLMoE-1B-7B-0924", "olmoe", "olmo", "olmo", _OLMOE),
        Family(
            "deepseek-v2-lite",
            "deepseek-ai/DeepSeek-V2-Lite",
            "deepseek2",
            "deepseek-llm",
            "deepseek-llm",
            _DEEPSEEK_V2_LITE,
        ),
        Family("deepseek-v3", "deepseek-ai/DeepSeek-V3", "deepseek2", "deepseek-v3", "deepseek-v3", _DEEPSEEK_V3),
        Family(
            "deepseek-moe",
            "deepseek-ai/deepseek-moe-16b-base",
            "deepseek",
            "deepseek-llm",
            "deepseek-llm",
            _DEEPSEEK_MOE,
            _DEEPSEEK_MOE_AS_QWEN2_MOE,
        ),
        Family("granitemoe", "ibm-granite/granite-3.0-1b-a400m-base", "granitemoe", "refact", "refact", _GRANITE_MOE),
        Family(
            "granitemoe-shared",
            "ibm-research/moe-7b-1b-active-shared-experts",
            "granitemoe",
            "refact",
            "refact",
            _GRANITE_MOE_SHARED,
        ),
        Family("gpt-oss", "openai/gpt-oss-20b", "gpt-oss", "gpt-4o", "gpt-4o", _GPT_OSS),
        Family("gpt-oss-bf16", "unsloth/gpt-oss-20b-BF16", "gpt-oss", "gpt-4o", "gpt-4o", _GPT_OSS_BF16),
        Family("phimoe", "microsoft/Phi-3.5-MoE-instruct", "phimoe", "sentencepiece", None, _PHIMOE),
        Family("afmoe", "arcee-ai/Trinity-Nano-Preview", "afmoe", "afmoe", "afmoe", _AFMOE),
        Family("lfm2moe", "LiquidAI/LFM2-8B-A1B", "lfm2moe", "lfm2", "lfm2", _LFM2_MOE),
        Family("ernie4_5-moe", "baidu/ERNIE-4.5-21B-A3B-PT", "ernie4_5-moe", "sentencepiece", None, _ERNIE),
        Family("glm4moe", "zai-org/GLM-4.5", "glm4moe", "glm4", "glm4", _GLM4_MOE),
    )
}
