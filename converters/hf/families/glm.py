# SPDX-License-Identifier: MIT
"""GLM-4-MoE (GLM-4.5 and 4.6)."""

from __future__ import annotations

import gguf

from ..family import FUSED_EXPERT_RULES, Family

_Keys = gguf.Keys

GLM_4_MOE = Family(
    name="GLM-4-MoE",
    architectures=("Glm4MoeForCausalLM",),
    arch=gguf.MODEL_ARCH.GLM4_MOE,
    keys={
        _Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size",),
        _Keys.LLM.EXPERT_SHARED_COUNT: ("n_shared_experts",),
        _Keys.LLM.LEADING_DENSE_BLOCK_COUNT: ("first_k_dense_replace",),
        _Keys.LLM.EXPERT_WEIGHTS_SCALE: ("routed_scaling_factor",),
        _Keys.LLM.EXPERT_WEIGHTS_NORM: ("norm_topk_prob",),
        _Keys.LLM.EXPERT_GROUP_COUNT: ("n_group",),
        _Keys.LLM.EXPERT_GROUP_USED_COUNT: ("topk_group",),
    },
    fixed={_Keys.LLM.EXPERT_GATING_FUNC: int(gguf.ExpertGatingFuncType.SIGMOID)},
    computed=lambda hparams: {
        _Keys.Rope.DIMENSION_COUNT: int(hparams.head_dim * hparams.rope.get("partial_rotary_factor", 0.5)),
    },
    rules=FUSED_EXPERT_RULES,
    # As llama.cpp's converter sets them: GLM's tokenizer_config.json names none of these.
    special_tokens={"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"},
)
