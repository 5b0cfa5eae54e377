# SPDX-License-Identifier: MIT
"""`edgemoe chat`: a conversation in the model's own chat template."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.completion import Completion, Message, chat_prompt, has_chat_template
from edgemoe.cli.console import Settings, say, say_reuse_choice
from edgemoe.cli.onnx_folder import open_model
from edgemoe.cli.options import (
    UNLIMITED,
    TokenCountType,
    load_options,
    model_argument,
    seed_option,
    temperature_option,
)
from edgemoe.cli.plan import plan_table
from edgemoe.cli.profile import profile_option, profile_table
from edgemoe.errors import EdgeMoeError
from edgemoe.sizes import format_size, parse_size

if TYPE_CHECKING:
    from edgemoe.genai import GenaiModel
    from edgemoe.llama import Llama

PROMPT = "> "
HELP = """\
/help         this list
/stats        counters since the start
/memory SIZE  change the memory budget; without SIZE show where it goes
/reset        forget the conversation
/exit         leave; so do Ctrl-D and a second Ctrl-C
Ctrl-C stops an answer."""

ANSWER_ROOM_TOKENS = 256
"""Room in the context that an answer should find, at most a quarter of the context."""

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?")


@click.command()
@model_argument
@click.option("--system", metavar="TEXT", help="System message: how the model is to behave.")
@click.option(
    "-n",
    "n_tokens_max",
    type=TokenCountType(),
    default=1024,
    show_default=True,
    metavar="N",
    help="Most tokens of an answer; -1: until the context is full.",
)
@temperature_option
@seed_option
@load_options
@profile_option
@click.pass_obj
def chat(
    settings: Settings,
    model: Path | None,
    system: str | None,
    n_tokens_max: int,
    temperature: float,
    seed: int | None,
    with_profile: bool,
    load: dict[str, Any],
) -> None:
    """Talk with a model.

    Answers go to stdout, all else to stderr; /help lists what else can be typed. Lines piped in are one turn each.
    """
    with open_model(settings, model, load) as llm:
        if not has_chat_template(llm):
            say("edgemoe: the model has no chat template, using ChatML; a base model may not answer sensibly")
        if sys.stdin.isatty():
            say("/help lists the commands, /exit leaves")
        Chat(
            llm,
            system=system,
            n_tokens_max=n_tokens_max,
            temperature=temperature,
            seed=seed,
            with_profile=with_profile,
        ).run()


class Chat:
    """A conversation with one model, and the loop that reads turns and streams answers."""

    def __init__(
        self,
        llm: Llama | GenaiModel,
        *,
        system: str | None,
        n_tokens_max: int,
        temperature: float,
        seed: int | None,
        with_profile: bool = False,
    ) -> None:
        self._llm = llm
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []  # alternately a user's and the model's
        self._n_tokens_max = n_tokens_max
        self._temperature = temperature
        self._seed = seed
        self._with_profile = with_profile

    def run(self) -> None:
        """Read and answer turns until the end of input, /exit, or Ctrl-C twice in a row."""
        lines = read_lines()
        was_interrupted = False
        while True:
            try:
                line = next(lines, None)
            except KeyboardInterrupt:
                say("")
                if was_interrupted:
                    return
                was_interrupted = True
                say("Ctrl-C again or /exit leaves")
                lines = read_lines()
                continue
            was_interrupted = False
            command = _COMMAND.fullmatch(line) if line is not None else None
            if line is None or (command and command.group(1) == "exit"):
                return
            try:
                if command:
                    self.obey(command.group(1), command.group(2) or "")
                elif line:
                    self.answer(line)
            except KeyboardInterrupt:
                was_interrupted = True
                click.echo()
                say("[stopped]")

    def obey(self, command: str, argument: str) -> None:
        """Carry out one of the /commands."""
        if command == "help":
            say(HELP)
        elif command == "stats":
            stats = self._llm.stats()
            for name, value in {**stats.to_dict(), "expert_hit_rate": stats.expert_hit_rate}.items():
                say(f"{name:<22}{format_size(value) if 'bytes' in name else _number(value)}")
        elif command == "memory":
            self._set_memory(argument)
        elif command == "reset":
            self._turns.clear()
            self._llm.reset()
            say("the conversation is forgotten")
        else:
            say(f"unknown command /{command}; /help lists the commands")

    def answer(self, text: str) -> None:
        """Answer one turn of the user on stdout. What an interrupt cuts short stays in the conversation."""
        self._turns.append({"role": "user", "content": text})
        completion = profiler = None
        try:
            prompt_tokens = self._fit_into_context()
            completion = Completion(
                self._llm,
                prompt_tokens,
                n_tokens_max=self._n_tokens_max,
                temperature=self._temperature,
                seed=self._seed,
            )
            with self._llm.profile() if self._with_profile else contextlib.nullcontext() as profiler:
                for piece in completion:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except EdgeMoeError as error:
            if completion is not None:
                raise  # the engine failed, not this turn
            say(f"edgemoe: error: {error}")
            return
        finally:
            if completion is not None and completion.tokens:
                self._turns.append({"role": "assistant", "content": completion.text})
            else:
                self._turns.pop()
        click.echo()
        say(completion.footer())
        if profiler is not None:
            say(profile_table(profiler.result()))

    def _fit_into_context(self) -> list[int]:
        """The tokens of the conversation; drops its oldest turns if an answer would find no room.

        As every dropped turn makes the model read all the rest again, half of the context is freed at once.
        """
        n_ctx = self._llm.n_ctx()
        n_room = n_ctx // 4 if self._n_tokens_max == UNLIMITED else min(self._n_tokens_max, n_ctx // 4)
        tokens = chat_prompt(self._llm, self._system + self._turns)
        if len(tokens) + min(n_room, ANSWER_ROOM_TOKENS) <= n_ctx:
            return tokens
        n_dropped = 0
        while len(self._turns) > 1 and len(tokens) > n_ctx // 2:
            del self._turns[:2]
            n_dropped += 1
            tokens = chat_prompt(self._llm, self._system + self._turns)
        if n_dropped:
            say(f"edgemoe: the context of {n_ctx} tokens is full: forgot the oldest {n_dropped} turns")
        return tokens

    def _set_memory(self, size: str) -> None:
        """Change the memory budget, or show it; a budget that cannot be met leaves the old one."""
        try:
            if size:
                self._llm.set_memory(parse_size(size))
                say_reuse_choice(self._llm)
        except EdgeMoeError as error:
            say(f"edgemoe: error: {error}")
            return
        say(plan_table(self._llm.plan))


def read_lines() -> Iterator[str]:
    """The user's lines, stripped; with a prompt if a person types them, which stays off a redirected stdout."""
    is_typed = sys.stdin.isatty()
    if is_typed and sys.stdout.isatty():
        import readline  # gives input() line editing and history

        while True:
            try:
                line = input(PROMPT)
            except EOFError:
                say("")
                return
            except KeyboardInterrupt:
                if not readline.get_line_buffer():
                    raise
                say("")  # what was typed so far is dropped
                continue
            yield line.strip()
    while True:
        if is_typed:
            click.echo(PROMPT, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _number(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
