# SPDX-License-Identifier: MIT
"""gpt-oss: experts in MXFP4, which stays as it is, or in BF16 as transformers saves a model that it loaded.

Rows of gate and up alternate. Published files have them as rows of blocks; the BF16 form is transposed.
"""

from __future__ import annotations

import re

import gguf

from edgemoe.errors import ConversionError

from ..checkpoint import StoredTensor
from ..family import Family, Hparams, Rule
from ..sources import MXFP4_BLOCK, Mxfp4Rows, Piece, Rows

_Keys = gguf.Keys


def _names(match: re.Match[str], suffix: str) -> list[str]:
    """The tensors that a stored one holds, in the order in which their rows alternate."""
    projections = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[match.group(2)]
    return [f"{match.group(1)}.{projection}.{suffix}" for projection in projections]


def _from_blocks(tensor: StoredTensor, match: re.Match[str], hparams: Hparams) -> list[Piece]:
    scales = hparams.tensors.get(tensor.name.removesuffix("_blocks") + "_scales")
    is_mxfp4 = tensor.dtype == "U8" and len(tensor.shape) == 4 and tensor.shape[3] == MXFP4_BLOCK // 2
    if not is_mxfp4 or scales is None or scales.dtype != "U8" or scales.shape != tensor.shape[:3]:
        found = "no scales" if scales is None else f"scales {scales.dtype} {list(scales.shape)}"
        raise ConversionError(
            f"cannot convert {tensor.name}: found {tensor.dtype} {list(tensor.shape)} with {found}, expected "
            f"U8 (experts, rows, blocks, 16), U8 scales of each block, as MXFP4 has ({tensor.path}); download it again"
        )
    n_experts, n_rows, n_blocks, _ = tensor.shape
    names = _names(match, "weight")
    step = len(names)
    pieces = []
    for first, name in enumerate(names):
        sources = tuple(
            Mxfp4Rows(tensor, scales, range(expert * n_rows + first, (expert + 1) * n_rows, step))
            for expert in range(n_experts)
        )
        pieces.append(Piece(name, (n_experts, n_rows // step, n_blocks * MXFP4_BLOCK), sources))
    return pieces


def _from_floats(tensor: StoredTensor, match: re.Match[str], _hparams: Hparams) -> list[Piece]:
    n_experts, n_inputs, n_outputs = tensor.shape
    names = _names(match, "weight")
    step = len(names)
    pieces = []
    for first, name in enumerate(names):
        sources = tuple(
            Rows(tensor, range(e * n_inputs, (e + 1) * n_inputs), range(first, n_outputs, step), transpose=True)
            for e in range(n_experts)
        )
        pieces.append(Piece(name, (n_experts, n_outputs // step, n_inputs), sources))
    return pieces


def _biases(tensor: StoredTensor, match: re.Match[str], _hparams: Hparams) -> list[Piece]:
    n_experts, n_outputs = tensor.shape
    names = _names(match, "bias")
    step = len(names)
    return [
        Piece(name, (n_experts, n_outputs // step), (Rows(tensor, columns=range(first, n_outputs, step)),))
        for first, name in enumerate(names)
    ]


def _caveats(hparams: Hparams) -> list[str]:
    if hparams.rope.get("truncate") is False:
        return [
            "llama.cpp rounds the dimensions between which YaRN mixes frequencies, gpt-oss does not (truncate: false): "
            "logits differ in the third digit, and a token whose experts score nearly alike may go to others"
        ]
    return []


GPT_OSS = Family(
    name="gpt-oss",
    architectures=("GptOssForCausalLM",),
    arch=gguf.MODEL_ARCH.GPT_OSS,
    keys={
        _Keys.Attention.SLIDING_WINDOW: ("sliding_window",),
        _Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: ("intermediate_size",),
    },
    computed=lambda hparams: {
        _Keys.Attention.SLIDING_WINDOW_PATTERN: [kind == "sliding_attention" for kind in hparams.need("layer_types")],
    },
    requires={"swiglu_limit": (7.0, None), "hidden_act": ("silu", None)},
    caveats=_caveats,
    rename=((r"(.*\.sinks)", r"\1.weight"),),
    skip=(r".*\.(gate_up|down)_proj_scales",),
    rules=(
        Rule(r"(.*\.experts)\.(gate_up_proj|down_proj)_blocks", _from_blocks),
        Rule(r"(.*\.experts)\.(gate_up_proj|down_proj)_bias", _biases),
        Rule(r"(.*\.experts)\.(gate_up_proj|down_proj)", _from_floats),
    ),
)
