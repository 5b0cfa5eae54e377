# SPDX-License-Identifier: MIT
"""The budget holds: in a memory cgroup of that size nothing is killed, and the plan's numbers are llama.cpp's own."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import synthetic
from benchmarks.cgroup import CgroupError, MemoryCgroup, RunResult
from edgemoe import engine, runtime
from edgemoe.formats.gguf import read_model
from tests.conftest import ModelWriter
from tests.integration.support import ROOT, python, streamed

# One layer of OLMoE is 216 MiB of experts; these two layers have 324 MiB, and 20 MiB dense.
SHAPE = {"n_layers": 2, "expert_ff": 768, "n_vocab": 8192}
GENERATE = """
import json, sys
import edgemoe
from benchmarks import synthetic
path, memory = sys.argv[1], int(sys.argv[2]) or None
with edgemoe.Llama(path, memory=memory, n_ctx=512, n_batch=128, n_threads=2) as llm:
    tokens = synthetic.local_tokens(96, 8192)
    llm.eval(tokens[:64])
    for token in tokens[64:]:
        llm.eval([token])
    print(json.dumps({**llm.stats().to_dict(), "plan": llm.plan.to_dict()}))
"""
PLAN = """
import json, sys
import edgemoe
print(json.dumps(edgemoe.plan(sys.argv[1], n_ctx=512, n_batch=128).to_dict()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is larger than its process."""
    return synthetic.write_preset(tmp_path_factory.mktemp("large") / "olmoe.gguf", "olmoe", **SHAPE)


@pytest.fixture(scope="module")
def plan(large: Path) -> Any:
    """The plan of that model, as a process of its own makes it."""
    done = python(PLAN, large)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _run_in_cgroup(path: Path, memory: int, limit_bytes: int) -> tuple[RunResult, Any]:
    name = f"edgemoe-test-{os.getpid()}"
    try:
        group = MemoryCgroup(name, limit_bytes)
    except CgroupError as error:
        pytest.skip(str(error))
    with group:
        result = group.run(
            ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", GENERATE, str(path), str(memory)], "", 120
        )
    assert result.usage.oom_kills == 0 and result.exit_code == 0, (result.exit_code, result.stderr_tail)
    return result, json.loads(result.stdout.splitlines()[-1])


def _fixed_bytes(plan: Any) -> int:
    return int(plan["dense_bytes"] + plan["kv_bytes"] + plan["buffers_bytes"] + (32 << 20))


@pytest.mark.parametrize("percent", [25, 50, 100])
def test_generates_within_a_cgroup_of_the_budget(percent: int, large: Path, plan: Any) -> None:
    """Guards against memory that no line of the plan knows: the kernel would kill the process."""
    budget = int((_fixed_bytes(plan) + plan["expert_bank_bytes"] * percent // 100) * 1.01)
    result, stats = _run_in_cgroup(large, budget, limit_bytes=budget)
    assert result.usage.peak_bytes < budget, f"{(result.usage.peak_bytes - budget) >> 20} MiB too much"
    assert stats["peak_rss_bytes"] <= budget
    assert stats["budget_bytes"] == budget
    share = stats["slots_bytes"] / plan["expert_bank_bytes"]
    assert percent / 100 - 0.06 < share <= percent / 100 + 0.15, share
    assert (stats["expert_bytes_read"] > plan["expert_bank_bytes"]) == (percent < 50) or percent == 50


def test_default_budget_in_a_cgroup(large: Path, plan: Any) -> None:
    """Guards against a default that looks at the machine's memory and not at the container's."""
    limit = _fixed_bytes(plan) + plan["expert_bank_bytes"] * 2 // 3
    result, stats = _run_in_cgroup(large, 0, limit_bytes=limit)
    assert stats["budget_bytes"] <= limit
    assert result.usage.peak_bytes < limit
    assert stats["slots_bytes"] > plan["expert_bank_bytes"] // 4  # it uses what there is


def test_default_budget_is_no_more_than_the_model_can_use(large: Path, plan: Any) -> None:
    """Guards against a default budget that takes all of a large machine for a small model."""
    assert plan["fits"]
    assert plan["slots_bytes"] >= plan["expert_bank_bytes"]
    assert plan["budget_bytes"] <= _fixed_bytes(plan) + 1.02 * plan["slots_bytes"] + (48 << 20)


FLOOR = """
import json, sys
import edgemoe
from edgemoe.errors import BudgetError
options = {"n_ctx": 512, "n_batch": 128, "n_threads": 2}
floor = int(sys.argv[2]) or edgemoe.plan(sys.argv[1], **options).floor_bytes
with edgemoe.Llama(sys.argv[1], memory=floor, **options) as llm:
    llm.eval(list(range(300, 340)))
    for token in range(400, 410):
        llm.eval([token])
    stats = llm.stats()
try:
    edgemoe.Llama(sys.argv[1], memory=floor - (16 << 20), **options)
except BudgetError as error:
    print(json.dumps([floor, stats.slots_bytes, stats.peak_rss_bytes, str(error)]))
"""


@pytest.mark.parametrize("planned_in", ["another process", "this process"])
def test_the_floor_runs_and_less_does_not(planned_in: str, large: Path, plan: Any) -> None:
    """Guards against a floor that is refused by a few KiB, and a smaller budget that breaks its promise."""
    done = python(FLOOR, large, plan["floor_bytes"] if planned_in == "another process" else 0)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    floor, slots_bytes, peak_rss_bytes, message = json.loads(done.stdout)
    assert slots_bytes >= plan["token_cycle_bytes"]
    assert peak_rss_bytes <= floor
    assert "below the floor" in message
    assert floor == pytest.approx(plan["floor_bytes"], abs=8 << 20)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("olmoe", {}),
        ("olmoe", {"n_ctx": 1024, "type_k": 8, "type_v": 8, "flash_attn": True}),
        ("qwen3moe", {"n_ctx": 2048, "n_batch": 256, "n_ubatch": 32}),
        ("gpt-oss", {"n_ctx": 4096}),
        ("gpt-oss", {"n_ctx": 4096, "swa_full": False}),
        ("deepseek2", {"n_ctx": 1024}),
        ("deepseek2-v3", {"logits_all": False}),
    ],
)
def test_planned_sizes_are_those_of_llama_cpp(
    arch: str, options: dict[str, Any], write_model: ModelWriter, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against a rehearsal that sizes something else than what is then made."""
    path = write_model(arch)
    with streamed(path, verbose=True, **options) as llm:
        planned = llm.plan
        footprint = llm._footprint
        kwargs = {"n_ctx": llm.n_ctx(), "n_batch": 64, "logits_all": True, "n_threads": 2, **options}
    log = capfd.readouterr().err

    def reported(what: str) -> float:
        return sum(float(size) for size in re.findall(rf"{what} buffer size = +([\d.]+) MiB", log)) * (1 << 20)

    assert reported("KV") > 0 and reported("compute") > 0
    assert planned.kv_bytes == pytest.approx(reported("KV"), abs=32 << 10)
    experts = runtime.open_runtime(read_model(path), planned.expert_bank_bytes * 2)
    with engine.rehearsal(read_model(path), experts, kwargs) as rehearsed:
        pass
    experts.close()
    assert rehearsed.compute_bytes == pytest.approx(reported("compute"), abs=64 << 10)
    assert rehearsed.output_bytes == pytest.approx(reported("output"), abs=64 << 10)
    assert footprint.kv_bytes == rehearsed.kv_bytes


def test_kv_size_by_hand(write_model: ModelWriter) -> None:
    """Guards against a size that is read from the wrong line of llama.cpp's log: two caches of f16."""
    with streamed(write_model("olmoe"), n_ctx=2048) as llm:
        assert llm.plan.kv_bytes == pytest.approx(2 * 2 * 2048 * 256 * 2, abs=32 << 10)
