# SPDX-License-Identifier: MIT
"""llama.cpp as edgemoe uses it: how its memory is measured before it is taken, and where its mappings lie."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import re
import sys
from collections.abc import Iterator
from typing import Any

import llama_cpp
from llama_cpp import _logger
from llama_cpp import llama_cpp as llama

from edgemoe import _native, host
from edgemoe.errors import BackendError
from edgemoe.formats.gguf import GgufModel, GgufTensor
from edgemoe.mapping import Mapping

_PAGE_BYTES = 4096
_MIB = 1 << 20
# llama.cpp 0.3.36's own report of what its context takes; tests compare it with the buffers themselves.
_KV_SIZE = re.compile(
    r"(?:llama_kv_cache|llama_memory_recurrent|dsv4)[^\n]*: size = +([\d.]+) MiB"
    r"|DSV4 .* state buffer size = +([\d.]+) MiB"
)
_COMPUTE_SIZE = re.compile(r"compute buffer size = +([\d.]+) MiB")
_OUTPUT_SIZE = re.compile(r"output buffer size = +([\d.]+) MiB")


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """Memory that llama.cpp takes beside weights: KV cache, compute and output buffers, and this process's
    resident set with the model's vocabulary and graph in it."""

    kv_bytes: int
    compute_bytes: int
    output_bytes: int
    process_bytes: int


class EngineLog:
    """llama.cpp's log while a model loads: kept for its numbers and errors, shown when `echo`."""

    def __init__(self, echo: bool) -> None:
        self.text = ""
        self._echo = echo

    def add(self, level: int, text: bytes, _user_data: Any) -> None:
        """Take one piece of log, as llama.cpp's callback."""
        line = text.decode("utf-8", errors="replace")
        self.text += line
        if self._echo:
            print(line, end="", file=sys.stderr)

    def last_error(self) -> str:
        """The last line in which llama.cpp says what failed; the ones that only say that it did come after it."""
        lines = self.text.splitlines()
        errors = [line for line in lines if "error" in line.lower()]
        failures = [line for line in lines if "fail" in line.lower()]
        return (errors or failures or ["no reason given"])[-1]

    def sizes(self, process_bytes: int) -> EngineSizes:
        """The sizes that llama.cpp reported."""

        def total(pattern: re.Pattern[str]) -> int:
            found = [float(next(filter(None, m.groups()))) for m in pattern.finditer(self.text)]
            # Two decimals of a MiB are printed: each figure may be 5 KiB short.
            return int(sum(found) * _MIB) + len(found) * 5243

        return EngineSizes(total(_KV_SIZE), total(_COMPUTE_SIZE), total(_OUTPUT_SIZE), process_bytes)


@contextlib.contextmanager
def engine_log(echo: bool) -> Iterator[EngineLog]:
    """Collect llama.cpp's log."""
    log = EngineLog(echo)
    callback = llama.llama_log_callback(log.add)
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield log
    finally:
        llama.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


class PlainLlama(llama_cpp.Llama):  # type: ignore[misc]
    """llama.cpp as it is, without weight repacking, which takes a second copy of some weights."""

    _allocates = True

    # llama_cpp.Llama fills in `self.model_params` and hands it to llama.cpp.
    @property
    def model_params(self) -> Any:
        """llama.cpp's model parameters."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.no_alloc = not self._allocates
        params.use_extra_bufts = False
        self._model_params = params


class _Rehearsal(PlainLlama):
    """A model and a context that llama.cpp sizes without allocating them."""

    _allocates = False


@contextlib.contextmanager
def rehearsal(model: GgufModel, runtime: _native.Runtime | None, llama_kwargs: dict[str, Any]) -> Iterator[EngineSizes]:
    """Measure what llama.cpp will take for this model and context, without loading weights; it is freed at the end.

    Raises:
        BackendError: llama.cpp cannot load the model.
    """
    kwargs = dict(llama_kwargs, use_mmap=False, use_mlock=False, lora_path=None, verbose=False, draft_model=None)
    with loading(runtime), engine_log(echo=False) as log:
        try:
            rehearsed = _Rehearsal(str(model.path), **kwargs)
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"llama.cpp cannot load {model.path}: {log.last_error()}") from error
        sizes = log.sizes(host.process_rss_bytes())
    with contextlib.closing(rehearsed):
        yield sizes


@dataclasses.dataclass
class Load:
    """How llama.cpp took a model: whether its loader could be kept from reading the whole file ahead, and, after
    the load, how many expert tensors it left to the runtime."""

    is_hooked: bool = True
    n_placed: int = 0


@contextlib.contextmanager
def loading(runtime: _native.Runtime | None) -> Iterator[Load]:
    """Within: a model that this thread loads has its experts served by `runtime`."""
    load = Load()
    if runtime is None:
        yield load
        return
    plugin = _native.plugin()
    load.is_hooked = plugin.begin_load(runtime)
    try:
        yield load
    finally:
        load.n_placed = plugin.end_load()


def dense_ranges(model: GgufModel, file_idx: int, mapped: list[Mapping]) -> list[tuple[int, int, int]]:
    """Pages of a file's mappings that hold dense weights, as (file offset, length, address)."""
    experts = {t.name for t in model.expert_tensors}
    spans: list[list[int]] = []
    dense = [t for t in model.tensors if t.file_idx == file_idx and t.name not in experts]
    for t in sorted(dense, key=lambda t: t.offset):
        begin = t.offset // _PAGE_BYTES * _PAGE_BYTES
        end = -(-(t.offset + t.n_bytes) // _PAGE_BYTES) * _PAGE_BYTES
        if spans and begin <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([begin, end])
    ranges = []
    for m in mapped:
        for begin, end in spans:
            first, last = max(begin, m.offset), min(end, m.offset + m.length)
            if first < last:
                ranges.append((first, last - first, m.address + first - m.offset))
    return ranges


def tensor_address(tensor: GgufTensor, mapped: list[Mapping]) -> int | None:
    """Where a tensor lies in one of its file's mappings; None when it lies in none as a whole."""
    for m in mapped:
        if m.offset <= tensor.offset and tensor.offset + tensor.n_bytes <= m.offset + m.length:
            return m.address + tensor.offset - m.offset
    return None
