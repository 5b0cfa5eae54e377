# SPDX-License-Identifier: MIT
"""`edgemoe convert onnx`: a Hugging Face checkpoint becomes a folder with a quantized ONNX model."""

from __future__ import annotations

import time
from pathlib import Path

import click

from edgemoe.cli.console import Progress, print_json, say
from edgemoe.sizes import format_size


@click.command()
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT_DIR", type=click.Path(path_type=Path))
@click.option(
    "--quant",
    type=click.Choice(["int4", "int8"]),
    default="int4",
    show_default=True,
    help="Type of the experts' weights.",
)
@click.option(
    "--dense",
    type=click.Choice(["int4", "int8", "fp32"]),
    help="Type of all other matrices but routers and the embedding.  [default: that of the experts]",
)
@click.option(
    "--embedding",
    type=click.Choice(["int4", "int8", "stored"]),
    default="int8",
    show_default=True,
    help="Type of the embedding; stored: as in CHECKPOINT.",
)
@click.option(
    "--block",
    type=click.Choice(["32", "64", "128"]),
    default="32",
    show_default=True,
    help="Columns that share a scale.",
)
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "4"]),
    default="0",
    show_default=True,
    help="4: products may round activations to 8 bits, which is faster.",
)
@click.option(
    "--context",
    "max_positions",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Longest context.  [default: the model's, 32768 at most]",
)
@click.option("--force", is_flag=True, help="Replace OUT_DIR.")
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON on stdout.")
def onnx(
    checkpoint: Path,
    out: Path,
    quant: str,
    dense: str | None,
    embedding: str,
    block: str,
    accuracy_level: str,
    max_positions: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export the Mixture-of-Experts model in the folder CHECKPOINT: config.json, safetensors and tokenizer.

    Stock ONNX Runtime and onnxruntime-genai run OUT_DIR; edgemoe.onnx streams its experts.
    """
    from edgemoe.converters.onnx.checkpoint import DEFAULT_MAX_POSITIONS, Recipe, export_checkpoint, plan_export

    recipe = Recipe(quant, dense, embedding, int(block), max_positions or DEFAULT_MAX_POSITIONS, int(accuracy_level))
    plan = plan_export(checkpoint, recipe)
    for note in plan.notes:
        say(f"edgemoe: note: {note}")
    begin_s = time.monotonic()
    with Progress() as progress:
        export_checkpoint(plan, out, force=force, progress=progress)
    seconds = time.monotonic() - begin_s
    say(f"edgemoe: {plan.family.name}, {plan.n_moe_layers} QMoE nodes, {seconds:.1f} s")
    if as_json:
        files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
        print_json({"out": str(out), "bytes": sum(files.values()), "files": files, "seconds": seconds})
        return
    click.echo(f"{out} ({format_size(plan.n_bytes)})")
