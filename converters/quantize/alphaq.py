# SPDX-License-Identifier: MIT
"""AlphaQ: how much a weight matrix should be spared, from its spectrum alone, without a calibration text.

Heavy-tailed spectra are taken as a sign of much that was learned (AlphaQ, arXiv 2606.04980; heavy-tailed
self-regularization, Martin and Mahoney, JMLR 22(165), 2021): the smaller the exponent alpha of the spectrum's tail, the
more an error costs. Alpha is Hill's estimator over the squared singular values of sub-blocks of 128 x 128, pooled
(FARMS), so that matrices of different aspect compare:

    alpha = 1 + k / sum_{i <= k} ln(lambda_i / lambda_{k+1}),   k = max(10, n / 10),   lambda sorted, largest first
    cost(tensor, type) = (median(alpha) / alpha(tensor))^gamma * squared error of the tensor in that type

The paper has Var(W) * 2^(-2 bits) for the squared error of a weight; here it is measured with the type's own quantizer,
as GGUF's types of the same bits differ, and it is summed over the weights, as projections differ in size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

BLOCK = 128
"""Rows and columns of a sub-block (the paper's)."""

MAX_BLOCKS = 256
"""Sub-blocks of a tensor at most (the paper's)."""

GAMMA = 1.0
"""The paper's exponent."""

_LEAST_TAIL = 10
_TAIL_SHARE = 0.1


def tail_exponent(matrices: Sequence[Floats]) -> float:
    """Alpha of a tensor from some of its rows.

    Args:
        matrices: float32 (rows, columns), pieces of rows that are neighbours; each is cut into blocks of 128 x 128 from
            its beginning. Pieces with less than 128 rows or columns count whole.

    Returns:
        Above 1; infinity if the values have no spread (all equal, or all zero).
    """
    spectra = [_spectrum(matrix) for matrix in matrices]
    exponents = [_hill(spectrum) for spectrum in spectra]
    return float(np.mean(exponents))


def weigh(exponents: Mapping[str, float], gamma: float = GAMMA) -> dict[str, float]:
    """By tensor: what its squared error is multiplied with."""
    median = float(np.median([alpha for alpha in exponents.values() if np.isfinite(alpha)] or [1.0]))
    return {name: float((median / alpha) ** gamma) if np.isfinite(alpha) else 0.0 for name, alpha in exponents.items()}


def bands(n_matrices: int, n_rows: int, n_columns: int) -> list[tuple[int, int, int]]:
    """Which rows `tail_exponent` should get: (matrix, first row, rows), evenly spread, about 256 blocks in all."""
    height = min(BLOCK, n_rows)
    per_band = max(1, n_columns // BLOCK)
    n_bands = max(1, min(n_matrices * (n_rows // height), MAX_BLOCKS // per_band))
    n_from = min(n_matrices, n_bands)
    per_matrix = n_bands // n_from
    found = []
    for index in range(n_from):
        matrix = index * n_matrices // n_from
        for band in range(per_matrix):
            found.append((matrix, (n_rows - height) * band // max(1, per_matrix - 1), height))
    return found


def _spectrum(matrix: Floats) -> npt.NDArray[np.float64]:
    """The squared singular values of all blocks, pooled, largest first."""
    rows, columns = matrix.shape
    height, width = min(BLOCK, rows), min(BLOCK, columns)
    blocks = (
        matrix[: rows // height * height, : columns // width * width]
        .reshape(rows // height, height, columns // width, width)
        .swapaxes(1, 2)
        .reshape(-1, height, width)
        .astype(np.float64)
    )
    singular = np.linalg.svd(blocks, compute_uv=False)
    squares: npt.NDArray[np.float64] = np.sort(np.square(singular).ravel())[::-1]
    return squares


def _hill(spectrum: npt.NDArray[np.float64]) -> float:
    """Hill's estimator of the tail's exponent."""
    k = min(max(_LEAST_TAIL, int(_TAIL_SHARE * len(spectrum))), len(spectrum) - 1)
    if k < 1 or spectrum[k] <= 0:
        return float("inf")
    logs = float(np.log(spectrum[:k] / spectrum[k]).sum())
    return 1 + k / logs if logs > 0 else float("inf")
