# SPDX-License-Identifier: MIT
"""The header reader: the same facts as the gguf package reads, and only ModelFormatError for what is corrupt."""

from __future__ import annotations

import resource
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import synthetic
from edgemoe.errors import ModelFormatError
from edgemoe.formats.gguf import GgufModel, read_model
from tests.conftest import ModelWriter


@pytest.mark.parametrize("arch", ["olmoe", "gpt-oss", "deepseek2-v3", "deepseek2-merged"])
def test_agrees_with_the_gguf_package(arch: str, write_model: ModelWriter) -> None:
    """Guards against an offset or a size that is off: experts would be read from beside their place."""
    path = write_model(arch)
    reader, model = gguf.GGUFReader(path), read_model(path)
    assert len(model.tensors) == len(reader.tensors)
    data = path.read_bytes()
    for ours, theirs in zip(model.tensors, reader.tensors, strict=True):
        assert (ours.name, ours.type_name) == (theirs.name, theirs.tensor_type.name)
        assert list(ours.shape) == theirs.shape.tolist()
        assert (ours.offset, ours.n_bytes) == (theirs.data_offset, theirs.n_bytes)
        assert data[ours.offset : ours.offset + ours.n_bytes] == np.asarray(theirs.data).tobytes()
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert model.metadata[key] == pytest.approx(field.contents()), key


def test_counts_of_a_model(write_model: ModelWriter) -> None:
    """Guards against layers without experts, or expert biases, being counted as experts to stream."""
    model = read_model(write_model("deepseek2-v3"))
    assert (model.architecture, model.n_experts, model.n_experts_used, model.n_moe_layers) == ("deepseek2", 16, 4, 2)
    assert [t.layer for t in model.expert_tensors] == [1, 1, 1, 2, 2, 2]
    n_bytes = 256 * 256 * 144 // 256
    assert model.expert_bytes == 3 * n_bytes
    assert model.token_cycle_bytes == 2 * 4 * 3 * n_bytes
    assert model.expert_bank_bytes == 2 * 16 * 3 * n_bytes
    assert model.dense_bytes + model.expert_bank_bytes == sum(t.n_bytes for t in model.tensors)
    biased = read_model(write_model("gpt-oss"))
    assert {t.name.split(".", 2)[2] for t in biased.expert_tensors} == {
        "ffn_gate_exps.weight",
        "ffn_up_exps.weight",
        "ffn_down_exps.weight",
    }
    assert len(read_model(write_model("deepseek2-merged")).expert_tensors) == 2 * 2


def test_split_files(write_model: ModelWriter) -> None:
    """Guards against tensors that are attributed to another file."""
    whole, split = read_model(write_model("olmoe")), read_model(write_model("olmoe", n_splits=3))
    assert [file.name.rsplit("-", 3)[1] for file in split.files] == ["00001", "00002", "00003"]

    def contents(model: GgufModel) -> dict[str, bytes]:
        files = [file.read_bytes() for file in model.files]
        return {t.name: files[t.file_idx][t.offset : t.offset + t.n_bytes] for t in model.tensors}

    assert contents(split) == contents(whole)
    assert {t.file_idx for t in split.tensors} == {0, 1, 2}


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """Guards against a reader that takes the whole file into memory."""
    path = synthetic.write_model(tmp_path / "sparse.gguf")
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # a hole of a tebibyte
    assert read_model(path).n_experts == 8


# ---------------------------------------------------------------- corrupt headers

_DEADLINE_S = 5.0


def _header(path: Path) -> bytes:
    return path.read_bytes()[: min(t.offset for t in read_model(path).tensors)]


def _read(folder: Path, data: bytes, file_bytes: int) -> None:
    """Read a file with this beginning; anything but a model or a ModelFormatError fails."""
    path = folder / "corrupt.gguf"
    path.write_bytes(data)
    if len(data) < file_bytes:
        with path.open("r+b") as file:
            file.truncate(file_bytes)
    begin = time.monotonic()
    try:
        read_model(path)
    except ModelFormatError as error:
        assert "corrupt.gguf" in str(error)
    assert time.monotonic() - begin < _DEADLINE_S
    path.unlink()


