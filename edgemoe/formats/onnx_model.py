# SPDX-License-Identifier: MIT
"""What an .onnx file says about its nodes and about where its tensors lie; no tensor is read.

The file is a protobuf message; the field numbers below are those of the public `onnx.proto`. The onnx package would
read it as well, and with it every tensor that lies inside of the file.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import stat
from collections.abc import Iterator
from pathlib import Path

from edgemoe.errors import ModelFormatError

# Bits of an element by TensorProto.DataType.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= {17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}
_MOE_OPS = ("MoE", "QMoE")
MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


@dataclasses.dataclass(frozen=True)
class OnnxTensor:
    """A constant of the model: at `offset` of the file `path`, or inside of the .onnx file where `path` is None."""

    name: str
    shape: tuple[int, ...]
    data_type: int
    path: Path | None
    offset: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class OnnxNode:
    """A node: its inputs by position ("" where left out) and those attributes that are integers."""

    name: str
    domain: str
    op_type: str
    inputs: tuple[str, ...]
    ints: dict[str, int]


@dataclasses.dataclass(frozen=True)
class OnnxInput:
    """A value that a run is given; dimensions without a number are names, or "" where they have none."""

    name: str
    data_type: int
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class OnnxModel:
    """The main graph: its constants by name, its nodes and its inputs in the order of the file."""

    path: Path
    tensors: dict[str, OnnxTensor]
    nodes: tuple[OnnxNode, ...]
    inputs: tuple[OnnxInput, ...]

    @property
    def moe_nodes(self) -> tuple[OnnxNode, ...]:
        """The `MoE` and `QMoE` nodes."""
        return tuple(n for n in self.nodes if n.op_type in _MOE_OPS and n.domain == MICROSOFT)


def element_bits(data_type: int) -> int:
    """Bits of an element of a TensorProto.DataType; 8 for those without a size, such as strings."""
    return _BITS.get(data_type, 8)


class _Corrupt(Exception):
    pass


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise _Corrupt(f"a number at byte {at} has no end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, value or length, begin, end) of each field; begin and end are those of its bytes."""
    at = begin
    while at < end:
        key, at = _varint(data, at, end)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, after = _varint(data, at, end)
        elif wire == 2:
            value, at = _varint(data, at, end)
            after = at + value
        elif wire in (1, 5):
            value = after = at + (8 if wire == 1 else 4)
        else:
            raise _Corrupt(f"wire type {wire} at byte {at}")
        if after > end or field == 0:
            raise _Corrupt(f"a field at byte {at} passes the end of its message")
        yield field, wire, value, at, after
        at = after


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _text(data: mmap.mmap, begin: int, end: int) -> str:
    return data[begin:end].decode("utf-8", errors="replace")


def _ints(data: mmap.mmap, value: int, begin: int, end: int, is_packed: bool) -> list[int]:
    if not is_packed:
        return [_signed(value)]
    found = []
    while begin < end:
        n, begin = _varint(data, begin, end)
        found.append(_signed(n))
    return found


def _external_number(tensor: str, entries: dict[str, str], key: str, fallback: int) -> int:
    text = entries.get(key, str(fallback))
    try:
        return int(text)
    except ValueError:
        raise _Corrupt(f"tensor {tensor}: {key} {text!r} of its external data is not a number") from None


