# SPDX-License-Identifier: MIT
"""What a family of models is, to the converter: which fields of config.json become which metadata, and how stored
tensors become tensors of GGUF. One module in `families/` describes each family with these words.

Names of tensors that are only renamed come from gguf's tensor-name map. What llama.cpp's graph of an architecture
takes for granted is listed in `requires`, so a checkpoint that differs is refused and not converted into a model that
answers differently.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgemoe.errors import ConversionError

from ..gguf_file import MetadataValue
from .checkpoint import StoredTensor
from .sources import Constant, Piece, Rows, Source

Metadata = dict[str, MetadataValue]
_Keys = gguf.Keys


@dataclasses.dataclass(frozen=True)
class Hparams:
    """config.json, with errors that name it, and the stored tensors, for rules that need more than one."""

    config: Mapping[str, Any]
    path: Path
    tensors: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)

    def get(self, *names: str) -> Any:
        """The first of these fields that is there and not null; None without one."""
        return next((self.config[name] for name in names if self.config.get(name) is not None), None)

    def need(self, *names: str) -> Any:
        """The first of these fields that is there.

        Raises:
            ConversionError: none is.
        """
        value = self.get(*names)
        if value is None:
            raise ConversionError(
                f"cannot convert the checkpoint: {names[0]} is missing ({self.path}); download it again"
            )
        return value

    def count(self, *names: str) -> int:
        """The first of these fields, a whole number."""
        value = self.need(*names)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConversionError(
                f"cannot convert the checkpoint: {names[0]} is {value!r}, expected a whole number ({self.path}); "
                "download it again"
            )
        return value

    @property
    def n_layers(self) -> int:
        """Layers of the model, without those that only predict more tokens ahead."""
        return self.count("num_hidden_layers", "n_layer", "num_layers")

    @property
    def n_experts(self) -> int:
        """Routed experts of a layer."""
        return self.count("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return int(self.get("head_dim") or self.count("hidden_size") // self.count("num_attention_heads"))

    @property
    def rope(self) -> dict[str, Any]:
        """Parameters of RoPE, whether they stand alone (as published) or in `rope_parameters` (transformers 5).

        Where layers differ, those of full attention.
        """
        rope = self.get("rope_parameters", "rope_scaling") or {}
        rope = dict(rope.get("full_attention", rope))
        if "rope_type" not in rope and "type" in rope:
            rope["rope_type"] = rope["type"]
        for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
            if name not in rope and self.get(name) is not None:
                rope[name] = self.get(name)
        return rope


@dataclasses.dataclass(frozen=True)
class Rule:
    """How stored tensors whose (renamed) names match become pieces.

    Attributes:
        pattern: of the whole name.
        make: called with the stored tensor, the match and the configuration; its pieces have names as Hugging Face
            has them, or as GGUF has them (`blk.…`), and may be experts' (`….experts.<expert>.…`).
    """

    pattern: str
    make: Callable[[StoredTensor, re.Match[str], Hparams], list[Piece]]


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: what people call it.
        architectures: class names in config.json.
        arch: architecture in GGUF.
        keys: GGUF keys (with `{arch}`) of fields that are copied if they are there.
        fixed: GGUF keys with values that are the same for all models of the family.
        computed: further metadata.
        requires: for fields of config.json the values that llama.cpp's graph is made for; None stands for "missing".
        rename: patterns and replacements, applied to each name in turn.
        skip: patterns of names that have no place in the result.
        rules: the first that matches decides; without one, a tensor stays as it is.
        constants: tensors that come from the configuration.
        special_tokens: texts of special tokens that config.json and tokenizer do not say.
        caveats: how llama.cpp is known to differ from transformers, for a configuration.
    """

    name: str
    architectures: tuple[str, ...]
    arch: gguf.MODEL_ARCH
    keys: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, MetadataValue] = dataclasses.field(default_factory=dict)
    computed: Callable[[Hparams], Metadata] = lambda _hparams: {}
    requires: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    rename: tuple[tuple[str, str], ...] = ()
    skip: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    constants: Callable[[Hparams], list[Piece]] = lambda _hparams: []
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    caveats: Callable[[Hparams], list[str]] = lambda _hparams: []

    def check(self, hparams: Hparams) -> None:
        """Refuse configurations that llama.cpp's graph would compute differently.

        Raises:
            ConversionError: a field has a value that it is not made for.
        """
        for field, accepted in self.requires.items():
            value = hparams.get(field)
            if value not in accepted:
                shown = " or ".join("nothing" if choice is None else str(choice) for choice in accepted)
                raise ConversionError(
                    f"cannot convert this {self.name} checkpoint: {field} is {value}, llama.cpp computes the "
                    f"architecture {gguf.MODEL_ARCH_NAMES[self.arch]} with {shown} ({hparams.path}); the result would "
                    "answer differently, so there is none"
                )

    def metadata(self, hparams: Hparams) -> Metadata:
        """All metadata of the architecture."""
        values = _common_metadata(hparams)
        for key, names in self.keys.items():
            if (value := hparams.get(*names)) is not None:
                values[key] = value
        values |= self.fixed
        values |= self.computed(hparams)
        values |= _expert_groups(values, hparams)
        arch = gguf.MODEL_ARCH_NAMES[self.arch]
        return {key.format(arch=arch): _as_written(key, value) for key, value in values.items()}


