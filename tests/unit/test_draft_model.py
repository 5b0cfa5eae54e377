# SPDX-License-Identifier: MIT
"""A draft model's proposals, with models whose answers are known, and what they may cost, in simulated time."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.draft import Draft, Drafter, NgramProposer
from edgemoe.draft_length import MAX_DRAFT_TOKENS, DraftLengthChooser
from edgemoe.draft_model import Logits, ModelProposer
from edgemoe.draft_waits import Step
from edgemoe.planner import draft_path

N_VOCAB = 50


class Parrot:
    """Its next token depends on all tokens in its cache and their order: a wrong cache gives another answer."""

    def __init__(self, n_ctx: int = 64, n_vocab: int = N_VOCAB, sharpness: float = 20.0) -> None:
        self.n_ctx, self.n_vocab = n_ctx, n_vocab
        self.sharpness = sharpness
        self.token_s, self.text_token_s = 0.01, 0.001
        self.cache: list[int] = []
        self.n_evaluated = 0

    def evaluate(self, n_kept: int, tokens: Sequence[int]) -> tuple[Logits, float]:
        assert 0 <= n_kept <= len(self.cache) and len(tokens) > 0
        assert all(0 <= token < self.n_vocab for token in tokens)
        self.cache = [*self.cache[:n_kept], *tokens]
        assert len(self.cache) <= self.n_ctx
        self.n_evaluated += len(tokens)
        logits = np.zeros(self.n_vocab, dtype=np.float32)
        logits[self.answer(self.cache)] = self.sharpness
        return logits, self.token_s if len(tokens) == 1 else self.text_token_s * len(tokens)

    def answer(self, tokens: Sequence[int]) -> int:
        return hash(tuple(tokens)) % self.n_vocab

    def continuation(self, tokens: Sequence[int], n: int) -> tuple[int, ...]:
        text = list(tokens)
        for _ in range(n):
            text.append(self.answer(text))
        return tuple(text[len(tokens) :])


# ---------------------------------------------------------------- what is proposed


@settings(max_examples=100)
@given(st.data())
def test_proposals_follow_the_text(data: st.DataObject) -> None:
    """Guards against a rejected draft, or the last conversation, that stays in the model's cache, a token that is left
    out, and a cache that overflows."""
    model = Parrot()
    proposer = ModelProposer(model, N_VOCAB)
    for _ in range(data.draw(st.integers(1, 3))):
        proposer.begin()
        text = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=100))
        proposer.extend(text)
        for _ in range(data.draw(st.integers(1, 12))):
            n = data.draw(st.integers(1, 7))
            draft = proposer.propose(n, 1.0)
            read = text[proposer._begin :]
            assert len(draft.tokens) == n and len(read) >= min(len(text), 16)
            assert draft.tokens == model.continuation(read, n)
            right = list(draft.tokens[: data.draw(st.integers(0, n))])
            new = [*right, data.draw(st.integers(0, 3))]
            text += new
            proposer.extend(new)


def test_only_what_is_new_is_read() -> None:
    """Guards against reading the text again for each draft: a draft would take as long as the prompt."""
    model = Parrot(n_ctx=1000)
    proposer = ModelProposer(model, N_VOCAB)
    proposer.extend([1] * 500)
    first = proposer.propose(3, 10.0)
    assert first.catch_up_s == pytest.approx(0.5) and first.seconds == pytest.approx(0.02)
    model.n_evaluated = 0
    proposer.extend([*first.tokens, 7])
    again = proposer.propose(3, 10.0)
    assert model.n_evaluated == 4  # the last drafted one, the new one, and two of the draft
    assert again.catch_up_s == 0.0 and again.seconds == pytest.approx(0.022)
    # Another text with the same beginning.
    model.n_evaluated = 0
    proposer.begin()
    proposer.extend([1] * 499)
    assert proposer.propose(1, 10.0).catch_up_s == 0.0
    assert model.n_evaluated == 1


def test_a_text_that_ends_soon_after_the_last_window_began() -> None:
    """Guards against a new text of which only what lies in the window of the last one is read: here 8 tokens of 30."""
    model = Parrot()
    proposer = ModelProposer(model, N_VOCAB)
    text = [i % 4 for i in range(70)]
    proposer.extend(text)
    proposer.propose(1, 1.0)
    assert proposer._begin == 22
    proposer.begin()
    proposer.extend(text[:30])
    assert proposer.propose(3, 1.0).tokens == model.continuation(text[:30], 3)


def test_a_model_reads_what_can_be_paid() -> None:
    """Guards against reading a whole prompt before anything was gained, and against never reading more of it."""
    model = Parrot(n_ctx=1000)
    proposer = ModelProposer(model, N_VOCAB)
    proposer.extend(range(40))
    proposer.extend([1] * 360)
    model.n_evaluated = 0
    assert proposer.propose(3, 0.012) == Draft(())
    assert model.n_evaluated == 0
    assert proposer.propose(1, 0.0305).catch_up_s == pytest.approx(0.030)
    assert proposer._begin == 370
    assert proposer.propose(1, 0.1).catch_up_s == 0.0  # not four times as much
    assert proposer.propose(1, 0.2).catch_up_s == pytest.approx(0.2)
    assert proposer.propose(1, 9.0).catch_up_s == 0.0  # nor is all of it
    proposer.extend([2] * 300)
    assert proposer.propose(1, 0.0) == Draft(())
    assert len(proposer.propose(1, 0.5).tokens) == 1


def test_a_draft_ends_where_the_model_is_unsure() -> None:
    """Guards against drafting on when the chance that all is right has become small."""
    unsure = Parrot(sharpness=4.5)  # half of the probability is elsewhere
    proposer = ModelProposer(unsure, N_VOCAB)
    proposer.extend([1, 2, 3])
    draft = proposer.propose(7, 1.0)
    assert len(draft.tokens) == 2 and draft.kind == 5
    sure = ModelProposer(Parrot(), N_VOCAB)
    sure.extend([1, 2, 3])
    assert len(sure.propose(7, 1.0).tokens) == 7 and sure.propose(7, 1.0).kind == 7


@pytest.mark.parametrize(("n_target", "n_draft"), [(40, 50), (50, 40)])
def test_vocabularies_of_different_length(n_target: int, n_draft: int) -> None:
    """Guards against a token that one of the two models does not have."""
    proposer = ModelProposer(Parrot(n_vocab=n_draft), n_target)
    rng = random.Random(1)
    for _ in range(20):
        proposer.extend([rng.randrange(n_target)])
        assert all(token < min(n_target, n_draft) for token in proposer.propose(4, 1.0).tokens)


# ---------------------------------------------------------------- what it costs


@dataclasses.dataclass
class Costs:
    """A draft model's times, in steps of the large model, and how often its tokens are right."""

    acceptance: float
    token: float
    text_token: float


