# SPDX-License-Identifier: MIT
"""Symmetric blockwise quantization as `com.microsoft::MatMulNBits` and `QMoE` read it.

A block of columns shares a scale: w = (q - 2^(bits - 1)) * scale. The element of the largest magnitude becomes q = 0,
so the scale is that element / -2^(bits - 1) and may be negative; ONNX Runtime's own quantizer chooses it so
(`QuantizeBlockwise` of mlas), and ggml its Q4_0. Weights that are on such a grid already come out unchanged.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..hf.checkpoint import Bytes, Floats

BLOCKS = (32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Grid:
    """How matrices are quantized: bits of a weight, columns that share a scale; and the accuracy of products that is
    asked for: 4 for 8-bit activations, 0 for what a kernel does by itself."""

    bits: int
    block: int
    accuracy_level: int = 0

    @property
    def accuracy(self) -> dict[str, int]:
        """Attributes of a node that multiplies with such matrices."""
        return {"accuracy_level": self.accuracy_level} if self.accuracy_level else {}

    def n_blocks(self, n_columns: int) -> int:
        """Scales of a row."""
        return -(-n_columns // self.block)

    def row_bytes(self, n_columns: int) -> int:
        """Bytes of the weights of a row; the last block is filled up."""
        return self.n_blocks(n_columns) * self.block * self.bits // 8


def quantize(values: Floats, grid: Grid) -> tuple[Bytes, Floats]:
    """Quantize rows.

    Args:
        values: float32 (rows, columns), finite.
        grid: how.

    Returns:
        uint8 (rows, grid.row_bytes), with 4 bits even columns in the low nibbles; float32 scales (rows, n_blocks).
    """
    n_rows, n_columns = values.shape
    n_blocks = grid.n_blocks(n_columns)
    if missing := n_blocks * grid.block - n_columns:
        values = np.pad(values, ((0, 0), (0, missing)))
    blocks = values.reshape(n_rows, n_blocks, grid.block)
    half = 1 << (grid.bits - 1)
    largest = np.abs(blocks).argmax(axis=2, keepdims=True)
    scales = np.take_along_axis(blocks, largest, axis=2) / np.float32(-half)
    steps = np.rint(blocks / np.where(scales == 0, np.float32(1), scales))
    codes: Bytes = (np.clip(steps, -half, half - 1) + half).astype(np.uint8).reshape(n_rows, -1)
    if grid.bits == 4:
        codes = np.bitwise_or(codes[:, 0::2], np.left_shift(codes[:, 1::2], 4, dtype=np.uint8))
    return np.ascontiguousarray(codes), np.ascontiguousarray(scales[:, :, 0])
