# SPDX-License-Identifier: MIT
"""`onnxruntime.InferenceSession` with a memory budget: the experts of QMoE nodes are streamed from the model's file.

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
from edgemoe.errors import BackendError, BudgetError, ModelFormatError
from edgemoe.formats.onnx_model import OnnxModel, OnnxMoeNode, read_model
from edgemoe.runtime import N_IO_THREADS
from edgemoe.sizes import format_size, parse_size

try:
    import onnxruntime
except ImportError as error:
    raise BackendError(f"cannot import onnxruntime: {error}; pip install 'edgemoe[onnx]'") from error

PROVIDER = "EdgeMoEExecutionProvider"
_OPTION_PREFIX = f"ep.{PROVIDER.lower()}."
# Positions of QMoE's inputs: weights of fc1 and fc2; scales and zero points, streamed where they are blockwise.
_WEIGHTS, _SIDES = (2, 5), (3, 6, 11, 12)
# Activations that the plug-in computes at once; kernels/plugins/onnxruntime/qmoe_model.cc, kActivationBytes.
_ACTIVATION_BYTES = 16 << 20
# What a session takes beside its weights: 10 MiB with onnxruntime 1.32.0 on x86-64, for the first one of a process.
_SESSION_BYTES = 16 << 20


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


@dataclasses.dataclass(frozen=True)
class OnnxPlan:
    """Where the bytes of a budget go, by the model's file alone; made before anything is loaded.

    Attributes:
        process_bytes: what this process holds already.
        dense_bytes: all tensors that are not streamed.
        workspace_bytes: the most that the plug-in takes beside its slots, predictions among it.
        prefetch_bytes: of that, what predictions take.
        token_cycle_bytes: slots for the experts of one token.
        expert_bank_bytes: slots for all experts.
    """

    process_bytes: int
    dense_bytes: int
    workspace_bytes: int
    token_cycle_bytes: int
    expert_bank_bytes: int
    prefetch_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        """All but slots and slack."""
        return self.process_bytes + _SESSION_BYTES + self.dense_bytes + self.workspace_bytes

    @property
    def floor_bytes(self) -> int:
        """The smallest budget that runs."""
        return int((self.fixed_bytes + self.token_cycle_bytes + host.SLACK_BYTES) / (1 - host.SLACK_SHARE)) + 1


def _streamed(model: OnnxModel, node: OnnxMoeNode) -> dict[int, str]:
    """Position and name of the inputs that the plug-in streams, if it claims the node."""
    found = {}
    for position in (*_WEIGHTS, *_SIDES):
        name = node.inputs[position] if position < len(node.inputs) else ""
        tensor = model.tensors.get(name)
        if tensor is None or tensor.path is None or len(tensor.shape) != 3:
            continue
        if position in _SIDES:
            weights = model.tensors.get(node.inputs[_WEIGHTS[position in (6, 12)]])
            scales = model.tensors.get(node.inputs[(3, 6)[position in (6, 12)]])
            if weights is None or scales is None or len(scales.shape) != 3 or scales.shape[2] < 2:
                continue  # one scale for a row: too small to be worth reads of its own
        found[position] = name
    return found


def plan(model: OnnxModel, n_threads: int, prefetch: str = "auto") -> OnnxPlan:
    """Add up what a session takes."""
    prefetch_bytes = onnx_schedule.prefetch_bytes(model, prefetch)
    streamed_names: set[str] = set()
    extents: list[_native.TensorExtent] = []
    sides = dict.fromkeys(_SIDES, 0)
    activations = columns = 0
    for layer, node in enumerate(model.moe_nodes):
        for position, name in _streamed(model, node).items():
            t = model.tensors[name]
            n_experts = t.shape[0]
            if n_experts < 1 or t.n_bytes < 1:
                raise ModelFormatError(f"tensor {name} of node {node.name} has no experts: shape {list(t.shape)}")
            n_used = min(max(1, node.ints.get("k", 1)), n_experts)
            streamed_names.add(name)
            extents.append(
                _native.TensorExtent(
                    f"{layer}.{name}", 0, layer, n_experts, n_used, t.offset, t.n_bytes // n_experts, 0, 0, 0
                )
            )
            if position in _SIDES:
                sides[position] = max(sides[position], t.n_bytes)
            elif position == _WEIGHTS[0]:
                columns = max(columns, 2 * t.shape[2])
            else:
                columns = max(columns, t.shape[1], 2 * t.shape[2])
                activations = _ACTIVATION_BYTES
    sizes = _native.measure(extents, 0) if extents else None
    return OnnxPlan(
        process_bytes=host.process_rss_bytes(),
        dense_bytes=sum(t.n_bytes for name, t in model.tensors.items() if name not in streamed_names),
        workspace_bytes=activations + sum(sides.values()) + n_threads * columns * 4 + prefetch_bytes,
        token_cycle_bytes=sizes.cycle_slot_bytes if sizes else 0,
        expert_bank_bytes=sizes.bank_slot_bytes if sizes else 0,
        prefetch_bytes=prefetch_bytes,
    )


@functools.cache
def _register() -> None:
    path = _native.ort_plugin_path()
    try:
        onnxruntime.register_execution_provider_library("edgemoe", str(path))
    except Exception as error:
        raise BackendError(f"ONNX Runtime refused the plug-in: {error} ({path})") from error


def _devices(provider: str) -> list[Any]:
    return [d for d in onnxruntime.get_ep_devices() if d.ep_name == provider]


class InferenceSession(onnxruntime.InferenceSession):  # type: ignore[misc]  # onnxruntime has no types
    """`onnxruntime.InferenceSession` whose QMoE experts live in a memory budget.

    Everything that takes an `onnxruntime.InferenceSession` takes this one.

    Args:
        path: the .onnx file; its experts lie in external data beside it.
        memory: budget of the whole process ("1.5GiB", or bytes). None: 90 % of what is available, and no more than the
            model can use.
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
        memory: int | float | str | None = None,
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
        budget_bytes = None if memory is None else parse_size(memory)
        model = read_model(Path(path))
        options = sess_options
        if options is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # 2 warns of every model that not all nodes are ours
        n_threads = options.intra_op_num_threads or topology.default_threads()
        options.intra_op_num_threads = n_threads
        _register()
        planned = plan(model, n_threads, prefetch)
        self.plan = planned
        self._cycle_bytes = planned.token_cycle_bytes
        self._bank_bytes = planned.expert_bank_bytes
        self._budget_bytes = 0
        slots_bytes = self._first_slots_bytes(planned, budget_bytes)
        ours = keywords.provider_options() | {"slots_bytes": str(slots_bytes), "n_threads": str(n_threads)}
        self._add_providers(options, providers or (), ours, is_strict=budget_bytes is not None)
        try:
            # At an error onnxruntime would otherwise make a session without our provider, all experts in memory.
            super().__init__(str(path), sess_options=options, enable_fallback=0)
        except Exception as error:
            _native.take_ort_loaded()  # release what was opened before the failure
            raise BackendError(f"ONNX Runtime cannot load the model: {error} ({path})") from error
        loaded = _native.take_ort_loaded()
        self._runtime = loaded.runtime
        self._loaded = loaded
        self._largest_input_bytes = 0
        self._other_bytes = host.process_rss_bytes()
        self._workspace_bytes = loaded.workspace_bytes
        if loaded.n_refused and budget_bytes is None:
            warnings.warn(
                f"{loaded.n_refused} MoE nodes are not streamed, all their experts are in memory; {loaded.refusal}",
                stacklevel=2,
            )
        if budget_bytes is not None:
            self.set_memory(budget_bytes)
        self._schedule = onnx_schedule.Schedule(model, keywords, loaded)
        self._schedule.begin_warm(self)

    def _first_slots_bytes(self, planned: OnnxPlan, budget_bytes: int | None) -> int:
        if budget_bytes is None:
            slots = host.spare_bytes() - planned.dense_bytes - planned.workspace_bytes
            return min(self._bank_bytes, max(slots, self._cycle_bytes))
        if budget_bytes < planned.floor_bytes:
            raise BudgetError(
                f"memory {format_size(budget_bytes)} is below the floor of {format_size(planned.floor_bytes)}: this "
                f"process {format_size(planned.process_bytes)}, a session {format_size(_SESSION_BYTES)}, dense weights "
                f"{format_size(planned.dense_bytes)}, workspace {format_size(planned.workspace_bytes)}, the experts of "
                f"one token {format_size(planned.token_cycle_bytes)}, and slack; give at least {planned.floor_bytes} "
                "bytes"
            )
        slots = budget_bytes - planned.fixed_bytes - host.slack_bytes(budget_bytes)
        return min(self._bank_bytes, max(slots, self._cycle_bytes))

    @staticmethod
    def _add_providers(options: Any, providers: Sequence[str], ours: dict[str, str], is_strict: bool) -> None:
        always = {"strict": str(int(is_strict)), "n_io_threads": str(N_IO_THREADS), "publish": "1"}
        options.add_provider_for_devices(_devices(PROVIDER)[:1], ours | always)
        for name in providers:
            if name in (PROVIDER, "CPUExecutionProvider"):
                continue  # ours is there; the CPU's is always the last
            devices = _devices(name)
            if not devices:
                known = sorted({d.ep_name for d in onnxruntime.get_ep_devices()})
                raise BackendError(f"no device for the execution provider {name}: expected one of {', '.join(known)}")
            options.add_provider_for_devices(devices[:1], {})

    def _slots_for(self, budget_bytes: int) -> int:
        """Slots beside what the process holds now, or held at most since loading."""
        slots = budget_bytes - self._other_bytes - self._workspace_bytes - host.slack_bytes(budget_bytes)
        return min(slots, self._bank_bytes)

    def _measure_others(self) -> None:
        """What the process holds beside slots and workspace; the most so far counts, as arenas keep what they took."""
        runtime = self._runtime
        if runtime is None:
            return
        stats = runtime.stats()
        in_slots = min(stats.slots_bytes, stats.bytes_read)
        others = host.process_rss_bytes() - in_slots - (self._workspace_bytes if in_slots else 0)
        self._other_bytes = max(self._other_bytes, others)

    def set_memory(self, memory: int | float | str) -> None:
        """Change the budget of the process; experts that no longer fit are dropped, the coldest first.

        Raises:
            BudgetError: it is below what the session needs, which the message names; nothing is changed.
        """
        budget_bytes = parse_size(memory)
        if self._runtime is not None:
            self._measure_others()
            slots = self._slots_for(budget_bytes)
            if slots + host.TOLERANCE_BYTES < self._cycle_bytes:
                floor = budget_bytes - slots + self._cycle_bytes
                raise BudgetError(
                    f"memory {format_size(budget_bytes)} is below the floor of {format_size(floor)}: this process "
                    f"without experts {format_size(self._other_bytes)}, workspace "
                    f"{format_size(self._workspace_bytes)}, the experts of one token "
                    f"{format_size(self._cycle_bytes)}, and slack; give at least {floor} bytes"
                )
            _native.set_slots_bytes(self._runtime, max(slots, self._cycle_bytes))
        self._budget_bytes = budget_bytes

    def _refit(self, n_input_bytes: int | None) -> None:
        """After the largest input so far, or one of unknown size, give back slots for what arenas have grown by."""
        if self._runtime is None or not self._budget_bytes:
            return
        if n_input_bytes is not None:
            if n_input_bytes <= self._largest_input_bytes:
                return
            self._largest_input_bytes = n_input_bytes
        self._measure_others()
        slots = max(self._slots_for(self._budget_bytes), self._cycle_bytes)
        if slots + host.TOLERANCE_BYTES < self._runtime.stats().slots_bytes:
            _native.set_slots_bytes(self._runtime, slots)

    def _watched(self, run: Callable[[], Any], n_input_bytes: int | None) -> Any:
        try:
            outputs = run()
        except ValueError:  # of the arguments
            raise
        except Exception as error:
            if self._runtime is not None:
                _native.raise_error(self._runtime)
            raise BackendError(f"ONNX Runtime cannot run the model: {error}") from error
        self._refit(n_input_bytes)
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
            expert_hits=experts.hits if experts else 0,
            expert_misses=experts.misses if experts else 0,
            expert_late_hits=experts.late_hits if experts else 0,
            expert_bytes_read=experts.bytes_read if experts else 0,
            stall_s=experts.stall_ns / 1e9 if experts else 0.0,
            n_slots=experts.n_slots if experts else 0,
            slots_bytes=experts.slots_bytes if experts else 0,
            n_streamed_nodes=self._loaded.n_layers,
            n_other_moe_nodes=self._loaded.n_refused,
            budget_bytes=self._budget_bytes,
            peak_rss_bytes=host.peak_rss_bytes(),
            **self._schedule.stats(),
        )

    def reset_stats(self) -> None:
        """Start the counters again; peak memory stays."""
        self._schedule.reset_stats()

    def record_trace(self, path: str | os.PathLike[str]) -> AbstractContextManager[Callable[[], None]]:
        """Record which experts every node chooses, waits for and reads, while the context lasts: `Llama.record_trace`.

        An input whose activations go through a node in pieces (docs/onnx.md) is a batch for each node and piece.

        Raises:
            TraceError: no node is streamed, the file cannot be written, storage is slower than records are made, or a
                trace is being recorded.
        """
        return self._schedule.record_trace(Path(path))
