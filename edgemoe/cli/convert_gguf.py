# SPDX-License-Identifier: MIT
"""`edgemoe convert gguf`: a Hugging Face checkpoint becomes a GGUF file."""

from __future__ import annotations

import time
from pathlib import Path

import click

from edgemoe.cli.console import Progress, say
from edgemoe.cli.convert_quantize import read_types
from edgemoe.cli.repack import EXISTING_FILE
from edgemoe.errors import ConversionError
from edgemoe.sizes import format_size, parse_size


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
@click.option("--memory", metavar="SIZE", help="Limit of this process's memory, such as 1GiB.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def gguf(
    checkpoint: Path,
    out: Path,
    quant: str,
    imatrix: Path | None,
    pre_tokenizer: str | None,
    memory: str | None,
    force: bool,
) -> None:
    """Convert the Mixture-of-Experts model in the folder CHECKPOINT: config.json, safetensors and tokenizer.

    It may be killed: the same command goes on where it was, and the file is the same.
    """
    if out.is_dir():
        raise ConversionError(f"cannot write the model: OUT is a folder ({out}); name a file in it")
    if out.exists() and not force:
        raise ConversionError(f"cannot write the model: the file exists ({out}); name another or use --force")
    memory_bytes = None if memory is None else parse_size(memory)
    from edgemoe.converters.quantize.importance import read_importance
    from edgemoe.converters.quantize.presets import Tensor
    from edgemoe.converters.to_gguf import Recipe, convert, plan_conversion

    base, overrides = read_types(quant)
    recipe = Recipe(base, pre_tokenizer, overrides)
    if imatrix is not None:
        matrix = read_importance(imatrix)
        names = plan_conversion(checkpoint, Recipe(pre_tokenizer=pre_tokenizer)).tensors
        columns = matrix.for_tensors([Tensor(tensor.name, tensor.shape) for tensor in names])
        recipe = Recipe(base, pre_tokenizer, overrides, columns, matrix.sha256)
    plan = plan_conversion(checkpoint, recipe)
    for note in plan.notes:
        say(f"edgemoe: note: {note}")
    begin_s = time.monotonic()
    with Progress() as progress:
        convert(plan, out, memory_bytes=memory_bytes, progress=progress)
    seconds = time.monotonic() - begin_s
    say(f"edgemoe: {plan.family.name}, {len(plan.tensors)} tensors, {seconds:.1f} s")
    click.echo(f"{out} ({format_size(out.stat().st_size)})")
