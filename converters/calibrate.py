# SPDX-License-Identifier: MIT
"""Importance matrices: what quantizers need to know about a model's inputs, collected on a text, expert by expert.

A quantizer that minimizes the error of a product, not of the weights, weighs the squared error of a weight with the
mean square of the activation that the weight's column is multiplied with. llama.cpp evaluates the text, as it is or
with experts streamed (`OpenContext`), and shows each product (`cb_eval`); of its right-hand side the squares are summed
for each column: for a product with experts (`MUL_MAT_ID`) for each expert over the tokens that chose it, for one with a
stack of matrices (attention's `attn_k_b`) for each matrix.

The file is what llama.cpp's tools/imatrix writes: `<tensor>.in_sum2` F32 [columns, matrices], the sums of squares;
`<tensor>.counts` F32 [1, experts] (or [1, 1]), the summands; their quotient is the importance.

*Experts that the text never reached* would have no importance at all. Those of a projection whose input all experts
share (gate and up) get the mean square over all tokens of the layer, which is the best guess: the columns mean the same
for every expert. The input of down is an expert's own, so there its columns get equal importance. Both are written with
a count of 1, and `edgemoe.calibrate.unreached` lists the experts, as layer and expert alternately.

Memory: the sums in F32 (the size of the file) and copies of one product's activations, `collected_bytes` in all,
besides what the context takes. The sums of a chunk are made in F64 in the order of its tokens, so that neither threads
nor chance enter.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp._ggml import libggml

from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufModel, read_model

from . import evaluate
from .evaluate import GgmlTensor
from .gguf_file import MetadataValue
from .gguf_writer import OutTensor, Piece, Progress, no_progress, sha256_of, write_gguf

CALIBRATE_VERSION = 1
"""Raised whenever the same inputs give another file."""

CHUNK_TOKENS = 512
"""Tokens of a context, as in llama.cpp's tools/imatrix."""

FEW_TOKENS = 16
"""An expert with fewer is reported: its importance is mostly chance."""

_WEIGHT = re.compile(r"blk\.\d+\..+\.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")
_GGML_F32, _GGML_I32 = 0, 26

Floats = npt.NDArray[np.float32]

OpenContext = Callable[[Path, Callable[[int, bool, int | None], bool], int], AbstractContextManager[tuple[Any, Any]]]
"""Called with the model's file, what to call for each tensor, and the context's tokens; gives model and context."""


_ggml_op_name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)(("ggml_op_name", libggml))
_ggml_tensor_overhead = ctypes.CFUNCTYPE(ctypes.c_size_t)(("ggml_tensor_overhead", libggml))
_GGML_OBJECT_BYTES = 32
"""`GGML_OBJECT_SIZE`, which `ggml_tensor_overhead` adds to a tensor's bytes (ggml.h)."""


@dataclasses.dataclass
class Importance:
    """What was collected of one weight tensor.

    Attributes:
        sums: F32 [matrices, columns], sums of squared activations.
        counts: int64 [matrices], or [1] for tensors that are not experts; the activations summed.
        is_shared_input: all experts have the same input for a token.
    """

    sums: Floats
    counts: npt.NDArray[np.int64]
    is_shared_input: bool

    @property
    def is_experts(self) -> bool:
        """Each matrix has a count of its own."""
        return len(self.counts) > 1


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """How far the text reached.

    Attributes:
        n_tokens, n_chunks: what was evaluated.
        n_tensors: weight tensors with an importance.
        n_experts: experts over all layers.
        unreached: (layer, expert) that no token chose.
        few: (layer, expert, tokens) that less than `FEW_TOKENS` tokens chose, but some.
        median_tokens: of an expert.
    """

    n_tokens: int
    n_chunks: int
    n_tensors: int
    n_experts: int
    unreached: list[tuple[int, int]]
    few: list[tuple[int, int, int]]
    median_tokens: float


