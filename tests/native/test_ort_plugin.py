# SPDX-License-Identifier: MIT
"""The ONNX Runtime plug-in without our Python: what another host sees of it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

from edgemoe import _native
from edgemoe.onnx import PROVIDER, _register
from tests.integration.onnx_models import Shape, relative_error, write_model

_GetApi = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
_GetVersion = ctypes.CFUNCTYPE(ctypes.c_void_p)
_CreateStatus = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)


class _ApiBase(ctypes.Structure):
    _fields_ = [("get_api", _GetApi), ("get_version", _GetVersion)]


def session(path: Path, **options: str) -> Any:
    _register()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == PROVIDER]
    settings.add_provider_for_devices(devices[:1], options)
    return onnxruntime.InferenceSession(str(path), settings)


@pytest.mark.parametrize(("entry", "required"), [("CreateEpFactories", 23), ("RegisterCustomOps", 18)])
def test_a_runtime_of_an_older_api_is_refused_before_it_is_used(entry: str, required: int) -> None:
    """Guards against: functions called in a table that is too short for them."""
    asked: list[int] = []
    messages: list[bytes] = []

    @_CreateStatus
    def create_status(_code: int, message: bytes) -> int:
        messages.append(message)
        return 1

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @_GetApi
    def get_api(version: int) -> int | None:
        asked.append(version)
        return ctypes.addressof(table) if version < required else None

    version_text = ctypes.create_string_buffer(b"1.%d.1" % (required - 1))

    @_GetVersion
    def get_version() -> int:
        return ctypes.addressof(version_text)

    base = _ApiBase(get_api, get_version)
    library = ctypes.CDLL(str(_native.ort_plugin_path()))
    call = getattr(library, entry)
    call.restype = ctypes.c_void_p
    if entry == "CreateEpFactories":
        factories = (ctypes.c_void_p * 1)()
        count = ctypes.c_size_t(7)
        status = call(b"edgemoe", ctypes.byref(base), None, factories, ctypes.c_size_t(1), ctypes.byref(count))
        assert count.value == 0
    else:
        status = call(None, ctypes.byref(base))
    assert status == 1
    assert asked == [required, 1]
    assert b"it is 1.%d.1, expected 1.%d or newer" % (required - 1, required) in messages[0]


def test_another_host_needs_options_only(tmp_path: Path) -> None:
    """Guards against: a plug-in that works with our Python alone."""
    model = write_model(tmp_path / "model.onnx", Shape(n_layers=2))
    feed = model.feed(5)
    for options in ({}, {"slots_bytes": str(128 << 10), "n_threads": "2", "n_io_threads": "1", "eviction": "0"}):
        found = session(model.path, **options).run(None, feed)[0]
        assert relative_error(found, model.reference(feed)) < 1e-5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"slots_bytes": "much"}, "option slots_bytes .* 'much', expected a number"),
        ({"n_threads": "-1"}, "option n_threads .* '-1', expected a number"),
        ({"slots_bytes": "4096"}, "4096 bytes of slots hold"),
        ({"eviction": "77"}, "eviction"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, str], named: str, tmp_path: Path) -> None:
    """Guards against: a mistyped option taken for its default."""
    model = write_model(tmp_path / "model.onnx", Shape())
    with pytest.raises(Exception, match=named):
        session(model.path, **options)


def test_two_nodes_share_their_experts(tmp_path: Path) -> None:
    """Guards against: a constant of two nodes dropped with the first of them, or a name taken twice."""
    model = write_model(tmp_path / "model.onnx", Shape(n_layers=2))
    proto = onnx.load(model.path)
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name.endswith(".1"):
                node.input[i] = name[:-1] + "0"
    kept = [t for t in proto.graph.initializer if t.name.endswith(".0")]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    path = tmp_path / "shared.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="shared.data", size_threshold=0)
    feed = model.feed(5)
    expected = type(model)(path, model.shape, [model.tensors[0]] * 2).reference(feed)
    assert relative_error(session(path).run(None, feed)[0], expected) < 1e-5