@pytest.fixture(scope="module")
def small_header(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A header with few words in its vocabulary, so that random damage meets its structure."""
    return _header(synthetic.write_model(tmp_path_factory.mktemp("header") / "small.gguf", n_vocab=300))


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes(flips: list[tuple[float, int]], small_header: bytes, tmp_path: Path) -> None:
    """Guards against an exception of another kind, or a hang, for a header with damaged bytes."""
    data = bytearray(small_header)
    for where, value in flips:
        data[int(where * len(data))] = value
    _read(tmp_path, bytes(data), 4 << 20)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.floats(0, 1, exclude_max=True), number=st.sampled_from([0, 1, 2**20, 2**31, 2**32 - 1, 2**62, 2**64 - 1])
)
def test_replaced_numbers(where: float, number: int, small_header: bytes, tmp_path: Path) -> None:
    """Guards against a length, a count or an offset that is believed although it cannot be."""
    data = bytearray(small_header)
    at = int(where * (len(data) - 8))
    data[at : at + 8] = struct.pack("<Q", number)
    _read(tmp_path, bytes(data), 4 << 20)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.floats(0, 1))
def test_cut_headers(length: float, small_header: bytes, tmp_path: Path) -> None:
    """Guards against a header that ends early."""
    _read(tmp_path, small_header[: int(length * len(small_header))], 0)


def _value(key: bytes, kind: int, payload: bytes) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    return head + struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + payload


HOSTILE = {
    "no values, many announced": b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62),
    "many tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0),
    "long key": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63),
    "long string": _value(b"a", 8, struct.pack("<Q", 2**40)),
    "long array": _value(b"a", 9, struct.pack("<IQ", 0, 2**50)),
    "array at the limit": _value(b"a", 9, struct.pack("<IQ", 0, 1 << 30)),
    "string at the limit": _value(b"a", 8, struct.pack("<Q", 1 << 30)),
    "array of arrays without elements": _value(b"a", 9, struct.pack("<IQ", 9, 2**40) + struct.pack("<IQ", 0, 0) * 1000),
    "nested arrays": _value(b"a", 9, struct.pack("<IQ", 9, 1) * 50_000),
    "unknown type": _value(b"a", 77, b""),
    "alignment of text": _value(b"general.alignment", 8, struct.pack("<Q", 3) + b"abc"),
    "alignment of an array": _value(b"general.alignment", 9, struct.pack("<IQ", 4, 1) + struct.pack("<I", 32)),
    "negative alignment": _value(b"general.alignment", 5, struct.pack("<i", -32)),
    "count of text": _value(b"split.count", 8, struct.pack("<Q", 3) + b"abc"),
    "count below zero": _value(b"split.count", 5, struct.pack("<i", -3)),
    "count not a number": _value(b"split.count", 6, struct.pack("<f", float("nan"))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    """Guards against headers made to hang the reader, or to make it allocate what the file does not have."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _read(tmp_path, HOSTILE[name], len(HOSTILE[name]) + 64)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize("key", ["olmoe.expert_count", "olmoe.expert_used_count", "general.architecture"])
def test_expert_counts_of_another_type(key: str, tmp_path: Path) -> None:
    """Guards against a count that is text, an array or a number that is none."""
    data = _value(b"general.architecture", 8, struct.pack("<Q", 5) + b"olmoe")
    encoded = key.encode()
    for kind, payload in (
        (8, struct.pack("<Q", 2) + b"xy"),
        (9, struct.pack("<IQ", 4, 0)),
        (6, struct.pack("<f", np.inf)),
    ):
        path = tmp_path / "counts.gguf"
        extra = struct.pack("<Q", len(encoded)) + encoded + struct.pack("<I", kind) + payload
        path.write_bytes(data[:16] + struct.pack("<Q", 2) + data[24:] + extra)
        try:
            model = read_model(path)
            assert model.n_experts_used == 0 and model.expert_tensors == []
        except ModelFormatError as error:
            assert "counts.gguf" in str(error)
