# SPDX-License-Identifier: MIT
"""Which type each tensor gets under a name that users know, such as Q4_K_M.

A preset is a base type and rules that give some tensors more or fewer bits. The rules are llama.cpp's, so that a preset
means here what it means there: `src/llama-quant.cpp` of the version that edgemoe is pinned to. The tests compare the
type of every tensor with what that version's `llama_model_quantize` writes.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import gguf
from gguf import GGMLQuantizationType as GgmlType

from edgemoe.errors import ConversionError

from .blocks import PLAIN, block_values


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to choose a type for.

    Attributes:
        name: GGUF's, such as `blk.3.ffn_down_exps.weight`.
        shape: outermost first, the length of a row last: experts are (n_experts, n_rows, n_columns).
        kept_type: what it has if it is not to be quantized: F32 for norms and routers, or the type of the source.
    """

    name: str
    shape: tuple[int, ...]
    kept_type: GgmlType = GgmlType.F32


@dataclasses.dataclass(frozen=True)
class Model:
    """What the rules ask of a model.

    Attributes:
        architecture: llama.cpp's name (`general.architecture`).
        n_layers: `<architecture>.block_count`, layers of multi-token prediction among them.
        n_experts: `<architecture>.expert_count`; 0 for a dense model.
        n_heads, n_heads_kv: attention heads of the first layer, and heads of its keys and values (0 if it has none).
    """

    architecture: str
    n_layers: int
    n_experts: int
    n_heads: int
    n_heads_kv: int

    @property
    def heads_per_kv(self) -> int:
        return self.n_heads // self.n_heads_kv if self.n_heads_kv else 0


@dataclasses.dataclass(frozen=True)
class Override:
    """A type for the tensors whose name the regular expression `pattern` finds, instead of the preset's."""

    pattern: str
    ggml_type: GgmlType


@dataclasses.dataclass(frozen=True)
class Choice:
    """The type of every tensor.

    Attributes:
        types: by the tensor's name.
        fallbacks: for tensors whose rows the chosen type's blocks do not divide: the type that was chosen. `types` has
            the type that is used instead.
    """

    types: Mapping[str, GgmlType]
    fallbacks: Mapping[str, GgmlType]


class _Role(enum.Enum):
    EMBEDDING = enum.auto()
    OUTPUT = enum.auto()
    QUERY = enum.auto()
    KEY = enum.auto()
    VALUE = enum.auto()  # values alone, or with queries and keys, or in MLA's compressed form
    ATTENTION_OUTPUT = enum.auto()
    FFN_UP = enum.auto()
    FFN_GATE = enum.auto()
    FFN_DOWN = enum.auto()
    OTHER = enum.auto()


_ROLES = (  # the first that the name contains; sparse upcycling, shared experts and experts have one role
    ("attn_qkv.weight", _Role.VALUE),
    ("attn_kv_b.weight", _Role.VALUE),
    ("attn_v.weight", _Role.VALUE),
    ("attn_k.weight", _Role.KEY),
    ("attn_q.weight", _Role.QUERY),
    ("attn_output.weight", _Role.ATTENTION_OUTPUT),
    ("ffn_up", _Role.FFN_UP),
    ("ffn_gate", _Role.FFN_GATE),
    ("ffn_down", _Role.FFN_DOWN),
)

_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *(f"time_mix_{part}.weight" for part in "first w0 w1 w2 v0 v1 v2 a0 a1 a2 g1 g2 decay_w1 decay_w2".split()),
    *("time_mix_lerp_fused.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos"),
    *(".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
)
"""Parts of the names of matrices that keep their type: small, and what depends on them is sensitive (routers first)."""

_KEPT_WHOLE = frozenset({"position_embd.weight", "token_types.weight"})

