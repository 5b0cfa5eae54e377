# SPDX-License-Identifier: MIT
"""What becomes of missing experts against numpy's rule, and bad values.

The reference is written from the paper (HOBBIT, arXiv 2411.01433): cumulative sums over sorted arrays.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgemoe import _native, on_miss
from edgemoe.cli.completion import miss_price
from edgemoe.cli.main import cli
from tests.unit.fakes import STATS

Ids = npt.NDArray[np.int32]
N_EXPERTS = 24
NO_EXPERT = -1


def rule(has_copies: bool, wait: float, copy: float = 1.0, n: int = N_EXPERTS) -> Any:
    return _native.OnMiss(has_copies, 2, n, wait, copy)


def select(native: Any, masses: Any, resident: Any, order: Any, k: int, are_logits: bool = False) -> Ids:
    ids = np.full(k, 99, np.int32)
    arrays = (np.asarray(masses, np.float32), np.asarray(resident, np.uint8), np.asarray(order, np.int32))
    native.select(0, *arrays, ids, are_logits)
    return ids


def papers(
    mass: npt.NDArray[np.float64], resident: Any, order: Any, k: int, has_copies: bool, wait: float, copy: float
) -> tuple[Ids, float]:
    """The paper's rule, and by how much of the mass the nearest threshold was missed."""
    chosen = np.asarray(order[:k])
    ranks = np.lexsort((np.arange(k), -mass[chosen]))
    share = np.empty(k)
    share[ranks] = np.concatenate([[0.0], np.cumsum(mass[chosen][ranks])[:-1]]) / mass[chosen].sum()
    missing = np.asarray(resident)[chosen] == 0
    copies = missing & (share > wait) & (share <= copy) if has_copies else np.zeros(k, bool)
    skipped = missing & (share > wait) & ~copies
    ids = np.where(skipped, NO_EXPERT, np.where(copies, N_EXPERTS + chosen, chosen)).astype(np.int32)
    margins = np.abs(np.concatenate([share[1:] - wait, share[1:] - copy])) if k > 1 else np.ones(1)
    return ids, float(margins.min())


CASE = st.tuples(
    st.booleans(),  # low-bit copies
    st.booleans(),  # masses are logits
    st.integers(1, 10),  # experts a token uses
    st.sampled_from([0.0, 0.3, 1.0, 5.0]),  # spread of the logits; 0: all equal
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)


@given(CASE)
@settings(max_examples=400)
def test_the_rule_is_the_papers(case: Any) -> None:
    """Guards against a rank by place instead of by weight, thresholds that are mixed up, ids of the wrong copy, and a
    price that is not that of what was left out."""
    has_copies, are_logits, k, spread, a, b, seed = case
    wait, copy = sorted((a, b))
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=N_EXPERTS) * spread).astype(np.float32)
    softmax = np.exp(logits - logits.max()).astype(np.float32)
    masses = logits if are_logits else softmax
    # Not by mass: a correction bias may choose otherwise.
    order, resident = rng.permutation(N_EXPERTS), rng.integers(0, 2, N_EXPERTS)
    mass = np.exp(logits.astype(np.float64)) if are_logits else softmax.astype(np.float64)
    expected, margin = papers(mass, resident, order, k, has_copies, wait, copy)
    assume(margin > 1e-6)
    native = rule(has_copies, wait, copy)
    ids = select(native, masses, resident, order, k, are_logits)
    assert ids.tolist() == expected.tolist()
    stats = native.stats()
    chosen = order[:k]
    dropped = mass[chosen[ids == NO_EXPERT]].sum() / mass[chosen].sum()
    assert (stats.n_selections, stats.n_chosen) == (1, k)
    assert stats.n_copies == (ids >= N_EXPERTS).sum()
    assert stats.n_skipped == (ids == NO_EXPERT).sum()
    assert stats.mass_moved == pytest.approx(dropped, abs=1e-6)
    assert stats.kl == pytest.approx(-math.log1p(-dropped), abs=1e-5)
    assert stats.mass_moved <= 1 - (copy if has_copies else wait) + 1e-6
    native.reset_stats()
    assert native.stats().n_selections == native.stats().mass_moved == 0


@given(CASE)
@settings(max_examples=200)
def test_one_is_exact_and_the_best_is_always_waited_for(case: Any) -> None:
    """Guards against sums whose rounding leaves out an expert at a threshold of 1, and a token without its best."""
    has_copies, are_logits, k, spread, a, _, seed = case
    rng = np.random.default_rng(seed)
    masses = (rng.random(N_EXPERTS) ** (10 * spread)).astype(np.float32)
    masses[rng.integers(0, 2, N_EXPERTS) == 1] *= 0 if spread == 5.0 else 1
    order, nobody = rng.permutation(N_EXPERTS), np.zeros(N_EXPERTS)
    assert select(rule(has_copies, 1.0), masses, nobody, order, k, are_logits).tolist() == order[:k].tolist()
    ids = select(rule(has_copies, 0.0, a), masses, nobody, order, k, are_logits)
    mass = np.exp(masses.astype(np.float64) - masses.max()) if are_logits else masses
    # Several may be the best: float64 does not tell exp of logits that are nearly equal apart.
    best = np.flatnonzero(mass[order[:k]] >= mass[order[:k]].max() * (1 - 1e-12))
    assert any(ids[i] == order[i] for i in best)
    everyone = np.ones(N_EXPERTS)
    assert select(rule(has_copies, 0.0, a), masses, everyone, order, k, are_logits).tolist() == order[:k].tolist()


