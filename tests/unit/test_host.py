# SPDX-License-Identifier: MIT
"""What the machine has: limits of cgroups, versions 1 and 2, from a tree that is made up."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from edgemoe import host

NO_LIMIT_V1 = 9223372036854771712


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cgroup tree; the machine has 8 GiB available."""
    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(host, "_CGROUP", root)
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=8 << 30))
    return root


def _be_in(monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    """Let /proc/self/cgroup read so."""
    read_text = Path.read_text

    def read(self: Path, *arguments: object, **options: object) -> str:
        return lines if str(self) == "/proc/self/cgroup" else read_text(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", read)


def _v1(directory: Path, limit: int, usage: int, cache: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (directory / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"cache {cache}\ntotal_inactive_file {cache}\ntotal_active_file 0\n")


def _v2(directory: Path, limit: int | str, usage: int, cache: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"anon 1\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}\n")


def test_no_cgroup(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a machine without cgroups that is taken for one without memory."""
    _be_in(monkeypatch, "")
    assert host.cgroup_memory_limit_bytes() is None
    assert host.available_memory_bytes() == 8 << 30


def test_version_1(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the limit of a container that is overlooked; page cache can be given back and is free."""
    _be_in(monkeypatch, "9:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n")
    _v1(tree / "memory" / "docker" / "abc", limit=2 << 30, usage=1 << 30, cache=512 << 20)
    _v1(tree / "memory" / "docker", limit=NO_LIMIT_V1, usage=5 << 30)
    _v1(tree / "memory", limit=NO_LIMIT_V1, usage=7 << 30)
    assert host.cgroup_memory_limit_bytes() == 2 << 30
    assert host.available_memory_bytes() == (2 << 30) - (512 << 20)


def test_version_2(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a parent's limit, which binds as well, that is overlooked."""
    _be_in(monkeypatch, "0::/user.slice/app.scope\n")
    _v2(tree / "user.slice" / "app.scope", limit="max", usage=1 << 30)
    _v2(tree / "user.slice", limit=3 << 30, usage=2 << 30, cache=1 << 30)
    assert host.cgroup_memory_limit_bytes() == 3 << 30
    assert host.available_memory_bytes() == 2 << 30


def test_both_versions_at_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a hybrid machine, whose version 2 tree holds no memory controller, hiding the limit."""
    _be_in(monkeypatch, "4:memory:/a\n1:name=systemd:/b\n0::/c\n")
    _v1(tree / "memory" / "a", limit=1 << 30, usage=0)
    (tree / "c").mkdir()
    assert host.cgroup_memory_limit_bytes() == 1 << 30


def test_container_whose_path_is_not_mounted(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a container that sees its own cgroup as the root, under a path of the host."""
    _be_in(monkeypatch, "4:memory:/docker/of-the-host\n")
    _v1(tree / "memory", limit=1 << 30, usage=256 << 20)
    assert host.cgroup_memory_limit_bytes() == 1 << 30
    assert host.available_memory_bytes() == 768 << 20


def test_limit_that_is_exceeded(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a negative amount of memory."""
    _be_in(monkeypatch, "0::/a\n")
    _v2(tree / "a", limit=1 << 30, usage=2 << 30)
    assert host.available_memory_bytes() == 0


def test_unreadable_statistics(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a kernel with other files: the limit still counts."""
    _be_in(monkeypatch, "0::/a\n")
    _v2(tree / "a", limit=1 << 30, usage=512 << 20)
    (tree / "a" / "memory.stat").write_text("nonsense\n")
    assert host.available_memory_bytes() == 512 << 20
    (tree / "a" / "memory.max").write_text("nonsense\n")
    assert host.available_memory_bytes() == 8 << 30


def test_default_budget_leaves_a_margin(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a default that takes everything, or forgets what this process holds already."""
    _be_in(monkeypatch, "")
    budget = host.default_budget_bytes()
    assert 0.8 * (8 << 30) < budget - host.process_rss_bytes() < 8 << 30


def test_this_process() -> None:
    """Guards against readings in another unit."""
    assert 1 << 20 < host.process_rss_bytes() <= host.peak_rss_bytes() < 1 << 40
    assert host.storage_bytes_read() >= 0
    assert 1 << 26 < host.available_memory_bytes() < 1 << 50


def test_disk_is_measured(tmp_path: Path) -> None:
    """Guards against reads past the end of a small file, or of an odd block size."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert host.disk_bandwidth_bytes_per_s(path, block_bytes=5000, n_threads=2, seconds=0.05) > 0
    assert isinstance(host.direct_io_supported(path), bool)
    assert host.direct_io_supported(tmp_path / "missing") is False