_FLOAT_KEYS = frozenset(
    {
        _Keys.Attention.LAYERNORM_RMS_EPS,
        _Keys.Attention.SCALE,
        _Keys.LLM.EMBEDDING_SCALE,
        _Keys.LLM.RESIDUAL_SCALE,
        _Keys.LLM.LOGIT_SCALE,
        _Keys.LLM.EXPERT_WEIGHTS_SCALE,
        _Keys.Rope.FREQ_BASE,
        _Keys.Rope.SCALING_FACTOR,
        _Keys.Rope.SCALING_ATTN_FACTOR,
        _Keys.Rope.SCALING_YARN_LOG_MUL,
        _Keys.Rope.SCALING_YARN_EXT_FACTOR,
        _Keys.Rope.SCALING_YARN_ATTN_FACTOR,
        _Keys.Rope.SCALING_YARN_BETA_FAST,
        _Keys.Rope.SCALING_YARN_BETA_SLOW,
    }
)


def _expert_groups(values: Metadata, hparams: Hparams) -> Metadata:
    """Groups of experts as llama.cpp takes them: where none is left out, as none, since it stops the process at them.

    Raises:
        ConversionError: experts cannot be divided so.
    """
    n_groups, n_used = values.get(_Keys.LLM.EXPERT_GROUP_COUNT), values.get(_Keys.LLM.EXPERT_GROUP_USED_COUNT)
    if n_groups is None or n_groups == 1:
        return {}
    n_experts = hparams.n_experts
    if not (isinstance(n_groups, int) and isinstance(n_used, int) and 1 <= n_used <= n_groups) or n_experts % n_groups:
        raise ConversionError(
            f"cannot convert the checkpoint: {n_experts} experts in {n_groups} groups of which {n_used} are used, "
            f"expected groups of one size ({hparams.path}); download it again"
        )
    if n_used == n_groups:
        return {_Keys.LLM.EXPERT_GROUP_COUNT: 1, _Keys.LLM.EXPERT_GROUP_USED_COUNT: 1}
    if n_groups == n_experts:
        raise ConversionError(
            f"cannot convert the checkpoint: each of {n_experts} experts is a group, llama.cpp ranks groups by their "
            f"two best experts ({hparams.path}); the result would not load, so there is none"
        )
    return {}


def _as_written(key: str, value: MetadataValue) -> MetadataValue:
    """JSON writes 10000 for 10000.0; llama.cpp refuses an integer where it expects a float."""
    return float(value) if key in _FLOAT_KEYS and isinstance(value, int) else value


def _common_metadata(hparams: Hparams) -> Metadata:
    """What nearly all architectures have."""
    values: Metadata = {
        _Keys.LLM.BLOCK_COUNT: hparams.n_layers,
        _Keys.LLM.CONTEXT_LENGTH: hparams.count("max_position_embeddings", "n_positions"),
        _Keys.LLM.EMBEDDING_LENGTH: hparams.count("hidden_size"),
        _Keys.LLM.FEED_FORWARD_LENGTH: hparams.count("intermediate_size"),
        _Keys.LLM.VOCAB_SIZE: hparams.count("vocab_size"),
        _Keys.Attention.HEAD_COUNT: hparams.count("num_attention_heads"),
        _Keys.Attention.HEAD_COUNT_KV: hparams.count("num_key_value_heads", "num_attention_heads"),
        _Keys.Attention.LAYERNORM_RMS_EPS: float(hparams.need("rms_norm_eps", "norm_eps", "layer_norm_eps")),
        _Keys.LLM.EXPERT_COUNT: hparams.n_experts,
        _Keys.LLM.EXPERT_USED_COUNT: hparams.count("num_experts_per_tok", "num_experts_per_token", "moe_k"),
    }
    if hparams.get("head_dim") is not None:
        values[_Keys.Attention.KEY_LENGTH] = values[_Keys.Attention.VALUE_LENGTH] = hparams.count("head_dim")
    return values | _rope_metadata(hparams)


