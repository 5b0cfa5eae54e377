# SPDX-License-Identifier: MIT
"""Reads importance matrices: the mean square of what each column of a weight matrix is multiplied with.

Two formats, both of llama.cpp's `tools/imatrix`. GGUF: for each weight tensor `<tensor>.in_sum2`, F32 [columns,
matrices], sums of squares, and `<tensor>.counts`, F32 [1, matrices], how many; `edgemoe calibrate` writes it too. The
older binary one: means of all matrices one after the other, times a number of calls.

As in llama.cpp, an expert that no token reached has an importance of 1 for each column.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufModel, read_model

from .presets import Tensor, is_quantizable

Floats = npt.NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_NAME_BYTES = 1 << 10  # GGML_MAX_NAME is 64; a corrupt length must not become an allocation


@dataclasses.dataclass(frozen=True)
class ImportanceMatrix:
    """What a file says.

    Attributes:
        path: the file.
        means: by tensor, all its matrices' columns one after the other; ones where no token came.
        counts: by tensor, how many activations each of its matrices saw; one number if all saw the same.
        unreached: by tensor, how many matrices no token reached; only tensors that have such.
        sha256: of the file, as hexadecimal digits.
    """

    path: Path
    means: Mapping[str, Floats]
    counts: Mapping[str, Floats]
    unreached: Mapping[str, int]
    sha256: str

    def for_tensors(self, tensors: Iterable[Tensor]) -> dict[str, Floats]:
        """The importance float32 (matrices, columns) of those tensors that may be quantized and are in the file.

        Raises:
            ConversionError: a tensor has other columns or experts than the matrix, or none is in it at all: it was
                collected on another model.
        """
        found = {}
        for tensor in tensors:
            flat = self.means.get(tensor.name)
            if flat is None or not is_quantizable(tensor):
                continue
            n_columns = tensor.shape[-1]
            n_matrices = int(np.prod(tensor.shape[:-2], dtype=np.int64))
            if flat.size != n_matrices * n_columns:
                if tensor.name == "token_embd.weight":  # of a model that looks tokens up with what it ends with
                    continue
                raise ConversionError(
                    f"cannot use the importance matrix {self.path}: found {flat.size} values for {tensor.name}, "
                    f"expected {n_matrices} x {n_columns}; it was collected on another model"
                )
            found[tensor.name] = flat.reshape(n_matrices, n_columns)
        if not found:
            raise ConversionError(
                f"cannot use the importance matrix {self.path}: it has none of the tensors of this model; it was "
                "collected on another one"
            )
        return found


def read_importance(path: Path) -> ImportanceMatrix:
    """Read an importance matrix, in whichever of the two formats.

    Raises:
        ConversionError: it cannot be read, is neither, is damaged, or has values that are negative or not finite.
        ModelFormatError: it is a damaged GGUF.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
            digest = hashlib.sha256()
            file.seek(0)
            while data := file.read(16 << 20):
                digest.update(data)
        read = _read_gguf(path) if is_gguf else _read_binary(path)
    except OSError as error:
        raise ConversionError(
            f"cannot read the importance matrix {path}: {error.strerror or error}; check the path"
        ) from error
    means: dict[str, Floats] = {}
    unreached: dict[str, int] = {}
    for name, (sums, counts) in read.items():
        matrices = sums.reshape(len(counts), -1)
        if (
            not (np.isfinite(matrices).all() and np.isfinite(counts).all())
            or (matrices < 0).any()
            or (counts < 0).any()
        ):
            raise ConversionError(
                f"cannot use the importance matrix {path}: found values that are negative or not finite ({name}), "
                "expected means of squares; collect it again"
            )
        is_reached = (counts > 0) & matrices.any(axis=1)
        mean = np.ones_like(matrices)
        np.divide(matrices, counts[:, None], out=mean, where=is_reached[:, None])
        means[name] = mean.reshape(-1)
        if not is_reached.all():
            unreached[name] = int(np.count_nonzero(~is_reached))
    return ImportanceMatrix(
        path, means, {name: counts for name, (_, counts) in read.items()}, unreached, digest.hexdigest()
    )


def _read_gguf(path: Path) -> dict[str, tuple[Floats, Floats]]:
    """Sums and counts by tensor."""
    model = read_model(path)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if not names:
        raise ConversionError(
            f"cannot use the importance matrix {path}: found no tensor that ends with {_SUMS}; is it another GGUF file?"
        )
    found = {}
    for name in names:
        sums, counts = (_floats(model, name + suffix) for suffix in (_SUMS, _COUNTS))
        if sums.size % counts.size:
            raise ConversionError(
                f"cannot use the importance matrix {path}: found {sums.size} sums and {counts.size} counts ({name}), "
                "expected a multiple; collect it again"
            )
        found[name] = (sums, counts)
    return found


def _floats(model: GgufModel, name: str) -> Floats:
    """The values of an F32 tensor."""
    tensor = next((tensor for tensor in model.tensors if tensor.name == name), None)
    if tensor is None or tensor.type_name != "F32":
        found = "nothing" if tensor is None else tensor.type_name
        raise ConversionError(
            f"cannot use the importance matrix {model.path}: found {found} ({name}), expected F32; collect it again"
        )
    path = model.files[tensor.file_idx]
    return np.fromfile(path, np.dtype("<f4"), tensor.n_bytes // 4, offset=tensor.offset).astype(np.float32, copy=False)


def _read_binary(path: Path) -> dict[str, tuple[Floats, Floats]]:
    """Sums and counts by tensor; of all matrices together, as the format has no more."""
    data = path.read_bytes()
    offset = 0

    def take(n_bytes: int) -> bytes:
        nonlocal offset
        if n_bytes < 0 or offset + n_bytes > len(data):
            raise ConversionError(
                f"cannot read the importance matrix {path}: found {len(data)} bytes, expected {n_bytes} more at byte "
                f"{offset}; it is truncated, or no importance matrix of llama.cpp"
            )
        offset += n_bytes
        return data[offset - n_bytes : offset]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    found: dict[str, tuple[Floats, Floats]] = {}
    for _ in range(integer()):
        n_name = integer()
        name = take(n_name if n_name <= _MAX_NAME_BYTES else -1).decode("utf-8", errors="replace")
        n_calls, n_values = integer(), integer()
        values = np.frombuffer(take(4 * n_values), np.dtype("<f4")).astype(np.float32)
        found[name] = (values, np.array([max(n_calls, 1)], np.float32))
    if not found:
        raise ConversionError(f"cannot use the importance matrix {path}: it has no tensors; collect it again")
    return found
