# SPDX-License-Identifier: MIT
"""The table of `benchmarks.scheduler`: how it goes on after a cut, and that what it reports follows from the runs."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cgroup, larger_than_memory, loopdev, prompts, scheduler
from benchmarks.larger_than_memory import RESIDENT, Scenario
from benchmarks.scheduler import BASELINE, Table

OURS = "ours"
SCENARIOS = [Scenario(RESIDENT, "local", 9000, 1, 2), Scenario("25%", "local", 1000, 3, 1)]


def _run(scenario: str, pair: int, engine: str, speed: float, **more: Any) -> dict[str, Any]:
    run = {"scenario": scenario, "routing": "local", "pair": pair, "engine": engine, "decode_tok_per_s": speed}
    run |= {"pass": "warm" if scenario == RESIDENT else "cold", "disturbed": False, "best_ids_sha256": "same"}
    run |= {"ttft_s": 1.0, "decode_read_bytes_per_token": 0.0 if scenario == RESIDENT else 100.0, "order": []}
    run |= {"disk_bytes_per_s": [900.0, 1000.0], "decode_stall_s": 0.5, "decode_hit_rate": 0.8, "n_decoded": 10}
    return {**run, "cgroup_oom_kills": 0, "commit": "abc", **more}


class _Machine:
    """Stands in for cgroups, mounts and runs; `cut_after`: pairs until somebody stops the table."""

    def __init__(self, cut_after: int = 1000, failing: int = 0) -> None:
        self.pairs: list[tuple[str, int, list[str]]] = []
        self.cut_after = cut_after
        self.failing = failing

    def run_pair(self, scenario: Scenario, pair: int, _model: Path, _sizes: Any, options: Any) -> list[dict[str, Any]]:
        if len(self.pairs) == self.cut_after:
            raise KeyboardInterrupt
        self.pairs.append((scenario.name, pair, list(options.engines)))
        if len(self.pairs) == self.failing:
            return [_run(scenario.name, pair, engine, 0.0, error="killed") for engine in options.engines]
        return [_run(scenario.name, pair, engine, 10.0) for engine in options.engines]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def _call(machine: _Machine, model: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    @contextlib.contextmanager
    def mounted(*_: object, **__: object) -> Iterator[Path]:
        yield model.parent

    monkeypatch.setattr(larger_than_memory, "run_pair", machine.run_pair)
    monkeypatch.setattr(larger_than_memory, "measure_sizes", lambda _: None)
    monkeypatch.setattr(larger_than_memory, "make_scenarios", lambda *_: list(SCENARIOS))
    monkeypatch.setattr(loopdev, "image_with", lambda *_: model)
    monkeypatch.setattr(loopdev, "LoopMount", mounted)
    monkeypatch.setattr(cgroup, "MemoryCgroup", lambda *_: argparse.Namespace(close=lambda: None))
    given = ["--model", str(model), "--json", str(model.parent / "out.json"), "--work-dir", str(model.parent)]
    return scheduler.main([*given, "--pairs", "3", "--resident-pairs", "1", *arguments])


def test_a_table_that_was_cut_goes_on(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Guards against hours of runs lost to a cut, runs made twice, and cells that are measured one after another."""
    first = _Machine(cut_after=2)
    with pytest.raises(KeyboardInterrupt):
        _call(first, model, monkeypatch)
    assert [pair[:2] for pair in first.pairs] == [(RESIDENT, 0), ("25%", 0)]
    second = _Machine()
    assert _call(second, model, monkeypatch) == 0
    assert [pair[:2] for pair in second.pairs] == [("25%", 1), ("25%", 2)]
    assert first.pairs[0][2] == [OURS] and second.pairs[0][2] == list(scheduler.METHODS)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads((model.parent / "out.json").read_text())
    assert len(line["tables"][0]["runs"]) == 1 + 3 * len(scheduler.METHODS)
    third = _Machine()
    assert _call(third, model, monkeypatch, "--pairs", "4") == 0
    assert [pair[:2] for pair in third.pairs] == [("25%", 3)]


