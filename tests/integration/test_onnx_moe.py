# SPDX-License-Identifier: MIT
"""Nodes com.microsoft::MoE, whose experts are floats: streamed, with the meaning that stock ONNX Runtime gives them."""

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
from tests.integration.onnx_models import Shape, relative_error, stock, write_model

TOLERANCE = 1e-5
FLOAT = Shape(is_quantized=False, normalizes=0)
SHAPES = {
    "swiglu": Shape(is_quantized=False, normalizes=0, n_layers=2),
    "swiglu-normalized": Shape(is_quantized=False, normalizes=1, has_bias=True),
    "gpt-oss": Shape(is_quantized=False, alpha=1.702, beta=1.0, limit=0.5, has_bias=True, k=4),
    "silu": Shape(is_quantized=False, normalizes=0, activation="silu"),
    "gelu": Shape(is_quantized=False, normalizes=0, activation="gelu", has_bias=True),
    "relu": Shape(is_quantized=False, normalizes=0, activation="relu"),
    "identity": Shape(is_quantized=False, normalizes=1, activation="identity"),
    "odd-sizes": Shape(is_quantized=False, normalizes=0, hidden=33, inter=17, n_experts=5, has_bias=True),
    "square": Shape(is_quantized=False, normalizes=0, activation="relu", hidden=32, inter=32),
    "one-expert": Shape(is_quantized=False, normalizes=0, k=1),
    "all-experts": Shape(is_quantized=False, normalizes=0, k=8),
}


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_those_of_numpy_and_of_stock_onnx_runtime(name: str, tmp_path: Path) -> None:
    """Guards against: other rows than stock's for gate and up, a softmax of the chosen where all are meant."""
    model = write_model(tmp_path / "model.onnx", SHAPES[name])
    ours, theirs = InferenceSession(model.path), stock(model.path)
    assert ours.stats().n_streamed_nodes == SHAPES[name].n_layers
    for n_tokens in (1, 37):
        feed = model.feed(n_tokens, seed=n_tokens)
        found = ours.run(None, feed)[0]
        assert relative_error(found, model.reference(feed)) < TOLERANCE
        assert relative_error(found, theirs.run(None, feed)[0]) < TOLERANCE
    assert ours.stats().expert_bytes_read > 0


@pytest.mark.parametrize("name", ["swiglu-normalized", "relu", "odd-sizes"])
def test_experts_of_16_bits(name: str, tmp_path: Path) -> None:
    """Guards against: halves read as floats, and results rounded more than once."""
    shape = dataclasses.replace(SHAPES[name], is_half=True, has_residual=False)
    model = write_model(tmp_path / "model.onnx", shape)
    session = InferenceSession(model.path)
    assert session.stats().n_streamed_nodes == 1
    for n_tokens in (1, 37):
        feed = model.feed(n_tokens, seed=n_tokens)
        expected = model.reference(feed)
        # Of float32 sums, and of the rounding of the output to 11 places.
        allowed = TOLERANCE * np.abs(expected).max() + np.abs(expected) * 2.0**-11
        assert (np.abs(session.run(None, feed)[0] - expected) <= allowed).all()
        assert (np.abs(stock(model.path).run(None, feed)[0] - expected) <= allowed).all()


def test_equal_scores_choose_as_stock_does(tmp_path: Path) -> None:
    """Guards against: other experts than stock's where scores are equal, which the operator does not define."""
    model = write_model(tmp_path / "model.onnx", FLOAT)
    feed = model.feed(5)
    feed["router0"][:] = 1.0
    feed["router0"][2:, 3] = 2.0
    found = InferenceSession(model.path).run(None, feed)[0]
    assert relative_error(found, stock(model.path).run(None, feed)[0]) < TOLERANCE


def test_outputs_do_not_depend_on_what_is_resident_or_on_threads(tmp_path: Path) -> None:
    """Guards against: a slot read after another expert has taken its place, sums whose order depends on threads."""
    model = write_model(tmp_path / "model.onnx", dataclasses.replace(FLOAT, n_layers=3))
    feeds = [model.feed(n, seed=n) for n in (1, 11, 64, 1)]
    everything = InferenceSession(model.path)
    expected = [everything.run(None, feed)[0] for feed in feeds]
    for n_threads in (1, 3):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        session = InferenceSession(model.path, sess_options=options)
        assert session._runtime is not None
        _native.set_slots_bytes(session._runtime, session.plan.token_cycle_bytes)
        for feed, bits in zip(feeds, expected, strict=True):
            np.testing.assert_array_equal(session.run(None, feed)[0], bits)
        assert session.stats().expert_misses > 3 * FLOAT.n_experts


def test_a_budget_holds(tmp_path: Path) -> None:
    """Guards against: experts of floats planned as dense memory, or loaded whole."""
    model = write_model(tmp_path / "model.onnx", dataclasses.replace(FLOAT, n_experts=32, hidden=256, inter=512))
    session = InferenceSession(model.path, memory="4GiB")
    assert session.plan.dense_bytes == 0
    assert session.plan.expert_bank_bytes >= 32 * 3 * 256 * 512 * 4
    feed = model.feed(3)
    assert relative_error(session.run(None, feed)[0], model.reference(feed)) < TOLERANCE


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"use_sparse_mixer": 1}, "node moe0 .* use_sparse_mixer 1"),
        ({"swiglu_fusion": 2}, "swiglu_fusion 2"),
        ({"swiglu_fusion": 0}, "swiglu_fusion 0"),
        ({"activation_type": "geglu"}, "activation_type geglu"),
        ({"swiglu_limit_after_activation": 1}, "swiglu_limit_after_activation 1"),
        ({"k": 9}, "k 9 of 8 experts"),
        ({"activation_type": "silu", "activation_alpha": 2.0}, "activation_alpha 2.0"),
    ],
)
def test_what_is_not_implemented_is_named(attributes: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Guards against: attributes that are ignored, as stock's CPU kernel does with the first."""
    model = write_model(tmp_path / "model.onnx", FLOAT, attributes=attributes)
    with pytest.raises(BackendError, match=named):
        InferenceSession(model.path, memory="8GiB")


def test_fewer_experts_keep_their_share_of_all(tmp_path: Path) -> None:
    """Guards against: weights of the chosen divided by their sum, where the node asks for shares of all scores."""
    model = write_model(tmp_path / "model.onnx", dataclasses.replace(FLOAT, k=4))
    feed = model.feed(1)
    found = InferenceSession(model.path, expert_top_k=1).run(None, feed)[0]
    fewer = dataclasses.replace(model, shape=dataclasses.replace(model.shape, k=1))
    assert relative_error(found, fewer.reference(feed)) < TOLERANCE
    biased = InferenceSession(model.path, reuse_bias=0)
    np.testing.assert_array_equal(biased.run(None, feed)[0], InferenceSession(model.path).run(None, feed)[0])
