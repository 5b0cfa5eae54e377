# SPDX-License-Identifier: MIT
"""`edgemoe generate`: one completion of one prompt."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, BinaryIO

import click

from edgemoe.cli.completion import Completion, chat_prompt, text_prompt
from edgemoe.cli.console import Settings, print_json, say
from edgemoe.cli.onnx_folder import open_model
from edgemoe.cli.options import (
    json_option,
    load_options,
    model_argument,
    n_tokens_option,
    prompt_file_option,
    seed_option,
    temperature_option,
)
from edgemoe.cli.profile import profile_option, profile_table


@click.command()
@model_argument
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt.")
@prompt_file_option
@click.option("--chat", "as_chat", is_flag=True, help="Put the prompt as a user's turn into the model's chat template.")
@n_tokens_option
@temperature_option
@seed_option
@load_options
@profile_option
@json_option
@click.pass_obj
def generate(
    settings: Settings,
    model: Path | None,
    prompt: str | None,
    file: BinaryIO | None,
    as_chat: bool,
    n_tokens_max: int,
    temperature: float,
    seed: int | None,
    with_profile: bool,
    as_json: bool,
    load: dict[str, Any],
) -> None:
    """Complete one prompt.

    The answer goes to stdout as it comes, without the prompt. With --json the statistics, the `text`, the ids of its
    `tokens` and with --profile the `profile` are printed as one object instead.
    """
    if (prompt is None) == (file is None):
        raise click.UsageError("Give the prompt with exactly one of -p TEXT and -f FILE.")
    text = prompt if prompt is not None else read_prompt(file)
    with open_model(settings, model, load) as llm:
        tokens = chat_prompt(llm, [{"role": "user", "content": text}]) if as_chat else text_prompt(llm, text)
        completion = Completion(llm, tokens, n_tokens_max=n_tokens_max, temperature=temperature, seed=seed)
        with llm.profile() if with_profile else contextlib.nullcontext() as profiler:
            for piece in completion:
                if not as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        profile = None if profiler is None else profiler.result()
        if as_json:
            fields = {**llm.stats().to_dict(), "text": completion.text, "tokens": completion.tokens}
            print_json(fields if profile is None else {**fields, "profile": profile.to_dict()})
        else:
            click.echo()
            say(completion.footer())
            if profile is not None:
                say(profile_table(profile))


def read_prompt(file: BinaryIO | None) -> str:
    """The text of a prompt file without the newline at its end."""
    data = b"" if file is None else file.read()
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise click.BadParameter(
            f"the prompt is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}", param_hint="-f"
        ) from error
