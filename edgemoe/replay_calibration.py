# SPDX-License-Identifier: MIT
"""A recorded trace calibrates its own replay: what its run says about the machine's disk and computing.

Computing is what is left of the time between layers when waiting is taken away: its lower end where nothing disturbs
it, and the rest in proportion to the bytes that were read meanwhile. The disk is as fast as it has to be for the
replay of the recorded settings to wait as long for each byte as was recorded. So both are as they were during the run,
whatever a benchmark of them says before or after.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.errors import TraceError
from edgemoe.replay import Compute, Disk, Phase, expert_us, replay
from edgemoe.trace import Trace, TracedRun

MIB = 1 << 20
FEWEST_TOKENS = 16
"""Tokens of decode without which nothing is concluded."""

_FEWEST_QUIET = 0.05
"""Share of layers that read nothing from which their mean says what is not reading's fault."""
_LONGEST = 3.0
"""Tokens that took so many times the median are no decoding: somebody paused."""
_SLOWNESS = (1e-3, 1e3)
"""Of the disk, in shares of `Disk`'s: waiting alone does not tell latency and speed apart, so they keep their ratio."""
_STEPS = 20
"""Of bisection: to one part in 70 thousand."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a trace says about the machine that it was recorded on.

    Attributes:
        disk, compute: for `replay`.
        n_tokens: tokens of decode that it was taken from.
        wait_us, total_us: of one of them, on average.
        read_bytes: by one of them.
    """

    disk: Disk
    compute: Compute
    n_tokens: int
    wait_us: float
    total_us: float
    read_bytes: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dataclasses.asdict(self)


def calibrate(trace: Trace) -> Calibration:
    """Find disk and computing of the machine on which a trace was recorded.

    Raises:
        TraceError: it was not recorded, by an older version, has fewer than `FEWEST_TOKENS` tokens of decode, or none
            that waited for storage.
    """
    if trace.run is None:
        raise _fail(trace, "it does not say with what it was recorded", "record one with this version")
    times = _DecodeTimes.of(trace)
    compute = _compute(trace, times)
    n_bytes, wait_us = float(times.read_bytes.sum(axis=1).mean()), float(times.wait_us.sum(axis=1).mean())
    return Calibration(
        disk=_disk(trace, trace.run, compute, wait_us / n_bytes if n_bytes > 0 else 0.0),
        compute=compute,
        n_tokens=len(times.read_bytes),
        wait_us=wait_us,
        total_us=float((times.compute_us + times.wait_us).sum(axis=1).mean()),
        read_bytes=n_bytes,
    )


def _fail(trace: Trace, found: str, advice: str) -> TraceError:
    return TraceError(f"cannot calibrate by the trace of {trace.model}: {found}; {advice}")


@dataclasses.dataclass(frozen=True)
class _DecodeTimes:
    """Tokens of decode that another token of decode follows.

    Attributes:
        compute_us, wait_us: float64 [n, L], of each layer and what comes before the next one.
        read_bytes: int64 [n, L].
    """

    compute_us: npt.NDArray[np.float64]
    wait_us: npt.NDArray[np.float64]
    read_bytes: npt.NDArray[np.int64]

    @staticmethod
    def of(trace: Trace) -> _DecodeTimes:
        """
        Raises:
            TraceError: there are too few.
        """
        is_token = np.bincount(trace.batch_of_token, minlength=trace.n_batches) == 1
        begins = np.append(trace.begin_us, np.full((1, len(trace.layers)), np.nan), axis=0)
        layers_us = np.diff(np.concatenate([begins[:-1], begins[1:, :1]], axis=1), axis=1)
        totals_us = layers_us.sum(axis=1)
        is_known = np.append(is_token[:-1] & is_token[1:], False)
        is_known &= (
            np.isfinite(totals_us) & np.isfinite(trace.wait_us).all(axis=1) & (trace.read_bytes >= 0).all(axis=1)
        )
        if is_known.any():
            is_known &= totals_us <= _LONGEST * np.median(totals_us[is_known])
        n_tokens = int(is_known.sum())
        if n_tokens < FEWEST_TOKENS:
            raise _fail(
                trace,
                f"{n_tokens} tokens of decode with times, expected at least {FEWEST_TOKENS}",
                "record more tokens",
            )
        wait_us = trace.wait_us[is_known].astype(np.float64)
        return _DecodeTimes(np.maximum(layers_us[is_known] - wait_us, 0.0), wait_us, trace.read_bytes[is_known])


def _compute(trace: Trace, times: _DecodeTimes) -> Compute:
    """Each layer's median is computing. Of what the mean is above it, the part that layers without reads have too is
    computing as well (neighbours, the scheduler); the rest is the price of what was read."""
    median_us = np.median(times.compute_us, axis=0)
    above_us = times.compute_us - median_us
    is_quiet = (times.read_bytes == 0) & (times.wait_us == 0)
    if is_quiet.mean() >= _FEWEST_QUIET:
        median_us = median_us + above_us[is_quiet].mean()
    n_mib = float(times.read_bytes.sum(axis=1).mean()) / MIB
    held_up_us = max(0.0, float(times.compute_us.mean(axis=0).sum() - median_us.sum()))
    # The last layer is followed by the head and the host.
    layer_us = float(median_us[:-1].mean() if len(median_us) > 1 else median_us[0])
    n_used = sum(layer.n_used for layer in trace.layers) / len(trace.layers)
    of_expert_us = min(expert_us(trace), layer_us / n_used)
    return Compute(
        dense_us=layer_us - n_used * of_expert_us,
        expert_us=of_expert_us,
        batch_us=max(0.0, float(median_us[-1]) - layer_us),
        hold_up_us_per_mib=held_up_us / n_mib if n_mib > 0 else 0.0,
    )


def _disk(trace: Trace, run: TracedRun, compute: Compute, wait_us_per_byte: float) -> Disk:
    """The disk with which the replay of the recorded settings waits so long for each byte."""
    if wait_us_per_byte <= 0:
        raise _fail(trace, "no token of decode waited for storage", "record with less memory")

    def decode(disk: Disk) -> Phase:
        result = replay(
            trace,
            slots_bytes=run.slots_bytes,
            eviction=run.eviction,
            prefetch=run.prefetch,
            disk=disk,
            compute=compute,
        )
        return result.decode

    usual = Disk(n_readers=run.n_readers)
    low, high = (math.log(factor) for factor in _SLOWNESS)
    for _ in range(_STEPS):
        slowness = math.exp((low + high) / 2)
        disk = dataclasses.replace(
            usual, bytes_per_s=usual.bytes_per_s / slowness, latency_us=usual.latency_us * slowness
        )
        found = decode(disk)
        if found.stall_us > wait_us_per_byte * found.bytes_read:
            high = (low + high) / 2
        else:
            low = (low + high) / 2
    return disk
