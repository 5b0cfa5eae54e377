# SPDX-License-Identifier: MIT
"""Speculative decoding: what the next tokens may be.

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
from typing import Protocol

from edgemoe.draft_length import MAX_DRAFT_TOKENS, DraftLengthChooser
from edgemoe.draft_waits import Step

_SHORTEST_MATCH = 2  # one equal token says little
_LONGEST_MATCH = 8
# Occurrences of the last two tokens that are looked at, most recent first: bounds the work per token.
_MAX_CANDIDATES = 32


@dataclasses.dataclass(frozen=True)
class Draft:
    """Tokens that may come next.

    Attributes:
        kind: how sure the proposer is: a class of drafts with an acceptance of its own.
        seconds: what it took to make the draft.
        catch_up_s: what it took before that, once, to read text that earlier drafts had no use for.
    """

    tokens: tuple[int, ...]
    kind: int = 0
    seconds: float = 0.0
    catch_up_s: float = 0.0


class CostlyProposer(Protocol):
    """Makes drafts that take time: a draft model."""

    def begin(self) -> None:
        """Another text begins."""

    def extend(self, tokens: Iterable[int]) -> None:
        """Tokens that are certain."""

    def seconds(self, n_tokens: int) -> float:
        """What a draft of that many tokens will take, without catching up."""

    def propose(self, n_tokens: int, catch_up_s: float) -> Draft:
        """Up to `n_tokens` tokens; none if the text cannot be caught up with in about `catch_up_s`."""


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


class _Watch:
    """Compares proposals with the text that comes, whether they were evaluated or not."""

    def __init__(self, chooser: DraftLengthChooser) -> None:
        self._chooser = chooser
        self._proposal = Draft(())
        self._n_seen = 0
        self._newest = Draft(())  # where another one is being watched: of this only the first token counts

    def begin(self, proposal: Draft) -> None:
        """Watch another one, if all of the last one has been seen: no position of a draft counts twice for a token."""
        if self._n_seen == len(self._proposal.tokens):
            self._proposal, self._n_seen = proposal, 0
        else:
            self._newest = proposal

    def see(self, tokens: Sequence[int]) -> None:
        """The text goes on with these."""
        newest, self._newest = self._newest, Draft(())
        if newest.tokens and tokens:
            self._chooser.observe_acceptance(newest.kind, 1, tokens[0] == newest.tokens[0])
        for token in itertools.islice(tokens, len(self._proposal.tokens) - self._n_seen):
            self._n_seen += 1
            is_right = token == self._proposal.tokens[self._n_seen - 1]
            self._chooser.observe_acceptance(self._proposal.kind, self._n_seen, is_right)
            if not is_right:
                self._proposal, self._n_seen = Draft(()), 0
                return


class Drafter:
    """Proposals of one generation, their lengths chosen, and everything learned from how they fared.

    What the text proposes costs nothing, so it is asked first; a draft model is asked where that is not worth while.
    """

    def __init__(
        self,
        proposer: NgramProposer,
        chooser: DraftLengthChooser,
        count: Callable[[int, int], None],
        model: CostlyProposer | None = None,
        foresee: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """Begin.

        Args:
            count: called with the drafted and the accepted tokens of each step.
            model: asked where the text proposes nothing that is worth while.
            foresee: called with the token that comes next before the model drafts what follows it: storage is idle
                then, and may read that token's first experts.
        """
        chooser.begin()
        if model is not None:
            model.begin()
        self._proposer = proposer
        self._chooser = chooser
        self._count = count
        self._model = model
        self._foresee = foresee
        self._watch = _Watch(chooser)
        self._model_watch = _Watch(chooser)
        self._draft_s = 0.0
        self._last_token = -1
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
            self._watch.see(new_tokens)
            self._model_watch.see(new_tokens)
        self._proposer.extend(new_tokens)
        if self._model is not None:
            self._model.extend(new_tokens)
        self._last_token = new_tokens[-1]
        if n_tokens_max < 1:
            return ()
        return self._from_text(n_tokens_max) or self._from_model(n_tokens_max)

    def drop_model(self) -> None:
        """Go on with what the text proposes."""
        self._model = None

    def observe(self, step: Step) -> None:
        """What the evaluation of the draft and the token before it took."""
        self._step = step

    def finish(self, n_tokens: int) -> None:
        """`n_tokens` tokens came out of the last step; the generation may end here."""
        step, self._step = self._step, None
        draft_s, self._draft_s = self._draft_s, 0.0
        if step is None or n_tokens < 1:
            return
        self._count(step.n_drafted, min(n_tokens - 1, step.n_drafted))
        self._chooser.observe_step(dataclasses.replace(step, draft_s=draft_s), n_tokens)

    def _from_text(self, n_tokens_max: int) -> tuple[int, ...]:
        proposal = self._proposer.propose(MAX_DRAFT_TOKENS)
        if not proposal.tokens:
            return ()
        self._watch.begin(proposal)
        return proposal.tokens[: self._chooser.choose(proposal.kind, min(n_tokens_max, len(proposal.tokens)))]

    def _from_model(self, n_tokens_max: int) -> tuple[int, ...]:
        n_wanted = self._chooser.wanted(n_tokens_max, self._model.seconds) if self._model is not None else 0
        if self._model is None or n_wanted == 0:
            return ()
        if self._foresee is not None:
            self._foresee([self._last_token])
        proposal = self._model.propose(n_wanted, self._chooser.catch_up_s())
        self._chooser.pay_catch_up(proposal.catch_up_s)
        self._draft_s = proposal.seconds
        if not proposal.tokens:
            return ()
        self._model_watch.begin(proposal)
        return proposal.tokens[: self._chooser.choose(proposal.kind, len(proposal.tokens))]


class DraftMemory:
    """Memory that drafts take beside a draft model: the logits of their tokens, and the index of n-grams.

    llama.cpp's buffer of logits grows with the longest batch so far and never shrinks (llama-context.cpp,
    output_reserve: the old one is freed before the new one is made); the index grows with the text. Computing the
    logits of a batch is in llama.cpp's compute buffer already (n_outputs_pp).
    """

    _TOKEN_BYTES = 150  # of the index, at most: every pair of tokens a new one
    _TEXT_STEP = 256  # tokens of text that are paid for together

    def __init__(self, n_vocab: int, n_ctx: int) -> None:
        """Of a model with so many tokens, none taken yet."""
        self._n_vocab = n_vocab
        self._n_ctx = n_ctx
        self._n_drafted = self._n_text = 0

    @property
    def most_bytes(self) -> int:
        """What it can become: the longest draft, and a text as long as the context."""
        return self._bytes(MAX_DRAFT_TOKENS, self._n_ctx)

    def grow(self, n_drafted: int = 0, n_text: int = 0) -> int:
        """Bytes that a draft of so many tokens, or a text, takes beyond those before it; they count as taken then."""
        before = self._bytes(self._n_drafted, self._n_text)
        self._n_drafted = max(self._n_drafted, n_drafted)
        self._n_text = max(self._n_text, min(-(-n_text // self._TEXT_STEP) * self._TEXT_STEP, self._n_ctx))
        return self._bytes(self._n_drafted, self._n_text) - before

    def _bytes(self, n_drafted: int, n_text: int) -> int:
        return 4 * self._n_vocab * n_drafted + self._TOKEN_BYTES * n_text
