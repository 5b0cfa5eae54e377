# SPDX-License-Identifier: MIT
"""`edgemoe bench` with real runs: the same text for both engines, and the limit that holds both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgemoe import bench, confine
from edgemoe.bench_child import Task
from tests.conftest import ModelWriter
from tests.integration.support import ROOT

SIZES: dict[str, Any] = {"pairs": 1, "prompt_tokens": 40, "tokens": 12, "n_ctx": 256}
LIMIT_BYTES = 600 << 20


def test_both_engines_read_the_same_text(write_model: ModelWriter) -> None:
    """Guards against engines that evaluate other tokens: with ggml's arithmetic both have the same bits."""
    found = bench.bench(write_model("olmoe"), kernels="ggml", **SIZES)
    assert found.same_next_token == 1.0
    assert found.ratios["decode_tokens_per_s"].median > 0
    for figures in found.engines.values():
        assert all(figures[name].median > 0 for name in ("decode_tokens_per_s", "ttft_s", "load_s", "peak_bytes"))
    decode, prefill = found.profile["decode"], found.profile["prefill"]
    assert (decode["n_tokens"], prefill["n_tokens"]) == (12, 40)
    parts = ("router", "select", "wait", "experts", "dense", "sampling", "overhead")
    assert sum(decode[f"{name}_s"] for name in parts) == pytest.approx(decode["wall_s"], rel=0.03)
    assert found.profile["n_traced_tokens"] == 12


def test_drafts_read_the_same_text_too(write_model: ModelWriter) -> None:
    """Guards against drafted tokens that lead a run away from the text."""
    runner = bench._Runner(bench.read_model(write_model("olmoe")), None, 120.0)
    text = "one two three " * 20
    task = {"prompt_tokens": 40, "decode_tokens": 20, "first_token": 0, "text": text}
    path = str(write_model("olmoe"))
    options = {"n_ctx": 256, "kernels": "ggml", "n_threads": 1, "warm_start": False}
    drafted = runner.run(Task("edgemoe", path, {**options, "draft": "ngram"}, **task))
    plain = runner.run(Task("stock", path, options, repack=False, **task))
    assert "error" not in drafted and "error" not in plain
    assert drafted["sampled"] == plain["sampled"]
    assert len(plain["sampled"]) == 21


def test_failure_says_its_reason(write_model: ModelWriter) -> None:
    """Guards against `exit code 1` where the child knows what to do."""
    path = write_model("olmoe")
    runner = bench._Runner(bench.read_model(path), None, 120.0)
    error = runner.run(Task("edgemoe", str(path), {"memory": 1 << 20}, 4, 4, 0))["error"]
    assert error.startswith("exit code 1: budget 1 MiB is below the floor") and "use " in error
    runner = bench._Runner(bench.read_model(path), None, 0.01)
    assert runner.run(Task("stock", str(path), {}, 4, 4, 0))["error"].startswith("not done after")


def test_limit_holds_both_engines(write_model: ModelWriter) -> None:
    """Guards against a stock run outside of the memory that it is compared in."""
    try:
        confine.MemoryCgroup(f"edgemoe-test-{os.getpid()}", LIMIT_BYTES).close()
    except confine.CgroupError as error:
        pytest.skip(str(error))
    found = bench.bench(write_model("olmoe"), memory=LIMIT_BYTES, **SIZES)
    assert str(LIMIT_BYTES) in found.confinement
    for engine in bench.ENGINES:
        assert found.engines[engine]["peak_bytes"].high <= LIMIT_BYTES
    assert found.settings["memory"] == LIMIT_BYTES


def test_run_that_is_killed_says_why(write_model: ModelWriter) -> None:
    """Guards against a silent gap where stock llama.cpp does not fit into the memory."""
    limit_bytes = 4 << 20  # less than Python needs
    try:
        confine.MemoryCgroup(f"edgemoe-test-{os.getpid()}", limit_bytes).close()
    except confine.CgroupError as error:
        pytest.skip(str(error))
    runner = bench._Runner(bench.read_model(write_model("olmoe")), limit_bytes, 60.0)
    assert runner.run(Task("stock", str(write_model("olmoe")), {}, 4, 4, 0))["error"].startswith(
        "killed: out of memory"
    )


def test_child_leaves_one_line(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against llama.cpp's talk in the way of a run's record."""
    run = subprocess.run(
        [sys.executable, "-m", "edgemoe.bench_child"], input="{", capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 1
    assert run.stdout == "" and len(run.stderr.strip().splitlines()) == 1
