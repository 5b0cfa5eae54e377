# SPDX-License-Identifier: MIT
"""What a trace says about the machine that it was recorded on, and how `edgemoe replay` uses it."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from edgemoe import replay as replays
from edgemoe import trace as trace_files
from edgemoe.errors import TraceError
from edgemoe.replay_calibration import FEWEST_TOKENS, calibrate
from edgemoe.trace import Trace, TracedRun, TraceLayer
from tests.unit.fakes import error_lines, run

N_LAYERS, N_EXPERTS, N_USED = 4, 32, 4
EXPERT_BYTES = 1 << 20
SLOTS_PER_LAYER = 12


@dataclasses.dataclass
class Machine:
    """A simulation apart from ours: an LRU cache for each layer, and a disk that reads one expert after the other."""

    bytes_per_s: float
    latency_us: float = 0.0
    dense_us: float = 500.0
    expert_us: float = 40.0
    head_us: float = 3000.0
    hold_up_us_per_mib: float = 0.0

    def record(self, n_tokens: int, n_resident: int = SLOTS_PER_LAYER, seed: int = 0) -> Trace:
        """A trace of tokens evaluated one by one, in which each expert stays for the next token by 0.9."""
        rng = np.random.default_rng(seed)
        experts = np.empty((n_tokens, N_LAYERS, N_USED), np.int16)
        shape = (n_tokens, N_LAYERS)
        begin_us, wait_us, read_bytes = np.empty(shape), np.empty(shape, np.float32), np.empty(shape, np.int64)
        caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(N_LAYERS)]
        now_us = 0.0
        for token, layer in np.ndindex(shape):
            kept = [e for e in experts[token - 1, layer] if rng.random() < 0.9] if token else []
            rest = [e for e in rng.permutation(N_EXPERTS) if e not in kept]
            experts[token, layer] = (kept + rest)[:N_USED]
            now_us += self.dense_us
            begin_us[token, layer] = now_us
            cache = caches[layer]
            missed = [e for e in experts[token, layer] if e not in cache]
            computed_us = now_us + (N_USED - len(missed)) * self.expert_us
            arrived_us, waited_us = now_us + self.latency_us, 0.0
            for _ in missed:
                arrived_us += EXPERT_BYTES / self.bytes_per_s * 1e6
                waited_us += max(0.0, arrived_us - computed_us)
                computed_us = max(computed_us, arrived_us) + self.expert_us
            for e in experts[token, layer]:
                cache[int(e)] = None
                cache.move_to_end(int(e))
                if len(cache) > n_resident:
                    cache.popitem(last=False)
            now_us = computed_us + len(missed) * self.hold_up_us_per_mib * EXPERT_BYTES / (1 << 20)
            now_us += self.head_us if layer == N_LAYERS - 1 else 0.0
            wait_us[token, layer], read_bytes[token, layer] = waited_us, len(missed) * EXPERT_BYTES
        return Trace(
            model="simulated.gguf",
            layers=tuple(TraceLayer(i, N_EXPERTS, N_USED, (EXPERT_BYTES,)) for i in range(N_LAYERS)),
            batch_of_token=np.arange(n_tokens, dtype=np.int32),
            experts=experts,
            weights=np.full(experts.shape, np.nan, np.float32),
            begin_us=begin_us,
            wait_us=wait_us,
            read_bytes=read_bytes,
            resident=None,
            run=TracedRun(n_resident * N_LAYERS * EXPERT_BYTES, "lru", "off", 4),
        )

    def token_us(self, trace: Trace) -> float:
        """Mean of the later half, when the cache is warm."""
        begins = trace.begin_us[trace.n_batches // 2 :, 0]
        return float(np.diff(begins).mean())


@pytest.mark.parametrize("bytes_per_s", [2e8, 1e9, 4e9])
@pytest.mark.parametrize("hold_up_us_per_mib", [0.0, 60.0])
def test_disk_and_computing_of_another_simulation_are_found(bytes_per_s: float, hold_up_us_per_mib: float) -> None:
    """Guards against times of another layer, waiting counted as computing, and bytes taken for tokens."""
    usual = replays.Disk()
    latency_us = usual.latency_us * usual.bytes_per_s / bytes_per_s
    machine = Machine(bytes_per_s, latency_us, hold_up_us_per_mib=hold_up_us_per_mib)
    trace = machine.record(200)
    found = calibrate(trace)
    expected_us = N_LAYERS * (machine.dense_us + N_USED * machine.expert_us) + machine.head_us
    assert replays.token_us(trace, found.compute) == pytest.approx(expected_us, rel=0.01)
    assert found.compute.batch_us == pytest.approx(machine.head_us, rel=0.02)
    assert found.compute.hold_up_us_per_mib == pytest.approx(hold_up_us_per_mib, rel=0.1, abs=1.0)
    assert found.disk.bytes_per_s == pytest.approx(bytes_per_s, rel=0.05)
    assert found.disk.latency_us == pytest.approx(latency_us, rel=0.05)


@pytest.mark.parametrize("n_resident", [8, 12, 20])
def test_other_budgets_are_predicted_as_the_other_simulation_has_them(n_resident: int) -> None:
    """Guards against a calibration that fits its own run only."""
    machine = Machine(bytes_per_s=1.5e9, latency_us=100.0, hold_up_us_per_mib=40.0)
    source, target = machine.record(300), machine.record(300, n_resident)
    found = calibrate(source)
    assert source.run is not None and target.run is not None
    predicted = replays.replay(
        source, slots_bytes=target.run.slots_bytes, eviction="lru", disk=found.disk, compute=found.compute
    )
    later = slice(150, None)
    assert predicted.batch_us[later].mean() == pytest.approx(machine.token_us(target), rel=0.05)


def test_a_pause_between_tokens_is_no_computing() -> None:
    """Guards against somebody who reads for a minute before the next question."""
    trace = Machine(1e9).record(100)
    begin_us = trace.begin_us.copy()
    begin_us[50:] += 60e6
    paused = calibrate(dataclasses.replace(trace, begin_us=begin_us))
    plain = calibrate(trace)
    assert paused.n_tokens == plain.n_tokens - 1
    assert paused.compute.dense_us == pytest.approx(plain.compute.dense_us, rel=0.01)


def test_what_cannot_be_calibrated_says_why() -> None:
    """Guards against numbers made of nothing."""
    trace = Machine(1e9).record(100)
    for message, fields in {
        "does not say with what it was recorded": {"run": None},
        f"0 tokens of decode with times, expected at least {FEWEST_TOKENS}": {
            "begin_us": np.full_like(trace.begin_us, np.nan)
        },
        "no token of decode waited": {"wait_us": np.zeros_like(trace.wait_us)},
    }.items():
        with pytest.raises(TraceError, match=message):
            calibrate(dataclasses.replace(trace, **fields))
    with pytest.raises(TraceError, match=r"\d tokens of decode with times, expected at least 16"):
        calibrate(Machine(1e9).record(10))


@pytest.fixture
def recorded_path(tmp_path: Path) -> str:
    """A trace that says with what it was recorded."""
    path = tmp_path / "recorded.trace"
    trace_files.save(Machine(1e9, hold_up_us_per_mib=50.0).record(60), path)
    return str(path)


def test_command_uses_what_the_trace_says_and_options_win(recorded_path: str) -> None:
    """Guards against an option that the calibration overrides, and a calibration that is not used or not shown."""
    arguments = ("replay", recorded_path, "--policy", "lru", "--memory", "25%")
    found = json.loads(run(*arguments, "--json").stdout)
    expected = calibrate(trace_files.load(recorded_path))
    assert found["calibration_problem"] is None and found["given"] == []
    assert found["calibration"] == expected.to_dict()
    assert found["disk"] == dataclasses.asdict(expected.disk)
    assert found["compute"] == dataclasses.asdict(expected.compute)
    given = json.loads(run(*arguments, "--json", "--disk-mib-per-s", "100", "--dense-us", "7").stdout)
    assert given["given"] == ["bytes_per_s", "dense_us"]
    assert given["disk"] == dict(found["disk"], bytes_per_s=100.0 * (1 << 20))
    assert given["compute"] == dict(found["compute"], dense_us=7.0)
    assert given["results"] != found["results"]
    text = run(*arguments, "--latency-us", "5")
    assert f"found by {expected.n_tokens} tokens of the trace; given: latency_us" in text.stdout


def test_command_says_why_a_trace_does_not_calibrate(tmp_path: Path) -> None:
    """Guards against defaults that look like the machine's own figures."""
    path = tmp_path / "generated.trace"
    trace_files.save(dataclasses.replace(Machine(1e9).record(60), run=None), path)
    result = run("replay", str(path), "--policy", "lru", "--memory", "25%")
    assert result.exit_code == 0, error_lines(result)
    assert "defaults: cannot calibrate by the trace of simulated.gguf: it does not say" in result.stdout
    found = json.loads(run("replay", str(path), "--policy", "lru", "--memory", "25%", "--json").stdout)
    assert found["calibration"] is None
    assert "it does not say" in found["calibration_problem"]
    assert found["disk"] == dataclasses.asdict(replays.Disk())
    assert found["compute"] == dataclasses.asdict(replays.Compute())


