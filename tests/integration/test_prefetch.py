# SPDX-License-Identifier: MIT
"""Predictions of the experts of coming layers: how right they are, and what happens where none can be made."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

import edgemoe
from benchmarks import synthetic
from edgemoe import host, replay, routers, trace
from edgemoe.formats.gguf import read_model
from edgemoe.replay_calibration import calibrate
from tests.conftest import ModelWriter
from tests.integration.support import N_VOCAB, ROOT, set_residency, set_threads, streamed

TINY_MOE = ROOT / "tests" / "data"
TOKENS = synthetic.uniform_tokens(16 + 40, N_VOCAB, seed=6)


def _decode(llm: edgemoe.Llama, within: contextlib.AbstractContextManager[Any] | None = None) -> None:
    """All but the first 16 tokens one by one, counted, within that context; a third of the experts resident."""
    set_threads(llm, 1)
    set_residency(llm, "third")
    llm.eval(TOKENS[:16])
    llm.reset_stats()
    with within or contextlib.nullcontext():
        for token in TOKENS[16:]:
            llm.eval([token])


@pytest.mark.parametrize(
    "arch", ["olmoe", "qwen3moe", "qwen2moe", "gpt-oss", "deepseek2", "deepseek2-v3", "llama", "granitemoe"]
)
def test_predictions_are_mostly_right(arch: str, write_model: ModelWriter) -> None:
    """Guards against a router, norm or bias of another layer, or one that is scored otherwise than the model does.

    In these files layers add little to the residual stream, so the next router nearly sees the present state: what is
    mixed up falls to chance, which is a quarter or less.
    """
    path = write_model(arch, n_experts=32, n_experts_used=4, n_layers=4)
    with streamed(path, prefetch="1") as llm:
        _decode(llm)
        found, stats = llm._runtime.prefetch_stats(), llm.stats()
    # Every layer of every token: the first by the token's embedding.
    assert found.predicted == 40 * 4 * llm._gguf.n_moe_layers
    assert found.predicted_right / found.predicted > 0.6, f"{arch}: {found.predicted_right} of {found.predicted}"
    assert stats.prefetch_used_bytes + stats.prefetch_late_bytes > 0
    assert stats.expert_bytes_read >= stats.prefetch_used_bytes + stats.prefetch_late_bytes
    assert stats.bytes_per_token == stats.expert_bytes_read / 40


def test_a_trace_holds_the_predictions_and_calibrates(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against predictions recorded for another layer or token, and a recorded run that its replay cannot use."""
    path = write_model("olmoe", n_experts=32, n_experts_used=4, n_layers=4)
    with streamed(path, prefetch="2") as llm:
        _decode(llm, llm.record_trace(tmp_path / "t"))
        found, stats = llm._runtime.prefetch_stats(), llm.stats()
    recorded = trace.load(tmp_path / "t")
    assert recorded.run == trace.TracedRun(stats.slots_bytes, "auto", "2", host.N_IO_THREADS)
    assert recorded.foreseen is not None
    n_foreseen = (recorded.foreseen >= 0).sum(axis=(0, 1, 3))
    assert n_foreseen[0] == found.predicted == 40 * 4 * llm._gguf.n_moe_layers
    assert n_foreseen[1] == 40 * 4 * llm._gguf.n_moe_layers - 40 * 4, "nobody is two layers ahead of the first"
    assert replay.foreseen_recall(recorded) == found.predicted_right / found.predicted
    # What was read when is the machine's; times by a rule, as those of a busy machine say little.
    wait_us = recorded.read_bytes / 2000
    ends_us = (wait_us + 500).cumsum().reshape(wait_us.shape)
    recorded = dataclasses.replace(recorded, begin_us=ends_us - wait_us - 500, wait_us=wait_us.astype(np.float32))
    calibration = calibrate(recorded)
    assert calibration.wait_us / calibration.read_bytes == pytest.approx(1 / 2000)
    again = replay.replay(
        recorded, slots_bytes=stats.slots_bytes, prefetch="2", disk=calibration.disk, compute=calibration.compute
    )
    # The disk is fitted to this, and the cache of the replay begins empty.
    assert again.decode.stall_us / again.decode.bytes_read == pytest.approx(1 / 2000, rel=0.02)
    computed_us = (again.decode.total_us - again.decode.stall_us) / again.decode.n_tokens
    assert computed_us == pytest.approx(500 * llm._gguf.n_moe_layers, rel=0.02)


