# SPDX-License-Identifier: MIT
"""`onnxruntime.InferenceSession` with a memory budget: experts of MoE nodes are streamed from the model's file.

ONNX Runtime is used as it is; our execution provider is a plug-in that it loads. See docs/onnx.md.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from edgemoe import _native, host, onnx_schedule, topology
from edgemoe import on_miss as misses
from edgemoe.budget import MemoryBudget
from edgemoe.counters import expert_fields
from edgemoe.errors import BackendError, ModelFormatError
from edgemoe.formats.onnx_model import read_model
from edgemoe.onnx_memory import SessionMemory
from edgemoe.onnx_plan import plan

try:
    import onnxruntime
except ImportError as error:
    raise BackendError(f"cannot import onnxruntime: {error}; pip install 'edgemoe[onnx]'") from error

PROVIDER = "EdgeMoEExecutionProvider"
_OPTION_PREFIX = f"ep.{PROVIDER.lower()}."


@dataclasses.dataclass(frozen=True)
class OnnxStats:
    """Counters since the session was made.

    Attributes:
        expert_hits, expert_misses, expert_late_hits: experts found resident, absent, or still loading when a node asked
            for them.
        expert_bytes_read: bytes of experts read from storage, whole pages.
        stall_s: seconds that computing waited for storage with nothing else to do.
        n_tokens: rows of the first streamed node's input.
        bytes_per_token: expert_bytes_read for each of them.
        n_predicted_nodes: nodes whose routers were found in the graph, so that their experts are predicted; see
            docs/onnx.md.
        predicted, predicted_right: experts predicted of the next node, and how many of them it then chose.
        prefetch_used_bytes, prefetch_late_bytes, prefetch_wasted_bytes: read because of a prediction, and resident when
            first used, or still being read then, or evicted unused.
        prefetch_depth: nodes ahead that are predicted now.
        reuse_bias, selections_changed, gate_mass_moved, kl_estimate, skipped_experts: what lossy keywords do and cost,
            as in `edgemoe.Stats`.
        n_slots, slots_bytes: tensors of experts that fit in the slots, and the memory set aside for them.
        n_streamed_nodes: MoE nodes whose experts are streamed.
        n_other_moe_nodes: MoE nodes that ONNX Runtime computes itself, all experts in memory.
        budget_bytes: the memory budget in force; 0 without one.
        peak_rss_bytes: largest resident set of this process so far.
    """

    expert_hits: int
    expert_misses: int
    expert_late_hits: int
    expert_bytes_read: int
    stall_s: float
    n_slots: int
    slots_bytes: int
    n_streamed_nodes: int
    n_other_moe_nodes: int
    budget_bytes: int
    peak_rss_bytes: int
    n_tokens: int = 0
    bytes_per_token: float = 0.0
    n_predicted_nodes: int = 0
    predicted: int = 0
    predicted_right: int = 0
    prefetch_used_bytes: int = 0
    prefetch_late_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    prefetch_depth: int = 0
    reuse_bias: float = 0.0
    selections_changed: float = 0.0
    gate_mass_moved: float = 0.0
    kl_estimate: float = 0.0
    skipped_experts: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)


def _has_plugin_providers() -> bool:
    """Since onnxruntime 1.23. Without them our custom operators take the place of the built-in ones."""
    return hasattr(onnxruntime, "register_execution_provider_library")


@functools.cache
def _register() -> None:
    _native.register_ort_plugin(onnxruntime.register_execution_provider_library)


def _devices(provider: str) -> list[Any]:
    return [d for d in onnxruntime.get_ep_devices() if d.ep_name == provider]


class InferenceSession(onnxruntime.InferenceSession):  # type: ignore[misc]  # onnxruntime has no types
    """`onnxruntime.InferenceSession` whose QMoE and MoE experts live in a memory budget.

    Everything that takes an `onnxruntime.InferenceSession` takes this one. Where onnxruntime has no plug-in execution
    providers (1.18 to 1.22), custom operators do the same.

    Args:
        path: the .onnx file; its experts lie in external data beside it.
        memory: budget of the whole process ("1.5GiB", or bytes), or a `MemoryBudget` that several models share.
            None: 90 % of what is available, and no more than the model can use.
        sess_options: options of the session; they are this session's from now on, as our provider is added to them.
        providers: other execution providers for the rest of the graph, by name, the preferred one first.
        eviction, prefetch, warm_start: as for `edgemoe.Llama`; none changes a result.
        reuse_bias, reuse_method, top_j, expert_top_k, on_miss, on_miss_mass: as for `edgemoe.Llama`, but for what needs
            a measured price or low-bit copies. They change results, of nodes that are given one row: see docs/onnx.md.

    Raises:
        ValueError: a keyword makes no sense, or is not for ONNX models.
        ModelFormatError: the file or its external data is missing, truncated or corrupt, or the model is bytes.
        BudgetError: the budget is below the floor, which the message names.
        BackendError: onnxruntime is too old, refuses the model, or a MoE node cannot be streamed and `memory` is given;
            the message names the attribute or input that is not implemented. Or its choices cannot be changed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        memory: int | float | str | MemoryBudget | None = None,
        sess_options: onnxruntime.SessionOptions | None = None,
        providers: Sequence[str] | None = None,
        *,
        eviction: str = "auto",
        prefetch: str = "auto",
        warm_start: bool = True,
        reuse_bias: str | float = "off",
        reuse_method: str = "cache-prior",
        top_j: int | None = None,
        expert_top_k: str | int = "off",
        on_miss: str = "wait",
        on_miss_mass: float = misses.DEFAULT_MASS,
    ) -> None:
        keywords = onnx_schedule.Keywords(
            eviction, prefetch, warm_start, reuse_bias, reuse_method, top_j, expert_top_k, on_miss, on_miss_mass
        )
        keywords.check()
        if isinstance(path, (bytes, bytearray, memoryview)):
            raise ModelFormatError(
                f"cannot stream a model given as {len(path)} bytes: its experts cannot be located; give the file's path"
            )
        self._runtime: _native.Runtime | None = None
        model = read_model(Path(path))
        options = sess_options
        if options is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # 2 warns of every model that not all nodes are ours
        n_threads = options.intra_op_num_threads or topology.default_threads()
        options.intra_op_num_threads = n_threads
        self.plan = plan(model, prefetch=prefetch)
        self._memory = SessionMemory(model, self.plan, memory, Path(path).name)
        try:
            ours = keywords.provider_options(self._memory.slots_bytes, n_threads, is_strict=memory is not None)
            if _has_plugin_providers():
                self._add_providers(options, providers or (), ours)
                self._make(path, options, None)
            else:
                self._add_operators(options, {**ours, "model_path": str(path)})
                self._make(path, options, [*(providers or ()), "CPUExecutionProvider"])
            self._schedule = onnx_schedule.Schedule(model, keywords, self._loaded)
            self._schedule.begin_warm(self)
        except BaseException:
            self._memory.close()
            raise
        if self._loaded.n_refused and memory is None:
            warnings.warn(onnx_schedule.refusal(self._loaded), stacklevel=2)

    def _make(self, path: str | os.PathLike[str], options: Any, names: list[str] | None) -> None:
        try:
            # At an error onnxruntime would otherwise make a session without our provider, all experts in memory.
            super().__init__(str(path), sess_options=options, providers=names, enable_fallback=0)
        except Exception as error:
            _native.take_ort_loaded()  # release what was opened before the failure
            raise BackendError(f"ONNX Runtime cannot load the model: {error} ({path})") from error
        self._loaded = _native.take_ort_loaded()
        self._runtime = self._loaded.runtime
        self._memory.loaded(self._loaded)

    @staticmethod
    def _add_providers(options: Any, providers: Sequence[str], ours: dict[str, str]) -> None:
        _register()
        options.add_provider_for_devices(_devices(PROVIDER)[:1], ours)
        for name in providers:
            if name in (PROVIDER, "CPUExecutionProvider"):
                continue  # ours is there; the CPU's is always the last
            devices = _devices(name)
            if not devices:
                known = sorted({d.ep_name for d in onnxruntime.get_ep_devices()})
                raise BackendError(f"no device for the execution provider {name}: expected one of {', '.join(known)}")
            options.add_provider_for_devices(devices[:1], {})

    @staticmethod
    def _add_operators(options: Any, ours: dict[str, str]) -> None:
        for key, value in ours.items():
            options.add_session_config_entry(_OPTION_PREFIX + key, value)
        try:
            options.register_custom_ops_library(str(_native.ort_plugin_path()))
        except Exception as error:
            raise BackendError(f"ONNX Runtime refused our custom operators: {error}") from error

    def set_memory(self, memory: int | float | str) -> None:
        """Change the budget of the process; experts that no longer fit are dropped, the coldest first.

        Raises:
            BudgetError: it is below what the session needs, which the message names, or a `MemoryBudget` is shared;
                nothing is changed.
        """
        self._memory.set_memory(memory)

    def _watched(self, run: Callable[[], Any], n_input_bytes: int | None) -> Any:
        try:
            outputs = run()
        except ValueError:  # of the arguments
            raise
        except Exception as error:
            if self._runtime is not None:
                _native.raise_error(self._runtime)
            raise BackendError(f"ONNX Runtime cannot run the model: {error}") from error
        self._memory.after_run(n_input_bytes)
        self._schedule.after_run()
        return outputs

    def run(self, output_names: Any, input_feed: dict[str, Any], run_options: Any = None) -> Any:
        """As `onnxruntime.InferenceSession.run`.

        Raises:
            ExpertReadError: an expert could not be read from storage.
            BackendError: ONNX Runtime or an execution provider failed.
        """
        n_bytes = sum(getattr(v, "nbytes", 0) for v in input_feed.values())
        return self._watched(lambda: super(InferenceSession, self).run(output_names, input_feed, run_options), n_bytes)

    def run_with_ort_values(self, output_names: Any, input_dict_ort_values: Any, run_options: Any = None) -> Any:
        """As `onnxruntime.InferenceSession.run_with_ort_values`; raises as `run`."""
        return self._watched(
            lambda: super(InferenceSession, self).run_with_ort_values(output_names, input_dict_ort_values, run_options),
            None,
        )

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:
        """As `onnxruntime.InferenceSession.run_with_iobinding`; raises as `run`."""
        self._watched(lambda: super(InferenceSession, self).run_with_iobinding(iobinding, run_options), None)

    def stats(self) -> OnnxStats:
        """Counters since the session was made."""
        experts = self._runtime.stats() if self._runtime is not None else None
        return OnnxStats(
            **expert_fields(experts),
            n_streamed_nodes=self._loaded.n_layers,
            n_other_moe_nodes=self._loaded.n_refused,
            budget_bytes=self._memory.budget_bytes,
            peak_rss_bytes=host.peak_rss_bytes(),
            **self._schedule.stats(),
        )

    def reset_stats(self) -> None:
        """Start the counters again; peak memory stays."""
        self._memory.before_reset()
        self._schedule.reset_stats()

    def record_trace(self, path: str | os.PathLike[str]) -> AbstractContextManager[Callable[[], None]]:
        """Record which experts every node chooses, waits for and reads, while the context lasts: `Llama.record_trace`.

        An input whose activations go through a node in pieces (docs/onnx.md) is a batch for each node and piece.

        Raises:
            TraceError: no node is streamed, the file cannot be written, storage is slower than records are made, or a
                trace is being recorded.
        """
        return self._schedule.record_trace(Path(path))
