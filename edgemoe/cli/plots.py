# SPDX-License-Identifier: MIT
"""What the commands that draw have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import BackendError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure.

    Raises:
        BackendError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BackendError(
            "cannot draw: matplotlib is not installed; install it with `pip install edgemoe[plot]`"
        ) from None
    return Figure(figsize=(width_inches, height_inches), layout="constrained")
