# SPDX-License-Identifier: MIT
"""AFMoE, Arcee's Trinity: gated attention, windows in three of four layers, sigmoid routing."""

from __future__ import annotations

import gguf

from ..family import FUSED_EXPERT_RULES, Family, Hparams, Metadata

_Keys = gguf.Keys


def _windows(hparams: Hparams) -> Metadata:
    every = int(hparams.get("global_attn_every_n_layers") or 4)
    kinds = hparams.get("layer_types") or [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(hparams.n_layers)
    ]
    return {_Keys.Attention.SLIDING_WINDOW_PATTERN: [kind == "sliding_attention" for kind in kinds]}


AFMOE = Family(
    name="AFMoE",
    architectures=("AfmoeForCausalLM",),
    arch=gguf.MODEL_ARCH.AFMOE,
    keys={
        _Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size",),
        _Keys.LLM.EXPERT_SHARED_COUNT: ("num_shared_experts",),
        _Keys.LLM.LEADING_DENSE_BLOCK_COUNT: ("num_dense_layers",),
        _Keys.LLM.EXPERT_WEIGHTS_NORM: ("route_norm",),
        _Keys.LLM.EXPERT_WEIGHTS_SCALE: ("route_scale",),
        _Keys.LLM.EXPERT_GROUP_COUNT: ("n_group",),
        _Keys.LLM.EXPERT_GROUP_USED_COUNT: ("topk_group",),
        _Keys.Attention.SLIDING_WINDOW: ("sliding_window",),
    },
    fixed={_Keys.LLM.EXPERT_GATING_FUNC: int(gguf.ExpertGatingFuncType.SIGMOID)},
    computed=lambda hparams: {_Keys.Rope.DIMENSION_COUNT: hparams.head_dim, **_windows(hparams)},
    requires={
        "mup_enabled": (True,),
        "score_func": ("sigmoid", None),
        "global_attn_every_n_layers": (4, None),  # which layers have no RoPE is fixed in the graph
    },
    rename=((r"(.*)\.expert_bias", r"\1.expert_bias.bias"),),
    rules=FUSED_EXPERT_RULES,
)
