# SPDX-License-Identifier: MIT
"""Speculative decoding: how many tokens of a draft are worth evaluating.

Costs come from what steps took, chances from how earlier drafts fared. Pure arithmetic; one thread at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from edgemoe.draft_waits import Average, Step, Waits

MAX_DRAFT_TOKENS = 7
"""Most tokens of a draft: with the token before them a batch of 8 rows, up to which ggml's products of single rows
and of several have the same bits (it changes over to other code for experts with 8 rows)."""

# Drafts from the text are of the kinds 0 to 3, those of a draft model of the kinds 4 to 7, which are also counted
# together: how sure the model is of a draft is known only when it has been made.
_FIRST_MODEL_KIND = 4
_ANY_MODEL_KIND = 8
_N_KINDS = 9


def model_kind(probability: float) -> int:
    """The kind of a model's draft by how likely the model finds its first token."""
    return _FIRST_MODEL_KIND + sum(probability >= bound for bound in (0.5, 0.8, 0.95))


def union_growth(n_experts: int, n_experts_used: int, n_tokens: int) -> float:
    """Distinct experts of `n_tokens` tokens over those of one, for uniform routing: E (1 - (1 - K/E)^B) / K.

    Source: the form that prices batches in arXiv 2603.08960. Real routing repeats itself, so it is an upper bound.
    1.0 for models without experts.
    """
    if n_experts <= 0:
        return 1.0
    return n_experts * (1 - (1 - n_experts_used / n_experts) ** n_tokens) / n_experts_used


