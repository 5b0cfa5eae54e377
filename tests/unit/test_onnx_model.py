# SPDX-License-Identifier: MIT
"""Our reader of .onnx files against the onnx package, and on damaged files."""

from __future__ import annotations

import random
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edgemoe.errors import ModelFormatError
from edgemoe.formats.onnx_model import read_model
from tests.integration.onnx_models import Shape, write_model


@pytest.mark.parametrize("size_threshold", [0, 20000])
def test_places_and_nodes_are_those_that_onnx_reads(size_threshold: int, tmp_path: Path) -> None:
    """Guards against: experts read from a wrong place, and a plan that counts tensors that are not there."""
    path = tmp_path / "model.onnx"
    write_model(path, Shape(n_layers=2, has_zero_points=True, has_bias=True, k=3), size_threshold=size_threshold)
    proto = onnx.load(path, load_external_data=False)
    model = read_model(path)
    assert list(model.tensors) == [t.name for t in proto.graph.initializer]
    for t in proto.graph.initializer:
        found = model.tensors[t.name]
        place = {e.key: e.value for e in t.external_data}
        assert found.shape == tuple(t.dims)
        assert found.data_type == t.data_type
        if t.data_location == TensorProto.EXTERNAL:
            assert found.path == tmp_path / place["location"]
            assert (found.offset, found.n_bytes) == (int(place["offset"]), int(place["length"]))
        else:
            assert found.path is None
            assert found.n_bytes == len(t.raw_data)
    nodes = [n for n in proto.graph.node if n.op_type == "QMoE"]
    assert [n.name for n in model.moe_nodes] == [n.name for n in nodes]
    for found_node, node in zip(model.moe_nodes, nodes, strict=True):
        assert list(found_node.inputs) == list(node.input)
        ints = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
        assert {key: found_node.ints[key] for key in ints} == ints
        assert found_node.ints["k"] == 3


def test_dims_that_are_not_packed_are_read(tmp_path: Path) -> None:
    """Guards against: a writer that stores each dimension as a field of its own, as protobuf allows for lists."""
    tensor = b"".join([b"\x08\x02", b"\x08\x03", b"\x10\x01", b"\x42\x01w"])  # dims 2, 3; float; name w
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    (tmp_path / "model.onnx").write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    assert onnx.load(tmp_path / "model.onnx").graph.initializer[0].dims == [2, 3]
    assert read_model(tmp_path / "model.onnx").tensors["w"].shape == (2, 3)


def test_negative_attributes_are_negative(tmp_path: Path) -> None:
    """Guards against: weights_prepacked -1, the default, read as 2**64 - 1."""
    node = helper.make_node("QMoE", ["x"], ["y"], "n", domain="com.microsoft", weights_prepacked=-1)
    graph = helper.make_graph([node], "g", [], [])
    onnx.save_model(helper.make_model(graph), tmp_path / "model.onnx")
    assert read_model(tmp_path / "model.onnx").moe_nodes[0].ints == {"weights_prepacked": -1}


def test_damage_is_an_error_and_never_a_crash(tmp_path: Path) -> None:
    """Guards against: endless loops, huge allocations and foreign exceptions on corrupt headers."""
    path = tmp_path / "model.onnx"
    write_model(path, Shape(n_layers=1))
    whole = path.read_bytes()
    rng = random.Random(0)
    n_refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randint(1, len(damaged))])
        try:
            read_model(path)
        except ModelFormatError:
            n_refused += 1
    assert n_refused > 100


def test_a_directory_or_another_file_is_refused(tmp_path: Path) -> None:
    """Guards against: a GGUF file or a folder given by mistake ending in a traceback of the reader."""
    with pytest.raises(ModelFormatError, match="cannot open the model"):
        read_model(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelFormatError, match="cannot read the model"):
        read_model(tmp_path / "model.gguf")
