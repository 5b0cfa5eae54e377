# SPDX-License-Identifier: MIT
"""The command line: exit codes, what goes to stdout, and `generate`."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

import edgemoe
from edgemoe.errors import BackendError
from edgemoe.llama import Llama
from tests.unit.fakes import END, PROFILE, STATS, FakeLlama, error_lines, run

# ---------------------------------------------------------------- errors and usage


def test_importing_the_command_line_is_light() -> None:
    """Guards against `edgemoe --help` taking seconds because it loads the engine."""
    script = "import sys, edgemoe.cli.main; print([m for m in ('numpy', 'llama_cpp', 'gguf') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_version() -> None:
    """Guards against a version that differs from the package's."""
    assert run("--version").stdout == f"edgemoe {edgemoe.__version__}\n"


@pytest.mark.parametrize("command", ["chat", "generate", "plan", "inspect", "doctor", "convert", "bench", "price"])
def test_every_command_has_help(command: str) -> None:
    """Guards against a command that is not registered or whose options clash."""
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage: edgemoe " + command in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "-p", "a", "-f", "-"],
        ["generate", "-p", "a", "--memory", "1.5QiB"],
        ["generate", "-p", "a", "--memory", "0"],
        ["generate", "-p", "a", "-n", "0"],
        ["generate", "-p", "a", "-n", "many"],
        ["generate", "-p", "a", "--temperature", "-1"],
        ["generate", "-p", "a", "--kernels", "fast"],
        ["chat", "--kernels", ""],
        ["chat", "--prefetch", "3"],
        ["generate", "-p", "a", "--eviction", "random"],
        ["chat", "--draft", "guess"],
        ["generate", "-f", "/nonexistent/prompt"],
        ["plan", "--ctx", "0"],
        ["convert", "upcycle", "a.gguf", "b.gguf", "--experts", "2", "--top-k", "3"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(llama: type[FakeLlama], arguments: list[str]) -> None:
    """Guards against wrong usage that loads a model, or that a script cannot tell from a failure."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert not llama.options


@pytest.mark.parametrize("command", [["generate", "-p", "a"], ["chat"], ["plan"], ["inspect"], ["doctor"]])
def test_missing_model_is_one_line(command: list[str]) -> None:
    """Guards against a traceback, or a message that does not name the file, when the model is missing."""
    result = run(*command, "/nonexistent/model.gguf")
    assert result.exit_code == 1
    assert error_lines(result) == [
        "edgemoe: error: cannot open the model: no such file (/nonexistent/model.gguf); "
        "name a .gguf file, or none for the demo"
    ]
    assert "Traceback" not in result.output


def test_unexpected_error_is_one_line_with_a_hint(llama: type[FakeLlama], model: str) -> None:
    """Guards against a traceback in the face of a user, and against losing it when it is asked for."""
    llama.answers = [[RuntimeError("decode\nfailed")], [RuntimeError("decode failed")]]
    result = run("generate", model, "-p", "a")
    assert result.exit_code == 1
    assert error_lines(result) == [
        "edgemoe: error: RuntimeError: decode failed; run `edgemoe --debug ...` for the traceback"
    ]
    assert "Traceback" not in result.stderr
    assert "Traceback" in run("--debug", "generate", model, "-p", "a").stderr


def test_reader_that_went_away_is_no_error(llama: type[FakeLlama], model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against noise from `edgemoe generate ... | head -1`."""
    llama.answers = [[*b"abc", BrokenPipeError(32, "Broken pipe")]]
    result = run("generate", model, "-p", "a")
    assert error_lines(result) == []
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------- generate


def test_generate_writes_only_the_answer_to_stdout(llama: type[FakeLlama], model: str) -> None:
    """Guards against talk on stdout, and against characters broken between two tokens."""
    llama.answers = [[*"grün €".encode(), END]]
    result = run("generate", model, "-p", "colour?", "--temperature", "0", "--seed", "3", "--threads", "2")
    assert result.exit_code == 0
    assert result.stdout == "grün €\n"
    assert llama.prompts == ["colour?"]
    assert (llama.options["temp"], llama.options["seed"]) == (0.0, 3)
    assert (llama.options["n_threads"], llama.options["n_threads_batch"]) == (2, 2)
    assert "tok/s" in result.stderr


@pytest.mark.parametrize("command", [["generate", "-p", "a"], ["chat"]])
def test_kernels_reach_the_model(llama: type[FakeLlama], model: str, command: list[str]) -> None:
    """Guards against exact bits that were asked for and not delivered, and against another default than the API's."""
    assert run(*command, model).exit_code == 0
    assert llama.options["kernels"] == "auto"
    assert llama.options["draft"] == "off"
    assert run(*command, model, "--kernels", "ggml", "--draft", "ngram").exit_code == 0
    assert llama.options["kernels"] == "ggml"
    assert llama.options["draft"] == "ngram"
    assert run(*command, model, "--draft", model).exit_code == 0
    assert llama.options["draft"] == model


@pytest.mark.parametrize("command", [["generate", "-p", "a"], ["chat"]])
def test_scheduling_reaches_the_model(llama: type[FakeLlama], model: str, command: list[str]) -> None:
    """Guards against an option that is parsed and dropped, and against other defaults than the API's."""
    names = ("eviction", "prefetch")
    defaults = {name: inspect.signature(Llama.__init__).parameters[name].default for name in names}
    assert run(*command, model).exit_code == 0
    assert {name: llama.options[name] for name in names} == defaults
    assert run(*command, model, "--eviction", "lfu", "--prefetch", "1").exit_code == 0
    assert {name: llama.options[name] for name in names} == {"eviction": "lfu", "prefetch": "1"}


@pytest.mark.parametrize("command", [["generate", "-p", "a"], ["chat"]])
def test_warm_start_reaches_the_model(llama: type[FakeLlama], model: str, command: list[str]) -> None:
    """Guards against experts remembered against the user's will, and against another default than the API's."""
    assert run(*command, model).exit_code == 0
    assert llama.options["warm_start"] is True
    assert run(*command, model, "--no-warm-start").exit_code == 0
    assert llama.options["warm_start"] is False


@pytest.mark.parametrize("command", [["generate", "-p", "a"], ["chat"]])
def test_instruction_set_that_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, model: str, command: list[str]
) -> None:
    """Guards against a traceback for a mistyped EDGEMOE_ISA, or for one of another processor."""

    def refuse(*_args: Any, **_options: Any) -> None:
        raise BackendError("EDGEMOE_ISA=avx: no such instruction set; compiled here: avx2, scalar")

    monkeypatch.setitem(vars(edgemoe), "Llama", refuse)
    result = run(*command, model)
    assert result.exit_code == 1
    assert error_lines(result) == [
        "edgemoe: error: EDGEMOE_ISA=avx: no such instruction set; compiled here: avx2, scalar"
    ]
    assert "Traceback" not in result.stderr


