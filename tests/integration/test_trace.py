# SPDX-License-Identifier: MIT
"""A trace of a real model: the experts that llama.cpp chose, the counts of the statistics, and the same bits."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from benchmarks import synthetic
from edgemoe import runtime, trace
from edgemoe.converters.evaluate import GgmlTensor
from edgemoe.errors import TraceError
from tests.conftest import ModelWriter
from tests.integration.support import N_VOCAB, StockLlama, logits, set_residency, stock, streamed

# 64 + 6 tokens in two batches, then one by one.
TOKENS = synthetic.uniform_tokens(70 + 12, N_VOCAB, seed=3)
PROMPT, STEPS = TOKENS[:70], TOKENS[70:]
BATCHES = [64, 6] + [1] * 12


def chosen_by_llama_cpp(path: Path, name: str, dtype: type[Any], dimensions: int) -> dict[int, npt.NDArray[Any]]:
    """Values of the graph nodes `name`-layer in stock llama.cpp: [token, used] by layer, all batches one after another.

    The nodes are [used, token] in ggml's order, or, with three dimensions, [1, used, token].
    """
    found: dict[int, list[npt.NDArray[Any]]] = {}

    def watch(address: int, is_question: bool, _user_data: int | None) -> bool:
        tensor = ctypes.cast(address, ctypes.POINTER(GgmlTensor))[0]
        node, _, layer = tensor.name.decode().rpartition("-")
        if node != name or is_question:
            return node == name
        first = dimensions - 2
        n_used, n_tokens, stride = tensor.ne[first], tensor.ne[first + 1], tensor.nb[first + 1]
        n_bytes = stride * (n_tokens - 1) + 4 * n_used
        data = np.frombuffer(ctypes.string_at(tensor.data, n_bytes), np.uint8)
        rows = [data[stride * t : stride * t + 4 * n_used].view(dtype) for t in range(n_tokens)]
        found.setdefault(int(layer), []).append(np.array(rows))
        return True

    callback = llama_cpp.ggml_backend_sched_eval_callback(watch)

    class Watched(StockLlama):
        @property
        def context_params(self) -> Any:
            return self._context_params

        @context_params.setter
        def context_params(self, params: Any) -> None:
            params.cb_eval = callback
            self._context_params = params

    with contextlib.closing(stock(path, cls=Watched)) as llm:
        logits(llm, PROMPT, STEPS)
    return {layer: np.concatenate(rows) for layer, rows in sorted(found.items())}


@pytest.mark.parametrize("arch", ["olmoe", "qwen2moe", "gpt-oss", "deepseek2-v3", "deepseek2-merged", "granitemoe"])
def test_trace_is_what_llama_cpp_chose_and_what_was_counted(
    arch: str, write_model: ModelWriter, tmp_path: Path
) -> None:
    """Guards against a trace of other experts, of other costs than the statistics', and against other bits."""
    path = write_model(arch)
    expected = chosen_by_llama_cpp(path, "ffn_moe_topk", np.int32, 2)
    with streamed(path) as llm:
        set_residency(llm, "third")
        plain = logits(llm, PROMPT, STEPS)
        llm.reset_stats()
        with llm.record_trace(tmp_path / "t") as check:
            recorded = logits(llm, PROMPT, STEPS)
            check()
        stats = llm.stats()
        model = llm._gguf
    np.testing.assert_array_equal(recorded, plain)
    found = trace.load(tmp_path / "t")
    assert found.model == path.name
    assert [layer.layer for layer in found.layers] == list(expected) and len(expected) == model.n_moe_layers
    assert np.bincount(found.batch_of_token).tolist() == BATCHES
    for i, (layer, ids) in enumerate(expected.items()):
        np.testing.assert_array_equal(found.experts[:, i], ids, err_msg=f"layer {layer}")
        assert found.layers[i].n_experts == model.n_experts
        assert sum(found.layers[i].slice_bytes) * model.n_experts * model.n_moe_layers == (
            runtime.slot_sizes(model, 0).bank_slot_bytes
        )
    assert found.resident is not None
    distinct = np.zeros_like(found.resident)
    for token, batch in enumerate(found.batch_of_token):
        for i in range(len(found.layers)):
            distinct[batch, i, found.experts[token, i]] = True
    assert (distinct & found.resident).sum() == stats.expert_hits > 0
    assert (distinct & ~found.resident).sum() == stats.expert_misses + stats.expert_late_hits > 0
    assert found.read_bytes.sum() == stats.expert_bytes_read
    assert found.wait_us.sum(dtype=np.float64) == pytest.approx(stats.stall_s * 1e6, rel=1e-3, abs=10)
    assert (np.diff(found.begin_us.ravel()) > 0).all()


def test_weights_are_those_of_llama_cpp(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against weights of other tokens, or before they are normalized and scaled."""
    path = write_model("olmoe")
    expected = chosen_by_llama_cpp(path, "ffn_moe_weights", np.float32, 3)
    with streamed(path, kernels="auto") as llm:
        if llm.stats().kernels == "ggml":
            pytest.skip("this CPU has only the portable kernels")
        with llm.record_trace(tmp_path / "t"):
            logits(llm, PROMPT, STEPS)
    found = trace.load(tmp_path / "t")
    # The first layer's input does not depend on who multiplies by experts.
    np.testing.assert_array_equal(found.weights[:, 0], expected[0])
    assert not np.isnan(found.weights).any()


def test_last_layer_of_a_prompt_has_its_last_token(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against a batch cut in two, or a choice given to another token, where few logits are wanted."""
    path = write_model("olmoe")
    with streamed(path) as llm:
        with llm.record_trace(tmp_path / "all"):
            logits(llm, PROMPT, STEPS)
    with streamed(path, logits_all=False) as llm, llm.record_trace(tmp_path / "last"):
        llm.eval(PROMPT)
        for token in STEPS:
            llm.eval([token])
    all_logits, last_logits = trace.load(tmp_path / "all"), trace.load(tmp_path / "last")
    np.testing.assert_array_equal(last_logits.batch_of_token, all_logits.batch_of_token)
    np.testing.assert_array_equal(last_logits.experts[:, :-1], all_logits.experts[:, :-1])
    wanted = np.flatnonzero(np.diff(all_logits.batch_of_token, append=-1))
    expected = np.full_like(all_logits.experts[:, -1], -1)
    expected[wanted] = all_logits.experts[wanted, -1]
    np.testing.assert_array_equal(last_logits.experts[:, -1], expected)


def test_recordings_that_cannot_be(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against a crash or a silent loss where a recording cannot be made, and files left of those."""
    with streamed(write_model("olmoe")) as llm:
        with pytest.raises(TraceError, match=r"create failed: .*none/t"), llm.record_trace(tmp_path / "none" / "t"):
            pass
        with llm.record_trace(tmp_path / "t"):
            with pytest.raises(TraceError, match="one is being recorded"), llm.record_trace(tmp_path / "u"):
                pass
        with contextlib.suppress(KeyboardInterrupt), llm.record_trace(tmp_path / "v"):
            llm.eval(STEPS)
            raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t", "v"]
    assert trace.load(tmp_path / "t").n_tokens == 0
    assert trace.load(tmp_path / "v").n_tokens == len(STEPS)