def _rope_metadata(hparams: Hparams) -> Metadata:
    rope = hparams.rope
    values: Metadata = {}
    if (theta := rope.get("rope_theta")) is not None:
        values[_Keys.Rope.FREQ_BASE] = float(theta)
    kind = str(rope.get("rope_type") or "default").lower()
    if kind in ("linear", "yarn"):
        values[_Keys.Rope.SCALING_TYPE] = kind
        values[_Keys.Rope.SCALING_FACTOR] = float(_need(rope, "factor", hparams))
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or hparams.count("max_position_embeddings")
        values[_Keys.Rope.SCALING_ORIG_CTX_LEN] = int(original)
        for key, names in _YARN_FIELDS.items():
            if (value := next((rope[name] for name in names if rope.get(name) is not None), None)) is not None:
                values[key] = float(value)
    elif kind in ("longrope", "su"):
        values[_Keys.Rope.SCALING_TYPE] = "longrope"
    elif kind not in ("default", "linear", "llama3"):
        raise ConversionError(
            f"cannot convert the checkpoint: its RoPE is of the type {kind}, expected default, linear, yarn, longrope "
            f"or llama3 ({hparams.path}); llama.cpp has no other"
        )
    return values


_YARN_FIELDS = {
    _Keys.Rope.SCALING_YARN_EXT_FACTOR: ("extrapolation_factor",),
    _Keys.Rope.SCALING_YARN_ATTN_FACTOR: ("attention_factor", "attn_factor"),
    _Keys.Rope.SCALING_YARN_BETA_FAST: ("beta_fast",),
    _Keys.Rope.SCALING_YARN_BETA_SLOW: ("beta_slow",),
}


def _need(rope: Mapping[str, Any], name: str, hparams: Hparams) -> Any:
    if rope.get(name) is None:
        raise ConversionError(f"cannot convert the checkpoint: {name} of its RoPE is missing ({hparams.path})")
    return rope[name]


def interleave_heads(heads: str) -> Callable[[StoredTensor, re.Match[str], Hparams], list[Piece]]:
    """A rule's `make`: reorder the rows of each head for ggml's `llama` kind of RoPE; `heads` counts them."""

    def make(tensor: StoredTensor, match: re.Match[str], hparams: Hparams) -> list[Piece]:
        n_heads = hparams.count(heads, "num_attention_heads")
        n_elements = tensor.n_rows if len(tensor.shape) > 1 else tensor.n_columns
        if n_elements % (2 * n_heads):
            raise ConversionError(
                f"cannot convert {tensor.name}: its {n_elements} rows are no {n_heads} heads of even size ({heads}, "
                f"{tensor.path}); config.json and weights are of different models"
            )
        return [Piece(match.string, tensor.shape, (Rows(tensor, n_heads=n_heads),))]

    return make


ROTARY_RULES = (
    Rule(r".*\.q_proj\.weight", interleave_heads("num_attention_heads")),
    Rule(r".*\.k_proj\.weight", interleave_heads("num_key_value_heads")),
)


def split_halves(first: str, second: str) -> Callable[[StoredTensor, re.Match[str], Hparams], list[Piece]]:
    """A rule's `make`: the first half of the rows (of each expert, with three dimensions) and the second are two
    tensors; their names may refer to groups of the pattern."""

    def make(tensor: StoredTensor, match: re.Match[str], _hparams: Hparams) -> list[Piece]:
        n_rows = tensor.shape[-2]
        n_matrices = tensor.n_rows // n_rows
        shape = (*tensor.shape[:-2], n_rows // 2, tensor.shape[-1])
        pieces = []
        for name, shift in ((first, 0), (second, n_rows // 2)):
            starts = [matrix * n_rows + shift for matrix in range(n_matrices)]
            sources: tuple[Source, ...] = tuple(Rows(tensor, range(start, start + n_rows // 2)) for start in starts)
            pieces.append(Piece(match.expand(name), shape, sources))
        return pieces

    return make


def renamed(name: str) -> Callable[[StoredTensor, re.Match[str], Hparams], list[Piece]]:
    """A rule's `make`: another name, which may refer to groups of the pattern."""

    def make(tensor: StoredTensor, match: re.Match[str], _hparams: Hparams) -> list[Piece]:
        return [Piece(match.expand(name), tensor.shape, (Rows(tensor),))]

    return make


def flattened(tensor: StoredTensor, match: re.Match[str], _hparams: Hparams) -> list[Piece]:
    """A rule's `make`: without the dimensions of size 1."""
    shape = tuple(size for size in tensor.shape if size != 1)
    if shape and shape[-1] == tensor.n_columns:
        return [Piece(match.string, shape, (Rows(tensor),))]
    return [Piece(match.string, shape, (Rows(tensor, transpose=True),))]


def constant(name: str, values: list[float]) -> Piece:
    """A tensor of one dimension from the configuration."""
    return Piece(name, (len(values),), (Constant(np.array([values], np.float32)),))


FUSED_EXPERT_RULES = (
    # transformers 5 has all experts of a layer in one tensor; published checkpoints have one for each.
    Rule(r"(.*\.experts)\.gate_up_proj(\.weight)?", split_halves(r"\1.gate_proj.weight", r"\1.up_proj.weight")),
    Rule(r"(.*\.experts)\.(down_proj|gate_proj|up_proj)", renamed(r"\1.\2.weight")),
)
