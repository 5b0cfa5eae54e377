# SPDX-License-Identifier: MIT
"""What keeps one benchmark run apart from the rest: a memory cgroup around it, an idle machine before it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

from edgemoe.confine import (
    DISTURBED_OTHER_CPU_SHARE,
    DISTURBED_STEAL_SHARE,
    CgroupError,
    CpuTicks,
    MemoryCgroup,
    RunResult,
)

__all__ = [
    "DISTURBED_OTHER_CPU_SHARE",
    "DISTURBED_STEAL_SHARE",
    "CgroupError",
    "CpuTicks",
    "MemoryCgroup",
    "RunResult",
    "drop_caches",
    "run_cold",
    "wait_until_idle",
]


def wait_until_idle(max_wait_s: float, *, window_s: float = 2.0, idle_share: float = 0.9) -> bool:
    """Wait until the machine was idle for `window_s`; False when it was not within `max_wait_s`."""
    deadline_s = time.monotonic() + max_wait_s
    step_s = 0.5
    readings = [CpuTicks.now()]
    while True:
        time.sleep(step_s)
        readings = [*readings, CpuTicks.now()][-1 - round(window_s / step_s) :]
        spent = readings[-1].minus(readings[0])
        if len(readings) > round(window_s / step_s) and spent.idle / spent.total >= idle_share:
            return True
        if time.monotonic() > deadline_s:
            return False


def drop_caches() -> None:
    """Empty the page cache, so that the next run starts with a cold file."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def run_cold(
    command: Sequence[str], stdin_text: str, limit_bytes: int, timeout_s: float, idle_wait_s: float
) -> RunResult:
    """Run `command` with an empty page cache on a machine that came to rest, in a memory cgroup of its own."""
    drop_caches()
    was_idle = wait_until_idle(idle_wait_s)
    with MemoryCgroup(f"edgemoe-bench-{os.getpid()}", limit_bytes) as group:
        return dataclasses.replace(group.run(command, stdin_text, timeout_s), was_idle_before=was_idle)
