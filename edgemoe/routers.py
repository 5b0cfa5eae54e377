# SPDX-License-Identifier: MIT
"""The routers of a GGUF model, from which the experts of coming layers are predicted.

They are found by GGUF's standard tensor names, for any architecture. Where a model keeps them under other names there
is no prediction, and where its routing is of another form (groups of experts, say) predictions are less often right;
neither changes a result.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

from edgemoe.errors import ModelFormatError
from edgemoe.formats.gguf import GgufModel, GgufTensor

_SIGMOID = 2  # llama.cpp's value of `expert_gating_func`
# The input of a layer's experts is normalized by the first of these that the layer has.
_NORMS = ("ffn_norm.weight", "post_attention_norm.weight")
_COLUMN_STEP = 32  # as kernels/core/predictor.h multiplies

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Router:
    """One layer's router: weights [n_experts, n_cols], norm [n_cols] before it, bias [n_experts] for the selection."""

    layer: int
    weights: GgufTensor
    norm: GgufTensor | None
    bias: GgufTensor | None
    is_sigmoid: bool


def find_routers(model: GgufModel) -> list[Router]:
    """The routers of the layers that have experts, in order; empty where none can be used."""
    by_name = {t.name: t for t in model.tensors}
    is_sigmoid = model.metadata.get(f"{model.architecture}.expert_gating_func") == _SIGMOID
    found = []
    for layer in sorted({t.layer for t in model.expert_tensors}):
        weights = by_name.get(f"blk.{layer}.ffn_gate_inp.weight")
        if weights is None or len(weights.shape) != 2 or weights.shape[0] % _COLUMN_STEP:
            continue
        norms = (by_name.get(f"blk.{layer}.{name}") for name in _NORMS)
        norm = next((t for t in norms if t is not None and t.shape == weights.shape[:1]), None)
        biases = (by_name.get(f"blk.{layer}.{name}") for name in ("exp_probs_b.bias", "ffn_gate_inp.bias"))
        bias = next((t for t in biases if t is not None and t.shape == weights.shape[1:]), None)
        found.append(Router(layer, weights, norm, bias, is_sigmoid))
    return [r for r in found if r.weights.shape[0] == found[0].weights.shape[0]]


def find_embedding(model: GgufModel) -> GgufTensor | None:
    """The token embedding, if its format can be read."""
    tensor = next((t for t in model.tensors if t.name == "token_embd.weight" and len(t.shape) == 2), None)
    if tensor is None:
        return None
    row = np.zeros((1, tensor.n_bytes // tensor.shape[1]), dtype=np.uint8)
    try:
        quants.dequantize(row, GGMLQuantizationType[tensor.type_name])
    except NotImplementedError:
        return None
    return tensor


class Embedding:
    """Rows of a model's token embedding, from where llama.cpp has it in memory."""

    def __init__(self, tensor: GgufTensor, address: int) -> None:
        self._kind = GGMLQuantizationType[tensor.type_name]
        n_rows = tensor.shape[1]
        raw = (ctypes.c_uint8 * tensor.n_bytes).from_address(address)
        self._rows: npt.NDArray[np.uint8] = np.ctypeslib.as_array(raw).reshape(n_rows, -1)
        self.n_tokens = n_rows

    def rows(self, tokens: Sequence[int]) -> Floats:
        """The embeddings of tokens, as float32 [n_tokens, n_cols]."""
        values = quants.dequantize(self._rows[list(tokens)], self._kind)
        return np.ascontiguousarray(values, dtype=np.float32).reshape(len(tokens), -1)


def read_tensor(model: GgufModel, tensor: GgufTensor) -> Floats:
    """A tensor's values as float32, the columns last.

    Raises:
        ModelFormatError: the file cannot be read there, or the tensor's format is unknown.
    """
    path = model.files[tensor.file_idx]
    try:
        raw = np.fromfile(path, dtype=np.uint8, count=tensor.n_bytes, offset=tensor.offset)
    except OSError as error:
        raise ModelFormatError(f"cannot read {tensor.name} of {path} at {tensor.offset}: {error}") from error
    if raw.size < tensor.n_bytes:
        raise ModelFormatError(
            f"cannot read {tensor.name}: found {raw.size} bytes, expected {tensor.n_bytes} ({path} at {tensor.offset});"
            " fetch the file again"
        )
    kind = GGMLQuantizationType[tensor.type_name]
    try:
        values = quants.dequantize(raw.reshape(-1, tensor.n_bytes // max(1, int(np.prod(tensor.shape[1:])))), kind)
    except NotImplementedError as error:
        raise ModelFormatError(f"cannot read {tensor.name} of {path}: {tensor.type_name} is not known") from error
    return np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.shape[::-1])
