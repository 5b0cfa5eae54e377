# SPDX-License-Identifier: MIT
"""Reuse-biased routing under llama.cpp's graph: exact at 0 and for prompts, and only the choice of experts changes."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import re
import types
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import llama_cpp as low_level

import edgemoe
from benchmarks import synthetic
from edgemoe import reuse, trace
from edgemoe.converters.evaluate import GgmlTensor
from edgemoe.errors import BackendError
from tests.conftest import ModelWriter
from tests.integration.support import N_VOCAB, logits, set_residency, set_threads, stock, streamed

TOKENS = synthetic.uniform_tokens(20 + 80, N_VOCAB, seed=9)
PROMPT, STEPS = TOKENS[:20], TOKENS[20:]
# Softmax, softmax after top-k with biases, sigmoid with a correction bias and groups, softmax without renormalization.
ROUTERS = [
    "olmoe",
    "qwen3moe",
    "qwen2moe",
    "gpt-oss",
    "deepseek2",
    "deepseek2-v3",
    "deepseek2-merged",
    "llama",
    "granitemoe",
]
WIDE = {"n_experts": 32, "n_experts_used": 4}


def _native(llm: edgemoe.Llama) -> Any:
    assert llm._choosers.selection is not None and llm._choosers.selection._reuse is not None
    return llm._choosers.selection._reuse.native


def _decode(llm: edgemoe.Llama, steps: list[int] = STEPS) -> edgemoe.Stats:
    """Counters of `steps` one by one, after the prompt, with a third of the experts resident."""
    set_threads(llm, 1)
    set_residency(llm, "third")
    llm.eval(PROMPT)
    llm.reset_stats()
    for token in steps:
        llm.eval([token])
    return llm.stats()


@pytest.mark.parametrize("arch", ROUTERS)
def test_no_bias_is_exact_and_every_router_is_recognized(arch: str, write_model: ModelWriter) -> None:
    """Guards against bits that change because a graph is interrupted, and routers that the bias does not find."""
    path = write_model(arch)
    steps = STEPS[:8]
    with contextlib.closing(stock(path)) as reference:
        expected = logits(reference, PROMPT, steps)
    for method in reuse.METHODS:
        with streamed(path, reuse_bias=0.0, reuse_method=method) as llm:
            set_residency(llm, "cycle")
            assert np.array_equal(logits(llm, PROMPT, steps), expected)
            assert _native(llm).stats().n_selections == len(steps) * llm._gguf.n_moe_layers
            stats = llm.stats()
        assert (stats.reuse_bias, stats.selections_changed, stats.gate_mass_moved, stats.kl_estimate) == (0, 0, 0, 0)


@pytest.mark.parametrize("arch", ROUTERS)
def test_bias_changes_tokens_and_reads_less(arch: str, write_model: ModelWriter) -> None:
    """Guards against a bias without effect in some kind of router, and one whose price passes the guard's bounds."""
    path = write_model(arch, **WIDE)
    found = []
    for bias in ("off", 1.0):
        with streamed(path, reuse_bias=bias, prefetch="off") as llm:
            stats = _decode(llm)
            found.append((stats, llm.scores[llm.n_tokens - 1].copy()))
    (off, exact), (on, changed) = found
    assert on.expert_hit_rate > off.expert_hit_rate
    assert on.expert_bytes_read < off.expert_bytes_read
    assert on.selections_changed > 0.01
    assert 0 < on.gate_mass_moved <= reuse.MAX_MASS_MOVED
    assert 0 <= on.kl_estimate <= reuse.MAX_KL
    assert 0 < on.reuse_bias <= 1
    assert not np.array_equal(exact, changed)
    assert (off.selections_changed, off.reuse_bias) == (0, 0)


def test_prompts_stay_exact(write_model: ModelWriter) -> None:
    """Guards against a bias in prompts, where it gains nothing; a prompt of one token is one, too."""
    path = write_model("olmoe", **WIDE)
    with contextlib.closing(stock(path)) as reference, streamed(path, reuse_bias=1.0) as llm:
        set_residency(llm, "third")
        for prompt in (PROMPT, PROMPT[:1]):
            for one in (reference, llm):
                one.reset()
                assert len(list(itertools.islice(one.generate(prompt, temp=0.0), 1))) == 1
            assert np.array_equal(llm.scores[: len(prompt)], reference.scores[: len(prompt)])
        assert _native(llm).stats().n_selections == 0
        list(itertools.islice(llm.generate(PROMPT, temp=0.0), 5))
        assert _native(llm).stats().n_selections == 4 * llm._gguf.n_moe_layers


