# SPDX-License-Identifier: MIT
"""From a Hugging Face checkpoint to a GGUF file that stock llama.cpp and edgemoe load.

What is decided comes first, from headers alone: family, metadata, tokenizer, tensors, their types, every offset. Then
blocks of rows go through memory one after the other: read, checked, encoded, written. Memory is a few blocks,
whatever the size of the model; the smallest block is one row, or one expert's matrix where it has to be transposed.

The bytes depend on the checkpoint and the recipe, and on nothing else: not on memory, threads or interruptions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import psutil
from gguf import GGMLQuantizationType as GgmlType

from edgemoe.errors import ConversionError
from edgemoe.sizes import format_size

from .gguf_file import DEFAULT_ALIGNMENT_BYTES, Layout, MetadataValue, PartialFile, TensorInfo, lay_out
from .gguf_writer import PAGE_BYTES, no_progress
from .hf.checkpoint import Bytes, Checkpoint, Floats, open_checkpoint
from .hf.families import find_family
from .hf.family import Family, Hparams
from .hf.plan import plan_tensors
from .hf.pre_tokenizers import check_name
from .hf.sources import Mxfp4Rows, Piece, Source
from .hf.tokenizer import convert_tokenizer
from .input_hashes import BUFFER_BYTES as HASH_BUFFER_BYTES
from .input_hashes import InputHashes
from .pack import streaming_place
from .quantize.blocks import quantize
from .quantize.importance import ImportanceMatrix
from .quantize.presets import Model, Override, Tensor, choose_types, file_type
from .rehearsal import rehearse

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`: `check` (after an interruption), `convert`, and `hash` while the hashes of
inputs are waited for; all in bytes."""

CONVERTER_VERSION = 2
"""Raised whenever the same inputs give another file."""

BUFFER_BYTES = 256 << 20
"""What blocks may take if no limit is given. Blocks beyond some 16 MiB are not faster."""

BYTES_PER_ELEMENT = 24
"""Of a block in memory: as stored (4 at most), as float32 (4), a reordered copy (4), and encoded (4 at most); twice the
first two where every second row or column is taken."""

_MAX_BLOCK_ELEMENTS = 16 << 20
_PLACEHOLDER = "0" * 64
_ALWAYS_F32 = (  # llama.cpp multiplies, adds or convolves these with float32 only, or they are routers
    "_norm.weight",
    ".bias",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "shortconv.conv.weight",
    "attn_sinks.weight",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is asked for, besides the checkpoint.

    Attributes:
        preset: name of the types that tensors get, such as Q8_0, as `quantize.presets.find_preset` returns it.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, if it is not to be found by its hash.
        overrides: types by patterns of tensor names, before those of the preset.
        importance: of tensors by name, the importance of each column: float32 (matrices, columns) with one matrix, or
            one for each expert.
        importance_sha256: what tells this importance from another, for the recipe in the metadata.
        is_packed: laid out for streaming, as docs/packing.md says, but for merging: tensors begin at pages, experts lie
            behind everything else, layer by layer in the order of use.
    """

    preset: str = "F32"
    pre_tokenizer: str | None = None
    overrides: tuple[Override, ...] = ()
    importance: Mapping[str, Floats] = dataclasses.field(default_factory=dict)
    importance_sha256: str = ""
    is_packed: bool = False

    @property
    def alignment_bytes(self) -> int:
        """Where tensors begin."""
        return PAGE_BYTES if self.is_packed else DEFAULT_ALIGNMENT_BYTES


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion that is decided and not yet begun.

    Attributes:
        checkpoint, family: what is converted.
        recipe: what was asked for.
        pieces: what each tensor is made of, in the order of the file.
        tensors: name, shape and type of each.
        metadata: all of it; the hashes of the inputs are zeros.
        inputs: files whose SHA-256 goes into the metadata.
        notes: what a user should know about the result: how llama.cpp differs, what was left out or written otherwise.
    """

    checkpoint: Checkpoint
    family: Family
    recipe: Recipe
    pieces: tuple[Piece, ...]
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, MetadataValue]
    inputs: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return self.layout([_PLACEHOLDER] * len(self.inputs)).n_bytes

    def layout(self, digests: list[str]) -> Layout:
        """The file with these SHA-256 of the inputs."""
        lines = [f"{digest}  {path.name}" for digest, path in zip(digests, self.inputs, strict=True)]
        return lay_out({**self.metadata, _SHA256_KEY: lines}, self.tensors, self.recipe.alignment_bytes)


_SHA256_KEY = "edgemoe.convert.input_sha256"