def test_generate_json_is_the_last_line(llama: type[FakeLlama], model: str) -> None:
    """Guards against scripts that cannot parse the result, and against token ids that are not the generated ones."""
    llama.answers = [[*"né".encode(), END]]
    result = run("generate", model, "-p", "a", "--json")
    assert json.loads(result.stdout) == {**STATS.to_dict(), "text": "né", "tokens": list("né".encode())}
    assert result.stdout.count("\n") == 1


def test_generate_shows_a_profile_of_the_answer(llama: type[FakeLlama], model: str) -> None:
    """Guards against a profile on stdout, of more than the answer, or in the way of a script that reads JSON."""
    llama.answers = [[*b"ab", END]] * 3
    result = run("generate", model, "-p", "a", "--profile")
    assert result.stdout == "ab\n"
    assert llama.prompts == ["profile begins", "a", "profile ends"]
    rows = {line.split("  ")[1]: line.split() for line in result.stderr.splitlines() if line.startswith("  ")}
    assert rows["wait for storage"][-3:] == ["4.00", "ms", "40.0%"]
    assert rows["sum"][-2:] == rows["by the wall clock"][-2:] == ["10.00", "ms"]
    assert "3.00 MiB read per token, 300 MiB/s" in result.stderr
    assert "1.50 bits" in result.stderr and "2.2 x the mean load (at most 3.5 x)" in result.stderr
    with_profile = json.loads(run("generate", model, "-p", "a", "--profile", "--json").stdout)
    assert with_profile["profile"] == PROFILE.to_dict()
    assert "profile" not in json.loads(run("generate", model, "-p", "a", "--json").stdout)


