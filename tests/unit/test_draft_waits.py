# SPDX-License-Identifier: MIT
"""Drafts where steps wait for storage: experts of a cache that is too small, read by a disk that is uneven."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

import pytest

from edgemoe.draft import Drafter, NgramProposer
from edgemoe.draft_length import MAX_DRAFT_TOKENS, DraftLengthChooser
from edgemoe.draft_waits import Step, Waits

N_LAYERS, N_EXPERTS, N_USED, N_SLOTS = 8, 16, 2, 64
PROMPT_TOKENS, TEXT_TOKENS = 160, 128
COMPUTING_S, S_PER_EXPERT = 0.01, 0.003
EXPERT_BYTES = 1 << 20
# Of computing, as on the demo's 2 cores: batches of 1 to 8 tokens.
COMPUTES = [1, 1.50, 1.81, 2.13, 2.46, 2.79, 2.99, 3.19]

Routing = list[list[tuple[int, ...]]]  # [tokens][layers]: experts


def _routing(text: Sequence[int], rng: random.Random) -> Routing:
    """Popular experts, others that a word prefers, and half of them kept from the token before."""
    popularity = [[1 / (1 + (e * 7 + layer) % N_EXPERTS) for e in range(N_EXPERTS)] for layer in range(N_LAYERS)]
    found: Routing = []
    for token in text:
        of_token = []
        for layer in range(N_LAYERS):
            kept = list(found[-1][layer][: N_USED // 2]) if found and rng.random() < 0.5 else []
            word = random.Random(token * N_LAYERS + layer)
            while len(kept) < N_USED:
                source = word if rng.random() < 0.5 else rng
                expert = source.choices(range(N_EXPERTS), popularity[layer])[0]
                if expert not in kept:
                    kept.append(expert)
            of_token.append(tuple(kept))
        found.append(of_token)
    return found


class Cache:
    """The experts in memory: the least recently used of them leave, by the passes of their own layer."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.n_batches = 0
        self.last: dict[tuple[int, int], int] = {}

    def evaluate(self, batch: Routing) -> tuple[int, int]:
        """Experts that a batch reads, and those that it asks for, each once for each layer."""
        self.n_batches += 1
        n_read = n_asked = 0
        for layer in range(N_LAYERS):
            union = dict.fromkeys((layer, expert) for of_token in batch for expert in of_token[layer])
            n_asked += len(union)
            n_read += sum(expert not in self.last for expert in union)
            self.last.update(dict.fromkeys(union, self.n_batches))
            while len(self.last) > self.n_slots:
                # Layers before this one have been asked in this pass already: their age is one less.
                oldest = min(self.last, key=lambda key: (self.last[key] - (key[0] <= layer), key not in union))
                del self.last[oldest]
        return n_read, n_asked


def _gain(text: Sequence[int], seed: int, is_bursty: bool, slowdown: float = 1.0) -> float:
    """Speed with drafts over that without, by what steps take on the average; the chooser sees single waits.

    `slowdown`: of reads in steps with drafts, which their bytes do not show.
    """
    rng = random.Random(seed)
    routing = _routing(text, rng)
    begin = PROMPT_TOKENS

    def filled() -> Cache:
        cache = Cache(N_SLOTS)
        cache.evaluate(routing[:begin])
        return cache

    cache = filled()
    plain_s = sum(COMPUTING_S + cache.evaluate([one])[0] * S_PER_EXPERT for one in routing[begin:-1])
    cache = filled()
    drafter = Drafter(NgramProposer(), DraftLengthChooser(N_EXPERTS, N_USED), lambda _drafted, _accepted: None)
    usual_s, done = 0.0, begin + 1
    while done < len(text):
        n_max = min(MAX_DRAFT_TOKENS, len(text) - 1 - done)
        draft = drafter.draft(text[drafter.n_known_tokens : done], n_max)
        n = 1
        while n <= len(draft) and text[done + n - 1] == draft[n - 1]:
            n += 1
        batch = routing[done - 1 : done - 1 + n]
        batch += [routing[text.index(token)] for token in draft[n - 1 :]]  # wrong ones, as where they come from
        n_read, n_asked = cache.evaluate(batch)
        computing_s = COMPUTING_S * COMPUTES[len(draft)]
        wait_s = n_read * S_PER_EXPERT * (slowdown if draft else 1)
        usual_s += computing_s + wait_s
        if is_bursty:
            wait_s *= 0.35 if rng.random() < 0.7 else 2.5166  # 1 on the average
        computing_s *= rng.uniform(0.9, 1.1)
        drafter.observe(Step(len(draft), computing_s + wait_s, wait_s, n_asked, n_read * EXPERT_BYTES))
        done += n
    return plain_s / usual_s


def _copied(seed: int) -> list[int]:
    rng = random.Random(f"copied {seed}")
    passage = [rng.randrange(400) for _ in range(PROMPT_TOKENS)]
    return [*passage, *passage[:TEXT_TOKENS]]


def _misleading(seed: int) -> list[int]:
    """Few words in a random order: what followed a pair of them earlier seldom follows it again."""
    rng = random.Random(f"misleading {seed}")
    return [rng.randrange(12) for _ in range(PROMPT_TOKENS + TEXT_TOKENS)]


def test_a_copied_text_gains_on_an_uneven_disk() -> None:
    """Guards against single waits, and a text that comes to read more than it began with, taken for drafts' costs."""
    even = [_gain(_copied(seed), seed, is_bursty=False) for seed in range(12)]
    bursty = [_gain(_copied(seed), seed, is_bursty=True) for seed in range(12)]
    assert statistics.geometric_mean(even) > 1.4  # always 7 tokens: 1.59
    assert statistics.geometric_mean(bursty) > 0.93 * statistics.geometric_mean(even)
    assert min(bursty) > 1.0


@pytest.mark.parametrize("is_bursty", [False, True])
def test_wrong_drafts_that_are_read_are_bounded(is_bursty: bool) -> None:
    """Guards against reading for wrong tokens, and a cache that they disturb, which nobody charges."""
    gains = [_gain(_misleading(seed), seed, is_bursty) for seed in range(12)]
    assert min(gains) >= 1 / 1.05


def test_waits_are_those_of_many_steps() -> None:
    """Guards against one slow read that decides, and against a difference between kinds of steps that stays unseen."""
    waits = Waits()
    assert waits.s_per_byte == waits.draft_s_per_byte == 0.0 and waits.growth == 1.0
    for i in range(64):
        waits.observe(Step(0, 1.0, 0.9 if i % 8 == 0 else 0.1, 8, 100))
    assert waits.s_per_byte == pytest.approx(0.2 / 100, rel=0.1)
    waits.observe_draft(Step(1, 2.0, 1.6, 8, 200), 200)
    assert waits.draft_s_per_byte < 2 * waits.s_per_byte  # one step, four times as slow
    for _ in range(50):
        waits.observe_draft(Step(1, 2.0, 1.6, 8, 200), 200)
    assert waits.draft_s_per_byte > 3 * waits.s_per_byte


def test_steps_that_read_nothing_are_computing() -> None:
    """Guards against waits without bytes that count as nothing, and clocks that make computing negative."""
    assert Step(0, 1.0, 0.25, 8, 0).computing_s == 1.0
    assert Step(0, 1.0, 0.25, 8, 5).computing_s == 0.75
    assert Step(0, 1.0, 1.5, 8, 5).computing_s == 0.0
    waits = Waits()
    waits.observe(Step(0, 1.0, 0.25, 8, 0))
    assert waits.s_per_byte == 0.0
