# SPDX-License-Identifier: MIT
"""From tensors of a checkpoint to constants of a graph: vectors at once, matrices by jobs, rows by rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgemoe.errors import ConversionError

from ..hf.checkpoint import Bytes, Checkpoint, Floats, StoredTensor
from . import blocks
from .blocks import Grid
from .graph import BFLOAT16, FLOAT, FLOAT16, MICROSOFT, UINT8, Graph, Job, Place, Writer

_PIECE_ELEMENTS = 4 << 20
"""Elements that go through memory at a time: 16 MiB as float32, some five times that while they are quantized."""

_STORED_AS = {"F32": FLOAT, "F16": FLOAT16, "BF16": BFLOAT16}


class Weights:
    """The tensors of a checkpoint, and which of them the graph has used.

    Args:
        checkpoint: where they are.
        graph: where they go.
        dense: how matrices are quantized; None: they become float32.
        embedding: how the embedding is quantized; None: it stays as it is stored.
    """

    def __init__(self, checkpoint: Checkpoint, graph: Graph, dense: Grid | None, embedding: Grid | None) -> None:
        self.checkpoint = checkpoint
        self.graph = graph
        self._dense = dense
        self._embedding = embedding
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.checkpoint.tensors

    def first(self, *names: str) -> str:
        """The first of these names that there is, or else the first."""
        return next((name for name in names if self.has(name)), names[0])

    def need(self, name: str, shape: tuple[int, ...] | None = None) -> StoredTensor:
        """A tensor, used from now on.

        Raises:
            ConversionError: there is none, or it has another shape.
        """
        tensor = self.checkpoint.tensors.get(name)
        if tensor is None:
            raise ConversionError(
                f"cannot convert {self.checkpoint.folder}: tensor {name} is missing; a file of the checkpoint is "
                "missing, or config.json is of another model: download it again"
            )
        if shape is not None and tensor.shape != shape:
            raise ConversionError(
                f"cannot convert {name}: its shape is {list(tensor.shape)}, expected {list(shape)} ({tensor.path}); "
                "config.json and weights are of different models"
            )
        self._used.add(name)
        return tensor

    def use(self, name: str) -> None:
        """Count a tensor as used, if there is one."""
        self._used.add(name)

    def unused(self) -> list[str]:
        """Names of tensors that nothing has used."""
        return sorted(set(self.checkpoint.tensors) - self._used)

    def vector(self, name: str, size: int) -> Floats:
        """float32 (size,), read now."""
        tensor = self.need(name, (size,))
        values: Floats = self.checkpoint.read_rows(tensor, 0, 1)[0]
        return values

    def matrix(self, name: str, n_rows: int, n_columns: int) -> str:
        """A matrix that stays float32, as a constant (n_rows, n_columns)."""
        tensor = self.need(name, (n_rows, n_columns))
        return self._floats(name, tensor)

    def linear(self, x: str, name: str, n_rows: int, n_columns: int) -> str:
        """x (batch, sequence, n_columns) times the transposed `name.weight`, plus `name.bias` if there is one."""
        y = self._multiply(x, name, self.need(f"{name}.weight", (n_rows, n_columns)))
        if self.has(f"{name}.bias"):
            y = self.graph.node("Add", y, self.graph.constant(self.vector(f"{name}.bias", n_rows)))
        return y

    def table(self, name: str, values: Floats) -> None:
        """A matrix that was computed, as a constant."""
        place = self.graph.stored(name, FLOAT, values.shape)
        self.graph.jobs.append(Job(place.n_bytes, lambda writer: writer.write(place, 0, values)))

    def embedding(self, name: str, n_rows: int, n_columns: int, ids: str) -> str:
        """Rows of the matrix, picked by ids (batch, sequence), as float32."""
        tensor = self.need(name, (n_rows, n_columns))
        if self._embedding is not None and n_columns % self._embedding.block == 0:
            return self._quantized_embedding(name, tensor, ids, self._embedding)
        data_type = _STORED_AS.get(tensor.dtype, FLOAT)
        place = self.graph.stored(name, data_type, tensor.shape)

        def run(writer: Writer) -> None:
            at = 0
            for start, stop in pieces(n_rows, n_columns):
                values = self.checkpoint.read_rows(tensor, start, stop)  # refuses what is not finite
                data: Floats | Bytes = values
                if data_type != FLOAT:
                    data = self.checkpoint.read_raw(tensor, start, stop)
                writer.write(place, at, data)
                at += data.nbytes

        self.graph.jobs.append(Job(place.n_bytes, run))
        rows = self.graph.node("Gather", name, ids)
        return rows if data_type == FLOAT else self.graph.node("Cast", rows, to=FLOAT)

    def _multiply(self, x: str, name: str, tensor: StoredTensor) -> str:
        graph = self.graph
        n_rows, n_columns = tensor.shape
        if self._dense is None:
            product = graph.node(
                "Gemm", graph.reshape(x, -1, n_columns), self._floats(f"{name}.weight_fp32", tensor), transB=1
            )
            tokens = graph.node("Shape", x, end=2)
            shape = graph.node("Concat", tokens, graph.constant([n_rows], np.int64), axis=0)
            return graph.node("Reshape", product, shape)
        grid = self._dense
        n_blocks = grid.n_blocks(n_columns)
        q_name, s_name = f"{name}.weight_q{grid.bits}", f"{name}.weight_scales"
        q = graph.stored(q_name, UINT8, (n_rows, n_blocks, grid.block * grid.bits // 8))
        s = graph.stored(s_name, FLOAT, (n_rows * n_blocks,))
        self._quantize(tensor, grid, q, s)
        sizes = {"K": n_columns, "N": n_rows, "bits": grid.bits, "block_size": grid.block, **grid.accuracy}
        return graph.node("MatMulNBits", x, q_name, s_name, domain=MICROSOFT, **sizes)

    def _quantized_embedding(self, name: str, tensor: StoredTensor, ids: str, grid: Grid) -> str:
        n_rows, n_columns = tensor.shape
        q_name, s_name = f"{name}_rows_q{grid.bits}", f"{name}_rows_scales"
        q = self.graph.stored(q_name, UINT8, (n_rows, grid.row_bytes(n_columns)))
        s = self.graph.stored(s_name, FLOAT, (n_rows, grid.n_blocks(n_columns)))
        self._quantize(tensor, grid, q, s)
        axes = {"bits": grid.bits, "block_size": grid.block, "gather_axis": 0, "quantize_axis": 1}
        return self.graph.node("GatherBlockQuantized", q_name, ids, s_name, domain=MICROSOFT, **axes)

    def _quantize(self, tensor: StoredTensor, grid: Grid, q: Place, s: Place) -> None:
        """Fill both places with a matrix, some rows after the other."""

        def run(writer: Writer) -> None:
            q_at = s_at = 0
            for start, stop in pieces(tensor.n_rows, tensor.n_columns):
                packed, scales = blocks.quantize(self.checkpoint.read_rows(tensor, start, stop), grid)
                writer.write(q, q_at, packed)
                writer.write(s, s_at, scales)
                q_at += packed.nbytes
                s_at += scales.nbytes

        self.graph.jobs.append(Job(q.n_bytes + s.n_bytes, run))

    def _floats(self, name: str, tensor: StoredTensor) -> str:
        place = self.graph.stored(name, FLOAT, tensor.shape)

        def run(writer: Writer) -> None:
            at = 0
            for start, stop in pieces(tensor.n_rows, tensor.n_columns):
                values = self.checkpoint.read_rows(tensor, start, stop)
                writer.write(place, at, values)
                at += values.nbytes

        self.graph.jobs.append(Job(place.n_bytes, run))
        return name


def pieces(n_rows: int, n_columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that fit into memory together."""
    step = max(_PIECE_ELEMENTS // n_columns, 1)
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)
