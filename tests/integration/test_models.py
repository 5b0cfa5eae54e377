# SPDX-License-Identifier: MIT
"""Several models and contexts in one process, and the forms a model comes in: split, dense, with adapters."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

import edgemoe
from benchmarks import synthetic
from edgemoe.errors import AdapterError, ModelFormatError
from tests.conftest import ModelWriter
from tests.integration.support import (
    N_VOCAB,
    Logits,
    logits,
    python,
    set_fewest_slots,
    set_residency,
    stock,
    streamed,
)

TOKENS = synthetic.uniform_tokens(60, N_VOCAB, seed=4)
PROMPT, STEPS = TOKENS[:50], TOKENS[50:]
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}


# ---------------------------------------------------------------- several models and contexts


def test_two_models_take_turns(write_model: ModelWriter) -> None:
    """Guards against two runtimes in one process that serve each other's experts."""
    paths = [write_model("olmoe"), write_model("gpt-oss")]
    expected = []
    for path in paths:
        with contextlib.closing(stock(path, **ONE_THREAD)) as reference:
            expected.append(logits(reference, PROMPT, STEPS))
    with streamed(paths[0], **ONE_THREAD) as first, streamed(paths[1], **ONE_THREAD) as second:
        for llm in (first, second):
            set_residency(llm, "cycle")
            llm.eval(PROMPT)
        for token in STEPS:
            first.eval([token])
            second.eval([token])
        for llm, bits in zip((first, second), expected, strict=True):
            assert np.array_equal(llm.scores[: llm.n_tokens], bits)
    # The same file twice, and one of them closed in between.
    with streamed(paths[0], **ONE_THREAD) as first:
        with streamed(paths[0], **ONE_THREAD) as second:
            assert np.array_equal(logits(second, PROMPT, STEPS), expected[0])
        assert np.array_equal(logits(first, PROMPT, STEPS), expected[0])


