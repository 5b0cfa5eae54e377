# SPDX-License-Identifier: MIT
"""`edgemoe convert gguf`: a Hugging Face checkpoint becomes a GGUF file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemoe.cli.console import Progress, say
from edgemoe.cli.convert_quantize import check_mixed_options, mixed_options, read_types, write_mixed
from edgemoe.cli.repack import EXISTING_FILE, check_out, read_text
from edgemoe.errors import ConversionError
from edgemoe.sizes import format_size, parse_size

if TYPE_CHECKING:
    from edgemoe.converters.to_gguf import Plan


@click.command()
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.gguf", type=click.Path(path_type=Path))
@click.option(
    "--quant",
    default="F32",
    show_default=True,
    metavar="NAME|MIXED.toml",
    help="Types of the weights: F32, BF16, F16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, IQ4_XS, MXFP4, Q3_K_M, Q2_K and "
    "more, as in llama.cpp; or a file of types by patterns of tensor names.",
)
@click.option(
    "--imatrix", type=EXISTING_FILE, metavar="FILE", help="Importance matrix, of `edgemoe calibrate` or llama.cpp."
)
@click.option(
    "--pre-tokenizer", metavar="NAME", help="llama.cpp's pre-tokenizer of the vocabulary.  [default: found by its hash]"
)
@click.option("--pack", is_flag=True, help="Lay it out for streaming: experts at pages, in the order of use.")
@mixed_options
@click.option("--memory", metavar="SIZE", help="Limit of this process's memory, such as 1GiB.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def gguf(
    checkpoint: Path,
    out: Path,
    quant: str,
    imatrix: Path | None,
    pre_tokenizer: str | None,
    pack: bool,
    bits_per_weight: float | None,
    method: str,
    calibration: Path | None,
    holdout: Path | None,
    types_out: Path | None,
    memory: str | None,
    force: bool,
) -> None:
    """Convert the Mixture-of-Experts model in the folder CHECKPOINT: config.json, safetensors and tokenizer.

    It may be killed: the same command goes on where it was, and the file is the same.
    """
    if out.is_dir():
        raise ConversionError(f"cannot write the model: OUT is a folder ({out}); name a file in it")
    check_out(checkpoint, out, force=force)
    check_mixed_options(bits_per_weight, holdout, types_out, calibration)
    if types_out is not None:
        check_out(checkpoint, types_out, force=force)
    if bits_per_weight is not None and pack:
        raise click.UsageError("--bpw and --pack exclude each other: use `edgemoe convert pack` on the result.")
    memory_bytes = None if memory is None else parse_size(memory)
    from edgemoe.converters.quantize.importance import read_importance
    from edgemoe.converters.to_gguf import Recipe, plan_conversion

    base, overrides = read_types(quant)
    recipe = Recipe(base, pre_tokenizer, overrides, is_packed=pack)
    importance = None if imatrix is None else read_importance(imatrix)
    if bits_per_weight is not None:
        if overrides:
            raise click.UsageError("--bpw chooses the types of the experts: give --quant a preset, not a file.")
        assert holdout is not None
        texts = (read_text(holdout), None if calibration is None else read_text(calibration))
        # Types are chosen by the errors that each makes, of weights that have lost next to nothing.
        whole = out.with_name(f".{out.name}.BF16.gguf")
        try:
            _convert(plan_conversion(checkpoint, Recipe("BF16", pre_tokenizer)), whole, memory_bytes)
            write_mixed(whole, out, base, bits_per_weight, method, importance, texts, types_out)
        finally:
            whole.unlink(missing_ok=True)
    else:
        _convert(plan_conversion(checkpoint, recipe, importance), out, memory_bytes)
    click.echo(f"{out} ({format_size(out.stat().st_size)})")


def _convert(plan: Plan, out: Path, memory_bytes: int | None) -> None:
    from edgemoe.converters.to_gguf import convert

    for note in plan.notes:
        say(f"edgemoe: note: {note}")
    begin_s = time.monotonic()
    with Progress() as progress:
        convert(plan, out, memory_bytes=memory_bytes, progress=progress)
    seconds = time.monotonic() - begin_s
    say(f"edgemoe: {plan.family.name}, {len(plan.tensors)} tensors, {seconds:.1f} s")
