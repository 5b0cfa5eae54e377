# SPDX-License-Identifier: MIT
"""Scheduling of QMoE experts: what is lossless keeps every bit, what is lossy is what numpy computes of its choice."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from edgemoe import _native, replay, trace
from edgemoe.cli.main import cli
from edgemoe.errors import BackendError, TraceError
from edgemoe.onnx import PROVIDER, InferenceSession, _register
from tests.integration.onnx_models import Array, Shape, relative_error, write_model
from tests.integration.onnx_routed import FORMS, SCATTERED, RoutedModel, write_routed
from tests.integration.support import await_preloads

SHAPE = Shape(n_layers=4, n_experts=16, k=4, hidden=64, inter=64)
N_PROMPT, N_TOKENS = 8 * 3, 40
TOLERANCE = 1e-5


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


def opened(model: RoutedModel, share: float = 0.3, **keywords: Any) -> InferenceSession:
    """A session with that share of the experts in memory, at least those of one token."""
    keywords = {"warm_start": False, **keywords}
    session = InferenceSession(model.path, "16GiB", _options(), **keywords)
    assert session._runtime is not None
    slots_bytes = max(session.plan.token_cycle_bytes, int(share * session.plan.expert_bank_bytes))
    _native.set_slots_bytes(session._runtime, slots_bytes)
    return session


def outputs(session: InferenceSession, x: Array) -> Array:
    """A prompt in one run, and then token by token."""
    runs = [x[:N_PROMPT], *(x[i : i + 1] for i in range(N_PROMPT, len(x)))]
    return np.concatenate([session.run(None, {"x": rows})[0] for rows in runs])


def traced(session: InferenceSession, x: Array, path: Path) -> tuple[Array, trace.Trace]:
    """As `outputs`; and the trace of the tokens behind the prompt."""
    found = [session.run(None, {"x": x[:N_PROMPT]})[0]]
    with session.record_trace(path):
        found += [session.run(None, {"x": x[i : i + 1]})[0] for i in range(N_PROMPT, len(x))]
    return np.concatenate(found), trace.load(path)


@pytest.mark.parametrize("form", [*FORMS, *SCATTERED])
def test_routers_are_found_and_foretell_the_next_node(tmp_path: Path, form: str) -> None:
    """Guards against: a router that is not found, transposed, without its norm or bias, or with those of another."""
    model = write_routed(tmp_path / "m.onnx", form, SHAPE)
    session = opened(model, prefetch="1")
    outputs(session, model.inputs(N_PROMPT + N_TOKENS))
    stats = session.stats()
    assert stats.n_predicted_nodes == SHAPE.n_layers
    # By chance 0.25; without norms up to 0.87, without biases 0.62. Groups are no part of what is predicted.
    assert stats.predicted == (SHAPE.n_layers - 1) * SHAPE.k * N_TOKENS
    assert stats.predicted_right > (0.7 if form == "groups" else 0.95) * stats.predicted
    assert stats.prefetch_used_bytes + stats.prefetch_late_bytes > 0


def test_float_experts_are_scheduled_as_quantized_ones(tmp_path: Path) -> None:
    """Guards against: inputs of MoE taken for those of QMoE, whose positions are others."""
    model = write_routed(tmp_path / "m.onnx", "gemm", dataclasses.replace(SHAPE, is_quantized=False))
    x = model.inputs(N_PROMPT + N_TOKENS)
    session = opened(model, prefetch="1", reuse_bias=1.0, reuse_method="max-rank")
    found, recorded = traced(session, x, tmp_path / "t.trace")
    expected = model.reference_of_choice(x[N_PROMPT:], recorded.experts, "gemm")
    assert relative_error(found[N_PROMPT:], expected) <= TOLERANCE
    stats = session.stats()
    assert stats.n_predicted_nodes == SHAPE.n_layers
    assert stats.predicted_right > 0.5 * stats.predicted > 0  # a bias chooses others
    assert stats.selections_changed > 0
    quantized = write_routed(tmp_path / "q.onnx", "gemm", SHAPE)
    assert session.plan.prefetch_bytes == opened(quantized, prefetch="1").plan.prefetch_bytes > 0


@pytest.mark.parametrize("keywords", [{"expert_top_k": 2}, {"on_miss": "skip", "on_miss_mass": 0.3}])
def test_predictions_leave_out_what_choosers_will(tmp_path: Path, keywords: dict[str, Any]) -> None:
    """Guards against: experts read ahead that a node will not use."""
    model = write_routed(tmp_path / "m.onnx", "gemm", SHAPE)
    session = opened(model, prefetch="1", **keywords)
    outputs(session, model.inputs(N_PROMPT + N_TOKENS))
    stats = session.stats()
    assert stats.predicted_right > 0.8 * stats.predicted > 0
    n_of_model = (SHAPE.n_layers - 1) * SHAPE.k * N_TOKENS
    if "expert_top_k" in keywords:
        assert stats.predicted == n_of_model * 2 // SHAPE.k
    else:
        assert stats.predicted < n_of_model


def test_a_router_that_is_none_is_left_alone(tmp_path: Path) -> None:
    """Guards against: predictions from a matrix that is not what ranks the experts."""
    model = write_routed(tmp_path / "m.onnx", "computed", SHAPE)
    session = opened(model, prefetch="2")
    outputs(session, model.inputs(N_PROMPT + 4))
    assert session.stats().n_predicted_nodes == session.stats().predicted == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_no_lossless_keyword_changes_a_bit(tmp_path: Path, share: float) -> None:
    """Guards against: an expert computed with another's bytes because it was read ahead, kept or evicted."""
    model = write_routed(tmp_path / "m.onnx", "gemm", SHAPE)
    x = model.inputs(N_PROMPT + 8)
    expected = outputs(opened(model, 1.0, prefetch="off", eviction="lru"), x)
    _, scores, _ = model.routed(x[:1].astype(np.float64), 0, "gemm")
    chosen = np.argsort(-scores[:, None], axis=-1)[..., : SHAPE.k]
    assert relative_error(expected[:1], x[:1]) > 1e-3  # the experts count
    assert chosen.shape == (1, 1, SHAPE.k)
    for prefetch in ("off", "auto", "1", "2"):
        for eviction in _native.EVICTION_RULES:
            session = opened(model, share, prefetch=prefetch, eviction=eviction)
            np.testing.assert_array_equal(outputs(session, x), expected, err_msg=f"{prefetch} {eviction}")


