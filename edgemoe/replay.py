# SPDX-License-Identifier: MIT
"""What a trace would have cost: the real cache over a simulated disk, beside the best that any cache could do."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe import _native
from edgemoe.trace import N_DISTANCES, Trace

RECALL = 0.886
"""Of the experts of a layer, how many are foreseen where a trace does not say: what the next layer's router reaches on
Qwen3-30B-A3B's present state (BigMoeOnEdge PR#101)."""

POLICIES = ("auto", "lru", "lfu", "least-stale", "utility", "belady")
"""What `replay` can evict by: the runtime's rules, and the one that knows the future."""

WEIGHT_BYTES_PER_S = 26e9
"""Speed of computing, in bytes of experts per second: OLMoE-shaped Q4_K decodes at 33.8 tokens/s when resident, 432 MiB
of experts in each token, on which three fifths of the time are taken to go: an estimate, no profile (2 cores, AVX-512;
benchmarks/results/amd-epyc-2cpu/2026-11-22-larger_than_memory-own-kernels.json)."""


@dataclasses.dataclass(frozen=True)
class Disk:
    """A simulated disk.

    The defaults are docs/experiments.md's reads of 1 MiB with 1 and 4 threads, 793 and 954 MiB/s: at full speed 1 MiB
    takes 1048 us, and 1261 us if nothing overlaps its latency.

    Attributes:
        bytes_per_s: of all reads together.
        latency_us: of a read, before its bytes flow; those of several reads overlap.
        n_readers: reads under way at once.
        jitter: each read takes 1 - jitter to 1 + jitter times as long.
        change_token, change_factor: from that token on the disk is so many times as fast; None for never.
    """

    bytes_per_s: float = 954.0 * (1 << 20)
    latency_us: float = 213.0
    n_readers: int = 4
    jitter: float = 0.0
    change_token: int | None = None
    change_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Compute:
    """How long computing takes.

    Attributes:
        dense_us: all but the routed experts, for one layer and token. The default is the rest of what
            `WEIGHT_BYTES_PER_S` was measured on: 29.6 ms per token less its experts, over 16 layers.
        expert_us: one expert and token; None for its bytes at `WEIGHT_BYTES_PER_S`.
        batch_us: behind the layers of a batch: head, sampling, host. 0 in the default, which has it in `dense_us`.
        hold_up_us_per_mib: by how much reading a MiB holds computing up: reader threads take a part of the cores, and
            threads that wait are woken.
        row_share: what each further token of a batch costs, in shares of the first. The default: resident prefill of
            256 tokens took 1.91 s, as long as 55 decoded ones (the file named there, without own kernels).
    """

    dense_us: float = 760.0
    expert_us: float | None = None
    row_share: float = 0.21
    batch_us: float = 0.0
    hold_up_us_per_mib: float = 0.0


@dataclasses.dataclass(frozen=True)
class Phase:
    """Counts and times of a part of a replay.

    Attributes:
        n_tokens: tokens in it.
        hits, misses, late_hits: experts found resident, absent and loading; each distinct one of a batch counts once.
        slices, reads: projections of experts used, likewise, and read.
        bytes_read: from the disk.
        stall_us: in which computing waited for the disk.
        total_us: all of it.
    """

    n_tokens: int
    hits: int
    misses: int
    late_hits: int
    slices: int
    reads: int
    bytes_read: int
    stall_us: float
    total_us: float

    @property
    def hit_rate(self) -> float:
        """Share of experts found resident; 1 when none was used."""
        n_experts = self.hits + self.misses + self.late_hits
        return self.hits / n_experts if n_experts else 1.0

    @property
    def tokens_per_s(self) -> float:
        """Predicted rate; 0 of an empty phase."""
        return 1e6 * self.n_tokens / self.total_us if self.total_us > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class ReplayResult:
    """What a replay found.

    Attributes:
        policy: the rule of eviction.
        slots_bytes, n_slots: memory for experts that was really taken.
        all: the whole trace.
        decode: its batches of one token.
        evictions: slices that gave up their slot.
        prefetch_used_bytes, prefetch_late_bytes, prefetch_wasted_bytes: read for a prediction, and resident when first
            used, still being read then, or evicted unused.
        bound_reads, bound_bytes: the fewest with which these slots can serve the whole trace (Belady).
        batch_us: float64 [n_batches], how long each batch took.
        depths: int32 [n_batches], layers read ahead in it.
    """

    policy: str
    slots_bytes: int
    n_slots: int
    all: Phase
    decode: Phase
    evictions: int
    prefetch_used_bytes: int
    prefetch_late_bytes: int
    prefetch_wasted_bytes: int
    bound_reads: int
    bound_bytes: int
    batch_us: npt.NDArray[np.float64]
    depths: npt.NDArray[np.int32]

    @property
    def bound_hit_rate(self) -> float:
        """The highest share of slices that can be found resident, over the whole trace."""
        return 1.0 - self.bound_reads / self.all.slices if self.all.slices else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, without what belongs to single batches."""
        fields = dataclasses.asdict(self)
        del fields["batch_us"], fields["depths"]
        for name in ("all", "decode"):
            phase: Phase = getattr(self, name)
            fields[name].update(hit_rate=phase.hit_rate, tokens_per_s=phase.tokens_per_s)
        return dict(fields, bound_hit_rate=self.bound_hit_rate)


def bank_bytes(trace: Trace) -> int:
    """Bytes of slots that hold every expert of the traced model."""
    return sum(layer.n_experts * sum(layer.slice_bytes) for layer in trace.layers)


def cycle_bytes(trace: Trace) -> int:
    """Bytes of slots that hold the experts of one token."""
    return sum(layer.n_used * sum(layer.slice_bytes) for layer in trace.layers)


def expert_us(trace: Trace) -> float:
    """`Compute.expert_us` where it is None: the mean expert's bytes at `WEIGHT_BYTES_PER_S`."""
    return bank_bytes(trace) / sum(layer.n_experts for layer in trace.layers) / WEIGHT_BYTES_PER_S * 1e6