_BASE = {
    **{name: GgmlType[name] for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "Q2_K")},
    **{name: GgmlType[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ3_S")},
    **{name: GgmlType[name] for name in ("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "Q1_0")},
    "Q2_K_S": GgmlType.Q2_K,
    "Q3_K_S": GgmlType.Q3_K,
    "Q3_K_M": GgmlType.Q3_K,
    "Q3_K_L": GgmlType.Q3_K,
    "Q4_K_S": GgmlType.Q4_K,
    "Q4_K_M": GgmlType.Q4_K,
    "Q5_K_S": GgmlType.Q5_K,
    "Q5_K_M": GgmlType.Q5_K,
    "IQ2_S": GgmlType.IQ2_XS,
    "IQ2_M": GgmlType.IQ2_S,
    "IQ3_XS": GgmlType.IQ3_S,
    "IQ3_M": GgmlType.IQ3_S,
    "MXFP4_MOE": GgmlType.MXFP4,
}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}

PRESETS = tuple(_BASE)
"""The names; `find_preset` takes other spellings too."""

_SMALLEST = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
_FALLBACK = {
    **dict.fromkeys(
        [GgmlType[f"IQ{name}"] for name in ("1_S", "1_M", "2_XXS", "2_XS", "2_S", "3_XXS", "3_S", "4_XS")],
        GgmlType.IQ4_NL,
    ),
    **dict.fromkeys([GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.TQ1_0, GgmlType.TQ2_0], GgmlType.Q4_0),
    GgmlType.Q4_K: GgmlType.Q5_0,
    GgmlType.Q5_K: GgmlType.Q5_1,
    GgmlType.Q6_K: GgmlType.Q8_0,
}
"""Types of 32 values a block that stand in for those of 256, where a row is no multiple of 256."""

_SMALL_BLOCK = 32
"""What the fallbacks have; a row that even this does not divide becomes F16."""

_UNKNOWN_RULES = frozenset({"falcon", "glm5-next", "bailingmoe3"})
"""Architectures for which llama.cpp has rules of its own that are not here."""

_LARGE_DENSE_LAYERS = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
"""Layers of what llama.cpp calls a 70B model; of `llama`, only those with fewer key heads than heads."""


def find_preset(name: str) -> str:
    """The preset of that name in any case; Q4_K stands for Q4_K_M, MXFP4 for MXFP4_MOE, as in llama.cpp.

    Raises:
        ConversionError: there is none.
    """
    found = _ALIASES.get(name.upper(), name.upper())
    if found not in _BASE:
        raise ConversionError(f"cannot quantize to {name!r}: no such preset; use one of {', '.join(PRESETS)}")
    return found


def file_type(preset: str) -> int:
    """The value of `general.file_type` that says so: llama.cpp's number of the preset."""
    prefix = "ALL" if preset == "F32" else "MOSTLY"
    return int(gguf.LlamaFileType[f"{prefix}_{preset}"])


def is_quantizable(tensor: Tensor) -> bool:
    """Whether a preset or an override may change the tensor's type at all."""
    return (
        sum(size > 1 for size in tensor.shape[:-1]) > 0
        and tensor.name.endswith("weight")
        and tensor.name not in _KEPT_WHOLE
        and not any(part in tensor.name for part in _KEPT)
    )


def choose_types(
    preset: str,
    tensors: Sequence[Tensor],
    model: Model,
    *,
    importance_of: Collection[str] = (),
    overrides: Sequence[Override] = (),
) -> Choice:
    """The type of every tensor under a preset.

    Rows that the blocks of a type do not divide get one with smaller blocks, or F16.

    Args:
        preset: a name that `find_preset` returns.
        tensors: all tensors of the model: some rules ask how many there are.
        model: what else the rules ask.
        importance_of: names of the tensors that have an importance; some rules give fewer bits then.
        overrides: types that come before the preset's; the first whose pattern the name has.

    Raises:
        ConversionError: a type is too coarse for a tensor without an importance; or has blocks that a row is no
            multiple of, and no stand-in; an override finds no tensor; or llama.cpp has rules for the architecture
            that are unknown here.
    """
    base = _BASE[preset]
    if model.architecture in _UNKNOWN_RULES and base not in PLAIN:
        raise ConversionError(
            f"cannot choose types of {preset} for {model.architecture}: llama.cpp has rules of its own for it that "
            "are not known here; use F32, F16 or BF16, and llama-quantize on the result"
        )
    patterns = [(_compiled(override.pattern), override) for override in overrides]
    unused = {override.pattern for override in overrides}
    chooser = _Chooser(preset, base, model, tensors, has_importance=bool(importance_of))
    types: dict[str, GgmlType] = {}
    fallbacks: dict[str, GgmlType] = {}
    for tensor in sorted(tensors, key=_file_order):
        if not is_quantizable(tensor):
            types[tensor.name] = tensor.kept_type
            continue
        found = next((override for pattern, override in patterns if pattern.search(tensor.name)), None)
        if found is not None:
            unused.discard(found.pattern)
            wanted = found.ggml_type
        else:
            wanted = base if base in PLAIN else chooser.type_of(tensor)
        used = fitting_type(wanted, tensor.shape[-1])
        if used is not wanted:
            fallbacks[tensor.name] = wanted
        if tensor.name not in importance_of and _is_garbage_without_importance(preset, tensor.name, used):
            raise ConversionError(
                f"cannot quantize {tensor.name} to {used.name} ({preset}): it needs an importance matrix, found none; "
                "collect one on a calibration text (--imatrix), or use a preset of more bits"
            )
        types[tensor.name] = used
    if unused:
        raise ConversionError(
            f"cannot apply the type of the pattern {sorted(unused)[0]!r}: no tensor that may be quantized is left for "
            "it; check the names, and whether an earlier pattern takes them"
        )
    return Choice({tensor.name: types[tensor.name] for tensor in tensors}, fallbacks)


def fitting_type(ggml_type: GgmlType, n_columns: int) -> GgmlType:
    """The type, or the one that llama.cpp puts in its place where its blocks do not divide a row.

    Raises:
        ConversionError: there is none in its place.
    """
    n_values = block_values(ggml_type)
    if n_columns % n_values == 0:
        return ggml_type
    if n_values > _SMALL_BLOCK and ggml_type not in _FALLBACK:
        raise ConversionError(
            f"cannot use {ggml_type.name}: found rows of {n_columns} values, expected a multiple of {n_values}, and no "
            "type stands in for it; use another preset"
        )
    smaller = _FALLBACK.get(ggml_type, ggml_type)
    return smaller if n_columns % block_values(smaller) == 0 else GgmlType.F16


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConversionError(f"cannot read the pattern {pattern!r}: {error}; write a regular expression") from error


def _file_order(tensor: Tensor) -> tuple[int, bytes]:
    """Layer by layer, and by name: the order in which llama.cpp counts tensors, whatever that of the file."""
    layer = _layer_of(tensor.name)
    return (-1 if layer is None else layer, tensor.name.encode())


def _layer_of(name: str) -> int | None:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _role_of(name: str) -> _Role:
    if name == "output.weight":
        return _Role.OUTPUT
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return _Role.EMBEDDING
    return next((role for part, role in _ROLES if part in name), _Role.OTHER)


def _is_garbage_without_importance(preset: str, name: str, ggml_type: GgmlType) -> bool:
    """What llama.cpp refuses to write without an importance; embeddings and output are exempt."""
    if _role_of(name) in (_Role.EMBEDDING, _Role.OUTPUT):
        return False
    return ggml_type in (
        {GgmlType.IQ3_XXS, GgmlType.IQ2_XXS, GgmlType.IQ2_XS, GgmlType.IQ2_S, GgmlType.IQ1_M, GgmlType.IQ1_S}
        | ({GgmlType.Q2_K} if preset == "Q2_K_S" else set())
    )


def _is_edge_or_third(index: int, count: int) -> bool:
    """The first and last eighth, and every third between: the layers that the `_M` presets give more bits."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


class _Chooser:
    """The rules of one preset, asked for tensor after tensor in file order."""

    def __init__(
        self, preset: str, base: GgmlType, model: Model, tensors: Iterable[Tensor], *, has_importance: bool
    ) -> None:
        names = [tensor.name for tensor in tensors]
        self._preset = preset
        self._base = base
        self._model = model
        self._has_importance = has_importance
        self._is_tied = "output.weight" not in names
        self._n_values = sum(_role_of(name) is _Role.VALUE for name in names)
        self._is_8_experts = model.n_experts == 8  # Mixtral, for which attention is a small part of the whole
        self._n_seen = dict.fromkeys(_Role, 0)

    def type_of(self, tensor: Tensor) -> GgmlType:
        """The preset's type of a tensor that may be quantized, whatever its shape."""
        role = _role_of(tensor.name)
        index = self._n_seen[role]
        self._n_seen[role] += 1
        if role is _Role.OUTPUT or (role is _Role.EMBEDDING and self._is_tied):
            return self._output_type(tensor.shape[-1])
        if self._preset == "MXFP4_MOE":
            is_stack = len(tensor.shape) > 2 and tensor.shape[-3] > 1
            return GgmlType.MXFP4 if is_stack else GgmlType.Q8_0
        if role is _Role.EMBEDDING:
            return self._embedding_type()
        if self._preset in _SMALLEST:
            return self._smallest_type(role, index)
        if role is _Role.VALUE:
            return self._value_type(index)
        if role in (_Role.KEY, _Role.QUERY):
            if role is _Role.KEY and self._is_8_experts:
                return GgmlType.Q8_0
            return {"IQ3_XS": GgmlType.IQ3_XXS, "IQ3_XXS": GgmlType.IQ2_S}.get(self._preset, self._base)
        if role is _Role.ATTENTION_OUTPUT:
            return self._attention_output_type()
        if role is _Role.FFN_DOWN:
            return self._down_type(self._layer(tensor.name, index))
        if role in (_Role.FFN_GATE, _Role.FFN_UP):
            layer, n_layers = self._layer(tensor.name, index), self._model.n_layers
            if self._preset == "IQ3_XS" and n_layers // 8 <= layer < 7 * n_layers // 8:
                return GgmlType.IQ3_XXS
        return self._base

    def _layer(self, name: str, index: int) -> int:
        """The tensor's layer: with experts by its name, else how many of its role came before."""
        if self._model.n_experts <= 1:
            return index
        layer = _layer_of(name)
        if layer is None or layer >= self._model.n_layers:
            raise ConversionError(
                f"cannot choose a type for {name}: found layer {layer}, expected 0 to {self._model.n_layers - 1} "
                "(block_count); is the metadata that of another model?"
            )
        return layer

    def _output_type(self, n_columns: int) -> GgmlType:
        if self._preset == "MXFP4_MOE" or n_columns % block_values(self._base):
            return GgmlType.Q8_0
        if self._preset in _SMALLEST or self._preset == "IQ3_XXS":
            return GgmlType.Q5_K
        return GgmlType.Q8_0 if self._base is GgmlType.Q8_0 else GgmlType.Q6_K

    def _embedding_type(self) -> GgmlType:
        return {
            **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), GgmlType.Q2_K),
            **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), GgmlType.IQ3_S),
            **dict.fromkeys(("TQ1_0", "TQ2_0"), GgmlType.Q4_K),
        }.get(self._preset, self._base)

    def _smallest_type(self, role: _Role, index: int) -> GgmlType:
        is_2_bit = self._preset in ("IQ2_S", "IQ2_M")
        more = GgmlType.IQ3_S if is_2_bit else GgmlType.Q2_K
        if role is _Role.VALUE:
            return GgmlType.Q4_K if self._model.heads_per_kv >= 4 or self._model.n_experts >= 4 else more
        if role is _Role.KEY and self._is_8_experts:
            return GgmlType.Q4_K
        if role is _Role.FFN_DOWN and index < self._model.n_layers // 8:
            return more
        if role is _Role.ATTENTION_OUTPUT:
            if self._is_8_experts:
                return GgmlType.Q5_K
            if is_2_bit:
                return GgmlType.IQ3_S
            if self._preset in ("IQ1_S", "IQ1_M"):
                return GgmlType.IQ2_XXS
        return self._base

    def _value_type(self, index: int) -> GgmlType:
        if self._is_8_experts:
            return GgmlType.Q8_0
        chosen = self._ordinary_value_type(index)
        is_large = _LARGE_DENSE_LAYERS.get(self._model.architecture) == self._model.n_layers and (
            self._model.architecture != "llama" or self._model.n_heads != self._model.n_heads_kv
        )
        return GgmlType.Q5_K if is_large and chosen in (GgmlType.Q3_K, GgmlType.Q4_K) else chosen

    def _ordinary_value_type(self, index: int) -> GgmlType:
        is_shared = self._model.heads_per_kv >= 4  # then values are small and serve many heads
        preset = self._preset
        if preset == "Q2_K":
            return GgmlType.Q4_K if is_shared else GgmlType.Q3_K
        if preset == "IQ3_XXS" and not is_shared:
            return GgmlType.IQ3_XXS if self._has_importance else GgmlType.IQ3_S
        if preset == "IQ3_M" or (is_shared and preset in ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S")):
            return GgmlType.Q4_K
        if preset == "Q3_K_M":
            return GgmlType.Q5_K if index < 2 else GgmlType.Q4_K
        if preset == "Q3_K_L" or (is_shared and preset in ("IQ4_NL", "IQ4_XS")) or (preset == "Q4_K_S" and index < 4):
            return GgmlType.Q5_K
        if preset in ("Q4_K_M", "Q5_K_M") and _is_edge_or_third(index, self._n_values):
            return GgmlType.Q6_K
        return self._base

    def _attention_output_type(self) -> GgmlType:
        if self._is_8_experts:
            raised = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
            is_raised = self._preset in raised or self._preset.startswith(("IQ3", "IQ4"))
            return GgmlType.Q5_K if is_raised else self._base
        return {
            "Q2_K": GgmlType.Q3_K,
            "IQ3_XXS": GgmlType.IQ3_S,
            "Q3_K_M": GgmlType.Q4_K,
            "Q3_K_L": GgmlType.Q5_K,
            "IQ3_M": GgmlType.Q4_K,
        }.get(self._preset, self._base)

    def _down_type(self, layer: int) -> GgmlType:
        n_layers, preset = self._model.n_layers, self._preset
        is_early = layer < n_layers // 8
        is_chosen = _is_edge_or_third(layer, n_layers)
        if preset == "Q2_K":
            return GgmlType.Q3_K
        if preset == "IQ3_XXS" and not self._has_importance:
            return GgmlType.Q4_K if is_early else GgmlType.Q3_K
        if preset == "Q3_K_M":
            return GgmlType.Q5_K if layer < n_layers // 16 else GgmlType.Q4_K
        if preset == "Q3_K_L":
            return GgmlType.Q5_K
        if preset in ("Q4_K_M", "Q5_K_M") and is_chosen:
            return GgmlType.Q6_K
        if preset == "IQ3_M" and (is_early or (self._is_8_experts and is_chosen)):
            return GgmlType.Q4_K
        if not is_early:
            return self._base
        if preset in ("IQ4_NL", "IQ4_XS") and not self._has_importance:
            return GgmlType.Q5_K
        if self._has_importance and preset in ("Q4_0", "Q5_0"):  # the first layers suffer most from a weighted fit
            return GgmlType.Q4_1 if preset == "Q4_0" else GgmlType.Q5_1
        return {"Q2_K_S": GgmlType.Q4_K, "Q4_K_S": GgmlType.Q5_K}.get(preset, self._base)
