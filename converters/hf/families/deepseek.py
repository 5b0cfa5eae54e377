# SPDX-License-Identifier: MIT
"""DeepSeek-MoE, and DeepSeek-V2 (-Lite) and V3 with multi-head latent attention (MLA).

llama.cpp computes MLA with the up-projection of keys absorbed into the queries, as attention of one key-value head
over the latent (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). So `kv_b_proj` is cut, head by head, into the part
that makes keys, transposed, and the part that makes values.
"""

from __future__ import annotations

import functools
import re

import gguf

from edgemoe.errors import ConversionError

from ..checkpoint import StoredTensor
from ..family import FUSED_EXPERT_RULES, ROTARY_RULES, Family, Hparams, Metadata, Rule
from ..sources import Piece, Rows

_Keys = gguf.Keys

_EXPERT_KEYS = {
    _Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size",),
    _Keys.LLM.EXPERT_SHARED_COUNT: ("n_shared_experts",),
    _Keys.LLM.LEADING_DENSE_BLOCK_COUNT: ("first_k_dense_replace",),
}


def _split_kv_b(tensor: StoredTensor, match: re.Match[str], hparams: Hparams) -> list[Piece]:
    n_heads = hparams.count("num_attention_heads")
    n_key, n_value = hparams.count("qk_nope_head_dim"), hparams.count("v_head_dim")
    if tensor.n_rows != n_heads * (n_key + n_value):
        raise ConversionError(
            f"cannot convert {tensor.name}: it has {tensor.n_rows} rows, expected {n_heads} heads of {n_key} + "
            f"{n_value} ({tensor.path}); config.json and weights are of different models"
        )
    starts = [head * (n_key + n_value) for head in range(n_heads)]
    rank = tensor.n_columns
    keys = tuple(Rows(tensor, range(start, start + n_key), transpose=True) for start in starts)
    values = tuple(Rows(tensor, range(start + n_key, start + n_key + n_value)) for start in starts)
    return [
        Piece(match.expand(r"\1.k_b_proj.weight"), (n_heads, rank, n_key), keys),
        Piece(match.expand(r"\1.v_b_proj.weight"), (n_heads, n_value, rank), values),
    ]


def _mla_metadata(hparams: Hparams, scoring: str) -> Metadata:
    rank, n_rope = hparams.count("kv_lora_rank"), hparams.count("qk_rope_head_dim")
    gating = {"softmax": gguf.ExpertGatingFuncType.SOFTMAX, "sigmoid": gguf.ExpertGatingFuncType.SIGMOID}
    values: Metadata = {
        _Keys.Attention.HEAD_COUNT_KV: 1,
        _Keys.Attention.KV_LORA_RANK: rank,
        _Keys.Attention.KEY_LENGTH: rank + n_rope,
        _Keys.Attention.VALUE_LENGTH: rank,
        _Keys.Attention.KEY_LENGTH_MLA: hparams.count("qk_nope_head_dim") + n_rope,
        _Keys.Attention.VALUE_LENGTH_MLA: hparams.count("v_head_dim"),
        _Keys.Rope.DIMENSION_COUNT: n_rope,
        _Keys.LLM.EXPERT_WEIGHTS_NORM: bool(hparams.get("norm_topk_prob")),
        _Keys.LLM.LEADING_DENSE_BLOCK_COUNT: int(hparams.get("first_k_dense_replace") or 0),
        _Keys.LLM.EXPERT_SHARED_COUNT: int(hparams.get("n_shared_experts") or 0),
    }
    if (mscale := hparams.rope.get("mscale_all_dim")) is not None:
        values[_Keys.Rope.SCALING_YARN_LOG_MUL] = 0.1 * float(mscale)  # llama.cpp's deepseek2 divides by 0.1
    values[_Keys.LLM.EXPERT_GATING_FUNC] = int(gating[hparams.get("scoring_func") or scoring])
    return values


_MLA_KEYS = {
    _Keys.Attention.Q_LORA_RANK: ("q_lora_rank",),
    _Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size",),
    _Keys.LLM.EXPERT_WEIGHTS_SCALE: ("routed_scaling_factor",),
    _Keys.LLM.EXPERT_GROUP_COUNT: ("n_group",),
    _Keys.LLM.EXPERT_GROUP_USED_COUNT: ("topk_group",),
}
_MLA_RULES = (Rule(r"(.*\.self_attn)\.kv_b_proj\.weight", _split_kv_b), *FUSED_EXPERT_RULES)


def _v2_metadata(hparams: Hparams) -> Metadata:
    values = _mla_metadata(hparams, "softmax")
    if hparams.get("topk_method") == "greedy":  # transformers chooses among all experts, whatever n_group says
        values |= {_Keys.LLM.EXPERT_GROUP_COUNT: 1, _Keys.LLM.EXPERT_GROUP_USED_COUNT: 1}
    return values


def _v2_caveats(hparams: Hparams) -> list[str]:
    n_groups = int(hparams.get("n_group") or 1)
    if n_groups > int(hparams.get("topk_group") or 1) and hparams.get("topk_method") != "greedy":
        return [
            "llama.cpp ranks groups of experts by the sum of their two best, DeepSeek-V2 by the best one: some tokens "
            "go to other experts than in transformers"
        ]
    return []


DEEPSEEK_V2 = Family(
    name="DeepSeek-V2",
    architectures=("DeepseekV2ForCausalLM",),
    arch=gguf.MODEL_ARCH.DEEPSEEK2,
    keys=_MLA_KEYS,
    computed=_v2_metadata,
    requires={"scoring_func": ("softmax", "sigmoid", None), "moe_layer_freq": (1, None)},
    rules=_MLA_RULES,
    caveats=_v2_caveats,
)

DEEPSEEK_V3 = Family(
    name="DeepSeek-V3",
    architectures=("DeepseekV3ForCausalLM",),
    arch=gguf.MODEL_ARCH.DEEPSEEK2,
    keys=_MLA_KEYS,
    computed=functools.partial(_mla_metadata, scoring="sigmoid"),
    requires={"scoring_func": ("sigmoid", None), "moe_layer_freq": (1, None), "rope_interleave": (True, None)},
    rules=_MLA_RULES,
)

DEEPSEEK_MOE = Family(
    name="DeepSeek-MoE",
    architectures=("DeepseekForCausalLM",),
    arch=gguf.MODEL_ARCH.DEEPSEEK,
    keys=_EXPERT_KEYS,
    fixed={_Keys.LLM.EXPERT_WEIGHTS_SCALE: 1.0, _Keys.Rope.SCALING_TYPE: "none"},
    computed=lambda hparams: {_Keys.Rope.DIMENSION_COUNT: hparams.head_dim},
    requires={
        "norm_topk_prob": (False, None),
        "scoring_func": ("softmax", None),
        "moe_layer_freq": (1, None),
        "rope_scaling": (None,),
    },
    rules=(*ROTARY_RULES, *FUSED_EXPERT_RULES),
)
