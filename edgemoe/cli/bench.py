# SPDX-License-Identifier: MIT
"""`edgemoe bench`: a model on this machine, beside stock llama.cpp, and what would make it faster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from edgemoe.cli.console import Progress, Settings, find_model, print_json, say
from edgemoe.cli.generate import read_prompt
from edgemoe.cli.options import json_option, load_options, model_argument
from edgemoe.cli.profile import PART_TITLES

if TYPE_CHECKING:
    from edgemoe.bench import Benchmark, Spread

MIB = 1 << 20
ROWS = (
    ("decode tok/s", "decode_tokens_per_s", 1.0, 2),
    ("prefill tok/s", "prefill_tokens_per_s", 1.0, 1),
    ("TTFT s", "ttft_s", 1.0, 2),
    ("load s", "load_s", 1.0, 2),
    ("MiB read per token", "read_bytes_per_token", 1 / MIB, 2),
    ("experts in memory %", "hit_rate", 100.0, 1),
    ("waiting %", "stall_share", 100.0, 1),
    ("memory peak MiB", "peak_bytes", 1 / MIB, 0),
)


# What an earlier run has left would help edgemoe with the very text that it read then.
@click.command(context_settings={"default_map": {"warm_start": False}})
@model_argument
@click.option(
    "--against",
    type=click.Choice(["stock", "none"]),
    default="stock",
    show_default=True,
    help="What to compare with: llama.cpp as it comes, or nothing.",
)
@click.option("--pairs", type=click.IntRange(min=1), default=5, show_default=True, metavar="N", help="Runs of each.")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=2), default=256, show_default=True, metavar="N", help="Tokens to read."
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="Tokens to generate."
)
@click.option("-f", "--file", type=click.File("rb"), metavar="FILE", help="Text to read.  [default: built in]")
@load_options
@json_option
@click.pass_obj
def bench(
    settings: Settings,
    model: Path | None,
    against: str,
    pairs: int,
    prompt_tokens: int,
    tokens: int,
    file: BinaryIO | None,
    as_json: bool,
    load: dict[str, Any],
) -> None:
    """Measure a model on this machine, and say what would make it faster.

    Each run is a process of its own; runs alternate, and start with the model's file out of the page cache. Both
    engines read the same text, token by token, with the same threads. With --memory, and as root, both are held to it
    by a memory cgroup. A run more takes a profile. Close other programs first.
    """
    path = find_model(model)
    from edgemoe.bench import bench as run_bench

    text = None if file is None else read_prompt(file)
    sizes: dict[str, Any] = {"pairs": pairs, "prompt_tokens": prompt_tokens, "tokens": tokens}
    with Progress() as progress:
        found = run_bench(path, against=against, text=text, progress=progress, **sizes, **load)
    if as_json:
        print_json(found.to_dict())
    else:
        click.echo(bench_report(found))
    for note in found.notes:
        say(f"edgemoe: {note}")


def bench_report(found: Benchmark) -> str:
    """A benchmark as lines of text: the comparison, where the time goes, what would help."""
    settings = found.settings
    lines = [
        f"{found.model}: {settings['prompt_tokens']} + {settings['tokens']} tokens, {settings['pairs']} runs of each, "
        f"{settings['n_threads']} threads, kernels {settings['kernels']}; median [lowest - highest]",
        "  " + f"{'':<20}" + "".join(f"{engine:>28}" for engine in found.engines) + f"{'edgemoe / stock':>24}",
    ]
    for title, name, scale, digits in ROWS:
        cells = [_cell(figures.get(name), scale, digits) for figures in found.engines.values()]
        ratio = _cell(found.ratios[name], 1.0, 2) if name in found.ratios else ""
        lines.append(f"  {title:<20}" + "".join(f"{cell:>28}" for cell in cells) + f"{ratio:>24}".rstrip())
    if found.same_next_token is not None:
        lines.append(f"  both would say the same next token at {found.same_next_token:.1%} of the positions")
    lines += ["", "where the time of a token goes (one run more, profiled)"]
    decode = found.profile["decode"]
    n_tokens, wall_s = decode["n_tokens"], decode["wall_s"]
    for name, title in PART_TITLES.items():
        seconds = decode[f"{name}_s"]
        lines.append(f"  {title:<20}{1e3 * seconds / n_tokens:10.2f} ms{seconds / wall_s:8.1%}")
    lines.append(
        f"  experts: {min(settings['slots_bytes'] / settings['expert_bank_bytes'], 1):.0%} fit into memory; "
        f"disk {found.disk_bytes_per_s / MIB:.0f} MiB/s in random reads as large as one expert's matrix"
    )
    lines += ["", "what would help, by prediction"]
    for one in found.advice:
        lines.append(f"  {one.gain:.2f} x  {one.change}: {one.tokens_per_s:.2f} tok/s")
        lines.append(f"          {one.because}")
    if not found.advice:
        lines.append("  nothing that edgemoe knows of: computing takes the time, on all cores, with few bits a weight")
    return "\n".join(lines)


def _cell(spread: Spread | None, scale: float, digits: int) -> str:
    if spread is None:
        return "-"
    low, median, high = (f"{value * scale:.{digits}f}" for value in (spread.low, spread.median, spread.high))
    return f"{median} [{low} - {high}]"
