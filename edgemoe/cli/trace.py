# SPDX-License-Identifier: MIT
"""`edgemoe trace`: record which experts a model chooses and what they cost, and show what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from edgemoe.cli.completion import Completion, text_prompt
from edgemoe.cli.console import Settings, open_llama, print_json, say
from edgemoe.cli.generate import read_prompt
from edgemoe.cli.options import (
    json_option,
    load_options,
    n_tokens_option,
    prompt_file_option,
    seed_option,
    temperature_option,
)
from edgemoe.errors import TraceError
from edgemoe.sizes import format_size

if TYPE_CHECKING:
    from edgemoe.trace_summary import TraceSummary

DEFAULT_PROMPT = "Explain how a refrigerator keeps food cold, and what happens when its door is left open."


@click.group()
def trace() -> None:
    """Record which experts a model chooses, or show a recording."""


@trace.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.argument("out", required=False, metavar="OUT", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt.  [default: built in]")
@prompt_file_option
@n_tokens_option
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@temperature_option
@seed_option
@load_options
@click.pass_obj
def record(
    settings: Settings,
    model: Path | None,
    out: Path | None,
    prompt: str | None,
    file: BinaryIO | None,
    n_tokens_max: int,
    force: bool,
    temperature: float,
    seed: int | None,
    load: dict[str, Any],
) -> None:
    """Complete a prompt and record every choice of experts in OUT.

    With one argument that is OUT, and the model is the demo. The answer is not printed. Mixing weights are known where
    edgemoe's own kernels compute a layer; with --kernels ggml they are not recorded.
    """
    if out is None:
        model, out = None, model
    if out is None:
        raise click.UsageError("Missing argument 'OUT'.")
    if prompt is not None and file is not None:
        raise click.UsageError("Give the prompt with at most one of -p TEXT and -f FILE.")
    if out.exists() and not force:
        raise TraceError(f"cannot record a trace: the file exists ({out}); name another or use --force")
    text = read_prompt(file) if file is not None else DEFAULT_PROMPT if prompt is None else prompt
    with open_llama(settings, model, load) as llm:
        tokens = text_prompt(llm, text)
        completion = Completion(llm, tokens, n_tokens_max=n_tokens_max, temperature=temperature, seed=seed)
        with llm.record_trace(out) as check:
            for _ in completion:
                check()
        say(completion.footer())
    click.echo(f"{out} ({format_size(out.stat().st_size)})")


@trace.command()
@click.argument("path", metavar="TRACE", type=click.Path(path_type=Path))
@json_option
def show(path: Path, as_json: bool) -> None:
    """Show what a trace says: locality of the choices, hits, bytes and stall."""
    from edgemoe.trace import load
    from edgemoe.trace_summary import summarize

    summary = summarize(load(path))
    if as_json:
        print_json(summary.to_dict())
    else:
        click.echo(_table(summary))


def _table(summary: TraceSummary) -> str:
    """The summary as lines of text."""
    n_read, stall_us = summary.bytes_per_token, summary.stall_us_per_token
    lru = ", ".join(f"{rate:.1%} of {share:.4g} of the experts" for share, rate in summary.lru_hit_rates)
    rows = [
        ("model", summary.model),
        ("experts", f"{summary.n_experts_used} of {summary.n_experts} in each of {summary.n_layers} layers"),
        ("tokens", f"{summary.tokens} in {summary.batches} batches, {summary.decode_tokens} of one token"),
        ("hit rate", f"{_share(summary.hit_rate)}, batches of one token {_share(summary.decode_hit_rate)}"),
        ("read", "-" if n_read is None else f"{format_size(round(n_read))} per token, batches of one token"),
        ("stall", "-" if stall_us is None else f"{stall_us / 1e3:.2f} ms per token, batches of one token"),
        ("next token", f"{_share(summary.next_token_reuse)} of a token's experts are those of the token before"),
        ("LRU per layer", f"hits {lru}" if lru else "-"),
        (
            "reuse distance",
            f"median {_number(summary.reuse_distance_median, '.0f')} experts; "
            f"{_share(summary.first_use_share)} are first uses",
        ),
        ("router entropy", f"{_number(summary.router_entropy_bits, '.2f')} bits over a token's experts"),
        (
            "load imbalance",
            f"{_number(summary.load_imbalance, '.2f')} times the mean for the most used expert, "
            f"{_number(summary.load_imbalance_max, '.2f')} in the worst layer",
        ),
    ]
    lines = [f"{name:<16}{value}" for name, value in rows]
    lines += ["", f"{'layer':>5} {'hits':>8} {'reuse':>8} {'entropy':>8} {'imbalance':>10}"]
    lines += [
        f"{layer.layer:>5} {_share(layer.hit_rate):>8} {_share(layer.next_token_reuse):>8} "
        f"{_number(layer.router_entropy_bits, '.2f'):>8} {_number(layer.load_imbalance, '.2f'):>10}"
        for layer in summary.layers
    ]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
