# SPDX-License-Identifier: MIT
"""Which change would help most, from what one profiled run measured.

Each advice is a rule with its numbers in the open: a part of the measured time, and the factor by which the change
would scale it. Factors of memory, eviction and prefetch come from replaying the run's own trace through the real cache
(`edgemoe.replay`); only ratios of two replays are used, so that what replay gets wrong in both cancels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from edgemoe import replay, topology
from edgemoe.formats.gguf import GgufModel
from edgemoe.sizes import format_size
from edgemoe.trace import Trace
from edgemoe.trace_summary import summarize

MEMORY_FACTOR = 1.5
DISK_FACTOR = 2.0
TARGET_BITS = 4.5
"""Bits per weight of Q4_K: 144 bytes for 256 weights (ggml-common.h, block_q4_K)."""
WORTH = 1.02
"""Gains below this are not worth a line: medians of five runs on a quiet machine differ by as much."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """One change.

    Attributes:
        change: what to do.
        because: the measurement that it follows from, and how.
        gain: predicted decode tokens/s divided by those measured.
        tokens_per_s: predicted.
    """

    change: str
    because: str
    gain: float
    tokens_per_s: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the rules look at; times are of one decoded token, in ms.

    Attributes:
        profile: `edgemoe.profile.Profile` as a dictionary, with the router's figures.
        parts_ms: time by part.
        bytes_per_token: bytes of experts read.
        slots_bytes, bank_bytes: memory for experts, and what all of them would take.
        bits_per_weight: of the experts in the file.
        disk_bytes_per_s: random reads as large as one expert's matrix.
        n_threads, n_cores: used; and fast physical cores that could be.
        kernels: who multiplies by experts, as in `Stats`.
        eviction, prefetch: as `edgemoe.Llama` was given them.
        trace: of the run.
    """

    profile: dict[str, Any]
    parts_ms: dict[str, float]
    bytes_per_token: float
    slots_bytes: int
    bank_bytes: int
    bits_per_weight: float
    disk_bytes_per_s: float
    n_threads: int
    n_cores: int
    kernels: str
    eviction: str
    prefetch: str
    trace: Trace

    @staticmethod
    def of(
        run: dict[str, Any], trace: Trace, model: GgufModel, options: dict[str, Any], disk_bytes_per_s: float
    ) -> Measured:
        """From a profiled run (`bench_child.run`) and its trace."""
        summary = summarize(decoded(trace))
        profile = {
            **run["profile"],
            "expert_overlap": summary.next_token_reuse,
            "router_entropy_bits": summary.router_entropy_bits,
            "load_imbalance": summary.load_imbalance,
            "load_imbalance_max": summary.load_imbalance_max,
            "n_traced_tokens": summary.tokens,
            "trace_problem": None,
        }
        decode = profile["decode"]
        names = ("router", "select", "wait", "experts", "dense", "sampling", "overhead")
        n_weights = sum(int(np.prod(t.shape)) for t in model.expert_tensors)
        return Measured(
            profile=profile,
            parts_ms={name: 1e3 * decode[f"{name}_s"] / max(decode["n_tokens"], 1) for name in names},
            bytes_per_token=profile["bytes_per_token"] or 0.0,
            slots_bytes=run["slots_bytes"],
            bank_bytes=replay.bank_bytes(trace),
            bits_per_weight=8 * model.expert_bank_bytes / n_weights,
            disk_bytes_per_s=disk_bytes_per_s,
            n_threads=run["n_threads"],
            n_cores=topology.default_threads(),
            kernels=run["kernels"],
            eviction=options.get("eviction", "auto"),
            prefetch=options.get("prefetch", "auto"),
            trace=trace,
        )

    @property
    def token_ms(self) -> float:
        """Of one decoded token."""
        return sum(self.parts_ms.values())

    def advice(self, change: str, because: str, saved_ms: float) -> Advice:
        """An advice that takes so much off each token."""
        token_ms = max(self.token_ms - saved_ms, 1e-6)
        return Advice(change, because, self.token_ms / token_ms, 1e3 / token_ms)


def decoded(trace: Trace) -> Trace:
    """The tokens of a trace that were evaluated one at a time."""
    is_decode = np.bincount(trace.batch_of_token, minlength=trace.n_batches) == 1
    tokens = is_decode[trace.batch_of_token]
    return dataclasses.replace(
        trace,
        batch_of_token=np.arange(int(tokens.sum()), dtype=np.int32),
        experts=trace.experts[tokens],
        weights=trace.weights[tokens],
        begin_us=trace.begin_us[is_decode],
        wait_us=trace.wait_us[is_decode],
        read_bytes=trace.read_bytes[is_decode],
        resident=None if trace.resident is None else trace.resident[is_decode],
    )


def advise(measured: Measured) -> list[Advice]:
    """What would help by `WORTH` or more, the most helpful first."""
    found = [*_memory(measured), *_disk(measured), *_policies(measured), *_bits(measured), *_threads(measured)]
    return sorted((one for one in found if one.gain >= WORTH), key=lambda one: -one.gain)


