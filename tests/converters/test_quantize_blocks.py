# SPDX-License-Identifier: MIT
"""Rows of floats as GGUF blocks, against gguf's own implementation in numpy."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import pytest

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from gguf import GGMLQuantizationType as GgmlType  # noqa: E402
from llama_cpp._ggml import libggml  # noqa: E402

from edgemoe.converters.quantize import blocks  # noqa: E402
from edgemoe.errors import ConversionError  # noqa: E402

N_ROWS, N_COLUMNS = 5, 512
ALL = sorted(blocks.QUANTIZABLE)
NUMPY_QUANTIZERS = [
    GgmlType[name] for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")
]


def rows(seed: int = 0, n_rows: int = N_ROWS, n_columns: int = N_COLUMNS) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n_rows, n_columns), np.float32)


def ones_if_needed(ggml_type: GgmlType) -> npt.NDArray[np.float32] | None:
    return np.ones(N_COLUMNS, np.float32) if ggml_type in blocks.NEEDS_IMPORTANCE else None


@pytest.mark.parametrize("ggml_type", ALL, ids=lambda ggml_type: ggml_type.name)
def test_floats_of_blocks_are_those_of_gguf(ggml_type: GgmlType) -> None:
    """Guards against a row cut at the wrong byte, and a type mixed up with another on the way through ctypes."""
    quantized = blocks.quantize(rows(), ggml_type, ones_if_needed(ggml_type))
    assert quantized.shape == (N_ROWS, blocks.row_bytes(N_COLUMNS, ggml_type))
    found = blocks.dequantize(quantized, ggml_type, n_columns=N_COLUMNS)
    # Signs of Gaussians alone correlate by sqrt(2 / pi) = 0.80. TQ rounds to -1, 0, 1 times the block's maximum: 0.69.
    assert np.corrcoef(found.ravel(), rows().ravel())[0, 1] > 0.65
    try:
        expected = gguf.quants.dequantize(quantized, ggml_type)
    except NotImplementedError:
        pytest.skip(f"gguf has no {ggml_type.name} in numpy")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("ggml_type", NUMPY_QUANTIZERS, ids=lambda ggml_type: ggml_type.name)
def test_blocks_are_those_of_gguf(ggml_type: GgmlType) -> None:
    """Guards against other roundings than the reference's, F16 and BF16 among them."""
    np.testing.assert_array_equal(
        blocks.quantize(rows(), ggml_type), gguf.quants.quantize(rows(), ggml_type).view(np.uint8)
    )


def test_the_list_of_types_that_need_an_importance_is_ggmls() -> None:
    """Guards against a process that ends in ggml's assertion, when a new version asks for an importance matrix."""
    requires = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_int)(("ggml_quantize_requires_imatrix", libggml))
    assert {ggml_type for ggml_type in ALL if requires(ggml_type)} == blocks.NEEDS_IMPORTANCE


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XS", "BF16"])
def test_threads_and_chunks_do_not_show(name: str) -> None:
    """Guards against rows written to another's place, or twice, when a tensor is cut into chunks."""
    values = rows(1, n_rows=1300)  # 2.5 chunks
    importance = np.linspace(0.1, 3, N_COLUMNS, dtype=np.float32)
    threaded = blocks.quantize(values, GgmlType[name], importance, n_threads=3)
    alone = np.concatenate([blocks.quantize(values[i : i + 1], GgmlType[name], importance) for i in range(len(values))])
    np.testing.assert_array_equal(threaded, alone)
    np.testing.assert_array_equal(
        blocks.dequantize(threaded, GgmlType[name], n_threads=3), blocks.dequantize(alone, GgmlType[name], n_threads=1)
    )


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q4_0", "IQ3_XXS", "IQ4_XS"])
def test_importance_lowers_the_error_where_it_counts(name: str) -> None:
    """Guards against an importance that is ignored, or that reaches ggml in another order."""
    importance = np.full(N_COLUMNS, 1e-3, np.float32)
    importance[::7] = 100.0
    error = {
        weights is None: np.square(
            blocks.dequantize(blocks.quantize(rows(2, 64), GgmlType[name], weights), GgmlType[name]) - rows(2, 64)
        ).mean(axis=0)[::7]
        for weights in (None, importance)
    }
    assert error[False].mean() < 0.7 * error[True].mean()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "IQ2_S"])
def test_a_value_that_is_not_finite_is_named(bad: float, name: str) -> None:
    """Guards against NaN in a model file, and ggml's abort on it."""
    values = rows(3, n_rows=1300)
    values[1201, 17] = bad
    with pytest.raises(ConversionError, match=rf"{name}: found {bad} \(row 1201, column 17\)"):
        blocks.quantize(values, GgmlType[name], n_threads=2)


@pytest.mark.parametrize(
    ("name", "value", "importance"),
    [("F16", 7e4, None), ("BF16", 3.4e38, None), ("IQ3_S", 1e7, None), ("NVFP4", 3e3, None), ("IQ2_XXS", 1e4, 1e30)],
)
def test_a_value_beyond_the_type_is_refused(name: str, value: float, importance: float | None) -> None:
    """Guards against infinite scales, silent clipping, and sums that overflow into ggml's assertions."""
    values = rows(4)
    values[2, 3] = value
    weights = None if importance is None else np.full(N_COLUMNS, importance, np.float32)
    with pytest.raises(ConversionError, match=r"found .* \(row 2, column 3\)"):
        blocks.quantize(values, GgmlType[name], weights)


def test_an_importance_that_cannot_be_is_refused() -> None:
    """Guards against weights that are all written as zero, and asserts in ggml."""
    good = np.ones(N_COLUMNS, np.float32)
    for column, value in ((0, np.nan), (3, -1.0), (5, np.inf)):
        weights = good.copy()
        weights[column] = value
        with pytest.raises(ConversionError, match=rf"found importance {value} \(column {column}\)"):
            blocks.quantize(rows(), GgmlType.Q4_K, weights)
    with pytest.raises(ConversionError, match="zeros only"):
        blocks.quantize(rows(), GgmlType.Q4_K, np.zeros(N_COLUMNS, np.float32))
    with pytest.raises(ConversionError, match=r"shape \(256,\), expected \(512,\)"):
        blocks.quantize(rows(), GgmlType.Q4_K, good[:256])
    with pytest.raises(ConversionError, match="IQ2_XXS: it needs an importance matrix"):
        blocks.quantize(rows(), GgmlType.IQ2_XXS)


def test_rows_that_do_not_fit_are_refused() -> None:
    """Guards against reading past a row, and blocks that span two rows."""
    with pytest.raises(ConversionError, match="found 288 columns, expected a multiple of 256"):
        blocks.quantize(rows(n_columns=288), GgmlType.Q4_K)
    with pytest.raises(ConversionError, match="found strided float32"):
        blocks.quantize(rows()[:, ::2], GgmlType.Q8_0)
    with pytest.raises(ConversionError, match="found C-contiguous float64"):
        blocks.quantize(rows().astype(np.float64), GgmlType.Q8_0)  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="ggml has no quantizer"):
        blocks.quantize(rows(), GgmlType.Q8_K)
    with pytest.raises(ConversionError, match="found 33 bytes a row, expected a multiple of 34"):
        blocks.dequantize(np.zeros((2, 33), np.uint8), GgmlType.Q8_0)
    with pytest.raises(ConversionError, match="found 34 bytes a row, expected 68"):
        blocks.dequantize(np.zeros((2, 34), np.uint8), GgmlType.Q8_0, n_columns=64)
