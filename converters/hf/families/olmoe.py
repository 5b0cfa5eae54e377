# SPDX-License-Identifier: MIT
"""OLMoE."""

from __future__ import annotations

import gguf

from ..family import FUSED_EXPERT_RULES, Family

OLMOE = Family(
    name="OLMoE",
    architectures=("OlmoeForCausalLM",),
    arch=gguf.MODEL_ARCH.OLMOE,
    requires={"norm_topk_prob": (False, None), "clip_qkv": (None,), "attention_bias": (False, None)},
    rules=FUSED_EXPERT_RULES,
)
