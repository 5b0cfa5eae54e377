# SPDX-License-Identifier: MIT
"""Replay: its bound, its names, its command; and the generator of traces."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import traces
from edgemoe import replay as replays
from edgemoe import trace as trace_files
from edgemoe.errors import BackendError, BudgetError
from edgemoe.trace import Trace, TraceLayer
from tests.unit.fakes import error_lines, run


def make_trace(experts: np.ndarray, n_experts: int, batch_of_token: list[int] | None = None) -> Trace:
    """A trace of such selections [n_tokens, n_layers, K]; projections of 4, 4 and 8 KiB."""
    batches = np.array(range(len(experts)) if batch_of_token is None else batch_of_token, np.int32)
    shape = (int(batches[-1]) + 1, experts.shape[1])
    return Trace(
        model="toy",
        layers=tuple(TraceLayer(i, n_experts, experts.shape[2], (4096, 4096, 8192)) for i in range(experts.shape[1])),
        batch_of_token=batches,
        experts=experts.astype(np.int16),
        weights=np.full(experts.shape, np.nan, np.float32),
        begin_us=np.full(shape, np.nan),
        wait_us=np.full(shape, np.nan, np.float32),
        read_bytes=np.full(shape, -1, np.int64),
        resident=None,
    )


@st.composite
def any_trace(draw: st.DrawFn) -> Trace:
    """Small traces, of single tokens and of prompts."""
    n_layers, n_experts = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    n_used = draw(st.integers(1, min(4, n_experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.sampled_from([1, 1, 1, 2, 7]), min_size=1, max_size=25))
    n_tokens, hot = sum(sizes), draw(st.integers(n_used, n_experts))
    experts = np.stack(
        [
            np.stack([rng.permutation(hot if rng.random() < 0.7 else n_experts)[:n_used] for _ in range(n_layers)])
            for _ in range(n_tokens)
        ]
    )
    return make_trace(experts, n_experts, [b for b, size in enumerate(sizes) for _ in range(size)])


@settings(max_examples=120)
@given(trace=any_trace(), share=st.floats(0.05, 1.0), prefetch=st.sampled_from(["off", "auto", "1", "2"]))
def test_no_policy_beats_the_bound(trace: Trace, share: float, prefetch: str) -> None:
    """Guards against a bound that a cache passes, or a cache that hits what it has not read."""
    slots_bytes = max(int(share * replays.bank_bytes(trace)), replays.cycle_bytes(trace) + 8192)
    for policy in replays.POLICIES:
        result = replays.replay(trace, slots_bytes=slots_bytes, eviction=policy, prefetch=prefetch, recall=0.8)
        assert result.all.reads >= result.bound_reads, policy
        assert result.all.bytes_read >= result.bound_bytes, policy
        assert 0.0 <= result.bound_hit_rate <= 1.0
        assert result.decode.total_us <= result.all.total_us
        assert np.isclose(result.batch_us.sum(), result.all.total_us)
        if prefetch == "off":
            assert result.all.reads <= result.all.slices, "each slice is read at most once per layer and batch"
            assert result.all.bytes_read > 0


@pytest.mark.parametrize("name", list(traces.FAMILIES))
def test_generated_traces_keep_the_bound_and_the_order_of_budgets(name: str) -> None:
    """Guards against a simulation in which more memory reads more, or knowing the future does."""
    trace = traces.generate(traces.FAMILIES[name], n_prompt=64, n_decode=60)
    reads = {}
    for share in (0.12, 0.5):
        for policy in replays.POLICIES:
            slots_bytes = max(int(share * replays.bank_bytes(trace)), replays.cycle_bytes(trace))
            result = replays.replay(trace, slots_bytes=slots_bytes, eviction=policy)
            assert result.all.reads >= result.bound_reads
            assert result.decode.n_tokens == 60
            reads[share, policy] = result.all.reads
        assert all(reads[share, "belady"] <= reads[share, p] for p in replays.POLICIES)
    assert all(reads[0.5, p] <= reads[0.12, p] for p in replays.POLICIES)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), keep=st.floats(0.0, 1.0), n_layers=st.integers(1, 5))
def test_fetches_at_most_what_changed(seed: int, keep: float, n_layers: int) -> None:
    """Guards against an LRU pool of a token cycle that evicts what the last token used (ReMoE's bound)."""
    rng = np.random.default_rng(seed)
    experts = np.empty((30, n_layers, 3), np.int64)
    for t, i in np.ndindex(30, n_layers):
        kept = [e for e in experts[t - 1, i] if rng.random() < keep] if t else []
        rest = [e for e in rng.permutation(10) if e not in kept]
        experts[t, i] = (kept + rest)[:3]
    trace = make_trace(experts, 10)
    result = replays.replay(trace, slots_bytes=replays.cycle_bytes(trace), eviction="lru")
    kept_over = (experts[1:, :, :, None] == experts[:-1, :, None, :]).any(axis=3).sum()
    assert result.all.misses + result.all.late_hits <= experts.size - kept_over


def test_the_same_arguments_give_the_same_result() -> None:
    """Guards against a replay that cannot be repeated, and a seed that changes nothing."""
    trace = traces.generate(traces.FAMILIES["OLMoE-1B-7B"], n_prompt=0, n_decode=30)
    again = traces.generate(traces.FAMILIES["OLMoE-1B-7B"], n_prompt=0, n_decode=30)
    assert np.array_equal(trace.experts, again.experts)

    def result(seed: int) -> dict[str, object]:
        disk = replays.Disk(jitter=0.3)
        slots_bytes = replays.bank_bytes(trace) // 4
        return replays.replay(trace, slots_bytes=slots_bytes, prefetch="2", seed=seed, disk=disk).to_dict()

    assert result(1) == result(1) != result(2)


def test_unknown_names_and_impossible_budgets() -> None:
    """Guards against a mistyped policy that silently becomes another."""
    trace = make_trace(np.zeros((2, 1, 1)), 4)
    with pytest.raises(ValueError, match="expected one of auto, lru, lfu, least-stale, utility, belady"):
        replays.replay(trace, slots_bytes=1 << 20, eviction="mru")
    with pytest.raises(ValueError, match="expected one of off, auto, 1, 2"):
        replays.replay(trace, slots_bytes=1 << 20, prefetch="3")
    with pytest.raises(BudgetError, match="at least 2"):
        replays.replay(trace, slots_bytes=4096)
    with pytest.raises(BackendError, match="disk_bytes_per_s"):
        replays.replay(trace, slots_bytes=1 << 20, disk=replays.Disk(bytes_per_s=0.0))


@pytest.fixture
def trace_path(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name under which the command finds a trace."""
    trace = make_trace(np.random.default_rng(1).integers(0, 8, (40, 2, 1)), 8)
    monkeypatch.setattr(trace_files, "load", lambda path: trace, raising=False)
    return "some.trace"


def test_command_shows_every_policy_and_budget(trace_path: str) -> None:
    """Guards against a table that lacks a row, or a share taken of something else."""
    result = run("replay", trace_path, "--memory", "25%", "--memory", "128KiB")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()[4:]]
    assert [r[3] for r in rows] == list(replays.POLICIES) * 2
    assert rows[0][2] == "25%" and rows[6][:3] == ["128", "KiB", "50%"]


def test_command_prints_json(trace_path: str) -> None:
    """Guards against options that do not reach the replay."""
    arguments = ("replay", trace_path, "--policy", "lru", "--memory", "50%", "--json")
    slow = json.loads(run(*arguments, "--disk-mib-per-s", "1").stdout)["results"]
    fast = json.loads(run(*arguments, "--disk-mib-per-s", "1000", "--latency-us", "0").stdout)["results"]
    assert len(slow) == len(fast) == 1
    assert slow[0]["decode"]["tokens_per_s"] < fast[0]["decode"]["tokens_per_s"]
    assert slow[0]["decode"]["hit_rate"] == fast[0]["decode"]["hit_rate"]
    assert fast[0]["bound_bytes"] <= fast[0]["all"]["bytes_read"]


@pytest.mark.parametrize("memory", ["0%", "101%", "x%", "-1", "much"])
def test_command_refuses_memory_that_is_none(trace_path: str, memory: str) -> None:
    """Guards against a traceback for a typing error."""
    result = run("replay", trace_path, "--memory", memory)
    assert result.exit_code == 2
    assert "--memory" in result.stderr


def test_plot_without_matplotlib_says_what_to_install(trace_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an ImportError where an optional package is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("replay", trace_path, "--plot", "x.png")
    assert result.exit_code == 1
    assert "pip install edgemoe[plot]" in error_lines(result)[-1]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_plot_is_written(trace_path: str, tmp_path: Path) -> None:
    """Guards against a plot that fails or stays empty."""
    path = tmp_path / "x.png"
    result = run("replay", trace_path, "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_metrics_of_a_trace_computed_by_hand() -> None:
    """Guards against a fit to figures that mean something else."""
    experts = np.tile(np.array([[[0, 1]], [[1, 2]]], np.int16), (50, 1, 1))  # [0 1], [1 2], [0 1], ...
    assert traces.reuse(experts, 1) == 0.5
    assert traces.reuse(experts, 2) == 1.0
    assert traces.within(experts, 2) == 1.0
    assert traces.static(experts, 0) == 0.75
    assert traces.distinct(experts, 1) == 2.0
    assert traces.distinct(experts, 10) == 3.0
    assert traces.lru(experts, 2) == 0.5
    assert traces.lru(experts, 3) == 1.0
    # Of [0 1] and [1 2], the set {1, 0} has F1 = 2 * 3 / (2 * (2 + 2)) and all three 2 * 4 / (2 * (2 + 3)).
    assert traces.srp(experts, 2) == pytest.approx(0.8)


@pytest.mark.parametrize("name", list(traces.FAMILIES))
def test_fits_are_as_good_as_documented(name: str) -> None:
    """Guards against parameters that no longer belong to the figures beside them."""
    family = traces.FAMILIES[name]
    values = traces.measure(family, family.process)
    errors = [abs(v / t.value - 1.0) for v, t in zip(values, family.targets, strict=True) if t.is_fitted]
    assert max(errors) < 0.26 and np.mean(errors) < 0.17
