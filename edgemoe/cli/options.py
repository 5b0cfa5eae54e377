# SPDX-License-Identifier: MIT
"""Arguments and options that several commands share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from edgemoe.errors import BudgetError
from edgemoe.sizes import parse_size

CTX_STEP = 256
"""llama.cpp rounds a context up to a multiple of this."""

UNLIMITED = -1
"""The value of `-n` that means: until the context is full."""


class SizeType(click.ParamType[int]):
    """A size such as `1.5GiB`, `1500MB` or an integer of bytes; its value is bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value if isinstance(value, int) else str(value))
        except BudgetError as error:
            self.fail(str(error), param, ctx)


class TokenCountType(click.ParamType[int]):
    """A positive number of tokens, or -1 for no limit but the context."""

    name = "integer"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            n_tokens = int(str(value))
        except ValueError:
            self.fail(f"{value!r} is not an integer.", param, ctx)
        if n_tokens < 1 and n_tokens != UNLIMITED:
            self.fail(f"{n_tokens} is neither positive nor -1 (until the context is full).", param, ctx)
        return n_tokens


def _round_up_ctx(_ctx: click.Context, _param: click.Parameter, n_ctx: int) -> int:
    """Round as llama.cpp does by itself, so that plans are true; llama-cpp-python overruns its buffer otherwise."""
    return -(-n_ctx // CTX_STEP) * CTX_STEP


def _check_draft(_ctx: click.Context, _param: click.Parameter, draft: str) -> str:
    if draft not in ("off", "ngram") and not Path(draft).is_file():
        raise click.BadParameter(f"{draft!r} is neither off nor ngram nor a file.")
    return draft


@contextlib.contextmanager
def _said_by_click() -> Iterator[None]:
    """Within: what makes no sense is a wrong parameter."""
    try:
        yield
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _check_reuse_bias(_ctx: click.Context, _param: click.Parameter, reuse_bias: str) -> str:
    if reuse_bias != "off":
        from edgemoe import price_curve

        with _said_by_click():
            price_curve.parse(reuse_bias)
    return reuse_bias


def _check_reuse_price(ctx: click.Context, _param: click.Parameter, reuse_price: str | None) -> float | None:
    if reuse_price is None:
        return None
    from edgemoe import price_curve

    with _said_by_click():
        price = price_curve.parse_price(reuse_price)
    is_given = ctx.get_parameter_source("reuse_bias") is click.core.ParameterSource.COMMANDLINE
    if is_given and ctx.params["reuse_bias"] != "auto":
        raise click.BadParameter(f"it excludes --reuse-bias {ctx.params['reuse_bias']}: give one, or auto.")
    return price


def _check_expert_top_k(_ctx: click.Context, _param: click.Parameter, expert_top_k: str) -> str:
    if expert_top_k != "off":
        from edgemoe import expert_count

        with _said_by_click():
            expert_count.parse(expert_top_k)
    return expert_top_k


def _check_together(load: dict[str, Any]) -> None:
    """Refuse lossy options that exclude each other, or of which one lacks another."""
    from edgemoe import choosers

    names = [field.name for field in dataclasses.fields(choosers.Keywords)]
    try:
        choosers.parse(choosers.Keywords(**{name: load[name] for name in names}))
    except ValueError as error:
        raise click.UsageError(str(error)) from error


model_argument = click.argument("model", required=False, type=click.Path(path_type=Path))
memory_option = click.option(
    "--memory",
    type=SizeType(),
    metavar="SIZE",
    help="Memory budget of the process: 1.5GiB, 1500MB or bytes.  [default: what the machine can spare]",
)
ctx_option = click.option(
    "--ctx",
    "n_ctx",
    type=click.IntRange(min=1),
    callback=_round_up_ctx,
    default=4096,
    show_default=True,
    metavar="N",
    help="Context: tokens of prompt and answer together; rounded up to a multiple of 256.",
)
threads_option = click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads that compute.  [default: the fast physical cores]",
)
kernels_option = click.option(
    "--kernels",
    type=click.Choice(["auto", "ggml"]),
    default="auto",
    show_default=True,
    help="Who multiplies by experts: edgemoe's kernels where a format has them, or ggml, with llama.cpp's exact bits.",
)
prompt_file_option = click.option(
    "-f",
    "--file",
    type=click.File("rb"),
    metavar="FILE",
    help="Read the prompt from a file, - for stdin; one newline at its end is left out.",
)
n_tokens_option = click.option(
    "-n",
    "n_tokens_max",
    type=TokenCountType(),
    default=256,
    show_default=True,
    metavar="N",
    help="Most tokens to generate; -1: until the context is full.",
)
EVICTIONS = click.Choice(["auto", "lru", "lfu", "least-stale", "utility"])
PREFETCH_DEPTHS = click.Choice(["off", "auto", "1", "2"])
ON_MISS = click.Choice(["wait", "lowbit", "skip"])
REUSE_METHODS = click.Choice(["cache-prior", "max-rank", "cumulative"])
plot_option = click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: PNG, SVG or PDF.")
# By the names of `Llama`'s keywords.
_LOAD_OPTIONS = {
    "n_ctx": ctx_option,
    "memory": memory_option,
    "n_threads": threads_option,
    "kernels": kernels_option,
    "eviction": click.option(
        "--eviction",
        type=EVICTIONS,
        default="auto",
        show_default=True,
        help="Which expert leaves first: the least recently or frequently used (auto: either), or by two papers.",
    ),
    "prefetch": click.option(
        "--prefetch",
        type=PREFETCH_DEPTHS,
        default="auto",
        show_default=True,
        help="How many layers ahead experts are predicted, kept and read; auto: as many as pays by the clock.",
    ),
    "draft": click.option(
        "--draft",
        metavar="off|ngram|PATH",
        callback=_check_draft,
        default="off",
        show_default=True,
        help="Evaluate several tokens at once where that is faster: what followed the same words earlier in the text "
        "(ngram), or what a small GGUF model of the same vocabulary writes next (its path).",
    ),
    "reuse_bias": click.option(
        "--reuse-bias",
        metavar="off|auto|0..1",
        callback=_check_reuse_bias,
        default="off",
        show_default=True,
        is_eager=True,  # the price is checked against it
        help="While decoding, prefer experts that need not be read, up to a bound. LOSSY: it changes the answer; its "
        "price is printed. auto: as much as --reuse-price allows.",
    ),
    "reuse_price": click.option(
        "--reuse-price",
        metavar="PERCENT",
        callback=_check_reuse_price,
        help="What --reuse-bias auto, which it implies, may cost: 1% (or 0.01) more perplexity, by what "
        "`edgemoe price` has measured of this model.  [default: 1%]",
    ),
    "reuse_method": click.option(
        "--reuse-method",
        type=REUSE_METHODS,
        default="cache-prior",
        show_default=True,
        help="How they are preferred: higher scores, or first among the best ranks, or among most of the mass.",
    ),
    "top_j": click.option(
        "--top-j",
        type=click.IntRange(min=1),
        metavar="J",
        help="With a reuse bias, so many of the best experts are always chosen.  [default: 1 or 2]",
    ),
    "expert_top_k": click.option(
        "--expert-top-k",
        metavar="off|K|RULE",
        callback=_check_expert_top_k,
        default="off",
        show_default=True,
        help="While decoding, use fewer experts: K; top-p:P for the best with that share of the weight; map for those "
        "with a positive logit; lexi:MEAN[@FILE] for what each layer can spare. LOSSY: it changes the answer.",
    ),
    "on_miss": click.option(
        "--on-miss",
        type=ON_MISS,
        default="wait",
        show_default=True,
        help="While decoding, what becomes of an expert that must be read and matters little: waited for, its low-bit "
        "copy used, or left out. LOSSY, but for wait.",
    ),
    "on_miss_mass": click.option(
        "--on-miss-mass",
        type=click.FloatRange(0.0, 1.0),
        default=0.6,
        show_default=True,
        metavar="0..1",
        help="It matters little if experts with so much of the token's mixing weight come before it.",
    ),
    "on_miss_skip_mass": click.option(
        "--on-miss-skip-mass",
        type=click.FloatRange(0.0, 1.0),
        metavar="0..1",
        help="Behind so much not even its low-bit copy is used.  [default: 0.9]",
    ),
    "lowbit": click.option(
        "--lowbit",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="The model's low-bit copy, as `edgemoe convert lowbit` makes it.",
    ),
    "warm_start": click.option(
        "--warm-start/--no-warm-start",
        default=True,
        show_default=True,
        help="Read the experts that were hot at the last run into free memory at once, and remember them for the next.",
    ),
}


LOAD_NAMES = tuple(_LOAD_OPTIONS)
"""The names of the options that say how a model is loaded."""


def load_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how a model is loaded; the command gets them as one dictionary `load` of `Llama`'s keywords."""

    @functools.wraps(command)
    def with_load(*args: Any, **kwargs: Any) -> Any:
        load = {name: kwargs.pop(name) for name in _LOAD_OPTIONS}
        model = kwargs.get("model")
        if model is None or not model.is_dir():  # a folder takes none of these; to check them loads llama.cpp
            _check_together(load)
        return command(*args, **kwargs, load=load)

    for option in reversed(_LOAD_OPTIONS.values()):
        with_load = option(with_load)
    return with_load


temperature_option = click.option(
    "--temperature",
    type=click.FloatRange(min=0.0),
    default=0.8,
    show_default=True,
    metavar="T",
    help="Randomness of sampling; 0 always takes the likeliest token.",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    metavar="S",
    help="Seed of sampling.  [default: another one each time]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
