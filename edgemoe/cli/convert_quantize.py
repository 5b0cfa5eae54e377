# SPDX-License-Identifier: MIT
"""`edgemoe convert quantize`: one GGUF file in other types."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.console import Progress, find_model, print_json, say
from edgemoe.cli.repack import EXISTING_FILE, FILE, check_out, read_text
from edgemoe.errors import ConversionError
from edgemoe.sizes import format_size

if TYPE_CHECKING:
    from edgemoe.converters.quantize.presets import Override


_MIXED_OPTIONS = (
    click.option(
        "--bpw",
        "bits_per_weight",
        type=click.FloatRange(min=1, max=32),
        metavar="X",
        help="Bits per weight of the experts: each projection of each layer gets a type of its own, so that they fit. "
        "Other tensors follow --quant. Needs --holdout.",
    ),
    click.option(
        "--method",
        type=click.Choice(["alphaq", "gemq"]),
        default="alphaq",
        show_default=True,
        help="For --bpw: what tells which projections to spare: their spectra, or a calibration text (with --imatrix).",
    ),
    click.option("--calibration", type=EXISTING_FILE, metavar="FILE", help="Text for gemq.  [default: built in]"),
    click.option(
        "--holdout",
        type=EXISTING_FILE,
        metavar="FILE",
        help="For --bpw: a text that nothing was fitted to. The mixed file has to predict it better than the best one "
        "with the same bits for all experts, or that one is written.",
    ),
    click.option("--types-out", type=FILE, metavar="MIXED.toml", help="Write the types of --bpw here."),
)


def mixed_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of mixed precision."""
    for option in reversed(_MIXED_OPTIONS):
        command = option(command)
    return command


def check_mixed_options(
    bits_per_weight: float | None, holdout: Path | None, types_out: Path | None, calibration: Path | None
) -> None:
    """Options that make no sense without each other.

    Raises:
        click.UsageError: it is so.
    """
    if bits_per_weight is not None and holdout is None:
        raise click.UsageError("--bpw needs --holdout FILE: a text to compare the result on.")
    if bits_per_weight is None and (holdout or types_out or calibration):
        raise click.UsageError("--holdout, --calibration and --types-out are for --bpw.")


