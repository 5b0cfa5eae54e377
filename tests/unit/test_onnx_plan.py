# SPDX-License-Identifier: MIT
"""What a plan counts of an ONNX file, by hand; what ONNX Runtime really takes is in tests/converters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemoe.formats.onnx_model import OnnxModel, read_model
from edgemoe.onnx_plan import OnnxPlan, kv_bytes, plan

N, K, BLOCK = 96, 64, 32


def _save(
    path: Path, nodes: list[Any], tensors: dict[str, Any], inputs: list[Any], *, inside: bool = False
) -> OnnxModel:
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save_model(model, path, save_as_external_data=not inside, location="data", size_threshold=0)
    return read_model(path)


def _floats(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _matmul_nbits(tmp_path: Path, bits: int, **attributes: int) -> OnnxPlan:
    tensors = {
        "w": np.zeros((N, K // BLOCK, BLOCK * bits // 8), np.uint8),
        "s": np.zeros((N, K // BLOCK), np.float32),
    }
    settings = {"K": K, "N": N, "bits": bits, "block_size": BLOCK, **attributes}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **settings)
    return plan(_save(tmp_path / "m.onnx", [node], tensors, [_floats("x", "t", K)]), 1)


@pytest.mark.parametrize(
    ("bits", "level", "copies", "is_decoded"),
    [(4, 0, 0, False), (4, 1, 0, False), (4, 4, 3, False), (8, 4, 3, False), (8, 0, 0, True), (2, 0, 0, True)],
)
def test_quantized_matrices(tmp_path: Path, bits: int, level: int, copies: int, is_decoded: bool) -> None:
    """Guards against: copies of scales that ONNX Runtime makes for 8-bit activations forgotten, and matrices that it
    decodes in each run."""
    made = _matmul_nbits(tmp_path, bits, accuracy_level=level)
    scales = 4 * N * K // BLOCK
    assert made.dense_bytes == N * K * bits // 8 + (1 + copies) * scales
    assert made.scratch_bytes == (4 * N * K if is_decoded else 0)
    assert made.repack_bytes == (0 if is_decoded else N * K * bits // 8)
    assert made.mapped_bytes == 0


def test_rows_of_an_embedding_are_counted_and_one_that_is_multiplied_with_is_dense(tmp_path: Path) -> None:
    """Guards against: an embedding that is the output's matrix as well taken for one of which rows are read."""
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["t"])
    gather = helper.make_node("Gather", ["w", "ids"], ["e"])
    weights = {"w": np.zeros((1 << 16, 128), np.float32)}
    n_bytes = weights["w"].nbytes
    alone = plan(_save(tmp_path / "a.onnx", [gather], weights, [ids]), 1)
    assert (alone.dense_bytes, alone.mapped_bytes, alone.rows_bytes) == (0, n_bytes, 16 << 20)
    assert alone.own_bytes == (16 << 20) + alone.rows_bytes
    tied = [gather, helper.make_node("Gemm", ["e", "w"], ["y"], transB=1)]
    both = plan(_save(tmp_path / "b.onnx", tied, weights, [ids]), 1)
    assert (both.dense_bytes, both.mapped_bytes) == (n_bytes, n_bytes)
    inside = plan(_save(tmp_path / "c.onnx", [gather], weights, [ids], inside=True), 1)
    assert (inside.dense_bytes, inside.mapped_bytes) == (n_bytes, 0)


def test_cache_by_the_inputs(tmp_path: Path) -> None:
    """Guards against: a head's size that the file only names, as genai's builder does, taken for the context."""
    inputs = [
        _floats("past_key_values.0.key", "batch_size", 2, "past_sequence_length", "kv_cache_dim"),
        _floats("past_key_values.0.value", "batch_size", 2, "past_sequence_length", 16),
        _floats("past.1.conv", "batch_size", 64, 3),
        _floats("x", "t", 4),
    ]
    model = _save(tmp_path / "m.onnx", [helper.make_node("Identity", ["x"], ["y"])], {}, inputs)
    assert model.inputs[0].shape == ("batch_size", 2, "past_sequence_length", "kv_cache_dim")
    assert kv_bytes(model, 1000, 16) == 2 * 2 * 1000 * 16 * 4 + 64 * 3 * 4
