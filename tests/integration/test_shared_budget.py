# SPDX-License-Identifier: MIT
"""Several models of one process share a memory budget: it holds while they decode by turns, and changes no bit."""

from __future__ import annotations

import gc
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra edgemoe[onnx])")

import edgemoe
from benchmarks import synthetic
from benchmarks.cgroup import CgroupError, MemoryCgroup
from edgemoe import host
from edgemoe.budget import MemoryBudget
from edgemoe.errors import BackendError, BudgetError
from edgemoe.onnx import InferenceSession
from tests.integration.onnx_models import Model, Shape, write_model
from tests.integration.support import ROOT, python

MIB = 1 << 20
SHAPE = Shape(n_layers=2, n_experts=32, k=4, hidden=1024, inter=1024, block=64)

# Models by turns, and digests of all they have computed. argv: GGUF, ONNX, budget (0: one model after the other, each
# with all its experts in memory).
CHILD = """
import hashlib, json, sys
import numpy as np
import edgemoe
from benchmarks import synthetic
from edgemoe import host
from edgemoe.onnx import InferenceSession
gguf, onnx, memory = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = {"n_ctx": 256, "n_batch": 64, "n_threads": 2, "logits_all": True, "warm_start": False}

def decode(llm):
    tokens = synthetic.local_tokens(56, 2048)
    llm.eval(tokens[:32])
    yield llm.scores[:32]
    for token in tokens[32:]:
        llm.eval([token])
        yield llm.scores[llm.n_tokens - 1]

def run(session):
    rng = np.random.default_rng(0)
    for n_tokens in [40] + [1] * 24:
        feed = {"x": rng.standard_normal((n_tokens, 1024), dtype=np.float32)}
        for layer in range(2):
            feed[f"router{layer}"] = rng.standard_normal((n_tokens, 32), dtype=np.float32)
        yield session.run(None, feed)[0]

digests = [hashlib.sha256(), hashlib.sha256()]
if memory:
    budget = edgemoe.MemoryBudget(memory)
    llm, session = edgemoe.Llama(gguf, memory=budget, **options), InferenceSession(onnx, memory=budget)
    for pair in zip(decode(llm), run(session), strict=True):
        for digest, values in zip(digests, pair):
            digest.update(np.ascontiguousarray(values).tobytes())
    stats = [llm.stats().to_dict(), session.stats().to_dict()]
    floor = budget.floor_bytes
else:
    stats, floor = [], 0
    for digest, values in [(0, decode(edgemoe.Llama(gguf, **options))), (1, run(InferenceSession(onnx)))]:
        for v in values:
            digests[digest].update(np.ascontiguousarray(v).tobytes())
print(json.dumps({"digests": [d.hexdigest() for d in digests], "stats": stats, "floor": floor,
                  "peak": host.peak_rss_bytes()}))
"""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of OLMoE with smaller experts: 162 MiB of them."""
    path = tmp_path_factory.mktemp("gguf") / "olmoe.gguf"
    return synthetic.write_preset(path, "olmoe", n_layers=1, expert_ff=768, n_vocab=2048)


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Two QMoE nodes: 102 MiB of experts."""
    return write_model(tmp_path_factory.mktemp("onnx") / "model.onnx", SHAPE)


@pytest.fixture(scope="module")
def alone(gguf: Path, onnx: Model) -> Any:
    """Each model by itself, everything resident."""
    done = python(CHILD, gguf, onnx.path, 0)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_two_kinds_of_models_hold_one_budget_by_turns(gguf: Path, onnx: Model, alone: Any) -> None:
    """Guards against: each model taking the budget for itself, which the kernel would end by killing the process; and
    bits that depend on who else is there."""
    with pytest.raises(BudgetError) as refused:
        MemoryBudget(40 * MIB).join("a model", {}, 1, 1)
    assert "below the floor" in str(refused.value)
    budget = 340 * MIB
    try:
        group = MemoryCgroup(f"edgemoe-test-{os.getpid()}", budget)
    except CgroupError as error:
        pytest.skip(str(error))
    arguments = [sys.executable, "-c", CHILD, str(gguf), str(onnx.path), str(budget)]
    with group:
        result = group.run(["env", f"PYTHONPATH={ROOT}", *arguments], "", 120)
    assert result.usage is not None
    assert result.usage.oom_kills == 0 and result.exit_code == 0, (result.exit_code, result.stderr_tail)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["digests"] == alone["digests"]
    assert found["peak"] <= budget and result.usage.peak_bytes < budget
    slots = [stats["slots_bytes"] for stats in found["stats"]]
    assert [stats["budget_bytes"] for stats in found["stats"]] == [budget, budget]
    # Neither has all its experts, and both have read some twice: there was something to hold.
    assert slots[0] < 150 * MIB and slots[1] < 95 * MIB, slots
    assert all(stats["expert_bytes_read"] > stats["slots_bytes"] for stats in found["stats"])
    # What the budget has, it gives.
    assert sum(slots) > budget - found["floor"], (slots, found)


