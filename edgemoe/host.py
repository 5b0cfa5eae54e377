# SPDX-License-Identifier: MIT
"""What this machine and this process have: memory, limits, storage."""

from __future__ import annotations

import mmap
import os
import random
import resource
import threading
import time
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_PAGE_BYTES = 4096
# A cgroup v1 without a limit reports a number close to 2**63.
_NO_LIMIT_BYTES = 1 << 60
# Of what is free now, the share that a default budget takes: the rest is for what other programs do meanwhile.
_DEFAULT_SHARE = 0.9
# Of a budget, for what no line of a plan names: allocator fragmentation, page tables (1/512 of what is mapped), the CPU
# backend's work buffers, Python modules imported later. Not yet tight: see docs/experiments.md, Slack.
SLACK_BYTES = 32 << 20
SLACK_SHARE = 1 / 128
# A process's resident set, measured twice, differs by up to 1.1 MiB. What one measurement finds to be the floor must
# run after the next one: a budget that is short by no more than this is served from the slack.
TOLERANCE_BYTES = 4 << 20
# Readers in flight: on the disks measured so far bandwidth grows up to 4 (859 -> 954 MiB/s from 2 to 4 threads,
# fio 1 MiB random reads on the development machine) and not beyond by more than 10 %.
N_IO_THREADS = 4


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def cgroup_dirs(controller: str) -> list[tuple[Path, bool]]:
    """This process's cgroup of a controller and its parents, innermost first, each with whether it is version 2."""
    dirs: list[tuple[Path, bool]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return dirs
    for line in lines:
        _, controllers, path = line.split(":", 2)
        is_v2 = controllers == ""
        if not is_v2 and controller not in controllers.split(","):
            continue
        root = _CGROUP if is_v2 else _CGROUP / controller
        inner = root / path.lstrip("/")
        for directory in (inner, *inner.parents):
            dirs.append((directory, is_v2))
            if directory == root:
                break
    return dirs


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of every cgroup with a memory limit."""
    found = []
    for directory, is_v2 in cgroup_dirs("memory"):
        limit = _read_int(directory / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
        usage = _read_int(directory / ("memory.current" if is_v2 else "memory.usage_in_bytes"))
        if limit is None or usage is None or limit >= _NO_LIMIT_BYTES:
            continue
        reclaimable = 0
        try:
            for line in (directory / "memory.stat").read_text().splitlines():
                key, value = line.split()
                if key in (("inactive_file", "active_file") if is_v2 else ("total_inactive_file", "total_active_file")):
                    reclaimable += int(value)
        except (OSError, ValueError):
            reclaimable = 0
        found.append((limit, max(0, usage - reclaimable)))
    return found


def cgroup_memory_limit_bytes() -> int | None:
    """The tightest memory limit of this process's cgroups (v1 or v2), or None."""
    return min((limit for limit, _ in _cgroup_limits()), default=None)


def available_memory_bytes() -> int:
    """Memory that can still be taken without swapping, within the machine and its cgroup limits."""
    available = [int(psutil.virtual_memory().available)]
    available += [limit - used for limit, used in _cgroup_limits()]
    return max(0, min(available))


def spare_bytes() -> int:
    """Most of what is free: what a process may take when no budget is given."""
    return int(_DEFAULT_SHARE * available_memory_bytes())


def default_budget_bytes() -> int:
    """The budget when none is given: what is spare, and what this process holds already."""
    return spare_bytes() + process_rss_bytes()


def slack_bytes(budget_bytes: int) -> int:
    """Set aside of a budget for what cannot be counted."""
    return SLACK_BYTES + int(budget_bytes * SLACK_SHARE)


def with_slack(n_bytes: int) -> int:
    """The smallest budget that leaves `n_bytes` beside its slack."""
    return int((n_bytes + SLACK_BYTES) / (1 - SLACK_SHARE)) + 1


def process_rss_bytes() -> int:
    """Resident set of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def storage_bytes_read() -> int:
    """Bytes that this process has caused to be read from storage, as the kernel counts them."""
    try:
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def direct_io_supported(path: str | Path) -> bool:
    """Whether the file's file system reads with O_DIRECT."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, _PAGE_BYTES) as page:
            os.preadv(fd, [page], 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def disk_bandwidth_bytes_per_s(
    path: str | Path, block_bytes: int, n_threads: int = 4, seconds: float = 1.0, seed: int = 0
) -> float:
    """Random reads of `block_bytes` from `n_threads` threads, with O_DIRECT where the file system has it."""
    flags = os.O_RDONLY | (os.O_DIRECT if direct_io_supported(path) else 0)
    fd = os.open(path, flags)
    block_bytes = -(-block_bytes // _PAGE_BYTES) * _PAGE_BYTES
    n_blocks = max(1, os.fstat(fd).st_size // block_bytes)
    stop_at = time.monotonic() + seconds
    read_bytes = [0] * n_threads

    def work(i: int) -> None:
        where = random.Random(seed * n_threads + i)
        with mmap.mmap(-1, block_bytes) as block:
            while time.monotonic() < stop_at:
                read_bytes[i] += os.preadv(fd, [block], where.randrange(n_blocks) * block_bytes)

    begin = time.monotonic()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed_s = time.monotonic() - begin
    os.close(fd)
    return sum(read_bytes) / elapsed_s
