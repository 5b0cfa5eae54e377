# SPDX-License-Identifier: MIT
"""How many threads compute: from trees of sysfs and cgroups that are made up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgemoe import host, topology

NO_QUOTA: list[tuple[Path, bool]] = []
# Linux's own numbers: capacities are relative to the fastest CPU's 1024, clocks are kHz.
BIG_LITTLE = [406] * 4 + [1024] * 4  # RK3588
PRIME_MID_LITTLE = [325] * 4 + [780] * 3 + [1024]  # 1 + 3 + 4
WEAK_MID = [160] * 4 + [498] * 2 + [1024] * 2  # Google G1: mid cores with half of the prime cores' capacity


def machine(
    root: Path,
    siblings: Sequence[Sequence[int]],
    capacities: Sequence[int] = (),
    clocks_khz: Sequence[int] = (),
) -> set[int]:
    """Write the CPUs of a machine under `root`; `siblings` lists the CPUs of each core."""
    cpus = set()
    for core in siblings:
        for cpu in core:
            directory = root / f"cpu{cpu}"
            (directory / "topology").mkdir(parents=True)
            (directory / "topology/thread_siblings_list").write_text(",".join(map(str, core)) + "\n")
            if capacities:
                (directory / "cpu_capacity").write_text(f"{capacities[cpu]}\n")
            if clocks_khz:
                (directory / "cpufreq").mkdir()
                (directory / "cpufreq/cpuinfo_max_freq").write_text(f"{clocks_khz[cpu]}\n")
            cpus.add(cpu)
    return cpus


def single(n: int) -> list[list[int]]:
    """`n` cores of one thread."""
    return [[cpu] for cpu in range(n)]


def v2(directory: Path, text: str) -> tuple[Path, bool]:
    """A cgroup of version 2 with that cpu.max."""
    directory.mkdir(parents=True)
    (directory / "cpu.max").write_text(text + "\n")
    return directory, True


def v1(directory: Path, quota_us: int, period_us: int) -> tuple[Path, bool]:
    """A cgroup of version 1 with that quota."""
    directory.mkdir(parents=True)
    (directory / "cpu.cfs_quota_us").write_text(f"{quota_us}\n")
    (directory / "cpu.cfs_period_us").write_text(f"{period_us}\n")
    return directory, False


@pytest.mark.parametrize("n_cores", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("has_smt", [False, True])
def test_cores_are_counted_once(tmp_path: Path, n_cores: int, has_smt: bool) -> None:
    """Guards against two threads on one core, which share its arithmetic and halve its cache."""
    siblings = [[core, core + n_cores] if has_smt else [core] for core in range(n_cores)]
    cpus = machine(tmp_path, siblings, capacities=[1024] * 2 * n_cores)
    assert topology.n_threads(cpus, NO_QUOTA, tmp_path) == n_cores


@pytest.mark.parametrize(
    ("capacities", "n_fast"),
    [(BIG_LITTLE, 4), (PRIME_MID_LITTLE, 4), (WEAK_MID, 4), ([1024] * 8, 8), ([800] * 6 + [1024] * 2, 8)],
    ids=["4+4", "1+3+4", "weak mid", "equal", "two fast clusters"],
)
def test_little_cores_are_left_out(tmp_path: Path, capacities: list[int], n_fast: int) -> None:
    """Guards against fast cores that wait for little ones, and against mid cores taken for little ones."""
    cpus = machine(tmp_path, single(8), capacities)
    assert topology.n_threads(cpus, NO_QUOTA, tmp_path) == n_fast


@pytest.mark.parametrize(
    ("clocks_khz", "n_fast"),
    [
        ([1800000] * 4 + [2400000] * 4, 4),
        ([1785600] * 4 + [2419200] * 3 + [2841600], 4),
        ([5300000] * 2 + [5100000] * 6, 8),
    ],
    ids=["4+4", "1+3+4", "favoured cores"],
)
def test_clocks_stand_in_for_capacities(tmp_path: Path, clocks_khz: list[int], n_fast: int) -> None:
    """Guards against old kernels without capacities, and against favoured cores that make all others little."""
    cpus = machine(tmp_path, single(8), clocks_khz=clocks_khz)
    assert topology.n_threads(cpus, NO_QUOTA, tmp_path) == n_fast


def test_capacities_come_before_clocks(tmp_path: Path) -> None:
    """Guards against clocks that contradict what Linux knows about the cores."""
    cpus = machine(tmp_path, single(8), [1024] * 8, [1000000] * 4 + [3000000] * 4)
    assert topology.n_threads(cpus, NO_QUOTA, tmp_path) == 8


def test_hybrid_with_hyperthreads(tmp_path: Path) -> None:
    """Guards against siblings counted twice next to cores that have none."""
    siblings = [[0, 1], [2, 3], [4], [5], [6], [7]]
    cpus = machine(tmp_path, siblings, [1024] * 4 + [500] * 4)
    assert topology.n_threads(cpus, NO_QUOTA, tmp_path) == 2
    assert topology.n_physical_cores(cpus, tmp_path) == 6


def test_affinity_binds(tmp_path: Path) -> None:
    """Guards against more threads than CPUs that the process may run on, and against a mask that leaves none."""
    machine(tmp_path, single(8), BIG_LITTLE)
    assert topology.n_threads({0, 6, 7}, NO_QUOTA, tmp_path) == 2
    assert topology.n_threads({0, 1, 2}, NO_QUOTA, tmp_path) == 3  # little cores only: then they are what there is
    assert topology.n_threads({5}, NO_QUOTA, tmp_path) == 1


@pytest.mark.parametrize(("quota_us", "n"), [(150000, 2), (200000, 2), (50000, 1), (1000000, 8)])
def test_quota_is_rounded_up(tmp_path: Path, quota_us: int, n: int) -> None:
    """Guards against threads that a quota stops in turn, while the others wait for them; 1.5 CPUs are worth two."""
    cpus = machine(tmp_path / "cpu", single(8), [1024] * 8)
    new, old = v2(tmp_path / "v2", f"{quota_us} 100000"), v1(tmp_path / "v1", quota_us, 100000)
    assert topology.n_threads(cpus, [new], tmp_path / "cpu") == n
    assert topology.n_threads(cpus, [old], tmp_path / "cpu") == n


def test_quota_of_a_parent_binds(tmp_path: Path) -> None:
    """Guards against a container without a quota in a pod that has one, and against "max" read as a number."""
    pod = v2(tmp_path / "pod", "300000 100000")
    container = v2(tmp_path / "pod/container", "max 100000")
    assert topology.quota_cpus([container, pod]) == 3.0
    assert topology.quota_cpus([container]) is None
    assert topology.quota_cpus([v1(tmp_path / "v1", -1, 100000)]) is None
    assert topology.quota_cpus([v1(tmp_path / "broken", 100000, 0)]) is None
    assert topology.n_usable_cpus({0, 1}, [pod]) == 2


def test_system_that_tells_nothing(tmp_path: Path) -> None:
    """Guards against a sandbox without sysfs or cgroups, in which there seem to be no cores."""
    directories = [(tmp_path / "no-cgroup", True), (tmp_path / "no-cgroup", False)]
    assert topology.n_threads({0, 1, 2, 5}, directories, tmp_path / "no-sysfs") == 4


def test_system_that_tells_half(tmp_path: Path) -> None:
    """Guards against CPUs without a capacity being taken for little ones, and against a file of nonsense."""
    cpus = machine(tmp_path, single(4), [300, 300, 1024, 1024])
    (tmp_path / "cpu0/cpu_capacity").unlink()
    (tmp_path / "cpu3/topology/thread_siblings_list").unlink()
    assert topology.n_threads(cpus, NO_QUOTA, tmp_path) == 4
    (tmp_path / "cpu0/cpu_capacity").write_text("nonsense\n")
    assert topology.n_threads(cpus, NO_QUOTA, tmp_path) == 4


def test_cgroups_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the quota of a version 1 container, whose two controllers share a hierarchy, being overlooked."""
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    read_text = Path.read_text
    membership = "5:cpu,cpuacct:/docker/abc\n4:memory:/m\n0::/\n"
    monkeypatch.setattr(
        Path, "read_text", lambda self: membership if str(self) == "/proc/self/cgroup" else read_text(self)
    )
    v1(tmp_path / "cpu/docker/abc", 150000, 100000)
    assert topology.quota_cpus(host.cgroup_dirs("cpu")) == 1.5
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5, 6, 7})
    monkeypatch.setattr(topology, "fast_cpus", lambda allowed, root: allowed)
    assert topology.default_threads() <= 2


def test_this_machine() -> None:
    """Guards against a default that is no number of threads here."""
    assert 1 <= topology.default_threads() <= len(topology.allowed_cpus())
