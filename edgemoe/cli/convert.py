# SPDX-License-Identifier: MIT
"""`edgemoe convert`: make one model out of another."""

from __future__ import annotations

from pathlib import Path

import click

from edgemoe.cli.console import Progress, find_model
from edgemoe.cli.convert_gguf import gguf
from edgemoe.cli.convert_onnx import onnx
from edgemoe.cli.convert_quantize import quantize
from edgemoe.cli.convert_verify import verify
from edgemoe.cli.repack import EXISTING_FILE, FILE, check_out, lowbit, pack, read_text
from edgemoe.sizes import format_size


@click.group()
def convert() -> None:
    """Make one model out of another."""


for _command in (gguf, onnx, verify, quantize, pack, lowbit):
    convert.add_command(_command)


@convert.command()
@click.argument("source", metavar="SRC.gguf", type=FILE)
@click.argument("out", metavar="OUT.gguf", type=FILE)
@click.option(
    "--experts",
    "n_experts",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    metavar="N",
    help="Experts in each layer.",
)
@click.option(
    "--top-k",
    "n_experts_used",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    metavar="K",
    help="Experts that a token uses.",
)
@click.option(
    "--calibration", type=EXISTING_FILE, metavar="FILE", help="Text to make the routers from.  [default: built in]"
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of the routers."
)
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def upcycle(
    source: Path, out: Path, n_experts: int, n_experts_used: int, calibration: Path | None, seed: int, force: bool
) -> None:
    """Copy every feed-forward block of a dense model into experts behind a router.

    The result answers as SRC does, up to rounding: the copies add no knowledge.
    """
    if n_experts_used > n_experts:
        raise click.UsageError(f"--top-k {n_experts_used} is more than --experts {n_experts}.")
    find_model(source)
    check_out(source, out, force=force)
    text = None if calibration is None else read_text(calibration)
    from edgemoe.converters.upcycle import upcycle as make_experts

    with Progress() as progress:
        make_experts(
            source,
            out,
            n_experts=n_experts,
            n_experts_used=n_experts_used,
            calibration_text=text,
            seed=seed,
            progress=progress,
        )
    click.echo(f"{out} ({format_size(out.stat().st_size)})")
