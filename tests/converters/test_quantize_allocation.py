# SPDX-License-Identifier: MIT
"""The exact allocation of types, against all combinations and against a reference by bytes; MIXED.toml."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from gguf import GGMLQuantizationType as GgmlType  # noqa: E402

from edgemoe.converters.quantize.allocation import Group, Option, allocate  # noqa: E402
from edgemoe.converters.quantize.mixed_file import format_mixed, override_of, read_mixed  # noqa: E402
from edgemoe.converters.quantize.presets import Override, choose_types  # noqa: E402
from edgemoe.errors import ConversionError  # noqa: E402
from tests.converters.stock_quantize import TinyModel  # noqa: E402

options = st.builds(
    Option,
    st.just(GgmlType.Q4_K),
    st.integers(1, 40),
    st.one_of(st.integers(0, 20).map(float), st.floats(0, 1e6, allow_nan=False), st.floats(0, 1e-6)),
)
problems = st.lists(st.lists(options, min_size=1, max_size=5).map(tuple), min_size=1, max_size=6)


def groups_of(problem: list[tuple[Option, ...]]) -> list[Group]:
    return [Group(f"g{index}", 100, tuple(group)) for index, group in enumerate(problem)]


@settings(max_examples=400)
@given(problem=problems, slack=st.floats(0, 1))
def test_the_allocation_is_the_best_of_all(problem: list[tuple[Option, ...]], slack: float) -> None:
    """Guards against a bound that drops the best, options that break the budget, and choices of the wrong group."""
    least = sum(min(option.n_bytes for option in group) for group in problem)
    most = sum(max(option.n_bytes for option in group) for group in problem)
    budget = least + int(slack * (most - least))
    found = allocate(groups_of(problem), budget)
    assert all(option in group for option, group in zip(found.chosen, problem, strict=True))
    assert found.n_bytes <= budget
    best = min(
        sum(option.cost for option in choice)
        for choice in itertools.product(*problem)
        if sum(option.n_bytes for option in choice) <= budget
    )
    assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_the_allocation_of_a_large_model_is_that_of_a_table_over_bytes() -> None:
    """Guards against bounds that hold for few groups only: 144 groups of 2 sizes, against dynamic programming."""
    rng = np.random.default_rng(3)
    block_bytes = [84, 110, 144, 176, 210, 272]
    problem = []
    for index in range(144):
        n_blocks = 3 if index % 3 == 2 else 2
        scale = float(np.exp(rng.normal(0, 1.5)))
        problem.append(
            tuple(
                Option(GgmlType.Q4_K, size * n_blocks // 2, scale * 4.0 ** (-size / 32) * float(rng.uniform(0.8, 1.2)))
                for size in block_bytes
            )
        )
    least = sum(min(option.n_bytes for option in group) for group in problem)
    for budget in (least, int(least * 1.37), least * 2):
        cost = np.full(budget + 1, np.inf)
        cost[0] = 0.0
        for group in problem:
            after = np.full(budget + 1, np.inf)
            for option in group:
                after[option.n_bytes :] = np.minimum(
                    after[option.n_bytes :], cost[: budget + 1 - option.n_bytes] + option.cost
                )
            cost = after
        assert allocate(groups_of(problem), budget).cost == pytest.approx(cost.min(), rel=1e-12)


def test_a_budget_below_the_smallest_types_is_refused() -> None:
    """Guards against a result that silently takes more bytes than were asked for."""
    group = Group("g", 64, (Option(GgmlType.Q2_K, 20, 1.0), Option(GgmlType.Q4_K, 36, 0.5)))
    assert allocate([group], 35).n_bytes == 20
    with pytest.raises(
        ConversionError, match=r"19 bytes \(2.375 bits per weight\): the smallest types take 20 \(2.500\)"
    ):
        allocate([group], 19)


def test_a_table_of_types_survives_the_file(tmp_path: Path) -> None:
    """Guards against patterns that match other tensors once written, and lost order among patterns."""
    overrides = (
        override_of("blk.1.ffn_down_exps.weight", GgmlType.Q6_K),
        Override(r"ffn_(up|down)_exps", GgmlType.Q3_K),
    )
    path = tmp_path / "mixed.toml"
    path.write_text(format_mixed("Q4_K_M", overrides, ("made by a test",)), encoding="utf-8")
    mixed = read_mixed(path)
    assert (mixed.base, mixed.overrides) == ("Q4_K_M", overrides)
    tiny = TinyModel("olmoe", 12, 16)
    types = choose_types(mixed.base, tiny.tensors(), tiny.model, overrides=mixed.overrides).types
    assert types["blk.1.ffn_down_exps.weight"] is GgmlType.Q6_K
    assert types["blk.11.ffn_down_exps.weight"] is GgmlType.Q3_K  # not taken by blk.1
    assert types["blk.1.ffn_gate_exps.weight"] is GgmlType.Q4_K


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('base = "Q4_K_M', "write TOML"),
        ('[types]\na = "Q4_K"', "expected the name of a preset"),
        ('base = "Q4_K_M"\n[type]\na = "Q4_K"', "found the key 'type'"),
        ('base = "Q4_K_M"\n[types]\na = "Q4_K_M"', "found the type 'Q4_K_M' for 'a', expected one of BF16, "),
        ('base = "Q4_K_M"\n[types]\n"(" = "Q4_K"', "no regular expression"),
        ('base = "Q9"', "no such preset"),
    ],
)
def test_a_file_that_says_something_else_is_refused(content: str, message: str, tmp_path: Path) -> None:
    """Guards against misspelt keys and types that are silently ignored."""
    path = tmp_path / "mixed.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConversionError, match=message):
        read_mixed(path)
