# SPDX-License-Identifier: MIT
"""GraniteMoE, with a shared expert or without. Experts are stored together, gate and up in one tensor."""

from __future__ import annotations

import gguf

from ..family import ROTARY_RULES, Family, Rule, renamed, split_halves

_Keys = gguf.Keys

GRANITE_MOE = Family(
    name="GraniteMoE",
    architectures=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    arch=gguf.MODEL_ARCH.GRANITE_MOE,
    keys={
        _Keys.Attention.SCALE: ("attention_multiplier",),
        _Keys.LLM.EMBEDDING_SCALE: ("embedding_multiplier",),
        _Keys.LLM.RESIDUAL_SCALE: ("residual_multiplier",),
        _Keys.LLM.LOGIT_SCALE: ("logits_scaling",),
        _Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: ("shared_intermediate_size",),
    },
    computed=lambda hparams: {_Keys.Rope.DIMENSION_COUNT: hparams.head_dim},
    requires={"position_embedding_type": ("rope", None), "attention_bias": (False, None)},
    rules=(
        *ROTARY_RULES,
        Rule(
            r"model\.layers\.(\d+)\.block_sparse_moe\.input_linear\.weight",
            split_halves(r"blk.\1.ffn_gate_exps.weight", r"blk.\1.ffn_up_exps.weight"),
        ),
        Rule(
            r"model\.layers\.(\d+)\.block_sparse_moe\.output_linear\.weight",
            renamed(r"blk.\1.ffn_down_exps.weight"),
        ),
        Rule(
            r"model\.layers\.(\d+)\.shared_mlp\.input_linear\.weight",
            split_halves(r"blk.\1.ffn_gate_shexp.weight", r"blk.\1.ffn_up_shexp.weight"),
        ),
        Rule(r"model\.layers\.(\d+)\.shared_mlp\.output_linear\.weight", renamed(r"blk.\1.ffn_down_shexp.weight")),
    ),
)
