# SPDX-License-Identifier: MIT
"""Places for the experts of a layer, and the job that quantizes them into these, one expert after the other."""

from __future__ import annotations

from collections.abc import Mapping

from . import blocks
from .blocks import Grid
from .experts import Matrix
from .graph import EXPERTS, FLOAT, UINT8, Graph, Job, Writer

Matrices = Mapping[str, tuple[int, int, Matrix]]
"""Of each projection (`fc1`, `fc2`) the rows, the columns, and the matrix of an expert."""


def store_experts(graph: Graph, scope: str, n_experts: int, matrices: Matrices, grid: Grid) -> dict[str, str]:
    """Describe the tensors of a layer's experts in the file of experts.

    Args:
        graph: where they are constants.
        scope: what their names begin with.
        matrices: what they have.
        grid: how they are quantized.

    Returns:
        names of constants: `fc1_q` uint8 (experts, rows, bytes), `fc1_scales` float32 (experts, rows, blocks), ...
    """
    places, names = {}, {}
    for fc, (n_rows, n_columns, _) in matrices.items():
        for kind, data_type, n in (
            ("q", UINT8, grid.row_bytes(n_columns)),
            ("scales", FLOAT, grid.n_blocks(n_columns)),
        ):
            name = f"{scope}.experts.{fc}_{kind}"
            names[f"{fc}_{kind}"] = name
            places[f"{fc}_{kind}"] = graph.stored(name, data_type, (n_experts, n_rows, n), EXPERTS)

    def run(writer: Writer) -> None:
        for expert in range(n_experts):
            for fc, (_, _, matrix) in matrices.items():
                packed, scales = blocks.quantize(matrix(expert), grid)
                writer.write(places[f"{fc}_q"], expert * packed.nbytes, packed)
                writer.write(places[f"{fc}_scales"], expert * scales.nbytes, scales)

    graph.jobs.append(Job(sum(place.n_bytes for place in places.values()), run))
    return names


def store_float_experts(graph: Graph, scope: str, n_experts: int, matrices: Matrices) -> dict[str, str]:
    """As `store_experts`, but for experts that are not quantized.

    Returns:
        names of constants: `fc1` and `fc2`, float32 (experts, rows, columns).
    """
    places, names = {}, {}
    for fc, (n_rows, n_columns, _) in matrices.items():
        names[fc] = f"{scope}.experts.{fc}"
        places[fc] = graph.stored(names[fc], FLOAT, (n_experts, n_rows, n_columns), EXPERTS)

    def run(writer: Writer) -> None:
        for expert in range(n_experts):
            for fc, (_, _, matrix) in matrices.items():
                values = matrix(expert)
                writer.write(places[fc], expert * values.nbytes, values)

    graph.jobs.append(Job(sum(place.n_bytes for place in places.values()), run))
    return names
