# SPDX-License-Identifier: MIT
"""Writes GGUF files: the header is planned first, then the data go to a temporary file piece by piece.

A file appears under its name only when it is complete and on the disk. The temporary file is `.NAME.partial` beside
it, so a run after a killed one takes it over and nothing stray is left; it is locked, so two runs that write the same
file do not meet. Memory: the header and one piece of data.

llama.cpp's reader (ggml/src/gguf.cpp) asks that each tensor begins where the one before it, padded to
`general.alignment`, ends. So a tensor can be aligned, but nothing can be padded inside of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufModel, GgufTensor
from edgemoe.sizes import format_size

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`; `write` and `hash` count bytes."""

Piece = bytes | memoryview | npt.NDArray[Any]
"""Bytes, or an array of which the bytes are taken in C order."""

PAGE_BYTES = 4096
"""Where experts begin, if possible: they are read in pages of this size, past the page cache (core/io.h)."""

DEFAULT_ALIGNMENT_BYTES = 32
"""Of GGUF files without `general.alignment` (ggml's docs/gguf.md)."""

_ALIGNMENT_KEY = "general.alignment"
_VERSION = 3
_COPY_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class OutTensor:
    """A tensor to write.

    Attributes:
        name: at most 63 bytes (`GGML_MAX_NAME`).
        shape: in ggml's order, columns first.
        type_name: ggml's name of its type, such as `Q4_K`.
        pieces: called once, when its turn comes; the pieces one after the other are its `n_bytes`.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    pieces: Callable[[], Iterable[Piece]]

    @property
    def n_bytes(self) -> int:
        """Bytes of the data, without padding."""
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type_name]]
        return math.prod(self.shape) // int(block) * int(block_bytes)


def write_gguf(
    out: Path,
    metadata: Mapping[str, bytes],
    tensors: Sequence[OutTensor],
    *,
    alignment_bytes: int = DEFAULT_ALIGNMENT_BYTES,
    check: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a GGUF file of version 3, little-endian; `out` is replaced if it exists.

    Args:
        out: where to write.
        metadata: values as they stand in a file (see `value`, `read_metadata`), in the order to write them.
            `general.alignment` is put in or left out as `alignment_bytes` asks.
        tensors: in the order of the file.
        alignment_bytes: where tensors begin; a power of two.
        check: called with the complete file under its temporary name; if it raises, there is no `out`.
        progress: called with the stage `write`.

    Raises:
        ConversionError: the file system has no room, the file cannot be written, or another run is writing it.
        ValueError: the pieces of a tensor are more or less than its bytes.
    """
    report = progress or no_progress
    entries = {key: data for key, data in metadata.items() if key != _ALIGNMENT_KEY}
    if alignment_bytes != DEFAULT_ALIGNMENT_BYTES:
        entries[_ALIGNMENT_KEY] = value(alignment_bytes)
    head = _header(entries, tensors, alignment_bytes)
    n_total = len(head) + sum(padded(tensor.n_bytes, alignment_bytes) for tensor in tensors)

    with atomic_file(out, n_total) as file:
        write_all(file, head)
        n_done = len(head)
        for tensor in tensors:
            n_written = 0
            for piece in tensor.pieces():
                n_written += write_all(file, piece)
                report("write", n_done + n_written, n_total)
            if n_written != tensor.n_bytes:
                raise ValueError(f"tensor {tensor.name}: {n_written} bytes of data, expected {tensor.n_bytes}")
            n_done += n_written + write_all(file, bytes(padded(n_written, alignment_bytes) - n_written))
        if check is not None:
            check(Path(os.fsdecode(file.name)))


@contextlib.contextmanager
def atomic_file(out: Path, n_bytes: int) -> Iterator[io.FileIO]:
    """A temporary file beside `out` that takes its name, synced to the disk, when the context is left without error.

    Args:
        out: the file to make; replaced if it exists.
        n_bytes: room that the file system must have.

    Raises:
        ConversionError: there is no such room or folder, the disk fails, or another run is writing `out`.
    """
    partial = out.with_name(f".{out.name}.partial")
    with _open_locked(out, partial) as file:
        try:
            file.truncate(0)  # what a killed run left counts as free
            _check_free_space(out, n_bytes)
            yield file
            os.fsync(file.fileno())
            os.replace(partial, out)
        except BaseException as error:
            n_written = file.tell()
            with contextlib.suppress(OSError):
                partial.unlink()
            if not isinstance(error, OSError):
                raise
            raise ConversionError(
                f"cannot write {out}: {error.strerror or error} after {n_written} of {n_bytes} bytes ({out.parent}); "
                "free some space or name another folder"
            ) from error
    _sync_folder(out.parent)


def write_all(file: io.FileIO, piece: Piece) -> int:
    """Write all of a piece to the file of `atomic_file`; returns its bytes. An OSError is for `atomic_file` to tell."""
    if isinstance(piece, np.ndarray):
        piece = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
    data = memoryview(piece).cast("B")
    n_done = 0
    while n_done < len(data):
        n_done += file.write(data[n_done:])
    return n_done


