# SPDX-License-Identifier: MIT
"""A process of its own for one measurement: in a memory cgroup (v1 or v2) or without, and who disturbed it."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import resource
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from edgemoe.errors import EdgeMoeError

STDERR_TAIL_CHARS = 2000
DISTURBED_STEAL_SHARE = 0.02
DISTURBED_OTHER_CPU_SHARE = 0.15


class CgroupError(EdgeMoeError):
    """A memory cgroup cannot be made here (no root, no controller) or does not hold its limit."""


@dataclasses.dataclass(frozen=True)
class _Controller:
    """Where the memory controller is mounted, and what it calls its files and keys."""

    mount: Path
    version: int
    limit_file: str
    swap_file: str
    peak_file: str
    cache_key: str
    oom_file: str


@dataclasses.dataclass(frozen=True)
class CgroupUsage:
    """What the cgroup counted until now; `peak_bytes` and `cache_bytes` include the page cache charged to it."""

    limit_bytes: int
    peak_bytes: int
    cache_bytes: int
    refault_pages: int
    oom_kills: int


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A finished child. The shares are of all CPU time of the machine while it ran; `usage` is that of its cgroup."""

    exit_code: int
    stdout: str
    stderr_tail: str
    wall_s: float
    timed_out: bool
    steal_share: float
    other_cpu_share: float
    usage: CgroupUsage | None
    was_idle_before: bool = True

    @property
    def disturbed(self) -> bool:
        """Whether somebody else took so much of the CPU that the timings are in doubt."""
        stolen = self.steal_share > DISTURBED_STEAL_SHARE
        return stolen or self.other_cpu_share > DISTURBED_OTHER_CPU_SHARE or not self.was_idle_before

    def to_dict(self) -> dict[str, Any]:
        """Everything but the output, flat, ready for JSON."""
        names = ("exit_code", "wall_s", "timed_out", "steal_share", "other_cpu_share", "was_idle_before", "disturbed")
        counted = {} if self.usage is None else dataclasses.asdict(self.usage)
        usage = {f"cgroup_{name}": value for name, value in counted.items()}
        return {**{name: getattr(self, name) for name in names}, **usage}


class CpuTicks(NamedTuple):
    """Clock ticks since boot, summed over the cores. Waiting for a disk is counted as busy: it disturbs as well."""

    total: int
    idle: int
    iowait: int
    steal: int

    @classmethod
    def now(cls) -> CpuTicks:
        """Read `/proc/stat`."""
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return cls(sum(fields), fields[3], fields[4], fields[7])

    def minus(self, earlier: CpuTicks) -> CpuTicks:
        """Subtract an earlier reading; `total` is at least 1."""
        idle, iowait, steal = self.idle - earlier.idle, self.iowait - earlier.iowait, self.steal - earlier.steal
        return CpuTicks(max(1, self.total - earlier.total), idle, iowait, steal)


def _find_controller() -> _Controller:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, options = line.split()[:4]
        if kind == "cgroup" and "memory" in options.split(","):
            names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes")
            return _Controller(Path(mount), 1, *names, "cache", "memory.oom_control")
        if kind == "cgroup2" and "memory" in (Path(mount) / "cgroup.controllers").read_text().split():
            names = ("memory.max", "memory.swap.max", "memory.peak")
            return _Controller(Path(mount), 2, *names, "file", "memory.events")
    raise CgroupError(
        "no memory cgroup: found no cgroup mount with the memory controller, expected v1 or v2 (/proc/self/mounts); "
        "run on a Linux host, or in a container with /sys/fs/cgroup writable"
    )