@pytest.mark.parametrize(
    "keywords",
    [{"reuse_bias": 0}, {"expert_top_k": SHAPE.k}, {"expert_top_k": "top-p:1"}, {"on_miss": "skip", "on_miss_mass": 1}],
)
@pytest.mark.parametrize("form", ["softmax_weights", "sigmoid_bias", "matmul_add"])
def test_levers_at_rest_change_no_bit(tmp_path: Path, form: str, keywords: dict[str, Any]) -> None:
    """Guards against: another order of experts, or other mixing weights, where the choice is the model's."""
    model = write_routed(tmp_path / "m.onnx", form, SHAPE)
    x = model.inputs(N_PROMPT + 12)
    session = opened(model, **keywords)
    np.testing.assert_array_equal(outputs(session, x), outputs(opened(model), x))
    stats = session.stats()
    assert stats.selections_changed == stats.gate_mass_moved == stats.kl_estimate == stats.skipped_experts == 0


@pytest.mark.parametrize("form", ["softmax_weights", "sigmoid_bias", "matmul_add"])
def test_a_bias_prefers_residents_and_computes_what_it_chose(tmp_path: Path, form: str) -> None:
    """Guards against: mixing weights of the experts that were not chosen, experts chosen that are neither the model's
    nor resident, a best expert that is given up, and prompts that are changed."""
    model = write_routed(tmp_path / "m.onnx", form, SHAPE)
    x = model.inputs(N_PROMPT + N_TOKENS)
    session = opened(model, reuse_bias=1.0, reuse_method="max-rank", top_j=1, prefetch="off")
    found, recorded = traced(session, x, tmp_path / "t.trace")
    np.testing.assert_array_equal(found[:N_PROMPT], outputs(opened(model), x)[:N_PROMPT])
    expected = model.reference_of_choice(x[N_PROMPT:], recorded.experts, form)
    assert relative_error(found[N_PROMPT:], expected) <= TOLERANCE
    assert recorded.resident is not None
    n_other = 0
    for token in range(N_TOKENS):
        _, scores, _ = model.routed(x[None, N_PROMPT + token].astype(np.float64), 0, form)
        order = np.argsort(-scores[0])
        chosen = recorded.experts[token, 0]
        assert order[0] in chosen
        others = set(chosen.tolist()) - set(order[: SHAPE.k].tolist())
        assert all(recorded.resident[token, 0, list(others)])
        n_other += len(others)
    stats = session.stats()
    assert n_other > 0 < stats.selections_changed
    assert stats.gate_mass_moved > 0 < stats.reuse_bias


