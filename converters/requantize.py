# SPDX-License-Identifier: MIT
"""Another quantization of a GGUF file: each tensor becomes the type that a preset, or patterns of names, ask for.

Blocks of rows go through memory one after the other: read, decoded, encoded, written. Memory is some blocks of 32 MiB,
whatever the size of the model. Metadata stay as they are, but for what says how the file is quantized.

*What is quantized already* is not made larger: its bytes would grow and its errors stay. It is made smaller on request,
which adds the errors of both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufModel, GgufTensor, read_model, read_raw_metadata

from .gguf_file import DEFAULT_ALIGNMENT_BYTES, MetadataValue
from .gguf_writer import OutTensor, copy_of, read_range, sha256_of, write_gguf
from .quantize.blocks import PLAIN, QUANTIZABLE, Floats, RowBytes, dequantize, quantize, row_bytes
from .quantize.presets import Choice, Model, Override, Tensor, choose_types, file_type

Progress = Callable[[str, int, int], None]

QUANTIZE_VERSION = 1
"""Raised whenever the same inputs give another file."""

_BLOCK_VALUES = 8 << 20  # 32 MiB as floats: enough chunks for 16 threads
_DROPPED = ("split.no", "split.count", "split.tensors.count")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to quantize.

    Attributes:
        preset: as `quantize.presets.find_preset` returns it.
        overrides: types by patterns of names, before those of the preset.
        importance: by tensor, float32 (matrices, columns), as `ImportanceMatrix.for_tensors` returns it.
        importance_sha256: what tells this importance from another, for the record; of its values if empty.
        notes: metadata to add, by key: how the overrides came about.
    """

    preset: str
    overrides: tuple[Override, ...] = ()
    importance: Mapping[str, Floats] = dataclasses.field(default_factory=dict)
    importance_sha256: str = ""
    notes: Mapping[str, str | int | float | list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Requantization:
    """What became, or will become, of a file.

    Attributes:
        source: what is quantized.
        types: of every tensor, in the order of the file.
        fallbacks: tensors whose rows the blocks of the type asked for do not divide, with that type.
        requantized: tensors that were quantized already and lose twice.
        kept: tensors that were quantized already, with fewer bits than asked for, and stay.
        n_bytes: of all tensors.
    """

    source: GgufModel
    types: Mapping[str, GgmlType]
    fallbacks: Mapping[str, GgmlType]
    requantized: tuple[str, ...]
    kept: tuple[str, ...]
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors, as llama.cpp counts."""
        return self.n_bytes * 8 / sum(_n_values(tensor) for tensor in self.source.tensors)


def plan_requantization(source: Path, recipe: Recipe) -> Requantization:
    """Decide the type of every tensor; only headers are read.

    Raises:
        ConversionError: the recipe does not fit the model.
        ModelFormatError: the source is no complete GGUF file.
    """
    model = read_model(source)
    tensors = tensors_of(model)
    choice = choose_types(
        recipe.preset,
        tensors,
        describe(model),
        importance_of=recipe.importance.keys(),
        overrides=recipe.overrides,
    )
    return _settle(model, tensors, choice)


def requantize(
    source: Path, out: Path, recipe: Recipe, *, source_sha256: str = "", progress: Progress | None = None
) -> Requantization:
    """Write `out`, the model of the GGUF file `source` quantized anew. See the module for what that means.

    The same arguments give the same bytes; a killed run goes on with the tensor it was at. The file appears under its
    name when it is complete and on the disk.

    Args:
        source: the first file, if it is a split model.
        out: replaced if it exists; not `source`.
        recipe: types and importance.
        source_sha256: what to record as the source's; read from the file if empty.
        progress: called with stage (`hash`, `write`), done and total, in bytes.

    Raises:
        ConversionError: the recipe does not fit, a weight is not finite or too large, or `out` cannot be written.
        ModelFormatError: the source is no complete GGUF file.
    """
    if out.exists() and any(out.samefile(path) for path in read_model(source).files):
        raise ConversionError(f"cannot quantize {source} onto itself; write to another file")
    plan = plan_requantization(source, recipe)
    model = plan.source
    metadata: dict[str, MetadataValue | bytes] = {
        key: data for key, data in read_raw_metadata(source).items() if key not in _DROPPED
    }
    described: dict[str, object] = {"quant": recipe.preset}
    if recipe.overrides:
        described["overrides"] = [[override.pattern, override.ggml_type.name] for override in recipe.overrides]
    if recipe.importance:
        described["importance_sha256"] = recipe.importance_sha256 or _digest(recipe.importance)
    metadata |= {
        "general.file_type": file_type(recipe.preset),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
        "edgemoe.quantize.version": QUANTIZE_VERSION,
        "edgemoe.quantize.recipe": json.dumps(described, sort_keys=True),
        "edgemoe.quantize.source_sha256": source_sha256 or sha256_of(model.files, progress),
        **recipe.notes,
    }
    out_tensors = [
        copy_of(model, tensor)
        if plan.types[tensor.name].name == tensor.type_name
        else _quantized(model, tensor, plan.types[tensor.name], recipe.importance.get(tensor.name))
        for tensor in model.tensors
    ]
    alignment = int(model.metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES))
    write_gguf(out, metadata, out_tensors, alignment_bytes=alignment, progress=progress)
    return plan


def describe(model: GgufModel) -> Model:
    """What the rules of presets ask of a GGUF file.

    Raises:
        ConversionError: its metadata do not say.
    """

    def first(key: str, default: int) -> int:
        found = model.metadata.get(f"{model.architecture}.{key}", default)
        number = found[0] if isinstance(found, list) and found else found
        if not isinstance(number, int):
            raise ConversionError(
                f"cannot choose types for {model.path}: found {number!r:.40}, expected a whole number "
                f"({model.architecture}.{key}); is the file damaged?"
            )
        return number

    n_heads = first("attention.head_count", 0)
    return Model(
        architecture=model.architecture,
        n_layers=first("block_count", 0),
        n_experts=first("expert_count", 0),
        n_heads=n_heads,
        n_heads_kv=first("attention.head_count_kv", n_heads),
    )


def tensors_of(model: GgufModel) -> list[Tensor]:
    """The tensors as presets know them."""
    return [Tensor(tensor.name, tensor.shape[::-1], GgmlType[tensor.type_name]) for tensor in model.tensors]


def read_rows(
    model: GgufModel, tensor: GgufTensor, matrix: int, first_row: int, n_rows: int, n_threads: int | None = None
) -> Floats:
    """Rows of one matrix of a tensor as float32 (n_rows, columns).

    Raises:
        ConversionError: the file cannot be read, or the type has no floats.
    """
    n_columns, rows = tensor.shape[0], tensor.shape[1] if len(tensor.shape) > 1 else 1
    ggml_type = GgmlType[tensor.type_name]
    one_row = row_bytes(n_columns, ggml_type)
    offset = tensor.offset + (matrix * rows + first_row) * one_row
    data = b"".join(read_range(model.files[tensor.file_idx], offset, n_rows * one_row))
    blocks: RowBytes = np.frombuffer(data, np.uint8).reshape(n_rows, one_row)
    return dequantize(blocks, ggml_type, n_columns=n_columns, n_threads=n_threads)


def n_matrices_of(tensor: GgufTensor) -> int:
    """Matrices that lie one after the other in a tensor: experts, mostly."""
    return int(np.prod(tensor.shape[2:], dtype=np.int64))


def _digest(importance: Mapping[str, Floats]) -> str:
    digest = hashlib.sha256()
    for name, columns in sorted(importance.items()):
        digest.update(name.encode() + columns.tobytes())
    return digest.hexdigest()


def _settle(model: GgufModel, tensors: list[Tensor], choice: Choice) -> Requantization:
    """The choice, less what is quantized already and would only grow."""
    types = dict(choice.types)
    requantized, kept = [], []
    for tensor in tensors:
        wanted = types[tensor.name]
        if tensor.kept_type in PLAIN or wanted is tensor.kept_type:
            continue
        if tensor.kept_type not in QUANTIZABLE:
            raise ConversionError(
                f"cannot quantize {tensor.name}: it is {tensor.kept_type.name}, which is no format of weights"
            )
        if _bits(wanted) >= _bits(tensor.kept_type):
            types[tensor.name] = tensor.kept_type
            kept.append(tensor.name)
        else:
            requantized.append(tensor.name)
    n_bytes = sum(
        _n_values(tensor) // tensor.shape[0] * row_bytes(tensor.shape[0], types[tensor.name])
        for tensor in model.tensors
    )
    return Requantization(
        source=model,
        types=types,
        fallbacks={name: wanted for name, wanted in choice.fallbacks.items() if types[name] is choice.types[name]},
        requantized=tuple(requantized),
        kept=tuple(kept),
        n_bytes=n_bytes,
    )


def _bits(ggml_type: GgmlType) -> float:
    """Bits per weight."""
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    return float(n_bytes * 8 / n_values)


def _n_values(tensor: GgufTensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _quantized(model: GgufModel, tensor: GgufTensor, ggml_type: GgmlType, importance: Floats | None) -> OutTensor:
    """A tensor of the source in another type."""
    n_columns, n_rows = tensor.shape[0], tensor.shape[1] if len(tensor.shape) > 1 else 1
    step = max(1, _BLOCK_VALUES // n_columns)

    def pieces() -> Iterator[RowBytes]:
        for matrix in range(n_matrices_of(tensor)):
            weights = None if importance is None else importance[matrix]
            for begin in range(0, n_rows, step):
                rows = read_rows(model, tensor, matrix, begin, min(step, n_rows - begin))
                try:
                    yield quantize(rows, ggml_type, weights)
                except ConversionError as error:
                    raise ConversionError(
                        f"{error} (tensor {tensor.name}, matrix {matrix}, rows from {begin})"
                    ) from error

    return OutTensor(tensor.name, tensor.shape, ggml_type.name, pieces)