def _replay(m: Measured, slots_bytes: int, eviction: str, prefetch: str) -> replay.Phase:
    """The decoded part of this run with other memory or rules, on this disk and with this machine's computing."""
    n_layers = len(m.trace.layers)
    n_used = sum(layer.n_used for layer in m.trace.layers)
    others_ms = m.token_ms - m.parts_ms["wait"] - m.parts_ms["experts"]
    compute = replay.Compute(
        dense_us=1e3 * others_ms / n_layers,
        expert_us=max(1e3 * m.parts_ms["experts"] / n_used, 1e-3),
    )
    disk = replay.Disk(bytes_per_s=m.disk_bytes_per_s)
    return replay.replay(
        m.trace, slots_bytes=slots_bytes, eviction=eviction, prefetch=prefetch, disk=disk, compute=compute
    ).decode


def _memory(m: Measured) -> list[Advice]:
    slots_bytes = min(int(m.slots_bytes * MEMORY_FACTOR), m.bank_bytes)
    if m.slots_bytes >= m.bank_bytes or not m.bytes_per_token:
        return []
    now = _replay(m, m.slots_bytes, m.eviction, "off")
    then = _replay(m, slots_bytes, m.eviction, "off")
    if not now.bytes_read:
        return []
    share = min(then.bytes_read / now.bytes_read, 1.0)
    more = format_size(slots_bytes - m.slots_bytes)
    wait_ms = m.parts_ms["wait"]
    return [
        m.advice(
            f"{more} more memory (--memory), {slots_bytes / m.bank_bytes:.0%} of the experts in it",
            f"this run's choices would read {share:.0%} of the {format_size(int(m.bytes_per_token))} per token; "
            f"waiting for them takes {wait_ms:.2f} of {m.token_ms:.2f} ms",
            wait_ms * (1 - share),
        )
    ]


def _disk(m: Measured) -> list[Advice]:
    wait_ms = m.parts_ms["wait"]
    mib_per_s = m.disk_bytes_per_s / 2**20
    return [
        m.advice(
            f"a disk {DISK_FACTOR:.0f} x as fast as this one ({mib_per_s:.0f} MiB/s)",
            f"waiting for storage takes {wait_ms:.2f} of {m.token_ms:.2f} ms, and would take half",
            wait_ms * (1 - 1 / DISK_FACTOR),
        )
    ]


def _policies(m: Measured) -> list[Advice]:
    """Another rule of eviction; prefetch where it is off."""
    wait_ms = m.parts_ms["wait"]
    if m.slots_bytes >= m.bank_bytes or not wait_ms:
        return []
    now = _replay(m, m.slots_bytes, m.eviction, "off")
    if not now.stall_us:
        return []
    found = []
    rules = {rule: _replay(m, m.slots_bytes, rule, "off").stall_us for rule in replay.POLICIES if rule != "belady"}
    best = min(rules, key=lambda rule: rules[rule])
    if rules[best] < now.stall_us:
        share = rules[best] / now.stall_us
        found.append(
            m.advice(
                f"--eviction {best}",
                f"replayed with it, this run waits {share:.0%} as long as with {m.eviction}",
                wait_ms * (1 - share),
            )
        )
    if m.prefetch == "off":
        share = min(_replay(m, m.slots_bytes, m.eviction, "auto").stall_us / now.stall_us, 1.0)
        found.append(
            m.advice(
                "--prefetch auto",
                f"replayed with it, this run waits {share:.0%} as long as without, if routers predict as well as "
                "Qwen3's",
                wait_ms * (1 - share),
            )
        )
    return found


def _bits(m: Measured) -> list[Advice]:
    if m.bits_per_weight <= 1.1 * TARGET_BITS:
        return []
    ratio = TARGET_BITS / m.bits_per_weight
    share = ratio
    if m.slots_bytes < m.bank_bytes and m.bytes_per_token:
        # Smaller experts in the same slots: as more slots for experts of this size.
        now = _replay(m, m.slots_bytes, m.eviction, "off")
        then = _replay(m, min(int(m.slots_bytes / ratio), m.bank_bytes), m.eviction, "off")
        share = ratio * min(then.bytes_read / now.bytes_read, 1.0) if now.bytes_read else ratio
    wait_ms, experts_ms = m.parts_ms["wait"], m.parts_ms["experts"]
    return [
        m.advice(
            f"experts of {TARGET_BITS} bits per weight (Q4_K), at some loss of quality",
            f"they have {m.bits_per_weight:.1f} bits now: {ratio:.0%} of the bytes to multiply by, and {share:.0%} of "
            f"those to read; that is {experts_ms:.2f} and {wait_ms:.2f} of {m.token_ms:.2f} ms",
            experts_ms * (1 - ratio) + wait_ms * (1 - share),
        )
    ]


def _threads(m: Measured) -> list[Advice]:
    if m.n_threads >= m.n_cores:
        return []
    compute_ms = m.parts_ms["experts"] + m.parts_ms["dense"] + m.parts_ms["router"]
    return [
        m.advice(
            f"--threads {m.n_cores}",
            f"{m.n_threads} of {m.n_cores} fast cores compute, for {compute_ms:.2f} of {m.token_ms:.2f} ms; at best",
            compute_ms * (1 - m.n_threads / m.n_cores),
        )
    ]