class Oracle:
    """A draft model that is right by chance, and takes time as `ModelProposer` does."""

    def __init__(self, text: Sequence[int], costs: Costs, base_s: float, seed: int) -> None:
        self.text, self.costs, self.base_s = text, costs, base_s
        self.random = random.Random(seed)
        self.n_known = self.n_read = 0
        self.spent_s = 0.0

    def begin(self) -> None:
        self.n_known = self.n_read = 0

    def extend(self, tokens: Iterable[int]) -> None:
        self.n_known += len(list(tokens))

    def seconds(self, n_tokens: int) -> float:
        return n_tokens * self.costs.token * self.base_s

    def propose(self, n_tokens: int, catch_up_s: float) -> Draft:
        n_behind = self.n_known - self.n_read
        text_s = self.costs.text_token * self.base_s
        paid_s = 0.0
        if n_behind > 8:
            n_window = min(self.n_known, int(catch_up_s / text_s))
            if n_window < 16:
                return Draft(())
            paid_s = n_window * text_s
        self.n_read = self.n_known
        draft = []
        for i in range(n_tokens):
            right = self.text[self.n_known + i] if self.n_known + i < len(self.text) else 0
            draft.append(right if self.random.random() < self.costs.acceptance else -1)
        self.spent_s += paid_s + self.seconds(n_tokens)
        return Draft(tuple(draft), 5, self.seconds(n_tokens), paid_s)


