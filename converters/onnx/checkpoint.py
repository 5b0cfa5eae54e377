# SPDX-License-Identifier: MIT
"""From a Hugging Face checkpoint to a folder with a quantized ONNX model, its experts in a file of their own.

What is decided comes first: the whole graph, with the place of every tensor, from headers and vectors alone. Then
tensors go through memory in pieces, experts one by one: read, quantized, written. Stock ONNX Runtime runs the folder,
and so does onnxruntime-genai; `edgemoe.onnx` streams its experts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from edgemoe.errors import ConversionError

from ..hf.checkpoint import SCALE_SUFFIX, Checkpoint, open_checkpoint
from ..hf.family import Hparams
from .blocks import BLOCKS, Grid
from .decoder import Decoder
from .families import Family, find_family
from .genai import MODEL_NAME, TOKENIZER_FILES, genai_config
from .graph import Graph, Job
from .out_folder import OutFolder
from .weights import Weights

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`; `convert` counts bytes of the result."""

QUANTS = {"int4": 4, "int8": 8}
DENSE = (*QUANTS, "fp32")
EMBEDDINGS = (*QUANTS, "stored")
DEFAULT_MAX_POSITIONS = 32768
"""The longest context: tables of RoPE take 4 bytes a position and dimension, 64 MiB for heads of 128 and 2^17."""

_LEFT_OUT = (r".*\.rotary_emb\.inv_freq", r".*" + re.escape(SCALE_SUFFIX))
_MAX_PROTOBUF_BYTES = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is asked for, besides the checkpoint.

    Attributes:
        quant: `int4` or `int8`: experts.
        dense: `int4`, `int8` or `fp32`: all other matrices but routers and the embedding; as `quant` if None.
        embedding: `int4`, `int8` or `stored`: as the checkpoint has it; it also is where its rows are no whole blocks.
        block: columns that share a scale: 32, 64 or 128.
        max_positions: the longest context.
        accuracy_level: 4 lets products round activations to 8 bits, for speed; 0 does not.
    """

    quant: str = "int4"
    dense: str | None = None
    embedding: str = "int8"
    block: int = 32
    max_positions: int = DEFAULT_MAX_POSITIONS
    accuracy_level: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """An export that is decided and not yet begun.

    Attributes:
        checkpoint, family: what is exported.
        jobs: what fills the files of tensors.
        files: whole files by name: the graph, and what onnxruntime-genai reads.
        file_bytes: lengths of the files of tensors.
        copies: files of the checkpoint that go along.
        n_moe_layers: QMoE nodes.
        notes: what a user should know about the result.
    """

    checkpoint: Checkpoint
    family: Family
    jobs: tuple[Job, ...]
    files: dict[str, bytes]
    file_bytes: dict[str, int]
    copies: tuple[Path, ...]
    n_moe_layers: int
    notes: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the folder."""
        copied = sum(path.stat().st_size for path in self.copies)
        return sum(self.file_bytes.values()) + sum(map(len, self.files.values())) + copied


