# SPDX-License-Identifier: MIT
"""Commands that make a GGUF of a GGUF without changing the model: `convert pack` and `convert lowbit`.

Also what all commands share that write a model: which OUT they refuse, and how they read a text.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from edgemoe.cli.console import Progress, find_model, print_json
from edgemoe.errors import ConversionError
from edgemoe.sizes import format_size

FILE = click.Path(path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def check_out(source: Path, out: Path, *, force: bool) -> None:
    """Refuse to overwrite the source, or, without `force`, anything.

    Raises:
        ConversionError: one of the two.
    """
    if out.exists() and out.samefile(source):
        raise ConversionError(f"cannot write the model: OUT is SRC itself ({out}); name another file")
    if out.exists() and not force:
        raise ConversionError(f"cannot write the model: the file exists ({out}); name another or use --force")


def read_text(path: Path) -> str:
    """The text of a calibration file.

    Raises:
        ConversionError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"cannot read the calibration text: byte {error.start} is not UTF-8 ({path}); convert it to UTF-8"
        ) from error


@click.command()
@click.argument("source", metavar="SRC.gguf", type=FILE)
@click.argument("out", metavar="OUT.gguf", type=FILE)
@click.option("--no-merge", is_flag=True, help="Leave gate and up of an expert in tensors of their own.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON line.")
def pack(source: Path, out: Path, no_merge: bool, force: bool, as_json: bool) -> None:
    """Lay a model out for streaming: experts at pages of 4 KiB, layer by layer.

    The weights stay as they are, and llama.cpp loads the result. Where llama.cpp knows a merged gate and up, an expert
    becomes two reads instead of three.
    """
    find_model(source)
    check_out(source, out, force=force)
    from edgemoe.converters.pack import pack as lay_out

    with Progress() as progress:
        report = lay_out(source, out, merge=not no_merge, progress=progress)
    if as_json:
        print_json({"out": str(out), "out_bytes": out.stat().st_size, **dataclasses.asdict(report)})
        return
    click.echo(f"{out} ({format_size(out.stat().st_size)})")
    before, after = (f"{r.n_reads:.3g} reads of {format_size(int(r.n_bytes))}" for r in (report.before, report.after))
    click.echo(f"an expert: {after} in all (before: {before})")
    if report.unmerged_because:
        click.echo(f"gate and up are not merged: {report.unmerged_because}")
    if report.unaligned:
        name, slice_bytes = next(iter(report.unaligned.items()))
        click.echo(
            f"not aligned: {len(report.unaligned)} of {report.n_expert_tensors} expert tensors; an expert of {name} "
            f"has {slice_bytes} bytes, no multiple of 4096, and GGUF has no padding between experts"
        )


@click.command()
@click.argument("source", metavar="SRC.gguf", type=FILE)
@click.argument("out", metavar="OUT.gguf", type=FILE)
@click.option(
    "--quant", default="Q2_K", show_default=True, metavar="TYPE", help="A type of ggml, such as Q3_K or Q4_0."
)
@click.option("--imatrix", type=EXISTING_FILE, metavar="FILE", help="Importance matrix from `edgemoe calibrate`.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON line.")
def lowbit(source: Path, out: Path, quant: str, imatrix: Path | None, force: bool, as_json: bool) -> None:
    """Make the low-bit companion of a model: its experts in fewer bits, and nothing else.

    The companion is no model by itself, and belongs to SRC only.
    """
    find_model(source)
    check_out(source, out, force=force)
    from edgemoe.converters.lowbit import make_companion

    with Progress() as progress:
        report = make_companion(source, out, quant=quant, imatrix=imatrix, progress=progress)
    if as_json:
        print_json({"out": str(out), **dataclasses.asdict(report)})
        return
    types = ", ".join(f"{n} {name}" for name, n in report.types.items())
    click.echo(
        f"{out} ({format_size(out.stat().st_size)}): experts of {format_size(report.out_bytes)} instead of "
        f"{format_size(report.source_bytes)}, {types}; relative error of the weights {report.rms_error:.3f}"
    )
