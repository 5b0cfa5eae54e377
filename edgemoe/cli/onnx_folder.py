# SPDX-License-Identifier: MIT
"""Folders with an ONNX model as MODEL of `chat`, `generate`, `plan` and `inspect`, and which options they take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.console import Progress, Settings, open_llama
from edgemoe.cli.options import LOAD_NAMES

if TYPE_CHECKING:
    from edgemoe.genai import GenaiModel
    from edgemoe.llama import Llama

_SCHEDULE = (
    "eviction",
    "prefetch",
    "warm_start",
    "reuse_bias",
    "reuse_method",
    "top_j",
    "expert_top_k",
    "on_miss",
    "on_miss_mass",
)
TAKEN = ("memory", "n_ctx", "n_threads", *_SCHEDULE)
"""The options of loading that mean something with a folder."""


def is_folder(model: Path | None) -> bool:
    """Whether MODEL is a folder."""
    return model is not None and model.is_dir()


def folder_options(load: dict[str, Any]) -> dict[str, Any]:
    """What a folder is loaded with; a context that was not asked for is None.

    Raises:
        click.UsageError: an option was given that does not apply.
    """
    ctx = click.get_current_context()

    def is_given(name: str) -> bool:
        return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    for param in ctx.command.params:
        name = param.name or ""
        if (name == "with_profile" or (name in LOAD_NAMES and name not in TAKEN)) and is_given(name):
            raise click.UsageError(f"{param.opts[0]} does not apply to a folder with an ONNX model: leave it out.")
    options = {name: load[name] for name in TAKEN}
    from edgemoe.onnx_schedule import Keywords

    try:
        Keywords(**{name: options[name] for name in _SCHEDULE}).check()
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    return {**options, "n_ctx": options["n_ctx"] if is_given("n_ctx") else None}


def open_model(settings: Settings, model: Path | None, load: dict[str, Any]) -> Llama | GenaiModel:
    """Load a GGUF file (or the demo), or a folder, with these keywords of `Llama`, showing progress."""
    if model is None or not is_folder(model):
        return open_llama(settings, model, load)
    options = folder_options(load)
    from edgemoe.genai import GenaiModel

    with Progress() as progress:
        progress("loading", 0, 0)
        return GenaiModel(model, **options)
