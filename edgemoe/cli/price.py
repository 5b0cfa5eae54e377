# SPDX-License-Identifier: MIT
"""`edgemoe price`: what a lossy lever costs in perplexity and saves in bytes, with this model and these texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemoe.cli.console import Progress, Settings, find_model, print_json, say
from edgemoe.cli.options import (
    EVICTIONS,
    PREFETCH_DEPTHS,
    REUSE_METHODS,
    json_option,
    kernels_option,
    memory_option,
    model_argument,
    plot_option,
    threads_option,
)
from edgemoe.price_change import ADVISED_TEXTS
from edgemoe.sizes import format_size

if TYPE_CHECKING:
    from edgemoe.levers import Lever
    from edgemoe.price_list import Price

DEFAULT_STRENGTHS = (0.05, 0.1, 0.15, 0.3)


class StrengthsType(click.ParamType[tuple[float, ...]]):
    """Numbers from 0 to 1 with commas between them."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        strengths = []
        for part in str(value).split(","):
            try:
                strength = float(part)
            except ValueError:
                self.fail(f"{part.strip()!r} is not a number.", param, ctx)
            if not 0 <= strength <= 1:
                self.fail(f"{part.strip()} is not from 0 (exact) to 1.", param, ctx)
            strengths.append(strength)
        return tuple(dict.fromkeys(strengths))


