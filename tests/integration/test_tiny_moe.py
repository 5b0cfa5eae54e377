# SPDX-License-Identifier: MIT
"""The tiny trained model: the measuring stick of everything that changes results has to have learnt something."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tiny_moe import evaluate, specialisation
from benchmarks.tiny_moe.corpus import DOMAINS
from benchmarks.tiny_moe.samples import SAMPLES_PER_DOMAIN, read_samples
from edgemoe.formats.gguf import read_model
from tests.integration.support import sampled, set_residency, stock, streamed

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "tiny_moe.gguf"
MAX_BYTES = 10_000_000

CONTEXT_TOKENS = 512
N_LEAST_SAMPLES = 5


def test_the_file_says_what_it_is() -> None:
    """Guards against a model that was not made by the converter, is too large to commit, or has another shape."""
    model = read_model(MODEL)
    assert MODEL.stat().st_size <= MAX_BYTES
    assert model.architecture == "qwen3moe"
    assert "edgemoe.convert.recipe" in model.metadata and "edgemoe.convert.input_sha256" in model.metadata
    n_experts = {tensor.shape[2] for tensor in model.expert_tensors}
    assert min(n_experts) >= 16 and len(model.expert_tensors) >= 4 * 3


@pytest.mark.parametrize("kernels", ["ggml", "auto"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_greedy_tokens_do_not_depend_on_the_budget(domain: str, kernels: str) -> None:
    """Guards against a trained model whose text depends on the budget or, with ggml's arithmetic, on the engine."""
    text = read_samples(DATA / "tiny_moe")[domain][0].encode()
    with contextlib.closing(stock(MODEL)) as reference, streamed(MODEL, kernels=kernels) as llm:
        prompt = reference.tokenize(text, add_bos=False)[:60]
        assert llm.tokenize(text, add_bos=False)[:60] == prompt
        # Own kernels round otherwise than llama.cpp's: a tie may end otherwise, the same for every budget.
        expected = sampled(reference if kernels == "ggml" else llm, prompt, 40, 0, 0.0)
        for residency in ("all", "third", "cycle"):
            set_residency(llm, residency)
            assert sampled(llm, prompt, 40, 0, 0.0) == expected, residency
        assert llm.stats().expert_misses > 0


def test_experts_specialise_by_domain_and_shuffled_labels_do_not() -> None:
    """Guards against a measuring stick without specialisation, and against a measure that finds it everywhere."""
    uses, labels = specialisation.uses_and_labels(MODEL, read_samples(DATA / "tiny_moe"))
    n_layers, n_experts = uses.shape[1:]
    assert (uses.sum(axis=-1) > 0).all() and n_layers >= 4 and n_experts >= 16
    found = specialisation.measure(uses, labels, n_shuffles=200)
    assert (found.divergence > 1.5 * found.shuffled_max).all(), found
    apart = ~np.eye(len(DOMAINS), dtype=bool)
    assert (found.pairs[:, apart] > 0.1).all(), found.pairs
    shuffled = specialisation.measure(uses, np.random.default_rng(1).permutation(labels), n_shuffles=200)
    assert (shuffled.divergence < found.divergence / 3).all(), shuffled
    assert (shuffled.divergence <= shuffled.shuffled_max).all(), shuffled


def test_held_out_samples_are_predicted() -> None:
    """Guards against samples that are too few or too short to measure with, and against weights that learnt nothing."""
    samples = read_samples(DATA / "tiny_moe")
    with contextlib.closing(evaluate.open_stock(MODEL)) as llm:
        for domain, texts in samples.items():
            assert len(texts) == SAMPLES_PER_DOMAIN >= N_LEAST_SAMPLES
            losses = []
            for text in texts:
                tokens = np.asarray(llm.tokenize(text.encode(), add_bos=False), np.int64)
                assert len(tokens) >= CONTEXT_TOKENS
                losses.append(evaluate.losses_of(llm, tokens[:CONTEXT_TOKENS]).mean())
            assert np.mean(losses) < WORST_LOSS[domain], domain


WORST_LOSS = {"english": 3.75, "spanish": 3.75, "python": 3.0, "arithmetic": 0.9}
"""Nats per token: the model's (tests/data/tiny_moe/README.md) and a quarter at most, and less than bigrams have."""
