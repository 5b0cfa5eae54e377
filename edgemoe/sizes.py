# SPDX-License-Identifier: MIT
"""Sizes in bytes, as people write them."""

from __future__ import annotations

import math
import re

from edgemoe.errors import BudgetError

_UNITS = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "kb": 10**3,
    "kib": 1 << 10,
    "m": 1 << 20,
    "mb": 10**6,
    "mib": 1 << 20,
    "g": 1 << 30,
    "gb": 10**9,
    "gib": 1 << 30,
    "t": 1 << 40,
    "tb": 10**12,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_size(size: int | float | str) -> int:
    """Parse a size such as `1.5GiB`, `1500MB`, `2G` (= GiB) or an integer of bytes.

    Raises:
        BudgetError: the text is not a size, or is not positive.
    """
    if isinstance(size, (int, float)) and not isinstance(size, bool):
        value: int | float = size
    else:
        match = _SIZE.fullmatch(str(size))
        unit = _UNITS.get(match.group(2).lower()) if match else None
        if match is None or unit is None:
            raise BudgetError(
                f"cannot parse the size {size!r}: expected a number with an optional unit; "
                "write it as 1.5GiB, 1500MB or an integer of bytes"
            )
        value = float(match.group(1)) * unit
    n_bytes = int(value) if isinstance(value, int) or math.isfinite(value) else 0
    if n_bytes <= 0:
        raise BudgetError(f"size {size!r} is not a positive number; write it as 1.5GiB, 1500MB or an integer of bytes")
    return n_bytes


def format_size(n_bytes: int) -> str:
    """Format bytes with a binary unit and three significant digits: `1.31 GiB`, `432 MiB`."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000 or unit == "GiB":
            break
        value /= 1024
    if unit == "B":
        return f"{n_bytes} B"
    return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
