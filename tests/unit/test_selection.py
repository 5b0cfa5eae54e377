# SPDX-License-Identifier: MIT
"""How many experts a token gets: the native rules against numpy's in float64, what may be asked for, and bad values."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgemoe import _native, choosers, expert_count
from edgemoe.choosers import Keywords
from edgemoe.cli.completion import reuse_price
from edgemoe.expert_count import Settings

OF_LAYER, TOP_P, MAP = 0, 1, 2
Floats = npt.NDArray[np.float32]


def count_of(rule: int, value: Any = None, n: int = 64, n_layers: int = 4) -> Any:
    """A rule with its one parameter: numbers of layers, a share, or bounds."""
    of_layer = value if rule == OF_LAYER else []
    n_min, n_max = value if rule == MAP else (0, 0)
    return _native.ExpertCount(rule, n_layers, n, of_layer, value if rule == TOP_P else 0.0, n_min, n_max)


def select(native: Any, masses: Floats, k: int, layer: int = 0, **options: Any) -> int:
    order = np.argsort(-masses, kind="stable").astype(np.int32)
    return int(native.select(layer, k, masses, masses, order, **options))


def masses_of(logits: Floats) -> npt.NDArray[np.float64]:
    exp = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(exp / exp.sum())


CASE = st.tuples(
    st.sampled_from([4, 8, 36, 64]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)


@given(CASE, st.floats(0, 1))
@settings(max_examples=300)
def test_top_p_is_numpys(case: Any, p: float) -> None:
    """Guards against another share than that of the model's own choice, for masses and for logits, and ties that drop
    an expert that is needed."""
    n, k, spread, are_logits, seed = case
    logits = (np.random.default_rng(seed).normal(size=n) * spread).astype(np.float32)
    given_masses = logits if are_logits else masses_of(logits).astype(np.float32)
    native = count_of(TOP_P, p)
    found = select(native, given_masses, k, are_logits=are_logits)
    mass = np.sort(masses_of(logits) if are_logits else given_masses.astype(np.float64))[::-1][:k]
    shares = np.cumsum(mass) / mass.sum()
    assume(p in (0.0, 1.0) or np.abs(shares - p).min() > 1e-9)  # nearer than that rounding decides
    expected = k if p == 1.0 else int(np.argmax(shares >= p)) + 1
    assert found == expected
    stats = native.stats()
    assert (stats.n_selections, stats.n_chosen, stats.n_dropped) == (1, k, k - expected)
    assert stats.mass_moved == pytest.approx(1 - shares[expected - 1], abs=1e-6)
    assert stats.kl == pytest.approx(-math.log(shares[expected - 1]), abs=1e-6)


@given(CASE, st.integers(1, 4), st.integers(0, 4))
@settings(max_examples=300)
def test_map_counts_positive_logits(case: Any, n_min: int, more: int) -> None:
    """Guards against a count of the chosen only, of masses instead of logits, and bounds that do not hold."""
    n, k, spread, _, seed = case
    logits = (np.random.default_rng(seed).normal(size=n) * spread - 1.0).astype(np.float32)
    n_max = min(n_min + more, n)
    found = select(count_of(MAP, (n_min, n_max)), masses_of(logits).astype(np.float32), k, logits=logits)
    assert found == min(int(np.clip((logits > 0).sum(), n_min, n_max)), k)


def test_numbers_of_layers() -> None:
    """Guards against another layer's number, more experts than the model chose, and 0 taken for none."""
    native = count_of(OF_LAYER, [1, 3, 0, 9])
    masses = np.linspace(1, 0.1, 8, dtype=np.float32)
    assert [select(native, masses, 4, layer) for layer in range(4)] == [1, 3, 4, 4]
    stats = native.stats()
    assert (stats.n_selections, stats.n_chosen, stats.n_dropped) == (4, 16, 4)
    lost = masses[1:4].sum() / masses[:4].sum(), masses[3] / masses[:4].sum()
    assert stats.mass_moved == pytest.approx(sum(lost), rel=1e-6)
    assert stats.kl == pytest.approx(-sum(math.log(1 - x) for x in lost), rel=1e-6)
    native.reset_stats()
    assert native.stats().n_selections == 0


