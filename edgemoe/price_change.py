# SPDX-License-Identifier: MIT
"""What a lossy lever does to a model's loss, with the confidence that several texts give it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

CONFIDENCE = 0.95
"""Of the intervals, and of the bound, which is one-sided."""
ADVISED_TEXTS = 5
"""With fewer, Student's t is so wide (12.7 with 2 texts, 2.8 with 5, 2.1 with 24) that an interval says little."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A lever against the exact model: the difference of cross-entropy in nats per token, its standard error over
    `n_texts` texts (None with one text), and what the two mean for perplexity (0.01 is 1 % more).

    Intervals and bounds are Student's with `n_texts` - 1 degrees of freedom, of the cross-entropy; perplexity's are
    their exponentials.
    """

    cross_entropy: float
    standard_error: float | None
    n_texts: int

    @property
    def perplexity(self) -> float:
        """Relative change of perplexity."""
        return math.expm1(self.cross_entropy)

    @property
    def perplexity_error(self) -> float | None:
        """Its standard error, to first order."""
        return None if self.standard_error is None else math.exp(self.cross_entropy) * self.standard_error

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the relative change of perplexity."""
        if self.standard_error is None:
            return None
        reach = student_t((1 + CONFIDENCE) / 2, self.n_texts - 1) * self.standard_error
        return math.expm1(self.cross_entropy - reach), math.expm1(self.cross_entropy + reach)

    @property
    def perplexity_bound(self) -> float | None:
        """What the relative change of perplexity stays below with 95 % confidence: a one-sided bound."""
        if self.standard_error is None:
            return None
        return math.expm1(self.cross_entropy + student_t(CONFIDENCE, self.n_texts - 1) * self.standard_error)


def paired(n_tokens: Sequence[int], exact: Sequence[float], found: Sequence[float]) -> Change:
    """The change from `exact` to `found`, nats per token of each text, paired text by text; `n_tokens` weigh them."""
    total = sum(n_tokens)
    weights = [n / total for n in n_tokens]
    differences = [f - e for f, e in zip(found, exact, strict=True)]
    mean = sum(w * d for w, d in zip(weights, differences, strict=True))
    n_texts = len(weights)
    if n_texts < 2:
        return Change(mean, None, n_texts)
    # Of a weighted mean; with texts of one length, the usual s / sqrt(n).
    squares = sum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True))
    return Change(mean, math.sqrt(squares * n_texts / (n_texts - 1)), n_texts)


def student_t(probability: float, n_degrees: int) -> float:
    """The quantile of Student's t distribution: t with P(T <= t) = `probability`, which is at least 0.5 and below 1.

    Found by bisection of the distribution's finite sums for whole `n_degrees` (Abramowitz and Stegun, Handbook of
    Mathematical Functions, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _share_within(middle, n_degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(n_degrees) * math.tan(high)


def _share_within(angle: float, n_degrees: int) -> float:
    """P(|T| <= sqrt(n_degrees) tan(angle))."""
    is_odd = n_degrees % 2
    square = math.cos(angle) ** 2
    total, term = 0.0, math.cos(angle) if is_odd else 1.0
    for power in range(is_odd, n_degrees - 1, 2):
        total += term
        term *= square * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