@pytest.mark.parametrize(
    "keywords", [{"expert_top_k": 2}, {"expert_top_k": "top-p:0.5"}, {"on_miss": "skip", "on_miss_mass": 0.3}]
)
@pytest.mark.parametrize("form", ["softmax_weights", "matmul_add"])
def test_experts_left_out_have_no_weight(tmp_path: Path, form: str, keywords: dict[str, Any]) -> None:
    """Guards against: a place without an expert that is computed, or that has a part in what weights are divided by."""
    model = write_routed(tmp_path / "m.onnx", form, SHAPE)
    x = model.inputs(N_PROMPT + N_TOKENS)
    session = opened(model, **keywords)
    found, recorded = traced(session, x, tmp_path / "t.trace")
    expected = model.reference_of_choice(x[N_PROMPT:], recorded.experts, form)
    assert relative_error(found[N_PROMPT:], expected) <= TOLERANCE
    n_left_out = int((recorded.experts < 0).sum())
    assert session.stats().skipped_experts == n_left_out > 0
    if keywords.get("expert_top_k") == 2:
        assert n_left_out == SHAPE.n_layers * N_TOKENS * (SHAPE.k - 2)


def test_map_counts_by_logits_and_refuses_other_scores(tmp_path: Path) -> None:
    """Guards against: sigmoids, which are all positive, taken for logits."""
    model = write_routed(tmp_path / "m.onnx", "gemm", SHAPE)
    x = model.inputs(N_PROMPT + 8)
    _, recorded = traced(opened(model, expert_top_k="map"), x, tmp_path / "t.trace")
    _, logits, _ = model.routed(x[N_PROMPT:].astype(np.float64), 0, "gemm")
    expected = np.clip((logits > 0).sum(-1), 1, SHAPE.k)
    np.testing.assert_array_equal((recorded.experts[:, 0] >= 0).sum(-1), expected)
    other = write_routed(tmp_path / "s.onnx", "sigmoid_bias", SHAPE)
    with pytest.raises(BackendError, match="cannot count experts by their logits: node moe0"):
        opened(other, expert_top_k="map")


@pytest.mark.parametrize("form", SCATTERED)
def test_a_bias_without_scores_is_refused(tmp_path: Path, form: str) -> None:
    """Guards against: experts chosen by a score that stands for none."""
    model = write_routed(tmp_path / "m.onnx", form, SHAPE)
    with pytest.raises(BackendError, match=r"cannot bias routing.*scores of the experts that they choose alone"):
        opened(model, reuse_bias=0.5)


