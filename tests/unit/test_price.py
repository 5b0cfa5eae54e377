# SPDX-License-Identifier: MIT
"""The arithmetic of a price list: divergences, paired errors and intervals against numpy's and published values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from edgemoe.cli.price import table
from edgemoe.levers import EXACT, Lever
from edgemoe.price import compare
from edgemoe.price_change import Change, student_t
from edgemoe.price_list import Price, Row, TextPrice


def _row(lever: Lever, losses: list[float], counts: list[int]) -> Row:
    texts = tuple(TextPrice(n, loss, 0.1, 0.9) for n, loss in zip(counts, losses, strict=True))
    return Row(lever, texts, 0.1, 0.05, 0.01, 500.0, 0.6, 10.0)


def _price(exact: list[float], biased: list[float], counts: list[int]) -> Price:
    rows = (_row(EXACT, exact, counts), _row(Lever.of(reuse_bias=0.1), biased, counts))
    return Price(
        "model.gguf", tuple(f"{i}.txt" for i in range(len(counts))), 32, 1 << 20, 0.25, rows, "lru", "2026-01-31"
    )


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
    assert one.to_dict()["rows"][1]["perplexity_change_low"] is None
    assert one.change(one.rows[1]).perplexity_bound is None


# NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2: critical values of Student's t, upper tail 0.05 and 0.025.
CRITICAL = {
    1: (6.314, 12.706),
    2: (2.920, 4.303),
    3: (2.353, 3.182),
    4: (2.132, 2.776),
    7: (1.895, 2.365),
    10: (1.812, 2.228),
    23: (1.714, 2.069),
    30: (1.697, 2.042),
    99: (1.660, 1.984),
}


@pytest.mark.parametrize("n_degrees", CRITICAL)
def test_quantiles_are_the_published_ones(n_degrees: int) -> None:
    """Guards against the normal distribution's quantiles, one-sided ones for intervals, and the wrong parity's sum."""
    assert student_t(0.95, n_degrees) == pytest.approx(CRITICAL[n_degrees][0], abs=5.1e-4)
    assert student_t(0.975, n_degrees) == pytest.approx(CRITICAL[n_degrees][1], abs=5.1e-4)


@pytest.mark.parametrize("n_degrees", [1, 2, 5, 8, 40, 10_000])
def test_quantiles_hold_the_density_integrated(n_degrees: int) -> None:
    """Guards against quantiles that are right in the table only."""
    quantile = student_t(0.975, n_degrees)
    t = np.linspace(0, quantile, 200_001)
    scale = math.exp(math.lgamma((n_degrees + 1) / 2) - math.lgamma(n_degrees / 2)) / math.sqrt(n_degrees * math.pi)
    density = scale * (1 + t**2 / n_degrees) ** (-(n_degrees + 1) / 2)
    assert 2 * float(np.sum((density[1:] + density[:-1]) / 2 * np.diff(t))) == pytest.approx(0.95, abs=1e-7)


def test_quantiles_end_in_the_normal_distribution() -> None:
    """Guards against a sum that loses its digits with many texts."""
    assert student_t(0.975, 100_000) == pytest.approx(1.959964, abs=3e-5)
    assert student_t(0.5, 7) == pytest.approx(0, abs=1e-12)


def test_intervals_are_students_of_the_paired_differences() -> None:
    """Guards against intervals of other degrees of freedom, or symmetric in perplexity instead of its logarithm."""
    exact, steps = [1.0, 3.0, 2.0, 4.0, 2.5], [0.01, 0.03, 0.02, 0.05, -0.01]
    found = _price(exact, [a + b for a, b in zip(exact, steps, strict=True)], [100] * 5)
    change = found.change(found.rows[1])
    mean, error = np.mean(steps), np.std(steps, ddof=1) / math.sqrt(5)
    interval = (math.expm1(mean - 2.776 * error), math.expm1(mean + 2.776 * error))
    assert change.perplexity_interval == pytest.approx(interval, abs=1e-5)
    assert change.perplexity_bound == pytest.approx(math.expm1(mean + 2.132 * error), abs=1e-5)
    fields = json.loads(json.dumps(found.to_dict()))["rows"][1]
    assert (fields["perplexity_change_low"], fields["perplexity_change_high"]) == pytest.approx(interval, abs=1e-5)
    assert fields["lever"] == "reuse_bias=0.1"
    low, high = (f"{100 * end:+.2f}" for end in interval)
    assert f"{low}..{high}" in table(found).splitlines()[2]
    assert Change(0.0, 0.0, 5).perplexity_interval == (0.0, 0.0)


def test_what_is_replaced_or_left_out_is_shown_where_it_happens() -> None:
    """Guards against counters that nobody sees, and columns of zeros for everybody else."""
    found = _price([1.0, 2.0], [1.1, 2.4], [300, 100])
    assert "low-bit" not in table(found) and "skipped" not in table(found)
    texts = found.exact.texts
    skipping = Row(
        Lever.of(reuse_bias=0.2), texts, 0.1, 0.05, 0.01, 500.0, 0.6, 10.0, lowbit_hits=0, skipped_experts=77
    )
    shown = table(Price("m", ("a", "b"), 32, 1 << 20, 0.25, (found.exact, skipping), "lru", "2026-01-31"))
    assert shown.splitlines()[0].endswith("tok/s   skipped")
    assert [line.split()[-1] for line in shown.splitlines()[1:]] == ["0", "77"]
    assert "low-bit" not in shown
