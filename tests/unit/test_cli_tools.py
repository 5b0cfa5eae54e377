# SPDX-License-Identifier: MIT
"""`edgemoe plan`, `inspect`, `doctor` and `convert`; the machine and the converter are stand-ins."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import edgemoe
from edgemoe.cli.console import Progress
from edgemoe.errors import BackendError
from edgemoe.types import Plan
from tests.unit.fakes import PLAN, error_lines, run

# ---------------------------------------------------------------- plan and inspect


def planner(floor_bytes_of_ctx: Callable[[int], int], asked: list[dict[str, Any]] | None = None) -> Callable[..., Plan]:
    """A planner whose floor depends on the context; it appends the other options that it is given to `asked`."""
    asked = [] if asked is None else asked

    def plan(path: Path, *, memory: int | None = None, n_ctx: int = 4096, **options: Any) -> Plan:
        asked.append(options)
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


def test_plan_has_the_options_of_loading(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a plan of other options than the model will be loaded with, also where a context is advised."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setitem(vars(edgemoe), "plan", planner(lambda n_ctx: (200 << 20) + n_ctx * 65536 + 1, asked))
    chosen = ["--prefetch", "2", "--draft", "ngram", "--eviction", "lfu", "--no-warm-start", "--threads", "3"]
    assert run("plan", model, "--memory", "300MiB", "--kernels", "ggml", *chosen).exit_code == 1
    chosen_bias = ["--reuse-bias", "0.1", "--reuse-method", "max-rank", "--top-j", "2", "--expert-top-k", "top-p:0.9"]
    assert run("plan", model, "--memory", "300MiB", "--kernels", "ggml", *chosen, *chosen_bias).exit_code == 1
    expected = {"prefetch": "2", "draft": "ngram", "eviction": "lfu", "warm_start": False, "kernels": "ggml"}
    expected |= {"reuse_bias": "off", "reuse_method": "cache-prior", "top_j": None, "reuse_price": None}
    expected |= {"expert_top_k": "off", "on_miss": "wait", "on_miss_mass": 0.6, "on_miss_skip_mass": None}
    expected |= {"lowbit": None}
    biased = [options for options in asked if options["reuse_bias"] == "0.1"]
    assert len(biased) == 3
    assert all((options["reuse_method"], options["top_j"]) == ("max-rank", 2) for options in biased)
    assert all(options["expert_top_k"] == "top-p:0.9" for options in biased)
    asked = [options for options in asked if options not in biased]
    assert len(asked) == 3
    assert all(options == {**expected, "n_threads": 3, "n_threads_batch": 3} for options in asked)


def test_plan_says_what_predictions_and_drafts_take(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against options whose memory nobody can see."""
    made = dataclasses.replace(PLAN, prefetch_bytes=3 << 20, draft_buffers_bytes=5 << 20)
    monkeypatch.setitem(vars(edgemoe), "plan", lambda path, **options: made)
    assert "of the buffers: prefetch 3 MiB; drafts take up to 5 MiB of the slots" in run("plan", model).stdout
    assert json.loads(run("plan", model, "--json").stdout)["draft_buffers_bytes"] == 5 << 20


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


class FormatPath(NamedTuple):
    """As `edgemoe.runtime.FormatPath`, which imports the native core."""

    type_name: str
    n_tensors: int
    n_own: int


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, gguf: None) -> types.SimpleNamespace:
    """A machine on which nothing is slow; a test makes one thing worse."""
    fake = types.SimpleNamespace(
        cgroup_memory_limit_bytes=lambda: None,
        available_memory_bytes=lambda: 4 << 30,
        default_budget_bytes=lambda: 3 << 30,
        cgroup_dirs=lambda controller: [],
        disk_bandwidth_bytes_per_s=lambda path, block_bytes: 2e9,
        direct_io_supported=lambda path: True,
    )
    topology = types.SimpleNamespace(
        allowed_cpus=lambda: {0, 1},
        fast_cpus=lambda cpus: cpus,
        n_physical_cores=len,
        n_usable_cpus=lambda cpus, directories: len(cpus),
        default_threads=lambda: 2,
    )
    isas = {"avx512_vnni": False, "avx2": True, "scalar": True}
    fake.native = types.SimpleNamespace(
        versions=lambda: {"edgemoe": "1", "ggml_built_against": "a", "ggml_loaded": "a"},
        isa=lambda: "avx2",
        isas=lambda: [types.SimpleNamespace(name=name, is_supported=has) for name, has in isas.items()],
        active_isa=lambda: "avx2",
        find_format=lambda name: name in ("Q4_K", "Q6_K"),
    )
    fake.runtime = types.SimpleNamespace(
        examine_formats=lambda model: [FormatPath("Q4_K", 2, 2), FormatPath("Q6_K", 1, 1)],
        kernels_used=lambda paths, isa: isa if paths[0].n_own else "ggml",
    )
    monkeypatch.delenv("EDGEMOE_ISA", raising=False)
    monkeypatch.setitem(vars(edgemoe), "host", fake)
    monkeypatch.setitem(vars(edgemoe), "topology", topology)
    monkeypatch.setitem(vars(edgemoe), "_native", fake.native)
    monkeypatch.setitem(vars(edgemoe), "runtime", fake.runtime)
    plan = dataclasses.replace(PLAN, slots_bytes=PLAN.expert_bank_bytes)
    monkeypatch.setitem(vars(edgemoe), "plan", lambda path: plan)
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
    """Guards against slow storage that nobody mentions."""
    machine.disk_bandwidth_bytes_per_s = lambda path, block_bytes: 100e6
    machine.direct_io_supported = lambda path: False
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    result = run("doctor", model)
    assert result.exit_code == 0
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert ["O_DIRECT" in warnings[0], "the disk reads" in warnings[1]] == [True] * 2