def _tensor(data: mmap.mmap, begin: int, end: int, folder: Path) -> OnnxTensor:
    name, data_type, is_external = "", 0, False
    shape: list[int] = []
    entries: dict[str, str] = {}
    for field, wire, value, at, after in _fields(data, begin, end):
        if field == 1:
            shape += _ints(data, value, at, after, wire == 2)
        elif field == 2:
            data_type = value
        elif field == 8:
            name = _text(data, at, after)
        elif field == 13:
            pair = {f: _text(data, b, e) for f, _, _, b, e in _fields(data, at, after)}
            entries[pair.get(1, "")] = pair.get(2, "")
        elif field == 14:
            is_external = value == 1
    if any(n < 0 for n in shape):
        raise _Corrupt(f"tensor {name}: shape {shape}")
    n_bytes = -(-math.prod(shape) * element_bits(data_type) // 8)
    if not is_external:
        return OnnxTensor(name, tuple(shape), data_type, None, 0, n_bytes)
    location = entries.get("location", "")
    if not location:
        raise _Corrupt(f"tensor {name}: external data without a location")
    if "\0" in location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise _Corrupt(
            f"tensor {name}: external data at {location!r}, expected a file beside the .onnx file or below it"
        )
    offset = _external_number(name, entries, "offset", 0)
    length = _external_number(name, entries, "length", n_bytes)
    if offset < 0 or length != n_bytes:
        raise _Corrupt(
            f"tensor {name}: {length} bytes at offset {offset} of its external data, expected {n_bytes} bytes"
        )
    return OnnxTensor(name, tuple(shape), data_type, folder / location, offset, n_bytes)


def _node(data: mmap.mmap, begin: int, end: int) -> OnnxNode:
    name = op_type = domain = ""
    inputs: list[str] = []
    ints: dict[str, int] = {}
    for field, _, _, at, after in _fields(data, begin, end):
        if field == 1:
            inputs.append(_text(data, at, after))
        elif field == 3:
            name = _text(data, at, after)
        elif field == 4:
            op_type = _text(data, at, after)
        elif field == 7:
            domain = _text(data, at, after)
        elif field == 5:
            key, number = "", None
            for f, _, value, b, e in _fields(data, at, after):
                if f == 1:
                    key = _text(data, b, e)
                elif f == 3:
                    number = _signed(value)
            if number is not None:
                ints[key] = number
    return OnnxNode(name, domain, op_type, tuple(inputs), ints)


def _input(data: mmap.mmap, begin: int, end: int) -> OnnxInput:
    name, data_type = "", 0
    shape: list[int | str] = []
    for field, _, _, at, after in _fields(data, begin, end):
        if field == 1:
            name = _text(data, at, after)
        if field != 2:
            continue
        for kind, _, _, tensor, tensor_end in _fields(data, at, after):
            if kind != 1:  # no tensor
                continue
            for part, _, value, dims, dims_end in _fields(data, tensor, tensor_end):
                if part == 1:
                    data_type = value
                elif part == 2:
                    shape = [_dimension(data, b, e) for f, _, _, b, e in _fields(data, dims, dims_end) if f == 1]
    return OnnxInput(name, data_type, tuple(shape))


def _dimension(data: mmap.mmap, begin: int, end: int) -> int | str:
    for field, _, value, at, after in _fields(data, begin, end):
        if field == 1:
            return _signed(value)
        if field == 2:
            return _text(data, at, after)
    return ""


def _check_extents(model: OnnxModel) -> None:
    sizes: dict[Path, int] = {}
    for t in model.tensors.values():
        if t.path is None:
            continue
        if t.path not in sizes:
            try:
                status = t.path.stat()
            except OSError as error:
                raise ModelFormatError(
                    f"cannot find the external data of tensor {t.name}: {error.strerror} ({t.path}); "
                    "keep the file beside the .onnx file"
                ) from None
            if not stat.S_ISREG(status.st_mode):
                raise ModelFormatError(f"external data of tensor {t.name}: expected a file ({t.path})")
            sizes[t.path] = status.st_size
        if t.offset + t.n_bytes > sizes[t.path]:
            raise ModelFormatError(
                f"tensor {t.name} ends at byte {t.offset + t.n_bytes}: its file has {sizes[t.path]} ({t.path}, offset "
                f"{t.offset}); the file is truncated: download or export it again"
            )


def read_model(path: Path) -> OnnxModel:
    """Read the nodes and the tensors' places; every extent is checked against its file.

    Raises:
        ModelFormatError: the file is missing or no ONNX model, or external data is missing or too short.
    """
    tensors: dict[str, OnnxTensor] = {}
    nodes: list[OnnxNode] = []
    inputs: list[OnnxInput] = []
    n_graphs = 0
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for field, _, _, begin, end in _fields(data, 0, len(data)):
                if field != 7:
                    continue
                n_graphs += 1
                for part, _, _, at, after in _fields(data, begin, end):
                    if part == 1:
                        nodes.append(_node(data, at, after))
                    elif part == 5:
                        tensor = _tensor(data, at, after, path.parent)
                        tensors[tensor.name] = tensor
                    elif part == 11:
                        inputs.append(_input(data, at, after))
    except _Corrupt as error:
        raise ModelFormatError(f"cannot read the model: {error} ({path}); download or export it again") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelFormatError(f"cannot open the model: {error} ({path})") from None
    if n_graphs != 1:
        raise ModelFormatError(f"cannot read the model: {n_graphs} graphs, expected one ({path}); is it an .onnx file?")
    model = OnnxModel(path, tensors, tuple(nodes), tuple(inputs))
    _check_extents(model)
    return model