class DraftLengthChooser:
    """Chooses how many drafted tokens to evaluate with the next one, 0 among them.

    The choice maximizes expected tokens per second: 1 + a1 + a1 a2 + ... over the time of the step. Acceptance a_i is
    measured for each kind of draft and position, from proposals that were not evaluated too: the text shows by itself
    whether they were right. The first draft of a text waits until it has shown some of the kind, the more the more
    steps wait: one wrong token may cost what 5 others take, and drafts fail where the text turns to something new. The
    time of a step of k + 1 tokens, in steps of one, is at first

        waiting x sqrt(U (k + 1)) + computing x (1 + 0.5 k)

    where waiting and computing are shares of a step of one token. U is the growth of the union of experts, the
    formula's, scaled by the unions measured: bytes grow by more, as what many tokens use is in memory already, and by
    less than the number of tokens. (Measured at 58 % of the demo's experts, for 2, 4, 8 tokens: 1.6, 2.8, 4.5; the root
    of the measured unions: 1.8, 3.0, 4.9.) What steps took corrects both: computing by length, and the lengths beside
    it, bytes for all lengths together.

    A loss account bounds what being wrong costs: a step with drafts is charged with what it took beyond what its right
    tokens would have taken one by one: computing by the clock, waiting by bytes (`Waits`). Of the bytes that the step
    read, its right tokens would have read their share, so what the text asks for just now counts in both. Steps after
    it are not charged: one by one they read nothing or four times the usual, with drafts or without, and what a wrong
    token reads is about as likely to be asked for next as what leaves for it. Drafts are evaluated only while the
    account can pay for one of which half fails; it fills with 2 % of the time and with what drafts gain. A draft that
    takes time itself is charged with it, and wanted only if it pays with that time; what a draft model must read before
    its first draft comes out of the account as well, and out of gains that were too large for the account.
    """

    # Source of the numbers: simulated worlds, those of tests/unit/test_draft.py and test_draft_waits.py among them.
    _COMPUTE_GROWTH = 0.5  # of computing, for each further token, until it is measured
    _MIN_GAIN = 1.1  # below it, noise decides, and a cache that wrong drafts disturbed
    # Of 11 texts that the demo wrote, 3 of which repeat their prompt: 0.5 (2 equal tokens), 0.6, 0.9, 0.9 (8 or more).
    _INITIAL_ACCEPTANCE, _INITIAL_WEIGHT = (0.45, 0.5, 0.75, 0.85), 2.0
    # Of draft models: of the lower acceptances per token that arXiv 2211.17192 reports (0.5 to 0.9, tables 2 and 3).
    _INITIAL_MODEL_ACCEPTANCE = 0.6
    _ACCEPTANCE_MEMORY = 24
    # Proposals of a kind that were seen to be right or wrong before the first draft of a text: as many as one that
    # repeats its prompt shows while the first steps are measured. Fewer where less than that share of time is waiting.
    _FIRST_EVIDENCE, _MUCH_WAITING = 4, 1 / 3
    _TIME_MEMORY = 16
    _RATIO_MEMORY = 8
    _MODEL_WEIGHT = 1.0  # in measurements
    _MAX_GROWTH = 1.5  # of bytes, in steps of one token for each
    _N_BASE = 6  # steps without drafts before the first draft: one slow one of 4 made drafts seem cheap
    _MAX_STEPS_WITHOUT_BASE = 256
    _FIRST_RETRY_STEPS, _RETRY_STEPS = 8, 64
    _GIVE_UP_STEPS = 96
    _NEIGHBOUR_STEPS = 16
    _EARNED_SHARE = 0.02
    _INITIAL_CREDIT, _MAX_CREDIT = 1.5, 4.0  # in steps of one token

    def __init__(self, n_experts: int, n_experts_used: int, max_tokens: int = MAX_DRAFT_TOKENS) -> None:
        self._unions = [union_growth(n_experts, n_experts_used, k + 1) for k in range(max_tokens + 1)]
        self._max_tokens = max_tokens
        self._accepted = [[Average(self._ACCEPTANCE_MEMORY) for _ in range(max_tokens)] for _ in range(_N_KINDS)]
        self._base_computing_s = Average(self._TIME_MEMORY)
        self._base_bytes = Average(self._TIME_MEMORY)
        self._base_experts = Average(self._TIME_MEMORY)
        self._waits = Waits()
        self._ratios = [Average(self._RATIO_MEMORY) for _ in range(max_tokens + 1)]
        self._union_scale = Average(self._TIME_MEMORY)
        self._credit = self._INITIAL_CREDIT  # in steps of one token
        self._savings = 0.0  # gains of this text that the account had no room for
        self._is_retry = False  # the draft that is being made is one
        self._n_unwanted = 0  # steps since a model's draft seemed to pay
        self._n_since_model_retry = 0
        self._n_since_base = self._n_since_retry = self._n_choices = 0
        self._retry_steps = self._FIRST_RETRY_STEPS  # from one retry to the next
        self._n_base_due = self._N_BASE
        self._longest = 0  # the most drafted tokens of any step so far
        self._has_drafted = False  # in this text

    def begin(self) -> None:
        """Another text begins: it starts with what steps cost in the last one, not with its acceptance or its gains."""
        self._credit = min(max(self._credit, 0.0), self._INITIAL_CREDIT)
        self._savings = 0.0
        self._is_retry = self._has_drafted = False
        self._retry_steps = self._FIRST_RETRY_STEPS
        self._n_base_due = self._N_BASE
        self._waits.begin()
        bases = (self._base_computing_s, self._base_bytes, self._base_experts)
        for average in itertools.chain(bases, *self._accepted):
            average.doubt(0)
        for average in self._ratios:
            average.doubt(2)

    def choose(self, kind: int, n_proposed: int) -> int:
        """How many of `n_proposed` tokens of a draft to evaluate; what it took to make it is spent."""
        is_retry, self._is_retry = self._is_retry, False
        if not self._is_measured():
            return 0
        if not self._has_drafted and kind < _FIRST_MODEL_KIND:
            waiting = self._base_bytes.value * self._waits.s_per_byte / self._base_s
            if self._accepted[kind][0].weight < self._FIRST_EVIDENCE * min(waiting / self._MUCH_WAITING, 1.0):
                return 0
        n_max = min(n_proposed, self._max_tokens)
        expected = self._expected(kind, n_max)
        ratios = [self.time_ratio(k) for k in range(n_max + 1)]
        best = self._fastest(expected, ratios)
        if best == 0:
            best = self._most_hopeful(expected, ratios)
            if best == 0 or not (is_retry or self._n_since_retry > self._retry_steps):
                return 0
            # One slow step says little, and a shut door nothing: again soon, then ever more seldom.
            self._n_since_retry = 0
            self._retry_steps = min(2 * self._retry_steps, self._RETRY_STEPS)
        else:
            self._n_choices += 1
            if self._n_choices % self._NEIGHBOUR_STEPS == 0:
                # What the next length takes may have changed since it was measured.
                longer = self._n_choices % (2 * self._NEIGHBOUR_STEPS) == 0
                best = min(best + 1, n_max) if longer else max(best - 1, 1)
        return self._affordable(best, expected, ratios)

    def wanted(self, n_tokens: int, draft_s: Callable[[int], float]) -> int:
        """How many of at most `n_tokens` tokens to draft where a draft of k tokens takes `draft_s(k)` itself."""
        self._is_retry = False
        if not self._is_measured():
            return 0
        n_max = min(n_tokens, self._max_tokens)
        expected = self._expected(_ANY_MODEL_KIND, n_max)
        base_s = self._base_s
        ratios = [1.0, *(self.time_ratio(k) + draft_s(k) / base_s for k in range(1, n_max + 1))]
        best = self._fastest(expected, ratios)
        self._n_unwanted = 0 if best else self._n_unwanted + 1
        if best == 0:
            best = self._most_hopeful(expected, ratios)
            if best == 0 or self._n_since_model_retry <= self._RETRY_STEPS:
                return 0
            self._n_since_model_retry = 0
            self._is_retry = True
        return self._affordable(best, expected, ratios)

    def catch_up_s(self) -> float:
        """What a draft model may take to read the text before it drafts."""
        return (max(self._credit, 0.0) / 2 + self._savings) * self._base_s

    def pay_catch_up(self, seconds: float) -> None:
        """A draft model has read text for so long."""
        if seconds <= 0.0 or self._base_s <= 0.0:
            return
        steps = seconds / self._base_s
        saved = min(steps, self._savings)
        self._savings -= saved
        self._credit -= steps - saved

    @property
    def has_given_up(self) -> bool:
        """Whether a draft model's memory is better used otherwise: for long its drafts have not seemed to pay."""
        return self._n_unwanted >= self._GIVE_UP_STEPS

    def _is_measured(self) -> bool:
        if self._base_computing_s.n < self._N_BASE or self._base_s <= 0:
            return False
        if self._n_base_due <= 0 and self._n_since_base <= self._MAX_STEPS_WITHOUT_BASE:
            return True
        # Without steps of one token now and then nobody knows what they take by now.
        if self._n_base_due <= 0:
            self._n_base_due = self._N_BASE
        return False

    def _expected(self, kind: int, n_max: int) -> list[float]:
        """Tokens that a step with 0 to `n_max` drafted ones gives."""
        expected = [1.0]
        chance = 1.0
        for k in range(1, n_max + 1):
            chance *= self.acceptance(kind, k)
            expected.append(expected[-1] + chance)
        return expected

    def _fastest(self, expected: Sequence[float], ratios: Sequence[float]) -> int:
        rates = [e / r for e, r in zip(expected, ratios, strict=True)]
        best = max(range(len(rates)), key=rates.__getitem__)
        return best if rates[best] >= self._MIN_GAIN else 0

    def _most_hopeful(self, expected: Sequence[float], ratios: Sequence[float]) -> int:
        """As if all that was measured were twice too slow."""
        return self._fastest(expected, [1 + (r - 1) / 2 for r in ratios])

    def _affordable(self, n_drafted: int, expected: Sequence[float], ratios: Sequence[float]) -> int:
        # 1, 3, 7: nobody knows what a long batch takes before a shorter one was tried.
        n_drafted = min(n_drafted, 2 * self._longest + 1)
        # What is lost if half as many tokens are right as expected; shorter drafts lose less.
        while n_drafted > 0 and ratios[n_drafted] - 1 - (expected[n_drafted] - 1) / 2 > self._credit:
            n_drafted -= 1
        return n_drafted

    def acceptance(self, kind: int, position: int) -> float:
        """The chance that the token at `position` (from 1) of a draft is right if those before it are.

        What is not known of a position is taken from the one before.
        """
        a = self._INITIAL_MODEL_ACCEPTANCE if kind >= _FIRST_MODEL_KIND else self._INITIAL_ACCEPTANCE[kind]
        for average in self._accepted[kind][:position]:
            n = average.weight
            a = (n * average.value + self._INITIAL_WEIGHT * a) / (n + self._INITIAL_WEIGHT)
        return a

    def time_ratio(self, n_drafted: int) -> float:
        """The time of a step with that many drafted tokens, in steps without; making the draft is not in it."""
        if n_drafted == 0:
            return 1.0
        base_s = self._base_s
        if base_s <= 0:
            return 1.0
        computing_s = self._base_computing_s.value * self._computing_ratio(n_drafted)
        wait_s = self._base_bytes.value * self._bytes_growth(n_drafted) * self._waits.draft_s_per_byte
        # At least something: a step that only waits for experts that all tokens share.
        return max((computing_s + wait_s) / base_s, 1 + 0.01 * n_drafted)

    @property
    def _base_s(self) -> float:
        """What a step of one token takes."""
        return self._base_computing_s.value + self._base_bytes.value * self._waits.s_per_byte

    def observe_acceptance(self, kind: int, position: int, is_right: bool) -> None:
        """Whether the token at `position` (from 1) of a proposal was right, those before it having been."""
        self._accepted[kind][position - 1].add(float(is_right))
        if kind >= _FIRST_MODEL_KIND:
            self._accepted[_ANY_MODEL_KIND][position - 1].add(float(is_right))

    def observe_step(self, step: Step, n_tokens: int) -> None:
        """A step that gave `n_tokens` tokens: 1, and the drafted ones that were right."""
        self._n_since_retry += 1
        self._n_since_model_retry += 1
        if step.n_drafted:
            self._n_since_base += 1
            self._observe_draft(step, n_tokens)
            return
        self._n_since_base = 0
        self._n_base_due -= 1
        computing, usual_s = self._base_computing_s, self._base_computing_s.value
        computing.add(step.computing_s if computing.n < 2 else min(step.computing_s, 4 * usual_s))
        self._base_bytes.add(step.read_bytes)
        self._base_experts.add(step.n_experts)
        self._waits.observe(step)
        # A draft may have been made and not evaluated.
        self._earn(self._EARNED_SHARE - (step.draft_s / self._base_s if self._base_s > 0 else 0.0))

    def _earn(self, steps: float) -> None:
        self._credit += steps
        if self._credit > self._MAX_CREDIT:
            self._savings += self._credit - self._MAX_CREDIT
            self._credit = self._MAX_CREDIT

    def _observe_draft(self, step: Step, n_tokens: int) -> None:
        k = step.n_drafted
        self._longest = max(self._longest, k)
        self._has_drafted = True
        if self._base_experts.value > 0 and self._unions[k] > 1:
            growth = step.n_experts / self._base_experts.value
            self._union_scale.add(min(max((growth - 1) / (self._unions[k] - 1), 0.0), 2.0))
        self._waits.observe_draft(step, self._base_bytes.value * self._usual_growth(k))
        computing_s, base_s = self._base_computing_s.value, self._base_s
        if base_s <= 0:
            return
        if computing_s > 0:
            self._ratios[k].add(min(step.computing_s / computing_s, 3 * self._computing_ratio(k)))
        # Its tokens one by one would have read their share of these bytes: what the text asks for just now counts in
        # both, and only what is read for wrong tokens is a loss. They read several times as much as right ones.
        taken_s = step.computing_s + step.draft_s + step.read_bytes * self._waits.draft_s_per_byte
        token_bytes = step.read_bytes / self._bytes_growth(k)
        if n_tokens <= k:
            token_bytes = min(token_bytes, self._base_bytes.value)
        spared_s = n_tokens * (computing_s + token_bytes * self._waits.s_per_byte)
        self._earn((self._EARNED_SHARE * taken_s + spared_s - taken_s) / base_s)

    def _usual_growth(self, k: int) -> float:
        """Bytes of a step with that many drafted tokens, in steps without: between those of the union and of all."""
        return math.sqrt(self._union(k) * (k + 1))

    def _bytes_growth(self, k: int) -> float:
        return min(max(self._usual_growth(k) * self._waits.growth, self._union(k)), self._MAX_GROWTH * (k + 1))

    def _union(self, k: int) -> float:
        scale = self._union_scale.value if self._union_scale.n else 1.0
        return 1 + scale * (self._unions[k] - 1)

    def _computing_ratio(self, k: int) -> float:
        modelled = self._modelled_ratio(k)
        measured = self._ratios[k]
        n = measured.weight
        return (n * measured.value + self._MODEL_WEIGHT * modelled) / (n + self._MODEL_WEIGHT)

    def _modelled_ratio(self, k: int) -> float:
        """Of computing, from other lengths: on a line between the next shorter and longer ones, else in proportion."""
        shorter = max(i for i in range(k) if i == 0 or self._ratios[i].n)
        value = self._ratios[shorter].value if shorter else 1.0
        longer = next((i for i in range(k + 1, self._max_tokens + 1) if self._ratios[i].n), None)
        if longer is not None:
            return value + (self._ratios[longer].value - value) * (k - shorter) / (longer - shorter)
        # The first step of a length also makes buffers, and reads what later ones find: one step is half a measurement.
        n = self._ratios[shorter].n
        scale = (n * (value - 1) / (self._COMPUTE_GROWTH * shorter) + 1) / (n + 1) if shorter else 1.0
        return value + max(scale, 0.0) * self._COMPUTE_GROWTH * (k - shorter)
