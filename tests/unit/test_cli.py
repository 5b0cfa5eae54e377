# SPDX-License-Identifier: MIT
"""The command line: exit codes, what goes to stdout, and how a conversation goes on.

The fakes stand in for the model, the machine and the converter only; each token of the fake model is one byte of text.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import edgemoe
from edgemoe.cli import completion, doctor
from edgemoe.cli.main import cli
from edgemoe.errors import BudgetError, ExpertReadError
from edgemoe.types import Plan, Stats

END = 256
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)
STATS = Stats(
    prompt_tokens=7,
    completion_tokens=5,
    prefill_tokens_per_s=90.0,
    decode_tokens_per_s=12.5,
    ttft_s=0.25,
    load_s=1.0,
    load_bytes_read=100,
    expert_hits=30,
    expert_misses=10,
    expert_late_hits=0,
    expert_bytes_read=4096,
    stall_s=0.5,
    n_slots=16,
    slots_bytes=1 << 20,
    peak_rss_bytes=1 << 28,
    budget_bytes=1 << 29,
    kernels="ggml",
)
PLAN = Plan(
    fits=True,
    budget_bytes=1 << 30,
    floor_bytes=300 << 20,
    dense_bytes=100 << 20,
    kv_bytes=64 << 20,
    buffers_bytes=32 << 20,
    slots_bytes=200 << 20,
    slack_bytes=16 << 20,
    token_cycle_bytes=88 << 20,
    expert_bank_bytes=400 << 20,
    n_experts=8,
    n_experts_used=2,
    n_moe_layers=30,
)


class FakeLlama:
    """A model that answers what it is told to, and keeps what it was asked."""

    answers: list[Sequence[int | BaseException]]
    prompts: list[str]
    options: dict[str, Any]
    plan = PLAN

    def __init__(self, path: Path, **options: Any) -> None:
        type(self).options = options
        self.metadata = {"tokenizer.chat_template": TEMPLATE}
        self.budget_bytes = STATS.budget_bytes
        options["progress"]("loading", 0, 1)

    def __enter__(self) -> FakeLlama:
        return self

    def __exit__(self, *exc_info: object) -> None: ...

    def n_ctx(self) -> int:
        return int(self.options["n_ctx"])

    def token_bos(self) -> int:
        return -1

    token_eos = token_bos

    def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        return list(text)

    def detokenize(self, tokens: list[int]) -> bytes:
        return bytes(tokens)

    def set_seed(self, seed: int) -> None:
        self.options["seed"] = seed

    def generate(self, tokens: list[int], temp: float) -> Iterator[int]:
        self.prompts.append(bytes(tokens).decode())
        self.options["temp"] = temp
        for token in self.answers.pop(0) if self.answers else []:
            if isinstance(token, BaseException):
                raise token
            yield token
        while True:
            yield END

    def stats(self) -> Stats:
        return dataclasses.replace(STATS, budget_bytes=self.budget_bytes)

    def set_memory(self, size: int) -> None:
        if size < PLAN.floor_bytes:
            raise BudgetError("budget 1 MiB is below the floor 300 MiB; use --memory 300MiB")
        self.budget_bytes = size

    def reset(self) -> None:
        self.prompts.append("reset")


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> type[FakeLlama]:
    """Puts the fake in the place of `edgemoe.Llama`; its class keeps the answers and what was asked."""

    class Fresh(FakeLlama):
        pass

    Fresh.answers, Fresh.prompts, Fresh.options = [], [], {}

    monkeypatch.setitem(vars(edgemoe), "Llama", Fresh)
    monkeypatch.setattr(completion, "is_end_of_generation", lambda llm, token: token == END)
    return Fresh


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The path of a file that exists; the fakes do not read it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return str(path)


def run(*args: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, args, input=stdin, prog_name="edgemoe")


def error_lines(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("edgemoe: error: ")]


# ---------------------------------------------------------------- errors and usage


def test_importing_the_command_line_is_light() -> None:
    """Guards against `edgemoe --help` taking seconds because it loads the engine."""
    script = "import sys, edgemoe.cli.main; print([m for m in ('numpy', 'llama_cpp', 'gguf') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_version() -> None:
    """Guards against a version that differs from the package's."""
    assert run("--version").stdout == f"edgemoe {edgemoe.__version__}\n"


@pytest.mark.parametrize("command", ["chat", "generate", "plan", "inspect", "doctor", "convert"])
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


