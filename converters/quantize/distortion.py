# SPDX-License-Identifier: MIT
"""What types do to the weights of a tensor: squared errors, measured on a sample of rows with ggml's own quantizers.

The sample is whole rows, evenly spaced over all matrices (experts) of the tensor: the same rows for every type and
every run, so that types are compared on the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GgmlType

from .blocks import dequantize, quantize

Floats = npt.NDArray[np.float32]

SAMPLE_VALUES = 1 << 16
"""Weights of a sample. The standard error of a mean of squares of so many values is below 1 %."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some rows of one matrix.

    Attributes:
        rows: float32 (rows, columns).
        matrix: which one of the tensor.
        n_represented: rows of the tensor that these stand for.
    """

    rows: Floats
    matrix: int
    n_represented: float


def spread(n_matrices: int, n_rows: int, n_columns: int) -> Iterator[tuple[int, int, int]]:
    """Which rows to take: matrix, first row, number of rows; neighbours, so that reads are few."""
    n_taken = max(1, min(n_matrices * n_rows, SAMPLE_VALUES // n_columns))
    n_from = min(n_matrices, max(1, n_taken // min(n_rows, 8)))  # matrices, with 8 rows or more of each
    per_matrix = min(n_rows, max(1, n_taken // n_from))
    for index in range(n_from):
        matrix = index * n_matrices // n_from
        yield matrix, (n_rows - per_matrix) * (index % 4) // 3, per_matrix


def distortions(
    samples: Sequence[Sample],
    types: Sequence[GgmlType],
    importance: Floats | None = None,
    *,
    weights: Floats | None = None,
) -> dict[GgmlType, float]:
    """By type: the sum over the tensor's weights of the squared error, estimated from the sample.

    Args:
        samples: see `spread`.
        types: what to measure.
        importance: float32 (matrices, columns); squared errors are multiplied with it, and the quantizer gets it.
            None for 1.
        weights: float32 (matrices,), how much each matrix counts, on average 1; None for all alike.
    """
    found = {}
    for ggml_type in types:
        total = 0.0
        for sample in samples:
            columns = None if importance is None else importance[sample.matrix]
            blocks = quantize(sample.rows, ggml_type, columns, n_threads=1)
            error = dequantize(blocks, ggml_type, n_threads=1) - sample.rows
            squares = np.einsum("rc,rc->c", error, error, dtype=np.float64)
            weighted = float(squares.sum() if columns is None else squares @ columns.astype(np.float64))
            share = 1.0 if weights is None else float(weights[sample.matrix])
            total += share * weighted * sample.n_represented / len(sample.rows)
        found[ggml_type] = total
    return found
