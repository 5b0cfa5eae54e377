# SPDX-License-Identifier: MIT
"""The custom operators of the ONNX Runtime plug-in, for hosts without plug-in execution providers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from edgemoe import _native
from edgemoe.errors import BackendError, BudgetError
from edgemoe.onnx import InferenceSession
from tests.integration.onnx_models import Model, Shape, relative_error, write_model
from tests.integration.support import said

MIB = 1 << 20
TOLERANCE = 1e-5


def session(path: Path, named: Path | None = None, **entries: str) -> Any:
    """A session of stock ONNX Runtime's with our operators; `named`: the file that they are told."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in {"model_path": str(named or path), **entries}.items():
        options.add_session_config_entry(f"ep.edgemoeexecutionprovider.{key}", value)
    options.register_custom_ops_library(str(_native.ort_plugin_path()))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "shape",
    [
        Shape(n_layers=2, has_zero_points=True, has_bias=True),
        Shape(bits=8, block=0, has_bias=True),
        Shape(has_router_weights=True, normalizes=0, k=3),
        Shape(is_quantized=False, normalizes=0, n_layers=2, has_bias=True),
        Shape(is_half=True, has_half_scales=True, has_zero_points=True),
        Shape(is_half=True),
        Shape(has_half_scales=True),
        Shape(is_quantized=False, is_half=True),
    ],
    ids=lambda s: " ".join(f"{k}={v}" for k, v in dataclasses.asdict(s).items() if v != getattr(Shape(), k)),
)
def test_operators_give_the_bits_of_the_execution_provider(shape: Shape, tmp_path: Path) -> None:
    """Guards against: a second reading of the same node that differs, or inputs taken from other positions."""
    model = write_model(tmp_path / "model.onnx", shape)
    ours, provider = session(model.path), InferenceSession(model.path)
    for n_tokens in (1, 11):
        feed = model.feed(n_tokens, seed=n_tokens)
        np.testing.assert_array_equal(ours.run(None, feed)[0], provider.run(None, feed)[0])


def test_they_take_the_place_of_the_built_in_kernels(tmp_path: Path) -> None:
    """Guards against: stock kernels that still compute, unnoticed; for 8-bit blocks they are off by 1e-3 and more."""
    model = write_model(tmp_path / "model.onnx", Shape(bits=8))
    feed = model.feed(5)
    stock = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    assert relative_error(stock.run(None, feed)[0], model.reference(feed)) > 1e-4
    assert relative_error(session(model.path).run(None, feed)[0], model.reference(feed)) < TOLERANCE


def test_nodes_share_one_runtime_and_one_budget(tmp_path: Path) -> None:
    """Guards against: a runtime for each node, each with all of the budget; a runtime that outlives its session."""
    model = write_model(tmp_path / "model.onnx", Shape(n_layers=3))
    slots_bytes = 3 * 256 << 10
    loaded = session(model.path, slots_bytes=str(slots_bytes), publish="1")
    published = _native.take_ort_loaded()
    assert published.n_layers == 3
    assert published.runtime is not None
    feed = model.feed(64)
    assert relative_error(loaded.run(None, feed)[0], model.reference(feed)) < TOLERANCE
    stats = published.runtime.stats()
    assert 0 < stats.slots_bytes <= slots_bytes
    # All experts of three layers have passed through one set of slots.
    assert stats.misses >= 3 * model.shape.n_experts


def test_small_constants_inside_of_the_model(tmp_path: Path) -> None:
    """Guards against: biases and scales inside of the .onnx file taken from elsewhere than those beside it."""
    shape = Shape(has_zero_points=True, has_bias=True)
    beside = write_model(tmp_path / "beside.onnx", shape)
    inside = write_model(tmp_path / "inside.onnx", shape, size_threshold=20000)
    feed = beside.feed(9)
    np.testing.assert_array_equal(session(inside.path).run(None, feed)[0], session(beside.path).run(None, feed)[0])


def _renamed(model: Model, path: Path, names: list[str]) -> Path:
    proto = onnx.load(model.path, load_external_data=False)
    nodes = [n for n in proto.graph.node if n.op_type == "QMoE"]
    for node, name in zip(nodes, names, strict=True):
        node.name = name
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("names", [["", ""], ["", "moe0"], ["moe1", "moe0"]])
def test_nodes_are_found_whatever_their_names(names: list[str], tmp_path: Path) -> None:
    """Guards against: a node that takes the experts of another one, as not every node has a name."""
    model = write_model(tmp_path / "model.onnx", Shape(n_layers=2))
    path = _renamed(model, tmp_path / "renamed.onnx", names)
    feed = model.feed(5)
    assert relative_error(session(path).run(None, feed)[0], model.reference(feed)) < TOLERANCE