def plan_conversion(folder: Path, recipe: Recipe, imatrix: ImportanceMatrix | None = None) -> Plan:
    """Decide everything about the result; only headers, config.json and the tokenizer are read.

    Args:
        folder: the checkpoint.
        recipe: what is asked for.
        imatrix: where the importance of columns comes from, if not from the recipe.

    Raises:
        ConversionError: the checkpoint is incomplete, contradictory, of no known family, or does not fit the recipe or
            the importance matrix.
    """
    if recipe.pre_tokenizer is not None:
        check_name(recipe.pre_tokenizer)
    checkpoint = open_checkpoint(folder)
    hparams = Hparams(checkpoint.config, folder / "config.json", checkpoint.tensors)
    family = find_family(hparams)
    pieces = plan_tensors(checkpoint, family, hparams)
    if imatrix is not None:
        columns = imatrix.for_tensors([Tensor(piece.name, piece.shape) for piece in pieces])
        recipe = dataclasses.replace(recipe, importance=columns, importance_sha256=imatrix.sha256)
    metadata: dict[str, MetadataValue] = {
        gguf.Keys.General.ARCHITECTURE: gguf.MODEL_ARCH_NAMES[family.arch],
        gguf.Keys.General.TYPE: gguf.GGUFType.MODEL,
        gguf.Keys.General.NAME: folder.resolve().name,
        **family.metadata(hparams),
        gguf.Keys.General.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
        gguf.Keys.General.FILE_TYPE: file_type(recipe.preset),
    }
    tokenizer = convert_tokenizer(folder, checkpoint.config, recipe.pre_tokenizer, dict(family.special_tokens))
    types, notes = _choose_types(pieces, recipe, metadata)
    if recipe.is_packed:
        pieces = sorted(pieces, key=lambda piece: streaming_place(piece.name))
    tensors = tuple(TensorInfo(piece.name, piece.shape, types[piece.name]) for piece in pieces)
    metadata |= tokenizer.metadata
    metadata |= {
        "edgemoe.convert.version": CONVERTER_VERSION,
        "edgemoe.convert.family": family.name,
        "edgemoe.convert.recipe": _describe(recipe),
    }
    if n_left_out := int(hparams.get("num_nextn_predict_layers") or 0):
        notes.append(f"{n_left_out} layers that predict further tokens were left out; nothing here runs them")
    return Plan(
        checkpoint,
        family,
        recipe,
        tuple(pieces),
        tensors,
        metadata,
        (*checkpoint.inputs, *tokenizer.inputs),
        (*family.caveats(hparams), *tokenizer.notes, *notes),
    )


def convert(plan: Plan, out: Path, *, memory_bytes: int | None = None, progress: Progress | None = None) -> None:
    """Carry a plan out. What was interrupted goes on where it was; the bytes are the same.

    Args:
        plan: see `plan_conversion`.
        out: the file; replaced if it exists, once the new one is complete and on the disk.
        memory_bytes: limit of this process's resident memory, what it has now included; 256 MiB more than it has now if
            None.
        progress: called with stage, done and total.

    Raises:
        ConversionError: a weight is not finite or cannot be encoded, a file cannot be read or written, there is no
            room, the limit of memory is too low, or llama.cpp refuses the header.
    """
    report = progress or no_progress
    block_elements = _block_elements(plan, memory_bytes)
    with PartialFile(out, plan.n_bytes) as file, InputHashes(plan.inputs, file) as hashes:
        layout = plan.layout([_PLACEHOLDER] * len(plan.inputs))
        file.begin(layout, hashes.identity)
        rehearse(file.path, plan.family.name)
        sizes = [tensor.n_bytes for tensor in plan.tensors]
        done: set[int] = set()
        n_done, n_total = 0, sum(sizes)
        for index, is_intact in file.complete_tensors(layout, sizes):
            if is_intact and index not in done:
                done.add(index)
                n_done += sizes[index]
            report("check", n_done, n_total)
        for index, (piece, tensor) in enumerate(zip(plan.pieces, plan.tensors, strict=True)):
            if index in done:
                continue
            offset = layout.offsets[index]
            for data in _encode(plan, piece, tensor, block_elements):
                file.write(data.reshape(-1).data, offset)
                offset += data.nbytes
                n_done += data.nbytes
                report("convert", n_done, n_total)
            file.end_tensor(index)
            hashes.note()
        file.write_header(plan.layout(hashes.wait(report)))
        file.commit()


