# SPDX-License-Identifier: MIT
"""LFM2-MoE: short convolutions in most layers, attention in some."""

from __future__ import annotations

import re

import gguf

from ..checkpoint import StoredTensor
from ..family import FUSED_EXPERT_RULES, Family, Hparams, Metadata, Rule
from ..sources import Piece, Rows

_Keys = gguf.Keys


def _convolution(tensor: StoredTensor, match: re.Match[str], _hparams: Hparams) -> list[Piece]:
    """(channels, 1, taps) without the dimension of size 1."""
    return [Piece(match.string, (tensor.n_rows, tensor.n_columns), (Rows(tensor),))]


def _layers(hparams: Hparams) -> Metadata:
    n_heads = hparams.count("num_key_value_heads", "num_attention_heads")
    return {
        _Keys.Attention.HEAD_COUNT_KV: [
            n_heads if kind == "full_attention" else 0 for kind in hparams.need("layer_types")
        ]
    }


LFM2_MOE = Family(
    name="LFM2-MoE",
    architectures=("Lfm2MoeForCausalLM",),
    arch=gguf.MODEL_ARCH.LFM2MOE,
    keys={
        _Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size",),
        _Keys.LLM.LEADING_DENSE_BLOCK_COUNT: ("num_dense_layers",),
        _Keys.ShortConv.L_CACHE: ("conv_L_cache",),
    },
    fixed={_Keys.LLM.EXPERT_GATING_FUNC: int(gguf.ExpertGatingFuncType.SIGMOID)},
    computed=_layers,
    requires={
        "use_expert_bias": (True,),
        "norm_topk_prob": (True,),
        "routed_scaling_factor": (1.0, None),
        "conv_bias": (False, None),
    },
    rename=(
        (r"(.*)\.expert_bias", r"\1.expert_bias.bias"),
        (r"model\.(layers\.\d+\.feed_forward\.experts\..*)", r"\1"),
    ),
    rules=(
        Rule(r".*\.conv\.conv\.weight", _convolution),
        *FUSED_EXPERT_RULES,
    ),
)