def _values(tensor: Any, dtype: type) -> Any:
    n = int(np.prod(tensor.ne[:]))
    return np.frombuffer(ctypes.string_at(tensor.data, 4 * n), dtype).copy()


# The nodes that hold what the mixing weights are gathered from, while it does, and the weights.
SEEN_NODES = {
    "olmoe": (r"ffn_moe_weights-\d+", r"ffn_moe_weights-\d+"),
    "qwen3moe": (r"ffn_moe_weights-\d+", r"ffn_moe_weights-\d+"),
    "llama": (r"ffn_moe_weights-\d+", r"ffn_moe_weights-\d+"),
    "deepseek2-v3": (r"ffn_moe_weights-\d+", r"ffn_moe_weights-\d+"),
    "gpt-oss": (r"ffn_moe_probs-\d+", r"ffn_moe_weights_softmax-\d+"),
}


@pytest.mark.parametrize("arch", SEEN_NODES)
def test_weights_are_the_models_own(
    arch: str, write_model: ModelWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against mixing weights of other experts than those that are multiplied, swaps that the rule does not
    allow, and a price in other units: seen in llama.cpp's own nodes, and in what the experts' layers were asked for."""
    seen: list[tuple[Any, Any, Any]] = []
    scores: list[Any] = []
    before, behind = SEEN_NODES[arch]

    def look(address: int, ask: bool, _user_data: Any) -> bool:
        node = ctypes.cast(address, ctypes.POINTER(GgmlTensor)).contents
        name = node.name.decode()
        if ask:
            return bool(re.fullmatch(before, name) or re.fullmatch(behind, name))
        if before != behind and re.fullmatch(before, name):
            scores.append(_values(node, np.single))
        else:
            gathered = node
            while not gathered.src[1]:
                gathered = gathered.src[0].contents
            masses = scores.pop() if before != behind else _values(gathered.src[0].contents, np.single)
            seen.append((masses, _values(gathered.src[1].contents, np.int32), _values(node, np.single)))
        return True

    callback = low_level.ggml_backend_sched_eval_callback(look)
    defaults = low_level.llama_context_default_params

    def with_callback() -> Any:
        params = defaults()
        params.cb_eval = callback
        return params

    monkeypatch.setattr(low_level, "llama_context_default_params", with_callback)
    with streamed(write_model(arch, **WIDE), reuse_bias=1.0, top_j=2, prefetch="off") as llm:
        set_threads(llm, 1)
        set_residency(llm, "third")
        llm.eval(PROMPT)
        seen.clear()
        with llm.record_trace(tmp_path / "trace"):
            for token in STEPS[:30]:
                llm.eval([token])
        n_layers, stats = llm._gguf.n_moe_layers, llm.stats()
    assert len(seen) == 30 * n_layers
    recorded = trace.load(tmp_path / "trace")
    asked = recorded.experts.reshape(len(seen), -1)
    assert recorded.resident is not None
    resident = recorded.resident.reshape(len(seen), -1)
    n_changed, moved, kls = 0, [], []
    for (masses, ids, weights), used, here in zip(seen, asked, resident, strict=True):
        if arch == "gpt-oss":
            mass = np.exp(masses.astype(np.float64) - masses.max())
            assert weights == pytest.approx(mass[ids] / mass[ids].sum(), rel=1e-5)
        else:
            mass = masses.astype(np.float64)
            assert np.array_equal(weights, masses[ids])
        assert ids.tolist() == used[: len(ids)].tolist()
        assert len(set(ids.tolist())) == WIDE["n_experts_used"]
        exact = np.argsort(-masses, kind="stable")[: len(ids)]
        assert arch == "deepseek2-v3" or ids[:2].tolist() == exact[:2].tolist()
        taken, dropped = np.setdiff1d(ids, exact), np.setdiff1d(exact, ids)
        n_changed += len(taken)
        moved.append(mass[dropped].sum() / mass[exact].sum())
        kls.append(np.log(mass[exact].sum() / mass[ids].sum()))
        assert arch == "deepseek2-v3" or here[taken].all()
    if arch == "deepseek2-v3":  # its correction bias and groups decide what is exact
        return
    assert n_changed == round(stats.selections_changed * len(seen) * WIDE["n_experts_used"])
    assert n_changed > 0
    assert stats.gate_mass_moved == pytest.approx(np.mean(moved), rel=1e-6)
    assert stats.kl_estimate == pytest.approx(np.mean(kls), rel=1e-6)


def test_hit_rate_rises_with_the_bias(write_model: ModelWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a bias towards what is not resident, or resident no more when the layer begins."""
    monkeypatch.setattr(reuse, "MAX_MASS_MOVED", 1e9)
    monkeypatch.setattr(reuse, "MAX_KL", 1e9)
    rates = []
    for bias in (0.0, 0.15, 0.4, 1.0):
        with streamed(write_model("olmoe", **WIDE), reuse_bias=bias, prefetch="off", logits_all=False) as llm:
            rates.append(_decode(llm).expert_hit_rate)
    assert rates[0] < rates[1] < rates[2]
    # Only the best two have to be read; with 0.4 already, and then other tokens' experts decide.
    assert min(rates[2:]) > 0.5 > rates[0]


def test_nothing_changes_when_everything_is_resident(write_model: ModelWriter) -> None:
    """Guards against a bias that costs where there is nothing to gain."""
    path = write_model("olmoe", **WIDE)
    with contextlib.closing(stock(path)) as reference:
        expected = logits(reference, TOKENS[:90], STEPS[:5])
    with streamed(path, reuse_bias=1.0) as llm:
        set_residency(llm, "all")
        llm.eval(synthetic.uniform_tokens(200, N_VOCAB, seed=1))
        resident = llm.stats().expert_misses
        found = logits(llm, TOKENS[:90], STEPS[:5])
        assert llm.stats().expert_misses == resident
        assert llm.stats().selections_changed == 0
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kernels", ["auto", "ggml"])
def test_prefetch_drafts_traces_and_profiles_go_on(kernels: str, write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against features that share the hook with the bias, and lose it or lose themselves."""
    path = write_model("olmoe", **WIDE)
    options = {"kernels": kernels, "prefetch": "1", "draft": "ngram", "logits_all": False}
    with streamed(path, reuse_bias=0.5, **options) as llm:
        set_threads(llm, 1)
        set_residency(llm, "third")
        with llm.record_trace(tmp_path / "trace"), llm.profile() as profiler:
            tokens = list(itertools.islice(llm.generate(PROMPT * 3, temp=0.0), 60))
        n_selections = _native(llm).stats().n_selections
        llm._eval_draft(STEPS[:4])  # not through eval: the bias ends with each evaluation
        assert _native(llm).stats().n_selections == n_selections
        n_predicted, stats = llm._runtime.prefetch_stats().predicted, llm.stats()
        layers = llm._gguf.n_moe_layers
    assert len(tokens) == 60
    assert n_selections >= (stats.completion_tokens - 1) * layers
    assert stats.selections_changed > 0
    assert stats.gate_mass_moved <= reuse.MAX_MASS_MOVED
    assert n_predicted > 0
    profile = profiler.result()
    assert profile.decode.n_tokens >= 59
    assert profile.decode.router_s > 0
    assert profile.decode.select_s > 0
    assert trace.load(tmp_path / "trace").experts.shape[0] >= 60


def test_unknown_graphs_are_refused(write_model: ModelWriter) -> None:
    """Guards against a bias that silently does nothing, because llama.cpp's graph is not what it was."""
    with streamed(write_model("olmoe"), reuse_bias=0.5) as llm:
        assert llm._choosers.selection is not None
        llm._choosers.selection._model = types.SimpleNamespace(n_experts=1, path="x.gguf", architecture="new")  # type: ignore[assignment]
        llm.eval(PROMPT)
        with pytest.raises(
            BackendError, match=r"no choice of experts was recognized; use reuse_bias='off', expert_top_k"
        ):
            llm.eval(STEPS[:1])


def test_what_the_model_cannot_do_is_refused(write_model: ModelWriter) -> None:
    """Guards against a top-J that keeps more than there is, and errors that come after a long load only."""
    path = write_model("olmoe")
    for make in (edgemoe.Llama, edgemoe.plan):
        with pytest.raises(BackendError, match=r"cannot keep the best 9 experts: .* use a top_j of at most"):
            make(path, n_ctx=256, reuse_bias=0.5, top_j=9)
        with pytest.raises(ValueError, match="reuse_bias is -1"):
            make(path, n_ctx=256, reuse_bias=-1)
        with pytest.raises(ValueError, match=r"reuse_bias 0\.1 and reuse_price '1%' exclude each other"):
            make(path, n_ctx=256, reuse_bias=0.1, reuse_price="1%")
        with pytest.raises(BackendError, match="cannot keep the best 9 experts"):
            make(path, n_ctx=256, reuse_price="1%", top_j=9)


def test_settings_survive_a_pickle(write_model: ModelWriter) -> None:
    """Guards against a copy that routes otherwise."""
    with streamed(write_model("olmoe"), reuse_bias=0.25, reuse_method="cumulative", top_j=2) as llm:
        state = llm.__getstate__()
    assert (state["reuse_bias"], state["reuse_method"], state["top_j"]) == (0.25, "cumulative", 2)
    assert isinstance(llm, llama_cpp.Llama)
