# SPDX-License-Identifier: MIT
"""`edgemoe price`: what a reuse bias costs in perplexity and saves in bytes, with this model and these texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemoe.cli.console import Progress, Settings, find_model, print_json
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
from edgemoe.sizes import format_size

if TYPE_CHECKING:
    from edgemoe.price import Price


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
    default=(0.05, 0.1, 0.15, 0.3),
    metavar="0..1,...",
    help="The settings, one row each.  [default: 0.05,0.1,0.15,0.3]",
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
    strengths: tuple[float, ...],
    methods: tuple[str, ...],
    top_j: int | None,
    experts: float | None,
    memory: int | None,
    n_tokens: int,
    n_prompt_tokens: int,
    eviction: str,
    prefetch: str,
    kernels: str,
    n_threads: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure what a reuse bias costs and saves: perplexity, KL and agreement against bytes read.

    Texts are stepped one token at a time through the real cache. Files behind MODEL are texts as well, so
    `edgemoe price MODEL --text *.txt` takes them all. The first row is exact.
    """
    if experts is not None and memory is not None:
        raise click.UsageError("Give at most one of --experts and --memory.")
    if n_tokens < n_prompt_tokens + 2:
        raise click.UsageError(
            f"--tokens {n_tokens} leaves nothing to decode behind --prompt-tokens {n_prompt_tokens}."
        )
    path = find_model(model)
    from edgemoe import price as prices

    with Progress() as progress:
        found = prices.price(
            path,
            [*texts, *more_texts],
            [prices.Lever(s, m, top_j) for m in dict.fromkeys(methods) for s in strengths],
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


def table(found: Price) -> str:
    """One line for each row; the change of perplexity is in percent, with its standard error."""
    lines = [
        "method       bias  perplexity  change %  +- s.e.  KL nats  agree %  changed %  mass %  KiB/token  of exact  "
        "hit %   tok/s"
    ]
    for row in found.rows:
        change = found.change(row)
        is_exact = row.lever.reuse_bias is None
        error = change.perplexity_error
        ratio = found.bytes_ratio(row)
        of_exact = "-" if ratio is None else f"{ratio:.3f}"
        lines.append(
            f"{'exact' if is_exact else row.lever.reuse_method:<11}"
            f"{'off' if is_exact else format(row.lever.reuse_bias, '.3g'):>6}"
            f"{row.perplexity:>12.4f}{100 * change.perplexity:>+10.2f}"
            f"{'-' if error is None else format(100 * error, '.2f'):>9}"
            f"{row.kl:>9.4f}{100 * row.agreement:>9.1f}{100 * row.selections_changed:>11.1f}"
            f"{100 * row.gate_mass_moved:>8.1f}{row.bytes_per_token / 1024:>11.1f}{of_exact:>10}"
            f"{100 * row.hit_rate:>7.1f}{row.tokens_per_s:>8.1f}"
        )
    return "\n".join(lines)
