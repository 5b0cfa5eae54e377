# SPDX-License-Identifier: MIT
"""Arithmetic of the budget: what grows with what, and advice that is true."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgemoe
from edgemoe import host, planner, runtime, topology
from edgemoe.formats.gguf import GgufModel, GgufTensor, read_model
from edgemoe.sizes import parse_size
from tests.conftest import ModelWriter


@pytest.fixture(scope="module")
def footprint() -> planner.Footprint:
    """A model of 64 experts of three times 1 MiB in 4 layers, 100 MiB dense; no file."""
    tensors = [GgufTensor("token_embd.weight", (1024, 25600), "F32", 100 << 20, 0, 0)]
    for layer in range(4):
        for i, name in enumerate(("gate", "up", "down")):
            tensors.append(
                GgufTensor(
                    f"blk.{layer}.ffn_{name}_exps.weight",
                    (1024, 256, 64),
                    "F32",
                    64 << 20,
                    0,
                    (100 << 20) + (64 << 20) * (3 * layer + i),
                )
            )
    metadata = {"general.architecture": "olmoe", "olmoe.expert_count": 64, "olmoe.expert_used_count": 8}
    model = GgufModel(Path("made-up.gguf"), [Path("made-up.gguf")], metadata, tensors)
    return planner.Footprint(model, kv_bytes=50 << 20, buffers_bytes=80 << 20, batch_bytes=10 << 20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4 << 30), st.integers(0, 1 << 30))
def test_more_memory_is_never_worse(footprint: planner.Footprint, memory: int, more: int) -> None:
    """Guards against a budget that gives fewer slots than a smaller one."""
    small, large = footprint.plan(memory), footprint.plan(memory + more)
    assert small.slots_bytes <= large.slots_bytes
    assert small.fits <= large.fits
    assert small.floor_bytes == large.floor_bytes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4 << 30))
def test_parts_stay_within_the_budget(footprint: planner.Footprint, memory: int) -> None:
    """Guards against parts that add up to more than the budget, and a floor without room for one token."""
    check_parts(footprint, memory)


@pytest.mark.parametrize("short_bytes", [-1, 0, 1, 1 << 20, (4 << 20) - 1, (4 << 20) + (1 << 16)])
def test_parts_around_the_floor(footprint: planner.Footprint, short_bytes: int) -> None:
    """Guards against a budget just below the floor, which the slack may serve, that nothing else draws by chance."""
    check_parts(footprint, footprint.plan(1).floor_bytes - short_bytes)


def check_parts(footprint: planner.Footprint, memory: int) -> None:
    plan = footprint.plan(memory)
    parts = plan.dense_bytes + plan.kv_bytes + plan.buffers_bytes + plan.slots_bytes + plan.slack_bytes
    cycle_slot_bytes = runtime.slot_sizes(footprint.model, 0).cycle_slot_bytes
    if memory >= plan.floor_bytes:
        assert plan.fits and parts <= memory and plan.slots_bytes >= cycle_slot_bytes
    elif plan.fits:  # one token's experts, and what is short, 4 MiB at most, comes out of the slack
        assert plan.slots_bytes == cycle_slot_bytes and memory <= parts <= memory + (4 << 20)
    else:
        assert plan.floor_bytes - memory > 4 << 20


def test_the_floor_is_the_smallest_that_fits(footprint: planner.Footprint) -> None:
    """Guards against a floor that does not run, or one above what runs by more than two measurements differ."""
    floor = footprint.plan(1).floor_bytes
    assert footprint.plan(floor).fits and not footprint.plan(floor - (5 << 20)).fits
    assert footprint.plan(floor).slots_bytes >= runtime.slot_sizes(footprint.model, 0).cycle_slot_bytes


@pytest.mark.parametrize("free_gib", [0, 1, 64])
def test_default_budget(footprint: planner.Footprint, free_gib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a default beyond what is free, or beyond what the model can use."""
    monkeypatch.setattr(host, "default_budget_bytes", lambda: free_gib << 30)
    plan = footprint.plan(None)
    if free_gib == 64:
        assert plan.slots_bytes == plan.expert_bank_bytes and plan.fits
        assert plan.budget_bytes < 2 << 30
    else:
        assert plan.budget_bytes == free_gib << 30


def test_refusal_names_a_budget_that_is_enough(footprint: planner.Footprint) -> None:
    """Guards against advice that would be refused as well."""
    plan = footprint.plan(200 << 20)
    message = str(planner.refusal(plan, footprint.model, 4096))
    advised = re.search(r"--memory (\w+)", message)
    assert advised is not None
    assert footprint.plan(parse_size(advised.group(1))).fits
    assert "a shorter context (now 4096)" in message
    no_kv = planner.refusal(dataclasses.replace(plan, kv_bytes=0), footprint.model, 4096)
    assert "context" not in str(no_kv)


def test_context_sizes(footprint: planner.Footprint, write_model: ModelWriter) -> None:
    """Guards against a context other than the one that llama.cpp makes."""
    model = read_model(write_model("olmoe"))
    assert [planner.context_size(n, model) for n in (1, 256, 257, 4096, 0)] == [256, 256, 512, 4096, 4096]
    assert planner.context_size(0, footprint.model) == 4096  # the file does not say