def value(content: int | float | bool | str | Sequence[str] | Sequence[int]) -> bytes:
    """A metadata value as GGUF bytes: UINT32 (UINT64 beyond it), FLOAT32, BOOL, STRING, arrays of texts or of INT32."""
    kind = gguf.GGUFValueType
    if isinstance(content, bool):
        return struct.pack("<I?", kind.BOOL, content)
    if isinstance(content, int):
        fits = content < 1 << 32
        return struct.pack("<II" if fits else "<IQ", kind.UINT32 if fits else kind.UINT64, content)
    if isinstance(content, float):
        return struct.pack("<If", kind.FLOAT32, content)
    if isinstance(content, str):
        return struct.pack("<I", kind.STRING) + _string(content)
    if all(isinstance(item, str) for item in content):
        head = struct.pack("<IIQ", kind.ARRAY, kind.STRING, len(content))
        return head + b"".join(_string(str(item)) for item in content)
    return struct.pack(f"<IIQ{len(content)}i", kind.ARRAY, kind.INT32, len(content), *content)


def copy_of(model: GgufModel, tensor: GgufTensor) -> OutTensor:
    """A tensor of another file, byte for byte."""
    path = model.files[tensor.file_idx]
    return OutTensor(
        tensor.name, tensor.shape, tensor.type_name, lambda: read_range(path, tensor.offset, tensor.n_bytes)
    )


def read_range(path: Path, offset: int, n_bytes: int, piece_bytes: int = _COPY_BYTES) -> Iterator[bytes]:
    """The bytes [offset, offset + n_bytes) of a file in pieces; what was read does not stay in the page cache.

    Raises:
        ConversionError: the file cannot be read or ends before.
    """
    try:
        with path.open("rb", buffering=0) as file:
            end = offset + n_bytes
            for start in range(offset, end, piece_bytes):
                n_wanted = min(piece_bytes, end - start)
                piece = os.pread(file.fileno(), n_wanted, start)
                if len(piece) != n_wanted:
                    raise ConversionError(
                        f"cannot read {path}: it ends at byte {start + len(piece)}, expected {end}; it was changed "
                        "meanwhile: try again"
                    )
                yield piece
                os.posix_fadvise(file.fileno(), start, n_wanted, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error} (offset {offset})") from error


def sha256_of(paths: Sequence[Path], progress: Progress | None = None) -> str:
    """The SHA-256 of the files one after the other, as hexadecimal digits; `progress` gets the stage `hash`."""
    report = progress or no_progress
    digest = hashlib.sha256()
    sizes_bytes = [path.stat().st_size for path in paths]
    n_done = 0
    for path, size_bytes in zip(paths, sizes_bytes, strict=True):
        for piece in read_range(path, 0, size_bytes):
            digest.update(piece)
            n_done += len(piece)
            report("hash", n_done, sum(sizes_bytes))
    return digest.hexdigest()


def padded(n_bytes: int, alignment_bytes: int) -> int:
    """`n_bytes` rounded up to the alignment."""
    return -(-n_bytes // alignment_bytes) * alignment_bytes


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """Stands in for a progress callback."""


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _header(entries: Mapping[str, bytes], tensors: Sequence[OutTensor], alignment_bytes: int) -> bytes:
    parts = [struct.pack("<IIQQ", gguf.GGUF_MAGIC, _VERSION, len(tensors), len(entries))]
    parts += [_string(key) + data for key, data in entries.items()]
    offset = 0
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type_name]
        parts.append(_string(tensor.name) + struct.pack("<I", len(tensor.shape)))
        parts.append(struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, kind, offset))
        offset += padded(tensor.n_bytes, alignment_bytes)
    head = b"".join(parts)
    return head + bytes(padded(len(head), alignment_bytes) - len(head))


def _open_locked(out: Path, partial: Path) -> io.FileIO:
    """The temporary file, and nobody else's until it is closed."""
    if out.is_dir():
        raise ConversionError(f"cannot write {out}: it is a directory, expected the name of a file; add one")
    try:
        while True:
            file = io.FileIO(partial, "a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between open and lock its owner may have finished and renamed it: then the lock is on another file.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                        return file
            except BlockingIOError as error:
                file.close()
                raise ConversionError(
                    f"cannot write {out}: another run is writing it ({partial}); wait for it or name another file"
                ) from error
            file.close()
    except OSError as error:
        raise ConversionError(
            f"cannot write {out}: {error.strerror or error} ({out.parent}); name an existing folder that you may "
            "write to"
        ) from error


def _check_free_space(out: Path, n_bytes: int) -> None:
    free_bytes = shutil.disk_usage(out.parent).free
    if free_bytes < n_bytes:
        raise ConversionError(
            f"cannot write {out}: {format_size(free_bytes)} ({free_bytes} bytes) are free in {out.parent}, expected "
            f"{format_size(n_bytes)} ({n_bytes} bytes); free some space or name another folder"
        )


def _sync_folder(folder: Path) -> None:
    """Put a rename on the disk; file systems without such a call have it there anyway."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
