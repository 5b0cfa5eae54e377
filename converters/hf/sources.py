# SPDX-License-Identifier: MIT
"""What a tensor of the result is made of: ranges of rows of stored tensors, selected, reordered, transposed.

Every source is a matrix that is computed a block of rows at a time, so stacking experts, splitting a merged
projection or permuting heads needs no more memory than the block. What is transposed or centred as a matrix is read
whole; that is done to single experts and single heads only.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .checkpoint import Bytes, Checkpoint, Floats, StoredTensor

MXFP4_BLOCK = 32
"""Columns that share one scale (OCP Microscaling Formats 1.0)."""

_HALF_BLOCK = MXFP4_BLOCK // 2


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a stored tensor, all of whose dimensions but the last are seen as one.

    Attributes:
        tensor: what is read.
        rows: the stored rows, evenly spaced; all of them if None.
        columns: the stored columns, evenly spaced; all of them if None.
        n_heads: if not 0, the rows are so many heads, and within each the second half of its rows alternates with the
            first: Hugging Face keeps the two halves of rotary pairs apart, ggml's `llama` kind of RoPE has them
            side by side.
        transpose: the result is the transposed matrix of the selected rows and columns.
        centre: subtract, from each row its mean ("row"), or from all rows the mean row ("matrix"); see `phi.py`.
        factor: multiplies every element, last; a power of two, so that nothing is rounded.
    """

    tensor: StoredTensor
    rows: range | None = None
    columns: range | None = None
    n_heads: int = 0
    transpose: bool = False
    centre: str = ""
    factor: float = 1.0

    @property
    def _selected(self) -> range:
        return range(self.tensor.n_rows) if self.rows is None else self.rows

    @property
    def _n_selected_columns(self) -> int:
        return self.tensor.n_columns if self.columns is None else len(self.columns)

    @property
    def n_rows(self) -> int:
        """Rows of the result."""
        return self._n_selected_columns if self.transpose else len(self._selected)

    @property
    def n_columns(self) -> int:
        """Columns of the result."""
        return len(self._selected) if self.transpose else self._n_selected_columns

    @property
    def block_rows(self) -> int:
        """The least number of rows that can be read at a time: one head if permuted, all if each depends on all."""
        if self.transpose or self.centre == "matrix":
            return self.n_rows
        return self.n_rows // self.n_heads if self.n_heads else 1

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> Floats:
        """Rows `start` to `stop`, multiples of `block_rows`: float32 (stop - start, n_columns), contiguous."""
        if self.transpose:
            values = self._read_selected(checkpoint, self._selected).T[start:stop]
        else:
            values = self._read_selected(checkpoint, self._selected[start:stop])
        if self.n_heads:
            half = self.block_rows // 2
            values = values.reshape(-1, 2, half, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if self.centre:
            mean = values.mean(axis=1 if self.centre == "row" else 0, dtype=np.float64, keepdims=True)
            values = values - mean.astype(np.float32)
        if self.factor != 1.0:
            values = values * np.float32(self.factor)
        return np.ascontiguousarray(values)

    def _read_selected(self, checkpoint: Checkpoint, rows: range) -> Floats:
        values = checkpoint.read_rows(self.tensor, rows[0], rows[-1] + 1)[:: rows.step]
        if self.columns is not None:
            values = values[:, self.columns.start : self.columns.stop : self.columns.step]
        return values


@dataclasses.dataclass(frozen=True)
class Mxfp4Rows:
    """Rows of MXFP4 as gpt-oss stores them, as blocks of ggml's MXFP4: the same numbers, other places of the nibbles.

    A stored block is 16 bytes, columns 2i and 2i + 1 in the low and high nibble of byte i, with its scale in another
    tensor. ggml's `block_mxfp4` begins with the scale, and byte i has columns i and i + 16.

    Attributes:
        blocks: U8 (..., rows, blocks of a row, 16).
        scales: U8 (..., rows, blocks of a row).
        rows: the rows to take, evenly spaced; all dimensions before are seen as rows.
    """

    blocks: StoredTensor
    scales: StoredTensor
    rows: range

    block_rows = 1

    @property
    def n_rows(self) -> int:
        """Rows of the result."""
        return len(self.rows)

    @property
    def n_columns(self) -> int:
        """Columns of the result."""
        return self.scales.n_columns * MXFP4_BLOCK

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> Bytes:
        """Rows `start` to `stop`: uint8 (stop - start, 17 bytes for each 32 columns)."""
        rows = self.rows[start:stop]
        first, last = rows[0], rows[-1] + 1
        n_blocks = self.scales.n_columns
        scales = checkpoint.read_raw(self.scales, first, last)[:: rows.step]
        stored = checkpoint.read_raw(self.blocks, first * n_blocks, last * n_blocks)
        stored = stored.reshape(last - first, n_blocks, _HALF_BLOCK)[:: rows.step]
        codes = np.stack([stored & 0x0F, stored >> 4], axis=-1).reshape(len(rows), n_blocks, MXFP4_BLOCK)
        packed = np.empty((len(rows), n_blocks, 1 + _HALF_BLOCK), np.uint8)
        packed[:, :, 0] = scales
        packed[:, :, 1:] = codes[:, :, :_HALF_BLOCK] | codes[:, :, _HALF_BLOCK:] << 4
        return packed.reshape(len(rows), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """Numbers that come from the configuration, such as factors of RoPE: float32 (rows, columns)."""

    values: Floats

    @property
    def n_rows(self) -> int:
        """Rows of the result."""
        return int(self.values.shape[0])

    @property
    def n_columns(self) -> int:
        """Columns of the result."""
        return int(self.values.shape[1])

    @property
    def block_rows(self) -> int:
        """All rows: a constant is small."""
        return self.n_rows

    def read(self, _checkpoint: Checkpoint, start: int, stop: int) -> Floats:
        """Rows `start` to `stop`."""
        return self.values[start:stop]


Source = Rows | Mxfp4Rows | Constant


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor with a shape (rows last but one, columns last) and what its rows are made of, in order."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]

    @property
    def is_mxfp4(self) -> bool:
        """Whether its bytes are blocks already."""
        return isinstance(self.sources[0], Mxfp4Rows)