def test_predictions_learn() -> None:
    """Guards against corrections that are not applied, or that learn from another layer's, token's or batch's choice.

    On the tiny trained model the routers alone name 0.66 of the experts (0.39 of the first layer's, which the token
    tells).
    """
    with streamed(TINY_MOE / "tiny_moe.gguf", prefetch="1", kernels="auto", n_ctx=512, logits_all=False) as llm:
        set_threads(llm, 1)
        set_residency(llm, "third")
        recalls = []
        for _ in range(2):
            llm.reset_stats()
            for name in ("english-1", "python-1"):
                tokens = llm.tokenize((TINY_MOE / "tiny_moe" / f"{name}.txt").read_bytes())[:250]
                llm.reset()
                llm.eval(tokens[:16])
                for token in tokens[16:]:
                    llm.eval([token])
            found = llm._runtime.prefetch_stats()
            recalls.append(found.predicted_right / found.predicted)
    assert recalls[0] > 0.67
    assert recalls[1] > max(0.75, recalls[0] + 0.05)


@pytest.mark.parametrize(
    "keywords",
    [{}, {"expert_top_k": 2}, {"reuse_bias": 1.0}, {"on_miss": "skip", "on_miss_mass": 0.3}],
    ids=["exact", "fewer", "bias", "skip"],
)
@pytest.mark.parametrize("arch", ["olmoe", "gpt-oss", "deepseek2-v3"])
def test_predictions_are_of_what_will_be_chosen(arch: str, keywords: dict[str, Any], write_model: ModelWriter) -> None:
    """Guards against reading ahead what the model would choose and its choosers will not; in the first layer, too."""
    path = write_model(arch, n_experts=32, n_experts_used=4, n_layers=4)
    with streamed(path, prefetch="1", **keywords) as llm:
        _decode(llm)
        found, stats, n_layers = llm._runtime.prefetch_stats(), llm.stats(), llm._gguf.n_moe_layers
    share_right = found.predicted_right / found.predicted
    # A chosen place that stays empty is no expert: what choosers leave out is not predicted either.
    assert found.chosen == 40 * 4 * n_layers - stats.skipped_experts
    if "on_miss" in keywords:
        assert stats.skipped_experts > 0
        assert found.predicted < 40 * 4 * n_layers
    else:
        assert found.predicted == found.chosen
    assert share_right > 0.6, f"{arch}: {found.predicted_right} of {found.predicted}"


def test_no_prediction_without_routers(write_model: ModelWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a model that cannot be loaded because its routers have other names."""
    path = write_model("olmoe", n_experts=32, n_experts_used=4)
    monkeypatch.setattr("edgemoe.runtime.find_routers", lambda _model: [])
    with streamed(path, prefetch="2") as llm:
        set_residency(llm, "third")
        for token in TOKENS:
            llm.eval([token])
        assert llm._runtime.prefetch_stats().predicted == 0


def test_nothing_is_predicted_when_everything_is_resident(write_model: ModelWriter) -> None:
    """Guards against paying for predictions that nobody needs."""
    with streamed(write_model("olmoe"), prefetch="2") as llm:
        set_residency(llm, "all")
        for token in TOKENS:
            llm.eval([token])
        assert llm._runtime.prefetch_stats().predicted == 0


@pytest.mark.parametrize("dense_quant", ["Q8_0", "F16"])
def test_tensors_are_read_as_gguf_reads_them(dense_quant: str, write_model: ModelWriter) -> None:
    """Guards against weights of another offset or format than the file's."""
    path = write_model("olmoe", dense_quant=dense_quant)
    model = read_model(path)
    by_name = {t.name: t for t in GGUFReader(path).tensors}
    router = routers.find_routers(model)[1]
    assert router.norm is not None and router.layer == 1
    expected = by_name["blk.1.ffn_gate_inp.weight"].data
    assert np.array_equal(routers.read_tensor(model, router.weights), expected)
    embedding = routers.find_embedding(model)
    assert embedding is not None
    values = routers.read_tensor(model, embedding)
    assert values.shape == embedding.shape[::-1]
    with streamed(path, prefetch="1") as llm:
        assert llm._embedding is not None
        assert np.array_equal(llm._embedding.rows([7, 3]), values[[7, 3]])
