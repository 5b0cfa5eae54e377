# SPDX-License-Identifier: MIT
"""Phi-3.5-MoE."""

from __future__ import annotations

import math

import gguf

from edgemoe.errors import ConversionError

from ..family import FUSED_EXPERT_RULES, Family, Hparams, Metadata, constant
from ..sources import Piece

_Keys = gguf.Keys


def _rope(hparams: Hparams) -> Metadata:
    rope = hparams.rope
    values: Metadata = {_Keys.Rope.DIMENSION_COUNT: hparams.head_dim}
    if not rope.get("long_factor"):
        return values
    original = int(rope.get("original_max_position_embeddings") or 0)
    if not original:
        raise ConversionError(
            f"cannot convert the checkpoint: original_max_position_embeddings of its RoPE is missing ({hparams.path})"
        )
    scale = hparams.count("max_position_embeddings") / original
    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0  # LongRoPE, arXiv 2402.13753
    values[_Keys.Rope.SCALING_ORIG_CTX_LEN] = original
    values[_Keys.Rope.SCALING_ATTN_FACTOR] = float(rope.get("short_mscale") or factor)
    return values


def _rope_factors(hparams: Hparams) -> list[Piece]:
    rope = hparams.rope
    if not rope.get("long_factor"):
        return []
    return [constant(f"rope_factors_{kind}.weight", rope[f"{kind}_factor"]) for kind in ("long", "short")]


def _caveats(hparams: Hparams) -> list[str]:
    caveats = [
        "llama.cpp weights the two experts by a softmax that sums to 1, Phi-3.5-MoE each by its own sparse mixer; and it "
        "has RMS norms where the model has layer norms: its answers differ from transformers'"
    ]
    rope = hparams.rope
    if rope.get("long_mscale") != rope.get("short_mscale"):
        caveats.append("llama.cpp has one attention factor for short and long contexts: that of short ones is written")
    return caveats


PHI_3_5_MOE = Family(
    name="Phi-3.5-MoE",
    architectures=("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    arch=gguf.MODEL_ARCH.PHIMOE,
    computed=_rope,
    constants=_rope_factors,
    rename=((r"(.*)\.mlp\.(router\.|experts\.)(.*)", r"\1.block_sparse_moe.\2\3"),),
    rules=FUSED_EXPERT_RULES,
    caveats=_caveats,
)