def test_generate_json_is_the_last_line(llama: type[FakeLlama], model: str) -> None:
    """Guards against scripts that cannot parse the result, and against token ids that are not the generated ones."""
    llama.answers = [[*"né".encode(), END]]
    result = run("generate", model, "-p", "a", "--json")
    assert json.loads(result.stdout) == {**STATS.to_dict(), "text": "né", "tokens": list("né".encode())}
    assert result.stdout.count("\n") == 1


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


# ---------------------------------------------------------------- chat


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
    assert "unknown command /nonsense" in result.stderr
    assert "budget_bytes          512 MiB" in result.stderr
    assert len(error_lines(result)) == 2  # a budget below the floor, and what is not a size


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


# ---------------------------------------------------------------- plan and inspect


def planner(floor_bytes_of_ctx: Callable[[int], int]) -> Callable[..., Plan]:
    """A planner whose floor depends on the context."""

    def plan(path: Path, *, memory: int | None = None, n_ctx: int = 4096) -> Plan:
        budget_bytes, floor_bytes = memory or PLAN.budget_bytes, floor_bytes_of_ctx(n_ctx)
        return dataclasses.replace(
            PLAN, fits=budget_bytes >= floor_bytes, budget_bytes=budget_bytes, floor_bytes=floor_bytes
        )

    return plan


def test_plan_that_fits(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a table whose parts do not add up to its total."""
    monkeypatch.setitem(vars(edgemoe), "plan", planner(lambda n_ctx: 300 << 20))
    result = run("plan", model)
    assert result.exit_code == 0
    assert "total              412 MiB" in result.stdout
    assert "the slots hold 50%" in result.stdout


def test_plan_that_does_not_fit_says_what_would(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a refusal without a way out, or advice that would be refused as well."""
    monkeypatch.setitem(vars(edgemoe), "plan", planner(lambda n_ctx: (200 << 20) + n_ctx * 65536 + 1))
    result = run("plan", model, "--memory", "300MiB")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].endswith("use --memory 457MiB or --ctx 1024")


def test_plan_json_tells_fitting_by_the_exit_code_too(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a script that reads advice instead of JSON, or takes a plan that does not fit for a good one."""
    monkeypatch.setitem(vars(edgemoe), "plan", planner(lambda n_ctx: 2 << 30))
    result = run("plan", model, "--json")
    assert result.exit_code == 1
    fields = json.loads(result.stdout)
    assert (fields["fits"], fields["floor_bytes"]) == (False, 2 << 30)


def gguf_model(path: str) -> types.SimpleNamespace:
    """A model of one dense tensor and two expert tensors of eight experts."""
    expert_tensors = [
        types.SimpleNamespace(name=f"blk.0.ffn_{name}_exps.weight", shape=(64, 32, 8), type_name=kind, n_bytes=n_bytes)
        for name, kind, n_bytes in (("up", "Q4_K", 9216), ("down", "Q6_K", 13440))
    ]
    dense = types.SimpleNamespace(name="token_embd.weight", shape=(64, 100), type_name="F16", n_bytes=12800)
    return types.SimpleNamespace(
        path=Path(path),
        files=[Path(path)],
        metadata={"general.name": "Tiny"},
        architecture="llama",
        tensors=[dense, *expert_tensors],
        expert_tensors=expert_tensors,
        n_experts=8,
        n_experts_used=2,
        n_moe_layers=1,
        dense_bytes=12800,
        expert_bank_bytes=22656,
        token_cycle_bytes=5664,
        expert_bytes=2832,
    )


@pytest.fixture
def gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every file be the model of `gguf_model`."""
    reader = types.SimpleNamespace(read_model=gguf_model)
    monkeypatch.setitem(sys.modules, "edgemoe.formats.gguf", reader)


def test_inspect(gguf: None, model: str) -> None:
    """Guards against parameter counts and quantization types that do not match the tensors."""
    facts = json.loads(run("inspect", model, "--json").stdout)
    assert facts["n_parameters"] == 6400 + 2 * 16384
    assert facts["n_parameters_used"] == 6400 + 2 * 4096
    assert facts["expert_types"] == {"Q4_K": {"tensors": 1, "bytes": 9216}, "Q6_K": {"tensors": 1, "bytes": 13440}}
    assert facts["files"] == [{"path": model, "bytes": 4}]
    table = run("inspect", model).stdout
    assert "2 of 8 in each of 1 layers" in table
    assert "Tiny" in table


# ---------------------------------------------------------------- doctor


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, gguf: None) -> types.SimpleNamespace:
    """A machine on which nothing is slow; a test makes one thing worse."""
    fake = types.SimpleNamespace(
        cgroup_memory_limit_bytes=lambda: None,
        available_memory_bytes=lambda: 4 << 30,
        default_budget_bytes=lambda: 3 << 30,
        disk_bandwidth_bytes_per_s=lambda path, block_bytes: 2e9,
        direct_io_supported=lambda path: True,
    )
    native = types.SimpleNamespace(
        versions=lambda: {"edgemoe": "1", "ggml_built_against": "a", "ggml_loaded": "a"}, isa=lambda: "avx2"
    )
    monkeypatch.setitem(vars(edgemoe), "host", fake)
    monkeypatch.setitem(vars(edgemoe), "_native", native)
    plan = dataclasses.replace(PLAN, slots_bytes=PLAN.expert_bank_bytes)
    monkeypatch.setitem(vars(edgemoe), "plan", lambda path: plan)
    monkeypatch.setattr(doctor, "_usable_cpus", lambda n_logical: n_logical)
    return fake


