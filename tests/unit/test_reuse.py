# SPDX-License-Identifier: MIT
"""The arithmetic of reuse-biased routing against numpy's, its guard against routers made to defeat it, and bad values.

The reference is written from the paper (arXiv 2412.00099) in log space, over whole arrays; ours merges ordered lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgemoe import _native, reuse
from edgemoe.cli.completion import reuse_price
from tests.unit.fakes import END, STATS, FakeLlama, run

Floats = npt.NDArray[np.float32]
FREE = 1e9  # a bound that binds nothing
KINDS = ("softmax", "logits", "sigmoid", "groups", "softmax-groups", "softmax-bias")
TINY = float(np.finfo(np.float32).tiny)


class Router:
    """One token's scores and masses as llama.cpp's graph has them for a kind of router."""

    def __init__(self, kind: str, logits: Floats, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        n = len(logits)
        softmax = np.exp(logits - logits.max()).astype(np.float32)
        softmax /= softmax.sum()
        sigmoid = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
        bias = rng.normal(size=n).astype(np.float32) * np.float32(0.05)
        self.masses = {"logits": logits, "sigmoid": sigmoid, "groups": sigmoid}.get(kind, softmax)
        self.scores = self.masses + bias if kind in ("sigmoid", "groups", "softmax-bias") else self.masses.copy()
        if kind.endswith("groups"):
            self.scores[rng.permutation(4)[:2][:, None] * (n // 4) + np.arange(n // 4)] = -np.inf
        self.is_log = kind in ("softmax", "softmax-groups")
        self.are_logits = kind == "logits"
        self.order = np.argsort(-self.scores, kind="stable").astype(np.int32)
        self.eligible = self.order[np.isfinite(self.scores[self.order])]
        self.z = self.scores.astype(np.float64)
        if self.is_log:
            self.z = np.log(np.maximum(self.z, TINY))
        mass = self.masses.astype(np.float64)
        self.mass = np.exp(mass - mass[self.eligible].max()) if self.are_logits else mass

    @property
    def range(self) -> float:
        return float(self.z[self.eligible].max() - self.z[self.eligible].min())

    def choose(
        self,
        method: str,
        k: int,
        top_j: int,
        strength: float,
        mean_range: float,
        resident: Any,
        is_clear: Callable[[bool], Any] = bool,
    ) -> set[int]:
        """The paper's rule; `is_clear` is told whether it is decided by more than rounding."""
        kept, rest = self.eligible[:top_j], self.eligible[top_j:]
        if method == "cache-prior":
            biased = self.z[rest] + strength * mean_range * resident[rest]
            gaps = np.diff(np.sort(biased))
            is_clear(bool(strength == 0 or len(gaps) == 0 or gaps.min() > 1e-9))
            ranked = rest[np.argsort(-biased, kind="stable")]
        else:
            if method == "max-rank":
                n = k + int(strength * (len(self.eligible) - k))
            else:
                reached = np.cumsum(self.mass[self.eligible])
                margin = np.abs(reached - strength * reached[-1]).min()
                is_clear(bool(strength < 1 and margin > 1e-9 * reached[-1]))
                n = max(k, int(np.argmax(reached >= strength * reached[-1])) + 1) if strength > 0 else k
            candidates = self.eligible[top_j:n]
            ranked = candidates[np.argsort(resident[candidates] == 0, kind="stable")]
        return {*kept.tolist(), *ranked[: k - top_j].tolist()}


def biased(
    method: str, strength: float, top_j: int = 1, bounds: tuple[float, float] = (FREE, FREE), n: int = 64
) -> Any:
    return _native.ReuseBias(reuse.METHODS[method], 4, n, top_j, strength, *bounds)


def select(native: Any, router: Router, k: int, resident: Any, layer: int = 0) -> npt.NDArray[np.int32]:
    order = router.order.copy()
    resident = np.asarray(resident, np.uint8)
    native.select(layer, k, router.scores, router.masses, resident, order, router.is_log, router.are_logits)
    return order


CASE = st.tuples(
    st.sampled_from(list(reuse.METHODS)),
    st.sampled_from(KINDS),
    st.sampled_from([8, 16, 32, 64]),
    st.integers(1, 4),
    st.sampled_from([0.01, 0.3, 1.0, 3.0, 40.0]),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)


def made(case: Any) -> tuple[str, Router, int, int, float, Any]:
    method, kind, n, k, spread, strength, seed = case
    rng = np.random.default_rng(seed)
    router = Router(kind, (rng.normal(size=n) * spread).astype(np.float32), seed)
    return method, router, k, int(rng.integers(1, k + 1)), strength, rng.integers(0, 2, n)


