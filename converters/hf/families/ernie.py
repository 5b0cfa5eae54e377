# SPDX-License-Identifier: MIT
"""ERNIE-4.5-MoE. Its layers that predict further tokens are left out: llama.cpp's graph has none."""

from __future__ import annotations

import gguf

from ..family import FUSED_EXPERT_RULES, Family, Hparams, Metadata, Rule, flattened

_Keys = gguf.Keys


def _shared(hparams: Hparams) -> Metadata:
    n_shared = int(hparams.get("moe_num_shared_experts") or 0)
    return {
        _Keys.LLM.EXPERT_SHARED_COUNT: n_shared,
        _Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: n_shared * hparams.count("moe_intermediate_size"),
    }


ERNIE_4_5_MOE = Family(
    name="ERNIE-4.5-MoE",
    architectures=("Ernie4_5_MoeForCausalLM",),
    arch=gguf.MODEL_ARCH.ERNIE4_5_MOE,
    keys={
        _Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size",),
        _Keys.LLM.INTERLEAVE_MOE_LAYER_STEP: ("moe_layer_interval",),
        _Keys.LLM.LEADING_DENSE_BLOCK_COUNT: ("moe_layer_start_index",),
    },
    computed=_shared,
    requires={"moe_use_aux_free": (True, None)},
    rename=((r"ernie\.(.*)", r"model.\1"),),
    skip=(r"model\.mtp_.*",),
    rules=(
        Rule(r".*\.moe_statics\.e_score_correction\.bias", flattened),
        *FUSED_EXPERT_RULES,
    ),
)