def test_plan_grows_with_the_context(write_model: ModelWriter) -> None:
    """Guards against a plan that does not see the options it is given."""
    path = write_model("olmoe")
    plans = [edgemoe.plan(path, memory="1GiB", n_ctx=n) for n in (256, 1024, 8192)]
    assert [p.kv_bytes for p in plans] == sorted({p.kv_bytes for p in plans})
    quantized = edgemoe.plan(path, memory="1GiB", n_ctx=8192, type_k=8, type_v=8, flash_attn=True)
    assert quantized.kv_bytes < 0.6 * plans[-1].kv_bytes
    assert plans[0].budget_bytes == 1 << 30 and plans[0].fits


def test_plan_counts_the_logits_of_every_position(write_model: ModelWriter) -> None:
    """Guards against `logits_all` that the plan does not see.

    Each plan in a process of its own: it counts what its process holds, and here that falls by megabytes whenever
    what earlier tests left is collected.
    """
    script = (
        "import sys, edgemoe; print(edgemoe.plan(sys.argv[1], n_ctx=8192, logits_all=bool(sys.argv[2])).buffers_bytes)"
    )
    command = [sys.executable, "-c", script, str(write_model("olmoe"))]
    with_last, with_all = (int(subprocess.check_output([*command, value])) for value in ("", "all"))
    assert with_all - with_last > 4 * 512 * 8192 - (2 << 20)


def test_plan_of_a_missing_file(tmp_path: Path) -> None:
    """Guards against a plan for nothing."""
    with pytest.raises(edgemoe.EdgeMoeError, match=r"cannot open .*missing\.gguf"):
        edgemoe.plan(tmp_path / "missing.gguf")


def _mixed(down_type: str = "Q4_K", n_used: int = 8) -> GgufModel:
    """OLMoE's shape: 2048 columns for gate and up, 1024 for down; no file."""
    tensors = [
        GgufTensor("blk.0.ffn_gate_exps.weight", (2048, 1024, 64), "Q4_K", 64 * 1024 * 1152, 0, 0),
        GgufTensor("blk.0.ffn_up_exps.weight", (2048, 1024, 64), "Q4_K", 64 * 1024 * 1152, 0, 0),
        GgufTensor("blk.0.ffn_down_exps.weight", (1024, 2048, 64), down_type, 64 * 2048 * 704, 0, 0),
    ]
    metadata = {"general.architecture": "olmoe", "olmoe.expert_count": 64, "olmoe.expert_used_count": n_used}
    return GgufModel(Path("made-up.gguf"), [Path("made-up.gguf")], metadata, tensors)


def test_buffers_hold_what_our_kernels_take() -> None:
    """Guards against activation rows, gathered panels or packing buffers that the budget knows nothing of."""

    def row(n_cols: int) -> int:
        return n_cols + n_cols // 32 * 4 + n_cols // 16 * 4  # PanelBytes

    n_ubatch, n_threads = 512, 16
    huge_page = 2 << 20
    assert n_ubatch * row(2048) + 288 * 1024 < huge_page  # kInterleavedBytes
    least = n_ubatch * (row(2048) + 8 * row(1024)) + n_threads * huge_page
    least += host.N_IO_THREADS * 16 * 1152
    planned = planner._batch_bytes(_mixed(), {"n_ctx": 4096, "n_threads": n_threads})
    assert least <= planned < 1.1 * least


def test_buffers_grow_with_what_they_depend_on() -> None:
    """Guards against a plan that is true for few threads, small batches, or one of the two kernels only."""

    def planned(model: GgufModel, **options: int) -> int:
        return planner._batch_bytes(model, {"n_ctx": 4096, "n_threads": 8, **options})

    assert planned(_mixed(), n_threads_batch=32) == planned(_mixed(), n_threads=32) > planned(_mixed())
    scratch = 8 * (2 << 20)  # of the threads: a huge page each, for 64 tokens as for 512
    assert planned(_mixed(), n_ubatch=64) - scratch < (planned(_mixed()) - scratch) / 6
    assert planned(_mixed(), n_batch=1024, n_ubatch=1024) > planned(_mixed())
    dense = dataclasses.replace(_mixed(), tensors=[])
    assert planned(dense, n_threads=32) == planned(dense)  # no experts, nothing of ours
    assert planned(_mixed(n_used=16)) > planned(_mixed())
    assert planned(_mixed("Q5_0")) > planned(_mixed())  # blocks of both kinds have buffers of their own
    assert planned(_mixed("F16")) > planned(_mixed())
    ggml_rows = 512 * 9 * (2048 * 1.125 + 64)
    assert planned(_mixed(), n_threads=1) >= ggml_rows  # what ggml's rows take: more than ours, with one thread


def test_plan_counts_the_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a plan for another number of threads than the load will have."""
    monkeypatch.setattr(topology, "default_threads", lambda: 24)
    assert planner._batch_bytes(_mixed(), {"n_ctx": 4096}) == planner._batch_bytes(
        _mixed(), {"n_ctx": 4096, "n_threads": 24, "n_threads_batch": 24}
    )
