# SPDX-License-Identifier: MIT
"""What a command says to its user: talk and progress on stderr, JSON on stdout; and how it opens a model."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from edgemoe.errors import ModelFormatError

if TYPE_CHECKING:
    from edgemoe.genai import GenaiModel
    from edgemoe.llama import Llama

BAR_WIDTH = 30
REDRAW_S = 0.1


@dataclasses.dataclass(frozen=True)
class Settings:
    """The global options.

    Attributes:
        debug: print the traceback of an error.
        verbose: print llama.cpp's log.
    """

    debug: bool
    verbose: bool


def say(text: str) -> None:
    """Print one line of talk on stderr."""
    click.echo(text, err=True)


def print_json(fields: dict[str, Any]) -> None:
    """Print one JSON object on one line of stdout."""
    click.echo(json.dumps(fields))


class Progress:
    """Shows the stages of something slow on stderr: a bar on a terminal, else one line a stage.

    Pass the object itself as a `progress` callback `(stage, done, total)`; leaving the context removes the bar.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._stage = ""
        self._drawn_at_s = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        is_new = stage != self._stage
        self._stage = stage
        if not self._is_terminal:
            if is_new:
                say(f"edgemoe: {stage}")
            return
        now_s = time.monotonic()
        if is_new or done >= total or now_s - self._drawn_at_s >= REDRAW_S:
            self._drawn_at_s = now_s
            click.echo("\r\033[K" + progress_bar(stage, done, total), nl=False, err=True)

    def say(self, text: str) -> None:
        """Print one line of talk above the bar."""
        if self._is_terminal and self._stage:
            click.echo("\r\033[K", nl=False, err=True)
        say(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal and self._stage:
            click.echo("\r\033[K", nl=False, err=True)


def progress_bar(stage: str, done: int, total: int) -> str:
    """One bar: `loading [#####.....]  50 %`; without a total only the stage."""
    if total <= 0:
        return f"{stage} ..."
    share = min(max(done / total, 0.0), 1.0)
    n_full = round(share * BAR_WIDTH)
    return f"{stage} [{'#' * n_full}{'.' * (BAR_WIDTH - n_full)}] {share:4.0%}"


def find_model(model: Path | None) -> Path:
    """The model file to use: the one named, which must exist, or else the demo, built on first use.

    Raises:
        ModelFormatError: there is no such file.
    """
    if model is None:
        from edgemoe import demo_model

        say(
            "edgemoe: no MODEL given, using the demo: SmolLM2-135M with its feed-forward blocks copied into experts "
            "(real streaming; the copies add no knowledge)"
        )
        with Progress() as progress:
            return demo_model(progress=progress)
    if not model.is_file():
        found = "a directory" if model.is_dir() else "no such file"
        raise ModelFormatError(f"cannot open the model: {found} ({model}); name a .gguf file, or none for the demo")
    if not os.access(model, os.R_OK):
        raise ModelFormatError(f"cannot open the model: no permission to read it ({model}); check its owner and mode")
    return model


def open_llama(settings: Settings, model: Path | None, load: dict[str, Any]) -> Llama:
    """Load a model (or the demo) with these keywords of `Llama`, showing progress.

    `n_threads` holds for decode and prefill alike.
    """
    path = find_model(model)
    from edgemoe import Llama

    batch_threads: dict[str, Any] = {} if load["n_threads"] is None else {"n_threads_batch": load["n_threads"]}
    with Progress() as progress:
        llm = Llama(path, **load, **batch_threads, verbose=settings.verbose, progress=progress)
    say_reuse_choice(llm)
    return llm


def say_reuse_choice(llm: Llama | GenaiModel) -> None:
    """Print which reuse bias `auto` has chosen, and why; that there is none is logged as a warning by itself."""
    if llm.reuse_choice is not None and llm.reuse_choice.settings is not None:
        say(f"edgemoe: {llm.reuse_choice.text}")