def test_a_failed_pair_is_run_again(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Guards against a run that failed once and stays in the table for ever, or is counted as done."""
    assert _call(_Machine(failing=2), model, monkeypatch) == 1
    assert "killed" in capsys.readouterr().err
    again = _Machine()
    assert _call(again, model, monkeypatch) == 0
    assert [pair[:2] for pair in again.pairs] == [("25%", 0)]


@pytest.mark.parametrize(
    ("change", "named"),
    [(["--seed", "2"], "seed"), (["--decode-tokens", "32"], "decode_tokens"), (["--engines", "ours"], "engines")],
)
def test_other_settings_are_no_continuation(
    change: list[str], named: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Guards against one table made of runs that cannot be compared."""
    assert _call(_Machine(), model, monkeypatch) == 0
    machine = _Machine()
    assert _call(machine, model, monkeypatch, *change) == 2
    assert named in capsys.readouterr().err and not machine.pairs


def test_another_file_is_no_continuation(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Guards against runs of two models under one name, and a traceback where the file is no table at all."""
    assert _call(_Machine(), model, monkeypatch) == 0
    model.write_bytes(b"GGUF, other weights")
    assert _call(_Machine(), model, monkeypatch) == 2
    assert "another file" in capsys.readouterr().err
    (model.parent / "out.json").write_text('{"settings": 3')
    assert _call(_Machine(), model, monkeypatch) == 2
    assert "expected a table" in capsys.readouterr().err


def test_lines_follow_from_the_runs() -> None:
    """Guards against ratios across pairs, a roof without the ceiling, and a run's stall taken for a token's."""
    runs = [_run(RESIDENT, 0, OURS, 8.0)]
    # The machine halved its speed in the second pair: within pairs ours is 1.25 and 1.5 times the baseline.
    for pair, (ours, base) in enumerate([(5.0, 4.0), (3.0, 2.0), (5.0, 4.0)]):
        runs += [_run("25%", pair, OURS, ours), _run("25%", pair, BASELINE, base)]
    lines = scheduler.summarize(Table({"name": "m"}, SCENARIOS, runs))
    assert [line["method"] for line in lines] == [OURS, BASELINE]
    ours = lines[0]
    assert sorted(ours["ratio"]) == [1.25, 1.25, 1.5] and lines[1]["ratio"] == [1.0] * 3
    # The roof: 8 tok/s of computing, and 1000 bytes/s for 100 bytes a token.
    assert ours["roofline_fraction"] == [5 / 8, 3 / 8, 5 / 8]
    assert ours["stall_s_per_token"] == [0.05] * 3
    found = {one["what"]: one for one in scheduler.find_targets(lines)}
    assert found["roofline, m, 25% local"]["found"] == 5 / 8 and not found["roofline, m, 25% local"]["met"]
    assert found["best of 25-50 % local / lru without prefetch"]["found"] == 1.25
    assert found["worst cell / lru without prefetch"]["met"]


def test_ratios_to_another_baseline() -> None:
    """Guards against levers compared with something other than what was asked for, or with nothing."""
    lossy = "ours:reuse_bias=0.5"
    runs = [_run("25%", pair, OURS, 4.0) for pair in range(3)]
    runs += [_run("25%", pair, lossy, 5.0, decode_read_bytes_per_token=50.0) for pair in range(3)]
    lines = {line["method"]: line for line in scheduler.summarize(Table({"name": "m"}, SCENARIOS, runs), OURS)}
    assert lines[lossy]["ratio"] == [1.25] * 3 and lines[lossy]["bytes_ratio"] == [0.5] * 3
    runs += [
        _run("100%", pair, engine, 4.0, decode_read_bytes_per_token=0.0) for pair in range(3) for engine in (OURS,)
    ]
    everything = [*SCENARIOS, Scenario("100%", "local", 2000, 3, 1)]
    lines = {line["experts"]: line for line in scheduler.summarize(Table({"name": "m"}, everything, runs), OURS)}
    assert lines["100%"]["bytes_ratio"] == []


def test_baseline_must_be_an_engine(capsys: Any) -> None:
    """Guards against an hour of runs without the one that all are compared with."""
    with pytest.raises(SystemExit):
        scheduler.parse_options(["--baseline", "ours", "--engines", "stock"])
    assert "baseline ours: expected one of the engines" in capsys.readouterr().err


def test_lossy_engines_may_choose_other_tokens() -> None:
    """Guards against a benchmark of levers that always fails, and one in which a lossless engine changes the answer."""
    runs = [_run("25%", 0, OURS, 4.0), _run("25%", 0, "ours:reuse_bias=0.5", 5.0, best_ids_sha256="other")]
    assert larger_than_memory.find_faults(runs) == []
    for engine in ("ours:reuse_bias=off", "ours:eviction=lru", "ours:on_miss=wait,top_j=2"):
        wrong = _run("25%", 0, engine, 5.0, best_ids_sha256="other")
        assert len(larger_than_memory.find_faults([*runs, wrong])) == 1


def test_targets_without_runs_are_missed() -> None:
    """Guards against a table without figures that reports success."""
    assert not any(one["met"] for one in scheduler.find_targets([]))


class _Recorder:
    """A model that notes what it evaluates, and has one hit less for each token read in the last long batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def reset(self) -> None:
        self.batches = []

    def eval(self, tokens: list[int]) -> None:
        self.batches.append(list(tokens))

    def reset_stats(self) -> None:
        self.n_before = len(self.batches)

    def stats(self) -> Any:
        return argparse.Namespace(expert_hit_rate=len(self.batches) - self.n_before)


@pytest.mark.parametrize("n_prompt", [prompts.N_SHORT, prompts.N_LONG])
def test_long_and_short_prompts_read_the_same_tokens(n_prompt: int) -> None:
    """Guards against hit rates of two texts, or of tokens other than the ones after the prompt."""
    tokens = list(range(prompts.N_BEFORE + prompts.N_LONG + prompts.N_AFTER))
    llm = _Recorder()
    assert prompts.hits_after(llm, tokens, n_prompt) == prompts.N_AFTER
    assert [token for batch in llm.batches for token in batch] == tokens
    assert llm.batches[0] == tokens[: prompts.N_BEFORE]
    assert [len(batch) for batch in llm.batches[1:] if len(batch) > 1] == [n_prompt]
    assert llm.batches[-prompts.N_AFTER - 1] == tokens[-prompts.N_AFTER - n_prompt : -prompts.N_AFTER]