def test_doctor_goes_on_when_a_part_is_broken(machine: types.SimpleNamespace, model: str) -> None:
    """Guards against a doctor that dies of the illness: a core that does not load must not hide the rest."""
    machine.native.versions = lambda: 1 / 0
    result = run("doctor", model, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [finding["severity"] for finding in report["findings"]] == ["error"]
    assert report["disk_bytes_per_s"] == 2_000_000_000


def test_doctor_shows_the_kernels(machine: types.SimpleNamespace, model: str) -> None:
    """Guards against nobody being able to tell which kernels run, and why."""
    report = json.loads(run("doctor", model, "--json").stdout)
    assert report["kernels_compiled"] == ["avx512_vnni", "avx2", "scalar"]
    assert report["kernels_supported"] == ["avx2", "scalar"]
    assert (report["kernels_active"], report["EDGEMOE_ISA"]) == ("avx2", None)
    assert report["kernels_of_formats"] == {"Q4_K": "avx2", "Q6_K": "avx2"}
    table = run("doctor", model).stdout
    assert "kernels_supported           avx2, scalar" in table
    assert "kernels_of_formats          Q4_K avx2, Q6_K avx2" in table


def test_doctor_says_which_formats_are_slow(machine: types.SimpleNamespace, model: str) -> None:
    """Guards against a model that is slow for a reason that only its author could guess."""
    machine.runtime.examine_formats = lambda model: [FormatPath("Q5_0", 48, 0), FormatPath("Q4_K", 3, 1)]
    warnings = [line for line in run("doctor", model).stdout.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: Q5_0 has no fast path: ggml's dot products multiply 48 expert tensors",
        "warning: Q4_K has no fast path for rows of this length: ggml's dot products multiply 2 expert tensors",
    ]


def test_doctor_reports_a_bad_instruction_set_once(
    machine: types.SimpleNamespace, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a traceback, a report that ends there, and one cause that reads like three."""

    def refuse(*_args: Any, **_options: Any) -> Any:
        raise BackendError("EDGEMOE_ISA=avx9: no such instruction set; compiled here: avx2, scalar")

    monkeypatch.setenv("EDGEMOE_ISA", "avx9")
    machine.native.active_isa = machine.runtime.examine_formats = refuse
    monkeypatch.setitem(vars(edgemoe), "plan", refuse)
    result = run("doctor", model, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [finding["text"] for finding in report["findings"]] == [
        "cannot examine the kernels: EDGEMOE_ISA=avx9: no such instruction set; compiled here: avx2, scalar"
    ]
    assert (report["EDGEMOE_ISA"], report["kernels_active"]) == ("avx9", None)
    assert report["kernels_supported"] == ["avx2", "scalar"]


@pytest.mark.parametrize(
    ("override", "n_supported", "active", "finding"),
    [
        ("scalar", 2, "scalar", "EDGEMOE_ISA=scalar keeps edgemoe's kernels from avx2"),
        ("scalar", 1, "scalar", "edgemoe's portable code multiplies; unset EDGEMOE_ISA"),
        ("", 1, "ggml", "fast with (avx512_vnni, avx2): ggml multiplies"),
    ],
)
def test_doctor_says_why_the_kernels_are_slow(
    machine: types.SimpleNamespace,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    n_supported: int,
    active: str,
    finding: str,
) -> None:
    """Guards against an override that was forgotten, and an old processor whose every format gets a warning."""
    if override:
        monkeypatch.setenv("EDGEMOE_ISA", override)
    names = ["avx512_vnni", "avx2", "scalar"]
    isas = [types.SimpleNamespace(name=name, is_supported=i >= 3 - n_supported) for i, name in enumerate(names)]
    machine.native.isas = lambda: isas
    machine.native.active_isa = lambda: "scalar"
    n_own = 2 if override else 0
    machine.runtime.examine_formats = lambda model: [FormatPath("Q4_K", 2, n_own)]
    report = json.loads(run("doctor", model, "--json").stdout)
    assert report["kernels_active"] == active
    assert len(report["findings"]) == 1
    assert finding in report["findings"][0]["text"]


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


# ---------------------------------------------------------------- progress


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_a_line_a_stage_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against bars that fill logs, that stay behind on the screen, and that pass their end."""
    steps = [("hash", 1, 4), ("convert", 1, 2), ("convert", 2, 2), ("check", 0, 0), ("check", 9, 4)]
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress() as progress:
            for step in steps:
                progress(*step)
        shown = stderr.getvalue()
        if not stderr.isatty():
            assert shown.splitlines() == ["edgemoe: hash", "edgemoe: convert", "edgemoe: check"]
            continue
        frames = shown.split("\r\033[K")
        assert frames[1] == "hash [########......................]  25%"
        assert frames[3] == f"convert [{'#' * 30}] 100%"
        assert frames[4] == "check ..." and frames[5].endswith("100%") and frames[-1] == ""