@given(CASE)
@settings(max_examples=400)
def test_choice_is_the_papers(case: Any) -> None:
    """Guards against a wrong score space, a forgotten top-J, a masked group that is chosen, an order that is no
    permutation, and prices that are not those of the change."""
    method, router, k, top_j, strength, resident = made(case)
    expected = router.choose(method, k, top_j, strength, router.range, resident, assume)
    native = biased(method, strength, top_j)
    order = select(native, router, k, resident)
    chosen, exact = order[:k].tolist(), router.eligible[:k].tolist()
    if len(router.eligible) <= k:
        assert order.tolist() == router.order.tolist()
        return
    assert set(chosen) == expected
    place = {e: i for i, e in enumerate(router.order.tolist())}
    assert sorted(order.tolist()) == list(range(len(order)))
    assert [place[e] for e in chosen] == sorted(place[e] for e in chosen)
    assert chosen[:top_j] == exact[:top_j]
    stats = native.stats()
    dropped = set(exact) - expected
    assert stats.n_changed == len(dropped)
    mass = router.mass[exact].sum()
    if mass == 0:  # a router that weighs nothing: experts are counted
        assert stats.mass_moved == len(dropped) / k
        return
    assert stats.mass_moved == pytest.approx(router.mass[list(dropped)].sum() / mass, abs=1e-9)
    kl = max(0.0, math.log(mass / max(router.mass[chosen].sum(), mass * TINY)))
    assert stats.kl == pytest.approx(kl, rel=1e-6, abs=1e-9)


@given(CASE)
@settings(max_examples=200)
def test_more_bias_never_means_fewer_residents(case: Any) -> None:
    """Guards against a bias that works backwards; 0 is exact, and so is a cache that holds everything or nothing."""
    method, router, k, top_j, strength, resident = made(case)
    n_resident = [
        int(resident[select(biased(method, s, top_j), router, k, resident)[:k]].sum())
        for s in (0.0, strength / 2, strength)
    ]
    assert n_resident == sorted(n_resident)
    for bias, here in ((0.0, resident), (strength, resident * 0), (strength, resident * 0 + 1)):
        assert np.array_equal(select(biased(method, bias, top_j), router, k, here), router.order)


def test_advantage_follows_the_mean_range_of_the_layer() -> None:
    """Guards against a range of one token only, of another layer, or of experts that are masked out."""
    rng = np.random.default_rng(3)
    native = biased("cache-prior", 0.2)
    ranges: list[float] = []
    for step in range(40):
        router = Router("softmax-groups", (rng.normal(size=32) * (1 + step / 10)).astype(np.float32), step)
        resident = rng.integers(0, 2, 32)
        ranges.append(router.range)
        order = select(native, router, 4, resident)
        assert set(order[:4].tolist()) == router.choose("cache-prior", 4, 1, 0.2, float(np.mean(ranges)), resident)
        select(native, Router("logits", (rng.normal(size=32) * 50).astype(np.float32)), 4, resident, layer=1)


def adversaries(n_steps: int) -> Iterator[tuple[str, list[tuple[Router, Any]]]]:
    """Routers to which every swap costs, with the worst experts resident."""
    for name, make in {
        "near-uniform": lambda rng: rng.normal(size=64) * 1e-3,
        "one dominant": lambda rng: np.where(np.arange(64) == rng.integers(64), 12.0, rng.normal(size=64) * 0.1),
        "k equal, the rest nothing": lambda rng: np.where(rng.permutation(64) < 8, 10.0, -10.0) + rng.normal(size=64),
        "quiet, then near-uniform": None,
    }.items():
        rng = np.random.default_rng(11)
        steps = []
        for step in range(n_steps):
            quiet = make is None and step < n_steps // 2
            logits = rng.normal(size=64) if quiet or make is None else make(rng)
            router = Router("softmax", logits.astype(np.float32))
            resident = np.zeros(64, np.uint8)
            resident[router.order[:8] if quiet else router.order[-16:]] = 1
            steps.append((router, resident))
        yield name, steps


@pytest.mark.parametrize("method", reuse.METHODS)
def test_the_guard_is_never_passed(method: str) -> None:
    """Guards against a bound that holds on average only, or that a quiet time makes void: from the start and at any
    moment, and in any stretch by at most 16 selections' worth more."""
    for name, steps in adversaries(300):
        for bounds in ((0.05, FREE), (FREE, 0.02), (0.2, 0.1)):
            native, free = biased(method, 1.0, 2, bounds), biased(method, 1.0, 2)
            sums, least = [(0.0, 0.0)], 1.0
            for i, (router, resident) in enumerate(steps, 1):
                select(native, router, 8, resident)
                select(free, router, 8, resident)
                stats = native.stats()
                sums.append((stats.mass_moved, stats.kl))
                least = min(least, stats.mean_strength)
                assert stats.mass_moved <= i * bounds[0] + 1e-9, name
                assert stats.kl <= i * bounds[1] + 1e-9, name
            for column, bound in enumerate(bounds):
                spent = np.array([s[column] for s in sums])
                for length in (1, 5, 50):
                    assert (spent[length:] - spent[:-length]).max() <= (length + 16) * bound + 1e-9, name
            if name != "one dominant" and bounds[0] != FREE:
                # The same router without a guard passes the bound.
                assert free.stats().mass_moved > len(steps) * bounds[0]
                assert least < 1.0


