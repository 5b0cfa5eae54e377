# SPDX-License-Identifier: MIT
"""How a session of ONNX Runtime schedules its experts: which are kept, read ahead, preferred and remembered.

What GGUF models have (docs/architecture.md), for QMoE nodes: the keywords of `edgemoe.onnx.InferenceSession` become
options of the execution provider, which finds routers in the graph and chooses natively. Nodes are layers, numbered in
the order in which they run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgemoe import _native, expert_count, host, reuse, selection, trace, warm
from edgemoe import on_miss as misses
from edgemoe.counters import prefetch_fields
from edgemoe.errors import BackendError, TraceError
from edgemoe.formats.onnx_model import OnnxModel

# Of an .onnx file, to tell models apart: its graph is less than that, and where weights lie inside of it, enough.
_KEY_BYTES = 64 << 20
_KEY_SAMPLE_BYTES = 4096
# Positions of QMoE's weights of fc1 and fc2.
_FC1, _FC2 = 2, 5
# MoE's of fc2.
_FLOAT_FC2 = 4


@dataclasses.dataclass(frozen=True)
class Keywords:
    """Those of `InferenceSession` that are about scheduling, named and valued as `Llama`'s."""

    eviction: str = "auto"
    prefetch: str = "auto"
    warm_start: bool = True
    reuse_bias: str | float = "off"
    reuse_method: str = "cache-prior"
    top_j: int | None = None
    expert_top_k: str | int = "off"
    on_miss: str = "wait"
    on_miss_mass: float = misses.DEFAULT_MASS

    def check(self) -> None:
        """Refuse what makes no sense by itself, or is not for ONNX models.

        Raises:
            ValueError: it does not, or is not.
        """
        _native.check_eviction(self.eviction)
        _native.check_prefetch(self.prefetch)
        if self.reuse_bias == "auto":
            raise ValueError(
                "reuse_bias 'auto' is for GGUF models, whose prices are measured: expected off or a number"
            )
        reuse.parse(self.reuse_bias, self.reuse_method, self.top_j)
        count = expert_count.parse(self.expert_top_k)
        if count is not None and count.rule == "lexi":
            raise ValueError(
                f"expert_top_k {self.expert_top_k!r} is for GGUF models, whose experts it measures: expected off, a "
                "number, top-p:P, map or map:MIN-MAX"
            )
        if self.on_miss == "lowbit":
            raise ValueError("on_miss 'lowbit' is for GGUF models, which have low-bit copies: expected wait or skip")
        misses.parse(self.on_miss, self.on_miss_mass)

    @property
    def is_lossy(self) -> bool:
        """Whether results may change."""
        return self.reuse_bias != "off" or self.expert_top_k != "off" or self.on_miss != "wait"

    def provider_options(self, slots_bytes: int, n_threads: int, is_strict: bool) -> dict[str, str]:
        """These and what else a session of ours tells the execution provider; see edgemoe_ort.h.

        Args:
            slots_bytes: memory for resident experts.
            n_threads: threads that compute.
            is_strict: a MoE node that is not streamed is an error.
        """
        options = {name: str(getattr(self, name)) for name in ("eviction", "prefetch", "reuse_method", "expert_top_k")}
        options |= {"on_miss": self.on_miss, "on_miss_mass": repr(float(self.on_miss_mass))}
        options["reuse_bias"] = "off" if self.reuse_bias == "off" else repr(float(self.reuse_bias))
        options |= {} if self.top_j is None else {"top_j": str(self.top_j)}
        return options | {
            "slots_bytes": str(slots_bytes),
            "strict": str(int(is_strict)),
            "n_threads": str(n_threads),
            "n_io_threads": str(host.N_IO_THREADS),
            "publish": "1",
        }


def refusal(loaded: _native.OrtLoaded) -> str:
    """What to say of nodes that are not streamed, where that is no error."""
    return f"{loaded.n_refused} MoE nodes are not streamed, all their experts are in memory; {loaded.refusal}"


def prefetch_bytes(model: OnnxModel, prefetch: str) -> int:
    """The most memory that predictions take: as if routers of all MoE nodes were found."""
    shapes = []
    for layer, node in enumerate(model.moe_nodes):
        position = _FLOAT_FC2 if node.op_type == "MoE" else _FC2
        fc2 = model.tensors.get(node.inputs[position]) if len(node.inputs) > position else None
        if fc2 is not None and len(fc2.shape) == 3:
            shapes.append((layer, fc2.shape[0], fc2.shape[1]))
    return _native.prefetch_bytes(shapes, _native.PREFETCH_DEPTHS[prefetch])


