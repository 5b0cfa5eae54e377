# SPDX-License-Identifier: MIT
"""`edgemoe bench`: what is compared with what, what advice follows from which number, and how it is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import synthetic
from edgemoe import bench, bench_advice, replay
from edgemoe.bench_advice import WORTH, Measured, advise, decoded
from edgemoe.bench_child import Task
from edgemoe.errors import BackendError
from edgemoe.trace import Trace, TraceLayer
from tests.unit.fakes import PROFILE, error_lines, run

N_LAYERS, N_EXPERTS, N_USED, SLICE_BYTES = 3, 16, 4, 64 << 10
PARTS_MS = {
    "router": 0.1,
    "select": 0.2,
    "wait": 5.0,
    "experts": 2.0,
    "dense": 2.2,
    "sampling": 0.2,
    "overhead": 0.3,
}


def make_trace(n_prompt: int = 8, n_decode: int = 80) -> Trace:
    """A prompt in one batch and decoded tokens that mostly keep the experts of the token before."""
    rng = np.random.default_rng(1)
    n_tokens = n_prompt + n_decode
    experts = np.zeros((n_tokens, N_LAYERS, N_USED), np.int16)
    for i in range(N_LAYERS):
        chosen = rng.permutation(N_EXPERTS)[:N_USED]
        for t in range(n_tokens):
            others = np.setdiff1d(np.arange(N_EXPERTS), chosen)
            chosen = np.append(rng.permutation(chosen)[:2], rng.permutation(others)[:2])
            experts[t, i] = chosen
    batch = np.append(np.zeros(n_prompt, np.int32), np.arange(1, n_decode + 1, dtype=np.int32))
    shape = (n_decode + 1, N_LAYERS)
    layers = tuple(TraceLayer(i, N_EXPERTS, N_USED, (SLICE_BYTES,) * 3) for i in range(N_LAYERS))
    weights = np.full(experts.shape, 0.25, np.float32)
    times = np.zeros(shape)
    return Trace("m", layers, batch, experts, weights, times, times.astype(np.float32), times.astype(np.int64), None)


TRACE = make_trace()
BANK = replay.bank_bytes(TRACE)
MEASURED = Measured(
    profile={},
    parts_ms=PARTS_MS,
    bytes_per_token=1e6,
    slots_bytes=BANK // 2,
    bank_bytes=BANK,
    bits_per_weight=4.5,
    disk_bytes_per_s=1e9,
    n_threads=2,
    n_cores=2,
    kernels="avx512_vnni",
    eviction="lru",
    prefetch="auto",
    trace=TRACE,
)


def found(changes: str, **fields: Any) -> list[bench_advice.Advice]:
    """Advice that says so, from `MEASURED` with other fields."""
    return [one for one in advise(dataclasses.replace(MEASURED, **fields)) if changes in one.change]


# ---------------------------------------------------------------- advice


def test_gain_is_the_part_that_a_change_takes_away() -> None:
    """Guards against a prediction that is not the measured time less what the change saves."""
    (disk,) = found("a disk 2 x")
    assert disk.gain == pytest.approx(10.0 / 7.5)
    assert disk.tokens_per_s == pytest.approx(1000 / 7.5)
    assert "954 MiB/s" in disk.change and "5.00 of 10.00 ms" in disk.because
    (threads,) = found("--threads 4", n_cores=4)
    assert threads.gain == pytest.approx(10.0 / (10.0 - 4.3 / 2))


def test_memory_saves_the_bytes_that_replay_says() -> None:
    """Guards against memory whose worth comes from anything else than this run's choices of experts."""
    (memory,) = found("more memory")
    compute = replay.Compute(dense_us=1000.0, expert_us=2000 / (N_LAYERS * N_USED))
    disk = replay.Disk(bytes_per_s=1e9)
    now, then = (
        replay.replay(TRACE, slots_bytes=n, eviction="lru", disk=disk, compute=compute).decode.bytes_read
        for n in (BANK // 2, BANK * 3 // 4)
    )
    assert then < now
    assert memory.gain == pytest.approx(10.0 / (10.0 - 5.0 * (1 - then / now)))
    assert "75% of the experts" in memory.change
    (nearly_all,) = found("more memory", slots_bytes=BANK - SLICE_BYTES)
    assert "100% of the experts" in nearly_all.change


def test_no_advice_about_what_is_not_slow() -> None:
    """Guards against advice to buy memory, a disk or threads that would change nothing."""
    resident = {"slots_bytes": BANK, "bytes_per_token": 0.0, "parts_ms": {**PARTS_MS, "wait": 0.0}}
    assert advise(dataclasses.replace(MEASURED, **resident)) == []
    assert found("--prefetch", prefetch="1") == found("--threads") == found("bits per weight") == []


def test_prefetch_and_eviction_come_from_replay() -> None:
    """Guards against advice to switch on what is on, or to a rule that this run would be slower with."""
    (prefetch,) = found("--prefetch auto", prefetch="off")
    assert 1.0 < prefetch.gain <= 10.0 / 5.0
    stalls = {
        rule: bench_advice._replay(MEASURED, MEASURED.slots_bytes, rule, "off").stall_us
        for rule in ("lru", "lfu", "least-stale", "utility")
    }
    best, worst = min(stalls, key=lambda r: stalls[r]), max(stalls, key=lambda r: stalls[r])
    (eviction,) = found("--eviction", eviction=worst)
    assert best in eviction.change
    assert eviction.gain == pytest.approx(10.0 / (10.0 - 5.0 * (1 - stalls[best] / stalls[worst])))
    assert found("--eviction", eviction=best) == []


def test_fewer_bits_save_reading_and_multiplying() -> None:
    """Guards against a gain of smaller experts that ignores that more of them fit, or that is there for small ones."""
    (resident,) = found("bits per weight", bits_per_weight=9.0, slots_bytes=BANK, bytes_per_token=0.0)
    assert resident.gain == pytest.approx(10.0 / (10.0 - 2.0 / 2 - 5.0 / 2))
    (streamed,) = found("bits per weight", bits_per_weight=9.0)
    assert streamed.gain > resident.gain


def test_advice_is_sorted_and_worth_its_line() -> None:
    """Guards against the best change in the middle of a list, and noise as advice."""
    gains = [one.gain for one in advise(dataclasses.replace(MEASURED, n_cores=8, prefetch="off", bits_per_weight=16))]
    assert gains == sorted(gains, reverse=True) and len(gains) >= 4
    assert min(gains) >= WORTH
    assert found("a disk", parts_ms={**PARTS_MS, "wait": 0.1}) == []


def test_decoded_part_of_a_trace() -> None:
    """Guards against figures of decoding that are the prompt's."""
    part = decoded(TRACE)
    assert (part.n_tokens, part.n_batches) == (80, 80)
    np.testing.assert_array_equal(part.experts, TRACE.experts[8:])


# ---------------------------------------------------------------- the comparison


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the child processes: `tasks` is what was run, `speeds` what each engine's runs measure, in turn."""
    state: dict[str, Any] = {"tasks": [], "speeds": {"edgemoe": [10.0] * 9, "stock": [5.0] * 9}, "limits": []}

    def fake_run(runner: bench._Runner, task: Task) -> dict[str, Any]:
        state["tasks"].append(task)
        state["limits"].append(runner.limit_bytes)
        speed = state["speeds"][task.engine].pop(0)
        if isinstance(speed, str):
            return {"disturbed": False, "wall_s": 1.0, "error": speed, "crashed": "signal" in speed}
        names = ("prefill_tokens_per_s", "ttft_s", "load_s", "read_bytes_per_token", "peak_bytes")
        record = {"disturbed": False, "wall_s": 1.0, "decode_tokens_per_s": speed, **dict.fromkeys(names, 2.0)}
        record["sampled"] = [1, 2, 3, 4 if task.engine == "stock" else 5]
        if task.trace is not None:
            from edgemoe.trace import save

            save(TRACE, task.trace)
            record["profile"] = PROFILE.to_dict()
        if task.engine == "edgemoe":
            record |= {"kernels": "k", "n_threads": 2, "slots_bytes": BANK // 2, "expert_bank_bytes": BANK}
        return record

    monkeypatch.setattr(bench._Runner, "run", fake_run)
    monkeypatch.setattr(bench.host, "disk_bandwidth_bytes_per_s", lambda *args, **kwargs: 1e9)
    return state


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_model(tmp_path_factory.mktemp("bench") / "m.gguf")


def test_pairs_read_the_same_text_with_the_same_threads(runs: dict[str, Any], path: Path) -> None:
    """Guards against engines that do different work, or that always run in the same order."""
    runs["speeds"] = {"edgemoe": [10.0] * 9, "stock": [5.0] * 9}
    said: list[tuple[str, int, int]] = []
    bench.bench(path, pairs=8, prompt_tokens=10, tokens=5, progress=lambda *one: said.append(one), eviction="lfu")
    tasks: list[Task] = runs["tasks"]
    assert [task.first_token for task in tasks[:-1]] == [15 * pair for pair in range(8) for _ in range(2)]
    orders = {tuple(task.engine for task in tasks[2 * pair : 2 * pair + 2]) for pair in range(8)}
    assert orders == {("edgemoe", "stock"), ("stock", "edgemoe")}
    assert all(task.options == tasks[0].options for task in tasks)
    assert tasks[0].options["eviction"] == "lfu" and tasks[0].options["n_threads"] >= 1
    assert tasks[0].options["warm_start"] is False
    assert [task.trace is None for task in tasks] == [True] * 16 + [False]
    assert said[0][0] == "pair 1 of 8, edgemoe" and said[-1] == ("done", 17, 17)


def test_ratios_are_within_pairs(runs: dict[str, Any], path: Path) -> None:
    """Guards against medians that are compared with each other, and a spread that hides a run."""
    runs["speeds"] = {"edgemoe": [10.0, 30.0, 20.0, 1.0], "stock": [5.0, 30.0, 4.0]}
    result = bench.bench(path, pairs=3)
    assert result.ratios["decode_tokens_per_s"] == bench.Spread(2.0, 1.0, 5.0)
    assert result.engines["edgemoe"]["decode_tokens_per_s"] == bench.Spread(20.0, 10.0, 30.0)
    assert result.same_next_token == 0.75
    assert all(one.tokens_per_s == pytest.approx(20.0 * one.gain) for one in result.advice) and result.advice
    json.dumps(result.to_dict())


def test_failed_stock_run_is_said_and_left_out(runs: dict[str, Any], path: Path) -> None:
    """Guards against a comparison with runs that never ended."""
    runs["speeds"]["stock"] = ["killed: out of memory within the limit", 4.0]
    result = bench.bench(path, pairs=2)
    assert result.ratios["decode_tokens_per_s"] == bench.Spread(2.5, 2.5, 2.5)
    assert any("stock, pair 1: killed: out of memory" in note for note in result.notes)
    runs["speeds"] = {"edgemoe": [1.0, 1.0], "stock": ["killed"]}
    none = bench.bench(path, pairs=1)
    assert none.ratios == {} and none.same_next_token is None and none.engines["stock"] == {}


def test_stock_that_crashes_with_repacked_weights_runs_without(runs: dict[str, Any], path: Path) -> None:
    """Guards against a benchmark without a comparison where llama.cpp's own fast path is broken, and against one that
    does not say what it compares with."""
    runs["speeds"]["stock"] = ["signal 11", 4.0, 5.0]
    result = bench.bench(path, pairs=2)
    assert result.engines["stock"]["decode_tokens_per_s"] == bench.Spread(4.5, 4.0, 5.0)
    assert [task.repack for task in runs["tasks"] if task.engine == "stock"] == [True, False, False]
    assert "stock runs without weight repacking, with which it crashes here (signal 11)" in result.notes


def test_failure_of_edgemoe_ends_the_benchmark(runs: dict[str, Any], path: Path) -> None:
    """Guards against hours of runs that cannot be compared with anything."""
    runs["speeds"]["edgemoe"] = ["exit code 1: budget 1 MiB is below the floor"]
    with pytest.raises(BackendError, match=r"m\.gguf: exit code 1: budget 1 MiB"):
        bench.bench(path)
    assert len(runs["tasks"]) == 1


def test_without_a_limit_the_reader_is_told(runs: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a comparison that looks fair while only one engine is held to the budget."""

    def no_cgroup(*_args: object) -> None:
        raise bench.confine.CgroupError("cannot limit memory: found user id 1000, expected 0")

    monkeypatch.setattr(bench.confine, "MemoryCgroup", no_cgroup)
    result = bench.bench(path, pairs=1, memory=1 << 30)
    assert any("NOT held to the budget" in note and "user id 1000" in note for note in result.notes)
    assert result.confinement == "none"
    assert runs["limits"] == [None] * 3
    runs["tasks"].clear()
    assert bench.bench(path, pairs=1, against="none").notes == []
    assert [task.engine for task in runs["tasks"]] == ["edgemoe"] * 2


@pytest.mark.parametrize("wrong", [{"pairs": 0}, {"tokens": 0}, {"prompt_tokens": 1}, {"against": "vllm"}])
def test_senseless_sizes_are_refused(runs: dict[str, Any], path: Path, wrong: dict[str, Any]) -> None:
    """Guards against a division by nothing after minutes of runs."""
    with pytest.raises(ValueError, match="expected"):
        bench.bench(path, **wrong)
    assert runs["tasks"] == []


# ---------------------------------------------------------------- the command


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, runs: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the command asks of `bench.bench`."""
    options: dict[str, Any] = {}
    real: Callable[..., bench.Benchmark] = bench.bench

    def spy(model: Path, **given: Any) -> bench.Benchmark:
        options.update(given)
        return real(model, **given)

    monkeypatch.setattr(bench, "bench", spy)
    return options


def test_command_shows_comparison_time_and_advice(asked: dict[str, Any], path: Path) -> None:
    """Guards against a report without one of its parts, or with notes that a script would read as figures."""
    result = run("bench", str(path), "--pairs", "2", "--prefetch", "off", "--draft", "ngram", "--eviction", "utility")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "2.00 [2.00 - 2.00]" in next(line for line in lines if "decode tok/s" in line)
    assert any("wait for storage" in line and "4.00 ms" in line and "40.0%" in line for line in lines)
    assert any(line.strip().startswith("1.") and " x  " in line for line in lines[lines.index("") :])
    assert "no --memory was given" in result.stderr and "no --memory was given" not in result.stdout
    expected = {"prefetch": "off", "draft": "ngram", "eviction": "utility", "warm_start": False, "pairs": 2}
    assert {name: asked[name] for name in expected} == expected


def test_command_json_is_the_last_line(asked: dict[str, Any], path: Path) -> None:
    """Guards against JSON that a script has to search for."""
    result = run("bench", str(path), "--pairs", "1", "--json", "--warm-start")
    fields = json.loads(result.stdout.splitlines()[-1])
    assert fields["engines"]["stock"]["decode_tokens_per_s"]["median"] == 5.0
    assert fields["profile"]["n_traced_tokens"] == 80
    assert len(fields["runs"]) == 3 and all("sampled" not in one for one in fields["runs"])
    assert asked["warm_start"] is True


def test_command_reports_a_failure_in_one_line(asked: dict[str, Any], runs: dict[str, Any], path: Path) -> None:
    """Guards against a traceback where a budget is too small."""
    runs["speeds"]["edgemoe"] = ["exit code 1: budget 1 MiB is below the floor"]
    result = run("bench", str(path))
    assert result.exit_code == 1
    (line,) = error_lines(result)
    assert "below the floor" in line
