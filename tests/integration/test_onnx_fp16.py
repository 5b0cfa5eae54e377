# SPDX-License-Identifier: MIT
"""QMoE of 16-bit floats in our execution provider: computed in 32 bits, rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edgemoe.onnx import InferenceSession
from tests.integration.onnx_models import Model, Shape, write_model

HALF = Shape(is_half=True, has_half_scales=True, has_residual=False)
SHAPES = {
    "int4": HALF,
    "int4-zero-points-bias": Shape(
        is_half=True, has_half_scales=True, has_residual=False, has_zero_points=True, has_bias=True
    ),
    "int4-rows": Shape(is_half=True, has_half_scales=True, has_residual=False, block=0),
    "int8-zero-points": Shape(
        is_half=True, has_half_scales=True, has_residual=False, bits=8, has_zero_points=True, block=16
    ),
    "int8-rows": Shape(
        is_half=True, has_half_scales=True, has_residual=False, bits=8, block=0, has_bias=True, hidden=65, inter=33
    ),
    "gpt-oss": Shape(
        is_half=True, has_half_scales=True, has_residual=False, alpha=1.702, beta=1.0, limit=0.5, has_bias=True, k=4
    ),
    "silu": Shape(is_half=True, has_half_scales=True, has_residual=False, activation="silu"),
    "mixing-weights": Shape(
        is_half=True, has_half_scales=True, has_residual=False, has_router_weights=True, normalizes=0, k=3
    ),
    "float-scales": Shape(is_half=True, has_residual=False, has_zero_points=True),
    "float-scales-rows": Shape(is_half=True, has_residual=False, block=0),
    "half-scales": Shape(has_half_scales=True, has_residual=False),
}
# Stock has kernels for all floats of 16 bits or none; for blockwise 8-bit experts it quantizes activations to 8 bits.
STOCK = [name for name, s in SHAPES.items() if s.is_half == s.has_half_scales and (s.bits == 4 or s.block == 0)]


def allowed(model: Model, expected: Any) -> Any:
    """Sums of 32-bit floats, 1e-5 of the largest element as elsewhere; and if the output is float16 its rounding: half
    a unit in the last of 11 places, or in that of subnormals, 2**-24."""
    error = 1e-5 * np.abs(expected).max()
    return error + (np.maximum(np.abs(expected) * 2.0**-11, 2.0**-25) if model.shape.is_half else 0.0)


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_those_of_float64_rounded_once(name: str, tmp_path: Path) -> None:
    """Guards against: sums in 16 bits, results rounded twice, scales or biases of 16 bits read as 32."""
    model = write_model(tmp_path / "model.onnx", SHAPES[name])
    session = InferenceSession(model.path)
    assert session.stats().n_streamed_nodes == 1
    for n_tokens in (1, 37):
        feed = model.feed(n_tokens, seed=n_tokens)
        found, expected = session.run(None, feed)[0], model.reference(feed)
        assert found.dtype == SHAPES[name].dtype
        assert (np.abs(found - expected) <= allowed(model, expected)).all()


@pytest.mark.parametrize("name", STOCK)
def test_outputs_are_those_of_stock_onnx_runtime(name: str, tmp_path: Path) -> None:
    """Guards against: another meaning of a 16-bit graph than stock's."""
    model = write_model(tmp_path / "model.onnx", SHAPES[name])
    feed = model.feed(37)
    found = InferenceSession(model.path).run(None, feed)[0]
    theirs = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"]).run(None, feed)[0]
    # Stock computes in 32 bits from scales of 16 and rounds as well: both are within `allowed` of float64.
    expected = model.reference(feed)
    assert (np.abs(found.astype(np.float64) - theirs) <= 2 * allowed(model, expected)).all()


def test_scales_of_16_bits_are_half_of_what_is_read(tmp_path: Path) -> None:
    """Guards against: scales widened in the slots instead of in their copies."""
    n_bytes = {}
    for has_half_scales in (False, True):
        shape = Shape(is_half=True, has_half_scales=has_half_scales, n_experts=32, hidden=512, inter=512, k=32)
        model = write_model(tmp_path / f"{has_half_scales}.onnx", shape)
        session = InferenceSession(model.path)
        session.run(None, model.feed(1))
        n_bytes[has_half_scales] = session.stats().expert_bytes_read
    weights = 32 * 3 * 512 * 512 // 2
    scales = 32 * 3 * 512 * 512 // 32 * 4
    # Whole pages: what lies between two experts may be read with both.
    slack = 0.02 * (weights + scales)
    assert abs(n_bytes[False] - weights - scales) < slack
    assert abs(n_bytes[True] - weights - scales // 2) < slack


def test_every_16_bit_float_goes_through_unchanged(tmp_path: Path) -> None:
    """Guards against: a conversion that is wrong for subnormals, the largest or signed zeros; roundings to even."""
    shape = Shape(
        is_quantized=False,
        is_half=True,
        has_residual=False,
        activation="identity",
        n_experts=1,
        k=1,
        hidden=64,
        inter=64,
    )
    model = write_model(tmp_path / "model.onnx", shape)
    _replace_weights(model, np.eye(64, dtype=np.float16)[None], np.eye(64, dtype=np.float16)[None])
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 64)
    router = np.zeros((len(halves), 1), np.float16)
    session = InferenceSession(model.path)
    np.testing.assert_array_equal(session.run(None, {"x": halves, "router0": router})[0], halves)
    # A product of two halves is exact in 32 bits and is rounded once; 2**-13 moves many among the subnormals.
    for factor in (1.0009765625, 1 / 3, 2.0**-13, 3.0):
        scaled = np.eye(64, dtype=np.float16)[None] * np.float16(factor)
        _replace_weights(model, scaled, np.eye(64, dtype=np.float16)[None])
        with np.errstate(over="ignore"):
            expected = (halves.astype(np.float32) * np.float32(np.float16(factor))).astype(np.float16)
        found = InferenceSession(model.path).run(None, {"x": halves, "router0": router})[0]
        # Beside infinities sums of products with zero are NaN.
        finite = np.isfinite(expected).all(axis=1)
        assert finite.sum() > 500
        np.testing.assert_array_equal(found[finite], expected[finite])


def _replace_weights(model: Model, w1: Any, w2: Any) -> None:
    """The file of external data holds the tensors in the order of the model: w1, w2."""
    model.path.with_name(model.path.name + ".data").write_bytes(w1.tobytes() + w2.tobytes())
