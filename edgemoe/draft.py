# SPDX-License-Identifier: MIT
"""Speculative decoding: what the next tokens may be, and how many of them are worth evaluating.

A drafted token is kept only if it is the one that sampling gives at its place, so drafts never change what is
generated. They change what a step costs: a batch of several tokens reads the union of their experts, which for one
user is mostly slower than it sounds (Mixtral: -25 % to -54 % without a cost model, according to third parties).
Nothing here knows llama.cpp; one thread at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
from array import array
from collections.abc import Callable, Iterable, Sequence

MAX_DRAFT_TOKENS = 7
"""Most tokens of a draft: with the token before them a batch of 8 rows, up to which ggml's products of single rows
and of several have the same bits (it changes over to other code for experts with 8 rows)."""

_SHORTEST_MATCH = 2  # one equal token says little
_LONGEST_MATCH = 8
# Occurrences of the last two tokens that are looked at, most recent first: bounds the work per token.
_MAX_CANDIDATES = 32
_N_KINDS = 4


@dataclasses.dataclass(frozen=True)
class Draft:
    """Tokens that may come next, and how sure the proposer is: a class of drafts with an acceptance of its own."""

    tokens: tuple[int, ...]
    kind: int = 0


class NgramProposer:
    """Finds the end of the text earlier in the text, and proposes what followed there (prompt lookup).

    Of the occurrences of the last two tokens the one with the longest common past wins, of equals the most recent.
    The index has one entry for each distinct pair of tokens (about 100 bytes) and 8 bytes for each token.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens = array("i")
        self._before = array("i")  # at i: the previous end of the pair of tokens that ends before i, or -1
        self._last: dict[int, int] = {}  # pair of tokens -> where its most recent occurrence ends
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Tokens that are certain: the prompt, then each token that was generated."""
        for token in tokens:
            end = len(self._tokens)
            # The pair before this token is entered only now, so that it never finds itself.
            if end >= _SHORTEST_MATCH:
                pair = self._pair(end)
                self._before.append(self._last.get(pair, -1))
                self._last[pair] = end
            else:
                self._before.append(-1)
            self._tokens.append(token)

    def propose(self, n_tokens: int) -> Draft:
        """Up to `n_tokens` tokens that may come next; none if the last two tokens are new to the text."""
        tokens, end = self._tokens, len(self._tokens)
        best, best_length = -1, 0
        candidate = self._last.get(self._pair(end), -1) if end >= _SHORTEST_MATCH else -1
        for _ in range(_MAX_CANDIDATES):
            if candidate < 0 or best_length == _LONGEST_MATCH:
                break
            length = _SHORTEST_MATCH
            longest = min(_LONGEST_MATCH, candidate)
            while length < longest and tokens[candidate - length - 1] == tokens[end - length - 1]:
                length += 1
            if length > best_length:
                best, best_length = candidate, length
            candidate = self._before[candidate]
        if best < 0:
            return Draft(())
        draft: list[int] = []
        for at in range(best, best + n_tokens):
            # Where the text ends, what was proposed goes on: a text that runs in circles is proposed for ever.
            draft.append(tokens[at] if at < end else draft[at - end])
        return Draft(tuple(draft), _kind(best_length))

    def _pair(self, end: int) -> int:
        return self._tokens[end - 2] << 32 | self._tokens[end - 1]


def _kind(match_length: int) -> int:
    """2; 3 or 4; 5 to 7; 8 or more: each step about doubles what is known."""
    return 0 if match_length == 2 else 1 if match_length <= 4 else 2 if match_length < _LONGEST_MATCH else 3


def union_growth(n_experts: int, n_experts_used: int, n_tokens: int) -> float:
    """Distinct experts of `n_tokens` tokens over those of one, for uniform routing: E (1 - (1 - K/E)^B) / K.

    Source: the form that prices batches in arXiv 2603.08960. Real routing repeats itself, so it is an upper bound.
    1.0 for models without experts.
    """
    if n_experts <= 0:
        return 1.0
    return n_experts * (1 - (1 - n_experts_used / n_experts) ** n_tokens) / n_experts_used


class _Average:
    """A mean that begins as that of all values and becomes an exponential one over the last `memory` of them."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self.n = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        self.n += 1
        self.value += (value - self.value) / min(self.n, self._memory)

    def doubt(self, n: int) -> None:
        """Let what was added so far weigh no more than `n` values."""
        self.n = min(self.n, n)


