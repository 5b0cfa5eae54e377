# SPDX-License-Identifier: MIT
"""The terms that routers are tuned for, against plain loops in float64."""

from __future__ import annotations

import collections

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (the extra edgemoe[train])")

from edgemoe.converters import router_losses as losses  # noqa: E402

N_WINDOWS, N_TOKENS, N_EXPERTS, N_USED = 3, 40, 12, 3

Doubles = npt.NDArray[np.float64]


@pytest.fixture
def logits() -> Doubles:
    """Of a router whose choices drift, so that some are repeated: [window, token, expert]."""
    rng = np.random.default_rng(3)
    return 0.6 * rng.normal(size=(N_WINDOWS, N_TOKENS, N_EXPERTS)).cumsum(axis=1)


def choices(logits: Doubles) -> npt.NDArray[np.int64]:
    return np.argsort(-logits, axis=-1)[..., :N_USED]


def probabilities(logits: Doubles, *, is_sigmoid: bool = False) -> Doubles:
    scores = 1 / (1 + np.exp(-logits)) if is_sigmoid else np.exp(logits - logits.max(-1, keepdims=True))
    found: Doubles = scores / scores.sum(-1, keepdims=True)
    return found


def lru_before(chosen: npt.NDArray[np.int64], n_slots: int) -> list[set[int]]:
    """What an LRU cache holds before each token of a window [token, k]; of a token's experts the lowest comes last."""
    cache: collections.OrderedDict[int, None] = collections.OrderedDict()
    found = []
    for ids in chosen:
        found.append(set(cache))
        for expert in sorted(ids.tolist(), reverse=True):
            cache[expert] = None
            cache.move_to_end(expert)
        while len(cache) > n_slots:
            cache.popitem(last=False)
    return found


@pytest.mark.parametrize("n_slots", [N_USED, 5, N_EXPERTS])
@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_reuse_is_rewarded_as_the_formula_says(logits: Doubles, n_slots: int, is_sigmoid: bool) -> None:
    """Guards against a term that counts this token's own experts, wraps around a window's end, or forgets the cache."""
    chosen, p = choices(logits), probabilities(logits, is_sigmoid=is_sigmoid)
    masses = []
    for window in range(N_WINDOWS):
        for token, held in enumerate(lru_before(chosen[window], n_slots)):
            if n_slots == N_USED:  # the paper's: the experts of the token before
                assert held == (set(chosen[window, token - 1].tolist()) if token else set())
            if token:
                masses.append(p[window, token, sorted(held)].sum() / N_USED)
    expected = -np.log(np.mean(masses) + 1e-8)
    log_p = losses.log_probabilities(torch.tensor(logits), is_sigmoid=is_sigmoid)
    held = losses.residents(torch.tensor(chosen), N_EXPERTS, n_slots)
    assert float(losses.reuse_loss(log_p, held, N_USED)) == pytest.approx(expected, rel=1e-12)


def test_overlap_is_that_of_neighbours(logits: Doubles) -> None:
    """Guards against a number that is reported and means something else."""
    chosen = choices(logits)
    pairs = [(a, b) for window in chosen for a, b in zip(window[1:].tolist(), window[:-1].tolist(), strict=True)]
    expected = np.mean([len(set(a) & set(b)) / N_USED for a, b in pairs])
    assert 0.2 < expected < 0.9
    assert losses.overlap(torch.tensor(chosen)) == pytest.approx(expected, rel=1e-12)


def test_divergences_are_of_the_right_direction(logits: Doubles) -> None:
    """Guards against KL(reference || P) for KL(P || reference), which is near it where both are alike."""
    other = logits[:, ::-1].copy()
    p, q = probabilities(logits), probabilities(other)
    first, second = (torch.log_softmax(torch.tensor(x), dim=-1) for x in (logits, other))
    expected = (p * np.log(p / q)).sum(-1).mean()
    assert float(losses.anchor_loss(first, second)) == pytest.approx(expected, rel=1e-12)
    # The teacher's distribution is the one that weighs.
    assert float(losses.distillation_loss(torch.tensor(other), torch.tensor(logits))) == pytest.approx(expected)


def test_gradients_are_those_of_differences(logits: Doubles) -> None:
    """Guards against a term that is computed and does not train, or trains the choice itself."""
    chosen = torch.tensor(choices(logits))
    held = losses.residents(chosen, N_EXPERTS, 5)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return losses.reuse_loss(losses.log_probabilities(values, is_sigmoid=False), held, N_USED)

    assert torch.autograd.gradcheck(loss, (torch.tensor(logits, requires_grad=True),))
