# SPDX-License-Identifier: MIT
"""From a GGUF model to the native runtime that streams its experts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from edgemoe import _native, host, trace
from edgemoe.formats.gguf import GgufModel
from edgemoe.routers import find_routers, read_tensor


def extents(model: GgufModel, companion: GgufModel | None = None) -> list[_native.TensorExtent]:
    """Where the experts of a model lie; empty for a dense model. Behind them their low-bit copies, with file indices
    that go on from the model's."""
    found = [
        _native.TensorExtent(
            name=t.name,
            file_idx=t.file_idx,
            layer=t.layer,
            n_experts=t.shape[2],
            n_experts_used=min(model.n_experts_used, t.shape[2]),
            offset=t.offset,
            expert_bytes=t.n_bytes // t.shape[2],
            n_cols=t.shape[0],
            n_rows=t.shape[1],
            format=_native.find_format(t.type_name),
        )
        for t in model.expert_tensors
    ]
    if companion is None:
        return found
    index_of = {t.name: i for i, t in enumerate(found)}
    copies = [
        dataclasses.replace(
            copy,
            name=f"{copy.name} (low-bit copy)",
            file_idx=len(model.files) + copy.file_idx,
            layer=found[index_of[copy.name]].layer,
            n_experts_used=found[index_of[copy.name]].n_experts_used,
            copy_of=index_of[copy.name],
        )
        for copy in extents(companion)
    ]
    return found + copies


def slot_sizes(model: GgufModel, slots_bytes: int, companion: GgufModel | None = None) -> _native.Sizes:
    """What slots for this model's experts, and their low-bit copies, take; `slots_bytes` is how much memory there is
    for them."""
    return _native.measure(extents(model, companion), max(0, slots_bytes))


def open_runtime(
    model: GgufModel,
    slots_bytes: int,
    eviction: str = "auto",
    kernels: str = "auto",
    companion: GgufModel | None = None,
) -> _native.Runtime:
    """Open the model's files for streaming; see `_native.open_runtime` for errors.

    Raises:
        BackendError: also if our kernels do not multiply by the low-bit copies.
    """
    files = [*model.files, *(companion.files if companion is not None else ())]
    return _native.open_runtime(files, extents(model, companion), slots_bytes, host.N_IO_THREADS, eviction, kernels)


def trace_header(model: GgufModel, run: trace.TracedRun | None = None) -> str:
    """What a trace of this model says about it, and with what it is run."""

    def order_of_use(t: _native.TensorExtent) -> tuple[bool, bool]:
        return "down" in t.name, "gate" not in t.name

    layers = []
    for layer, group in itertools.groupby(sorted(extents(model), key=lambda t: t.layer), key=lambda t: t.layer):
        tensors = sorted(group, key=order_of_use)
        slice_bytes = tuple(int(_native.measure([t], 0).bank_slot_bytes) // t.n_experts for t in tensors)
        layers.append(trace.TraceLayer(layer, tensors[0].n_experts, tensors[0].n_experts_used, slice_bytes))
    return trace.header_json(model.path.name, layers, sum(path.stat().st_size for path in model.files), run)


def prefetch_bytes(model: GgufModel, prefetch: str) -> int:
    """Memory that predictions of this model's experts take."""
    shapes = [(r.layer, r.weights.shape[1], r.weights.shape[0]) for r in find_routers(model)]
    return _native.prefetch_bytes(shapes, _native.PREFETCH_DEPTHS[prefetch])


def start_prefetch(native: _native.Runtime, model: GgufModel, prefetch: str) -> None:
    """Let the runtime predict coming layers' experts, as the option `prefetch` says.

    Raises:
        ModelFormatError: a router cannot be read.
    """
    depth = _native.PREFETCH_DEPTHS[prefetch]
    if depth == 0:
        return
    routers = [
        _native.RouterData(
            layer=r.layer,
            weights=read_tensor(model, r.weights),
            norm=None if r.norm is None else read_tensor(model, r.norm),
            bias=None if r.bias is None else read_tensor(model, r.bias),
            is_sigmoid=r.is_sigmoid,
        )
        for r in find_routers(model)
    ]
    _native.set_prefetch(native, routers, depth, prefetch == "auto")


@dataclasses.dataclass(frozen=True)
class FormatPath:
    """Of the expert tensors in one format: how many there are, and how many our kernels multiply."""

    type_name: str
    n_tensors: int
    n_own: int


def format_paths(model: GgufModel, native: _native.Runtime) -> list[FormatPath]:
    """Which kernels multiply each format of the model's experts, in the order of the file."""
    own: dict[str, list[bool]] = {}
    for t in model.expert_tensors:
        own.setdefault(t.type_name, []).append(native.is_own(t.name))
    return [FormatPath(name, len(is_own), sum(is_own)) for name, is_own in own.items()]


def examine_formats(model: GgufModel) -> list[FormatPath]:
    """`format_paths` of a model that is not loaded; see `_native.open_runtime` for errors."""
    native = open_runtime(model, int(slot_sizes(model, 0).bank_slot_bytes))
    try:
        return format_paths(model, native)
    finally:
        native.close()


def kernels_used(paths: Sequence[FormatPath], isa: str) -> str:
    """Who multiplies by the experts: `isa` for our kernels, "ggml", or both, with the formats that are left to ggml."""
    if not any(p.n_own for p in paths):
        return "ggml"
    left = [
        p.type_name + (f" ({p.n_tensors - p.n_own} of {p.n_tensors} tensors)" if p.n_own else "")
        for p in paths
        if p.n_own < p.n_tensors
    ]
    return f"{isa}, ggml for {', '.join(left)}" if left else isa
