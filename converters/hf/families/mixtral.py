# SPDX-License-Identifier: MIT
"""Mixtral: llama.cpp's architecture `llama` with experts."""

from __future__ import annotations

import gguf

from ..family import FUSED_EXPERT_RULES, ROTARY_RULES, Family

_Keys = gguf.Keys

MIXTRAL = Family(
    name="Mixtral",
    architectures=("MixtralForCausalLM",),
    arch=gguf.MODEL_ARCH.LLAMA,
    computed=lambda hparams: {_Keys.Rope.DIMENSION_COUNT: hparams.head_dim},
    requires={"sliding_window": (None,)},
    rename=((r"(.*)\.mlp\.(gate\.weight|experts\..*)", r"\1.block_sparse_moe.\2"),),
    rules=(*ROTARY_RULES, *FUSED_EXPERT_RULES),
)
