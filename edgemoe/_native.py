# SPDX-License-Identifier: MIT
"""The only door to native code: libedgemoe, and its plug-in for the ggml inside llama-cpp-python.

Native failures become the exceptions of `edgemoe.errors` here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe import _core
from edgemoe.errors import BackendError, BudgetError, EdgeMoeError, ExpertReadError, ModelFormatError, TraceError

_ABI_VERSION = 4
_ERRORS: dict[int, type[EdgeMoeError]] = {2: ModelFormatError, 3: ExpertReadError, 4: BudgetError, 5: BudgetError}

EVICTION_RULES = {"auto": 4, "lru": 0, "lfu": 1, "least-stale": 2, "utility": 3}
"""Which slice goes first; `auto` is `lru` or `lfu`, whichever has missed less lately."""
REPLAY_POLICIES = {**EVICTION_RULES, "belady": 100}
PREFETCH_DEPTHS = {"off": 0, "auto": 2, "1": 1, "2": 2}
"""How many layers ahead may be read, for each value of the option `prefetch`; `auto` finds out what pays."""
KERNELS = {"auto": 0, "ggml": 1}
"""Who multiplies by experts: our kernels where a format has them, or ggml alone, whose bits are llama.cpp's."""

PHASES = ("overhead", "router", "select", "wait", "experts", "dense", "sampling")
"""What the time of an evaluation goes to, in the order of `edgemoe_phase` in scheduler.h."""

ReplayOptions = _core.ReplayOptions
ReplayPhase = _core.ReplayPhase
ReplayResult = _core.ReplayResult
ReuseBias = _core.ReuseBias
ExpertCount = _core.ExpertCount
OnMiss = _core.OnMiss
OrtCounting = _core.OrtCounting
Runtime = _core.Runtime
Sizes = _core.Sizes


@dataclasses.dataclass(frozen=True)
class TensorExtent:
    """Where one stacked expert projection lies: expert e at `offset + e * expert_bytes` of file `file_idx`.

    One expert's matrix has `n_rows` rows of `n_cols` elements in `format`, as `find_format` gives it. `copy_of` is the
    index of the extent whose low-bit copy this one is, or -1.
    """

    name: str
    file_idx: int
    layer: int
    n_experts: int
    n_experts_used: int
    offset: int
    expert_bytes: int
    n_cols: int
    n_rows: int
    format: int
    copy_of: int = -1


