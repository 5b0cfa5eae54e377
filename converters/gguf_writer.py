# SPDX-License-Identifier: MIT
"""Makes a GGUF file of another: metadata as they are, tensors copied or made anew, piece by piece.

The file grows as `gguf_file` says: it has its name only when it is complete and on the disk, and a killed run goes on
with the tensor it was at. Memory: the header and one piece of data.

llama.cpp's reader (ggml/src/gguf.cpp) asks that each tensor begins where the one before it, padded to
`general.alignment`, ends. So a tensor can be aligned, but nothing can be padded inside of one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufModel, GgufTensor

from .gguf_file import DEFAULT_ALIGNMENT_BYTES, MetadataValue, PartialFile, TensorInfo, lay_out

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`; `write` and `hash` count bytes."""

Piece = bytes | npt.NDArray[Any]
"""Bytes, or an array of which the bytes are taken in C order."""

PAGE_BYTES = 4096
"""Where experts begin, if possible: they are read in pages of this size, past the page cache (core/io.h)."""

_ALIGNMENT_KEY = "general.alignment"
_COPY_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class OutTensor:
    """A tensor to write.

    Attributes:
        shape: in ggml's order, columns first.
        type_name: ggml's name of its type, such as `Q4_K`.
        pieces: called once at most, when its turn comes; the pieces one after the other are its data.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    pieces: Callable[[], Iterable[Piece]]

    @property
    def info(self) -> TensorInfo:
        """What the header says of it."""
        return TensorInfo(self.name, self.shape[::-1], GGMLQuantizationType[self.type_name])

    @property
    def n_bytes(self) -> int:
        """Bytes of the data, without padding."""
        return self.info.n_bytes


def write_gguf(
    out: Path,
    metadata: Mapping[str, MetadataValue | bytes],
    tensors: Sequence[OutTensor],
    *,
    alignment_bytes: int = DEFAULT_ALIGNMENT_BYTES,
    check: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a GGUF file of version 3, little-endian; `out` is replaced if it exists.

    After a kill the next call with the same header goes on. So data must follow from the header: put into the metadata
    what they were made from.

    Args:
        out: where to write.
        metadata: values, or (bytes) values as they stand in a file, from `read_raw_metadata`; in the order to write
            them. `general.alignment` is put in or left out as `alignment_bytes` asks.
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
    layout = lay_out(entries, [tensor.info for tensor in tensors], alignment_bytes)
    if out.is_dir():
        raise ConversionError(f"cannot write {out}: it is a directory, expected the name of a file; add one")
    with PartialFile(out, layout.n_bytes) as file:
        file.begin(layout)
        sizes = [tensor.n_bytes for tensor in tensors]
        complete = {index for index, is_intact in file.complete_tensors(layout, sizes) if is_intact}
        for index, (tensor, offset) in enumerate(zip(tensors, layout.offsets, strict=True)):
            if index in complete:
                continue
            n_written = 0
            for piece in tensor.pieces():
                data = _bytes_of(piece)
                n_written += data.nbytes
                if n_written <= tensor.n_bytes:
                    file.write(data, offset + n_written - data.nbytes)
                report("write", offset + n_written, layout.n_bytes)
            if n_written != tensor.n_bytes:
                raise ValueError(f"tensor {tensor.name}: {n_written} bytes of data, expected {tensor.n_bytes}")
            file.end_tensor(index)
        if check is not None:
            check(file.path)
        file.commit()


def copy_of(model: GgufModel, tensor: GgufTensor) -> OutTensor:
    """A tensor of another file, byte for byte."""
    path = model.files[tensor.file_idx]
    return OutTensor(
        tensor.name, tensor.shape, tensor.type_name, lambda: read_range(path, tensor.offset, tensor.n_bytes)
    )


def read_range(path: Path, offset: int, n_bytes: int) -> Iterator[bytes]:
    """The bytes [offset, offset + n_bytes) of a file in pieces of 16 MiB; they do not stay in the page cache.

    Raises:
        ConversionError: the file cannot be read or ends before.
    """
    try:
        with path.open("rb", buffering=0) as file:
            end = offset + n_bytes
            for start in range(offset, end, _COPY_BYTES):
                n_wanted = min(_COPY_BYTES, end - start)
                piece = os.pread(file.fileno(), n_wanted, start)
                if len(piece) != n_wanted:
                    raise ConversionError(
                        f"cannot read {path}: it ends at byte {start + len(piece)}, expected {end}; it was changed "
                        "meanwhile: try again"
                    )
                yield piece
                os.posix_fadvise(file.fileno(), start, n_wanted, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise ConversionError(
            f"cannot read {path}: {error.strerror or error} (offset {offset}); check the file and its disk"
        ) from error


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


def _bytes_of(piece: Piece) -> memoryview:
    if isinstance(piece, bytes):
        return memoryview(piece)
    return np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
