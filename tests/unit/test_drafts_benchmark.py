# SPDX-License-Identifier: MIT
"""The table of `benchmarks.drafts`: what it runs, how it goes on after a cut, and that its figures follow from runs."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import drafts
from benchmarks.draft_texts import NEW, REPEATING, TEXTS
from benchmarks.drafts import NGRAM, OFF, OFF_AGAIN

SPEEDS = {OFF: 10.0, OFF_AGAIN: 40.0, NGRAM: 30.0}  # their geometric mean is 20


class _Machine:
    """Stands in for the model and the disk."""

    def __init__(self) -> None:
        self.windows: list[tuple[str, float, str]] = []
        self.rates: list[float | None] = []
        self.n_saved = 0

    def window(self, text: str, share: float, setting: str) -> dict[str, Any]:
        self.windows.append((text, share, setting))
        run = {"tokens_sha256": text, "tokens_per_s": SPEEDS[setting], "read_bytes_per_token": 1.0, "n_steps": 80}
        run |= {"stall_s_per_token": 0.1, "drafted_tokens": 60, "accepted_tokens": 20}
        run |= {"other_cpu_share": 0.2, "steal_share": 0.0}
        return run

    @contextlib.contextmanager
    def limited(self, rate: float | None) -> Iterator[None]:
        self.rates.append(rate)
        yield

    def save(self) -> None:
        self.n_saved += 1


def _options(**changed: Any) -> argparse.Namespace:
    options = drafts.parse_options(["--texts", "passage", "story", "--pairs", "2", "--mib-per-s", "0", "400"])
    for name, value in changed.items():
        setattr(options, name, value)
    return options


def _run(machine: _Machine, runs: list[dict[str, Any]], **changed: Any) -> bool:
    return drafts.run_table(_options(**changed), machine.window, runs, machine.limited, machine.save)


def test_a_pair_has_every_setting_and_a_control_in_a_drawn_order() -> None:
    """Guards against settings that always follow one another, and a noise that nobody measured."""
    runs: list[dict[str, Any]] = []
    machine = _Machine()
    assert _run(machine, runs, pairs=6)
    for cell in drafts.cells_of(_options()):
        orders = [tuple(one["order"]) for one in runs if drafts._cell(one) == cell]
        assert len(orders) == 6 * 3 and len(set(orders)) > 1
        assert all(set(order) == {OFF, OFF_AGAIN, NGRAM} for order in orders)


def test_the_disk_is_limited_where_something_is_read() -> None:
    """Guards against cells named after a slow disk that ran with a fast one, and against idle cells."""
    machine = _Machine()
    runs: list[dict[str, Any]] = []
    assert _run(machine, runs, pairs=1)
    assert {(one["fraction"], one["mib_per_s"]) for one in runs} == {
        (1.0, 0), (0.58, 0), (0.3, 0), (0.58, 400.0), (0.3, 400.0)
    }  # fmt: skip
    assert machine.rates == [None, None, None, 400.0, 400.0]
    first = [window for window in machine.windows if window[1] == 1.0]
    assert first[0][2] == OFF and len(first) == 1 + 2 * 3  # one to read the experts, then pairs


def test_a_table_that_was_cut_goes_on(capsys: Any) -> None:
    """Guards against windows that are run twice, and a cut that leaves cells without a pair to others' many."""
    runs: list[dict[str, Any]] = []
    assert not _run(_Machine(), runs, minutes=0.0) and not runs
    assert _run(_Machine(), runs, pairs=1)
    n_first = len(runs)
    machine = _Machine()
    assert _run(machine, runs, pairs=2)
    assert len(runs) == 2 * n_first and {one["pair"] for one in runs[n_first:]} == {1}
    assert machine.n_saved == n_first // 3
    assert "passage pair 1" in capsys.readouterr().err


