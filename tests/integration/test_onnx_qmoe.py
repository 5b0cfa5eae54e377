# SPDX-License-Identifier: MIT
"""QMoE in our execution provider is QMoE: against float64 in numpy, against stock ONNX Runtime, and at every budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edgemoe import _native
from edgemoe.errors import BackendError
from edgemoe.onnx import InferenceSession
from tests.integration.onnx_models import Model, Shape, relative_error, stock, write_model

TOLERANCE = 1e-5
SHAPES = {
    "int4": Shape(n_layers=2),
    "int4-block16": Shape(block=16),
    "int4-block64": Shape(block=64, inter=128),
    "int4-block128": Shape(block=128, hidden=128, inter=256),
    "int4-block256": Shape(block=256, hidden=256, inter=256),
    "int4-rows": Shape(block=0),
    "int4-zero-points": Shape(has_zero_points=True, has_bias=True),
    "int4-odd-blocks": Shape(has_zero_points=True, hidden=96, inter=160),
    "int4-one-block": Shape(block=64, has_zero_points=True, inter=64),
    "int4-rows-zero-points": Shape(block=0, has_zero_points=True, hidden=66, inter=50),
    "int8": Shape(bits=8),
    "int8-zero-points": Shape(bits=8, has_zero_points=True, block=16),
    "int8-rows": Shape(bits=8, block=0, has_bias=True, hidden=65, inter=33),
    "int8-rows-zero-points": Shape(bits=8, block=0, has_zero_points=True),
    "int2": Shape(bits=2),
    "int2-block16": Shape(bits=2, block=16, has_zero_points=True, hidden=80, inter=112),
    "int2-block128": Shape(bits=2, block=128, has_zero_points=True, hidden=256, inter=384),
    "int2-one-block": Shape(bits=2, block=64, has_zero_points=True, inter=64),
    "int2-rows": Shape(bits=2, block=0, has_bias=True, hidden=68, inter=36),
    "int2-rows-zero-points": Shape(bits=2, block=0, has_zero_points=True),
    "gpt-oss": Shape(alpha=1.702, beta=1.0, limit=0.5, has_bias=True, k=4),
    "silu": Shape(activation="silu"),
    "gelu": Shape(activation="gelu", has_bias=True),
    "relu": Shape(activation="relu"),
    "identity": Shape(activation="identity"),
    "mixing-weights": Shape(has_router_weights=True, normalizes=0, k=3),
    "mixing-weights-normalized": Shape(has_router_weights=True, k=3),
    "one-expert": Shape(k=1),
    "all-experts": Shape(k=8),
    "accuracy-level-1": Shape(accuracy_level=1),
    "8-bit-activations": Shape(n_layers=2, accuracy_level=4),
    "8-bit-activations-block16": Shape(block=16, has_zero_points=True, has_bias=True, accuracy_level=4),
    "8-bit-activations-block128": Shape(block=128, hidden=256, inter=128, accuracy_level=4),
    "8-bit-activations-rows": Shape(block=0, has_zero_points=True, hidden=66, inter=50, accuracy_level=4),
    "8-bit-activations-int8": Shape(bits=8, has_zero_points=True, accuracy_level=4),
    "8-bit-activations-int8-rows": Shape(bits=8, block=0, hidden=65, inter=33, accuracy_level=4),
    "8-bit-activations-int2": Shape(bits=2, has_zero_points=True, accuracy_level=4),
}
# Stock quantizes activations to 8 bits when asked for accuracy_level 4, for blockwise 8-bit experts, and for 2-bit
# ones, in blocks of its own, which is no reference for ours.
STOCK_IS_FLOAT = {
    name: shape.accuracy_level != 4 and (shape.bits == 4 or (shape.bits == 8 and shape.block == 0))
    for name, shape in SHAPES.items()
}


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_those_of_numpy_and_of_stock_onnx_runtime(name: str, tmp_path: Path) -> None:
    """Guards against: any mistake in decoding, scaling, routing, activation or mixing, for one token and for many."""
    model = write_model(tmp_path / "model.onnx", SHAPES[name])
    ours = InferenceSession(model.path)
    assert ours.stats().n_streamed_nodes == SHAPES[name].n_layers
    theirs = stock(model.path) if STOCK_IS_FLOAT[name] else None
    for n_tokens in (1, 37):
        feed = model.feed(n_tokens, seed=n_tokens)
        found, expected = ours.run(None, feed)[0], model.reference(feed)
        errors = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
        if SHAPES[name].accuracy_level == 4:
            # What float32 and float64 round to different 8-bit codes, a few in a million, is off by a step of those.
            assert np.quantile(errors, 0.9) < TOLERANCE
            assert errors.max() < 1e-3
        else:
            assert errors.max() < TOLERANCE
        if theirs is not None:
            assert relative_error(found, theirs.run(None, feed)[0]) < TOLERANCE
    stats = ours.stats()
    assert stats.expert_misses > 0
    assert stats.expert_bytes_read > 0


def test_batches_have_three_axes(tmp_path: Path) -> None:
    """Guards against: an output of two axes for an input [batch, sequence, hidden]."""
    model = write_model(tmp_path / "model.onnx", SHAPES["int4"])
    feed = model.feed(6, rank=3)
    found = InferenceSession(model.path).run(None, feed)[0]
    assert found.shape == (1, 6, 64)
    assert relative_error(found, model.reference(feed)) < TOLERANCE


def test_equal_scores_choose_as_stock_does(tmp_path: Path) -> None:
    """Guards against: other experts than stock's where scores are equal, which the operator does not define."""
    model = write_model(tmp_path / "model.onnx", SHAPES["int4-block16"])
    feed = model.feed(5)
    feed["router0"][:] = 1.0
    feed["router0"][2:, 3] = 2.0
    found = InferenceSession(model.path).run(None, feed)[0]
    assert relative_error(found, stock(model.path).run(None, feed)[0]) < TOLERANCE


