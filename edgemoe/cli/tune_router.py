# SPDX-License-Identifier: MIT
"""`edgemoe tune-router`: train the routers of a model, and nothing else of it, so that tokens reuse experts."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.console import Progress, find_model, print_json, say
from edgemoe.cli.repack import EXISTING_FILE, FILE, check_out, read_text
from edgemoe.converters.tuning_settings import METHODS, Settings
from edgemoe.errors import ConversionError
from edgemoe.sizes import format_size

if TYPE_CHECKING:
    from edgemoe.converters.tune_router import Quality

_DEFAULTS = Settings()
_PACKAGES = ("torch", "transformers")


@click.command("tune-router")
@click.argument("source", metavar="SRC.gguf", type=FILE)
@click.argument("out", metavar="OUT.gguf", type=FILE)
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="The Hugging Face checkpoint that SRC was converted from.",
)
@click.option(
    "--text",
    "texts",
    type=EXISTING_FILE,
    multiple=True,
    required=True,
    metavar="FILE...",
    help="UTF-8 texts of all kinds that the model is for; a tenth of each is held out.",
)
@click.argument("more_texts", nargs=-1, type=EXISTING_FILE, metavar="")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=_DEFAULTS.method,
    show_default=True,
    help="Besides reuse, stay near the text (remoe) or near the original model's answers (kd); or the text alone and "
    "no reuse, the control (ce).",
)
@click.option(
    "--steps",
    "n_steps",
    default=_DEFAULTS.n_steps,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Steps of training.",
)
@click.option(
    "--reuse-weight",
    default=_DEFAULTS.reuse_weight,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="W",
    help="How much reuse counts.",
)
@click.option(
    "--anchor-weight",
    default=_DEFAULTS.anchor_weight,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="W",
    help="remoe: how much nearness to the original routers counts.",
)
@click.option(
    "--cached-experts",
    type=click.IntRange(min=1),
    metavar="N",
    help="Reward experts among the N of a layer that were used last, such as those that memory will hold.  "
    "[default: as many as a token uses, the last token's]",
)
@click.option(
    "--rate", default=_DEFAULTS.rate, show_default=True, type=click.FloatRange(0, 1), metavar="R", help="Learning rate."
)
@click.option(
    "--batch",
    "n_windows",
    default=_DEFAULTS.n_windows,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Windows of text of a step.",
)
@click.option(
    "--context",
    "window_tokens",
    default=_DEFAULTS.window_tokens,
    show_default=True,
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens of a window.",
)
@click.option(
    "--seed",
    default=_DEFAULTS.seed,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="S",
    help="Of the order of the windows.",
)
@click.option("--threads", "n_threads", type=click.IntRange(min=1), metavar="N", help="Threads.  [default: torch's]")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON on stdout.")
def tune_router(
    source: Path,
    out: Path,
    checkpoint: Path,
    texts: tuple[Path, ...],
    more_texts: tuple[Path, ...],
    method: Any,
    n_threads: int | None,
    force: bool,
    as_json: bool,
    **numbers: Any,
) -> None:
    """Train the routers of SRC so that tokens reuse the experts of those before them. It changes answers.

    OUT is SRC with other numbers in its routers, and a model like any other. Needs the extra [train], and the
    checkpoint in float32 in memory. What it gains and costs with your texts: docs/tuning.md.
    """
    find_model(source)
    check_out(source, out, force=force)
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConversionError(
            f"cannot tune routers: {' and '.join(missing)} cannot be imported, expected the packages of the extra "
            "[train]; pip install 'edgemoe[train]'"
        )
    contents = [read_text(path) for path in (*texts, *more_texts)]
    import torch

    from edgemoe.converters.tune_router import tune

    if n_threads is not None:
        torch.set_num_threads(n_threads)
    settings = Settings(method=method, **numbers)
    with Progress() as progress:

        def show(step: int, loss: float | None, quality: Quality) -> None:
            of_step = "" if loss is None else f", loss {loss:.4f}"
            progress.say(f"edgemoe: step {step} of {settings.n_steps}{of_step}; held out: {_describe(quality)}")

        report = tune(checkpoint, source, out, contents, settings, progress=progress, on_quality=show)
    click.echo(f"{out} ({format_size(out.stat().st_size)}): {report.n_routers} routers of {method}", err=as_json)
    for name, quality in (("before", report.before), ("after", report.after)):
        click.echo(f"{name:7}{_describe(quality)}", err=as_json)
    if report.after.cross_entropy > report.before.cross_entropy:
        say("edgemoe: OUT predicts the held-out text worse than SRC; compare answers before you use it")
    if as_json:
        print_json({"out": str(out), **dataclasses.asdict(settings), **dataclasses.asdict(report)})


def _describe(quality: Quality) -> str:
    return (
        f"cross-entropy {quality.cross_entropy:.4f} nats, {quality.overlap:.1%} of a token's experts were the last "
        f"token's, {quality.hit_rate:.1%} in a cache of a quarter"
    )