CHILD = """
import json, sys
import numpy as np
import onnxruntime
from edgemoe import _native, host
path, slots = sys.argv[1:]
options = onnxruntime.SessionOptions()
for key, value in {"model_path": path, "slots_bytes": slots, "n_threads": "2"}.items():
    options.add_session_config_entry("ep.edgemoeexecutionprovider." + key, value)
options.register_custom_ops_library(str(_native.ort_plugin_path()))
before = host.process_rss_bytes()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
rng = np.random.default_rng(0)
for n_tokens in [1] * 8 + [96]:
    feed = {"x": rng.standard_normal((n_tokens, 1024), dtype=np.float32)}
    feed["router0"] = rng.standard_normal((n_tokens, 128), dtype=np.float32)
    session.run(None, feed)
print(json.dumps({"before": before, "peak": host.peak_rss_bytes()}))
"""


def test_what_onnx_runtime_maps_is_not_touched(tmp_path: Path) -> None:
    """Guards against: experts resident a second time in ONNX Runtime's map of the file, or repacked by it."""
    model = write_model(tmp_path / "model.onnx", Shape(n_experts=128, hidden=1024, inter=1024, block=128, k=4))
    bank_bytes = (tmp_path / "model.onnx.data").stat().st_size
    assert bank_bytes > 200 * MIB
    slots_bytes = 24 * MIB
    rss = said(CHILD, model.path, slots_bytes)
    # Beside slots: activations, 16 MiB at most; copies of a layer's scales, 13 MiB; and the session's own needs.
    assert rss["peak"] - rss["before"] < slots_bytes + 60 * MIB
    assert slots_bytes + 60 * MIB < bank_bytes // 2


def test_a_model_without_its_path_is_refused(tmp_path: Path) -> None:
    """Guards against: a session that silently computes with everything in memory, or a message that helps nobody."""
    model = write_model(tmp_path / "model.onnx", Shape())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(_native.ort_plugin_path()))
    with pytest.raises(Exception, match=r"set the session's config entry ep\.edgemoeexecutionprovider\.model_path"):
        onnxruntime.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])


def test_the_file_of_another_model_is_refused(tmp_path: Path) -> None:
    """Guards against: the experts of one model computed in the graph of another one."""
    model = write_model(tmp_path / "model.onnx", Shape(n_layers=2))
    other_bytes = write_model(tmp_path / "bytes.onnx", Shape(n_layers=2), seed=1)
    with pytest.raises(
        Exception, match=r"node moe0: its input 2 is tensor w1.0 with other bytes.*model_path has to be"
    ):
        session(model.path, other_bytes.path)
    other_shape = write_model(tmp_path / "shape.onnx", Shape(n_layers=2, inter=128))
    with pytest.raises(Exception, match=r"node moe0: its input 2 is tensor w1.0 with other bytes, shape or type"):
        session(model.path, other_shape.path)
    fewer = write_model(tmp_path / "fewer.onnx", Shape())
    with pytest.raises(Exception, match=r"node moe1 with output q1 is not among the MoE nodes"):
        session(model.path, fewer.path)
    with pytest.raises(Exception, match=r"cannot open the model: No such file"):
        session(model.path, tmp_path / "absent.onnx")


def test_a_model_given_as_bytes_is_computed_from_its_file(tmp_path: Path) -> None:
    """Guards against: model_path being of no use where ONNX Runtime itself has no path."""
    model = write_model(tmp_path / "model.onnx", Shape())
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("ep.edgemoeexecutionprovider.model_path", str(model.path))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    options.register_custom_ops_library(str(_native.ort_plugin_path()))
    loaded = onnxruntime.InferenceSession(model.path.read_bytes(), options, providers=["CPUExecutionProvider"])
    feed = model.feed(3)
    assert relative_error(loaded.run(None, feed)[0], model.reference(feed)) < TOLERANCE


def test_what_is_not_implemented_is_named(tmp_path: Path) -> None:
    """Guards against: attributes that are ignored; there is no other kernel that would compute the node."""
    model = write_model(tmp_path / "model.onnx", Shape(), attributes={"use_sparse_mixer": 1})
    with pytest.raises(Exception, match=r"node moe0 \(com.microsoft::QMoE\): use_sparse_mixer 1"):
        session(model.path)
    # ONNX Runtime checks attributes of its own operators, not those of ours.
    other = write_model(tmp_path / "other.onnx", Shape(is_quantized=False), attributes={"quant_type": "int"})
    with pytest.raises(Exception, match=r"node moe0 \(com.microsoft::MoE\): attribute quant_type is not known"):
        session(other.path)
    typed = write_model(tmp_path / "typed.onnx", Shape(), attributes={"k": 2.0})
    with pytest.raises(Exception, match=r"attribute k has type 3, expected a whole number"):
        session(typed.path)
    inside = write_model(tmp_path / "inside.onnx", Shape(), size_threshold=1 << 30)
    with pytest.raises(Exception, match=r"w1.0 lies inside the .onnx file; save the model with external data"):
        session(inside.path)
    with pytest.raises(Exception, match=r"option slots_bytes .* 'much', expected a number"):
        session(model.path, slots_bytes="much")
    with pytest.raises(Exception, match=r"option prefetch .* '1', expected auto or off"):
        session(model.path, prefetch="1")