def calibrate(
    model: Path,
    out: Path,
    text: str,
    *,
    text_name: str = "built in",
    max_tokens: int | None = None,
    open_context: OpenContext = evaluate.llama_context,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Evaluate `text` with the GGUF `model` and write its importance matrix to `out`. See the module for what it is.

    Args:
        model: what llama.cpp can load; the more exact its weights, the better.
        out: a GGUF file; replaced if it exists.
        text: evaluated in chunks of 512 tokens, each from an empty context.
        text_name: written to the file (`imatrix.datasets`).
        max_tokens: of the text, at most.
        open_context: how llama.cpp runs the model; as it is, if not told otherwise, with all weights mapped.
        progress: called with stage (`hash` in bytes, `calibrate` in tokens), done and total.

    Raises:
        ModelFormatError: the model is not a complete GGUF.
        ConversionError: llama.cpp cannot run it, an activation is not finite, the text is shorter than 16
            tokens, or the file cannot be written.
    """
    report = progress or no_progress
    check_layout()
    files = read_model(model).files
    collector = _Collector(model)
    with open_context(model, collector.on_tensor, CHUNK_TOKENS) as (llama, context):
        chunks = [tokens for tokens, _ in evaluate.chunks_of_tokens(llama, text, CHUNK_TOKENS, max_tokens)]
        n_total = sum(map(len, chunks))
        if n_total < FEW_TOKENS:
            raise ConversionError(
                f"cannot calibrate {model}: the text has {n_total} tokens, expected at least {FEW_TOKENS} "
                f"({text_name}); use a longer text"
            )
        n_done = 0
        for tokens in chunks:
            collector.evaluate(context, tokens)
            n_done += len(tokens)
            report("calibrate", n_done, n_total)
    found = collector.found
    if not found:
        raise ConversionError(f"cannot calibrate {model}: llama.cpp's graph has no products with weights of layers")
    result = _report(found, n_total, len(chunks))
    for importance in found.values():
        _fill_unreached(importance)
    metadata: dict[str, MetadataValue | bytes] = {
        "general.type": "imatrix",
        "imatrix.datasets": [text_name],
        "imatrix.chunk_count": len(chunks),
        "imatrix.chunk_size": CHUNK_TOKENS,
        "edgemoe.calibrate.version": CALIBRATE_VERSION,
        "edgemoe.calibrate.model_sha256": sha256_of(files, progress),
        "edgemoe.calibrate.text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "edgemoe.calibrate.n_tokens": n_total,
        "edgemoe.calibrate.unreached": [number for pair in result.unreached for number in pair],
    }
    write_gguf(out, metadata, list(_out_tensors(found)))
    return result


def collected_bytes(model: GgufModel) -> int:
    """Memory that collecting takes at most, besides the model and its context: all sums, and one product's activations
    as they are copied, gathered for an expert, widened and squared."""
    weights = [tensor for tensor in model.tensors if _WEIGHT.fullmatch(tensor.name) and len(tensor.shape) > 1]
    sums = sum(4 * math.prod(tensor.shape) // tensor.shape[1] for tensor in weights)
    widest = max((tensor.shape[0] for tensor in weights), default=0)
    n_used = model.n_experts_used if model.expert_tensors else 1
    return sums + CHUNK_TOKENS * widest * (4 * n_used + 4 + 8 + 8)


def check_layout() -> None:
    """Compare our `ggml_tensor` with the library's.

    Raises:
        ConversionError: it is another one.
    """
    found = int(_ggml_tensor_overhead()) - _GGML_OBJECT_BYTES
    if found != ctypes.sizeof(GgmlTensor):
        raise ConversionError(
            f"cannot look into llama.cpp: its tensors have {found} bytes, expected {ctypes.sizeof(GgmlTensor)} "
            "(ggml_tensor); install llama-cpp-python 0.3.36"
        )


class _Collector:
    """Sums the squares of what weights are multiplied with, as llama.cpp's callback. Not thread-safe."""

    def __init__(self, model: Path) -> None:
        self.found: dict[str, Importance] = {}
        self._model = model
        self._chunk: list[str] = []
        self._error: BaseException | None = None

    def evaluate(self, context: object, tokens: list[int]) -> None:
        """Evaluate a chunk and add what was seen."""
        self._chunk = []
        try:
            evaluate.decode(self._model, context, tokens)
        finally:
            if self._error is not None:  # one that a callback raises would only be printed
                raise self._error
        if not self.found.keys() == set(self._chunk):
            missing = sorted(self.found.keys() - set(self._chunk))[:1] or sorted(set(self._chunk) - self.found.keys())
            raise ConversionError(
                f"cannot calibrate {self._model}: llama.cpp's graph of another chunk has no product with {missing[0]}"
            )

    def on_tensor(self, address: int, ask: bool, _user_data: int | None) -> bool:
        """llama.cpp asks whether a node is of interest before it is computed, and shows it after."""
        try:
            node = GgmlTensor.from_address(address)
            op = _ggml_op_name(node.op)
            if op not in (b"MUL_MAT", b"MUL_MAT_ID"):
                return False
            name = node.src[0].contents.name.decode()
            if not _WEIGHT.fullmatch(name) or node.src[1].contents.type != _GGML_F32:
                return False
            if not ask:
                self._chunk.append(name)
                self._add(name, node, is_experts=op == b"MUL_MAT_ID")
            return True
        except BaseException as error:
            self._error = error
            return False  # which ends the evaluation

    def _add(self, name: str, node: GgmlTensor, *, is_experts: bool) -> None:
        weights, inputs = node.src[0].contents, node.src[1].contents
        x = _read(node.src[1], np.dtype(np.float32))  # [i3, i2, i1, columns]
        n_matrices = weights.ne[2] * weights.ne[3]
        if name not in self.found:
            self.found[name] = Importance(
                np.zeros((n_matrices, inputs.ne[0]), np.float32),
                np.zeros(n_matrices if is_experts else 1, np.int64),
                # Not by its shape: with one expert for each token, down's input has the shape of gate's.
                is_shared_input=is_experts and "_down_exps" not in name,
            )
        importance = self.found[name]
        if is_experts:
            ids = _read(node.src[2], np.dtype(np.int32))[0, 0]  # [tokens, used]
            _add_experts(importance, x[0], ids)
        else:
            for i3 in range(x.shape[0]):
                for i2 in range(x.shape[1]):
                    matrix = (i3 % weights.ne[3]) * weights.ne[2] + i2 % weights.ne[2]
                    importance.sums[matrix] += _sum_of_squares(x[i3, i2])
            importance.counts += x.shape[0] * x.shape[1] * x.shape[2] // n_matrices
        if not np.isfinite(importance.sums).all():
            raise ConversionError(
                f"cannot calibrate {self._model}: an activation before {name} is not finite, expected numbers; "
                "check the weights, or use a file with wider number formats"
            )


def _add_experts(importance: Importance, x: Floats, ids: npt.NDArray[np.int32]) -> None:
    """Add a chunk's inputs `x` [tokens, used or 1, columns] to the experts `ids` [tokens, used] that they went to."""
    n_tokens, n_used = ids.shape
    token, slot = np.divmod(np.argsort(ids, axis=None, kind="stable"), n_used)  # by expert, then in order of tokens
    expert = ids[token, slot]
    begins = np.flatnonzero(np.diff(expert, prepend=-1))
    for begin, end in zip(begins, [*begins[1:], n_tokens * n_used], strict=True):
        rows = x[token[begin:end], slot[begin:end] % x.shape[1]]
        importance.sums[expert[begin]] += _sum_of_squares(rows)
        importance.counts[expert[begin]] += end - begin


def _sum_of_squares(rows: Floats) -> Floats:
    """[columns] of [rows, columns], summed in F64 row by row."""
    wide = rows.astype(np.float64)
    total: Floats = np.add.reduce(wide * wide, axis=0).astype(np.float32)
    return total


def _read(tensor: ctypes._Pointer[GgmlTensor], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    """A tensor's values with ggml's dimensions reversed (columns last), whatever its strides."""
    fields = tensor.contents
    address = ctypes.addressof(fields)
    n_bytes = int(evaluate.tensor_n_bytes(address))
    data = np.empty(n_bytes, np.uint8)
    evaluate.tensor_get(address, data.ctypes.data, 0, n_bytes)
    return np.ndarray(tuple(fields.ne[::-1]), dtype, data.data, strides=tuple(fields.nb[::-1]))


def _fill_unreached(importance: Importance) -> None:
    """Give experts without a token an importance: the layer's mean if they share an input, else a uniform one."""
    unreached = importance.counts == 0
    if not importance.is_experts or not unreached.any():
        return
    mean = importance.sums.sum(axis=0, dtype=np.float64) / importance.counts.sum()
    importance.sums[unreached] = mean if importance.is_shared_input else mean.mean()
    importance.counts[unreached] = 1


def _report(found: dict[str, Importance], n_tokens: int, n_chunks: int) -> CalibrationReport:
    tokens_of: dict[tuple[int, int], int] = {}
    for name, importance in found.items():
        match = _LAYER.match(name)
        if importance.is_experts and match:
            tokens_of |= {(int(match.group(1)), e): int(n) for e, n in enumerate(importance.counts)}
    return CalibrationReport(
        n_tokens=n_tokens,
        n_chunks=n_chunks,
        n_tensors=len(found),
        n_experts=len(tokens_of),
        unreached=sorted(key for key, n in tokens_of.items() if n == 0),
        few=sorted((*key, n) for key, n in tokens_of.items() if 0 < n < FEW_TOKENS),
        median_tokens=float(np.median(list(tokens_of.values()))) if tokens_of else 0.0,
    )


def _out_tensors(found: dict[str, Importance]) -> Iterator[OutTensor]:
    """The file's tensors, in the order of their names."""

    def tensor(name: str, values: Floats) -> OutTensor:
        pieces: list[Piece] = [values]
        return OutTensor(name, values.shape[::-1], "F32", lambda: pieces)

    for name, importance in sorted(found.items()):
        yield tensor(f"{name}.in_sum2", importance.sums)
        yield tensor(f"{name}.counts", importance.counts.astype(np.float32)[:, None])
