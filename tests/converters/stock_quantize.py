# SPDX-License-Identifier: MIT
"""llama.cpp's own quantization, as the reference, and GGUF files of few bytes with the tensors of whole models."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

from edgemoe.converters.quantize.presets import Model, Tensor

Floats = npt.NDArray[np.float32]
N_ROWS = 2  # the least that makes a matrix
N_STACKED = 2  # experts that are in the tensors, whatever the metadata says


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """The tensors of a model with matrices of two rows; llama.cpp quantizes it, and no more.

    Attributes:
        n_columns, n_ff_columns: what the rows of the matrices have, and of those from the feed-forward width.
        n_dense_layers: first layers without experts; all of them if `n_experts` is 0.
    """

    architecture: str
    n_layers: int
    n_experts: int
    n_heads: int = 8
    n_heads_kv: int = 8
    n_columns: int = 256
    n_ff_columns: int = 256
    n_dense_layers: int = 0
    n_shared: int = 0
    is_tied: bool = False
    fused_qkv: bool = False
    compressed_kv: bool = False

    @property
    def model(self) -> Model:
        return Model(self.architecture, self.n_layers, self.n_experts, self.n_heads, self.n_heads_kv)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        row, ff_row = (N_ROWS, self.n_columns), (N_ROWS, self.n_ff_columns)
        yield "token_embd.weight", row
        for layer in range(self.n_layers):
            block = f"blk.{layer}."
            yield block + "attn_norm.weight", (self.n_columns,)
            if self.fused_qkv:
                yield block + "attn_qkv.weight", row
            elif self.compressed_kv:
                yield from ((block + f"attn_{part}.weight", row) for part in ("q", "kv_a_mqa", "kv_b"))
                yield block + "attn_k_b.weight", (2, *row)
            else:
                yield from ((block + f"attn_{part}.weight", row) for part in "qkv")
                yield block + "attn_v.bias", (N_ROWS,)
            yield block + "attn_output.weight", row
            yield block + "ffn_norm.weight", (self.n_columns,)
            if layer < self.n_dense_layers or not self.n_experts:
                yield from ((block + f"ffn_{part}.weight", row) for part in ("gate", "up"))
                yield block + "ffn_down.weight", ff_row
                continue
            yield block + "ffn_gate_inp.weight", (self.n_experts, self.n_columns)
            yield block + "exp_probs_b.bias", (self.n_experts,)
            yield from ((block + f"ffn_{part}_exps.weight", (N_STACKED, *row)) for part in ("gate", "up"))
            yield block + "ffn_down_exps.weight", (N_STACKED, *ff_row)
            if self.n_shared:
                yield from ((block + f"ffn_{part}_shexp.weight", row) for part in ("gate", "up"))
                yield block + "ffn_down_shexp.weight", ff_row
        yield "output_norm.weight", (self.n_columns,)
        if not self.is_tied:
            yield "output.weight", row

    def tensors(self) -> list[Tensor]:
        return [Tensor(name, shape) for name, shape in self.shapes()]

    def write(self, path: Path) -> dict[str, Floats]:
        """Write the model in F32 with random weights; returns them by name."""
        rng = np.random.default_rng(0)
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_block_count(self.n_layers)
        writer.add_context_length(64)
        writer.add_embedding_length(self.n_columns)
        writer.add_feed_forward_length(self.n_ff_columns)
        writer.add_expert_feed_forward_length(self.n_ff_columns)
        writer.add_head_count(self.n_heads)
        writer.add_head_count_kv(self.n_heads_kv)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_leading_dense_block_count(self.n_dense_layers)
        writer.add_q_lora_rank(64)
        writer.add_kv_lora_rank(64)
        writer.add_expert_shared_count(self.n_shared)
        if self.n_experts:
            writer.add_expert_count(self.n_experts)
            writer.add_expert_used_count(2)
        values = {name: rng.standard_normal(shape, np.float32) for name, shape in self.shapes()}
        for name, array in values.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return values


def stock_quantize(
    source: Path, out: Path, file_type: int, importance: Mapping[str, Floats] | None = None, **options: Any
) -> bool:
    """Quantize with `llama_model_quantize`; whether it did."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = 1
    for key, value in options.items():
        setattr(params, key, value)
    if importance is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last one has no name: the end
        for entry, (name, weights) in zip(entries, importance.items(), strict=False):
            entry.name = name.encode()
            entry.data = weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = weights.size
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    with _quiet():
        return bool(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), params) == 0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
