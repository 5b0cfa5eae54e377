# SPDX-License-Identifier: MIT
"""Which families of models become ONNX, and how their routers choose experts.

What a layer is made of (biases, norms of queries and keys, shared experts, sinks, dense layers) is told by the
tensors it has; a tensor that the graph has no use for is an error. So a family says only what tensors cannot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from edgemoe.errors import ConversionError

from ..hf.family import Hparams


@dataclasses.dataclass(frozen=True)
class Routing:
    """How experts of a token are chosen and mixed.

    Attributes:
        kind: `softmax`, `sigmoid`, or `sparse_mixer` (Phi-3.5-MoE).
        normalizes: mixing weights of the chosen experts are made to sum to 1.
        factor: of the result.
        n_groups, n_groups_used: experts are chosen from the best groups only; n_groups 1: from all.
        group_score: a group's is that of its best expert (1), or the sum of its two best (2).
        jitter: relative distance below which the sparse mixer shares a weight.
    """

    kind: str
    normalizes: bool = True
    factor: float = 1.0
    n_groups: int = 1
    n_groups_used: int = 1
    group_score: int = 1
    jitter: float = 0.0


@dataclasses.dataclass(frozen=True)
class Activation:
    """QMoE's SwiGLU: gate * sigmoid(alpha * gate) * (up + beta), gate and up within a limit."""

    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: what people call it.
        architectures: class names in config.json.
        routing: how its routers choose.
        requires: for fields of config.json the values that the graph is made for; None stands for "missing".
        multipliers: fields of config.json for factors of `embedding`, `attention`, `residual` and `logits` (a divisor).
        activation: of its experts.
        is_latent: multi-head latent attention (MLA).
        uses_window: `sliding_window` holds for all layers where `layer_types` does not say.
        has_layer_norm: layer norms with biases, not RMS norms.
        genai_type: what onnxruntime-genai calls such a decoder.
    """

    name: str
    architectures: tuple[str, ...]
    routing: Callable[[Hparams], Routing]
    requires: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    multipliers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    activation: Callable[[Hparams], Activation] = lambda _hparams: Activation()
    is_latent: bool = False
    uses_window: bool = False
    has_layer_norm: bool = False
    genai_type: str = "decoder"

    def multiplier(self, role: str, hparams: Hparams) -> float | None:
        """The factor for a role; None where there is none."""
        value = hparams.get(self.multipliers[role]) if role in self.multipliers else None
        return None if value is None else float(value)


def find_family(hparams: Hparams) -> Family:
    """The family of a checkpoint.

    Raises:
        ConversionError: there is none, or config.json asks for what the graph does not compute.
    """
    names = hparams.get("architectures") or []
    for family in FAMILIES:
        if any(name in family.architectures for name in names):
            _check(family, hparams)
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.architectures))
    found = ", ".join(map(str, names)) or "none"
    raise ConversionError(
        f"cannot convert the checkpoint to ONNX: its architecture is {found}, expected one of {known} ({hparams.path})"
    )


def _check(family: Family, hparams: Hparams) -> None:
    for field, accepted in {"hidden_act": ("silu", "swish", None), **family.requires}.items():
        value = hparams.get(field)
        if value not in accepted:
            shown = " or ".join("nothing" if choice is None else str(choice) for choice in accepted)
            raise ConversionError(
                f"cannot convert this {family.name} checkpoint to ONNX: {field} is {value}, expected {shown} "
                f"({hparams.path})"
            )


def _softmax_of_all(hparams: Hparams) -> Routing:
    return Routing("softmax", normalizes=bool(hparams.get("norm_topk_prob")))


def _softmax_of_chosen(_hparams: Hparams) -> Routing:
    return Routing("softmax")


def _sparse_mixer(hparams: Hparams) -> Routing:
    jitter = hparams.get("router_jitter_noise")
    return Routing("sparse_mixer", normalizes=False, jitter=0.01 if jitter is None else float(jitter))


def _groups(hparams: Hparams, group_score: int) -> dict[str, int]:
    n_groups, n_used = int(hparams.get("n_group") or 1), int(hparams.get("topk_group") or 1)
    if n_groups == 1 or n_used == n_groups:
        return {}
    if n_used > n_groups or hparams.n_experts % n_groups or hparams.n_experts // n_groups < group_score:
        raise ConversionError(
            f"cannot convert the checkpoint: {hparams.n_experts} experts in {n_groups} groups of which {n_used} are "
            f"used, expected groups of one size ({hparams.path}); download it again"
        )
    return {"n_groups": n_groups, "n_groups_used": n_used, "group_score": group_score}


def _deepseek_v2(hparams: Hparams) -> Routing:
    groups = {} if hparams.get("topk_method") in (None, "greedy") else _groups(hparams, 1)
    return Routing("softmax", normalizes=False, factor=float(hparams.get("routed_scaling_factor") or 1), **groups)


def _deepseek_v3(hparams: Hparams) -> Routing:
    return Routing(
        "sigmoid",
        normalizes=hparams.get("norm_topk_prob") is not False,
        factor=float(hparams.get("routed_scaling_factor") or 1),
        **_groups(hparams, 2),
    )


def _lfm2(hparams: Hparams) -> Routing:
    return Routing(
        "sigmoid",
        normalizes=hparams.get("norm_topk_prob") is not False,
        factor=float(hparams.get("routed_scaling_factor") or 1),
    )


def _gpt_oss_activation(hparams: Hparams) -> Activation:
    alpha = hparams.get("swiglu_alpha")
    limit = hparams.get("swiglu_limit")
    # 1.702 and 7 are what the model's code has where config.json is silent.
    return Activation(1.702 if alpha is None else float(alpha), 1.0, 7.0 if limit is None else float(limit))


_GRANITE_MULTIPLIERS = {
    "embedding": "embedding_multiplier",
    "attention": "attention_multiplier",
    "residual": "residual_multiplier",
    "logits": "logits_scaling",
}
_NO_WINDOW = {"use_sliding_window": (False, None)}

FAMILIES = (
    Family("OLMoE", ("OlmoeForCausalLM",), _softmax_of_all, {"clip_qkv": (None,), "sliding_window": (None,)}),
    Family("Qwen2-MoE", ("Qwen2MoeForCausalLM",), _softmax_of_all, _NO_WINDOW),
    Family("Qwen3-MoE", ("Qwen3MoeForCausalLM",), _softmax_of_all, _NO_WINDOW),
    Family("Mixtral", ("MixtralForCausalLM",), _softmax_of_chosen, uses_window=True),
    Family(
        "GraniteMoE",
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        _softmax_of_chosen,
        multipliers=_GRANITE_MULTIPLIERS,
    ),
    Family(
        "Phi-3.5-MoE",
        ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
        _sparse_mixer,
        {"num_experts_per_tok": (2, None)},
        uses_window=True,
        has_layer_norm=True,
    ),
    Family(
        "DeepSeek-V2",
        ("DeepseekV2ForCausalLM",),
        _deepseek_v2,
        {"scoring_func": ("softmax", None), "moe_layer_freq": (1, None)},
        is_latent=True,
    ),
    Family(
        "DeepSeek-V3",
        ("DeepseekV3ForCausalLM",),
        _deepseek_v3,
        {"scoring_func": ("sigmoid", None), "moe_layer_freq": (1, None), "rope_interleave": (True, None)},
        is_latent=True,
    ),
    Family("gpt-oss", ("GptOssForCausalLM",), _softmax_of_chosen, activation=_gpt_oss_activation),
    Family(
        "LFM2-MoE",
        ("Lfm2MoeForCausalLM",),
        _lfm2,
        {"conv_bias": (False, None), "use_expert_bias": (True, None)},
        genai_type="lfm2_moe",
    ),
)
