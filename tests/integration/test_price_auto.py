# SPDX-License-Identifier: MIT
"""From a measured price to a bias: `edgemoe price`, then `reuse_price`, on the tiny trained model."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

import edgemoe
from edgemoe import price_curve
from edgemoe.errors import PriceError
from edgemoe.formats.gguf import read_model
from edgemoe.price_curve import Curve, Point
from tests.integration.support import streamed
from tests.unit.fakes import error_lines, run

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "tiny_moe.gguf"
TEXTS = sorted(map(str, (DATA / "tiny_moe").glob("*-[12].txt")))
# All experts take 10 MiB of slots, one token's 1.2: half of them fit, with 4 MiB to spare for what a process takes.
ROOM_BYTES = 4 << 20
# A budget counts the whole process, and the tests before these leave up to 0.9 GiB in it (torch, mostly).
ROOMY = 4 << 30
OPTIONS = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
GENERATE = ("generate", str(MODEL), "-p", "The king", "-n", "12", "--threads", "1", "--ctx", "256")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, as XDG names it."""
    monkeypatch.delenv("EDGEMOE_WARM_DIR")
    monkeypatch.delenv("EDGEMOE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgemoe" / "warm"


def _remember(costs: dict[float, float], *, share: float = 0.1, n_texts: int = 6, **changes: Any) -> None:
    """A made-up measurement whose costs are nearly certain."""
    exact = tuple(2.0 + 0.1 * i for i in range(n_texts))
    points = tuple(
        Point(s, tuple(e + cost + 1e-6 * (-1) ** i for i, e in enumerate(exact)), 1.0) for s, cost in costs.items()
    )
    fields = {"method": "cache-prior", "top_j": 2, "eviction": "auto", "measured_at": "2026-01-31T00:00:00"}
    curve = Curve(
        **{**fields, **changes},
        resident_share=share,
        n_tokens=(100,) * n_texts,
        cross_entropies=exact,
        bytes_per_token=2.0,
        points=points,
    )
    price_curve.remember(read_model(MODEL), [curve])


def test_measured_remembered_chosen_and_said(cache: Path) -> None:
    """Guards against a curve that is not found again, and a bias that nobody is told of."""
    nothing = run(*GENERATE, "--reuse-price", "1%")
    assert nothing.exit_code == 1
    (line,) = error_lines(nothing)
    assert (
        f"found no measurement of this model with cache-prior, top-j 2; run: edgemoe price {MODEL} --experts 1" in line
    )
    measure = (
        "price",
        str(MODEL),
        "--experts",
        "0.25",
        "--tokens",
        "100",
        "--threads",
        "1",
        "--reuse-bias",
        "0.05,0.1",
    )
    measured = run(*measure, "--text", *TEXTS)
    assert measured.exit_code == 0, measured.stderr
    assert "remembered for --reuse-price: 2 reuse biases, cache-prior, top-j 2, 25% of the experts" in measured.stderr
    assert [path.suffix for path in cache.iterdir()] == [".price"]
    # So few tokens give wide bounds: half of the perplexity is a price that a bias of 0.1 surely keeps.
    result = run(*GENERATE, "--reuse-price", "50%")
    assert result.exit_code == 0, result.stderr
    (said,) = [line for line in result.stderr.splitlines() if "reuse bias auto" in line]
    assert said.startswith("edgemoe: reuse bias auto: 0.1 (cache-prior, top-j 2) for at most 50% of perplexity: ")
    assert "on 8 texts with 25% of the experts in memory" in said
    assert "allowed 50.00% of perplexity" in result.stderr.splitlines()[-1]
    stats = json.loads(run(*GENERATE, "--reuse-bias", "auto", "--reuse-price", "0.5", "--json").stdout)
    assert stats["reuse_price_target"] == 0.5
    assert 0 < stats["reuse_bias"] <= 0.1
    (curve,) = price_curve.load(read_model(MODEL))
    assert stats["reuse_price_expected"] == curve.change(curve.points[1]).perplexity


def test_auto_biases_as_the_number_that_it_chooses(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a choice that is announced and not made, or made with another method."""
    _remember({0.05: 0.001, 0.2: 0.004, 0.5: 0.5}, method="max-rank", top_j=1)
    caplog.set_level(logging.INFO)
    with streamed(MODEL, reuse_bias="auto", reuse_method="max-rank", top_j=1, prefetch="off", **OPTIONS) as llm:
        assert llm.reuse_choice is not None and llm.reuse_choice.settings is not None
        assert (llm.reuse_choice.settings.strength, llm.reuse_choice.target) == (0.2, 0.01)
        assert caplog.text.count(llm.reuse_choice.text) == 1
        llm.eval([1, 2, 3])
        llm.eval([4])
        stats = llm.stats()
        assert (stats.reuse_price_target, stats.reuse_price_expected) == (0.01, llm.reuse_choice.expected)
        assert 0 < stats.reuse_bias <= 0.2
        state = llm.__getstate__()
        assert (state["reuse_bias"], state["reuse_price"]) == ("auto", None)
        pickle.dumps((state["reuse_bias"], state["reuse_price"]))
    with streamed(MODEL, reuse_bias=0.2, **OPTIONS) as llm:
        assert llm.reuse_choice is None
        assert llm.stats().reuse_price_target is None


def test_a_price_that_cannot_be_met_is_exact_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a bias that is on although the price forbids it, and against silence about that."""
    _remember({0.05: 0.02})
    with streamed(MODEL, reuse_price="1%", **OPTIONS) as llm:
        assert llm.reuse_choice is not None and llm.reuse_choice.settings is None
        (record,) = [r for r in caplog.records if "reuse bias auto: off" in r.getMessage()]
        assert record.levelno == logging.WARNING
        llm.eval([1, 2, 3])
        llm.eval([4])
        stats = llm.stats()
        assert (stats.reuse_bias, stats.reuse_price_target, stats.reuse_price_expected) == (0.0, 0.01, None)
    result = run(*GENERATE, "--reuse-price", "1%")
    assert result.exit_code == 0
    assert "reuse bias off: none is known to cost at most 1.00% of perplexity" in result.stderr.splitlines()[-1]


def test_a_measurement_with_more_memory_is_refused_before_loading() -> None:
    """Guards against the price of much memory promised to little, and a refusal that comes after a long load."""
    _remember({0.1: 0.001}, share=0.9)
    stages = []
    small = [edgemoe.plan(MODEL, memory=ROOMY, **OPTIONS).floor_bytes + ROOM_BYTES for _ in range(2)][1]
    with pytest.raises(
        PriceError, match=r"found measurements with 90% .*run: edgemoe price .* --experts 0\.\d+ --text"
    ):
        edgemoe.Llama(MODEL, memory=small, reuse_price=0.01, progress=lambda stage, *_: stages.append(stage), **OPTIONS)
    assert stages == ["planning"]


def test_a_smaller_budget_chooses_again(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against the bias of a large budget that stays when the budget shrinks."""
    _remember({0.3: 0.001}, share=0.9)
    with streamed(MODEL, memory=ROOMY, reuse_price=0.01, **OPTIONS) as llm:
        assert llm.reuse_choice is not None and llm.reuse_choice.settings is not None
        before = llm._choosers.selection
        llm.set_memory(ROOMY - (100 << 20))
        assert llm._choosers.selection is before  # with what its guard has learned
        low = llm.plan.floor_bytes + ROOM_BYTES
        llm.set_memory(low)
        assert price_curve.resident_share(llm._gguf, llm.plan.slots_bytes) < 0.85
        assert llm.reuse_choice.settings is None and llm._choosers.selection is None
        assert "off from now on; cannot choose a reuse bias by its price" in caplog.text
        llm.eval([1, 2, 3])
        llm.eval([4])
        assert llm.stats().selections_changed == 0
        _remember({0.1: 0.001}, share=0.05)
        llm.set_memory(low + 4096)
        assert llm.reuse_choice.settings is not None and llm.reuse_choice.settings.strength == 0.1
        llm.eval([5])
        assert 0 < llm.stats().reuse_bias <= 0.1


def test_plans_take_a_price_and_look_nothing_up() -> None:
    """Guards against a plan that cannot be made before the measurement that it says the share for."""
    assert edgemoe.plan(MODEL, reuse_price="1%", **OPTIONS).fits
    assert run("plan", str(MODEL), "--reuse-price", "1%").exit_code == 0