def test_scores_that_stand_for_none_leave_the_choice_alone(tmp_path: Path) -> None:
    """Guards against: the same where the graph does not show it, since the scores are inputs of the model."""
    model = write_model(tmp_path / "m.onnx", SHAPE)
    exact = InferenceSession(model.path, "16GiB", _options(), warm_start=False)
    biased = InferenceSession(
        model.path, "16GiB", _options(), reuse_bias=1.0, reuse_method="max-rank", warm_start=False
    )
    for seed in range(12):
        feed = model.feed(1, seed)
        for layer in range(SHAPE.n_layers):
            scores = feed[f"router{layer}"]
            scores[scores < np.sort(scores)[:, -SHAPE.k, None]] = -1e4
        np.testing.assert_array_equal(biased.run(None, feed)[0], exact.run(None, feed)[0])
    assert biased.stats().selections_changed == 0


def test_a_trace_is_replayed_and_shown(tmp_path: Path) -> None:
    """Guards against: a trace that the tools cannot read, or whose bytes are not those that were read."""
    model = write_routed(tmp_path / "m.onnx", "gemm", SHAPE)
    x = model.inputs(N_PROMPT + N_TOKENS)
    session = opened(model, prefetch="off", eviction="lru")
    session.run(None, {"x": x[:N_PROMPT]})
    session.reset_stats()
    path = tmp_path / "t.trace"
    with session.record_trace(path), pytest.raises(TraceError, match="one is being recorded"):
        with session.record_trace(tmp_path / "other"):
            pass
    with session.record_trace(path) as check:
        for i in range(N_PROMPT, len(x)):
            session.run(None, {"x": x[i : i + 1]})
        check()
    stats, recorded = session.stats(), trace.load(path)
    assert stats.n_tokens == recorded.n_tokens == recorded.n_batches == N_TOKENS
    assert recorded.read_bytes.sum() == stats.expert_bytes_read > 0
    assert stats.bytes_per_token == stats.expert_bytes_read / N_TOKENS
    result = replay.replay(recorded, eviction="lru", slots_bytes=stats.slots_bytes)
    counted = result.all.hits + result.all.misses + result.all.late_hits
    assert counted == stats.expert_hits + stats.expert_misses + stats.expert_late_hits
    assert 0.5 < result.all.bytes_read / stats.expert_bytes_read < 2
    shown = CliRunner().invoke(cli, ["trace", "show", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "m.onnx" in shown.output


def test_the_next_session_starts_warm(tmp_path: Path) -> None:
    """Guards against: a hot set that is not saved when a session is gone, or read into the wrong places."""
    model = write_routed(tmp_path / "m.onnx", "gemm", SHAPE)
    x = model.inputs(N_PROMPT + N_TOKENS)
    expected = outputs(opened(model, 1.0), x)
    session = opened(model, 1.0, warm_start=True)
    outputs(session, x)
    del session
    gc.collect()
    session = InferenceSession(model.path, "16GiB", _options())
    await_preloads(session)
    assert session._runtime is not None
    assert session._runtime.preload_stats().read_bytes > 0
    np.testing.assert_array_equal(outputs(session, x), expected)
    assert session.stats().expert_misses == 0
    data = model.path.with_name("m.onnx.data")
    data.touch()  # not what the key is made of
    assert _preloaded_bytes(model) > 0
    with data.open("r+b") as file:
        file.write(bytes(8))  # the first node's experts
    assert _preloaded_bytes(model) == 0


def _preloaded_bytes(model: RoutedModel) -> int:
    """What a session has read before it is used."""
    session = InferenceSession(model.path, "16GiB", _options())
    assert session._runtime is not None
    await_preloads(session)
    return int(session._runtime.preload_stats().read_bytes)


def test_counters_that_begin_again_do_not_empty_the_slots(tmp_path: Path) -> None:
    """Guards against: a budget that takes what lies in slots for something else, because nothing was read since."""
    model = write_routed(tmp_path / "m.onnx", "gemm", SHAPE)
    session = InferenceSession(model.path, "16GiB", _options(), warm_start=False)
    session.run(None, {"x": model.inputs(N_PROMPT)})
    share = session._memory._share
    assert share is not None
    resident = share.resident_slots_bytes()
    assert resident > 0
    session.reset_stats()
    assert session.stats().n_tokens == session.stats().expert_bytes_read == 0
    assert share.resident_slots_bytes() == resident


def test_predictions_are_planned_for(tmp_path: Path) -> None:
    """Guards against: memory of the predictor that no budget knows of."""
    model = write_routed(tmp_path / "m.onnx", "gemm", SHAPE)
    planned = {p: opened(model, prefetch=p).plan for p in ("off", "1", "2", "auto")}
    assert planned["off"].prefetch_bytes == 0 < planned["1"].prefetch_bytes < planned["2"].prefetch_bytes
    assert planned["auto"].prefetch_bytes == planned["2"].prefetch_bytes
    assert planned["2"].workspace_bytes - planned["off"].workspace_bytes == planned["2"].prefetch_bytes


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"eviction": "mru"}, "unknown eviction 'mru'"),
        ({"prefetch": "3"}, "unknown prefetch '3'"),
        ({"reuse_bias": "auto"}, "for GGUF models"),
        ({"reuse_bias": 1.5}, "from 0"),
        ({"expert_top_k": "lexi:3"}, "for GGUF models"),
        ({"expert_top_k": 0}, "expert_top_k is 0"),
        ({"on_miss": "lowbit"}, "for GGUF models"),
        ({"on_miss": "skip", "on_miss_mass": 2}, "on_miss_mass is 2"),
    ],
)
def test_keywords_that_make_no_sense_are_refused(tmp_path: Path, keywords: dict[str, Any], message: str) -> None:
    """Guards against: a keyword of GGUF models that is ignored here."""
    with pytest.raises(ValueError, match=message):
        InferenceSession(tmp_path / "none.onnx", **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"expert_top_k": 5}, "expert_top_k 5: expected at most the model's 4"),
        ({"reuse_bias": 0.1, "top_j": 5}, "top_j 5"),
    ],
)
def test_what_the_model_cannot_do_is_refused(tmp_path: Path, keywords: dict[str, Any], message: str) -> None:
    """Guards against: more experts asked for than a token has."""
    model = write_routed(tmp_path / "m.onnx", "gemm", SHAPE)
    with pytest.raises(BackendError, match=message):
        opened(model, **keywords)


