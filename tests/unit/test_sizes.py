# SPDX-License-Identifier: MIT
"""Sizes as people write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import BudgetError
from edgemoe.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1.5GiB", 3 << 29),
        ("1500MB", 1_500_000_000),
        (1_073_741_824, 1 << 30),
        ("1073741824", 1 << 30),
        ("2G", 2 << 30),
        ("512 mib", 512 << 20),
        (" 1 KB ", 1000),
        ("3b", 3),
        ("0.5TiB", 1 << 39),
    ],
)
def test_sizes_that_people_write(text: int | str, n_bytes: int) -> None:
    """Guards against a unit that is read as another one."""
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "1.5QiB",
        "-1GiB",
        "1,5GiB",
        "1e3MB",
        "0",
        "0.2b",
        0,
        -1,
        True,
        None,
        "1 2",
        "nan",
        "inf",
        math.inf,
        math.nan,
        "9" * 400 + "GiB",
    ],
)
def test_what_is_no_size(text: object) -> None:
    """Guards against a typing error that becomes some budget."""
    with pytest.raises(BudgetError, match=r"1\.5GiB, 1500MB or an integer of bytes"):
        parse_size(text)  # type: ignore[arg-type]


@given(st.text(max_size=12) | st.integers() | st.floats())
def test_nothing_else_than_budget_errors(text: int | float | str) -> None:
    """Guards against a traceback for something that nobody thought of."""
    try:
        assert parse_size(text) > 0
    except BudgetError:
        pass


@given(st.integers(1, 1 << 50))
def test_written_sizes_can_be_read(n_bytes: int) -> None:
    """Guards against a message that advises a size which the command line refuses."""
    assert parse_size(format_size(n_bytes)) == pytest.approx(n_bytes, rel=0.01)
    assert parse_size(n_bytes) == parse_size(str(n_bytes)) == n_bytes


def test_three_digits_are_shown() -> None:
    """Guards against 999 MiB that is shown as 1e+03 MiB."""
    assert [format_size(n) for n in (1, 1023 << 10, 432 << 20, int(1.31 * 2**30), 999_999, 5 << 40)] == [
        "1 B",
        "0.999 MiB",
        "432 MiB",
        "1.31 GiB",
        "977 KiB",
        "5120 GiB",
    ]