def test_generate_never_prints_half_a_character(llama: type[FakeLlama], model: str) -> None:
    """Guards against a replacement character at the end of an answer that -n cuts inside of a character."""
    llama.answers = [[*"a€".encode(), END]] * 2
    assert run("generate", model, "-p", "a", "-n", "3").stdout == "a\n"
    fields = json.loads(run("generate", model, "-p", "a", "-n", "3", "--json").stdout)
    assert (fields["text"], fields["tokens"]) == ("a", list("a€".encode()[:3]))


def test_generate_reads_the_prompt_from_stdin(llama: type[FakeLlama], model: str) -> None:
    """Guards against the newline of `echo` becoming a part of the prompt."""
    assert run("generate", model, "-f", "-", stdin="two\nlines\n").exit_code == 0
    assert llama.prompts == ["two\nlines"]


def test_generate_refuses_a_prompt_that_is_not_text(llama: type[FakeLlama], model: str) -> None:
    """Guards against a binary file silently becoming a prompt."""
    result = run("generate", model, "-f", "-", stdin=b"a\xff")
    assert result.exit_code == 2
    assert "byte 0xff at offset 1" in result.stderr


def test_generate_chat_uses_the_template_of_the_model(llama: type[FakeLlama], model: str) -> None:
    """Guards against --chat that sends the bare prompt."""
    run("generate", model, "-p", "Hi", "--chat")
    assert llama.prompts == ["<user>Hi<model>"]


def test_generate_stops_at_the_end_of_the_context(llama: type[FakeLlama], model: str) -> None:
    """Guards against running past the context with -n -1, and against contexts llama.cpp would round by itself."""
    llama.answers = [b"x" * 1000]
    result = run("generate", model, "-p", "p" * 50, "-n", "-1", "--ctx", "200")
    assert llama.options["n_ctx"] == 256
    assert result.stdout == "x" * 206 + "\n"
    too_long = run("generate", model, "-p", "p" * 256, "--ctx", "200")
    assert too_long.exit_code == 1
    assert error_lines(too_long) == [
        "edgemoe: error: the prompt does not fit into the context: 256 tokens, expected at most 255; "
        "shorten it or use --ctx 512"
    ]


def test_generate_interrupted_exits_with_130(llama: type[FakeLlama], model: str) -> None:
    """Guards against an interrupted run that looks complete to a script."""
    llama.answers = [[*b"abc", KeyboardInterrupt()]]
    result = run("generate", model, "-p", "a")
    assert result.exit_code == 130
    assert result.stdout == "abc"


@pytest.mark.parametrize(("size", "n_bytes"), [("1.5GiB", 3 << 29), ("1500MB", 1_500_000_000), ("1073741824", 1 << 30)])
def test_sizes_reach_the_model_as_bytes(llama: type[FakeLlama], model: str, size: str, n_bytes: int) -> None:
    """Guards against a budget read in the wrong unit."""
    assert run("generate", model, "-p", "a", "--memory", size).exit_code == 0
    assert llama.options["memory"] == n_bytes
