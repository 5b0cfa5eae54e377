# SPDX-License-Identifier: MIT
"""Nodes whose tensors are not what they should be: each an error of its own, which names the node and the input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgemoe.errors import BackendError
from edgemoe.onnx import InferenceSession
from tests.integration.onnx_models import Model, Shape, write_model


def changed(model: Model, change: dict[str, Any], path: Path) -> Path:
    """The model with other tensors (an array), dimensions of x (a tuple), or inputs (a list)."""
    proto = onnx.load(model.path)
    for name, value in change.items():
        if name == "x":
            proto.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, value))
        elif name == "inputs":
            proto.graph.node[0].input.extend(value)
        else:
            tensor = next(t for t in proto.graph.initializer if t.name == name)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    onnx.save_model(proto, path, save_as_external_data=True, location=path.name + ".data", size_threshold=0)
    return path


def zeros(*dims: int, dtype: Any = np.float32) -> Any:
    return np.zeros(dims, dtype)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"w1.0": zeros(8, 192)}, r"w1.0 of shape \[8, 192\], expected \[experts, rows, columns\]"),
        ({"w2.0": zeros(8, 64, 96, 1)}, r"w2.0 of shape \[8, 64, 96, 1\], expected \[experts"),
        ({"w1.0": zeros(7, 192, 64)}, r"w1\.0 of shape \[7, .* w2\.0 of shape \[8, .*: expected as many experts"),
        ({"w1.0": zeros(8, 191, 64)}, "w1.0: swiglu with 191 rows, expected an even number"),
        ({"w1.0": zeros(8, 192, 65)}, r"w1.0 of shape \[8, 192, 65\], expected \[8, 192, 64\]"),
        ({"w2.0": zeros(8, 64, 97)}, r"w2.0 of shape \[8, 64, 97\], expected \[8, 64, 96\]"),
        ({"b1.0": zeros(8, 96)}, r"b1.0 of shape \[8, 96\], expected \[8, 192\]"),
        ({"b2.0": zeros(64)}, r"b2.0 of shape \[64\], expected \[8, 64\]"),
        ({"x": ("tokens", 63)}, r"x of shape \[-1, 63\], expected 2 or 3 axes, the last one of 64"),
        ({"x": (1, 1, 5, 64)}, r"x of shape \[1, 1, 5, 64\], expected 2 or 3 axes"),
        ({"inputs": ["w1.0"]}, r"input w1.0 \(fc3\)"),
    ],
)
def test_wrong_ranks_and_shapes_of_float_experts_are_named(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Guards against: a shape taken for another, and bytes read past an expert's end."""
    model = write_model(tmp_path / "model.onnx", Shape(is_quantized=False, normalizes=0, has_bias=True))
    path = changed(model, change, tmp_path / "changed.onnx")
    with pytest.raises(BackendError, match=named) as refused:
        InferenceSession(path, memory="8GiB")
    assert "node moe0 (com.microsoft::MoE)" in str(refused.value)


def test_weights_that_are_computed_are_refused(tmp_path: Path) -> None:
    """Guards against: a node whose experts are not in the file claimed nevertheless."""
    model = write_model(tmp_path / "model.onnx", Shape(is_quantized=False, normalizes=0))
    proto = onnx.load(model.path)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("given", onnx.TensorProto.FLOAT, [8, 192, 64]))
    proto.graph.node[0].input[2] = "given"
    path = tmp_path / "changed.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="changed.data", size_threshold=0)
    with pytest.raises(BackendError, match="input given is not a constant of the model"):
        InferenceSession(path, memory="8GiB")


QUANTIZED = Shape(has_zero_points=True, has_bias=True)


@pytest.mark.parametrize(
    ("shape", "change", "named"),
    [
        (QUANTIZED, {"w1.0": zeros(8, 192, dtype=np.uint8)}, r"w1.0 of shape \[8, 192\], expected \[experts, rows"),
        (
            QUANTIZED,
            {"w1.0": zeros(9, 192, 32, dtype=np.uint8)},
            r"w1\.0 of shape \[9, .* w2\.0 of shape \[8, .*: expected as many experts",
        ),
        (QUANTIZED, {"w1.0": zeros(8, 192, 31, dtype=np.uint8)}, r"w1.0 of shape .* expected \[8, 192, 32\]"),
        (QUANTIZED, {"w2.0": zeros(8, 64, 47, dtype=np.uint8)}, r"w2.0 of shape .* expected \[8, 64, 48\]"),
        (QUANTIZED, {"s1.0": zeros(8, 192)}, r"s1.0 of shape \[8, 192\], expected \[8, 192, 2\]"),
        (QUANTIZED, {"s2.0": zeros(8, 64, 2)}, r"s2.0 of shape \[8, 64, 2\], expected \[8, 64, 3\]"),
        (QUANTIZED, {"z1.0": zeros(8, 192, 2, dtype=np.uint8)}, r"z1.0 of shape .* expected \[8, 192, 1\]"),
        (QUANTIZED, {"z2.0": zeros(8, 64, dtype=np.uint8)}, r"z2.0 of shape .* expected \[8, 64, 2\]"),
        (QUANTIZED, {"b1.0": zeros(192)}, r"b1.0 of shape \[192\], expected \[8, 192\]"),
        (QUANTIZED, {"x": ("tokens", 65)}, r"x of shape \[-1, 65\], expected 2 or 3 axes, the last one of 64"),
        (Shape(block=0), {"s1.0": zeros(8, 192, 2)}, r"s1.0 of shape \[8, 192, 2\], expected \[8, 192, 1\]"),
        (Shape(block=0), {"s1.0": zeros(8)}, r"s1.0 of shape \[8\], expected \[8, 192\]"),
        (Shape(), {"inputs": ["", "", "s1.0"]}, r"input s1.0 \(position 15\) is not implemented"),
        (Shape(), {"inputs": ["", "s1.0"]}, "input s1.0 is a constant"),
    ],
)
def test_wrong_ranks_and_shapes_of_quantized_experts_are_named(
    shape: Shape, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """Guards against: scales, zero points or biases of another shape, whose bytes belong to other rows."""
    model = write_model(tmp_path / "model.onnx", shape)
    path = changed(model, change, tmp_path / "changed.onnx")
    with pytest.raises(BackendError, match=named):
        InferenceSession(path, memory="8GiB")
