# SPDX-License-Identifier: MIT
"""The benchmarks of prompts, on a tiny model: that they run, and what they say that does not depend on time."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from benchmarks import loopdev, micro_batches, prompts
from tests.conftest import ModelWriter


@pytest.mark.parametrize("flash_attn", [[], ["--flash-attn"]], ids=["no flash attention", "flash attention"])
def test_full_micro_batches_of_any_size_give_the_same_bits(
    flash_attn: list[str], write_model: ModelWriter, capsys: Any
) -> None:
    """Guards against what docs/experiments.md says of micro-batches becoming false with another llama.cpp."""
    arguments = ["--model", str(write_model("olmoe")), "--sizes", "512", "1024", "--pairs", "1", "--threads", "1"]
    arguments += ["--fraction", "100"]  # of a few MiB: room for the larger buffers
    assert micro_batches.main([*arguments, "--prompt-tokens", "1024", "--decode-tokens", "2", *flash_attn]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    small, large = sorted(json.loads(line)["runs"], key=lambda run: run["n_ubatch"])
    assert (small["n_ubatch"], large["n_ubatch"]) == (512, 1024)
    assert small["logits_sha256"] == large["logits_sha256"]
    assert [row.split("|")[-2].strip() for row in table[2:]] == ["equal", "equal"]


def test_prompts_are_counted_and_bounded(
    write_model: ModelWriter, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Guards against a bound of more bytes than the model has, shares that do not follow from it, lost cells."""
    path = write_model("olmoe", n_experts=16, n_layers=3)
    monkeypatch.setattr(loopdev, "random_read_bytes_per_s", lambda *_: 1e6)  # slow: the bound is reading
    arguments = ["--model", str(path), "--texts", "1", "--threads", "1", "--routing", "uniform"]
    assert prompts.main([*arguments, "--fractions", "0.25", "0.5", "--prompt-tokens", "64"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(one["routing"], one["fraction"]) for one in line["hits"]} == {("uniform", 0.25), ("uniform", 0.5)}
    assert all(0.0 <= one[key] <= 1.0 for one in line["hits"] for key in ("short", "long"))
    quarter, half = line["prompts"]
    assert quarter["must_read_bytes"] > half["must_read_bytes"] > 0
    for one in line["prompts"]:
        assert one["must_read_bytes"] <= one["read_bytes"]  # or it is no bound
        assert math.isclose(one["bound_share"], one["must_read_bytes"] / 1e6 / one["prompt_s"])