def token_us(trace: Trace, compute: Compute) -> float:
    """Computing of a token by itself, with nothing to read."""
    of_expert_us = expert_us(trace) if compute.expert_us is None else compute.expert_us
    n_used = sum(layer.n_used for layer in trace.layers)
    return len(trace.layers) * compute.dense_us + n_used * of_expert_us + compute.batch_us


def foreseen_recall(trace: Trace) -> float | None:
    """Of the experts chosen by tokens evaluated alone, how many had been foreseen one layer ahead; None: unknown."""
    if trace.foreseen is None:
        return None
    batches, first, n_tokens = np.unique(trace.batch_of_token, return_index=True, return_counts=True)
    foreseen = trace.foreseen[batches[n_tokens == 1], :, 0]
    chosen = trace.experts[first[n_tokens == 1]]
    is_right = (chosen[..., None] == foreseen[..., None, :]).any(axis=-1)
    is_asked = (chosen >= 0) & (foreseen[..., :1] >= 0)
    return float(is_right[is_asked].mean()) if is_asked.any() else None


def replay(
    trace: Trace,
    *,
    slots_bytes: int,
    eviction: str = "auto",
    prefetch: str = "off",
    recall: float | None = None,
    seed: int = 0,
    disk: Disk | None = None,
    compute: Compute | None = None,
) -> ReplayResult:
    """Walk the runtime's cache through a trace, in the order in which layers ask it, with a clock that is computed.

    Args:
        slots_bytes: memory for experts. A trace does not know the dense part of its model.
        eviction: one of `POLICIES`.
        prefetch: `off`, `1` or `2` layers ahead, or `auto` as the runtime's controller finds.
        recall: with this chance each expert of a predicted layer is predicted, else a wrong one. None: the trace's own
            predictions, which depend on the text alone, and where it has none, drawn with its recall or `RECALL`.
        seed: of predictions and jitter. The same arguments give the same result.

    Raises:
        ValueError: `eviction` or `prefetch` is unknown.
        BudgetError: fewer than two slots of a size.
        BackendError: the trace is inconsistent, or a number has no meaning.
    """
    if eviction not in _native.REPLAY_POLICIES:
        raise ValueError(f"unknown eviction {eviction!r}: expected one of {', '.join(_native.REPLAY_POLICIES)}")
    _native.check_prefetch(prefetch)
    disk, compute = disk or Disk(), compute or Compute()
    options = _native.ReplayOptions()
    options.policy = _native.REPLAY_POLICIES[eviction]
    options.slots_bytes = max(0, slots_bytes)
    options.disk_bytes_per_s = disk.bytes_per_s
    options.latency_us = disk.latency_us
    options.n_readers = disk.n_readers
    options.jitter = disk.jitter
    options.change_token = -1 if disk.change_token is None else disk.change_token
    options.change_factor = disk.change_factor
    options.dense_us = compute.dense_us
    options.expert_us = expert_us(trace) if compute.expert_us is None else compute.expert_us
    options.row_share = compute.row_share
    options.batch_us = compute.batch_us
    options.hold_up_us_per_mib = compute.hold_up_us_per_mib
    options.recall = (foreseen_recall(trace) or RECALL) if recall is None else recall
    options.seed = seed
    options.prefetch_depth = _native.PREFETCH_DEPTHS[prefetch]
    options.adaptive = int(prefetch == "auto")
    foreseen = trace.foreseen
    if foreseen is None or recall is not None:
        foreseen = np.empty((trace.n_batches, len(trace.layers), N_DISTANCES, 0), np.int16)
    batch_us = np.zeros(trace.n_batches, np.float64)
    depths = np.zeros(trace.n_batches, np.int32)
    native = _native.replay(
        [(layer.n_experts, layer.n_used, list(layer.slice_bytes)) for layer in trace.layers],
        np.ascontiguousarray(trace.batch_of_token, np.int32),
        np.ascontiguousarray(trace.experts, np.int16),
        np.ascontiguousarray(foreseen, np.int16),
        options,
        batch_us,
        depths,
    )
    return ReplayResult(
        policy=eviction,
        slots_bytes=native.slots_bytes,
        n_slots=native.n_slots,
        all=_phase(native.all),
        decode=_phase(native.decode),
        evictions=native.evictions,
        prefetch_used_bytes=native.prefetch.used_bytes,
        prefetch_late_bytes=native.prefetch.late_bytes,
        prefetch_wasted_bytes=native.prefetch.wasted_bytes,
        bound_reads=native.bound_reads,
        bound_bytes=native.bound_bytes,
        batch_us=batch_us,
        depths=depths,
    )


def _phase(native: _native.ReplayPhase) -> Phase:
    return Phase(**{f.name: getattr(native, f.name) for f in dataclasses.fields(Phase)})