def test_small_scales_inside_of_the_model_give_the_same_bits(tmp_path: Path) -> None:
    """Guards against: scales that onnx leaves in the .onnx file being taken from elsewhere than those beside it."""
    shape = Shape(has_zero_points=True, has_bias=True)
    beside = write_model(tmp_path / "beside.onnx", shape)
    # Weights are 24 KiB and more, scales and zero points less.
    inside = write_model(tmp_path / "inside.onnx", shape, size_threshold=20000)
    assert (tmp_path / "inside.onnx").stat().st_size > (tmp_path / "beside.onnx").stat().st_size
    feed = beside.feed(9)
    np.testing.assert_array_equal(
        InferenceSession(inside.path).run(None, feed)[0], InferenceSession(beside.path).run(None, feed)[0]
    )


@pytest.mark.parametrize("block", [16, 32, 64, 256])
def test_8_bit_activations_are_as_accurate_as_stocks(block: int, tmp_path: Path) -> None:
    """Guards against: accuracy_level 4 with activations rounded otherwise, or more coarsely, than stock rounds them."""
    shape = Shape(hidden=512, inter=256, block=block, accuracy_level=4)
    model = write_model(tmp_path / "model.onnx", shape)
    feed = model.feed(1)
    exact = dataclasses.replace(model, shape=dataclasses.replace(shape, accuracy_level=0)).reference(feed)
    ours = InferenceSession(model.path).run(None, feed)[0]
    theirs = stock(model.path).run(None, feed)[0]
    assert TOLERANCE < relative_error(ours, exact) < 1.2 * relative_error(theirs, exact)
    if block <= 32:
        assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_outputs_do_not_depend_on_the_batch(accuracy_level: int, tmp_path: Path) -> None:
    """Guards against: another order of sums where several tokens share an expert."""
    shape = Shape(n_layers=2, hidden=320, inter=224, k=3, has_zero_points=True, accuracy_level=accuracy_level)
    model = write_model(tmp_path / "model.onnx", shape)
    session = InferenceSession(model.path)
    feed = model.feed(41)
    together = session.run(None, feed)[0]
    alone = [session.run(None, {k: v[i : i + 1] for k, v in feed.items()})[0] for i in range(41)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def _run_all(session: InferenceSession, model: Model) -> list[Any]:
    return [session.run(None, model.feed(n, seed=n + i))[0] for i in range(3) for n in (1, 1, 11, 64)]


@pytest.mark.parametrize(
    "shape",
    [
        Shape(n_layers=3, has_zero_points=True),
        Shape(n_layers=3, bits=8, block=0),
        Shape(n_layers=3, has_zero_points=True, accuracy_level=4),
    ],
)
def test_outputs_do_not_depend_on_what_is_resident(shape: Shape, tmp_path: Path) -> None:
    """Guards against: a slot or a copy of scales read after another expert has taken its place."""
    model = write_model(tmp_path / "model.onnx", shape)
    everything = InferenceSession(model.path)
    assert everything._runtime is not None
    expected = _run_all(everything, model)
    assert everything.stats().expert_misses == 3 * shape.n_experts
    floor = everything.plan.token_cycle_bytes
    for slots_bytes in (floor, floor * 3 // 2, floor * 2):
        session = InferenceSession(model.path)
        assert session._runtime is not None
        _native.set_slots_bytes(session._runtime, slots_bytes)
        assert session.stats().slots_bytes <= slots_bytes
        for found, bits in zip(_run_all(session, model), expected, strict=True):
            np.testing.assert_array_equal(found, bits)
        if slots_bytes == floor:
            assert session.stats().expert_misses > 3 * shape.n_experts


def test_outputs_do_not_depend_on_threads(tmp_path: Path) -> None:
    """Guards against: sums whose order depends on who computes them, and threads that share a row of scratch."""
    model = write_model(tmp_path / "model.onnx", Shape(n_layers=2, hidden=256, inter=512))
    results = []
    for n_threads in (1, 2, 5):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        results.append(_run_all(InferenceSession(model.path, sess_options=options), model))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_long_inputs_go_through_in_pieces(tmp_path: Path) -> None:
    """Guards against: tokens of one piece computed with the experts or weights of another's."""
    shape = Shape(k=8, hidden=64, inter=2048, has_router_weights=True)
    # Floats of a token: results of fc1 and fc2, and their inputs, filled up to 128 columns; 16 MiB of them are computed
    # at once.
    n_at_once = (16 << 20) // (4 * (8 * (4096 + 64 + 2048) + 128))
    assert n_at_once == 84
    model = write_model(tmp_path / "model.onnx", shape)
    feed = model.feed(100)
    session = InferenceSession(model.path)
    found = session.run(None, feed)[0]
    halves = [session.run(None, {k: v[part] for k, v in feed.items()})[0] for part in (slice(0, 50), slice(50, 100))]
    np.testing.assert_array_equal(found, np.concatenate(halves))
    assert relative_error(found, stock(model.path).run(None, feed)[0]) < TOLERANCE


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"use_sparse_mixer": 1}, "use_sparse_mixer 1"),
        ({"quant_type": "fp4"}, "quant_type fp4"),
        ({"swiglu_fusion": 2}, "swiglu_fusion 2"),
        ({"normalize_routing_weights": 0}, "normalize_routing_weights 0"),
        ({"fc2_expert_weight_bits": 8}, "expected"),
        ({"activation_type": "geglu"}, "activation_type geglu"),
        ({"weights_prepacked": 1}, "weights_prepacked 1"),
        ({"swiglu_limit_after_activation": 1}, "swiglu_limit_after_activation 1"),
        ({"block_size": 8}, "block_size 8"),
        ({"k": 9}, "k 9 of 8 experts"),
    ],
)
def test_what_is_not_implemented_is_named(attributes: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Guards against: attributes that are ignored, which stock's CPU kernel does with the first two and the fourth."""
    model = write_model(tmp_path / "model.onnx", Shape(), attributes=attributes)
    with pytest.raises(BackendError, match=named):
        InferenceSession(model.path, memory="8GiB")
