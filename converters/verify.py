# SPDX-License-Identifier: MIT
"""Compares a GGUF with the Hugging Face checkpoint that it was made of.

Rows of every tensor are read from both and compared, without torch and in the memory of one block, whatever the size
of the model. Where the checkpoint is small and transformers knows its class, both also compute the logits of a text:
only that tells whether names, shapes and hyper-parameters mean in llama.cpp what they mean in transformers, because
the rows are looked up with the converter's own names.

What is allowed: a row of a tensor may be off by three times what quantizing it here costs (an importance matrix moves
error from some columns to others; 3 leaves room for that). Logits of a file that is all float32 may be off by 1e-3 of
their largest; of others the KL divergence is bounded, at about four times what llama.cpp reports for the same bits
(tools/perplexity/README.md, LLaMA 3 8B: Q8_0 0.0014, Q6_K 0.0055, Q4_K_M 0.031, Q3_K_M 0.11, Q2_K 0.45).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import psutil
from gguf import GGMLQuantizationType as GgmlType

from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufModel, GgufTensor, read_model

from .cross_entropy import log_softmax
from .hf.sources import Mxfp4Rows, Piece
from .hf.transformers_model import load_model
from .quantize.blocks import NEEDS_IMPORTANCE, dequantize, quantize, row_bytes
from .to_gguf import Plan, Progress, Recipe, plan_conversion
from .upcycle import default_calibration_text

Floats = npt.NDArray[np.float32]

ROWS_PER_TENSOR = 64
"""Rows that are compared of each tensor, spread over it, if not told otherwise."""

N_SEQUENCES, N_TOKENS = 2, 128
"""Of the text whose logits are compared."""

MAX_F32_RELATIVE_ERROR = 1e-3
"""Of logits: max |a - b| / max |b|. Between float32 implementations it is 1e-6; a wrong constant makes it 1e-2."""

_ROW_SLACK = 3.0
_ROUNDING = 2e-7  # two ways to the same float32
_MAX_KL = ((16.0, 1e-3), (8.0, 6e-3), (6.0, 2.5e-2), (5.0, 5e-2), (4.0, 0.15), (3.0, 0.6), (0.0, 2.0))
_MIN_SHARE = 0.1
_BLOCK_ELEMENTS = 4 << 20
_MAX_MODEL_BYTES = 8 << 30
_SCALARS = ("model", "pre", "bos_token_id", "eos_token_id", "add_bos_token", "add_space_prefix")


@dataclasses.dataclass(frozen=True)
class TensorError:
    """What the compared rows of a tensor are off by.

    Attributes:
        name, type_name: the tensor, and its type in the GGUF.
        n_rows, n_compared: rows that it has, and that were compared.
        relative: root of sum (a - b)^2 / sum b^2 over the compared rows, b being the checkpoint's.
        worst_row: the row whose error is the largest share of what is allowed, and that share.
    """

    name: str
    type_name: str
    n_rows: int
    n_compared: int
    relative: float
    worst_row: tuple[int, float]


@dataclasses.dataclass(frozen=True)
class LogitsError:
    """How llama.cpp's logits differ from those of transformers in float32.

    Attributes:
        n_positions: positions compared.
        max_rel_error: max |a - b| / max |b|.
        kl: mean of sum p ln(p / q) in nats, p being transformers'.
        top1_agreement: share of positions with the same most likely token.
    """

    n_positions: int
    max_rel_error: float
    kl: float
    top1_agreement: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        tensors: the error of each tensor, in the order of the conversion.
        logits: None where logits were not compared; `notes` says why.
        failures: what is beyond its bound; the file is as it should be if there is none.
        notes: what the reader should know, such as how llama.cpp's graph differs from the model.
    """

    tensors: tuple[TensorError, ...]
    logits: LogitsError | None
    failures: tuple[str, ...]
    notes: tuple[str, ...]


