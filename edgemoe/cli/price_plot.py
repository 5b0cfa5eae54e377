# SPDX-License-Identifier: MIT
"""The curve of a price list: change of perplexity against bytes read, a line for each family of levers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.plots import new_figure

if TYPE_CHECKING:
    from edgemoe.price_list import Price


def draw(found: Price, path: Path) -> None:
    """Write the curve; the suffix of `path` is the format.

    Raises:
        BackendError: matplotlib is not installed.
        ValueError: it has no such format.
        OSError: the file cannot be written.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    lossless = found.exact
    for family in dict.fromkeys(row.lever.family for row in found.rows[1:]):
        rows = [lossless, *(row for row in found.rows[1:] if row.lever.family == family)]
        changes = [found.change(row) for row in rows]
        kib = [row.bytes_per_token / 1024 for row in rows]
        errors = [100 * (change.perplexity_error or 0.0) for change in changes]
        axes.errorbar(kib, [100 * change.perplexity for change in changes], errors, fmt="o-", capsize=3, label=family)
        for row, x, change in zip(rows[1:], kib[1:], changes[1:], strict=True):
            at = (x, 100 * change.perplexity)
            axes.annotate(f" {row.lever.strength}", at, xytext=(3, 3), textcoords="offset points", fontsize=8)
    axes.plot([lossless.bytes_per_token / 1024], [0], "ks", label="exact")
    axes.set(xlabel="KiB of experts read per decoded token", ylabel="change of perplexity, % (bars: standard error)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"{found.model}, {found.resident_share:.0%} of the experts in memory", fontsize=10)
    figure.savefig(path, dpi=120)
