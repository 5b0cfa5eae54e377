# SPDX-License-Identifier: MIT
"""Qwen2-MoE (with a shared expert behind a sigmoid) and Qwen3-MoE."""

from __future__ import annotations

import gguf

from ..family import FUSED_EXPERT_RULES, Family

_Keys = gguf.Keys

QWEN3_MOE = Family(
    name="Qwen3-MoE",
    architectures=("Qwen3MoeForCausalLM",),
    arch=gguf.MODEL_ARCH.QWEN3MOE,
    keys={_Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size",)},
    requires={
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1, None),
        "mlp_only_layers": ([], None),
        "attention_bias": (False, None),
        "use_sliding_window": (False, None),
    },
    rules=FUSED_EXPERT_RULES,
)

QWEN2_MOE = Family(
    name="Qwen2-MoE",
    architectures=("Qwen2MoeForCausalLM",),
    arch=gguf.MODEL_ARCH.QWEN2MOE,
    keys={
        _Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size",),
        _Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: ("shared_expert_intermediate_size",),
    },
    requires={
        "norm_topk_prob": (False, None),
        "decoder_sparse_step": (1, None),
        "mlp_only_layers": ([], None),
        "use_sliding_window": (False, None),
    },
    rules=FUSED_EXPERT_RULES,
)