def test_models_come_and_go(gguf: Path, onnx: Model) -> None:
    """Guards against: slots that stay small after a neighbour is gone, or large when one comes; a model that is kept
    alive by the budget."""
    budget = MemoryBudget(host.process_rss_bytes() + 260 * MIB)
    options: dict[str, Any] = {"memory": budget, "n_ctx": 256, "n_batch": 64, "n_threads": 2, "warm_start": False}
    with edgemoe.Llama(gguf, **options) as first:
        first.eval(list(range(32)))
        alone = first.stats().slots_bytes
        session = InferenceSession(onnx.path, memory=budget)
        session.run(None, onnx.feed(4))
        assert first.stats().slots_bytes < alone - 20 * MIB
        assert first.plan.slots_bytes == first.stats().slots_bytes
        both = session.stats().slots_bytes
        with edgemoe.Llama(gguf, **options) as second:
            second.eval(list(range(32)))
            assert session.stats().slots_bytes < both
            assert [model["name"] for model in budget.stats()["models"]] == ["olmoe.gguf", "model.onnx", "olmoe.gguf"]
        assert session.stats().slots_bytes == pytest.approx(both, abs=12 * MIB)
        del session
        assert [model["name"] for model in budget.stats()["models"]] == ["olmoe.gguf"]
        assert first.stats().slots_bytes == pytest.approx(alone, abs=24 * MIB)
        assert host.process_rss_bytes() <= budget.budget_bytes
    assert budget.stats()["models"] == []


def test_a_model_for_which_there_is_no_room_is_refused_before_it_is_loaded(gguf: Path, onnx: Model) -> None:
    """Guards against: a newcomer that throws others' experts out and fails all the same, and an error without the
    numbers."""
    fixed = InferenceSession(onnx.path).plan.own_bytes
    gc.collect()  # what earlier tests have left must not go while the floor is measured
    budget = MemoryBudget(host.process_rss_bytes() + fixed + 56 * MIB)
    session = InferenceSession(onnx.path, memory=budget)
    before = budget.stats()["models"]
    with pytest.raises(
        BudgetError, match=r"below the floor of .* model\.onnx: .* olmoe\.gguf: dense weights"
    ) as refused:
        edgemoe.Llama(gguf, memory=budget, n_ctx=8192, warm_start=False)
    assert budget.stats()["models"] == before
    session.run(None, onnx.feed(2))
    floor = int(str(refused.value).split()[-2])
    assert str(refused.value).endswith(f"give at least {floor} bytes")
    budget.set_memory(floor + 2 * MIB)
    with edgemoe.Llama(gguf, memory=budget, n_ctx=8192, warm_start=False) as llm:
        llm.eval([1, 2, 3])


def test_the_budget_is_changed_where_it_is(gguf: Path, onnx: Model) -> None:
    """Guards against: one model that changes what others rely on, and a budget refused that is half in force."""
    budget = MemoryBudget("2GiB")
    session = InferenceSession(onnx.path, memory=budget)
    with edgemoe.Llama(gguf, memory=budget, n_ctx=256, n_batch=64, warm_start=False) as llm:
        feed = onnx.feed(8)
        expected = session.run(None, feed)[0]
        llm.eval(list(range(32)))
        for member in (llm, session):
            with pytest.raises(BudgetError, match="call set_memory of that object"):
                member.set_memory("1GiB")  # type: ignore[attr-defined]
        slots = [llm.stats().slots_bytes, session.stats().slots_bytes]
        with pytest.raises(BudgetError, match="below the floor"):
            budget.set_memory("50MiB")
        assert [llm.stats().slots_bytes, session.stats().slots_bytes] == slots
        budget.set_memory(budget.floor_bytes + 16 * MIB)
        assert llm.stats().slots_bytes < slots[0] and session.stats().slots_bytes < slots[1]
        assert llm.stats().budget_bytes == session.stats().budget_bytes == budget.budget_bytes
        assert (session.run(None, feed)[0] == expected).all()
        llm.reset_stats()
        budget.set_memory("2GiB")
        assert [llm.stats().slots_bytes, session.stats().slots_bytes] == slots


def test_a_model_that_cannot_be_loaded_leaves_the_budget(onnx: Model, tmp_path: Path) -> None:
    """Guards against: memory set aside for good for a model that is not there."""
    inside = write_model(tmp_path / "inside.onnx", Shape(), size_threshold=1 << 30)
    budget = MemoryBudget("2GiB")
    with pytest.raises(BackendError, match="lies inside"):
        InferenceSession(inside.path, memory=budget)
    assert budget.stats()["models"] == []


def test_a_pickled_budget_is_one_of_its_own(onnx: Model) -> None:
    """Guards against: a model sent to another process that brings its neighbours along."""
    budget = MemoryBudget("2GiB")
    session = InferenceSession(onnx.path, memory=budget)
    copy = pickle.loads(pickle.dumps(budget))
    assert copy.budget_bytes == 2 << 30 and copy.stats()["models"] == []
    assert len(budget.stats()["models"]) == 1 and session.stats().budget_bytes == 2 << 30