def plan_export(folder: Path, recipe: Recipe | None = None) -> Plan:
    """Decide everything about the result; config.json, headers and vectors are read.

    Raises:
        ConversionError: the checkpoint is incomplete or contradictory, its family or something in config.json is not
            one that the graph computes, a tensor has no place in it, or the recipe does not fit.
    """
    recipe = recipe or Recipe()
    _check(recipe)
    checkpoint = open_checkpoint(folder)
    hparams = Hparams(checkpoint.config, folder / "config.json", checkpoint.tensors)
    family = find_family(hparams)
    dense = recipe.dense or recipe.quant
    graph = Graph()
    grids = {name: Grid(bits, recipe.block, recipe.accuracy_level) for name, bits in QUANTS.items()}
    weights = Weights(checkpoint, graph, grids.get(dense), grids.get(recipe.embedding))
    decoder = Decoder(weights, family, hparams, grids[recipe.quant], recipe.max_positions)
    notes = _check_all_used(weights, family, hparams)
    if not decoder.n_moe_layers:
        raise ConversionError(f"cannot convert {folder}: no layer has a router; it is no Mixture-of-Experts model")
    if any(name.endswith("_proj_blocks") for name in checkpoint.tensors):
        notes.append(f"experts are MXFP4 in the checkpoint: rounding them to {recipe.quant} changes them")
    if decoder.shape.n_positions < hparams.count("max_position_embeddings"):
        notes.append(
            f"the context is {decoder.shape.n_positions} tokens, not {hparams.count('max_position_embeddings')} as in "
            "config.json"
        )
    model = graph.serialize()
    if len(model) > _MAX_PROTOBUF_BYTES:
        raise ConversionError(f"cannot convert {folder}: the graph takes {len(model)} bytes, protobuf allows 2 GiB")
    return Plan(
        checkpoint,
        family,
        tuple(graph.jobs),
        {MODEL_NAME: model, "genai_config.json": genai_config(folder, decoder, family, hparams)},
        dict(graph.file_bytes),
        tuple(path for name in TOKENIZER_FILES if (path := folder / name).is_file()),
        decoder.n_moe_layers,
        tuple(notes),
    )


def export_checkpoint(plan: Plan, out: Path, *, force: bool = False, progress: Progress | None = None) -> None:
    """Carry a plan out.

    Args:
        plan: see `plan_export`.
        out: the folder; complete and on the disk, or not there.
        force: replace `out` if it exists.
        progress: called with stage, done and total.

    Raises:
        ConversionError: a weight is not finite, a file cannot be read or written, there is no room, or `out` exists.
    """
    if out.exists() and not force:
        raise ConversionError(f"cannot write the model: {out} exists; name another folder or use --force")
    if out.exists() and (not out.is_dir() or out.resolve() == plan.checkpoint.folder.resolve()):
        found = "the checkpoint itself" if out.is_dir() else "no folder"
        raise ConversionError(f"cannot write the model: OUT_DIR is {found} ({out}); name another folder")
    n_done, n_total = 0, sum(job.n_bytes for job in plan.jobs)
    with OutFolder(out, plan.file_bytes, plan.n_bytes) as folder:
        for job in plan.jobs:
            job.run(folder)
            n_done += job.n_bytes
            if progress is not None:
                progress("convert", n_done, n_total)
        for name, data in plan.files.items():
            folder.add(name, data)
        for path in plan.copies:
            folder.copy(path)
        folder.commit()


def _check(recipe: Recipe) -> None:
    for field, value, known in (
        ("quant", recipe.quant, tuple(QUANTS)),
        ("dense", recipe.dense or recipe.quant, DENSE),
        ("embedding", recipe.embedding, EMBEDDINGS),
        ("block", recipe.block, BLOCKS),
        ("accuracy_level", recipe.accuracy_level, (0, 4)),
    ):
        if value not in known:
            raise ConversionError(f"cannot convert with {field} {value}: expected one of {', '.join(map(str, known))}")


def _check_all_used(weights: Weights, family: Family, hparams: Hparams) -> list[str]:
    """Refuse a checkpoint with tensors that the graph does not use; notes on those that it may leave out."""
    unknown = []
    n_ahead = 0
    for name in weights.unused():
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match and int(match.group(1)) >= hparams.n_layers:
            n_ahead += 1
        elif not any(re.fullmatch(pattern, name) for pattern in _LEFT_OUT):
            unknown.append(name)
    if unknown:
        raise ConversionError(
            f"cannot convert {weights.checkpoint.folder}: the ONNX graph of {family.name} has no place for "
            f"{unknown[0]} ({len(unknown)} such tensors); is it a checkpoint without adapters and other additions?"
        )
    if n_ahead:
        return [f"{n_ahead} tensors of layers that predict further tokens were left out"]
    return []
