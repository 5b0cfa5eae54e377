# SPDX-License-Identifier: MIT
"""`edgemoe convert verify`: a GGUF against the checkpoint that it was made of."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemoe.cli.console import Progress, find_model, print_json, say

if TYPE_CHECKING:
    from edgemoe.converters.verify import Report, TensorError

EXIT_DIFFERENT = 1
N_SHOWN = 20


@click.command()
@click.argument("path", metavar="OUT.gguf", type=click.Path(path_type=Path))
@click.option(
    "--against",
    "checkpoint",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="CHECKPOINT",
    help="The folder that OUT was converted from.",
)
@click.option(
    "--rows",
    "rows_per_tensor",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    metavar="N",
    help="Rows of each tensor to compare; 0 for all.",
)
@click.option(
    "--logits",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Compare logits with transformers; auto: of small models, where it is installed.",
)
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON on stdout.")
@click.pass_context
def verify(ctx: click.Context, path: Path, checkpoint: Path, rows_per_tensor: int, logits: str, as_json: bool) -> None:
    """Compare OUT with the checkpoint: rows of every tensor, and the logits of a text.

    Exits with 1 if anything is beyond what the types of OUT allow.
    """
    find_model(path)
    from edgemoe.converters.verify import verify as compare

    with Progress() as progress:
        report = compare(path, checkpoint, rows_per_tensor=rows_per_tensor, logits=logits, progress=progress)
    for note in report.notes:
        say(f"edgemoe: note: {note}")
    for line in _table(report):
        click.echo(line, err=as_json)
    for failure in report.failures[:N_SHOWN]:
        say(f"edgemoe: error: {failure}")
    if len(report.failures) > N_SHOWN:
        say(f"edgemoe: error: {len(report.failures) - N_SHOWN} more")
    if as_json:
        found = report.logits
        print_json(
            {
                "ok": not report.failures,
                "max_rel_error": found and found.max_rel_error,
                "kl": found and found.kl,
                "top1_agreement": found and found.top1_agreement,
                "n_positions": found.n_positions if found else 0,
                "n_tensors": len(report.tensors),
                "max_tensor_error": max((tensor.relative for tensor in report.tensors), default=None),
                "failures": list(report.failures),
            }
        )
    if report.failures:
        ctx.exit(EXIT_DIFFERENT)


def _table(report: Report) -> list[str]:
    """Errors of tensors by projection and type, and what the logits say."""

    def kind(tensor: TensorError) -> tuple[str, str]:
        parts = tensor.name.split(".")
        return ".".join(parts[2:] if parts[0] == "blk" else parts), tensor.type_name

    lines = [f"{'tensor':28} {'type':8} {'n':>4} {'rows':>9}  relative error (largest)"]
    ordered = sorted(report.tensors, key=kind)
    for (name, type_name), group in itertools.groupby(ordered, kind):
        tensors = list(group)
        n_rows = sum(tensor.n_compared for tensor in tensors)
        largest = max(tensor.relative for tensor in tensors)
        lines.append(f"{name:28} {type_name:8} {len(tensors):4} {n_rows:9}  {largest:.3g}")
    if report.logits:
        found = report.logits
        lines.append(
            f"logits of {found.n_positions} positions: relative error {found.max_rel_error:.3g}, "
            f"KL {found.kl:.3g} nats, same first token {found.top1_agreement:.1%}"
        )
    lines.append("different" if report.failures else "as it should be")
    return lines
