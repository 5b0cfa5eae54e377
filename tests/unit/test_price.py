# SPDX-License-Identifier: MIT
"""The arithmetic of a price list: divergences and paired errors against numpy's and scipy's definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgemoe.price import EXACT, Lever, Price, Row, TextPrice, compare


def _row(lever: Lever, losses: list[float], counts: list[int]) -> Row:
    texts = tuple(TextPrice(n, loss, 0.1, 0.9) for n, loss in zip(counts, losses, strict=True))
    return Row(lever, texts, 0.1, 0.05, 0.01, 500.0, 0.6, 10.0)


def _price(exact: list[float], biased: list[float], counts: list[int]) -> Price:
    rows = (_row(EXACT, exact, counts), _row(Lever(0.1), biased, counts))
    return Price("model.gguf", tuple(f"{i}.txt" for i in range(len(counts))), 32, 1 << 20, 0.25, rows)


def test_divergences_are_those_of_the_definition() -> None:
    """Guards against KL in the other direction or in bits, losses of another token, and overflow of large logits."""
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.6, 0.1])
    logits_p, logits_q = np.log(p).astype(np.single) + 900, np.log(q).astype(np.single) - 900
    loss, kl, agrees = compare(logits_p.astype(np.single), logits_q.astype(np.single), 2)
    # Single precision near 900 has steps of 6e-5.
    assert loss == pytest.approx(-math.log(0.1), abs=2e-4)
    assert kl == pytest.approx(0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.6), abs=2e-4)
    assert not agrees
    assert compare(logits_p, logits_p, 0)[1:] == (0.0, True)


def test_errors_are_of_paired_differences() -> None:
    """Guards against the spread of the texts themselves, which is far larger than that of what a lever does to them."""
    exact, steps = [1.0, 3.0, 2.0, 4.0], [0.01, 0.03, 0.02, 0.05]
    found = _price(exact, [a + b for a, b in zip(exact, steps, strict=True)], [100] * 4)
    change = found.change(found.rows[1])
    assert change.cross_entropy == pytest.approx(np.mean(steps))
    assert change.standard_error == pytest.approx(np.std(steps, ddof=1) / 2)
    assert change.perplexity == pytest.approx(found.rows[1].perplexity / found.exact.perplexity - 1)
    assert change.perplexity_error == pytest.approx(math.exp(np.mean(steps)) * np.std(steps, ddof=1) / 2)


def test_longer_texts_weigh_more_and_one_text_has_no_error() -> None:
    """Guards against a perplexity that is not that of all tokens, and an error out of nothing."""
    found = _price([1.0, 2.0], [1.1, 2.4], [300, 100])
    assert found.exact.perplexity == pytest.approx(math.exp(1.25))
    assert found.change(found.rows[1]).cross_entropy == pytest.approx(0.175)
    one = _price([1.0], [1.1], [300])
    assert one.change(one.rows[1]).standard_error is None
    assert one.to_dict()["rows"][1]["perplexity_change_error"] is None