@dataclasses.dataclass(frozen=True)
class RouterData:
    """A layer's router: float32 weights [n_experts, n_cols], norm [n_cols] before it, bias [n_experts] after it."""

    layer: int
    weights: Any
    norm: Any | None
    bias: Any | None
    is_sigmoid: bool


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction set that our kernels were compiled for, and whether this processor has it."""

    name: str
    is_supported: bool


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except _core.CoreError as error:
        code, message = error.args
        raise _ERRORS.get(code, BackendError)(message) from None


def measure(tensors: Sequence[TensorExtent], slots_bytes: int) -> Sizes:
    """What the slots for these tensors take; opens no file."""
    with _translated():
        return _core.measure([dataclasses.astuple(t) for t in tensors], slots_bytes)


def check_kernels(kernels: str) -> None:
    """Refuse what is none of `KERNELS`.

    Raises:
        ValueError: it is not.
    """
    if kernels not in KERNELS:
        raise ValueError(f"unknown kernels {kernels!r}: expected one of {', '.join(KERNELS)}")


def check_prefetch(prefetch: str) -> None:
    """Refuse what is none of `PREFETCH_DEPTHS`.

    Raises:
        ValueError: it is not.
    """
    if prefetch not in PREFETCH_DEPTHS:
        raise ValueError(f"unknown prefetch {prefetch!r}: expected one of {', '.join(PREFETCH_DEPTHS)}")


def check_eviction(eviction: str) -> None:
    """Refuse what is none of `EVICTION_RULES`.

    Raises:
        ValueError: it is not.
    """
    if eviction not in EVICTION_RULES:
        raise ValueError(f"unknown eviction {eviction!r}: expected one of {', '.join(EVICTION_RULES)}")


def open_runtime(
    files: Sequence[Path],
    tensors: Sequence[TensorExtent],
    slots_bytes: int,
    n_io_threads: int,
    eviction: str,
    kernels: str,
) -> Runtime:
    """Open the files of a model and check every extent against them.

    Raises:
        ModelFormatError, ExpertReadError: a file cannot be opened or is shorter than its tensors.
        BudgetError: `slots_bytes` is too small to run at all.
        BackendError: the environment's EDGEMOE_ISA names no instruction set, or one that this processor lacks.
    """
    with _translated():
        return _core.Runtime(
            [str(f) for f in files],
            [dataclasses.astuple(t) for t in tensors],
            slots_bytes,
            n_io_threads,
            EVICTION_RULES[eviction],
            KERNELS[kernels],
        )


def prefetch_bytes(shapes: Sequence[tuple[int, int, int]], max_depth: int) -> int:
    """Memory that `set_prefetch` takes for routers of these (layer, n_experts, n_cols)."""
    return int(_core.prefetch_bytes(shapes, max_depth))


def set_prefetch(runtime: Runtime, routers: Sequence[RouterData], max_depth: int, is_adaptive: bool) -> None:
    """Predict the experts of up to `max_depth` coming layers; adaptive: of as many as pays."""
    with _translated():
        tuples = [(r.layer, r.weights, r.norm, r.bias, r.is_sigmoid) for r in routers]
        runtime.set_prefetch(tuples, max_depth, is_adaptive)


def replay(
    layers: Sequence[tuple[int, int, Sequence[int]]],
    batch_of_token: npt.NDArray[np.int32],
    experts: npt.NDArray[np.int16],
    foreseen: npt.NDArray[np.int16],
    options: ReplayOptions,
    batch_us: npt.NDArray[np.float64],
    depths: npt.NDArray[np.int32],
) -> ReplayResult:
    """Walk the real cache through a trace; see `edgemoe_replay` in scheduler.h. Writes batch_us and depths.

    Raises:
        BudgetError: the slots are too few to run at all.
        BackendError: the trace or the options make no sense.
    """
    with _translated():
        return _core.replay(layers, batch_of_token, experts, foreseen, options, batch_us, depths)


def set_slots_bytes(runtime: Runtime, slots_bytes: int) -> None:
    """Grow or shrink the slots; the coldest experts go first."""
    with _translated():
        runtime.set_slots_bytes(slots_bytes)


def preload(runtime: Runtime, slices: Sequence[int]) -> None:
    """Read slices, the hottest first, into free slots while storage is idle; returns at once.

    Slices are numbered tensor by tensor in the order that `open_runtime` was given. What an earlier call has left to
    read is dropped.
    """
    with _translated():
        runtime.preload(list(slices))


@contextlib.contextmanager
def _trace_errors() -> Iterator[None]:
    try:
        yield
    except _core.CoreError as error:
        raise TraceError(error.args[1]) from None


def start_trace(runtime: Runtime, path: Path, header: str) -> None:
    """Record what layers choose, wait for and read, into a file that appears when the recording is stopped.

    Args:
        header: the text of the file's first block, as `trace.header_json` gives it.

    Raises:
        TraceError: the file cannot be created, or a trace is being recorded.
    """
    with _trace_errors():
        runtime.start_trace(str(path), header)


@contextlib.contextmanager
def recorded_trace(runtime: Runtime, path: Path, header: str) -> Iterator[Callable[[], None]]:
    """Record a trace until the context ends, also with an exception; its value raises what has ended it early.

    Raises:
        TraceError: see `start_trace` and `stop_trace`.
    """
    start_trace(runtime, path, header)
    try:
        yield lambda: check_trace(runtime)
    except BaseException:
        with contextlib.suppress(TraceError):
            stop_trace(runtime)
        raise
    stop_trace(runtime)


def check_trace(runtime: Runtime) -> None:
    """Raise what has ended the recording early, if anything.

    Raises:
        TraceError: the disk is full or too slow, or nothing is being recorded.
    """
    with _trace_errors():
        runtime.check_trace()


def stop_trace(runtime: Runtime) -> None:
    """Write the rest of the trace and give the file its name.

    Raises:
        TraceError: it cannot be written, or nothing is being recorded; there is no file then.
    """
    with _trace_errors():
        runtime.stop_trace()


def raise_error(runtime: Runtime) -> None:
    """Raise what stopped a computation, if it was the runtime: most often a failed read."""
    code, message = runtime.take_error()
    if code:
        raise _ERRORS.get(code, BackendError)(message)


@functools.cache
def plugin() -> _core.GgmlPlugin:
    """The ggml plug-in, registered with the ggml that llama_cpp has loaded.

    Raises:
        BackendError: llama-cpp-python is missing or of another version than the plug-in was built against.
    """
    try:
        from llama_cpp import _logger
        from llama_cpp import llama_cpp as llama
    except ImportError as error:
        raise BackendError(f"cannot import llama_cpp: {error}; pip install llama-cpp-python==0.3.36") from error
    path = Path(_core.__file__).with_name("libedgemoe_ggml.so")
    with _translated():
        native = _core.GgmlPlugin(str(path))
    if native.loaded() != native.built_against():
        raise BackendError(
            f"cannot use the installed llama.cpp: its ggml is {native.loaded()}, expected {native.built_against()}; "
            f"pip install llama-cpp-python=={native.llama_cpp_python()}"
        )
    if not native.shares_library():
        raise BackendError(f"two copies of libedgemoe in one process ({path}); reinstall edgemoe")
    # Through libllama's own dependencies: other copies of libggml on the disk have registries of their own.
    load = llama._lib.ggml_backend_load
    load.restype = ctypes.c_void_p
    quiet = llama.llama_log_callback(lambda _level, _text, _user_data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    try:
        if not load(str(path).encode()):
            raise BackendError(f"ggml refused the plug-in {path}; reinstall edgemoe")
    finally:
        llama.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
    return native


@dataclasses.dataclass(frozen=True)
class OrtTensor:
    """One stacked tensor of experts: `expert_bytes` of each of them, used in `stage` 0 to 3 of its layer: sides (scales
    and zero points) of fc1, its weights, and both of fc2."""

    layer: int
    n_experts: int
    n_experts_used: int
    stage: int
    expert_bytes: int


@dataclasses.dataclass(frozen=True)
class OrtLoaded:
    """What a session of ONNX Runtime streams: `n_layers` MoE nodes are ours, `n_refused` others are not.

    `runtime` is None without a node of ours; `workspace_bytes` is the most that a run takes beside the slots, and
    `kept_bytes` are the biases, scales and zero points of experts that stay in memory. `refusal` says why the first
    node that is not ours is not. Of the layers, `n_routers` can be predicted. `counting` counts what the provider
    itself knows; `tensors` are those that are streamed, in the order of the runtime's slices.
    """

    runtime: Runtime | None
    workspace_bytes: int
    kept_bytes: int
    n_layers: int
    n_routers: int
    n_refused: int
    refusal: str
    counting: OrtCounting | None
    tensors: tuple[OrtTensor, ...]


@functools.cache
def ort_plugin_path() -> Path:
    """The plug-in for ONNX Runtime, checked: for `onnxruntime.register_execution_provider_library`.

    Raises:
        BackendError: it cannot be loaded.
    """
    path = Path(_core.__file__).with_name("libedgemoe_ort.so")
    with _translated():
        native = _core.OrtPlugin(str(path))
    if not native.shares_library():
        raise BackendError(f"two copies of libedgemoe in one process ({path}); reinstall edgemoe")
    return path


def register_ort_plugin(register: Callable[[str, str], None]) -> None:
    """Make our provider known by a host's own function for that, such as `ort_plugin_path` names.

    onnxruntime and onnxruntime-genai share their providers where they share ONNX Runtime: the second finds it there.

    Raises:
        BackendError: the plug-in cannot be loaded, or the host refuses it.
    """
    path = ort_plugin_path()
    try:
        register("edgemoe", str(path))
    except Exception as error:
        if "already registered under edgemoe" not in str(error):
            raise BackendError(f"ONNX Runtime refused the plug-in: {error} ({path})") from error


def take_ort_loaded() -> OrtLoaded:
    """What the session that this thread has made last, with the provider's option `publish`, has loaded."""
    with _translated():
        loaded = _core.OrtPlugin(str(ort_plugin_path())).take_loaded()
        return OrtLoaded(*loaded[:-1], tuple(OrtTensor(*t) for t in loaded[-1]))