class LeverType(click.ParamType["Lever"]):
    """A lever as it is written: `reuse_bias=0.1,top_j=1`."""

    name = "lever"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Lever:
        from edgemoe import levers

        try:
            return value if isinstance(value, levers.Lever) else levers.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@model_argument
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    metavar="FILE...",
    help="Texts to predict, of the kind the model is for; more of them give a standard error.",
)
@click.argument("more_texts", nargs=-1, type=click.Path(path_type=Path), metavar="")
@click.option(
    "--reuse-bias",
    "strengths",
    type=StrengthsType(),
    metavar="0..1,...",
    help="A row for each of these.  [default: 0.05,0.1,0.15,0.3 unless there are --levers]",
)
@click.option(
    "--reuse-method",
    "methods",
    type=REUSE_METHODS,
    multiple=True,
    default=("cache-prior",),
    help="As for generate; may be repeated.  [default: cache-prior]",
)
@click.option("--top-j", type=click.IntRange(min=1), metavar="J", help="As for generate.  [default: 1 or 2]")
@click.option(
    "--levers",
    type=LeverType(),
    multiple=True,
    metavar="NAME=VALUE,...",
    help="A row for these keywords of Llama, as reuse_bias=0.1,top_j=1; may be repeated. model=PATH measures a copy of "
    "MODEL with other routers.",
)
@click.option(
    "--experts",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Of all experts, the share that memory holds (0.25), whatever else the process takes; instead of --memory.",
)
@memory_option
@click.option("--tokens", "n_tokens", type=click.IntRange(min=4), default=512, show_default=True, help="Of each text.")
@click.option(
    "--prompt-tokens",
    "n_prompt_tokens",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="Of these, evaluated at once, exactly, before decoding begins.",
)
@click.option(
    "--eviction",
    type=EVICTIONS,
    default="auto",
    show_default=True,
    help="As for generate.",
)
@click.option(
    "--prefetch",
    type=PREFETCH_DEPTHS,
    default="off",
    show_default=True,
    help="As for generate. Unless off, what is read and what is resident depends on timing.",
)
@click.option(
    "--remember/--no-remember",
    default=True,
    show_default=True,
    help="Keep what was measured of reuse biases, without the texts, for --reuse-price of generate and chat.",
)
@kernels_option
@threads_option
@plot_option
@json_option
@click.pass_obj
def price(
    settings: Settings,
    model: Path | None,
    texts: tuple[Path, ...],
    more_texts: tuple[Path, ...],
    strengths: tuple[float, ...] | None,
    methods: tuple[str, ...],
    top_j: int | None,
    levers: tuple[Lever, ...],
    experts: float | None,
    memory: int | None,
    n_tokens: int,
    n_prompt_tokens: int,
    eviction: str,
    prefetch: str,
    remember: bool,
    kernels: str,
    n_threads: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure what lossy levers cost and save: perplexity, KL and agreement against bytes read.

    Texts are stepped one token at a time through the real cache. Files behind MODEL are texts as well, so
    `edgemoe price MODEL --text *.txt` takes them all. The first row is exact.
    """
    if experts is not None and memory is not None:
        raise click.UsageError("Give at most one of --experts and --memory.")
    if n_tokens < n_prompt_tokens + 2:
        raise click.UsageError(
            f"--tokens {n_tokens} leaves nothing to decode behind --prompt-tokens {n_prompt_tokens}."
        )
    if strengths is None:
        strengths = () if levers else DEFAULT_STRENGTHS
    path = find_model(model)
    from edgemoe import levers as kinds
    from edgemoe import price as prices

    biases = [
        # The default method is not named: it is what reuse_bias alone means.
        kinds.Lever.of(reuse_bias=s, reuse_method=None if m == "cache-prior" else m, top_j=top_j)
        for m in dict.fromkeys(methods)
        for s in strengths
    ]
    with Progress() as progress:
        found = prices.price(
            path,
            [*texts, *more_texts],
            list(dict.fromkeys([*biases, *levers])),
            experts=experts,
            memory=memory,
            n_prompt_tokens=n_prompt_tokens,
            n_tokens=n_tokens,
            prefetch=prefetch,
            eviction=eviction,
            kernels=kernels,
            progress=progress,
            verbose=settings.verbose,
            n_threads=n_threads,
        )
    n_texts = len(found.texts)
    if n_texts < ADVISED_TEXTS:
        say(
            f"edgemoe: {'one text gives no' if n_texts == 1 else f'{n_texts} texts give a wide'} confidence interval: "
            f"use {ADVISED_TEXTS} or more"
        )
    if remember:
        _remember(found, path)
    if plot is not None:
        from edgemoe.cli.price_plot import draw

        draw(found, plot)
    if as_json:
        print_json(found.to_dict())
        return
    click.echo(
        f"{found.model}: {found.exact.n_tokens} tokens of {len(found.texts)} texts, each behind an exact prompt of "
        f"{found.n_prompt_tokens}; {format_size(found.slots_bytes)} for experts, {found.resident_share:.0%} of them"
    )
    click.echo(table(found))


def _remember(found: Price, path: Path) -> None:
    """Keep the curves, and say so; a measurement that cannot be kept is still printed."""
    from edgemoe import price as prices

    try:
        kept = prices.remember(found, path)
    except (OSError, RuntimeError) as error:
        say(f"edgemoe: cannot remember what was measured for --reuse-price: {error}")
        return
    for curve in kept:
        say(
            f"edgemoe: remembered for --reuse-price: {len(curve.points)} reuse biases, {curve.method}, top-j "
            f"{curve.top_j}, {curve.resident_share:.0%} of the experts in memory"
        )


def table(found: Price) -> str:
    """One line for each row; the change of perplexity is in percent, with its standard error and 95 % interval.

    How many experts were replaced or left out is shown where any were.
    """
    width = max(len(row.lever.name) for row in found.rows)
    counts = [
        (title, [getattr(row, name) for row in found.rows])
        for title, name in (("low-bit", "lowbit_hits"), ("skipped", "skipped_experts"))
    ]
    counts = [(title, values) for title, values in counts if any(values)]
    lines = [
        f"{'lever':<{width}}  perplexity  change %  +- s.e.    95 % interval  KL nats  agree %  changed %  mass %  "
        "KiB/token  of exact  hit %   tok/s" + "".join(f"{title:>10}" for title, _ in counts)
    ]
    for i, row in enumerate(found.rows):
        change = found.change(row)
        error, interval, ratio = change.perplexity_error, change.perplexity_interval, found.bytes_ratio(row)
        between = "-" if interval is None else "..".join(f"{100 * end:+.2f}" for end in interval)
        lines.append(
            f"{row.lever.name:<{width}}{row.perplexity:>12.4f}{100 * change.perplexity:>+10.2f}"
            f"{'-' if error is None else format(100 * error, '.2f'):>9}{between:>17}"
            f"{row.kl:>9.4f}{100 * row.agreement:>9.1f}{100 * row.selections_changed:>11.1f}"
            f"{100 * row.gate_mass_moved:>8.1f}{row.bytes_per_token / 1024:>11.1f}"
            f"{'-' if ratio is None else format(ratio, '.3f'):>10}{100 * row.hit_rate:>7.1f}{row.tokens_per_s:>8.1f}"
            + "".join(f"{values[i]:>10}" for _, values in counts)
        )
    return "\n".join(lines)