def test_the_guard_lets_go() -> None:
    """Guards against a strength that never comes back, and against choices that depend on anything but the inputs."""
    orders = []
    for _ in range(2):
        native = biased("cache-prior", 1.0, 1, (0.05, FREE))
        rng = np.random.default_rng(5)
        steps = [Router("softmax", rng.normal(size=64).astype(np.float32) * np.float32(0.1)) for _ in range(400)]
        found = []
        for i, router in enumerate(steps):
            resident = np.ones(64, np.uint8)
            resident[router.order[:8]] = i >= 200  # later nothing has to be changed
            found.append(select(native, router, 8, resident))
            if i == 199:
                # Only layer 0 has selected.
                assert native.stats().mean_strength < 0.5
        assert native.stats().mean_strength == 1.0
        orders.append(np.array(found))
    assert np.array_equal(*orders)


@pytest.mark.parametrize("method", reuse.METHODS)
def test_hit_rate_rises_with_the_bias_on_a_fixed_trace(method: str) -> None:
    """Guards against a bias that trades this token's hit for the next one's miss: scores stay, choices feed a cache."""
    rng = np.random.default_rng(2)
    logits = [rng.normal(size=64)]
    for _ in range(400):
        logits.append(0.5 * logits[-1] + math.sqrt(0.75) * rng.normal(size=64))
    routers = [Router("softmax", x.astype(np.float32)) for x in logits]
    rates = []
    for strength in (0.0, 0.1, 0.25, 0.5):
        native, last, n_hits = biased(method, strength, 2), np.full(64, -1), 0
        for step, router in enumerate(routers):
            resident = np.zeros(64, np.uint8)
            resident[[e for e in np.argsort(-last)[:16] if last[e] >= 0]] = 1
            chosen = select(native, router, 8, resident)[:8]
            n_hits += int(resident[chosen].sum())
            last[chosen] = step
        rates.append(n_hits / (8 * len(routers)))
    assert rates == sorted(rates)
    assert rates[-1] > rates[0] + 0.1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"reuse_bias": -0.1}, "reuse_bias is -0.1: expected off or a number from 0"),
        ({"reuse_bias": math.nan}, "reuse_bias is nan"),
        ({"reuse_bias": 1.5}, "reuse_bias is 1.5"),
        ({"reuse_bias": "high"}, "reuse_bias is 'high'"),
        ({"reuse_bias": True}, "reuse_bias is True"),
        ({"reuse_bias": None}, "reuse_bias is None"),
        ({"reuse_bias": "auto"}, "reuse_bias is 'auto'"),  # by itself; `price_curve.parse` knows it
        ({"reuse_bias": 0.5, "reuse_method": "remoe"}, "expected one of cache-prior, max-rank, cumulative"),
        ({"reuse_bias": "off", "reuse_method": "remoe"}, "unknown reuse_method"),
        ({"reuse_bias": 0.5, "top_j": 0}, "top_j is 0: expected a whole number of at least 1"),
        ({"reuse_bias": 0.5, "top_j": 1.5}, "top_j is 1.5"),
    ],
)
def test_bad_values_are_refused(keywords: dict[str, Any], message: str) -> None:
    """Guards against a bias that is silently clipped, ignored, or promised without a measurement."""
    with pytest.raises(ValueError, match=message):
        reuse.parse(**keywords)