def verify(
    path: Path,
    checkpoint: Path,
    *,
    rows_per_tensor: int = ROWS_PER_TENSOR,
    logits: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Compare the GGUF `path` with the folder `checkpoint`.

    Args:
        path: a GGUF, the first file of a split one.
        checkpoint: the folder that it was converted from.
        rows_per_tensor: rows to compare of each tensor; all of them if 0.
        logits: `auto` to compare logits where transformers is installed and knows the class, and the model takes at
            most 8 GiB and half of the free memory in float32; `always`, or `never`.
        progress: called with the stages `tensors` and `logits`, done and total.

    Raises:
        ConversionError: the checkpoint cannot be read or is of no known family, or logits were asked for and cannot
            be had.
        ModelFormatError: the GGUF cannot be read.
    """
    model = read_model(path)
    is_bpe = model.metadata.get(gguf.Keys.Tokenizer.MODEL) == "gpt2"
    pre_tokenizer = model.metadata.get(gguf.Keys.Tokenizer.PRE) if is_bpe else None
    plan = plan_conversion(checkpoint, Recipe(pre_tokenizer=pre_tokenizer))
    failures = [*_compare_metadata(model, plan), *_compare_layout(model, plan)]
    tensors = []
    found = {tensor.name: tensor for tensor in model.tensors}
    comparable = [piece for piece in plan.pieces if piece.name in found and _fits(piece, found[piece.name])]
    for i, piece in enumerate(comparable):
        error = _compare_tensor(model, found[piece.name], plan, piece, rows_per_tensor)
        tensors.append(error)
        row, share = error.worst_row
        if not share <= 1:
            failures.append(
                f"{error.name} ({error.type_name}): row {row} is off by {share:.3g} times what is allowed, the "
                f"compared rows by {error.relative:.3g} of their size"
            )
        if progress:
            progress("tensors", i + 1, len(comparable))
    notes = [note for note in plan.notes if "MXFP4" not in note]
    result = None
    if reason := _why_no_logits(model, plan, logits, bool(failures)):
        if logits == "always":
            raise ConversionError(f"cannot compare logits: {reason}")
        notes.append(f"logits were not compared: {reason}")
    else:
        if progress:
            progress("logits", 0, 0)
        result = _compare_logits(path, checkpoint)
        failures += _judge(result, model)
    return Report(tuple(tensors), result, tuple(failures), tuple(notes))


def max_kl(model: GgufModel) -> float:
    """The KL divergence that the coarsest type allows, of those that a tenth of the weights or more have."""
    return next(bound for bits, bound in _MAX_KL if _coarsest_bits(model) >= bits)


def _coarsest_bits(model: GgufModel) -> float:
    counts: dict[float, int] = {}
    for tensor in model.tensors:
        n_elements = math.prod(tensor.shape)
        counts[8 * tensor.n_bytes / n_elements] = counts.get(8 * tensor.n_bytes / n_elements, 0) + n_elements
    total = sum(counts.values())
    return min(bits for bits, n_elements in counts.items() if n_elements >= _MIN_SHARE * total)


def _compare_metadata(model: GgufModel, plan: Plan) -> Iterator[str]:
    """Hyper-parameters and token ids that are not as the checkpoint says."""
    arch = plan.metadata[gguf.Keys.General.ARCHITECTURE]
    if model.architecture != arch:
        yield f"the architecture is {model.architecture}, expected {arch} (general.architecture)"
        return
    keys = [key for key in plan.metadata if key.startswith(f"{arch}.")]
    keys += [key for name in _SCALARS if (key := f"tokenizer.ggml.{name}") in plan.metadata]
    for key in [*keys, gguf.Keys.Tokenizer.CHAT_TEMPLATE]:
        if key in plan.metadata and key in model.metadata and not _equal(model.metadata[key], plan.metadata[key]):
            yield f"{key} is {_short(model.metadata[key])}, expected {_short(plan.metadata[key])}"
    tokens = gguf.Keys.Tokenizer.LIST
    n_tokens = len(model.metadata.get(tokens, ()))
    expected = plan.metadata[tokens]
    if isinstance(expected, list) and n_tokens != len(expected):
        yield f"{tokens} has {n_tokens} tokens, expected {len(expected)}"


def _equal(found: Any, expected: Any) -> bool:
    """Equal as GGUF stores it: floats are 32 bits wide. Long arrays are compared by their length."""
    if isinstance(expected, list):
        if len(found) != len(expected):
            return False
        return not isinstance(found, list) or all(map(_equal, found, expected))
    if isinstance(expected, float):
        return bool(np.float32(found) == np.float32(expected))
    return bool(found == expected)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _compare_layout(model: GgufModel, plan: Plan) -> Iterator[str]:
    """Tensors that are missing, too many, or of another shape."""
    found = {tensor.name: tensor for tensor in model.tensors}
    expected = {piece.name: piece for piece in plan.pieces}
    for name in expected.keys() - found.keys():
        yield f"{name} is missing"
    for name in found.keys() - expected.keys():
        yield f"{name} has no counterpart in the checkpoint"
    for name, piece in expected.items():
        if name in found and not _fits(piece, found[name]):
            yield f"{name} has the shape {list(found[name].shape)}, expected {list(reversed(piece.shape))}"


def _fits(piece: Piece, tensor: GgufTensor) -> bool:
    """Whether shapes are the same; ggml's may end with ones."""
    shape = tuple(reversed(piece.shape))
    longest = max(len(shape), len(tensor.shape))
    padded = [dims + (1,) * (longest - len(dims)) for dims in (shape, tensor.shape)]
    return padded[0] == padded[1]


def _compare_tensor(
    model: GgufModel, tensor: GgufTensor, plan: Plan, piece: Piece, rows_per_tensor: int
) -> TensorError:
    ggml_type = GgmlType[tensor.type_name]
    n_columns = tensor.shape[0]
    n_rows = math.prod(tensor.shape[1:])
    stride = row_bytes(n_columns, ggml_type)
    squares, expected_squares, n_compared = 0.0, 0.0, 0
    worst = (0, 0.0)
    for first, expected in _expected_rows(plan, piece, rows_per_tensor):
        found = _read(model, tensor, first * stride, len(expected) * stride).reshape(len(expected), stride)
        values = dequantize(found, ggml_type)
        requantized = expected
        if not (piece.is_mxfp4 and ggml_type is GgmlType.MXFP4):  # those are copied, and have to be exact
            blocks = quantize(expected, ggml_type, _even_importance(ggml_type, n_columns))
            requantized = dequantize(blocks, ggml_type)
        error = np.sqrt(np.square(values - expected, dtype=np.float64).sum(-1))
        norm = np.sqrt(np.square(expected, dtype=np.float64).sum(-1))
        cost = np.sqrt(np.square(requantized - expected, dtype=np.float64).sum(-1))
        share = error / np.maximum(_ROW_SLACK * cost + _ROUNDING * norm, np.finfo(np.float64).tiny)
        share[~np.isfinite(share)] = np.inf  # a NaN in the file, or something where the checkpoint has zeros
        if share.max() > worst[1]:
            worst = (first + int(share.argmax()), float(share.max()))
        squares += float(np.square(error).sum())
        expected_squares += float(np.square(norm).sum())
        n_compared += len(expected)
    relative = math.sqrt(squares / expected_squares) if expected_squares else math.sqrt(squares)
    return TensorError(tensor.name, tensor.type_name, n_rows, n_compared, relative, worst)


def _expected_rows(plan: Plan, piece: Piece, rows_per_tensor: int) -> Iterator[tuple[int, Floats]]:
    """Blocks of rows of the checkpoint, spread evenly over the tensor, each with the number of its first row."""
    starts = [0, *itertools.accumulate(source.n_rows for source in piece.sources)]
    step = piece.sources[0].block_rows
    if not rows_per_tensor:
        step *= max(_BLOCK_ELEMENTS // (step * piece.shape[-1]), 1)
    blocks = [(i, first) for i, source in enumerate(piece.sources) for first in range(0, source.n_rows, step)]
    n_wanted = min(len(blocks), max(rows_per_tensor // step, 2)) if rows_per_tensor else len(blocks)
    for i in np.unique(np.linspace(0, len(blocks) - 1, n_wanted).round().astype(int)):
        index, first = blocks[i]
        source = piece.sources[index]
        rows = source.read(plan.checkpoint, first, min(first + step, source.n_rows))
        if isinstance(source, Mxfp4Rows):
            rows = dequantize(np.ascontiguousarray(rows, np.uint8), GgmlType.MXFP4)
        yield starts[index] + first, np.asarray(rows, np.float32)


def _even_importance(ggml_type: GgmlType, n_columns: int) -> Floats | None:
    return np.ones(n_columns, np.float32) if ggml_type in NEEDS_IMPORTANCE else None


def _read(model: GgufModel, tensor: GgufTensor, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
    path = model.files[tensor.file_idx]
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), n_bytes, tensor.offset + offset)
    except OSError as error:
        raise ConversionError(f"cannot read {tensor.name}: {error.strerror or error} ({path})") from error
    if len(data) != n_bytes:
        raise ConversionError(f"cannot read {tensor.name}: the file ends early ({path}); convert again")
    return np.frombuffer(data, np.uint8)


def _why_no_logits(model: GgufModel, plan: Plan, logits: str, has_failed: bool) -> str:
    """Why logits are not compared, or nothing."""
    if logits == "never":
        return "not asked for"
    if has_failed and logits != "always":
        return "tensors or metadata differ already"
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return "transformers and torch are not installed; install edgemoe[verify]"
    transformers = importlib.import_module("transformers")
    model_type = str(plan.checkpoint.config.get("model_type"))
    if model_type not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"transformers {transformers.__version__} has no class for the model type {model_type}"
    n_bytes = 4 * sum(math.prod(tensor.shape) for tensor in model.tensors)
    most = min(_MAX_MODEL_BYTES, psutil.virtual_memory().available // 2)
    if n_bytes > most and logits != "always":
        return f"the model takes {n_bytes >> 20} MiB in float32, at most {most >> 20} MiB are used for that"
    return ""


def _compare_logits(path: Path, checkpoint: Path) -> LogitsError:
    sequences, found = _llama_cpp_logits(path)
    expected = _transformers_logits(checkpoint, sequences)
    if found.shape != expected.shape:
        raise ConversionError(
            f"cannot compare logits: {path} has {found.shape[-1]} tokens, transformers {expected.shape[-1]}; are they "
            "of the same model?"
        )
    p, q = log_softmax(expected), log_softmax(found)
    return LogitsError(
        n_positions=found.shape[0] * found.shape[1],
        max_rel_error=float(np.abs(found - expected).max() / np.abs(expected).max()),
        kl=float((np.exp(p) * (p - q)).sum(-1).mean()),
        top1_agreement=float((found.argmax(-1) == expected.argmax(-1)).mean()),
    )


def _llama_cpp_logits(path: Path) -> tuple[list[list[int]], Floats]:
    """The text as token ids [sequence, position], and llama.cpp's logits of it, with a cache in float32."""
    import llama_cpp

    from .unpacked import UnpackedLlama

    try:
        llm = UnpackedLlama(
            str(path),
            n_ctx=N_TOKENS,
            n_batch=N_TOKENS,
            logits_all=True,
            verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
        )
    except ValueError as error:
        raise ConversionError(f"cannot load {path}: llama.cpp refuses it ({error}); convert again") from error
    try:
        tokens = llm.tokenize(default_calibration_text().encode(), add_bos=False)
        if len(tokens) < N_SEQUENCES * N_TOKENS:
            raise ConversionError(
                f"cannot compare logits: the text is {len(tokens)} tokens, expected {N_SEQUENCES * N_TOKENS} ({path})"
            )
        sequences = [tokens[i * N_TOKENS : (i + 1) * N_TOKENS] for i in range(N_SEQUENCES)]
        logits = []
        for sequence in sequences:
            llm.reset()
            llm.eval(sequence)
            logits.append(llm.scores[:N_TOKENS].copy())
    finally:
        llm.close()
    return sequences, np.stack(logits)


def _transformers_logits(checkpoint: Path, sequences: list[list[int]]) -> Floats:
    torch = importlib.import_module("torch")
    model = load_model(checkpoint, "compare logits")
    with torch.no_grad():
        result: Floats = model(torch.tensor(sequences)).logits.float().numpy()
    return result


def _judge(logits: LogitsError, model: GgufModel) -> Iterator[str]:
    if _coarsest_bits(model) >= 32:
        if not logits.max_rel_error <= MAX_F32_RELATIVE_ERROR:
            yield (
                f"logits are off by {logits.max_rel_error:.3g} of the largest, allowed for F32 are "
                f"{MAX_F32_RELATIVE_ERROR:g}"
            )
    elif not logits.kl <= max_kl(model):
        bits = _coarsest_bits(model)
        yield f"the KL divergence is {logits.kl:.3g} nats, allowed at {bits:.3g} bits a weight are {max_kl(model):g}"
