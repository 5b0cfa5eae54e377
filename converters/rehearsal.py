# SPDX-License-Identifier: MIT
"""Asks llama.cpp whether it loads a GGUF, whose tensors need not be written yet.

It checks metadata, vocabulary, and the name and shape of every tensor, so a checkpoint that lacks one is refused in a
second and not after all others are converted. No weight is read, and none is allocated.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
from llama_cpp import _logger

from edgemoe.errors import ConversionError

from .evaluate import quiet_llama_cpp

_CHECK_TOKENS = 32
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR in ggml.h


def rehearse(path: Path, family: str) -> None:
    """Load the file without its tensors' data.

    Raises:
        ConversionError: llama.cpp refuses it.
    """
    with _errors() as errors, _loaded(path) as model:
        is_refused = not model
    if is_refused:
        reason = next((line for line in errors if "error" in line), errors[0] if errors else "no reason given")
        raise ConversionError(
            f"cannot convert the checkpoint: llama.cpp would refuse the result ({reason}); is it complete, and a "
            f"{family} checkpoint without additions?"
        )


def check_loads(path: Path) -> None:
    """Load the file without its tensors' data, and build its graph, without memory for a cache.

    Raises:
        ConversionError: llama.cpp refuses it.
    """
    context = None
    with quiet_llama_cpp(), _loaded(path) as model:
        if model:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = params.n_batch = params.n_ubatch = _CHECK_TOKENS
            context = llama_cpp.llama_init_from_model(model, params)
            if context:
                llama_cpp.llama_free(context)
    if not context:
        raise ConversionError(
            f"cannot use {path}: llama.cpp does not load what was made; report it, and name the source model"
        )


@contextlib.contextmanager
def _loaded(path: Path) -> Iterator[llama_cpp.llama_model_p | None]:
    """The model without its weights, freed at the end; None if llama.cpp refuses it."""
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    try:
        yield model
    finally:
        if model:
            llama_cpp.llama_model_free(model)


@contextlib.contextmanager
def _errors() -> Iterator[list[str]]:
    """Collect what llama.cpp calls errors, and let it print nothing."""
    lines: list[str] = []

    def add(level: int, text: bytes, _user_data: object) -> None:
        if level == _ERROR_LEVEL:
            lines.append(text.decode("utf-8", errors="replace").strip())

    callback = llama_cpp.llama_log_callback(add)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
