# SPDX-License-Identifier: MIT
"""The routers of a GGUF: their numbers, and a copy of the file that differs in these bytes alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GgmlType

from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufModel, GgufTensor

from .gguf_file import PartialFile
from .gguf_writer import no_progress, read_range
from .quantize.blocks import PLAIN, dequantize, quantize

Floats = npt.NDArray[np.float32]

_ROUTER = re.compile(r"blk\.(\d+)\.ffn_gate_inp\.(weight|bias)")
_ROUNDING = {GgmlType.F32: (0.0, 0.0), GgmlType.F16: (2.0**-11, 2.0**-25), GgmlType.BF16: (2.0**-8, 0.0)}
"""What rounding a number to a type may change, relative and absolute: half a unit in the last place; for BF16 a whole
one, since some converters cut bits off."""


@dataclasses.dataclass(frozen=True)
class RouterTensors:
    """A layer's router as the file has it: weights [n_experts, n_columns], and biases [n_experts] if it has them."""

    layer: int
    weight: GgufTensor
    bias: GgufTensor | None


def find_routers(model: GgufModel) -> list[RouterTensors]:
    """The routers of all layers that have one, in order.

    Raises:
        ConversionError: the file is split, has none, or one is of a type with blocks.
    """
    if len(model.files) > 1:
        raise ConversionError(
            f"cannot tune the routers of {model.path}: it is split into {len(model.files)} files, expected one; merge "
            "them with llama.cpp's llama-gguf-split --merge"
        )
    found: dict[int, dict[str, GgufTensor]] = {}
    for tensor in model.tensors:
        if match := _ROUTER.fullmatch(tensor.name):
            if GgmlType[tensor.type_name] not in PLAIN:
                raise ConversionError(
                    f"cannot tune the routers of {model.path}: {tensor.name} is {tensor.type_name}, expected F32, F16 "
                    "or BF16; convert the model again"
                )
            found.setdefault(int(match.group(1)), {})[match.group(2)] = tensor
    routers = [
        RouterTensors(layer, parts["weight"], parts.get("bias"))
        for layer, parts in sorted(found.items())
        if "weight" in parts
    ]
    if not routers:
        raise ConversionError(
            f"cannot tune the routers of {model.path}: found no blk.N.ffn_gate_inp.weight; name a Mixture-of-Experts "
            "model"
        )
    return routers


def read_floats(model: GgufModel, tensor: GgufTensor) -> Floats:
    """The numbers of a plain tensor, columns last.

    Raises:
        ConversionError: the file cannot be read.
    """
    data = b"".join(read_range(model.files[tensor.file_idx], tensor.offset, tensor.n_bytes))
    raw = np.frombuffer(data, np.uint8).reshape(1, -1)
    return dequantize(raw, GgmlType[tensor.type_name]).reshape(tensor.shape[::-1])


def is_rounded(values: Floats, tensor: GgufTensor, original: Floats) -> bool:
    """Whether `values`, as read from `tensor`, are `original` but for the rounding of the tensor's type."""
    relative, absolute = _ROUNDING[GgmlType[tensor.type_name]]
    return bool((np.abs(values - original) <= relative * np.abs(original) + absolute).all())


def write_with(
    model: GgufModel, out: Path, replaced: Mapping[str, Floats], progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Copy the file `model` to `out`, byte for byte but for the tensors `replaced`, whose layout stays.

    `out` appears complete, or not at all; it is replaced if it exists.

    Args:
        model: of one file.
        out: another file.
        replaced: numbers by the names of plain tensors; their shapes are those in the file, reversed.
        progress: called with the stage `write`, bytes done and in total.

    Raises:
        ConversionError: a number is not finite, a file cannot be read or written, or there is no room.
    """
    report = progress or no_progress
    (path,) = model.files
    n_bytes = path.stat().st_size
    new = {tensor.offset: _encode(tensor, replaced[tensor.name]) for tensor in model.tensors if tensor.name in replaced}
    if out.is_dir():
        raise ConversionError(f"cannot write {out}: it is a directory, expected the name of a file; add one")
    with PartialFile(out, n_bytes) as file:
        try:
            offset = 0
            for piece in _spliced(path, n_bytes, new):
                file.write(memoryview(piece), offset)
                offset += len(piece)
                report("write", offset, n_bytes)
            file.commit()
        except BaseException:
            file.path.unlink(missing_ok=True)  # also where the user interrupts: a copy is quickly made again
            raise


def _spliced(path: Path, n_bytes: int, new: Mapping[int, bytes]) -> Iterator[bytes]:
    """The file's bytes, with those at the offsets of `new` replaced."""
    begin = 0
    for offset, data in sorted(new.items()):
        yield from read_range(path, begin, offset - begin)
        yield data
        begin = offset + len(data)
    yield from read_range(path, begin, n_bytes - begin)


def _encode(tensor: GgufTensor, values: Floats) -> bytes:
    ggml_type = GgmlType[tensor.type_name]
    if values.shape != tensor.shape[::-1]:
        raise ValueError(f"{tensor.name}: shape {values.shape}, expected {tensor.shape[::-1]}")
    limit = float(np.finfo(np.float16).max) if ggml_type is GgmlType.F16 else float(np.finfo(np.float32).max)
    if not np.abs(values).max() <= limit:
        raise ConversionError(
            f"cannot write {tensor.name}: a number is {np.abs(values).max()}, expected at most {limit:g} "
            f"({tensor.type_name}); tune with a smaller --rate"
        )
    rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]), np.float32)
    data = quantize(rows, ggml_type).tobytes()
    assert len(data) == tensor.n_bytes
    return data
