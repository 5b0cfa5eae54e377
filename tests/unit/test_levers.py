# SPDX-License-Identifier: MIT
"""How levers are written, and what is refused before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgemoe import levers, planner
from edgemoe.levers import EXACT, LEVER_KEYWORDS, Lever, parse


def test_what_is_written_is_read() -> None:
    """Guards against values of the wrong type, keywords that are dropped, and equal levers that are measured twice."""
    assert parse("reuse_bias=0.1") == Lever.of(reuse_bias=0.1)
    lever = parse(" top_j = 1 , reuse_bias=0.1,reuse_method=max-rank")
    assert lever.keywords == (("reuse_bias", 0.1), ("reuse_method", "max-rank"), ("top_j", 1))
    assert lever == parse("reuse_bias=0.10,reuse_method=max-rank,top_j=1")
    assert lever.name == "reuse_bias=0.1,reuse_method=max-rank,top_j=1"
    assert parse(lever.name) == lever
    assert (lever.get("top_j"), EXACT.get("top_j")) == (1, None)
    assert EXACT.name == "exact"


def test_another_model_is_part_of_a_lever() -> None:
    """Guards against a tuned copy that is measured as the model itself."""
    alone, both = parse("model=some/tuned.gguf"), parse("reuse_bias=0.1,model=some/tuned.gguf")
    assert (alone.keywords, alone.model) == ((), Path("some/tuned.gguf"))
    assert alone != EXACT
    assert alone.name == "model=tuned.gguf"
    assert both.name == "reuse_bias=0.1,model=tuned.gguf"
    assert both.family == "reuse_bias,model=tuned.gguf" != parse("reuse_bias=0.1").family


def test_levers_of_one_family_differ_in_numbers_only() -> None:
    """Guards against a plot that joins points of two methods, or none at all."""
    family = [parse(f"reuse_bias={s},top_j=1") for s in ("0.1", "0.3")]
    assert {lever.family for lever in family} == {"reuse_bias,top_j=1"}
    assert [lever.strength for lever in family] == ["0.1", "0.3"]
    assert parse("reuse_bias=0.1,top_j=2").family not in {lever.family for lever in family}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"cannot read the lever '': found '', expected NAME=VALUE"),
        ("reuse_bias", "found 'reuse_bias', expected NAME=VALUE"),
        ("reuse_bias=", "found 'reuse_bias=', expected NAME=VALUE"),
        ("reuse_bias=0.1,", "found '', expected NAME=VALUE"),
        ("reuse=0.1", "unknown name 'reuse', expected reuse_bias, .*, model"),
        ("memory=1GiB", "unknown name 'memory'"),
        ("reuse_bias=0.1,reuse_bias=0.2", "it has reuse_bias twice"),
        ("reuse_bias=much", "reuse_bias is 'much', expected a number from 0 to 1"),
        ("reuse_bias=nan", "reuse_bias is 'nan', expected a number from 0 to 1"),
        ("reuse_bias=auto", "reuse_bias is 'auto', expected a number from 0 to 1"),
        ("reuse_bias=1.5", "reuse_bias is '1.5', expected a number from 0 to 1"),
        ("reuse_bias=0.1,reuse_method=best", "reuse_method is 'best', expected one of cache-prior"),
        ("reuse_bias=0.1,top_j=0", "top_j is '0', expected a whole number of at least 1"),
        ("reuse_bias=0.1,top_j=1.5", "top_j is '1.5', expected a whole number"),
        ("top_j=1", "top_j without reuse_bias changes nothing"),
        ("reuse_method=max-rank", "reuse_method without reuse_bias changes nothing"),
    ],
)
def test_what_is_no_lever_is_refused(text: str, message: str) -> None:
    """Guards against a row of the price list that measures something else than it says."""
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({}, "the lever is empty"), ({"memory": 1}, "unknown lever 'memory'"), ({"top_j": 1}, "without")],
)
def test_levers_of_python_are_checked_as_well(keywords: dict[str, Any], message: str) -> None:
    """Guards against a mistyped keyword that is measured as exact."""
    with pytest.raises(ValueError, match=message):
        Lever.of(**keywords)


def test_each_keyword_is_read_and_planned() -> None:
    """Guards against a keyword that can be written and not converted, or that only fails behind an exact pass."""
    assert set(levers._CONVERTERS) == set(LEVER_KEYWORDS)
    assert set(LEVER_KEYWORDS) <= set(planner.plan.__kwdefaults__)
