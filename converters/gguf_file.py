# SPDX-License-Identifier: MIT
"""Writes a GGUF file piece by piece, so that a process killed at any moment loses at most one tensor's work.

The file grows under the name `.NAME.partial` beside its final one. Behind the place where its last byte will be, the
partial file carries a journal: a line of JSON for each tensor that is complete, with checksums of its bytes. Whoever
opens it again checks them, so no order of writes to the disk needs to be relied on, and redoes the rest. When all is
written, the journal is cut off, the file is forced to the disk and gets its name: there is one file, or nothing but
the partial one. A lock on it keeps a second conversion to the same name away.

Format: ggml's docs/gguf.md, version 3, little-endian. One thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgemoe.errors import ConversionError
from edgemoe.sizes import format_size

MetadataValue = bool | int | float | str | list[bool] | list[int] | list[float] | list[str] | list[bytes]

DEFAULT_ALIGNMENT_BYTES = 32

_CHECK_BYTES = 16 << 20
_TYPES = gguf.GGUFValueType


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor to write: `shape` rows last but one, columns last (the reverse of the order in the file)."""

    name: str
    shape: tuple[int, ...]
    ggml_type: gguf.GGMLQuantizationType

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        n_values, n_bytes = gguf.GGML_QUANT_SIZES[self.ggml_type]
        return int(self.shape[-1] // n_values * n_bytes)

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * self.row_bytes


@dataclasses.dataclass(frozen=True)
class Layout:
    """A file that is decided and not yet written: its first bytes, where each tensor begins, and its length."""

    header: bytes
    offsets: tuple[int, ...]
    n_bytes: int


def lay_out(
    metadata: Mapping[str, MetadataValue | bytes],
    tensors: Sequence[TensorInfo],
    alignment_bytes: int = DEFAULT_ALIGNMENT_BYTES,
) -> Layout:
    """Decide every byte of the file but the tensors' own. Integers become UINT32 (INT32 if negative, or in lists).

    Bytes are a value with its type as it stands in another file.
    """
    values: dict[str, MetadataValue | bytes] = dict(metadata)
    if alignment_bytes != DEFAULT_ALIGNMENT_BYTES:
        values[gguf.Keys.General.ALIGNMENT] = alignment_bytes
    parts = [struct.pack("<IIQQ", gguf.GGUF_MAGIC, 3, len(tensors), len(values))]
    parts += [_pack_string(key) + _pack_value(key, value) for key, value in values.items()]
    relative = 0
    starts = []
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts.append(_pack_string(tensor.name) + struct.pack("<I", len(dims)))
        parts.append(struct.pack(f"<{len(dims)}QIQ", *dims, tensor.ggml_type, relative))
        starts.append(relative)
        relative += _padded(tensor.n_bytes, alignment_bytes)
    header = b"".join(parts)
    data_offset = _padded(len(header), alignment_bytes)
    header += bytes(data_offset - len(header))
    return Layout(header, tuple(data_offset + start for start in starts), data_offset + relative)


def _pack_value(key: str, value: MetadataValue | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, list):
        kind, data = _pack_scalar(key, value)
        return struct.pack("<I", kind) + data
    first = value[0] if value else 0
    head = struct.pack("<IIQ", _TYPES.ARRAY, _TYPES.INT32, len(value))
    if isinstance(first, (str, bytes)):
        head = struct.pack("<IIQ", _TYPES.ARRAY, _TYPES.STRING, len(value))
        return head + b"".join(_pack_string(item) for item in value)  # type: ignore[arg-type]
    if isinstance(first, bool):
        head = struct.pack("<IIQ", _TYPES.ARRAY, _TYPES.BOOL, len(value))
        return head + struct.pack(f"<{len(value)}?", *value)
    if isinstance(first, float):
        head = struct.pack("<IIQ", _TYPES.ARRAY, _TYPES.FLOAT32, len(value))
        return head + struct.pack(f"<{len(value)}f", *value)
    return head + struct.pack(f"<{len(value)}i", *value)


def _pack_scalar(key: str, value: MetadataValue) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _TYPES.BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        if not -(1 << 31) <= value < 1 << 32:
            raise ConversionError(f"cannot write {key}: {value} does not fit into 32 bits; check config.json")
        return (_TYPES.INT32, struct.pack("<i", value)) if value < 0 else (_TYPES.UINT32, struct.pack("<I", value))
    if isinstance(value, float):
        return _TYPES.FLOAT32, struct.pack("<f", value)
    assert isinstance(value, str)  # lists are the caller's
    return _TYPES.STRING, _pack_string(value)


def _pack_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _padded(n_bytes: int, alignment_bytes: int) -> int:
    return -(-n_bytes // alignment_bytes) * alignment_bytes


class PartialFile:
    """The file while it is being written; see the module. Use as a context: what fails leaves nothing, what is
    interrupted (a KeyboardInterrupt, a kill) leaves the partial file, from which the same conversion goes on.

    Args:
        out: the final name.
        n_bytes: the length that the file will have.

    Raises:
        ConversionError: another conversion writes to the same name, or there is no room or permission.
    """

    def __init__(self, out: Path, n_bytes: int) -> None:
        self.path = out.with_name(f".{out.name}.partial")
        self._out = out
        self._n_bytes = n_bytes
        self._crcs: list[list[int]] = []
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConversionError(
                f"cannot write {out}: {error.strerror} ({out.parent}); name an existing folder that you may write to"
            ) from error
        try:
            self._lock()
        except BaseException:
            os.close(self._file)
            raise
        try:
            self._entries = self._read_journal()
            if self.recall("journal") != [{"n_bytes": n_bytes}]:  # of another conversion, or none
                self._clear()
                self._check_free_space()
                self.note("journal", {"n_bytes": n_bytes})
            self._check_free_space()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception):
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self._file)

    def recall(self, kind: str) -> list[dict[str, Any]]:
        """What the journal says under `kind`, oldest first."""
        return [entry[kind] for entry in self._entries if kind in entry]

    def note(self, kind: str, value: dict[str, Any]) -> None:
        """Add a line to the journal."""
        self._entries.append({kind: value})
        line = json.dumps({kind: value}, separators=(",", ":")).encode() + b"\n"
        with self._writing():
            _write_all(self._file, line, os.fstat(self._file).st_size)

    def begin(self, layout: Layout, identity: str = "") -> None:
        """Write the header; forget complete tensors if they were written under another one, or another `identity` of
        what they are made of."""
        digest = hashlib.sha256(layout.header + identity.encode()).hexdigest()
        if {"sha256": digest} not in self.recall("header"):
            kept = [entry for entry in self._entries if "tensor" not in entry and "header" not in entry]
            self._clear()  # what lies between the tensors has to be zeros
            for entry in kept:
                for kind, value in entry.items():
                    self.note(kind, value)
            self.note("header", {"sha256": digest})
        self.write_header(layout)

    def write_header(self, layout: Layout) -> None:
        """Write a header of the same length again, with values that were not known at first."""
        with self._writing():
            _write_all(self._file, layout.header, 0)

    def complete_tensors(self, layout: Layout, sizes: Sequence[int]) -> Iterator[tuple[int, bool]]:
        """For each tensor that the journal calls complete: its index, and whether its bytes are what they were."""
        for entry in self.recall("tensor"):
            index, crcs = entry["index"], entry["crcs"]
            if not 0 <= index < len(sizes):
                continue
            offset = layout.offsets[index]
            is_intact = sum(length for length, _ in crcs) == sizes[index]
            for length, crc in crcs:
                is_intact = is_intact and self._crc(offset, length) == crc
                offset += length
            yield index, is_intact

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes of the tensor in progress, in order; they count once `end_tensor` is called."""
        with self._writing():
            _write_all(self._file, data, offset)
        self._crcs.append([data.nbytes, zlib.crc32(data)])

    def end_tensor(self, index: int) -> None:
        """Note that a tensor is complete: all bytes written since the last call are its own."""
        self.note("tensor", {"index": index, "crcs": self._crcs})
        self._crcs = []

    def commit(self) -> None:
        """Give the complete file its name, once it is on the disk."""
        with self._writing():
            os.fsync(self._file)
            os.ftruncate(self._file, self._n_bytes)
            os.fsync(self._file)
            os.replace(self.path, self._out)
            folder = os.open(self._out.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConversionError(
                f"cannot write {self._out}: another process is writing it ({self.path.name} is locked); wait for it "
                "or name another file"
            ) from error
        if not self.path.exists() or os.stat(self.path).st_ino != os.fstat(self._file).st_ino:
            raise ConversionError(f"cannot write {self._out}: another process has just written it; look at the result")

    def _read_journal(self) -> list[dict[str, Any]]:
        """The lines behind the file's end; a line torn by a kill ends the journal and is cut off."""
        n_journal = max(os.fstat(self._file).st_size - self._n_bytes, 0)
        lines = os.pread(self._file, n_journal, self._n_bytes).split(b"\n")[:-1]
        entries: list[dict[str, Any]] = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not isinstance(entry, dict):
                break
            entries.append(entry)
        if n_journal:
            os.ftruncate(self._file, self._n_bytes + sum(len(line) + 1 for line in lines[: len(entries)]))
        return entries

    def _clear(self) -> None:
        """Make the file zeros, with an empty journal."""
        with self._writing():
            os.ftruncate(self._file, 0)
            os.ftruncate(self._file, self._n_bytes)
        self._entries = []

    def _check_free_space(self) -> None:
        needed = self._n_bytes - os.fstat(self._file).st_blocks * 512  # of a sparse file: what is not there yet
        free = shutil.disk_usage(self._out.parent).free
        if free < needed:
            self.path.unlink()
            raise ConversionError(
                f"cannot write {self._out}: {format_size(free)} ({free} bytes) are free in {self._out.parent}, "
                f"expected {format_size(needed)} ({needed} bytes); free some space or name another folder"
            )

    def _crc(self, offset: int, length: int) -> int:
        crc = 0
        end = offset + length
        while offset < end:
            data = os.pread(self._file, min(end - offset, _CHECK_BYTES), offset)
            if not data:
                return -1
            crc = zlib.crc32(data, crc)
            offset += len(data)
        return crc

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConversionError(
                f"cannot write {self._out}: {error.strerror or error} ({self._out.parent}); free some space or name "
                "another folder"
            ) from error


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        n_written = os.pwrite(file, view[: 1 << 30], offset)
        view = view[n_written:]
        offset += n_written
