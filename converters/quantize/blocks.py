# SPDX-License-Identifier: MIT
"""Rows of floats as rows of GGUF blocks and back, by ggml's own quantizers.

The bytes are those that llama.cpp's `llama_model_quantize` writes for the same rows, type and importance. Rows do not
depend on each other, so they are cut into chunks that threads take in turn; the result does not depend on the threads.

ggml ends the process where it does not like its input (`GGML_ASSERT`), so everything it asserts is checked here first.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
from collections.abc import Callable

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GgmlType
from llama_cpp._ggml import libggml

from edgemoe.errors import ConversionError

Floats = npt.NDArray[np.float32]
RowBytes = npt.NDArray[np.uint8]

NEEDS_IMPORTANCE = frozenset({GgmlType.IQ2_XXS, GgmlType.IQ2_XS, GgmlType.IQ1_S})
"""Types that ggml quantizes only with an importance matrix (`ggml_quantize_requires_imatrix` in ggml.c)."""

PLAIN = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16})
"""Types of one value each, without blocks."""

QUANTIZABLE = frozenset(
    {*PLAIN, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0}
    | {GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K}
    | {GgmlType.IQ1_S, GgmlType.IQ1_M, GgmlType.IQ2_XXS, GgmlType.IQ2_XS, GgmlType.IQ2_S}
    | {GgmlType.IQ3_XXS, GgmlType.IQ3_S, GgmlType.IQ4_NL, GgmlType.IQ4_XS}
    | {GgmlType.TQ1_0, GgmlType.TQ2_0, GgmlType.MXFP4, GgmlType.NVFP4, GgmlType.Q1_0}
)
"""What `ggml_quantize_chunk` can write: all types of GGUF but integers, F64 and the activation formats Q8_1, Q8_K."""

_CHUNK_VALUES = 1 << 18  # 1 MiB of floats: stays in L2, and a thread's share of a large tensor is many chunks
_MAX_THREADS = 16

_MAX_MAGNITUDE = 1e6
"""Largest value of a block with an F16 scale. Weights are below 10^3; the searches of some types cube values (IQ3_S
squares the sum of cubes), and what overflows F32 ends in an assertion of ggml."""

_MAX_WEIGHTED_SQUARE = 1e15
"""Bound of importance times square: the searches square a sum of 32 such products with codes up to 31, below 3.4e38."""

_MAX_NVFP4 = 448.0 * 6.0
"""What NVFP4 clips to without a word: its largest scale (E4M3) times its largest code (E2M1)."""


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_values", ctypes.c_int64),
        ("block_values_interleaved", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


_quantize_chunk = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
)(("ggml_quantize_chunk", libggml))
_quantize_init = ctypes.CFUNCTYPE(None, ctypes.c_int)(("ggml_quantize_init", libggml))
_validate_row_data = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)(
    ("ggml_validate_row_data", libggml)
)
_type_traits = ctypes.CFUNCTYPE(ctypes.POINTER(_TypeTraits), ctypes.c_int)(("ggml_get_type_traits", libggml))


def block_values(ggml_type: GgmlType) -> int:
    """Values of one block: a row's length has to be a multiple of it."""
    return _block(ggml_type)[0]


def row_bytes(n_columns: int, ggml_type: GgmlType) -> int:
    """Bytes of a row of `n_columns` values.

    Raises:
        ConversionError: `n_columns` is not a multiple of the type's block.
    """
    n_values, n_bytes = _block(ggml_type)
    if n_columns <= 0 or n_columns % n_values:
        raise ConversionError(
            f"cannot lay out a row as {ggml_type.name}: found {n_columns} columns, expected a multiple of {n_values}; "
            "use a type with smaller blocks"
        )
    return n_columns // n_values * n_bytes


