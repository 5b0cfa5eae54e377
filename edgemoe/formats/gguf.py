# SPDX-License-Identifier: MIT
"""Reads the header of a GGUF file, and of the other files of a split one: metadata, and where each tensor lies.

Only the header is read, a piece at a time, never the tensor data; every extent is checked against the size of
its file. The format is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgemoe.errors import ModelFormatError

_MAGIC = b"GGUF"
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_READ_BYTES = 1 << 16
# Longer strings and arrays than any model has; a corrupt length must not become an allocation.
_MAX_LENGTH = 1 << 30
# Longer arrays are vocabularies; they are skipped, as only their length matters here.
_MAX_KEPT = 4096
_EXPERT_TENSOR = re.compile(r"blk\.(\d+)\..*exps\.weight")
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class SkippedArray:
    """A long array of the metadata, of which only the length was kept."""

    length: int

    def __len__(self) -> int:
        return self.length


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` in ggml's order (columns first), `offset` from the beginning of file `file_idx`."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    n_bytes: int
    file_idx: int
    offset: int

    @property
    def layer(self) -> int:
        """The layer in the tensor's name (`blk.7.…`), or -1."""
        match = re.match(r"blk\.(\d+)\.", self.name)
        return int(match.group(1)) if match else -1


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """A model's metadata and tensors, over all its files."""

    path: Path
    files: list[Path]
    metadata: dict[str, Any]
    tensors: list[GgufTensor]

    @property
    def architecture(self) -> str:
        """Value of `general.architecture`."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def _count(self, key: str) -> int:
        value = self.metadata.get(f"{self.architecture}.{key}", 0)
        counts = value if isinstance(value, list) else [value]
        # What is no number makes a model without experts; llama.cpp then says what it expects.
        return max((n for n in counts if isinstance(n, int)), default=0)

    @property
    def n_experts(self) -> int:
        """Routed experts of a layer; 0 for a dense model."""
        return self._count("expert_count")

    @property
    def n_experts_used(self) -> int:
        """Routed experts that a token selects; the largest, where layers differ."""
        return min(self._count("expert_used_count"), self.n_experts)

    @functools.cached_property
    def expert_tensors(self) -> list[GgufTensor]:
        """The stacked projections of routed experts: three dimensions, the last one the experts."""
        return [
            t
            for t in self.tensors
            if self.n_experts_used > 0
            and len(t.shape) == 3
            and t.shape[2] > 1
            and t.n_bytes % t.shape[2] == 0
            and _EXPERT_TENSOR.fullmatch(t.name)
        ]

    @property
    def n_moe_layers(self) -> int:
        """Layers with routed experts."""
        return len({t.layer for t in self.expert_tensors})

    @property
    def expert_bank_bytes(self) -> int:
        """All routed experts."""
        return sum(t.n_bytes for t in self.expert_tensors)

    @property
    def dense_bytes(self) -> int:
        """Everything but the routed experts."""
        return sum(t.n_bytes for t in self.tensors) - self.expert_bank_bytes

    @property
    def token_cycle_bytes(self) -> int:
        """The routed experts of one token: the selected ones of every layer."""
        return sum(t.n_bytes // t.shape[2] * min(self.n_experts_used, t.shape[2]) for t in self.expert_tensors)

    @property
    def expert_bytes(self) -> int:
        """The largest expert: all its projections in one layer."""
        of_layer: dict[int, int] = {}
        for t in self.expert_tensors:
            of_layer[t.layer] = of_layer.get(t.layer, 0) + t.n_bytes // t.shape[2]
        return max(of_layer.values(), default=0)


def read_model(path: str | Path) -> GgufModel:
    """Read the header of `path` and of the files it is split into.

    Raises:
        ModelFormatError: a file is missing, is not GGUF, is truncated, or has a tensor outside of its end.
    """
    first = Path(path)
    metadata, tensors = _read_header(first, 0)
    files = [first]
    n_files = _whole_number(first, metadata, "split.count", 0)
    if n_files > 1:
        match = _SPLIT_NAME.fullmatch(first.name)
        if match is None or int(match.group(2)) != 1 or int(match.group(3)) != n_files:
            raise ModelFormatError(
                f"cannot open {first}: it is one of {n_files} files of a split model, expected the first of them, "
                f"named …-00001-of-{n_files:05d}.gguf; pass that one"
            )
        for i in range(1, n_files):
            part = first.with_name(f"{match.group(1)}-{i + 1:05d}-of-{n_files:05d}.gguf")
            files.append(part)
            tensors += _read_header(part, i)[1]
    return GgufModel(first, files, metadata, tensors)


def read_raw_metadata(path: str | Path) -> dict[str, bytes]:
    """The metadata of one file, each value with its type as the bytes that stand in the file, in its order.

    Raises:
        ModelFormatError: the file cannot be read, is not GGUF, or is truncated.
    """
    file_path = Path(path)
    extents: dict[str, tuple[int, int]] = {}
    try:
        with file_path.open("rb") as file:
            reader = _Reader(file_path, file)
            _, n_values = _counts(reader)
            for _ in range(n_values):
                key = reader.string()
                begin = reader.offset
                reader.value(reader.unpack("I"))
                extents[key] = (begin, reader.offset)
            return {key: os.pread(file.fileno(), end - begin, begin) for key, (begin, end) in extents.items()}
    except OSError as error:
        raise ModelFormatError(f"cannot open {file_path}: {error.strerror or error}; check the path") from error


class _Reader:
    """Reads little-endian values from a file, with errors that say where."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.offset = 0
        self._file = file
        self._buffer = b""
        self._at = 0

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > _MAX_LENGTH:
            raise ModelFormatError(
                f"cannot read {self.path}: a length of {n_bytes} at byte {self.offset} of its header; it is corrupt: "
                "download or convert it again"
            )
        while len(self._buffer) - self._at < n_bytes:
            more = self._file.read(max(_READ_BYTES, n_bytes))
            if not more:
                raise ModelFormatError(
                    f"cannot read {self.path}: it ends at byte {self.offset + len(self._buffer) - self._at}, inside of "
                    "its header; it is truncated: download or convert it again"
                )
            self._buffer = self._buffer[self._at :] + more
            self._at = 0
        self._at += n_bytes
        self.offset += n_bytes
        return self._buffer[self._at - n_bytes : self._at]

    def unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.unpack("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, length = self.unpack("I"), self.unpack("Q")
            if kind == _ARRAY:
                raise ModelFormatError(
                    f"cannot read {self.path}: an array of arrays at byte {self.offset}, which GGUF readers do not "
                    "know; it is corrupt: download or convert it again"
                )
            if kind in _SCALAR_FORMATS:
                code = _SCALAR_FORMATS[kind]
                if length * struct.calcsize(code) > _MAX_LENGTH:
                    self.take(_MAX_LENGTH + 1)
                packed = self.take(length * struct.calcsize("<" + code))
                return SkippedArray(length) if length > _MAX_KEPT else list(struct.unpack(f"<{length}{code}", packed))
            if kind == _STRING and length > _MAX_KEPT:
                for _ in range(length):
                    self.take(self.unpack("Q"))
                return SkippedArray(length)
            return [self.value(kind) for _ in range(length)]
        if kind not in _SCALAR_FORMATS:
            raise ModelFormatError(
                f"cannot read {self.path}: value type {kind} at byte {self.offset}, expected 0..12; it is corrupt: "
                "download or convert it again"
            )
        return self.unpack(_SCALAR_FORMATS[kind])


def _read_header(path: Path, file_idx: int) -> tuple[dict[str, Any], list[GgufTensor]]:
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            # Read ahead behind the header would be experts: megabytes that nobody asked for.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            return _parse(_Reader(path, file), file_idx, file_bytes)
    except OSError as error:
        raise ModelFormatError(f"cannot open {path}: {error.strerror or error}; check the path") from error


def _counts(reader: _Reader) -> tuple[int, int]:
    """How many tensors and metadata values the header says there are."""
    magic = reader.take(4)
    version = reader.unpack("I")
    if magic != _MAGIC or version not in (2, 3):
        raise ModelFormatError(
            f"cannot read {reader.path}: it begins with {magic!r} version {version}, expected b'GGUF' version 2 or 3; "
            "is it a GGUF file?"
        )
    return reader.unpack("Q"), reader.unpack("Q")


def _parse(reader: _Reader, file_idx: int, file_bytes: int) -> tuple[dict[str, Any], list[GgufTensor]]:
    n_tensors, n_values = _counts(reader)
    metadata = {}
    for _ in range(n_values):
        key = reader.string()
        metadata[key] = reader.value(reader.unpack("I"))
    infos = []
    for _ in range(n_tensors):
        name = reader.string()
        shape = tuple(reader.unpack("Q") for _ in range(min(reader.unpack("I"), 8)))
        infos.append((name, shape, reader.unpack("I"), reader.unpack("Q")))
    alignment = _whole_number(reader.path, metadata, "general.alignment", 0) or _DEFAULT_ALIGNMENT
    data_offset = -(-reader.offset // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in infos:
        tensor = _tensor(reader.path, name, shape, kind, file_idx, data_offset + offset)
        if tensor.offset + tensor.n_bytes > file_bytes:
            raise ModelFormatError(
                f"cannot use {reader.path}: tensor {name} ends at byte {tensor.offset + tensor.n_bytes}, the file has "
                f"{file_bytes} (offset {tensor.offset}); it is truncated: download or convert it again"
            )
        tensors.append(tensor)
    return metadata, tensors


def _whole_number(path: Path, metadata: dict[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or value < 0:
        raise ModelFormatError(
            f"cannot read {path}: {key} is {value!r:.40}, expected a whole number; it is corrupt: download or convert "
            "it again"
        )
    return value


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, file_idx: int, offset: int) -> GgufTensor:
    try:
        quantization = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quantization]
    except (KeyError, ValueError):
        raise ModelFormatError(
            f"cannot use {path}: tensor {name} has type {kind}, which this version does not know; upgrade gguf"
        ) from None
    n_elements = 1
    for n in shape:
        n_elements *= n
    if n_elements == 0:
        raise ModelFormatError(
            f"cannot use {path}: tensor {name} has the shape {list(shape)}, expected dimensions of 1 or more; it is "
            "corrupt: download or convert it again"
        )
    if not shape or shape[0] % block:
        raise ModelFormatError(
            f"cannot use {path}: tensor {name} has rows of {shape[0] if shape else 0} elements, expected a multiple of "
            f"{block} for {quantization.name}; it is corrupt: download or convert it again"
        )
    return GgufTensor(name, shape, quantization.name, n_elements // block * block_bytes, file_idx, offset)
