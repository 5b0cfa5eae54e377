# SPDX-License-Identifier: MIT
"""`edgemoe chat`: how a conversation goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from edgemoe.errors import ExpertReadError
from tests.unit.fakes import FakeLlama, error_lines, run


def test_chat_answers_each_piped_line(llama: type[FakeLlama], model: str) -> None:
    """Guards against prompts on a piped stdout, and against answers that do not know the turns before."""
    llama.answers = [[*b"hello"], [*b"fine"]]
    result = run("chat", model, "--system", "Be kind.", stdin="Hi\n\nHow?\n")
    assert result.exit_code == 0
    assert result.stdout == "hello\nfine\n"
    assert llama.prompts == [
        "<system>Be kind.<user>Hi<model>",
        "<system>Be kind.<user>Hi<assistant>hello<user>How?<model>",
    ]
    assert result.stderr.count("tok/s") == 2


def test_chat_commands_talk_on_stderr(llama: type[FakeLlama], model: str) -> None:
    """Guards against commands that reach the model or stdout, and against /exit that reads on."""
    lines = "/help\n/stats\n/nonsense\n/memory\n/memory 512MiB\n/stats\n/memory 1MiB\n/memory lots\n/exit\nmore\n"
    result = run("chat", model, stdin=lines)
    assert result.exit_code == 0
    assert (result.stdout, llama.prompts) == ("", [])
    assert "/reset " in result.stderr
    assert "expert_hit_rate       0.75" in result.stderr
    assert "kernels               avx512_vnni, ggml for Q5_0" in result.stderr
    assert "unknown command /nonsense" in result.stderr
    assert "budget_bytes          512 MiB" in result.stderr
    assert len(error_lines(result)) == 2  # a budget below the floor, and what is not a size


def test_chat_shows_a_profile_of_each_answer(llama: type[FakeLlama], model: str) -> None:
    """Guards against a profile that is missing, on stdout, or taken while the user types."""
    llama.answers = [b"one", b"two"]
    result = run("chat", model, "--profile", stdin="a\nb\n")
    assert result.stdout == "one\ntwo\n"
    assert result.stderr.count("wait for storage") == 2
    assert [p.startswith("profile") for p in llama.prompts] == [True, False, True] * 2


def test_chat_sends_paths_to_the_model(llama: type[FakeLlama], model: str) -> None:
    """Guards against a turn that begins with a path being taken for a command."""
    run("chat", model, stdin="/etc/fstab is what?\n")
    assert llama.prompts == ["<user>/etc/fstab is what?<model>"]


def test_chat_reset_forgets_the_turns_but_not_the_system_message(llama: type[FakeLlama], model: str) -> None:
    """Guards against a reset that keeps old turns, or drops how the model is to behave."""
    llama.answers = [[*b"a"], [*b"b"]]
    run("chat", model, "--system", "S", stdin="one\n/reset\ntwo\n")
    assert llama.prompts == ["<system>S<user>one<model>", "reset", "<system>S<user>two<model>"]


def test_interrupt_stops_the_answer_and_not_the_chat(llama: type[FakeLlama], model: str) -> None:
    """Guards against Ctrl-C ending the program, and against losing what had been answered until then."""
    llama.answers = [[*b"long sto", KeyboardInterrupt()], [KeyboardInterrupt()], [*b"ok"]]
    result = run("chat", model, stdin="Tell.\nEarly.\nNext.\n")
    assert result.exit_code == 0
    assert result.stdout == "long sto\n\nok\n"
    assert llama.prompts[-1] == "<user>Tell.<assistant>long sto<user>Next.<model>"
    assert result.stderr.count("[stopped]") == 2


def test_second_interrupt_at_the_prompt_leaves(
    llama: type[FakeLlama], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a chat that cannot be left by Ctrl-C, or is left by the first one."""
    lines: Iterator[Any] = iter(
        ["Hi", KeyboardInterrupt(), "Still there?", KeyboardInterrupt(), KeyboardInterrupt(), "Never read"]
    )

    def read_lines() -> Iterator[str]:
        for line in lines:
            if isinstance(line, BaseException):
                raise line
            yield line

    monkeypatch.setattr("edgemoe.cli.chat.read_lines", read_lines)
    llama.answers = [[*b"a"], [*b"b"]]
    result = run("chat", model)
    assert (result.exit_code, result.stdout) == (0, "a\nb\n")


def test_chat_drops_the_oldest_turns_when_the_context_is_full(llama: type[FakeLlama], model: str) -> None:
    """Guards against a conversation that dies at the end of its context, or forgets its system message silently."""
    llama.answers = [[*b"a" * 50], [*b"b" * 50], [*b"c"]]
    stdin = "".join(f"{n}" * 30 + "\n" for n in (1, 2, 3))
    result = run("chat", model, "--system", "S", "--ctx", "256", stdin=stdin)
    assert result.exit_code == 0
    assert llama.prompts[1].startswith("<system>S<user>111")
    assert llama.prompts[2] == f"<system>S<user>{'3' * 30}<model>"
    assert "the context of 256 tokens is full: forgot the oldest 2 turns" in result.stderr


def test_chat_survives_a_turn_longer_than_the_context(llama: type[FakeLlama], model: str) -> None:
    """Guards against one pasted text ending the conversation, or staying in it for ever."""
    llama.answers = [[*b"ok"]]
    result = run("chat", model, "--ctx", "256", stdin="x" * 300 + "\nHi\n")
    assert (result.exit_code, result.stdout) == (0, "ok\n")
    assert llama.prompts == ["<user>Hi<model>"]
    assert "does not fit into the context" in error_lines(result)[0]


def test_chat_fails_when_the_engine_fails(llama: type[FakeLlama], model: str) -> None:
    """Guards against a disk error in the middle of an answer that looks like an answer."""
    llama.answers = [[*b"a", ExpertReadError("cannot read expert 3 of layer 7: input/output error")]]
    result = run("chat", model, stdin="Hi\nMore\n")
    assert result.exit_code == 1
    assert error_lines(result) == ["edgemoe: error: cannot read expert 3 of layer 7: input/output error"]
