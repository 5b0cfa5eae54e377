# SPDX-License-Identifier: MIT
"""The controller of the slots' size on simulated machines: no time passes, and chance is seeded."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import types
from typing import Any

import pytest

from edgemoe import cache_size
from edgemoe.cache_size import LONGEST_WAIT, SHORTEST_WAIT, STEPS, WINDOW_EVALS, CacheSize, SizeController, Window

MIB = 1 << 20
ALLOWED, LEAST, FIXED = 1200 * MIB, 432 * MIB, 600 * MIB
ENOUGH = FIXED + ALLOWED
SEEDS = range(8)


class Machine:
    """OLMoE's shape: 600 MiB beside the slots, 432 MiB of experts a token, reads at 1.5 GB/s.

    What is beyond `free_bytes` is swapped. Whatever of it a token uses is faulted in, 4 KiB and `fault_us` each, for
    which something else goes, so that the swapped share counts twice. On the machine of docs/experiments.md 3000 faults
    a token took 0.1 s.
    """

    def __init__(self, seed: int, free_bytes: int = ENOUGH, noise: float = 0.1, fault_us: float = 30.0) -> None:
        self.free_bytes, self.fault_us, self.stray_faults = free_bytes, fault_us, 0
        self._noise, self._random = noise, random.Random(seed)
        self.controller = SizeController(ALLOWED, LEAST, lambda: self.free_bytes - FIXED - self.controller.slots_bytes)
        self.sizes: list[int] = []

    def exact(self, slots_bytes: int) -> Window:
        """A window without noise at that size."""
        hit_rate = 0.9 * min(1.0, slots_bytes / (3400 * MIB)) ** 0.5
        swapped = min(1.0, 2.0 * max(0, FIXED + slots_bytes - self.free_bytes) / slots_bytes)
        n_faults = int(swapped * (hit_rate * 432 * MIB + 100 * MIB) / 4096) + self.stray_faults
        token_s = 0.05 + (1.0 - hit_rate) * 432 * MIB / 1.5e9 + n_faults * self.fault_us * 1e-6
        return Window(WINDOW_EVALS, WINDOW_EVALS * token_s, WINDOW_EVALS * 384, WINDOW_EVALS * n_faults)

    def run(self, n_windows: int) -> float:
        """Decode; the seconds that it takes."""
        seconds = 0.0
        for _ in range(n_windows):
            window = self.exact(self.controller.slots_bytes)
            window = dataclasses.replace(window, seconds=window.seconds * self._random.lognormvariate(0.0, self._noise))
            seconds += window.seconds
            self.sizes.append(self.controller.slots_bytes)
            self.controller.on_window(window)
        return seconds

    def seconds_without(self, n_windows: int) -> float:
        """What the same would take at the size that the budget allows."""
        return n_windows * self.exact(ALLOWED).seconds

    @property
    def n_changes(self) -> int:
        return sum(a != b for a, b in itertools.pairwise(self.sizes))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stray_faults", [0, cache_size.FAULTS_PER_EVAL - 1])
def test_a_machine_with_enough_memory_is_left_alone(seed: int, stray_faults: int) -> None:
    """Guards against a size that changes for nothing but noise, or a few faults of somebody's page cache."""
    machine = Machine(seed, noise=0.3)
    machine.stray_faults = stray_faults
    machine.run(3000)
    assert set(machine.sizes) == {ALLOWED}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("missing_mib", [100, 250, 400, 600])
def test_slots_that_do_not_fit_are_given_up(seed: int, missing_mib: int) -> None:
    """Guards against decoding from swap where smaller slots would be read from the file, and against giving up more."""
    machine = Machine(seed, free_bytes=ENOUGH - missing_mib * MIB)
    machine.run(40)
    best = min(range(LEAST, ALLOWED, MIB), key=lambda slots: machine.exact(slots).seconds)
    chosen = machine.controller.slots_bytes
    assert machine.exact(chosen).seconds < 1.12 * machine.exact(best).seconds
    assert chosen >= ENOUGH - missing_mib * MIB - FIXED - 2 * ALLOWED // STEPS
    assert machine.run(1000) < 1.15 * 1000 * machine.exact(best).seconds
    assert machine.run(1000) < machine.seconds_without(1000) / 1.2