def test_experts_of_equal_mass_are_as_many_as_the_share_needs() -> None:
    """Guards against sums of equal masses that stop one too late."""
    masses = np.full(8, 0.125, np.float32)
    assert [select(count_of(TOP_P, p), masses, 4) for p in (0.0, 0.25, 0.26, 0.5, 0.75, 0.76, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        4,
        4,
    ]


@pytest.mark.parametrize(("value", "expected"), [(math.nan, 4), (math.inf, 1), (0.0, 1)])
def test_masses_that_are_no_numbers(value: float, expected: int) -> None:
    """Guards against experts left out by a comparison with what is no number, and against a price that is none."""
    native = count_of(TOP_P, 0.5)
    masses = np.full(8, value, np.float32)
    order = np.arange(8, dtype=np.int32)
    assert native.select(0, 4, masses, masses, order) == expected
    stats = native.stats()
    assert 0 <= stats.mass_moved <= 1
    assert stats.kl == 0
    fixed = count_of(OF_LAYER, [2] * 4)
    assert fixed.select(0, 4, masses, masses, order) == 2
    assert fixed.stats().mass_moved == 0.5  # what is no number counts by heads
    assert math.isfinite(fixed.stats().kl)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4, 8, [], 0.5, 0, 0), "rule 3"),
        ((-1, 4, 8, [], 0.5, 0, 0), "rule -1"),
        ((OF_LAYER, 4, 8, [1, 2], 0.0, 0, 0), "one for each layer"),
        ((OF_LAYER, 4, 8, [], 0.0, 0, 0), "no numbers of experts"),
        ((OF_LAYER, 2, 8, [1, 9], 0.0, 0, 0), "9 experts for a token in layer 1"),
        ((OF_LAYER, 2, 8, [-1, 2], 0.0, 0, 0), "-1 experts for a token in layer 0"),
        ((OF_LAYER, 0, 8, [], 0.0, 0, 0), "0 layers"),
        ((TOP_P, 4, 8, [], 1.5, 0, 0), "top-p 1.5"),
        ((TOP_P, 4, 8, [], math.nan, 0, 0), "top-p nan"),
        ((MAP, 4, 8, [], 0.0, 0, 3), "0 to 3 experts"),
        ((MAP, 4, 8, [], 0.0, 3, 2), "3 to 2 experts"),
        ((MAP, 4, 8, [], 0.0, 1, 9), "1 to 9 experts"),
    ],
)
def test_rules_that_make_no_sense_are_refused(arguments: Any, message: str) -> None:
    """Guards against a rule that silently is another one."""
    with pytest.raises(RuntimeError, match=message):
        _native.ExpertCount(*arguments)


def test_selections_that_do_not_fit_are_refused() -> None:
    """Guards against reads beyond the arrays, and a count of logits that nobody has."""
    masses = np.ones(8, np.float32)
    native = count_of(OF_LAYER, [2] * 4, n=8)
    for layer, k, n in ((4, 2, 8), (-1, 2, 8), (0, 0, 8), (0, 9, 8), (0, 2, 16)):
        with pytest.raises(RuntimeError, match="selection of"):
            select(native, np.ones(n, np.float32), k, layer)
    with pytest.raises(RuntimeError, match="different lengths"):
        native.select(0, 2, masses, masses, np.arange(4, dtype=np.int32))
    with pytest.raises(RuntimeError, match="different lengths"):
        native.select(0, 2, masses, masses, np.arange(8, dtype=np.int32), logits=masses[:4])
    with pytest.raises(RuntimeError, match="no logits of layer 0"):
        select(count_of(MAP, (1, 4), n=8), masses, 2)
    assert native.stats().n_selections == 0


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("off", None),
        (3, Settings("number", 3)),
        ("3", Settings("number", 3)),
        ("top-p:0.9", Settings("top-p", 0.9)),
        ("top-p:1", Settings("top-p", 1.0)),
        ("map", Settings("map", n_min=1, n_max=0)),
        ("map:2-4", Settings("map", n_min=2, n_max=4)),
        ("lexi:2.5", Settings("lexi", 2.5)),
        ("lexi:2.5@a@b.json", Settings("lexi", 2.5, path=expert_count.Path("a@b.json"))),
    ],
)
def test_what_may_be_asked_for(asked: Any, expected: Settings | None) -> None:
    """Guards against forms that are read as others."""
    assert expert_count.parse(asked) == expected


WRONG = (
    "0 -1 2.5 nan on top-p top-p: top-p:0 top-p:1.1 top-p:nan map: map:0-2 map:3-2 map:2 map:1-2-3 lexi lexi: lexi:0.5"
)


@pytest.mark.parametrize("asked", [*WRONG.split(), "lexi:inf", "lexi:2@", "3 experts", "", True, 2.0, None])
def test_what_makes_no_sense_is_refused(asked: Any) -> None:
    """Guards against a typing error that switches the lever off, or to something else."""
    with pytest.raises(ValueError, match="expected off, a number"):
        expert_count.parse(asked)


def test_the_price_names_what_is_on() -> None:
    """Guards against a footer that talks of a bias which is off."""
    shares = {"selections_changed": 0.25, "gate_mass_moved": 0.081, "kl_estimate": 0.085}
    assert reuse_price(SimpleNamespace(reuse_bias=0.0, reuse_price_target=None, **shares)) == (  # type: ignore[arg-type]
        "25.0% of experts changed, 8.1% of their weight, KL 0.085"
    )


def test_a_price_is_that_of_a_bias_alone() -> None:
    """Guards against a promise that was measured without what else is on."""
    with pytest.raises(ValueError, match=r"reuse_bias 'auto' and expert_top_k 'top-p:0.9' exclude each other"):
        choosers.parse(Keywords(reuse_price="1%", expert_top_k="top-p:0.9"))
    assert choosers.parse(Keywords(reuse_bias=0.1, expert_top_k="top-p:0.9")).count is not None
    assert choosers.parse(Keywords(reuse_price="1%")).bias.price == 0.01
