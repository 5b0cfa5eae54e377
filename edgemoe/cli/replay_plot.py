# SPDX-License-Identifier: MIT
"""Curves of replays: hit rate and predicted tokens per second against memory, for each policy, with the bound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.plots import new_figure

if TYPE_CHECKING:
    from edgemoe.replay import ReplayResult


def draw(results: Sequence[ReplayResult], bank_bytes: int, title: str, path: Path) -> None:
    """Write the curves; the suffix of `path` is the format.

    Raises:
        BackendError: matplotlib is not installed.
        ValueError: it has no such format.
        OSError: the file cannot be written.
    """
    figure = new_figure(10, 4)
    hits, rates = figure.subplots(1, 2)
    for policy in dict.fromkeys(r.policy for r in results):
        mine = sorted((r for r in results if r.policy == policy), key=lambda r: r.slots_bytes)
        shares = [100 * r.slots_bytes / bank_bytes for r in mine]
        style = "k--" if policy == "belady" else "o-"
        hits.plot(shares, [100 * r.decode.hit_rate for r in mine], style, label=policy)
        rates.plot(shares, [r.decode.tokens_per_s for r in mine], style, label=policy)
    by_share = sorted({r.slots_bytes: r for r in results}.values(), key=lambda r: r.slots_bytes)
    hits.plot(
        [100 * r.slots_bytes / bank_bytes for r in by_share],
        [100 * r.bound_hit_rate for r in by_share],
        "k:",
        label="bound (projections, whole trace)",
    )
    for axes, label in ((hits, "hit rate, %"), (rates, "predicted tokens/s")):
        axes.set(xlabel="experts in memory, %", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
