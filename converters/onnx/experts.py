# SPDX-License-Identifier: MIT
"""The experts of a layer, one by one, in whatever form a checkpoint has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from edgemoe.errors import ConversionError

from ..hf.checkpoint import Bytes, Checkpoint, Floats, StoredTensor
from ..hf.sources import MXFP4_BLOCK, Mxfp4Rows, Rows
from .weights import Weights

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The numbers of 4-bit floats (OCP Microscaling Formats 1.0, section 5.3.3)."""

_ONE_BY_ONE = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED = (("experts.gate_up_proj", "experts.down_proj"), ("input_linear.weight", "output_linear.weight"))

Matrix = Callable[[int], Floats]
"""The matrix of an expert: float32 (rows, columns)."""


@dataclasses.dataclass(frozen=True)
class Experts:
    """A layer's routed experts.

    Attributes:
        inter: rows of gate and of up.
        gate_up: rows of gate and up alternating, (2 * inter, hidden), as QMoE wants them.
        down: (hidden, inter).
        gate_up_bias, down_bias: float32 (experts, rows), the former alternating too; None without.
    """

    inter: int
    gate_up: Matrix
    down: Matrix
    gate_up_bias: Floats | None = None
    down_bias: Floats | None = None


def find_experts(weights: Weights, prefix: str, n_experts: int, hidden: int) -> Experts:
    """The experts under a name such as `model.layers.0.mlp`.

    Raises:
        ConversionError: a matrix is missing, has another shape than the others, or has a form that is not known.
    """
    experts = f"{prefix}.experts"
    for names in _ONE_BY_ONE:
        if weights.has(f"{experts}.0.{names[0]}.weight"):
            return _one_by_one(weights, experts, names, n_experts, hidden)
    if weights.has(f"{experts}.gate_up_proj_bias"):
        return _alternating(weights, experts, n_experts, hidden)
    for first, second in _FUSED:
        if weights.has(f"{prefix}.{first}"):
            return _fused(weights, f"{prefix}.{first}", f"{prefix}.{second}", n_experts, hidden)
    raise ConversionError(
        f"cannot convert {weights.checkpoint.folder}: found no experts under {prefix}; a file of the checkpoint is "
        "missing: download it again"
    )


def alternate(gate: Floats, up: Floats) -> Floats:
    """Rows of both, one after the other in turn."""
    return np.stack([gate, up], axis=1).reshape(2 * len(gate), gate.shape[1])


def _one_by_one(weights: Weights, experts: str, names: tuple[str, str, str], n_experts: int, hidden: int) -> Experts:
    inter = weights.need(f"{experts}.0.{names[0]}.weight").n_rows
    shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
    gates, ups, downs = (
        [weights.need(f"{experts}.{expert}.{name}.weight", shape) for expert in range(n_experts)]
        for name, shape in zip(names, shapes, strict=True)
    )
    read = weights.checkpoint.read_rows
    return Experts(
        inter,
        lambda expert: alternate(read(gates[expert], 0, inter), read(ups[expert], 0, inter)),
        lambda expert: read(downs[expert], 0, hidden),
    )


def _fused(weights: Weights, first: str, second: str, n_experts: int, hidden: int) -> Experts:
    gate_ups = weights.need(first)
    inter = gate_ups.shape[1] // 2 if len(gate_ups.shape) == 3 else 0
    weights.need(first, (n_experts, 2 * inter, hidden))
    downs = weights.need(second, (n_experts, hidden, inter))
    read = weights.checkpoint.read_rows

    def gate_up(expert: int) -> Floats:
        both = read(gate_ups, expert * 2 * inter, (expert + 1) * 2 * inter)
        return alternate(both[:inter], both[inter:])

    return Experts(inter, gate_up, lambda expert: read(downs, expert * hidden, (expert + 1) * hidden))


def _alternating(weights: Weights, experts: str, n_experts: int, hidden: int) -> Experts:
    """gpt-oss: rows alternate already; MXFP4, or floats that are transposed."""
    biases = weights.need(f"{experts}.gate_up_proj_bias")
    inter = biases.n_columns // 2
    weights.need(f"{experts}.gate_up_proj_bias", (n_experts, 2 * inter))
    down_biases = weights.need(f"{experts}.down_proj_bias", (n_experts, hidden))
    matrices = []
    for name, shape in (("gate_up_proj", (2 * inter, hidden)), ("down_proj", (hidden, inter))):
        if weights.has(f"{experts}.{name}_blocks"):
            matrices.append(_from_mxfp4(weights, f"{experts}.{name}", n_experts, *shape))
        else:
            tensor = weights.need(f"{experts}.{name}", (n_experts, *shape[::-1]))
            matrices.append(_transposed(weights.checkpoint, tensor, shape[1]))
    read = weights.checkpoint.read_rows
    return Experts(inter, matrices[0], matrices[1], read(biases, 0, n_experts), read(down_biases, 0, n_experts))


def _transposed(checkpoint: Checkpoint, tensor: StoredTensor, n_inputs: int) -> Matrix:
    def matrix(expert: int) -> Floats:
        source = Rows(tensor, range(expert * n_inputs, (expert + 1) * n_inputs), transpose=True)
        return source.read(checkpoint, 0, source.n_rows)

    return matrix


def _from_mxfp4(weights: Weights, name: str, n_experts: int, n_rows: int, n_columns: int) -> Matrix:
    n_blocks = n_columns // MXFP4_BLOCK
    tensor = weights.need(f"{name}_blocks", (n_experts, n_rows, n_blocks, MXFP4_BLOCK // 2))
    scales = weights.need(f"{name}_scales", (n_experts, n_rows, n_blocks))

    def matrix(expert: int) -> Floats:
        source = Mxfp4Rows(tensor, scales, range(expert * n_rows, (expert + 1) * n_rows))
        return _decode_mxfp4(source.read(weights.checkpoint, 0, n_rows), n_blocks)

    return matrix


def _decode_mxfp4(packed: Bytes, n_blocks: int) -> Floats:
    """Blocks of ggml's form (a scale; 16 bytes of columns i and i + 16): float32 (rows, columns)."""
    stored = packed.reshape(len(packed), n_blocks, -1)
    codes = np.concatenate([stored[:, :, 1:] & 15, stored[:, :, 1:] >> 4], axis=2)
    scales = np.ldexp(np.float32(1), stored[:, :, :1].astype(np.int32) - 127).astype(np.float32)
    return np.ascontiguousarray((_E2M1[codes] * scales).reshape(len(packed), -1))