def model_key(model: OnnxModel) -> bytes:
    """32 bytes that tell a model from all others, wherever it lies; `edgemoe.warm.model_key` says of what use.

    A hash of the .onnx file, of the sizes of the files beside it, and of the beginning of every node's experts.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    with model.path.open("rb") as file:
        digest.update(struct.pack("<Q", file.seek(0, os.SEEK_END)))
        file.seek(0)
        digest.update(file.read(_KEY_BYTES))
    for path in sorted({t.path for t in model.tensors.values() if t.path is not None}):
        digest.update(struct.pack("<Q", path.stat().st_size))
    for node in model.moe_nodes:
        fc1 = model.tensors.get(node.inputs[_FC1]) if len(node.inputs) > _FC1 else None
        if fc1 is not None and fc1.path is not None:
            with fc1.path.open("rb", buffering=0) as file:
                digest.update(os.pread(file.fileno(), min(fc1.n_bytes, _KEY_SAMPLE_BYTES), fc1.offset))
    return digest.digest()


def trace_header(model: OnnxModel, tensors: tuple[_native.OrtTensor, ...], run: trace.TracedRun) -> str:
    """What a trace of this model, run so, says about it.

    A trace has at most four slices of an expert, so scales and zero points, which are asked for together, are one.
    """
    layers = []
    for layer, group in itertools.groupby(sorted(tensors, key=lambda t: (t.layer, t.stage)), key=lambda t: t.layer):
        of_layer = list(group)
        bytes_of_stage: dict[int, int] = {}
        for t in of_layer:
            extent = _native.TensorExtent("", 0, layer, t.n_experts, t.n_experts_used, 0, t.expert_bytes, 0, 0, 0)
            n_bytes = int(_native.measure([extent], 0).bank_slot_bytes) // t.n_experts
            bytes_of_stage[t.stage] = bytes_of_stage.get(t.stage, 0) + n_bytes
        first = of_layer[0]
        layers.append(trace.TraceLayer(layer, first.n_experts, first.n_experts_used, tuple(bytes_of_stage.values())))
    files = {t.path for t in model.tensors.values() if t.path is not None} | {model.path}
    return trace.header_json(model.path.name, layers, sum(path.stat().st_size for path in files), run)


class Schedule:
    """What a session that has been loaded counts, records and remembers."""

    def __init__(self, model: OnnxModel, keywords: Keywords, loaded: _native.OrtLoaded) -> None:
        """
        Raises:
            BackendError: choices are to be changed where there is no node whose choices are ours.
        """
        if keywords.is_lossy and loaded.runtime is None:
            raise BackendError(
                f"cannot change routing: no MoE node of {model.path} is streamed; use reuse_bias='off', "
                "expert_top_k='off' and on_miss='wait'"
            )
        self._model = model
        self._keywords = keywords
        self._loaded = loaded
        self._warm: warm.WarmStart | None = None
        self._save: Callable[[], object] | None = None
        self._lock = threading.Lock()
        self._n_warm_tokens = 0

    def begin_warm(self, owner: object) -> None:
        """Read what was hot in the session before ahead, and remember what is hot when `owner` is gone."""
        runtime = self._loaded.runtime
        if not self._keywords.warm_start or runtime is None or not self._loaded.tensors:
            return
        tensors = self._loaded.tensors
        bank = warm.Bank(
            self._model.path,
            tuple((t.layer, t.n_experts) for t in tensors),
            max(t.n_experts_used for t in tensors),
            lambda: model_key(self._model),
        )
        self._warm = warm.WarmStart(bank, runtime)
        self._warm.begin()
        self._save = weakref.finalize(owner, self._warm.save)

    def end_warm(self) -> None:
        """Remember what is hot now; the owner may live on without its runtime."""
        if self._save is not None:
            self._save()

    def after_run(self) -> None:
        """Note that the session has run."""
        if self._warm is None or self._loaded.counting is None:
            return
        with self._lock:
            n_tokens = self._loaded.counting.read().n_tokens
            n_new, self._n_warm_tokens = n_tokens - self._n_warm_tokens, n_tokens
            if n_new > 0:
                self._warm.on_tokens(n_new)

    def stats(self) -> dict[str, Any]:
        """The fields of `OnnxStats` that are about it."""
        found: dict[str, Any] = {"n_predicted_nodes": self._loaded.n_routers if self._keywords.prefetch != "off" else 0}
        runtime, counting = self._loaded.runtime, self._loaded.counting
        if runtime is None or counting is None:
            return found
        prefetched, counters, keywords = runtime.prefetch_stats(), counting.read(), self._keywords
        found |= {
            "n_tokens": counters.n_tokens,
            "bytes_per_token": runtime.stats().bytes_read / counters.n_tokens if counters.n_tokens else 0.0,
            **prefetch_fields(prefetched),
            "prefetch_depth": prefetched.depth,
            "predicted": prefetched.predicted,
            "predicted_right": prefetched.predicted_right,
        }
        if not keywords.is_lossy:
            return found
        price = selection.price(
            None if keywords.expert_top_k == "off" else counters.count,
            None if keywords.reuse_bias == "off" else counters.reuse,
            None if keywords.on_miss == "wait" else counters.miss,
        )
        price.pop("lowbit_hits", None)  # there are no copies
        return found | price

    def reset_stats(self) -> None:
        """Start the counters again; what a guard has learned stays."""
        if self._loaded.runtime is not None:
            self._loaded.runtime.reset_stats()
        if self._loaded.counting is not None:
            with self._lock:
                self._loaded.counting.reset()
                self._n_warm_tokens = 0

    @contextlib.contextmanager
    def record_trace(self, path: str | Path) -> Iterator[Callable[[], None]]:
        """As `Llama.record_trace`.

        Raises:
            TraceError: see there.
        """
        native = self._loaded.runtime
        if native is None:
            raise TraceError(f"cannot record a trace: no MoE node of {self._model.path} is streamed")
        slots_bytes, keywords = int(native.stats().slots_bytes), self._keywords
        run = trace.TracedRun(slots_bytes, keywords.eviction, keywords.prefetch, host.N_IO_THREADS)
        with _native.recorded_trace(native, Path(path), trace_header(self._model, self._loaded.tensors, run)) as check:
            yield check
