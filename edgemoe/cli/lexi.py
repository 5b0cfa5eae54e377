# SPDX-License-Identifier: MIT
"""`edgemoe lexi`: find out, without data, what each layer loses with fewer experts."""

from __future__ import annotations

from pathlib import Path

import click

from edgemoe.cli.console import Progress, find_model, print_json
from edgemoe.cli.repack import FILE
from edgemoe.errors import ModelFormatError

SHOWN_MEANS = (0.75, 0.625, 0.5)  # of the experts that the model uses


@click.command()
@click.argument("model", metavar="MODEL.gguf", type=FILE)
@click.argument("out", metavar="OUT.json", type=FILE)
@click.option(
    "--mean-k",
    type=click.FloatRange(min=1),
    metavar="K",
    help="Show the numbers for this mean.  [default: 3/4, 5/8 and 1/2 of the model's]",
)
@click.option(
    "--samples", "n_samples", type=click.IntRange(min=1, max=4096), default=32, show_default=True, help="Random inputs."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of them.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as one JSON line.")
def lexi(model: Path, out: Path, mean_k: float | None, n_samples: int, seed: int, force: bool, as_json: bool) -> None:
    """Measure what each layer of MODEL loses with fewer experts, from random inputs, and write it to OUT.

    Experts are read one at a time: the model may be larger than memory. Any mean number of experts can then be asked
    for: `--expert-top-k lexi:3@OUT.json`.
    """
    find_model(model)
    if out.exists() and not force:
        raise ModelFormatError(f"cannot write {out}: the file exists; name another or use --force")
    from edgemoe import lexi as losses_of
    from edgemoe.formats.gguf import read_model

    source = read_model(model)
    if mean_k is not None and mean_k > source.n_experts_used:
        raise click.BadParameter(f"{mean_k:g} is more than the {source.n_experts_used} experts that {model} uses.")
    with Progress() as progress:
        losses = losses_of.measure(source, n_samples=n_samples, seed=seed, progress=progress)
    means = [share * source.n_experts_used for share in SHOWN_MEANS] if mean_k is None else [mean_k]
    plans = {f"{mean:g}": losses_of.solve(losses, mean) for mean in means if mean >= 1 or mean_k is not None}
    losses_of.save(losses, out)
    if as_json:
        print_json({"out": str(out), "numbers": plans})
        return
    click.echo(f"{out}: {len(losses.of_layer)} layers, {source.n_experts_used} experts a token")
    for mean, numbers in plans.items():
        click.echo(f"mean {mean}: layers {losses_of.describe(numbers)}")