def test_inputs_of_wrong_shape_are_errors(tmp_path: Path) -> None:
    """Guards against: an error of a run that is none for ONNX Runtime, whose results are then left as they were."""
    model = write_model(tmp_path / "model.onnx", Shape())
    loaded = session(model.path)
    feed = model.feed(4)
    with pytest.raises(Exception, match=r"node moe0: input x has 2 axes and 32 columns, expected 2 or 3 axes and 64"):
        loaded.run(None, {**feed, "x": feed["x"][:, :32]})
    with pytest.raises(Exception, match=r"input router0 has 2 axes, expected \[4, 8\]"):
        loaded.run(None, {**feed, "router0": feed["router0"][:2]})
    assert relative_error(loaded.run(None, feed)[0], model.reference(feed)) < TOLERANCE


def _cut(n_bytes: float) -> Callable[[bytes], bytes]:
    return lambda whole: whole[: int(n_bytes * len(whole))]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_cut(0), "0 graphs, expected one"),
        (_cut(0.5), r"passes the end of its message at byte \d+"),
        (lambda whole: b"\xff" * 11, "a number has no end at byte 0"),
        (lambda whole: b"\x0b", "wire type 3 at byte 0"),
        (lambda whole: b"\x3a\x02\x0a\x7f", "a field of 127 bytes passes the end of its message at byte 2"),
        (lambda whole: b"\x38\x01", "a number where the graph was expected at byte 1"),
        (lambda whole: b"\x3a\x02\x08\x01", "a number where a node or tensor was expected at byte 3"),
        (lambda whole: whole.replace(b"offset\x12\x010", b"offset\x12\x01x"), "offset 'x' .* is not a number"),
    ],
)
def test_damaged_files_are_named(damage: Callable[[bytes], bytes], named: str, tmp_path: Path) -> None:
    """Guards against: a crash or a hang of our reader of .onnx files, places of a corrupt header used as they are."""
    model = write_model(tmp_path / "model.onnx", Shape())
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(damage(model.path.read_bytes()))
    with pytest.raises(Exception, match=named):
        session(model.path, damaged)


def test_no_change_of_a_byte_crashes_the_reader(tmp_path: Path) -> None:
    """Guards against: reading past the end for some header that nobody thought of; each is an error or the result."""
    model = write_model(tmp_path / "model.onnx", Shape(has_bias=True), size_threshold=5000)
    whole = model.path.read_bytes()
    feed = model.feed(2)
    expected = session(model.path).run(None, feed)[0]
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged.onnx"
    n_refused = 0
    # Nodes are at the beginning, places of tensors at the end.
    places = [*rng.integers(0, 400, 60), *rng.integers(len(whole) - 700, len(whole), 60)]
    for at in places:
        changed = bytearray(whole)
        changed[at] = int(rng.integers(0, 256))
        damaged.write_bytes(changed)
        try:
            found = session(model.path, damaged).run(None, feed)[0]
        except Exception:
            n_refused += 1
        else:
            assert found.shape == expected.shape
    assert n_refused > 20


def test_our_session_uses_them_without_plugin_providers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against: an older onnxruntime on which the same Python code does not run, or without its budget."""
    model = write_model(tmp_path / "model.onnx", Shape(n_layers=2, n_experts=32, hidden=512, inter=512))
    feed = model.feed(40)
    expected = InferenceSession(model.path).run(None, feed)[0]
    monkeypatch.setattr("edgemoe.onnx._has_plugin_providers", lambda: False)
    ours = InferenceSession(model.path, memory="4GiB")
    assert ours.get_providers() == ["CPUExecutionProvider"]
    assert ours.stats().n_streamed_nodes == 2
    np.testing.assert_array_equal(ours.run(None, feed)[0], expected)
    with pytest.raises(BudgetError, match=r"give at least [0-9]+ bytes") as refused:
        ours.set_memory("40MiB")
    before = ours.stats().slots_bytes
    ours.set_memory(int(str(refused.value).split()[-2]) + (2 << 20))
    assert ours.stats().slots_bytes < before
    np.testing.assert_array_equal(ours.run(None, feed)[0], expected)
    unknown = write_model(tmp_path / "unknown.onnx", Shape(), attributes={"use_sparse_mixer": 1})
    with pytest.raises(BackendError, match="use_sparse_mixer 1"):
        InferenceSession(unknown.path)
