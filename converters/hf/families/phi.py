# SPDX-License-Identifier: MIT
"""Phi-3.5-MoE.

The model has layer norms; llama.cpp's graph has RMS norms with the same weights and biases. They differ by the mean,
which a layer norm subtracts. As nothing but norms reads the residual stream, its mean can be removed where it is
written: embeddings, attention outputs and experts are centred, and then both norms are the same function, in exact
arithmetic (SliceGPT, arXiv 2401.15024, section 3.2). llama.cpp's own converter does not do so.

The model weights each of its two experts on its own (SparseMixer, arXiv 2409.12136): with a softmax over those experts
whose logits are within twice `router_jitter_noise` (2 %) of its own. Mostly there is no other, and both weights are 1.
llama.cpp's graph has one softmax, of which the chosen two are scaled to sum to 1. Routers that are multiplied with
`_FLATTEN` rank experts as before and make that softmax flat, both weights 1/2; down projections are doubled. Both are
powers of two, so no weight is rounded. What is left is a weight of 1 where the model has less, because another expert
is within 2 %: that no GGUF can say; see `_caveats`.
"""

from __future__ import annotations

import math
import re

import gguf

from edgemoe.errors import ConversionError

from ..checkpoint import StoredTensor
from ..family import Family, Hparams, Metadata, Rule, constant
from ..sources import Piece, Rows

_Keys = gguf.Keys

_FLATTEN = 2.0**-12
"""Weights are 1 ± d * _FLATTEN / 2 for logits that are d apart: 1.4e-4 of the largest logit of the tiny model in tests,
5.5e-4 with 2^-10. Smaller ones cost resolution: in float32, logits closer than some 6e-8 / _FLATTEN = 2.5e-4 tie."""


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


def _centred_rows(tensor: StoredTensor, match: re.Match[str], _hparams: Hparams) -> list[Piece]:
    return [Piece(match.string, tensor.shape, (Rows(tensor, centre="row"),))]


def _centred_matrix(tensor: StoredTensor, match: re.Match[str], _hparams: Hparams) -> list[Piece]:
    return [Piece(match.string, tensor.shape, (Rows(tensor, centre="matrix"),))]


def _doubled_centred_matrix(tensor: StoredTensor, match: re.Match[str], _hparams: Hparams) -> list[Piece]:
    return [Piece(match.string, tensor.shape, (Rows(tensor, centre="matrix", factor=2.0),))]


def _flattened_router(tensor: StoredTensor, match: re.Match[str], _hparams: Hparams) -> list[Piece]:
    return [Piece(match.string, tensor.shape, (Rows(tensor, factor=_FLATTEN),))]


def _caveats(hparams: Hparams) -> list[str]:
    caveats = [
        "llama.cpp weights both experts of a token with 1; Phi-3.5-MoE gives less to one that has another expert "
        f"within {2 * float(hparams.get('router_jitter_noise') or 0):.0%} of its logit (sparse mixer): answers differ "
        "from transformers' there"
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
    requires={"tie_word_embeddings": (False, None), "num_experts_per_tok": (2,)},
    rules=(
        Rule(r"model\.embed_tokens\.weight|.*\.o_proj\.bias", _centred_rows),
        Rule(r".*\.o_proj\.weight", _centred_matrix),
        Rule(r".*\.experts\.\d+\.w2\.weight", _doubled_centred_matrix),
        Rule(r".*\.block_sparse_moe\.gate\.weight", _flattened_router),
    ),
    caveats=_caveats,
)