def quantize(
    values: Floats, ggml_type: GgmlType, importance: Floats | None = None, *, n_threads: int | None = None
) -> RowBytes:
    """Rows of `values` as rows of `ggml_type`.

    Besides the result and `values`, some bytes a thread are held.

    Args:
        values: float32 (n_rows, n_columns), C-contiguous, finite.
        ggml_type: one of `QUANTIZABLE`.
        importance: float32 (n_columns,), not negative: the weight of each column's squared error, such as the mean
            of the squared activations that the column is multiplied with. None for ggml's own weights.
        n_threads: threads at most; as many as the process may run on (at most 16) if None.

    Returns:
        uint8 (n_rows, `row_bytes(n_columns, ggml_type)`).

    Raises:
        ConversionError: a value is not finite or too large for the type, the importance does not fit or is missing, or
            the type cannot be written.
    """
    n_rows, n_columns = _checked_shape(values, np.dtype(np.float32), "values")
    if ggml_type not in QUANTIZABLE:
        raise ConversionError(
            f"cannot quantize to {ggml_type.name}: ggml has no quantizer for weights of it; "
            f"use one of {', '.join(sorted(known.name for known in QUANTIZABLE))}"
        )
    out = np.empty((n_rows, row_bytes(n_columns, ggml_type)), np.uint8)
    weights = None if importance is None else _checked_importance(importance, n_columns)
    if weights is None and ggml_type in NEEDS_IMPORTANCE:
        raise ConversionError(
            f"cannot quantize to {ggml_type.name}: it needs an importance matrix, found none; "
            "collect one on a calibration text or use a type that works without"
        )
    heaviest = 0.0 if weights is None else float(weights.max())
    _quantize_init(ggml_type)
    chunk_rows = max(1, _CHUNK_VALUES // n_columns)

    def quantize_chunk(begin: int) -> None:
        rows, blocks = values[begin : begin + chunk_rows], out[begin : begin + chunk_rows]
        _check_values(rows, begin, ggml_type, heaviest)
        _quantize_chunk(
            ggml_type,
            rows.ctypes.data,
            blocks.ctypes.data,
            0,
            len(rows),
            n_columns,
            None if weights is None else weights.ctypes.data,
        )
        if ggml_type is not GgmlType.F32 and not _validate_row_data(ggml_type, blocks.ctypes.data, blocks.nbytes):
            raise _too_large(rows, begin, ggml_type)

    _in_threads(quantize_chunk, range(0, n_rows, chunk_rows), n_threads)
    return out


def dequantize(
    blocks: RowBytes, ggml_type: GgmlType, *, n_columns: int | None = None, n_threads: int | None = None
) -> Floats:
    """The values of rows of `ggml_type`, as ggml reads them.

    Args:
        blocks: uint8 (n_rows, bytes of a row), C-contiguous.
        ggml_type: one of `QUANTIZABLE`.
        n_columns: what the row has to have, to be checked; what its bytes hold if None.
        n_threads: threads at most; as many as the process may run on (at most 16) if None.

    Returns:
        float32 (n_rows, n_columns).

    Raises:
        ConversionError: the bytes are not whole blocks, or the type has no floats.
    """
    n_rows, n_bytes = _checked_shape(blocks, np.dtype(np.uint8), "blocks")
    if ggml_type not in QUANTIZABLE:
        raise ConversionError(f"cannot read {ggml_type.name} as floats: it is no format of weights")
    n_values, block_bytes = _block(ggml_type)
    if n_bytes % block_bytes or (n_columns is not None and n_bytes != row_bytes(n_columns, ggml_type)):
        expected = f"a multiple of {block_bytes}" if n_columns is None else str(row_bytes(n_columns, ggml_type))
        raise ConversionError(
            f"cannot read rows of {ggml_type.name}: found {n_bytes} bytes a row, expected {expected}; "
            "is the file damaged?"
        )
    columns = n_bytes // block_bytes * n_values
    if ggml_type is GgmlType.F32:
        return blocks.view(np.float32).copy()
    out = np.empty((n_rows, columns), np.float32)
    to_float = _type_traits(ggml_type).contents.to_float
    chunk_rows = max(1, _CHUNK_VALUES // columns)

    def dequantize_chunk(begin: int) -> None:
        rows, values = blocks[begin : begin + chunk_rows], out[begin : begin + chunk_rows]
        to_float(rows.ctypes.data, values.ctypes.data, values.size)

    _in_threads(dequantize_chunk, range(0, n_rows, chunk_rows), n_threads)
    return out


def _block(ggml_type: GgmlType) -> tuple[int, int]:
    """Values and bytes of a block."""
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    return int(n_values), int(n_bytes)


def _checked_shape(array: npt.NDArray[np.generic], dtype: np.dtype[np.generic], name: str) -> tuple[int, int]:
    """The shape of a C-contiguous matrix of `dtype` with columns; pointers to anything else would be misread."""
    if array.ndim != 2 or array.dtype != dtype or not array.flags.c_contiguous or array.shape[1] == 0:
        layout = "C-contiguous" if array.flags.c_contiguous else "strided"
        raise ConversionError(
            f"cannot take {name}: found {layout} {array.dtype} {array.shape}, "
            f"expected C-contiguous {dtype} of two dimensions with columns"
        )
    return array.shape[0], array.shape[1]


def _checked_importance(importance: Floats, n_columns: int) -> Floats:
    """The importance as ggml takes it."""
    if importance.shape != (n_columns,):
        raise ConversionError(
            f"cannot weight columns: found an importance of shape {importance.shape}, expected ({n_columns},)"
        )
    weights = np.ascontiguousarray(importance, np.float32)
    wrong = ~np.isfinite(weights) | (weights < 0)
    if wrong.any():
        column = int(np.argmax(wrong))
        raise ConversionError(
            f"cannot weight columns: found importance {weights[column]} (column {column}), "
            "expected finite values that are not negative; collect the importance matrix again"
        )
    if not weights.any():  # ggml would write zeros for the weights
        raise ConversionError(
            "cannot weight columns: found an importance of zeros only, expected some column that counts; "
            "quantize what was never reached without an importance"
        )
    return weights


def _check_values(rows: Floats, first_row: int, ggml_type: GgmlType, heaviest: float) -> None:
    """Refuse what is not finite, and finite values whose sums would not be."""
    largest = max(float(rows.max()), -float(rows.min()))  # a NaN makes both of them NaN
    if not np.isfinite(largest):
        row, column = (int(index) for index in np.argwhere(~np.isfinite(rows))[0])
        raise ConversionError(
            f"cannot quantize to {ggml_type.name}: found {rows[row, column]} (row {first_row + row}, column {column}), "
            "expected finite weights; is the source damaged?"
        )
    if ggml_type in PLAIN or ggml_type is GgmlType.MXFP4:  # MXFP4's scales are powers of two over all of F32
        return
    limit = _MAX_NVFP4 if ggml_type is GgmlType.NVFP4 else _MAX_MAGNITUDE
    if largest > limit or heaviest * largest**2 > _MAX_WEIGHTED_SQUARE:
        raise _too_large(rows, first_row, ggml_type)


def _too_large(rows: Floats, first_row: int, ggml_type: GgmlType) -> ConversionError:
    row, column = (int(index) for index in np.unravel_index(np.argmax(np.abs(rows)), rows.shape))
    return ConversionError(
        f"cannot quantize to {ggml_type.name}: found {rows[row, column]:g} (row {first_row + row}, column {column}), "
        "which with its importance is beyond what the type's scales can hold; is the source damaged?"
    )


def _in_threads(work: Callable[[int], None], begins: range, n_threads: int | None) -> None:
    """Call `work` for each begin; ggml's functions run outside Python's lock."""
    n_workers = min(n_threads or len(os.sched_getaffinity(0)), _MAX_THREADS, len(begins))
    if n_workers <= 1:
        for begin in begins:
            work(begin)
        return
    with concurrent.futures.ThreadPoolExecutor(n_workers) as pool:
        for done in [pool.submit(work, begin) for begin in begins]:
            done.result()
