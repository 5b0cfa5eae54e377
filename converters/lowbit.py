# SPDX-License-Identifier: MIT
"""Makes the low-bit companion of a model: its experts, quantized to fewer bits, and nothing else.

What a companion is and how it is tied to its source says `edgemoe.formats.companion`. Experts are taken one at a time,
so the largest thing in memory is one projection of one expert in F32, with its blocks before and after.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from edgemoe.errors import ConversionError
from edgemoe.formats.companion import COMPANION_TYPE, SOURCE_KEY, SOURCE_NAME, expert_bank_key
from edgemoe.formats.gguf import GgufModel, GgufTensor, read_model, read_raw_metadata

from .gguf_file import MetadataValue
from .gguf_writer import PAGE_BYTES, OutTensor, Progress, read_range, sha256_of, write_gguf
from .pack import in_streaming_order
from .quantize.blocks import QUANTIZABLE, dequantize, quantize
from .quantize.importance import read_importance
from .quantize.presets import Tensor, fitting_type

LOWBIT_VERSION = 1
"""Raised whenever the same inputs give another file."""

DEFAULT_QUANT = "Q2_K"


@dataclasses.dataclass(frozen=True)
class LowbitReport:
    """What the companion costs.

    Attributes:
        source_bytes, out_bytes: of all experts, before and after.
        types: how many expert tensors have each type; more than one where rows do not suit the type asked for.
        rms_error: root of the squared differences to the source's weights, over that of the weights; of one expert of
            each tensor.
    """

    source_bytes: int
    out_bytes: int
    types: dict[str, int]
    rms_error: float


def make_companion(
    source: Path,
    out: Path,
    *,
    quant: str = DEFAULT_QUANT,
    imatrix: Path | None = None,
    progress: Progress | None = None,
) -> LowbitReport:
    """Write `out`, the low-bit companion of the model `source` (one file, or the first of a split one).

    Args:
        quant: a type of ggml, such as `Q2_K`; where rows do not suit its blocks, llama.cpp's stand-in for it.
        imatrix: an importance matrix of the source, as `edgemoe calibrate` or llama.cpp writes it; expert tensors that
            are not in it are quantized without.
        progress: called with stage (`hash`, `write`), bytes done and in total.

    Raises:
        ModelFormatError: the source is not a complete GGUF.
        ConversionError: it has no routed experts, the type is unknown or needs an importance that is missing, the
            importance matrix is of another model, or the result cannot be written.
    """
    names = {kind.name: kind for kind in QUANTIZABLE}
    if quant.upper() not in names:
        raise ConversionError(f"cannot quantize to {quant!r}: no such type; use one of {', '.join(sorted(names))}")
    model = read_model(source)
    if not model.expert_tensors:
        raise ConversionError(
            f"cannot make a companion of {source}: it has no routed experts (architecture {model.architecture})"
        )
    for t in model.expert_tensors:
        if GGMLQuantizationType[t.type_name] not in QUANTIZABLE:
            raise ConversionError(f"cannot make a companion of {source}: {t.name} has type {t.type_name}")
    importance = None if imatrix is None else read_importance(imatrix)
    weights = (
        {}
        if importance is None
        else importance.for_tensors(Tensor(t.name, t.shape[::-1]) for t in model.expert_tensors)
    )
    tensors = [
        _low_bit(model, t, fitting_type(names[quant.upper()], t.shape[0]), weights.get(t.name))
        for t in in_streaming_order(model)
    ]
    prefixes = ("general.", f"{model.architecture}.")
    metadata: dict[str, MetadataValue | bytes] = {
        key: data for key, data in read_raw_metadata(source).items() if key.startswith(prefixes)
    }
    metadata |= {
        "general.type": COMPANION_TYPE,
        "edgemoe.companion.version": LOWBIT_VERSION,
        "edgemoe.companion.quant": quant.upper(),
        SOURCE_KEY: expert_bank_key(model),
        SOURCE_NAME: str(model.metadata.get("general.name", source.stem)),
        "edgemoe.companion.source_sha256": sha256_of(model.files, progress),
    }
    if importance is not None:
        metadata["edgemoe.companion.imatrix_sha256"] = importance.sha256
    write_gguf(out, metadata, tensors, alignment_bytes=PAGE_BYTES, progress=progress)
    types = [t.type_name for t in tensors]
    return LowbitReport(
        source_bytes=model.expert_bank_bytes,
        out_bytes=sum(t.n_bytes for t in tensors),
        types={name: types.count(name) for name in sorted(set(types))},
        rms_error=_sampled_error(model, read_model(out)),
    )


def _low_bit(
    model: GgufModel, tensor: GgufTensor, kind: GGMLQuantizationType, importance: npt.NDArray[np.float32] | None
) -> OutTensor:
    """An expert tensor of the companion."""

    def pieces() -> Iterator[npt.NDArray[np.uint8]]:
        for expert in range(tensor.shape[2]):
            weights = _weights(model, tensor, expert)
            yield quantize(weights, kind, None if importance is None else importance[expert])

    return OutTensor(tensor.name, tensor.shape, kind.name, pieces)


def _weights(model: GgufModel, tensor: GgufTensor, expert: int) -> npt.NDArray[np.float32]:
    """The weights [rows, columns] of one expert."""
    columns, rows, n_experts = tensor.shape
    slice_bytes = tensor.n_bytes // n_experts
    data = b"".join(read_range(model.files[tensor.file_idx], tensor.offset + expert * slice_bytes, slice_bytes))
    blocks = np.frombuffer(data, np.uint8).reshape(rows, -1)
    return dequantize(blocks, GGMLQuantizationType[tensor.type_name], n_columns=columns)


def _sampled_error(model: GgufModel, companion: GgufModel) -> float:
    """Relative error of the companion's weights, over one expert of each tensor."""
    originals = {t.name: t for t in model.expert_tensors}
    squares = differences = 0.0
    for tensor in companion.expert_tensors:
        expert = tensor.shape[2] // 2
        weights = _weights(model, originals[tensor.name], expert).astype(np.float64)
        squares += float(np.square(weights).sum())
        differences += float(np.square(weights - _weights(companion, tensor, expert)).sum())
    return math.sqrt(differences / squares) if squares > 0.0 else 0.0