def test_the_core_refuses_what_python_lets_through() -> None:
    """Guards against native code that trusts its caller: other front ends use it, too."""
    for arguments in (
        (3, 4, 8, 1, 0.5, 1, 1),
        (0, 0, 8, 1, 0.5, 1, 1),
        (0, 4, 8, 0, 0.5, 1, 1),
        (0, 4, 8, 1, math.nan, 1, 1),
        (0, 4, 8, 1, 0.5, -1, 1),
        (0, 4, 8, 1, 0.5, 1, math.nan),
    ):
        with pytest.raises(_native._core.CoreError, match="expected"):
            _native.ReuseBias(*arguments)
    native = biased("cache-prior", 0.5, n=8)
    router = Router("softmax", np.arange(8, dtype=np.float32))
    good = (0, 2, router.scores, router.masses, np.ones(8, np.uint8))
    for arguments, order in (
        (good, np.zeros(8, np.int32)),
        (good, np.arange(1, 9, dtype=np.int32)),
        ((4, *good[1:]), router.order.copy()),
        ((0, 9, *good[2:]), router.order.copy()),
        (good, np.arange(7, dtype=np.int32)),
    ):
        with pytest.raises(_native._core.CoreError):
            native.select(*arguments, order)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_not_free(value: float) -> None:
    """Guards against a broken router whose NaN make a choice look as if it cost nothing, or make one at all."""
    resident = np.array([1] * 8 + [0] * 8)
    broken = Router("softmax", np.arange(16, dtype=np.float32))
    broken.scores[:] = value
    assert np.array_equal(select(biased("cache-prior", 1.0), broken, 4, resident), broken.order)
    broken = Router("softmax", np.arange(16, dtype=np.float32))
    broken.masses[:] = value
    native = biased("cache-prior", 1.0, 1, (0.2, 1.0))
    assert np.array_equal(select(native, broken, 4, resident), broken.order)  # one of 4 experts is over the bound
    native = biased("cache-prior", 1.0)
    assert select(native, broken, 4, resident)[:4].tolist() == [15, 7, 6, 5]
    assert native.stats().mass_moved == 0.75


def test_top_j_leaves_something_to_choose() -> None:
    """Guards against a default that keeps both experts of a top-2 model, which would bias nothing."""
    assert reuse.default_top_j(8, 2) == 1
    assert reuse.default_top_j(64, 8) == 2
    assert reuse.default_top_j(16, 2) == 1
    assert reuse.default_top_j(16, 1) == 1


def test_command_line_takes_and_refuses_a_bias(llama: type[FakeLlama], model: str) -> None:
    """Guards against options that the model is not loaded with, and errors that only a traceback explains."""
    llama.answers = [[*b"ok", END]]
    result = run("generate", model, "-p", "x", "--reuse-bias", "0.3", "--reuse-method", "max-rank", "--top-j", "2")
    assert result.exit_code == 0, result.output
    assert llama.options["reuse_bias"] == "0.3"
    assert (llama.options["reuse_method"], llama.options["top_j"]) == ("max-rank", 2)
    for options in (("--reuse-price", "1%"), ("--reuse-bias", "auto", "--reuse-price", "0.01")):
        llama.answers = [[*b"ok", END]]
        assert run("generate", model, "-p", "x", *options).exit_code == 0
        assert llama.options["reuse_price"] == 0.01
    llama.answers = [[*b"ok", END]]
    assert run("generate", model, "-p", "x", "--reuse-bias", "auto").exit_code == 0
    assert (llama.options["reuse_bias"], llama.options["reuse_price"]) == ("auto", None)
    for options, message in (
        (("--reuse-price", "1"), "expected more than 0 and less than 100 %"),
        (("--reuse-price", "cheap"), "expected more than 0 and less than 100 %"),
        (("--reuse-price", "1%", "--reuse-bias", "0.1"), "it excludes --reuse-bias 0.1"),
        (("--reuse-price", "1%", "--expert-top-k", "3"), "exclude each other"),
        (("--reuse-bias", "off", "--reuse-price", "1%"), "it excludes --reuse-bias off"),
        (("--reuse-bias", "-1"), "expected off or a number from 0"),
        (("--reuse-bias", "nan"), "expected off or a number from 0"),
        (("--reuse-bias", "0.5", "--top-j", "0"), "0 is not in the range"),
        (("--reuse-method", "remoe"), "'remoe' is not one of"),
    ):
        for command in (("generate", model, "-p", "x"), ("chat", model), ("bench", model), ("plan", model)):
            failed = run(*command, *options)
            assert failed.exit_code == 2, (command, options)
            assert message in " ".join(failed.output.replace("│", " ").split()), failed.output


def test_price_is_named_in_full() -> None:
    """Guards against a footer that shows the gain and leaves out what it cost."""
    import dataclasses

    stats = dataclasses.replace(
        STATS, reuse_bias=0.31, selections_changed=0.125, gate_mass_moved=0.081, kl_estimate=0.0123
    )
    running = "reuse bias 0.31 now: 12.5% of experts changed, 8.1% of their weight, KL 0.012"
    assert reuse_price(stats) == running
    auto = dataclasses.replace(stats, reuse_price_target=0.01, reuse_price_expected=0.0028)
    assert reuse_price(auto) == f"{running}; expected +0.28%, allowed 1.00% of perplexity"
    off = dataclasses.replace(STATS, reuse_price_target=0.001)
    assert reuse_price(off) == "reuse bias off: none is known to cost at most 0.10% of perplexity"
