# SPDX-License-Identifier: MIT
"""The tensors of a synthetic model: how large they are, and their bytes, made row by row.

A matrix of fill `pool` takes its rows, in random order, from a pool that is quantized once per shape and type; so
gigabytes cost little, and yet any two experts differ in nearly every row. Embeddings and output head are drawn in
full.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GgmlType

Floats = npt.NDArray[np.float32]  # (rows, values)
RowBytes = npt.NDArray[np.uint8]  # (rows, bytes of one quantized row)
Fill = Literal["ones", "walk", "fresh", "pool"]

QUANTS = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "Q3_K",
    "Q2_K",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "IQ4_XS",
    "IQ4_NL",
    "MXFP4",
)

_MAX_POOL_ROWS = 4096
_CHUNK_ROWS = 2048


def type_of(quant: str, field: str) -> GgmlType:
    """The ggml type of that name; `field` says in the error where the name stood."""
    if quant not in QUANTS:
        raise ValueError(f"unknown quantization: found {quant!r} ({field}); use one of {', '.join(QUANTS)}")
    return GgmlType[quant]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor to write.

    Attributes:
        shape: outermost first, the row's length last: experts are (n_experts, rows, values).
        fill: `ones`, `walk` (AR(1) along the rows), `fresh` (drawn in full) or `pool` (rows of a pool).
        std: standard deviation of the values; `ones` ignores it.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    fill: Fill
    std: float = 1.0

    @property
    def row_bytes(self) -> int:
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * block_bytes

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


class RowSource:
    """Makes the bytes of tensors; the same for the same seed, tensor name and shape."""

    def __init__(self, locality: float, seed: int) -> None:
        self._locality = locality
        self._seed = seed
        self._pools: dict[tuple[GgmlType, int, int, float], RowBytes] = {}

    def of(self, tensor: Tensor) -> Iterator[RowBytes]:
        """The tensor's rows in order, some at a time."""
        n_rows, values = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        rng = self._rng(tensor.name)
        if tensor.fill == "ones":
            yield _quantize(np.ones((n_rows, values), np.float32), tensor.type)
        elif tensor.fill == "pool":
            rows = tensor.shape[-2]
            pool = self._pool(tensor)
            for _ in range(n_rows // rows):
                yield pool[rng.permutation(len(pool))[:rows]]
        else:
            draw = self._walk(rng, values) if tensor.fill == "walk" else _gaussian(rng, values, tensor.std)
            for begin in range(0, n_rows, _CHUNK_ROWS):
                yield _quantize(draw(min(_CHUNK_ROWS, n_rows - begin)), tensor.type)

    def _pool(self, tensor: Tensor) -> RowBytes:
        rows, values = tensor.shape[-2:]
        key = (tensor.type, rows, values, tensor.std)
        if key not in self._pools:
            draw = _gaussian(self._rng(f"pool {tensor.type.name} {rows} {values} {tensor.std:.6g}"), values, tensor.std)
            self._pools[key] = _quantize(draw(max(rows, min(4 * rows, _MAX_POOL_ROWS))), tensor.type)
        return self._pools[key]

    def _walk(self, rng: np.random.Generator, values: int) -> Callable[[int], Floats]:
        """Draws of the next rows of a stationary AR(1) sequence of unit variance."""
        draw = _gaussian(rng, values, math.sqrt(1 - self._locality**2))
        last = _gaussian(rng, values, 1.0)(1)[0]
        locality = np.float32(self._locality)

        def next_rows(n: int) -> Floats:
            nonlocal last
            rows = draw(n)
            for row in rows:
                row += locality * last
                last = row
            return rows

        return next_rows

    def _rng(self, label: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(label.encode())])


def _gaussian(rng: np.random.Generator, values: int, std: float) -> Callable[[int], Floats]:
    """Draws of the next rows of independent Gaussians; a function of the number of rows."""

    def next_rows(n: int) -> Floats:
        rows: Floats = rng.standard_normal((n, values), np.float32)
        rows *= np.float32(std)
        return rows

    return next_rows


def _quantize(rows: Floats, ggml_type: GgmlType) -> RowBytes:
    """Quantize (rows, values) floats with ggml's own quantizer, without an importance matrix."""
    from llama_cpp import llama_cpp

    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    n_rows, values = rows.shape
    result = np.empty((n_rows, values // block * block_bytes), np.uint8)
    chunk = llama_cpp._lib.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    written = chunk(ggml_type, rows.ctypes.data, result.ctypes.data, 0, n_rows, values, None)
    if written != result.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk failed: found {written} bytes, expected {result.nbytes}")
    return result