def _choose_types(
    pieces: list[Piece], recipe: Recipe, metadata: Mapping[str, MetadataValue]
) -> tuple[dict[str, GgmlType], list[str]]:
    """The type of each tensor, and notes on those that are not as asked."""
    arch = str(metadata[gguf.Keys.General.ARCHITECTURE])
    n_heads_kv = metadata[gguf.Keys.Attention.HEAD_COUNT_KV.format(arch=arch)]
    model = Model(
        architecture=arch,
        n_layers=_whole(metadata[gguf.Keys.LLM.BLOCK_COUNT.format(arch=arch)]),
        n_experts=_whole(metadata[gguf.Keys.LLM.EXPERT_COUNT.format(arch=arch)]),
        n_heads=_whole(metadata[gguf.Keys.Attention.HEAD_COUNT.format(arch=arch)]),
        n_heads_kv=_whole(n_heads_kv[0] if isinstance(n_heads_kv, list) else n_heads_kv),
    )
    tensors = [Tensor(piece.name, piece.shape) for piece in pieces]
    choice = choose_types(
        recipe.preset, tensors, model, importance_of=recipe.importance.keys(), overrides=recipe.overrides
    )
    types = dict(choice.types)
    notes = []
    if kept := [piece.name for piece in pieces if piece.is_mxfp4]:
        types |= dict.fromkeys(kept, GgmlType.MXFP4)
        notes.append(f"{len(kept)} tensors are MXFP4 in the checkpoint and stay as they are")
    for piece in pieces:
        if piece.name.endswith(_ALWAYS_F32) or len(piece.shape) == 1:
            types[piece.name] = GgmlType.F32
    for name, wanted in choice.fallbacks.items():
        if types[name] is choice.types[name]:
            notes.append(f"{name} is {types[name].name}: its rows are no multiple of a block of {wanted.name}")
    return types, notes


def _whole(value: object) -> int:
    assert isinstance(value, int)  # by the family's metadata
    return value


def _describe(recipe: Recipe) -> str:
    """The recipe as JSON, to be recorded."""
    fields: dict[str, object] = {"quant": recipe.preset, "pre_tokenizer": recipe.pre_tokenizer}
    if recipe.overrides:
        fields["overrides"] = [[override.pattern, override.ggml_type.name] for override in recipe.overrides]
    if recipe.importance:
        fields["importance_sha256"] = recipe.importance_sha256
    if recipe.is_packed:
        fields["packed"] = True
    return json.dumps(fields, sort_keys=True)


def _block_elements(plan: Plan, memory_bytes: int | None) -> int:
    """Elements of a block, so that memory suffices.

    Raises:
        ConversionError: it does not suffice for the largest block that cannot be cut.
    """
    used = psutil.Process().memory_info().rss
    buffers = BUFFER_BYTES if memory_bytes is None else memory_bytes - used
    available = max(buffers - HASH_BUFFER_BYTES, 0) // BYTES_PER_ELEMENT
    needed = max(source.block_rows * source.n_columns for piece in plan.pieces for source in piece.sources)
    if memory_bytes is not None and available < needed:
        floor_mib = ((used + HASH_BUFFER_BYTES + needed * BYTES_PER_ELEMENT) >> 20) + 1
        raise ConversionError(
            f"cannot convert within {format_size(memory_bytes)}: this process has {format_size(used)} already and the "
            f"largest block takes {format_size(needed * BYTES_PER_ELEMENT)}; use --memory {floor_mib}MiB or more"
        )
    return max(min(available, _MAX_BLOCK_ELEMENTS), needed)


def _encode(plan: Plan, piece: Piece, tensor: TensorInfo, block_elements: int) -> Iterator[Bytes]:
    """The bytes of a tensor, a block of rows after the other."""
    importance = plan.recipe.importance.get(piece.name)
    first_row = 0
    for source in piece.sources:
        for start, stop in _blocks(source, block_elements):
            if isinstance(source, Mxfp4Rows):
                yield source.read(plan.checkpoint, start, stop)
                continue
            values = source.read(plan.checkpoint, start, stop)
            if values.shape[1] != tensor.shape[-1]:
                raise ConversionError(
                    f"cannot convert {tensor.name}: rows of {values.shape[1]}, expected {tensor.shape[-1]}"
                )
            try:
                for rows, weights in _by_matrix(values, first_row + start, importance, tensor):
                    yield quantize(rows, tensor.ggml_type, weights)
            except ConversionError as error:
                raise ConversionError(f"cannot convert {tensor.name}: {error}") from error
        first_row += source.n_rows


def _by_matrix(
    values: Floats, first_row: int, importance: Floats | None, tensor: TensorInfo
) -> Iterator[tuple[Floats, Floats | None]]:
    """Rows from `first_row` of a tensor, cut where another matrix with another importance begins: a source may hold all
    experts, or one."""
    if importance is None or len(importance) == 1:
        yield values, None if importance is None else importance[0]
        return
    n_matrix_rows = tensor.shape[-2]
    start = 0
    while start < len(values):
        matrix, row = divmod(first_row + start, n_matrix_rows)
        stop = min(start + n_matrix_rows - row, len(values))
        yield values[start:stop], importance[matrix]
        start = stop


def _blocks(source: Source, block_elements: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each as large as fits and a multiple of what can be read."""
    unit = source.block_rows
    step = max(block_elements // source.n_columns // unit, 1) * unit
    for start in range(0, source.n_rows, step):
        yield start, min(start + step, source.n_rows)
