# SPDX-License-Identifier: MIT
"""Files that others have mapped into this process: where, and how their pages are given back."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterable
from pathlib import Path

_PAGE_BYTES = 4096
_MADV_RANDOM, _MADV_DONTNEED = 1, 4


@dataclasses.dataclass(frozen=True)
class Mapping:
    """`length` bytes of a file from `offset` on, at `address`."""

    address: int
    length: int
    offset: int


def mappings(path: Path) -> list[Mapping]:
    """Where `path` is mapped into this process."""
    wanted = str(path.resolve())
    found = []
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        fields = line.split(None, 5)
        if len(fields) < 6 or fields[5] != wanted:
            continue
        begin, end = (int(x, 16) for x in fields[0].split("-"))
        found.append(Mapping(begin, end - begin, int(fields[2], 16)))
    return found


def whole_pages(mapped: Iterable[Mapping], offset: int, n_bytes: int) -> list[Mapping]:
    """Of mappings of a file, the pages that hold nothing but bytes from `offset` on, `n_bytes` of them."""
    begin = -(-offset // _PAGE_BYTES) * _PAGE_BYTES
    end = (offset + n_bytes) // _PAGE_BYTES * _PAGE_BYTES
    found = []
    for m in mapped:
        first, last = max(begin, m.offset), min(end, m.offset + m.length)
        if first < last:
            found.append(Mapping(m.address + first - m.offset, last - first, first))
    return found


def _advise(mapped: Iterable[Mapping], advice: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for m in mapped:
        libc.madvise(ctypes.c_void_p(m.address), ctypes.c_size_t(m.length), advice)


def drop(mapped: Iterable[Mapping]) -> None:
    """Take pages that nobody has written to out of this process; the kernel may then drop them, or give them again."""
    _advise(mapped, _MADV_DONTNEED)


def read_single_pages(mapped: Iterable[Mapping]) -> None:
    """Let a page fault read no more than the page."""
    _advise(mapped, _MADV_RANDOM)