@click.command()
@click.argument("source", metavar="SRC.gguf", type=FILE)
@click.argument("out", metavar="OUT.gguf", type=FILE)
@click.option(
    "--quant",
    required=True,
    metavar="NAME|MIXED.toml",
    help="A preset such as Q4_K_M, as in llama.cpp, or a file of types by patterns of tensor names.",
)
@click.option(
    "--imatrix", type=EXISTING_FILE, metavar="FILE", help="Importance matrix, of `edgemoe calibrate` or llama.cpp."
)
@mixed_options
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
def quantize(
    source: Path,
    out: Path,
    quant: str,
    imatrix: Path | None,
    bits_per_weight: float | None,
    method: str,
    calibration: Path | None,
    holdout: Path | None,
    types_out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Quantize a GGUF file.

    Tensors that are quantized already are made smaller, with the errors of both, but never larger.
    """
    check_mixed_options(bits_per_weight, holdout, types_out, calibration)
    find_model(source)
    for path in (out, types_out):
        if path is not None:
            check_out(source, path, force=force)
    from edgemoe.converters.quantize.importance import read_importance

    base, overrides = read_types(quant)
    importance = None if imatrix is None else read_importance(imatrix)
    if importance is not None and importance.unreached:
        n_matrices = sum(importance.unreached.values())
        say(f"edgemoe: no token of the importance matrix reached {n_matrices} matrices; their columns count alike")
    if bits_per_weight is None:
        fields = _quantize(source, out, base, overrides, importance)
    else:
        if overrides:
            raise click.UsageError("--bpw chooses the types of the experts: give --quant a preset, not a file.")
        assert holdout is not None
        texts = (read_text(holdout), None if calibration is None else read_text(calibration))
        fields = write_mixed(source, out, base, bits_per_weight, method, importance, texts, types_out)
    say(f"edgemoe: {out} ({format_size(out.stat().st_size)})")
    if as_json:
        print_json(fields)


def read_types(quant: str) -> tuple[str, tuple[Override, ...]]:
    """What `--quant` says: a preset, and the types that come before its own."""
    from edgemoe.converters.quantize.mixed_file import read_mixed
    from edgemoe.converters.quantize.presets import find_preset

    if quant.lower().endswith(".toml"):
        mixed = read_mixed(Path(quant))
        return mixed.base, mixed.overrides
    return find_preset(quant), ()


def _quantize(source: Path, out: Path, base: str, overrides: tuple[Override, ...], importance: Any) -> dict[str, Any]:
    from edgemoe.converters.requantize import Recipe, plan_requantization, requantize, tensors_of
    from edgemoe.formats.gguf import read_model

    recipe = Recipe(base, overrides)
    if importance is not None:
        columns = importance.for_tensors(tensors_of(read_model(source)))
        recipe = Recipe(base, overrides, columns, importance.sha256)
    plan = plan_requantization(source, recipe)
    for name, wanted in plan.fallbacks.items():
        say(f"edgemoe: {name} becomes {plan.types[name].name}: its rows are no multiple of a block of {wanted.name}")
    if plan.requantized:
        say(f"edgemoe: {len(plan.requantized)} tensors are quantized already: they get the errors of both types")
    if plan.kept:
        say(f"edgemoe: {len(plan.kept)} tensors are quantized already with no more bits than asked for: they stay")
    with Progress() as progress:
        requantize(source, out, recipe, progress=progress)
    counts = collections.Counter(ggml_type.name for ggml_type in plan.types.values())
    say(
        f"edgemoe: {plan.bits_per_weight:.3f} bits per weight; "
        + ", ".join(f"{n} {t}" for t, n in counts.most_common())
    )
    return {
        "out": str(out),
        "bytes": out.stat().st_size,
        "bits_per_weight": plan.bits_per_weight,
        "types": dict(counts),
        "fallbacks": len(plan.fallbacks),
        "requantized": len(plan.requantized),
        "kept": len(plan.kept),
    }


def write_mixed(
    source: Path,
    out: Path,
    base: str,
    bits_per_weight: float,
    method: Any,
    importance: Any,
    texts: tuple[str, str | None],
    types_out: Path | None,
) -> dict[str, Any]:
    """Write the file of `--bpw`, say how it compares, and return that for JSON."""
    from edgemoe.converters.mixed_precision import describe, quantize_to_bits
    from edgemoe.converters.quantize.mixed_file import format_mixed
    from edgemoe.converters.upcycle import default_calibration_text

    holdout_text, calibration_text = texts
    with Progress() as progress:
        report = quantize_to_bits(
            source,
            out,
            base=base,
            bits_per_weight=bits_per_weight,
            method=method,
            holdout_text=holdout_text,
            importance=importance,
            calibration_text=default_calibration_text() if calibration_text is None else calibration_text,
            progress=progress,
        )
    for line in report.written.allocation.table():
        say(line)
    for trial in (report.mixed, report.uniform):
        say(
            f"edgemoe: {trial.name}: {trial.allocation.bits_per_weight:.3f} bits per expert weight, "
            f"{trial.nats:.4f} nats per token"
        )
    difference = report.difference
    say(
        f"edgemoe: mixed less uniform {difference.mean:+.4f} nats per token (standard error "
        f"{difference.standard_error:.4f}, {report.n_tokens} tokens of held-out text): {report.written.name} is written"
    )
    if types_out is not None:
        content = format_mixed(base, report.overrides(), (f"edgemoe convert quantize --bpw {bits_per_weight:g}",))
        try:
            types_out.write_text(content, encoding="utf-8")
        except OSError as error:
            raise ConversionError(f"cannot write {types_out}: {error.strerror or error}") from error
    return {"out": str(out), "bytes": out.stat().st_size, **describe(report)}
