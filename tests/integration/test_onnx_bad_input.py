# SPDX-License-Identifier: MIT
"""Models and inputs that are wrong: each its own error, and stock ONNX Runtime never computes them in our place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from edgemoe.errors import BackendError, ModelFormatError
from edgemoe.onnx import PROVIDER, InferenceSession
from tests.integration.onnx_models import Shape, write_model

SHAPE = Shape(has_zero_points=True, has_bias=True)


def _flattened(dims: list[int]) -> list[int]:
    return [dims[0] * dims[1], *dims[2:]]


def _deepened(dims: list[int]) -> list[int]:
    return [1, *dims]


def _swapped(dims: list[int]) -> list[int]:
    return [dims[1], dims[0], *dims[2:]]


@pytest.mark.parametrize("change", [_flattened, _deepened, _swapped])
@pytest.mark.parametrize("name", ["w1", "s1", "b1", "z1", "w2", "s2", "b2", "z2"])
def test_tensors_of_wrong_shape_are_named(name: str, change: Any, tmp_path: Path) -> None:
    """Guards against: bytes read at strides that are not the tensor's, past its end at the last expert."""
    model = write_model(tmp_path / "model.onnx", SHAPE)
    proto = onnx.load(model.path, load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name == f"{name}.0")
    dims = change(list(tensor.dims))
    del tensor.dims[:]
    tensor.dims.extend(dims)
    onnx.save(proto, model.path)
    with pytest.raises(BackendError, match=r"of shapes? \[") as refused:
        InferenceSession(model.path, memory="4GiB")
    assert "moe0" in str(refused.value)
    assert str(dims) in str(refused.value)


@pytest.mark.parametrize("shape", [(64,), (2, 1, 2, 64), (4, 63), (0,)])
def test_activations_of_other_ranks_are_errors(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Guards against: an input of one or four axes read as if it had two."""
    model = write_model(tmp_path / "model.onnx", SHAPE)
    session = InferenceSession(model.path, memory="4GiB")
    feed = model.feed(4)
    with pytest.raises(BackendError, match="expected 2 or 3 axes and 64 columns"):
        session.run(None, {**feed, "x": np.zeros(shape, np.float32)})
    with pytest.raises(BackendError):
        session.run(None, {**feed, "router0": np.zeros((4, 1, 8), np.float32)})
    assert np.isfinite(session.run(None, feed)[0]).all()


def test_no_tokens_are_no_error(tmp_path: Path) -> None:
    """Guards against: a division by zero, or an expert asked for, where a batch is empty."""
    model = write_model(tmp_path / "model.onnx", SHAPE)
    session = InferenceSession(model.path, memory="4GiB")
    assert session.run(None, model.feed(0))[0].shape == (0, 64)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "router0", "mixing0"])
def test_values_that_are_no_numbers_do_not_crash(where: str, value: float, tmp_path: Path) -> None:
    """Guards against: an order of scores that is none (std::partial_sort reads out of bounds), experts that are
    none, and other tokens of the batch that change."""
    model = write_model(tmp_path / "model.onnx", Shape(has_router_weights=True, k=3))
    session = InferenceSession(model.path, memory="4GiB")
    feed = model.feed(5)
    expected = session.run(None, feed)[0]
    feed[where] = feed[where].copy()
    feed[where][2, 1:4] = value
    found = session.run(None, feed)[0]
    np.testing.assert_array_equal(np.delete(found, 2, axis=0), np.delete(expected, 2, axis=0))


@pytest.mark.parametrize("folder", ["", ".", "elsewhere"])
def test_models_as_bytes_run_where_their_data_can_be_found(folder: str, tmp_path: Path) -> None:
    """Guards against: experts looked for in the working directory, or not found although ONNX Runtime was told where
    a model given as bytes has its external data."""
    model = write_model(tmp_path / "model.onnx", SHAPE)
    ours = InferenceSession(model.path)  # registers the provider as well
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if folder:
        place = str(tmp_path / folder)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", place)
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == PROVIDER]
    options.add_provider_for_devices(devices[:1], {"strict": "1"})
    whole = model.path.read_bytes()
    if folder != ".":
        with pytest.raises(Exception, match=r"model\.onnx\.data|given as bytes"):
            onnxruntime.InferenceSession(whole, options, enable_fallback=0)
        return
    session = onnxruntime.InferenceSession(whole, options, enable_fallback=0)
    assert session.get_providers()[0] == PROVIDER
    feed = model.feed(7)
    np.testing.assert_array_equal(session.run(None, feed)[0], ours.run(None, feed)[0])


def test_data_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    """Guards against: reads that fail later, one expert at a time."""
    model = write_model(tmp_path / "model.onnx", SHAPE)
    (tmp_path / "model.onnx.data").unlink()
    (tmp_path / "model.onnx.data").mkdir()
    with pytest.raises(ModelFormatError, match="expected a file"):
        InferenceSession(model.path)