def _speed(ratio: Sequence[float], costs: Costs, n_tokens: int, noise: float, seed: int) -> tuple[float, Drafter]:
    """Tokens per second with drafts over those without, for a random text, which has no n-grams."""
    rng = random.Random(seed)
    prompt = 200
    text = [rng.randrange(10**6) for _ in range(prompt + n_tokens)]
    base_s = 0.1
    oracle = Oracle(text, costs, base_s, seed)
    drafter = Drafter(NgramProposer(), DraftLengthChooser(64, 8), lambda _drafted, _accepted: None, oracle)
    time_s = 0.0
    done = prompt + 1
    while done < len(text):
        draft = drafter.draft(text[drafter.n_known_tokens : done], MAX_DRAFT_TOKENS)
        n = 1
        while n <= len(draft) and done + n < len(text) and draft[n - 1] == text[done + n - 1]:
            n += 1
        seconds = base_s * ratio[len(draft)] * (1 + noise * (2 * rng.random() - 1))
        drafter.observe(Step(len(draft), seconds, seconds / 2, 32 + 8 * len(draft)))
        time_s += seconds
        done += n
    return (done - prompt - 1) * base_s / (time_s + oracle.spent_s), drafter


LINEAR = [1 + 0.95 * k for k in range(8)]
CHEAP = [1 + 0.12 * k for k in range(8)]
KNEE = [1, 1.1, 1.2, 1.3, 2.6, 3.9, 5.2, 6.5]
HOPELESS = [1 + 2.0 * k for k in range(8)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("model", [(0.02, 0.003), (0.1, 0.02), (0.5, 0.1), (2.0, 1.0)])
@pytest.mark.parametrize("ratio", [LINEAR, HOPELESS, KNEE, CHEAP], ids=["linear", "hopeless", "knee", "cheap"])
def test_never_five_percent_slower(
    ratio: list[float], model: tuple[float, float], acceptance: float, seed: int
) -> None:
    """Guards against a draft model whose own time, or reading of the prompt, nobody charges: 5 % of 128 tokens."""
    for n_tokens in (128, 600):
        speed, _ = _speed(ratio, Costs(acceptance, *model), n_tokens, 0.3, seed)
        assert speed >= 1 / 1.05


def test_a_good_draft_model_is_a_gain() -> None:
    """Guards against an account that never lets a draft model begin, which is never slower either."""
    assert _speed(CHEAP, Costs(0.8, 0.03, 0.005), 600, 0.1, 0)[0] > 1.5
    assert _speed(KNEE, Costs(0.9, 0.05, 0.01), 600, 0.1, 0)[0] > 1.5


def test_a_slow_model_is_not_asked() -> None:
    """Guards against a draft that costs more time than the tokens that it saves."""
    speed, drafter = _speed(CHEAP, Costs(1.0, 1.1, 0.01), 300, 0.0, 0)
    assert speed == pytest.approx(1.0, abs=0.02)
    assert drafter._chooser.has_given_up


def test_a_useful_model_is_not_given_up() -> None:
    """Guards against freeing a draft model that pays, and against judging it before there was time to try."""
    assert not _speed(CHEAP, Costs(0.8, 0.03, 0.005), 600, 0.1, 0)[1]._chooser.has_given_up
    assert not _speed(CHEAP, Costs(1.0, 1.1, 0.01), 90, 0.0, 0)[1]._chooser.has_given_up


def test_the_text_is_asked_first() -> None:
    """Guards against paying a model for what the text gives for nothing."""
    period = list(range(100, 120))
    text = period * 20
    oracle = Oracle(text, Costs(1.0, 0.05, 0.001), 0.1, 0)
    drafter = Drafter(NgramProposer(), DraftLengthChooser(64, 8), lambda _drafted, _accepted: None, oracle)
    done, n_drafted = 60, 0
    while done < 380:
        draft = drafter.draft(text[drafter.n_known_tokens : done], 7)
        drafter.observe(Step(len(draft), 0.1 * CHEAP[len(draft)], 0.05, 8))
        n_drafted += len(draft)
        done += 1 + len(draft)
    assert n_drafted > 200
    assert oracle.spent_s < 0.2


def test_names_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a misspelt name that is taken for a file, and a file that is taken for a misspelt name."""
    monkeypatch.chdir(tmp_path)
    assert draft_path("off") is None and draft_path("ngram") is None
    for path in ("small.gguf", "./small", Path("small")):
        assert draft_path(path) == Path(path)
    with pytest.raises(ValueError, match="unknown draft 'n-gram': expected off, ngram, or the path of a small GGUF"):
        draft_path("n-gram")
    Path("small").touch()
    assert draft_path("small") == Path("small")