@dataclasses.dataclass(frozen=True)
class Step:
    """What the evaluation of one token and `n_drafted` drafted ones took.

    Attributes:
        seconds, stall_s: wall time, and the part of it that computing waited for storage.
        n_experts: experts that the layers asked for, each once for each layer.
        draft_s: time that went into the draft itself.
    """

    n_drafted: int
    seconds: float
    stall_s: float = 0.0
    n_experts: int = 0
    draft_s: float = 0.0


class DraftLengthChooser:
    """Chooses how many drafted tokens to evaluate with the next one, 0 among them.

    The choice maximizes expected tokens per second: 1 + a1 + a1 a2 + ... over the time of the step. Acceptance a_i is
    measured for each kind of draft and position, from proposals that were not evaluated too: the text shows by itself
    whether they were right. The time of a step of k + 1 tokens, in steps of one, is at first

        waiting x growth of the union of experts + computing x (1 + 0.7 k)

    where waiting and computing are shares of a step of one token and the union is the formula's, scaled by the unions
    measured; what steps of each length took replaces it as they come, and corrects the lengths beside it.

    A loss account bounds what being wrong costs: a step with drafts, and the few after it whose cache it changed, are
    charged with what they took beyond the usual time for the tokens they gave. Drafts are evaluated only while the
    account can pay for one of which half fails; it fills with 2 % of the time and with what drafts gain.
    """

    # Source of the numbers: simulated worlds in tests/unit/test_draft.py, where all of them may be halved or doubled.
    _COMPUTE_GROWTH = 0.7  # of computing, for each further token, until it is measured
    _MIN_GAIN = 1.1  # below it, noise decides, and a cache that wrong drafts disturbed
    _INITIAL_ACCEPTANCE, _INITIAL_WEIGHT = 0.4, 2.0
    _ACCEPTANCE_MEMORY = 24
    _TIME_MEMORY = 16
    _RATIO_MEMORY = 8
    _MODEL_WEIGHT = 1.0  # in measurements
    _N_AFFECTED = 8  # steps after a draft that it may have slowed down
    _N_BASE = 4  # steps without drafts before the first draft
    _MAX_STEPS_WITHOUT_BASE = 256
    _RETRY_STEPS = 64
    _NEIGHBOUR_STEPS = 16
    _EARNED_SHARE = 0.02
    _INITIAL_CREDIT, _MAX_CREDIT = 1.5, 4.0  # in steps of one token

    def __init__(self, n_experts: int, n_experts_used: int, max_tokens: int = MAX_DRAFT_TOKENS) -> None:
        self._unions = [union_growth(n_experts, n_experts_used, k + 1) for k in range(max_tokens + 1)]
        self._max_tokens = max_tokens
        self._accepted = [[_Average(self._ACCEPTANCE_MEMORY) for _ in range(max_tokens)] for _ in range(_N_KINDS)]
        self._base_s = _Average(self._TIME_MEMORY)
        self._base_wait = _Average(self._TIME_MEMORY)
        self._base_experts = _Average(self._TIME_MEMORY)
        self._ratios = [_Average(self._RATIO_MEMORY) for _ in range(max_tokens + 1)]
        self._union_scale = _Average(self._TIME_MEMORY)
        self._draft_token_s = _Average(self._TIME_MEMORY)
        self._credit = self._INITIAL_CREDIT  # in steps of one token
        self._n_since_draft = self._n_since_base = self._n_since_retry = self._n_choices = 0
        self._n_base_due = self._N_BASE
        self._longest = 0  # the most drafted tokens of any step so far

    def begin(self) -> None:
        """Another text begins: it starts with what steps cost in the last one, not with its acceptance or its gains."""
        self._credit = min(max(self._credit, 0.0), self._INITIAL_CREDIT)
        self._n_base_due = self._N_BASE
        self._n_since_draft = self._N_AFFECTED
        for average in (self._base_s, self._base_wait, self._base_experts, *itertools.chain(*self._accepted)):
            average.doubt(0)
        for average in self._ratios:
            average.doubt(2)

    def choose(self, kind: int, n_proposed: int) -> int:
        """How many of `n_proposed` tokens of a draft to evaluate."""
        self._n_since_retry += 1
        if self._base_s.n < self._N_BASE or self._base_s.value <= 0:
            return 0
        if self._n_base_due > 0 or self._n_since_base > self._MAX_STEPS_WITHOUT_BASE:
            # Without steps of one token now and then nobody knows what they take by now.
            if self._n_base_due <= 0:
                self._n_base_due = self._N_AFFECTED + 2
            return 0
        n_max = min(n_proposed, self._max_tokens)
        expected = [1.0]
        chance = 1.0
        for k in range(1, n_max + 1):
            chance *= self.acceptance(kind, k)
            expected.append(expected[-1] + chance)
        ratios = [1.0, *(self.time_ratio(k) for k in range(1, n_max + 1))]
        rates = [expected[k] / ratios[k] for k in range(n_max + 1)]
        best = max(range(n_max + 1), key=rates.__getitem__)
        if rates[best] < self._MIN_GAIN:
            # As if all that was measured were twice too slow.
            hopes = [expected[k] / (1 + (ratios[k] - 1) / 2) for k in range(n_max + 1)]
            best = max(range(n_max + 1), key=hopes.__getitem__)
            if hopes[best] < self._MIN_GAIN or self._n_since_retry <= self._RETRY_STEPS:
                return 0
            self._n_since_retry = 0
        else:
            self._n_choices += 1
            if self._n_choices % self._NEIGHBOUR_STEPS == 0:
                # What the next length takes may have changed since it was measured.
                longer = self._n_choices % (2 * self._NEIGHBOUR_STEPS) == 0
                best = min(best + 1, n_max) if longer else max(best - 1, 1)
        # 1, 3, 7: nobody knows what a long batch takes before a shorter one was tried.
        best = min(best, 2 * self._longest + 1)
        # What is lost if half as many tokens are right as expected; shorter drafts lose less.
        while best > 0 and ratios[best] - 1 - (expected[best] - 1) / 2 > self._credit:
            best -= 1
        return best

    def acceptance(self, kind: int, position: int) -> float:
        """The chance that the token at `position` (from 1) of a draft is right if those before it are.

        What is not known of a position is taken from the one before.
        """
        a = self._INITIAL_ACCEPTANCE
        for average in self._accepted[kind][:position]:
            n = min(average.n, self._ACCEPTANCE_MEMORY)
            a = (n * average.value + self._INITIAL_WEIGHT * a) / (n + self._INITIAL_WEIGHT)
        return a

    def time_ratio(self, n_drafted: int) -> float:
        """The time of a step with that many drafted tokens, in steps without."""
        modelled = self._modelled_ratio(n_drafted)
        measured = self._ratios[n_drafted]
        n = min(measured.n, self._RATIO_MEMORY)
        ratio = (n * measured.value + self._MODEL_WEIGHT * modelled) / (n + self._MODEL_WEIGHT)
        return ratio + n_drafted * self._draft_token_s.value / self._base_s.value

    def observe_acceptance(self, kind: int, position: int, is_right: bool) -> None:
        """Whether the token at `position` (from 1) of a proposal was right, those before it having been."""
        self._accepted[kind][position - 1].add(float(is_right))

    def observe_step(self, step: Step, n_tokens: int) -> None:
        """A step that gave `n_tokens` tokens: 1, and the drafted ones that were right."""
        if step.n_drafted == 0:
            self._n_since_draft += 1
            self._n_base_due -= 1
        else:
            self._n_since_draft = 0
            self._draft_token_s.add(step.draft_s / step.n_drafted)
        is_base = self._n_since_draft > self._N_AFFECTED or self._base_s.n < self._N_BASE
        self._n_since_base = 0 if is_base else self._n_since_base + 1
        base_s = self._base_s.value
        if is_base:
            self._base_s.add(step.seconds if self._base_s.n < 2 else min(step.seconds, 4 * base_s))
            self._base_wait.add(min(step.stall_s / step.seconds, 1.0) if step.seconds > 0 else 0.0)
            self._base_experts.add(step.n_experts)
            self._earn(self._EARNED_SHARE)
            return
        if step.n_drafted:
            self._observe_draft(step)
        taken = (step.seconds + step.draft_s) / base_s
        self._earn(self._EARNED_SHARE * taken + n_tokens - taken)

    def _earn(self, steps: float) -> None:
        self._credit = min(self._credit + steps, self._MAX_CREDIT)

    def _observe_draft(self, step: Step) -> None:
        k = step.n_drafted
        self._longest = max(self._longest, k)
        if self._base_experts.value > 0 and self._unions[k] > 1:
            growth = step.n_experts / self._base_experts.value
            self._union_scale.add(min(max((growth - 1) / (self._unions[k] - 1), 0.0), 2.0))
        self._ratios[k].add(min(step.seconds / self._base_s.value, 3 * self.time_ratio(k)))

    def _modelled_ratio(self, k: int) -> float:
        """From what other lengths took: on a line between the next shorter and longer ones, else as bytes grow."""
        shorter = max(i for i in range(k) if i == 0 or self._ratios[i].n)
        value = self._ratios[shorter].value if shorter else 1.0
        longer = next((i for i in range(k + 1, self._max_tokens + 1) if self._ratios[i].n), None)
        if longer is not None:
            return value + (self._ratios[longer].value - value) * (k - shorter) / (longer - shorter)
        scale = (value - 1) / (self._bytes_ratio(shorter) - 1) if shorter else 1.0
        return value + max(scale, 0.0) * (self._bytes_ratio(k) - self._bytes_ratio(shorter))

    def _bytes_ratio(self, k: int) -> float:
        scale = self._union_scale.value if self._union_scale.n else 1.0
        union = 1 + scale * (self._unions[k] - 1)
        wait = self._base_wait.value
        # At least something: a step that only waits for experts that all tokens share.
        return max(wait * union + (1 - wait) * (1 + self._COMPUTE_GROWTH * k), 1 + 0.01 * k)