@pytest.mark.parametrize("seed", SEEDS)
def test_slots_return_when_memory_does(seed: int) -> None:
    """Guards against slots that stay small when the neighbour has gone, however often it comes."""
    machine = Machine(seed)
    for _ in range(3):
        machine.free_bytes = ENOUGH - 300 * MIB
        machine.run(100)
        assert machine.controller.slots_bytes <= ALLOWED - 300 * MIB
        machine.free_bytes = ENOUGH
        machine.run(2 * SHORTEST_WAIT + 5 * LONGEST_WAIT // STEPS)
        assert machine.controller.slots_bytes == ALLOWED


@pytest.mark.parametrize("seed", SEEDS)
def test_what_failed_is_forgotten_after_a_calm_time(seed: int) -> None:
    """Guards against slots that stay small for long because sizes were tried in vain an hour ago."""
    machine = Machine(seed, free_bytes=ENOUGH - 200 * MIB)
    honest, machine.controller._available_bytes = machine.controller._available_bytes, lambda: 1 << 40
    machine.run(1500)
    machine.controller._available_bytes, machine.free_bytes = honest, ENOUGH
    machine.run(3 * LONGEST_WAIT)
    machine.free_bytes = ENOUGH - 200 * MIB
    machine.run(60)
    assert machine.controller.slots_bytes <= ALLOWED - 200 * MIB
    machine.free_bytes = ENOUGH
    machine.run(6 * SHORTEST_WAIT)
    assert machine.controller.slots_bytes == ALLOWED


@pytest.mark.parametrize("seed", SEEDS)
def test_faults_that_cost_nothing_do_not_take_slots_for_long(seed: int) -> None:
    """Guards against losing slots to faults of something else, which smaller slots do not end: at most 2 %."""
    machine = Machine(seed, noise=0.05)
    machine.stray_faults = 50
    assert machine.run(3000) < 1.02 * machine.seconds_without(3000)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lie_bytes", [0, 4096 * MIB])
def test_the_size_does_not_oscillate(seed: int, lie_bytes: int) -> None:
    """Guards against going to and fro: changes become ever rarer, though the system says that memory is free."""
    machine = Machine(seed, free_bytes=ENOUGH - 200 * MIB)
    machine.controller._available_bytes = lambda: lie_bytes
    machine.run(3000)
    assert machine.n_changes <= 40
    if lie_bytes == 0:
        assert len(set(machine.sizes[100:])) == 1
    late = machine.sizes[-LONGEST_WAIT:]
    assert sum(a != b for a, b in itertools.pairwise(late)) <= 10


@pytest.mark.parametrize("seed", SEEDS)
def test_a_neighbour_that_comes_and_goes_quickly_changes_little(seed: int) -> None:
    """Guards against chasing pressure that is gone before a size is found: few changes, no great loss."""
    machine, seconds, without = Machine(seed), 0.0, 0.0
    for i in range(150):
        machine.free_bytes = ENOUGH - (300 * MIB if i % 2 else 0)
        seconds += machine.run(10)
        without += machine.seconds_without(10)
    assert machine.n_changes <= 120
    assert seconds < 1.02 * without


@pytest.mark.parametrize("seed", SEEDS)
def test_never_below_a_token_nor_above_the_budget(seed: int) -> None:
    """Guards against slots that do not hold one token's experts, whatever is measured, and more than allowed."""
    chance = random.Random(seed)
    controller = SizeController(ALLOWED, LEAST, lambda: 1 << 40)
    for _ in range(5000):
        if chance.random() < 0.02:
            controller.interrupt()
        n_faults = chance.choice([0, 0, 100_000])
        controller.on_window(Window(WINDOW_EVALS, chance.uniform(0.1, 10.0), 3072, n_faults))
        assert LEAST <= controller.slots_bytes <= ALLOWED
    for n_faults, extreme in ((100_000, LEAST), (0, ALLOWED)):
        for _ in range(4 * LONGEST_WAIT):
            controller.on_window(Window(WINDOW_EVALS, controller.slots_bytes / ALLOWED, 3072, n_faults))
        assert controller.slots_bytes == extreme
    assert SizeController(LEAST - 1, LEAST, lambda: 0).slots_bytes == LEAST - 1


class _Runtime:
    """The counters that `CacheSize` reads."""

    def __init__(self) -> None:
        self.hits = 0
        self.slots_bytes = ALLOWED

    def stats(self) -> Any:
        return types.SimpleNamespace(hits=self.hits, misses=0, late_hits=0, slots_bytes=self.slots_bytes)


@pytest.fixture
def pressed(monkeypatch: pytest.MonkeyPatch) -> tuple[_Runtime, Any]:
    """A runtime and a function that decodes tokens on a machine that swaps what is beyond 1000 MiB of slots."""
    native, n_faults = _Runtime(), 0
    monkeypatch.setattr(cache_size, "_major_faults", lambda: n_faults)
    monkeypatch.setattr(
        cache_size._native, "set_slots_bytes", lambda native, slots_bytes: setattr(native, "slots_bytes", slots_bytes)
    )
    monkeypatch.setattr(cache_size.host, "available_memory_bytes", lambda: 1000 * MIB - native.slots_bytes)

    def decode(loop: CacheSize, n_tokens: int) -> None:
        nonlocal n_faults
        for _ in range(n_tokens):
            native.hits += 384
            is_over = native.slots_bytes > 1000 * MIB
            n_faults += 3000 * is_over
            loop.on_eval(1.0 if is_over else 0.2)

    return native, decode


def test_the_loop_moves_the_slots_and_says_so_once(pressed: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a decision that does not reach the runtime, or is told with every token, or not at all."""
    native, decode = pressed
    with caplog.at_level(logging.INFO, "edgemoe"):
        decode(CacheSize(native, ALLOWED, LEAST), 400)
    assert native.slots_bytes == ALLOWED - 2 * (ALLOWED // STEPS)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "900 of 1200 MiB" in caplog.text


def test_the_loop_stands_aside_where_others_set_the_slots(pressed: Any) -> None:
    """Guards against fighting whoever sets the slots himself, and against forgetting a new budget."""
    native, decode = pressed
    loop = CacheSize(native, ALLOWED, LEAST)
    native.slots_bytes = 1100 * MIB
    decode(loop, 400)
    assert native.slots_bytes == 1100 * MIB
    loop.restart(1100 * MIB)
    decode(loop, 400)
    assert native.slots_bytes == 1100 * MIB - 1100 * MIB // STEPS


def test_a_lower_limit_is_no_new_beginning(pressed: Any) -> None:
    """Guards against a loop that forgets what it has learned when drafts take some memory, or goes beyond what is left,
    and against one that takes somebody else's slots for its own."""
    native, decode = pressed
    loop = CacheSize(native, ALLOWED, LEAST)
    decode(loop, 400)
    reduced = native.slots_bytes
    loop.limit(ALLOWED - 2 * MIB)
    decode(loop, 4000)
    assert native.slots_bytes == reduced and loop._controller.slots_bytes == reduced
    native.slots_bytes = 700 * MIB
    loop.limit(ALLOWED - 4 * MIB)
    decode(loop, 400)
    assert native.slots_bytes == 700 * MIB


@pytest.mark.parametrize("n_windows", range(12))
def test_no_size_is_above_a_limit_that_came_later(n_windows: int) -> None:
    """Guards against a trial that ends with the larger size that it began with."""
    machine = Machine(0, free_bytes=ENOUGH - 30 * MIB)
    machine.run(n_windows)
    limit = machine.controller.slots_bytes - MIB
    machine.controller.limit(limit)
    machine.free_bytes = ENOUGH
    machine.sizes.clear()
    machine.run(2000)
    assert max(machine.sizes) == limit


def test_counters_that_begin_again_are_no_measurement(pressed: Any) -> None:
    """Guards against a speed from counters of which one half was reset."""
    native, decode = pressed
    loop = CacheSize(native, ALLOWED, LEAST)
    for _ in range(200):
        decode(loop, 1)
        native.hits = 0
        assert native.slots_bytes == ALLOWED


def test_prompts_between_tokens_are_no_measurement(pressed: Any) -> None:
    """Guards against a size judged by the faults and misses that a prompt leaves behind."""
    native, decode = pressed
    loop = CacheSize(native, ALLOWED, LEAST)
    for _ in range(50):
        decode(loop, 3)  # at a second each: a window and a half
        loop.interrupt()
    assert native.slots_bytes == ALLOWED
