# SPDX-License-Identifier: MIT
"""Damaged .onnx files: our reader says what is wrong, whatever the bytes are."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.errors import ModelFormatError
from edgemoe.formats.onnx_model import OnnxModel, read_model
from tests.integration.onnx_models import Shape, write_model

SMALL = Shape(n_experts=2, hidden=32, inter=32, has_zero_points=True, has_bias=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A model of about 1.5 KB beside its external data, and its bytes."""
    path = tmp_path_factory.mktemp("damage") / "model.onnx"
    write_model(path, SMALL)
    return path, path.read_bytes()


def _read(path: Path, data: bytes) -> OnnxModel | str:
    damaged = path.with_name("damaged.onnx")
    damaged.write_bytes(data)
    try:
        return read_model(damaged)
    except ModelFormatError as error:
        return str(error)


def test_every_truncation_is_an_error(small: tuple[Path, bytes]) -> None:
    """Guards against: a download that stopped taken for a whole model, and foreign exceptions."""
    path, whole = small
    # The file may end after the graph: what follows it, versions of operators, is not ours to read.
    graph = onnx.load(path, load_external_data=False).graph.ByteSize()
    assert isinstance(_read(path, whole), OnnxModel)
    results = [_read(path, whole[:n]) for n in range(len(whole))]
    n_read = sum(isinstance(result, OnnxModel) for result in results)
    assert n_read <= len(whole) - graph
    assert all(isinstance(result, str) for result in results[:graph])


@settings(max_examples=400)
@given(changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_are_an_error_or_a_sound_model(small: tuple[Path, bytes], changes: list[tuple[int, int]]) -> None:
    """Guards against: endless loops, foreign exceptions, and places outside of their files."""
    path, whole = small
    data = bytearray(whole)
    for at, value in changes:
        data[at % len(data)] = value
    result = _read(path, bytes(data))
    if isinstance(result, OnnxModel):
        for tensor in result.tensors.values():
            assert tensor.path is None or 0 <= tensor.offset <= tensor.path.stat().st_size - tensor.n_bytes


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("location", "../model.onnx.data", "expected a file beside"),
        ("location", "a/../../model.onnx.data", "expected a file beside"),
        ("location", "/etc/passwd", "expected a file beside"),
        ("location", "model.onnx.data\0", "expected a file beside"),
        ("location", ".", "expected a file"),
        ("location", "", "without a location"),
        ("location", "absent.bin", "cannot find the external data of tensor"),
        ("location", "x" * 300, "cannot find the external data of tensor"),
        ("offset", "-4096", "offset -4096"),
        ("offset", str(1 << 40), "truncated"),
        ("offset", str(1 << 80), "truncated"),
        ("offset", "9" * 5000, "not a number"),
        ("offset", "0x10", "not a number"),
        ("length", "-1", "-1 bytes"),
        ("length", "3", "3 bytes"),
        ("length", str((1 << 64) - 1), "expected"),
    ],
)
def test_places_that_are_none_are_named(
    small: tuple[Path, bytes], tmp_path: Path, key: str, value: str, named: str
) -> None:
    """Guards against: reading of files elsewhere, and extents that wrap around or are used as they are."""
    path, whole = small
    model = onnx.load_from_string(whole)
    entry = next(e for e in model.graph.initializer[0].external_data if e.key == key)
    entry.value = value
    result = _read(path, model.SerializeToString())
    assert isinstance(result, str)
    assert named in result
    assert "damaged.onnx" in result or str(path.parent) in result