def populate(path: Path, ranges: Sequence[tuple[int, int, int]], n_threads: int) -> None:
    """Fill mapped memory with a file's bytes: (file offset, length, address), all multiples of 4096."""
    with _translated():
        plugin().populate(str(path), list(ranges), n_threads)


def versions() -> dict[str, str]:
    """Versions of edgemoe, its core and the engine below."""
    native = plugin()
    return {
        "edgemoe": _core.version(),
        "ggml_built_against": native.built_against(),
        "ggml_loaded": native.loaded(),
        "llama_cpp_python": metadata.version("llama-cpp-python"),
        "python": platform.python_version(),
    }


def find_format(ggml_name: str) -> int:
    """The number of a format that our kernels multiply, as `gguf.GGMLQuantizationType` names it; 0 for all others."""
    return int(_core.find_format(ggml_name))


def isas() -> list[Isa]:
    """The instruction sets that our kernels were compiled for, best first."""
    return [Isa(name, is_supported) for name, is_supported in _core.isas()]


def active_isa() -> str:
    """The instruction set of our kernels: what the environment's EDGEMOE_ISA says, or the best supported one.

    Raises:
        BackendError: EDGEMOE_ISA names none, or one that this processor lacks.
    """
    with _translated():
        return str(_core.active_isa())


def isa() -> str:
    """The instruction sets that ggml's CPU kernels use here, as llama.cpp names them."""
    import llama_cpp.llama_cpp as llama

    return str(llama.llama_print_system_info().decode()).strip()


def _check_abi() -> None:
    if _core.abi_version() != _ABI_VERSION:
        raise BackendError(f"libedgemoe has ABI {_core.abi_version()}, expected {_ABI_VERSION}; reinstall edgemoe")


_check_abi()
