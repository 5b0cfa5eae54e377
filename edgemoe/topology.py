# SPDX-License-Identifier: MIT
"""How many threads compute well here: fast physical cores, within this process's affinity and its cgroups' quota.

Nothing is pinned: the kernel places threads, and knows what else runs. All but `default_threads` are functions of
the paths they are given; what is missing or unreadable there counts as not limiting.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence, Set
from pathlib import Path

from edgemoe import host

_CPUS = Path("/sys/devices/system/cpu")
# Little cores are the slowest cluster if it has less than this share of the fastest CPU's capacity, which Linux derives
# from the device tree's capacity-dmips-mhz and the clock. Only the slowest cluster can be little, as no share alone
# tells little from mid: Google G1's mid A76 has 620/1024 x 2.25/2.80 GHz = 0.49, RK3588's little A55 has 530/1024 x
# 1.8/2.4 GHz = 0.39, the little A53 of older designs up to 0.52. Little cores share the work in equal parts with cores
# of two to three times their speed, which then wait for them.
_LITTLE_CAPACITY = 0.6
# The same where only clocks are known, which hides that a little core does less in a cycle: RK3588 has 1.8/2.4 = 0.75.
# Equal cores of x86 servers and desktops differ by up to a tenth, their favoured cores' turbo; E-cores of Intel hybrids
# (0.75) are left out, as llama.cpp does by default.
_LITTLE_CLOCK = 0.85
# CPUs of a cluster have one clock and one capacity; this only forgives rounding.
_SAME_CLUSTER = 1.1


def _read_ints(path: Path) -> list[int]:
    """The numbers in a file; none when there is no such file or something else is in it ("max")."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []


def _speeds(cpus: Sequence[int], root: Path, file: str) -> list[int]:
    """One number of each CPU; empty unless every CPU has one."""
    found = [_read_ints(root / f"cpu{cpu}" / file) for cpu in cpus]
    return [numbers[0] for numbers in found] if all(n and n[0] > 0 for n in found) else []


def fast_cpus(allowed: Set[int], root: Path = _CPUS) -> set[int]:
    """Of some CPUs, those that are not little cores of a big.LITTLE design; all, where the system does not tell."""
    cpus = sorted(allowed)
    for file, share in (("cpu_capacity", _LITTLE_CAPACITY), ("cpufreq/cpuinfo_max_freq", _LITTLE_CLOCK)):
        speeds = _speeds(cpus, root, file)
        if not speeds:
            continue
        slowest = min(speeds)
        if slowest >= share * max(speeds):
            break
        return {cpu for cpu, speed in zip(cpus, speeds, strict=True) if speed > _SAME_CLUSTER * slowest}
    return set(cpus)


def n_physical_cores(cpus: Set[int], root: Path = _CPUS) -> int:
    """Cores that have at least one of these CPUs: a second thread on a core has no arithmetic of its own."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add((root / f"cpu{cpu}" / "topology/thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(f"cpu{cpu}")
    return len(cores)


def quota_cpus(directories: Iterable[tuple[Path, bool]]) -> float | None:
    """CPUs' worth of time that cgroups grant, the tightest of them; None for no limit.

    Args:
        directories: each a cgroup's directory and whether it is of version 2, as from `host.cgroup_dirs`.
    """
    quotas = []
    for directory, is_v2 in directories:
        if is_v2:
            numbers = _read_ints(directory / "cpu.max")
        else:
            numbers = _read_ints(directory / "cpu.cfs_quota_us") + _read_ints(directory / "cpu.cfs_period_us")
        if len(numbers) == 2 and min(numbers) > 0:  # version 1 has a quota of -1 where there is no limit
            quotas.append(numbers[0] / numbers[1])
    return min(quotas, default=None)


def n_usable_cpus(allowed: Set[int], directories: Iterable[tuple[Path, bool]]) -> int:
    """Logical CPUs that a process can keep busy: those it may run on, no more than its quota rounded up."""
    quota = quota_cpus(directories)
    return max(1, len(allowed) if quota is None else min(len(allowed), math.ceil(quota)))


def n_threads(allowed: Set[int], directories: Iterable[tuple[Path, bool]], root: Path = _CPUS) -> int:
    """Fast physical cores among `allowed`, no more than the cgroups' quota rounded up; at least 1."""
    return min(max(1, n_physical_cores(fast_cpus(allowed, root), root)), n_usable_cpus(allowed, directories))


def allowed_cpus() -> set[int]:
    """CPUs that this process may run on, by its affinity mask and cpuset."""
    return os.sched_getaffinity(0)


def default_threads() -> int:
    """Threads when nobody says how many; see `n_threads`."""
    return n_threads(allowed_cpus(), host.cgroup_dirs("cpu"))
