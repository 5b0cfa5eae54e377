# SPDX-License-Identifier: MIT
"""The loop that finds the slots' size, in a model: it moves real slots, and no bit of the output.

Pressure is simulated, time and faults come from the size in force: swapping would need the whole machine's swap.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest

import edgemoe
from edgemoe import cache_size, runtime
from edgemoe.budget import MemoryBudget
from tests.conftest import ModelWriter
from tests.integration.support import N_VOCAB, logits, stock, streamed

PROMPT = [1, *range(20, 40)]
STEPS = [(7 * i) % N_VOCAB for i in range(100)]
ALONE = {"n_threads": 1, "n_threads_batch": 1}


class Pressure:
    """Makes a model's loop believe that slots beyond `free_bytes` are swapped, and notes the sizes that it sets."""

    def __init__(self, llm: edgemoe.Llama, monkeypatch: pytest.MonkeyPatch) -> None:
        assert llm._cache_size is not None
        self.free_bytes = int(runtime.slot_sizes(llm._gguf, 0).cycle_slot_bytes)
        self.n_faults = 0
        self.sizes: list[int] = []
        loop, on_eval = llm._cache_size, llm._cache_size.on_eval

        def timed(_seconds: float) -> None:
            slots_bytes = llm.stats().slots_bytes
            is_over = slots_bytes > self.free_bytes
            self.n_faults += 1000 * is_over
            self.sizes.append(slots_bytes)
            on_eval(5.0 if is_over else 1.0)  # so long that two make a window

        monkeypatch.setattr(loop, "on_eval", timed)
        monkeypatch.setattr(cache_size, "_major_faults", lambda: self.n_faults)
        monkeypatch.setattr(cache_size.host, "available_memory_bytes", lambda: self.free_bytes)


def test_slots_shrink_to_a_token_and_return_without_changing_bits(
    write_model: ModelWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against other logits when slots come and go between tokens, fewer slots than a token's, and lost ones."""
    path = write_model("olmoe", n_experts=32, n_experts_used=4, n_layers=3)
    with contextlib.closing(stock(path, **ALONE)) as reference, streamed(path, memory="4GiB", **ALONE) as llm:
        expected = logits(reference, PROMPT, STEPS)
        pressure, full_bytes = Pressure(llm, monkeypatch), llm.stats().slots_bytes
        cycle_bytes = int(runtime.slot_sizes(llm._gguf, 0).cycle_slot_bytes)
        assert cycle_bytes < full_bytes == llm.plan.slots_bytes
        assert np.array_equal(logits(llm, PROMPT, STEPS), expected)
        assert llm.stats().slots_bytes == min(pressure.sizes) == cycle_bytes
        assert llm.plan.slots_bytes == full_bytes
        pressure.free_bytes = 1 << 40
        for _ in range(2):
            assert np.array_equal(logits(llm, PROMPT, STEPS), expected)
        assert llm.stats().slots_bytes == max(pressure.sizes) == full_bytes


def test_a_new_budget_begins_anew(write_model: ModelWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a loop that takes back what `set_memory` has given, or keeps to an old budget."""
    with streamed(write_model("olmoe", n_experts=32, n_experts_used=4, n_layers=3), memory="4GiB", **ALONE) as llm:
        pressure, full_bytes = Pressure(llm, monkeypatch), llm.stats().slots_bytes
        logits(llm, PROMPT, STEPS)
        assert llm.stats().slots_bytes < full_bytes
        llm.set_memory("3GiB")
        assert llm.stats().slots_bytes == full_bytes
        pressure.free_bytes = 1 << 40
        logits(llm, PROMPT, STEPS)
        assert llm.stats().slots_bytes == full_bytes


def test_drafts_and_the_loop_change_no_token(write_model: ModelWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a loop that fails where evaluations have several tokens, or changes what drafts find."""
    path, options = write_model("olmoe", n_experts=32, n_experts_used=4, n_layers=3), {"logits_all": False, **ALONE}

    def greedy(llm: Any) -> list[int]:
        return list(itertools.islice(llm.generate([*PROMPT, *PROMPT, *PROMPT], temp=0.0), 150))

    with contextlib.closing(stock(path, **options)) as reference:
        expected = greedy(reference)
    with streamed(path, memory="4GiB", draft="ngram", **options) as llm:
        pressure = Pressure(llm, monkeypatch)
        assert greedy(llm) == expected
        assert min(pressure.sizes) < max(pressure.sizes)


def test_who_shares_a_budget_has_no_loop(write_model: ModelWriter) -> None:
    """Guards against a loop that moves slots which a shared budget divides and accounts for."""
    with streamed(write_model("olmoe", n_experts=32, n_experts_used=4, n_layers=3), memory=MemoryBudget("4GiB")) as llm:
        assert llm._cache_size is None
