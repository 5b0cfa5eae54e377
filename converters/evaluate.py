# SPDX-License-Identifier: MIT
"""llama.cpp as converters use it: to run a model over a text and see its tensors."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
from llama_cpp._ggml import libggml

from edgemoe.errors import ConversionError


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h; `calibrate.check_layout` compares it with the library's."""


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * 10),
    ("view_src", ctypes.POINTER(GgmlTensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]

# Of a `struct ggml_tensor *`: its name, its bytes, and a copy of some of its data (to, offset, bytes).
tensor_name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(("ggml_get_name", libggml))
tensor_n_bytes = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)(("ggml_nbytes", libggml))
tensor_get = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)(
    ("ggml_backend_tensor_get", libggml)
)


@contextlib.contextmanager
def llama_context(
    model: Path, on_tensor: Callable[[int, bool, int | None], bool], n_ctx: int
) -> Iterator[tuple[llama_cpp.llama_model_p, llama_cpp.llama_context_p]]:
    """A llama.cpp model and context on the CPU that show their tensors to `on_tensor`; freed at the end."""
    with quiet_llama_cpp():
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = False  # no repacked second copy of the weights
        llama = llama_cpp.llama_model_load_from_file(os.fsencode(model), model_params)
        if not llama:
            raise ConversionError(f"cannot load {model}: llama.cpp refuses it; check that the file is complete")
        try:
            callback = llama_cpp.ggml_backend_sched_eval_callback(on_tensor)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
            params.n_threads = params.n_threads_batch = min(len(os.sched_getaffinity(0)), 8)
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.offload_kqv = params.op_offload = False
            params.cb_eval = callback
            context = llama_cpp.llama_init_from_model(llama, params)
            if not context:
                raise ConversionError(f"cannot run {model}: llama.cpp makes no context of {n_ctx} tokens")
            try:
                yield llama, context
            finally:
                llama_cpp.llama_free(context)
        finally:
            llama_cpp.llama_model_free(llama)


@contextlib.contextmanager
def quiet_llama_cpp() -> Iterator[None]:
    """Keep llama.cpp's log to errors for a while."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def chunks_of_tokens(
    llama: llama_cpp.llama_model_p, text: str, n_ctx: int, max_tokens: int | None = None
) -> list[tuple[list[int], int]]:
    """The text's tokens, `max_tokens` at most, in chunks that fit a context of `n_ctx`.

    Each begins with the token that begins a text, if the model has one, and comes with the number of its last tokens
    that are not the chunk's first.
    """
    vocab = llama_cpp.llama_model_get_vocab(llama)
    assert vocab is not None  # a loaded model has one
    data = text.encode()
    capacity = len(data)
    while True:  # a negative count asks for that much room: byte tokens can outnumber the bytes of the text
        buffer = (llama_cpp.llama_token * capacity)()
        n_tokens = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, capacity, False, False)
        if n_tokens >= 0:
            break
        capacity = -n_tokens
    tokens = list(buffer[:n_tokens])
    head = [llama_cpp.llama_vocab_bos(vocab)] if llama_cpp.llama_vocab_get_add_bos(vocab) else []
    step = n_ctx - len(head)
    pieces: list[tuple[list[int], int]] = []
    n_left = len(tokens) if max_tokens is None else max_tokens
    for start in range(0, len(tokens), step):
        piece = (head + tokens[start : start + step])[: n_left + 1]
        if len(piece) > 1:
            pieces.append((piece, len(piece) - 1))
            n_left -= len(piece) - 1
    return pieces


def decode(model: Path, context: llama_cpp.llama_context_p, tokens: list[int]) -> None:
    """Evaluate tokens from an empty context. All are marked as outputs: the last layer drops those that are not."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = 1
        status = llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise ConversionError(f"cannot run {model}: llama_decode returned {status}, expected 0")
