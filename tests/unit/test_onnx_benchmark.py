# SPDX-License-Identifier: MIT
"""The benchmark of ONNX models: its model runs in stock ONNX Runtime and here, and its figures follow from readings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from benchmarks import onnx as benchmark
from benchmarks.onnx_shape import ALIGNMENT_BYTES, DATA, MoeShape, model_name, write_model
from edgemoe.formats.onnx_model import read_model
from edgemoe.onnx import InferenceSession

TINY = MoeShape(n_layers=2, n_experts=8, n_used=2, hidden=64, inter=32, n_vocab=96)


def test_the_model_runs_and_tokens_decide_the_routing(tmp_path: Path) -> None:
    """Guards against: a file that ours and stock compute differently, layers that drown the embedding, experts that
    begin within a page, and a size that the limits are not made from."""
    write_model(tmp_path, TINY)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    ids = {"ids": np.arange(40)}
    for level in (0, 4):
        path = tmp_path / model_name(level)
        found = InferenceSession(path, memory="4GiB").run(None, ids)[0]
        expected = onnxruntime.InferenceSession(path, options).run(None, ids)[0]
        assert np.abs(found - expected).max() <= benchmark.TOLERANCES[level] * np.abs(expected).max()
        embedding = np.fromfile(tmp_path / DATA, np.float32, 40 * TINY.hidden).reshape(40, TINY.hidden)
        share = np.abs(found - embedding).mean() / np.abs(embedding).mean()
        assert 0.01 < share < 1
    model = read_model(tmp_path / model_name(4))
    experts = [t for t in model.tensors.values() if t.name.startswith(("w", "s"))]
    assert all(t.offset % ALIGNMENT_BYTES == 0 for t in experts)
    assert sum(t.n_bytes for t in experts) == TINY.expert_bank_bytes


def _record(engine: str, **values: Any) -> dict[str, Any]:
    return {"scenario": "25%", "routing": "local", "pair": 0, "engine": engine, "disturbed": False, **values}


def test_targets_and_faults_follow_from_the_runs() -> None:
    """Guards against: a ratio upside down, a killed engine that counts as fast, and a failure of ours passed over."""
    scenario = benchmark.Scenario("25%", "local", 1000, ("ours:4", "plain:4", "stock:4"))
    runs = [
        _record("ours:4", ms_per_run=10.0, peak_rss_bytes=900, outputs=[[1.0, 2.0]]),
        _record("plain:4", ms_per_run=40.0, peak_rss_bytes=999, outputs=[[1.0, 1.0]]),
        _record("stock:4", killed=True, error="killed for memory"),
    ]
    runs = benchmark.compared(runs)
    assert runs[0]["difference"] == 1.0
    budget, speed = benchmark.make_targets(runs, [scenario])
    assert (budget["found"], budget["met"]) == (0.9, True)
    assert (speed["found"], speed["met"]) == (4.0, True)
    assert [fault.split(": ", 1)[1][:7] for fault in benchmark.find_faults(runs)] == ["outputs"]
    assert len(benchmark.find_faults([_record("ours:4", killed=True, error="killed for memory")])) == 1


@pytest.mark.parametrize("text", ["ours", "ours:3", "theirs:4", ":4"])
def test_engines_that_are_none_are_refused(text: str) -> None:
    """Guards against: a misspelt engine found out after minutes."""
    with pytest.raises(Exception, match="expected one of ours, stock, plain, saved"):
        benchmark.engine_name(text)
