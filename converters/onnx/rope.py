# SPDX-License-Identifier: MIT
"""Tables of rotary position embeddings (RoFormer, arXiv 2104.09864), in float32 as transformers computes them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from edgemoe.errors import ConversionError

from ..hf.checkpoint import Floats
from ..hf.family import Hparams


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies, and what scales the tables.

    Attributes:
        frequencies: float32 (rotated dimensions / 2), radians a position.
        factor: of cosines and sines.
        n_positions: for which it holds.
    """

    frequencies: Floats
    factor: float
    n_positions: int

    def tables(self) -> tuple[Floats, Floats]:
        """Cosines and sines: float32 (n_positions, rotated dimensions / 2)."""
        angles = np.arange(self.n_positions, dtype=np.float32)[:, None] * self.frequencies
        return np.cos(angles) * np.float32(self.factor), np.sin(angles) * np.float32(self.factor)


def find_rope(hparams: Hparams, n_dims: int, max_positions: int) -> Rope:
    """What config.json says, for `n_dims` rotated dimensions and no more than `max_positions`.

    Raises:
        ConversionError: the kind of scaling is not known, or a field of it is missing.
    """
    rope = hparams.rope
    kind = str(rope.get("rope_type") or "default").lower()
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ConversionError(
            f"cannot convert the checkpoint: partial_rotary_factor is {rope['partial_rotary_factor']}, expected 1 "
            f"({hparams.path})"
        )
    theta = float(_need(rope, "rope_theta", hparams))
    n_positions = min(hparams.count("max_position_embeddings"), max_positions)
    exponents = np.arange(0, n_dims, 2, dtype=np.float32) / np.float32(n_dims)
    plain = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    if kind == "default":
        return Rope(plain, 1.0, n_positions)
    if kind == "linear":
        return Rope(plain / np.float32(_need(rope, "factor", hparams)), 1.0, n_positions)
    if kind == "llama3":
        return Rope(_llama3(rope, plain, hparams), 1.0, n_positions)
    if kind == "yarn":
        frequencies, factor = _yarn(rope, plain, n_dims, theta, hparams)
        return Rope(frequencies, factor, n_positions)
    if kind in ("longrope", "su"):
        return _longrope(rope, plain, n_positions, hparams)
    raise ConversionError(
        f"cannot convert the checkpoint: its RoPE is of the type {kind}, expected default, linear, llama3, yarn or "
        f"longrope ({hparams.path})"
    )


def softmax_factor(hparams: Hparams) -> float:
    """What DeepSeek multiplies attention's scale with, under YaRN."""
    rope = hparams.rope
    mscale = rope.get("mscale_all_dim")
    if str(rope.get("rope_type") or "default") == "default" or not mscale:
        return 1.0
    return _mscale(float(_need(rope, "factor", hparams)), float(mscale)) ** 2


def _mscale(scale: float, mscale: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _yarn(rope: dict[str, Any], plain: Floats, n_dims: int, theta: float, hparams: Hparams) -> tuple[Floats, float]:
    """YaRN (arXiv 2309.00071), sections 3.2 and 3.4."""
    scale = float(_need(rope, "factor", hparams))
    original = int(rope.get("original_max_position_embeddings") or hparams.count("max_position_embeddings"))

    def dimension(n_rotations: float) -> float:
        return n_dims * math.log(original / (n_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(float(rope.get("beta_fast") or 32)), dimension(float(rope.get("beta_slow") or 1))
    if rope.get("truncate") is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_dims - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(n_dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    frequencies = plain / np.float32(scale) * ramp + plain * (1 - ramp)
    factor = rope.get("attention_factor")
    if factor is None:
        mscale, all_dims = float(rope.get("mscale") or 0), float(rope.get("mscale_all_dim") or 0)
        both = mscale and all_dims
        factor = _mscale(scale, mscale) / _mscale(scale, all_dims) if both else _mscale(scale)
    return frequencies.astype(np.float32), float(factor)


def _llama3(rope: dict[str, Any], plain: Floats, hparams: Hparams) -> Floats:
    """Llama 3.1's: low frequencies divided, those between mixed."""
    factor, low, high = (float(_need(rope, n, hparams)) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(_need(rope, "original_max_position_embeddings", hparams))
    lengths = 2 * math.pi / plain
    smooth = (original / lengths - low) / (high - low)
    mixed = (1 - smooth) * plain / factor + smooth * plain
    result = np.where(lengths > original / low, plain / factor, plain)
    is_medium = (lengths >= original / high) & (lengths <= original / low)
    return np.where(is_medium, mixed, result).astype(np.float32)


def _longrope(rope: dict[str, Any], plain: Floats, n_positions: int, hparams: Hparams) -> Rope:
    """LongRoPE (arXiv 2402.13753), up to the original length: beyond it the model takes other frequencies for all
    positions, which a table cannot say."""
    original = int(_need(rope, "original_max_position_embeddings", hparams))
    scale = hparams.count("max_position_embeddings") / original
    factor = rope.get("short_mscale") or rope.get("attention_factor")
    if factor is None:
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    short = np.asarray(_need(rope, "short_factor", hparams), np.float32)
    if short.shape != plain.shape:
        raise ConversionError(
            f"cannot convert the checkpoint: short_factor of its RoPE has {short.size} numbers, expected {plain.size} "
            f"({hparams.path})"
        )
    return Rope(plain / short, float(factor), min(n_positions, original))


def _need(rope: dict[str, Any], name: str, hparams: Hparams) -> Any:
    if rope.get(name) is None:
        raise ConversionError(f"cannot convert the checkpoint: {name} of its RoPE is missing ({hparams.path})")
    return rope[name]