def test_ratios_are_taken_within_pairs() -> None:
    """Guards against a machine's slow minute that counts as a loss, and a control that is not one."""
    runs: list[dict[str, Any]] = []
    assert _run(_Machine(), runs)
    for one in runs:
        if one["pair"] == 1:
            one["tokens_per_s"] /= 7  # all of this pair
    assert drafts.ratios(runs, NGRAM) == pytest.approx([1.5] * (len(runs) // 3))
    assert drafts.ratios(runs, OFF_AGAIN) == pytest.approx([4.0] * (len(runs) // 3))


def test_pairs_that_others_disturbed_are_left_out() -> None:
    """Guards against a neighbour's work in the figures, and the kernel's work for reads taken for a neighbour's."""
    runs: list[dict[str, Any]] = []
    assert _run(_Machine(), runs, texts=["story"], fractions=[0.3], mib_per_s=[0], pairs=4)
    assert drafts.undisturbed(runs)[0]["pair"] == 0 and len(drafts.undisturbed(runs)) == 12
    runs[1]["other_cpu_share"] = 0.5
    kept = drafts.undisturbed(runs)
    assert {one["pair"] for one in kept} == {1, 2, 3} and len(kept) == 9
    runs[4]["steal_share"] = 0.5
    assert len(drafts.undisturbed(runs)) == 12  # two pairs say less than four


def test_the_interval_is_as_wide_as_the_pairs_differ() -> None:
    """Guards against a median that hides how little is known."""
    assert drafts.mean_ratio([0.5, 2.0]) == pytest.approx(1.0)
    low, high = drafts.interval([1.1] * 5)
    assert low == high == pytest.approx(1.1)
    low, high = drafts.interval([0.8, 0.9, 1.0, 1.1, 1.2])
    assert 0.8 < low < 0.93 and 1.06 < high < 1.2
    narrow = drafts.interval([0.8, 0.9, 1.0, 1.1, 1.2] * 8)
    assert narrow[1] - narrow[0] < (high - low) / 2


def test_targets_are_by_kind_of_text(capsys: Any) -> None:
    """Guards against a gain asked of text that repeats nothing, and a loss that counts as no gain."""
    runs: list[dict[str, Any]] = []
    assert _run(_Machine(), runs)
    found = drafts.report(runs)
    assert len(found) == 10 and all(one["met"] and one["found"] == pytest.approx(1.5) for one in found)
    assert {one["limit"] for one in found if "story" in one["what"]} == {drafts.LEAST_RATIO}
    assert {one["limit"] for one in found if "passage" in one["what"]} == {drafts.LEAST_GAIN}
    for one in runs:
        one["tokens_per_s"] = 10.0 if one["setting"] != NGRAM else 9.0
    assert not any(one["met"] for one in drafts.report(runs))
    assert "60, 20 | 1.25 | 0.90 (0.90-0.90) | 1.00" in capsys.readouterr().out


def test_another_text_is_a_fault() -> None:
    """Guards against drafts or budgets that change what is written, reported as a gain."""
    runs: list[dict[str, Any]] = []
    assert _run(_Machine(), runs)
    assert drafts.find_faults(runs) == []
    runs[0]["tokens_sha256"] = "other"
    (fault,) = drafts.find_faults(runs)
    assert "found 2 sequences" in fault and runs[0]["setting"] in fault


def test_other_settings_are_no_continuation(tmp_path: Path) -> None:
    """Guards against one table made of runs that cannot be compared."""
    path = tmp_path / "out.json"
    options, model = _options(json=path), {"name": "model.gguf", "first_mib_sha256": "a"}
    assert drafts.earlier_runs(options, model) == []
    drafts.session.save("drafts", options, model=model, runs=[{"pair": 0}])
    assert drafts.earlier_runs(_options(json=path, pairs=9, minutes=1.0, texts=["list"]), model) == [{"pair": 0}]
    with pytest.raises(ValueError, match="other tokens"):
        drafts.earlier_runs(_options(json=path, tokens=7), model)
    with pytest.raises(ValueError, match="other model"):
        drafts.earlier_runs(options, {**model, "first_mib_sha256": "b"})
    path.write_text(json.dumps({"settings": 3}))
    with pytest.raises(ValueError, match="expected a table"):
        drafts.earlier_runs(options, model)


def test_prompts_of_both_kinds_begin_alike() -> None:
    """Guards against texts that are said to repeat a prompt which says nothing twice."""
    for text in TEXTS.values():
        words = text.prompt.split()
        pairs = list(itertools.pairwise(words))
        n_repeated = len(pairs) - len(set(pairs))
        assert (n_repeated >= 3) == (text.kind == REPEATING)
    assert {text.kind for text in TEXTS.values()} == {REPEATING, NEW}
