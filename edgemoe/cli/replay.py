# SPDX-License-Identifier: MIT
"""`edgemoe replay`: what a recorded run would have cost with other memory, another cache or another disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.console import print_json
from edgemoe.cli.options import EVICTIONS, PREFETCH_DEPTHS, json_option, plot_option
from edgemoe.errors import BudgetError, TraceError
from edgemoe.sizes import format_size, parse_size

if TYPE_CHECKING:
    from edgemoe.replay import ReplayResult
    from edgemoe.replay_calibration import Calibration
    from edgemoe.trace import Trace

MIB = 1 << 20
POLICIES = (*EVICTIONS.choices, "belady")


class ShareOrSizeType(click.ParamType[str]):
    """A share such as `25%`, or a size such as `1.5GiB`; its value is the text, checked."""

    name = "size or share"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip()
        try:
            if not text.endswith("%"):
                parse_size(text)
            elif not 0 < float(text[:-1]) <= 100:
                self.fail(f"{text!r} is not above 0% and up to 100%.", param, ctx)
        except BudgetError as error:
            self.fail(str(error), param, ctx)
        except ValueError:
            self.fail(f"{text!r} is not a share: write it as 25%.", param, ctx)
        return text


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--policy",
    "policies",
    type=click.Choice([*POLICIES, "all"]),
    multiple=True,
    default=("all",),
    help="Which expert goes first; may be repeated. belady knows the future: the best there is.  [default: all]",
)
@click.option(
    "--memory",
    "memories",
    type=ShareOrSizeType(),
    multiple=True,
    default=("12%", "25%", "50%"),
    metavar="SIZE",
    help="Memory for experts alone: 1.5GiB, or 25% of them all; may be repeated.  [default: 12%, 25%, 50%]",
)
@click.option(
    "--prefetch",
    type=PREFETCH_DEPTHS,
    default="off",
    show_default=True,
    help="Layers to read ahead, by predictions as good as --recall says; auto: as many as pay.",
)
@click.option(
    "--recall",
    type=click.FloatRange(0, 1),
    help="Share foreseen, by chance.  [default: what the trace foresaw, or 0.886]",
)
@click.option(
    "--disk-mib-per-s",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the disk.  [default: as the trace was recorded, or 954]",
)
@click.option("--latency-us", type=click.FloatRange(min=0), help="Of a read, before its bytes flow.  [default: 213]")
@click.option(
    "--readers", type=click.IntRange(min=1), help="Reads under way at once.  [default: as the trace was recorded, or 4]"
)
@click.option(
    "--dense-us",
    type=click.FloatRange(min=0),
    help="A layer without its routed experts.  [default: as the trace was recorded, or 760]",
)
@click.option(
    "--expert-us",
    type=click.FloatRange(min=0),
    help="One expert.  [default: its bytes at 26 GB/s]",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the predictions.")
@plot_option
@json_option
def replay(
    trace: Path,
    policies: tuple[str, ...],
    memories: tuple[str, ...],
    prefetch: str,
    recall: float | None,
    disk_mib_per_s: float | None,
    latency_us: float | None,
    readers: int | None,
    dense_us: float | None,
    expert_us: float | None,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Replay a TRACE on a simulated disk and show hits, bytes, waiting and tokens per second.

    The cache is the real one; disk and computing only take time: as long as they took when the trace was recorded,
    unless options say otherwise. The bound is what no cache of that size can beat.
    """
    from edgemoe import replay as replays
    from edgemoe import trace as traces

    loaded = traces.load(trace)
    calibration, problem = _calibration(loaded)
    disk_options = _given(
        bytes_per_s=disk_mib_per_s and disk_mib_per_s * MIB,
        latency_us=latency_us,
        n_readers=readers,
    )
    compute_options = _given(dense_us=dense_us, expert_us=expert_us)
    disk = dataclasses.replace(calibration.disk if calibration else replays.Disk(), **disk_options)
    compute = dataclasses.replace(calibration.compute if calibration else replays.Compute(), **compute_options)
    bank_bytes = replays.bank_bytes(loaded)
    results = [
        replays.replay(
            loaded,
            slots_bytes=slots_bytes,
            eviction=policy,
            prefetch=prefetch,
            recall=recall,
            seed=seed,
            disk=disk,
            compute=compute,
        )
        for slots_bytes in (_slots_bytes(m, bank_bytes) for m in memories)
        for policy in (POLICIES if "all" in policies else tuple(dict.fromkeys(policies)))
    ]
    if plot is not None:
        from edgemoe.cli.replay_plot import draw

        draw(results, bank_bytes, loaded.model, plot)
    if as_json:
        print_json(
            {
                "model": loaded.model,
                "n_tokens": loaded.n_tokens,
                "bank_bytes": bank_bytes,
                "cycle_bytes": replays.cycle_bytes(loaded),
                "disk": dataclasses.asdict(disk),
                "compute": dataclasses.asdict(compute),
                "given": sorted([*disk_options, *compute_options, *_given(recall=recall)]),
                "calibration": calibration and calibration.to_dict(),
                "calibration_problem": problem,
                "results": [r.to_dict() for r in results],
            }
        )
        return
    click.echo(
        f"{loaded.model}: {loaded.n_tokens} tokens, experts of {format_size(bank_bytes)}, "
        f"of which one token uses {format_size(replays.cycle_bytes(loaded))}"
    )
    click.echo(
        f"disk: {disk.bytes_per_s / MIB:.0f} MiB/s, {disk.latency_us:.0f} us, {disk.n_readers} reads at once; "
        f"computing: {replays.token_us(loaded, compute) / 1e3:.1f} ms/token, "
        f"{compute.hold_up_us_per_mib / 1e3:.3f} ms more for each MiB read"
    )
    given = ", ".join(sorted([*disk_options, *compute_options]))
    source = f"found by {calibration.n_tokens} tokens of the trace" if calibration else f"defaults: {problem}"
    click.echo(f"{source}; given: {given}" if given else source)
    click.echo(table(results, bank_bytes))


def table(results: Sequence[ReplayResult], bank_bytes: int) -> str:
    """One line for each replay: of its decode, but for the bound, which is the whole trace's."""
    lines = ["   slots  share  policy       hit %  bound %  MiB/token  stall ms/token   tok/s"]
    for r in results:
        n = max(1, r.decode.n_tokens)
        lines.append(
            f"{format_size(r.slots_bytes):>8}{r.slots_bytes / bank_bytes:>7.0%}  {r.policy:<12}"
            f"{100 * r.decode.hit_rate:>6.1f}{100 * r.bound_hit_rate:>9.1f}"
            f"{r.decode.bytes_read / n / MIB:>11.1f}{r.decode.stall_us / n / 1000:>16.1f}"
            f"{r.decode.tokens_per_s:>8.2f}"
        )
    return "\n".join(lines)


def _calibration(trace: Trace) -> tuple[Calibration | None, str | None]:
    """What the trace says about its machine, or why it says nothing."""
    from edgemoe.replay_calibration import calibrate

    try:
        return calibrate(trace), None
    except TraceError as error:
        return None, str(error)


def _given(**options: Any) -> dict[str, Any]:
    """Options that were given; the others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _slots_bytes(memory: str, bank_bytes: int) -> int:
    return int(bank_bytes * float(memory[:-1]) / 100) if memory.endswith("%") else parse_size(memory)