class MemoryCgroup:
    """A memory cgroup at the root of the hierarchy that no process may exceed, page cache included, and without swap
    unless it is asked for.

    A context manager; `close()` kills what still runs inside and removes the group, also at exit of the interpreter.
    """

    def __init__(self, name: str, limit_bytes: int, swap_bytes: int = 0) -> None:
        """Create the group; beyond its memory it may use `swap_bytes` of swap.

        Raises:
            CgroupError: not root, no memory controller, or the limit does not take.
        """
        if os.geteuid() != 0:
            raise CgroupError(f"cannot limit memory: found user id {os.geteuid()}, expected 0; run as root")
        self._files = _find_controller()
        self._path = self._files.mount / name
        self.limit_bytes = limit_bytes
        try:
            if self._files.version == 2:
                (self._files.mount / "cgroup.subtree_control").write_text("+memory")
            self._path.mkdir()
            atexit.register(self.close)
            (self._path / self._files.limit_file).write_text(str(limit_bytes))
            if (self._path / self._files.swap_file).exists():  # absent where swap is not accounted
                # Version 1 limits the sum of memory and swap.
                swap = limit_bytes + swap_bytes if self._files.version == 1 else swap_bytes
                (self._path / self._files.swap_file).write_text(str(swap))
        except OSError as error:
            self.close()
            raise CgroupError(
                f"cannot make a memory cgroup: {error.strerror}, expected a writable hierarchy ({self._path}); "
                "run as root outside a restricted container"
            ) from error

    @property
    def limit_path(self) -> Path:
        """The file of the limit, which whoever is root may lower."""
        return self._path / self._files.limit_file

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs inside, give back the page cache charged to the group, remove it. May be called twice."""
        atexit.unregister(self.close)
        if not self._path.exists():
            return
        deadline_s = time.monotonic() + 10.0
        while pids := self._read("cgroup.procs").split():
            if time.monotonic() > deadline_s:
                break
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            time.sleep(0.05)
        if self._files.version == 1:
            with contextlib.suppress(OSError):  # busy: rmdir moves what is left to the parent
                (self._path / "memory.force_empty").write_text("0")
        self._path.rmdir()

    def run(self, command: Sequence[str], stdin_text: str, timeout_s: float) -> RunResult:
        """Run `command` inside the group, from its first instruction, and count what it took."""
        enter = 'echo 0 > "$0" && exec "$@"'  # writing 0 moves the writer, here the shell that becomes the child
        inside = ["/bin/sh", "-c", enter, str(self._path / "cgroup.procs"), *command]
        return dataclasses.replace(run(inside, stdin_text, timeout_s), usage=self.usage())

    def usage(self) -> CgroupUsage:
        """Read the counters of the group. After the child ended, its page cache is still charged here."""
        stat = self._read_table("memory.stat")
        return CgroupUsage(
            limit_bytes=self.limit_bytes,
            peak_bytes=int(self._read(self._files.peak_file)),
            cache_bytes=stat[self._files.cache_key],
            refault_pages=stat.get("workingset_refault_file", 0),
            oom_kills=self._read_table(self._files.oom_file)["oom_kill"],
        )

    def _read(self, name: str) -> str:
        return (self._path / name).read_text()

    def _read_table(self, name: str) -> dict[str, int]:
        return {key: int(value) for key, value in (line.split() for line in self._read(name).splitlines())}


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(command: Sequence[str], stdin_text: str, timeout_s: float) -> RunResult:
    """Run `command` to its end or to `timeout_s`, and count what it and others took of the CPU."""
    before, cpu_before_s, start_s = CpuTicks.now(), _children_cpu_s(), time.monotonic()
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process only, which then kills the child
    )
    timed_out = False
    try:
        stdout, stderr = child.communicate(stdin_text, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        timed_out = True
        child.kill()
        stdout, stderr = child.communicate()
    finally:
        child.kill()
        child.wait()
    wall_s = time.monotonic() - start_s
    spent = CpuTicks.now().minus(before)
    child_ticks = (_children_cpu_s() - cpu_before_s) * os.sysconf("SC_CLK_TCK")
    busy_ticks = spent.total - spent.idle - spent.iowait - spent.steal
    return RunResult(
        exit_code=child.returncode,
        stdout=stdout,
        stderr_tail=stderr[-STDERR_TAIL_CHARS:],
        wall_s=wall_s,
        timed_out=timed_out,
        steal_share=spent.steal / spent.total,
        other_cpu_share=max(0.0, busy_ticks - child_ticks) / spent.total,
        usage=None,
    )
