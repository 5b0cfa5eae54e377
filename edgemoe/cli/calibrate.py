# SPDX-License-Identifier: MIT
"""`edgemoe calibrate`: collect an importance matrix for quantizers."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import click

from edgemoe.cli.console import Progress, find_model, print_json
from edgemoe.cli.repack import EXISTING_FILE, FILE, check_out, read_text
from edgemoe.sizes import format_size, parse_size

N_SHOWN = 8


@click.command()
@click.argument("model", metavar="MODEL.gguf", type=FILE)
@click.option(
    "--text",
    "text_file",
    type=EXISTING_FILE,
    metavar="FILE",
    help="UTF-8 text like what the model will read.  [default: built in]",
)
@click.option("--output", "out", required=True, type=FILE, metavar="IMATRIX.gguf", help="Where to write.")
@click.option("--max-tokens", type=click.IntRange(min=16), metavar="N", help="Tokens of the text to use, at most.")
@click.option("--memory", metavar="SIZE", help="Limit of this process's memory, such as 4GiB.  [default: what is free]")
@click.option("--force", is_flag=True, help="Overwrite IMATRIX.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON line.")
def calibrate(
    model: Path,
    text_file: Path | None,
    out: Path,
    max_tokens: int | None,
    memory: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Collect an importance matrix, one for each expert, in the format of llama.cpp's imatrix.

    The text is evaluated once, with experts streamed: the model may be larger than memory. Experts that the text never
    reaches get the mean of their layer; they are listed.
    """
    find_model(model)
    check_out(model, out, force=force)
    budget_bytes = None if memory is None else parse_size(memory)
    from edgemoe.converters import calibrate as converter
    from edgemoe.converters.upcycle import default_calibration_text
    from edgemoe.formats.gguf import read_model
    from edgemoe.observe import observed_context

    text = default_calibration_text() if text_file is None else read_text(text_file)
    name = "edgemoe's calibration.txt" if text_file is None else text_file.name
    reserved_bytes = converter.collected_bytes(read_model(model))
    open_context = functools.partial(observed_context, memory_bytes=budget_bytes, reserved_bytes=reserved_bytes)
    with Progress() as progress:
        report = converter.calibrate(
            model,
            out,
            text,
            text_name=name,
            max_tokens=max_tokens,
            open_context=open_context,
            progress=progress,
        )
    if as_json:
        print_json({"out": str(out), **dataclasses.asdict(report)})
        return
    click.echo(f"{out} ({format_size(out.stat().st_size)}): {report.n_tensors} tensors, {report.n_tokens} tokens")
    if not report.n_experts:
        return
    click.echo(
        f"experts: {report.n_experts}, the median one chosen by {report.median_tokens:.0f} tokens; "
        f"never reached: {len(report.unreached)}; by less than {converter.FEW_TOKENS} tokens: {len(report.few)}"
    )
    if report.unreached:
        shown = ", ".join(f"layer {layer} expert {expert}" for layer, expert in report.unreached[:N_SHOWN])
        more = f" and {len(report.unreached) - N_SHOWN} more" if len(report.unreached) > N_SHOWN else ""
        click.echo(
            f"never reached: {shown}{more}; gate and up get the mean importance of their layer, down a uniform one. "
            "A longer or more varied text reaches more"
        )