def test_ties_and_one_dominant_expert() -> None:
    """Guards against experts of equal weight that are all left out, and a tail that is read and weighs nothing."""
    order, nobody = np.arange(N_EXPERTS), np.zeros(N_EXPERTS)
    equal = np.full(N_EXPERTS, 0.25)
    assert select(rule(False, 0.6), equal, nobody, order, 4).tolist() == [0, 1, 2, NO_EXPERT]
    assert select(rule(True, 0.3, 0.6), equal, nobody, order, 4).tolist() == [0, 1, N_EXPERTS + 2, NO_EXPERT]
    dominant = np.where(order == 3, 1.0, 1e-6)
    assert select(rule(False, 0.6), dominant, nobody, order, 4).tolist() == [NO_EXPERT, NO_EXPERT, NO_EXPERT, 3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_waited_for(value: float) -> None:
    """Guards against a broken router whose experts are left out because nothing compares with NaN."""
    order, nobody = np.arange(N_EXPERTS), np.zeros(N_EXPERTS)
    masses = np.full(N_EXPERTS, 0.25)
    for broken in ([0], [3], range(4)):
        masses[list(broken)] = value
        assert select(rule(False, 0.0), masses, nobody, order, 4).tolist() == [0, 1, 2, 3]
    zeros = np.zeros(N_EXPERTS)
    assert select(rule(False, 0.0), zeros, nobody, order, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"on_miss": "drop"}, "unknown on_miss 'drop': expected one of wait, lowbit, skip"),
        ({"on_miss": "skip", "on_miss_mass": math.nan}, "on_miss_mass is nan: expected a number from 0 to 1"),
        ({"on_miss": "skip", "on_miss_mass": -0.1}, "on_miss_mass is -0.1"),
        ({"on_miss": "wait", "on_miss_mass": 1.5}, "on_miss_mass is 1.5"),
        ({"on_miss": "skip", "on_miss_mass": None}, "on_miss_mass is None"),
        ({"on_miss": "skip", "on_miss_mass": True}, "on_miss_mass is True"),
        ({"on_miss": "lowbit"}, "needs the model's low-bit copy: expected lowbit, .* `edgemoe convert lowbit` made"),
        ({"on_miss": "skip", "lowbit": "x.gguf"}, "which does not use it: expected on_miss 'lowbit'"),
        ({"lowbit": "x.gguf"}, "lowbit is given with on_miss 'wait'"),
        ({"on_miss": "skip", "on_miss_skip_mass": 0.9}, "it is for 'lowbit'"),
        ({"on_miss": "lowbit", "lowbit": "x", "on_miss_skip_mass": 0.5}, "expected at least on_miss_mass, 0.6"),
        ({"on_miss": "lowbit", "lowbit": "x", "on_miss_skip_mass": math.nan}, "on_miss_skip_mass is nan"),
    ],
)
def test_bad_values_are_refused(keywords: dict[str, Any], message: str) -> None:
    """Guards against a setting that is silently clipped or ignored."""
    with pytest.raises(ValueError, match=message):
        on_miss.parse(**keywords)


def test_good_values_are_taken() -> None:
    """Guards against thresholds other than the paper's, and a second one that a high first one makes an error."""
    assert on_miss.parse() is None
    assert on_miss.parse("wait", 0.3) is None
    assert on_miss.parse("skip") == on_miss.Settings(0.6, 0.9, None)
    settings_ = on_miss.parse("lowbit", 0.95, None, "x.gguf")
    assert settings_ is not None and (settings_.mass, settings_.skip_mass) == (0.95, 0.95)


def test_the_core_refuses_what_python_lets_through() -> None:
    """Guards against native code that trusts its caller: other front ends use it, too."""
    for arguments in (
        (False, 0, 8, 0.5, 1.0),
        (False, 2, 0, 0.5, 1.0),
        (False, 2, 8, math.nan, 1.0),
        (False, 2, 8, 0.5, math.nan),
        (True, 2, 8, 0.5, 0.4),
        (True, 2, 8, -0.1, 0.4),
        (True, 2, 8, 0.5, 1.1),
    ):
        with pytest.raises(_native._core.CoreError, match="expected"):
            _native.OnMiss(*arguments)
    masses, order = np.ones(8, np.float32), np.arange(8, dtype=np.int32)
    here, ids = np.zeros(8, np.uint8), np.zeros(4, np.int32)
    native = rule(False, 0.5, n=8)
    native.select(0, masses, here, order, ids)
    for bad in (
        (2, masses, here, order, ids),
        (0, masses[:7], here, order, ids),
        (0, masses, here[:7], order, ids),
        (0, masses, here, order, np.zeros(9, np.int32)),
        (0, masses, here, order, np.zeros(0, np.int32)),
        (0, masses, here, order + 5, ids),
        (0, masses, here, order - 1, ids),
    ):
        with pytest.raises(_native._core.CoreError):
            native.select(*bad)


def test_the_footer_tells_the_price() -> None:
    """Guards against a loss that is not shown."""
    stats = dataclasses.replace(STATS, lowbit_hits=7, skipped_experts=3, gate_mass_moved=0.021, kl_estimate=0.0123)
    assert miss_price(stats) == "7 low-bit copies, 3 experts left out"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on-miss", "lowbit"], "needs the model's low-bit copy"),
        (["--on-miss", "skip", "--on-miss-mass", "nan"], "on_miss_mass is nan"),
        (["--on-miss", "skip", "--on-miss-mass", "1.5"], "1.5 is not in the range"),
        (["--lowbit", "x.gguf"], "does not use it"),
        (["--on-miss", "drop"], "'drop' is not one of"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str) -> None:
    """Guards against a traceback, and an error that comes after the model was loaded."""
    for command in ("plan", "generate"):
        done = CliRunner().invoke(cli, [command, "missing.gguf", *arguments])
        assert done.exit_code == 2
        assert message in " ".join(done.output.split())