def test_other_hosts_give_options_to_the_provider(tmp_path: Path) -> None:
    """Guards against: options that only our Python can give, and wrong ones that are ignored."""
    model = write_routed(tmp_path / "m.onnx", "gemm", SHAPE)
    _register()
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == PROVIDER]

    def run(**given: str) -> Array:
        options = _options()
        options.log_severity_level = 4
        options.add_provider_for_devices(devices[:1], {"slots_bytes": str(1 << 22), **given})
        session = onnxruntime.InferenceSession(str(model.path), options, enable_fallback=0)
        found: Array = session.run(None, {"x": model.inputs(1)})[0]
        return found

    exact = run(prefetch="off")
    np.testing.assert_array_equal(run(prefetch="2", eviction="lfu"), exact)
    np.testing.assert_array_equal(run(eviction=str(_native.EVICTION_RULES["utility"])), exact)
    assert np.any(run(expert_top_k="1") != exact)
    for name, value in (
        ("prefetch", "3"),
        ("eviction", "mru"),
        ("reuse_bias", "2"),
        ("reuse_method", "x"),
        ("expert_top_k", "top-p:2"),
        ("expert_top_k", "map:3"),
        ("on_miss", "lowbit"),
        ("on_miss_mass", "a"),
        ("n_threads", "-1"),
    ):
        with pytest.raises(Exception, match=f"option {name} of {PROVIDER}: '{value}', expected"):
            run(**{name: value})