def test_stock_models_do_not_notice(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against a plug-in that claims the experts of models that are not ours."""
    path = write_model("olmoe")
    script = """
        import sys
        import numpy as np
        from benchmarks import synthetic
        from tests.integration.support import logits, stock
        tokens = synthetic.uniform_tokens(60, 512, seed=4)
        with_edgemoe = sys.argv[3] == "with"
        if with_edgemoe:
            from tests.integration.support import streamed
            ours = streamed(sys.argv[1], n_threads=1)
            ours.eval(tokens)
            before = ours.stats()
        reference = stock(sys.argv[1], n_threads=1, n_threads_batch=1)
        np.save(sys.argv[2], logits(reference, tokens[:50], tokens[50:]))
        if with_edgemoe:
            after = ours.stats()
            assert after == __import__("dataclasses").replace(before, peak_rss_bytes=after.peak_rss_bytes)
            ours.close()
            reference.reset()
            reference.eval(tokens)  # outlives ours
        reference.close()
    """
    for mode in ("without", "with"):
        done = python(script, path, tmp_path / f"{mode}.npy", mode)
        assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "with.npy"), np.load(tmp_path / "without.npy"))


class _Context:
    """A further context of a loaded model, through llama.cpp's own functions."""

    def __init__(self, model: Any, n_threads: int = 1) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 256, 64, 64
        params.n_threads = params.n_threads_batch = n_threads
        self._ctx = llama_cpp.llama_init_from_model(model, params)
        assert self._ctx

    def logits(self, tokens: list[int]) -> Logits:
        """Logits after the first 40 tokens and after each further one."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._ctx), True)
        rows = []
        for batch in (tokens[:40], *([t] for t in tokens[40:])):
            array = (llama_cpp.llama_token * len(batch))(*batch)
            code = llama_cpp.llama_decode(self._ctx, llama_cpp.llama_batch_get_one(array, len(batch)))
            assert code == 0
            pointer = llama_cpp.llama_get_logits_ith(self._ctx, -1)
            rows.append(np.ctypeslib.as_array(pointer, shape=(N_VOCAB,)).copy())
        return np.stack(rows)

    def close(self) -> None:
        llama_cpp.llama_free(self._ctx)


@pytest.mark.parametrize("arch", ["olmoe", "gpt-oss"])
def test_two_contexts_share_one_model(arch: str, write_model: ModelWriter) -> None:
    """Guards against contexts that wait for each other's slots for ever, or take each other's experts."""
    n_contexts, n_rounds = 3, 4
    path = write_model(arch, n_experts=16, n_experts_used=4)
    prompts = [synthetic.uniform_tokens(60, N_VOCAB, seed=10 + i) for i in range(n_contexts)]
    with contextlib.closing(stock(path, **ONE_THREAD)) as reference:
        with contextlib.closing(_Context(reference._model.model)) as context:
            expected = [context.logits(tokens) for tokens in prompts]
    found: dict[tuple[int, int], Logits] = {}
    with streamed(path, **ONE_THREAD) as llm:
        set_fewest_slots(llm)
        contexts = [_Context(llm._model.model) for _ in range(n_contexts)]

        def work(i: int) -> None:
            for n in range(n_rounds):
                found[i, n] = contexts[i].logits(prompts[i])

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(n_contexts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=300)
        assert not any(thread.is_alive() for thread in threads), "contexts wait for each other"
        for context in contexts:
            context.close()
    assert len(found) == n_contexts * n_rounds
    for (i, _), bits in found.items():
        assert np.array_equal(bits, expected[i])


def test_slots_change_while_a_context_computes(write_model: ModelWriter) -> None:
    """Guards against a resize that takes a slot which another thread reads."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    tokens = synthetic.uniform_tokens(60, N_VOCAB, seed=1)
    with streamed(path, **ONE_THREAD) as llm:
        context = _Context(llm._model.model)
        expected = context.logits(tokens)
        found: list[Logits] = []
        thread = threading.Thread(target=lambda: found.extend(context.logits(tokens) for _ in range(8)), daemon=True)
        thread.start()
        i = 0
        while thread.is_alive() and i < 20_000:
            set_residency(llm, ("all", "cycle", "third")[i % 3])
            i += 1
        thread.join(timeout=300)
        assert not thread.is_alive(), "a resize and a layer wait for each other"
        context.close()
    assert len(found) == 8 and i > 3
    for bits in found:
        assert np.array_equal(bits, expected)


# ---------------------------------------------------------------- files: split, dense, adapters


def test_split_model(write_model: ModelWriter) -> None:
    """Guards against an expert that is looked for in the wrong file."""
    whole, split = write_model("qwen2moe", n_layers=4), write_model("qwen2moe", n_layers=4, n_splits=3)
    assert split.name.endswith("-00001-of-00003.gguf")
    with contextlib.closing(stock(whole, **ONE_THREAD)) as reference, streamed(split, **ONE_THREAD) as llm:
        expected = logits(reference, PROMPT, STEPS)
        for residency in ("all", "cycle"):
            set_residency(llm, residency)
            assert np.array_equal(logits(llm, PROMPT, STEPS), expected)
        assert len({t.file_idx for t in llm._gguf.expert_tensors}) == 2


def test_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a model without experts that is refused, or streamed in silence."""
    monkeypatch.setattr(synthetic, "_check_shape", lambda shape: None)  # it wants a layer with experts
    path = synthetic.write_model(tmp_path / "dense.gguf", "deepseek2", n_dense_layers=3)
    with caplog.at_level(logging.WARNING, logger="edgemoe"):
        llm = streamed(path, **ONE_THREAD)
    assert [r.getMessage() for r in caplog.records] == [f"{path} has no routed experts: it runs as plain llama.cpp"]
    with llm, contextlib.closing(stock(path, **ONE_THREAD)) as reference:
        assert np.array_equal(logits(llm, PROMPT, STEPS), logits(reference, PROMPT, STEPS))
        assert (llm.stats().n_slots, llm.plan.slots_bytes, llm.plan.n_experts) == (0, 0, 0)
        llm.set_memory("2GiB")
        assert llm.stats().budget_bytes == 2 << 30
        llm.reset_stats()
    assert edgemoe.plan(path, n_ctx=256).expert_bank_bytes == 0


def _write_adapter(path: Path, tensors: dict[str, tuple[int, ...]], rank: int = 4) -> Path:
    """A LoRA adapter for tensors of these shapes (…, rows, values)."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, (*outer, rows, values) in tensors.items():
        writer.add_tensor(f"{name}.lora_a", rng.normal(0, 0.3, (*outer, rank, values)).astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", rng.normal(0, 0.3, (*outer, rows, rank)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_adapter_of_the_dense_part(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against an adapter that is lost because experts are streamed."""
    path = write_model("olmoe")
    adapter = _write_adapter(
        tmp_path / "lora.gguf", {"blk.0.attn_q.weight": (256, 256), "blk.1.attn_output.weight": (256, 256)}
    )
    with contextlib.closing(stock(path, **ONE_THREAD)) as plain:
        without = logits(plain, PROMPT, STEPS)
    options = {"lora_path": str(adapter), **ONE_THREAD}
    with contextlib.closing(stock(path, **options)) as reference:
        expected = logits(reference, PROMPT, STEPS)
    assert not np.array_equal(expected, without)
    with streamed(path, **options) as llm:
        set_residency(llm, "cycle")
        assert np.array_equal(logits(llm, PROMPT, STEPS), expected)
    with (
        contextlib.closing(stock(path, lora_scale=0.5, **options)) as reference,
        streamed(path, lora_scale=0.5, **options) as llm,
    ):
        assert np.array_equal(logits(llm, PROMPT, STEPS), logits(reference, PROMPT, STEPS))


def test_adapter_of_experts_is_refused(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against an adapter that changes experts which are read from the file as they are."""
    adapter = _write_adapter(tmp_path / "experts.gguf", {"blk.1.ffn_down_exps.weight": (8, 256, 256)})
    with pytest.raises(AdapterError, match=r"experts\.gguf.*blk\.1\.ffn_down_exps\.weight"):
        streamed(write_model("olmoe"), lora_path=str(adapter))


def test_adapter_that_does_not_fit(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against an adapter of another model, or a missing one, that is ignored or crashes."""
    other = _write_adapter(tmp_path / "other.gguf", {"blk.0.attn_q.weight": (64, 64)})
    with pytest.raises(AdapterError, match=r"other\.gguf"):
        streamed(write_model("olmoe"), lora_path=str(other))
    with pytest.raises(ModelFormatError, match=r"missing\.gguf"):
        streamed(write_model("olmoe"), lora_path=str(tmp_path / "missing.gguf"))


def test_progress_is_reported(write_model: ModelWriter) -> None:
    """Guards against a progress bar that never ends."""
    calls: list[tuple[str, int, int]] = []
    streamed(write_model("olmoe"), progress=lambda *call: calls.append(call)).close()
    stages = [stage for stage, _, _ in calls]
    assert stages[0] == "planning" and stages[-1] == "loading"
    assert calls[-1][1] == calls[-1][2] > 0