class Drafter:
    """Proposals of one generation, their lengths chosen, and everything learned from how they fared."""

    def __init__(self, proposer: NgramProposer, chooser: DraftLengthChooser, count: Callable[[int, int], None]) -> None:
        """Begin; `count` is called with the drafted and the accepted tokens of each step."""
        chooser.begin()
        self._proposer = proposer
        self._chooser = chooser
        self._count = count
        self._watched = Draft(())
        self._n_seen = 0  # of the watched proposal
        self._step: Step | None = None

    @property
    def n_known_tokens(self) -> int:
        """Tokens of the text that the drafter has been given."""
        return len(self._proposer)

    def draft(self, new_tokens: Sequence[int], n_tokens_max: int) -> tuple[int, ...]:
        """What to evaluate with the last of `new_tokens`: at most `n_tokens_max` tokens, often none.

        `new_tokens` is the text from `n_known_tokens` on: first the prompt and a token, then what each step gave.
        """
        if self.n_known_tokens:
            self.finish(len(new_tokens))
            self._watch(new_tokens)
        self._proposer.extend(new_tokens)
        if n_tokens_max < 1:
            return ()
        proposal = self._proposer.propose(MAX_DRAFT_TOKENS)
        if not proposal.tokens:
            return ()
        if self._n_seen == len(self._watched.tokens):
            self._watched, self._n_seen = proposal, 0
        return proposal.tokens[: self._chooser.choose(proposal.kind, min(n_tokens_max, len(proposal.tokens)))]

    def observe(self, step: Step) -> None:
        """What the evaluation of the draft and the token before it took."""
        self._step = step

    def finish(self, n_tokens: int) -> None:
        """`n_tokens` tokens came out of the last step; the generation may end here."""
        step, self._step = self._step, None
        if step is None or n_tokens < 1:
            return
        self._count(step.n_drafted, min(n_tokens - 1, step.n_drafted))
        self._chooser.observe_step(step, n_tokens)

    def _watch(self, tokens: Sequence[int]) -> None:
        for token in itertools.islice(tokens, len(self._watched.tokens) - self._n_seen):
            self._n_seen += 1
            is_right = token == self._watched.tokens[self._n_seen - 1]
            self._chooser.observe_acceptance(self._watched.kind, self._n_seen, is_right)
            if not is_right:
                self._watched, self._n_seen = Draft(()), 0
                return


def reserved_bytes(n_vocab: int, n_ctx: int) -> int:
    """Memory that drafts take: the logits of their tokens, and the index of n-grams.

    Computing the logits of a batch is in llama.cpp's compute buffer already (llama-context.cpp, n_outputs_pp).
    """
    return 4 * n_vocab * MAX_DRAFT_TOKENS + 150 * n_ctx