def test_recorded_predictions_are_replayed() -> None:
    """Guards against hints by chance where the trace knows what was foreseen."""
    trace = Machine(1e9).record(80)
    foreseen = np.full((80, N_LAYERS, trace_files.N_DISTANCES, N_USED), -1, np.int16)
    foreseen[:, :, 0] = trace.experts[:, :, ::-1]  # in another order
    right = dataclasses.replace(trace, foreseen=foreseen)
    wrong = dataclasses.replace(trace, foreseen=np.where(foreseen < 0, foreseen, (foreseen + 16) % N_EXPERTS))
    assert replays.foreseen_recall(trace) is None
    assert replays.foreseen_recall(right) == 1.0
    assert trace.run is not None
    options = {"slots_bytes": trace.run.slots_bytes, "prefetch": "1"}
    by_right, by_wrong = replays.replay(right, **options), replays.replay(wrong, **options)
    assert by_right.prefetch_wasted_bytes < by_wrong.prefetch_wasted_bytes
    assert by_right.decode.stall_us < by_wrong.decode.stall_us
    # A recall that is given is drawn by, whatever the trace has.
    drawn = replays.replay(wrong, **options, recall=0.9)
    assert drawn.to_dict() == replays.replay(trace, **options, recall=0.9).to_dict()