def test_doctor_finds_nothing_on_a_good_machine(machine: types.SimpleNamespace, model: str) -> None:
    """Guards against warnings that everybody gets and nobody reads."""
    result = run("doctor", model)
    assert result.exit_code == 0
    assert "nothing found" in result.stdout
    assert json.loads(run("doctor", model, "--json").stdout)["expert_block_bytes"] == 13440 // 8


def test_doctor_explains_what_is_slow(
    machine: types.SimpleNamespace, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against slow storage or too many threads that nobody mentions."""
    machine.disk_bandwidth_bytes_per_s = lambda path, block_bytes: 100e6
    machine.direct_io_supported = lambda path: False
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(doctor, "_usable_cpus", lambda n_logical: 2)
    result = run("doctor", model)
    assert result.exit_code == 0
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert ["--threads 2" in warnings[0], "O_DIRECT" in warnings[1], "the disk reads" in warnings[2]] == [True] * 3


def test_doctor_goes_on_when_a_part_is_broken(
    machine: types.SimpleNamespace, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a doctor that dies of the illness: a core that does not load must not hide the rest."""
    monkeypatch.setitem(vars(edgemoe), "_native", types.SimpleNamespace(versions=lambda: 1 / 0))
    result = run("doctor", model, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [finding["severity"] for finding in report["findings"]] == ["error"]
    assert report["disk_bytes_per_s"] == 2_000_000_000


# ---------------------------------------------------------------- convert


@pytest.fixture
def upcycled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts a converter that only writes a mark in the place of `upcycle`; the list holds its calls."""
    calls: list[dict[str, Any]] = []

    def upcycle(source: Path, out: Path, **options: Any) -> None:
        calls.append(options)
        out.write_bytes(b"made")

    package = types.SimpleNamespace(upcycle=types.SimpleNamespace(upcycle=upcycle))
    monkeypatch.setitem(sys.modules, "edgemoe.converters", package)
    monkeypatch.setitem(sys.modules, "edgemoe.converters.upcycle", package.upcycle)
    return calls


def test_upcycle_passes_its_options(upcycled: list[dict[str, Any]], model: str, tmp_path: Path) -> None:
    """Guards against options that do not reach the converter."""
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    options = ["--experts", "4", "--top-k", "1", "--seed", "9", "--calibration", str(text)]
    result = run("convert", "upcycle", model, str(tmp_path / "out.gguf"), *options)
    assert result.exit_code == 0
    expected = {"n_experts": 4, "n_experts_used": 1, "seed": 9, "calibration_text": "Some text."}
    assert {name: upcycled[0][name] for name in expected} == expected
    assert result.stdout == f"{tmp_path / 'out.gguf'} (4 B)\n"


def test_upcycle_does_not_overwrite(upcycled: list[dict[str, Any]], model: str, tmp_path: Path) -> None:
    """Guards against losing a model that took hours to make, or the source itself."""
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    refused = run("convert", "upcycle", model, str(out))
    assert (refused.exit_code, out.read_bytes()) == (1, b"precious")
    assert error_lines(refused)[0].endswith("name another or use --force")
    assert run("convert", "upcycle", model, model, "--force").exit_code == 1
    assert run("convert", "upcycle", model, str(out), "--force").exit_code == 0
    assert out.read_bytes() == b"made"
