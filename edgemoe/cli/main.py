# SPDX-License-Identifier: MIT
"""The `edgemoe` command: global options, its subcommands, and how an error becomes one line and an exit code.

Only click is imported here; a command imports the engine when it runs, so `--help` and `--version` are quick.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import click

from edgemoe import __version__
from edgemoe.cli.bench import bench
from edgemoe.cli.calibrate import calibrate
from edgemoe.cli.chat import chat
from edgemoe.cli.console import Settings, say
from edgemoe.cli.convert import convert
from edgemoe.cli.doctor import doctor
from edgemoe.cli.generate import generate
from edgemoe.cli.inspect import inspect
from edgemoe.cli.lexi import lexi
from edgemoe.cli.plan import plan
from edgemoe.cli.price import price
from edgemoe.cli.replay import replay
from edgemoe.cli.trace import trace
from edgemoe.cli.tune_router import tune_router
from edgemoe.errors import EdgeMoeError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class CommandGroup(click.Group):
    """A group that reports a failure as one line on stderr; click itself reports wrong usage (exit 2)."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command and turn what it raises into an exit code."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click prints the first three and silences the last
        except KeyboardInterrupt:
            say("")
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            if ctx.params["debug"]:
                say(traceback.format_exc())
            say(f"edgemoe: error: {error_line(error)}")
            ctx.exit(EXIT_FAILED)


def error_line(error: Exception) -> str:
    """An error as one line: an `EdgeMoeError` says what to do by itself, any other gets a hint."""
    message = " ".join(str(error).split())
    if isinstance(error, EdgeMoeError):
        return message
    return f"{type(error).__name__}: {message or 'no message'}; run `edgemoe --debug ...` for the traceback"


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="edgemoe %(version)s")
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
@click.option("-v", "--verbose", is_flag=True, help="Print llama.cpp's log on stderr.")
@click.pass_context
def cli(ctx: click.Context, debug: bool, verbose: bool) -> None:
    """Run Mixture-of-Experts models whose experts do not fit into memory.

    MODEL is a .gguf file (the first one of a split model); without it the built-in demo model is used. For chat,
    generate, plan and inspect it may be a folder with an ONNX model, as `edgemoe convert onnx` writes it.
    """
    ctx.obj = Settings(debug=debug, verbose=verbose)


for _command in (
    *(chat, generate, plan, inspect, doctor, convert, calibrate, lexi, tune_router),
    *(trace, replay, bench, price),
):
    cli.add_command(_command)


def main() -> None:
    """Entry point of the `edgemoe` script."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        _accept_any_text(stream)
    cli(prog_name="edgemoe")


def _accept_any_text(stream: Any) -> None:
    """Replace characters that a stream's encoding lacks, instead of failing in the middle of an answer."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
