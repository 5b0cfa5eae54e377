# SPDX-License-Identifier: MIT
"""`edgemoe.Llama` is a `llama_cpp.Llama`: what works there works here and gives the same."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

import edgemoe
from benchmarks import synthetic
from edgemoe import host, runtime
from edgemoe.errors import BudgetError
from tests.conftest import ModelWriter
from tests.integration.support import (
    N_VOCAB,
    await_no_more,
    logits,
    python,
    set_residency,
    stock,
    streamed,
)

TOKENS = synthetic.uniform_tokens(60, N_VOCAB, seed=4)
PROMPT, STEPS = TOKENS[:50], TOKENS[50:]
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}

STATS_FIELDS = """prompt_tokens, completion_tokens, prefill_tokens_per_s, decode_tokens_per_s, ttft_s, load_s,
    load_bytes_read, expert_hits, expert_misses, expert_late_hits, expert_bytes_read, bytes_per_token,
    prefetch_used_bytes, prefetch_late_bytes, prefetch_wasted_bytes, stall_s, n_slots, slots_bytes,
    peak_rss_bytes, budget_bytes, kernels, drafted_tokens, accepted_tokens, reuse_bias, selections_changed,
    gate_mass_moved, kl_estimate, lowbit_hits, skipped_experts, reuse_price_target, reuse_price_expected,
    reused_tokens"""
PLAN_FIELDS = """fits, budget_bytes, floor_bytes, dense_bytes, kv_bytes, buffers_bytes, slots_bytes, slack_bytes,
    token_cycle_bytes, expert_bank_bytes, n_experts, n_experts_used, n_moe_layers, prefetch_bytes,
    draft_buffers_bytes, draft_bytes"""


def _names(fields: str) -> list[str]:
    return [name.strip() for name in fields.split(",")]


@pytest.fixture
def pair(write_model: ModelWriter) -> Any:
    """The reference and the streamed model of one file, without logits_all and with few slots."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    options = {"logits_all": False, **ONE_THREAD}
    with contextlib.closing(stock(path, **options)) as reference, streamed(path, **options) as llm:
        set_residency(llm, "cycle")
        yield reference, llm


# ---------------------------------------------------------------- completion


def test_is_a_llama(pair: Any) -> None:
    """Guards against code that checks for llama_cpp.Llama, and against a model whose description differs."""
    reference, llm = pair
    assert isinstance(llm, llama_cpp.Llama)
    assert llm.metadata == reference.metadata
    assert (llm.n_ctx(), llm.n_vocab(), llm.n_embd()) == (reference.n_ctx(), reference.n_vocab(), reference.n_embd())
    tokens = llm.tokenize(b" w5 w6 hello")
    assert tokens == reference.tokenize(b" w5 w6 hello")
    assert llm.detokenize(tokens) == reference.detokenize(tokens)


def test_completion_streams_what_it_returns(pair: Any) -> None:
    """Guards against a stream that loses tokens, or a completion other than stock's."""
    reference, llm = pair
    options = {"max_tokens": 16, "temperature": 0.0}
    whole = llm.create_completion("w5 w6", **options)
    assert whole["choices"] == reference.create_completion("w5 w6", **options)["choices"]
    pieces = [chunk["choices"][0]["text"] for chunk in llm.create_completion("w5 w6", stream=True, **options)]
    assert "".join(pieces) == whole["choices"][0]["text"]
    assert llm("w5 w6", **options)["choices"] == whole["choices"]


def test_stream_can_be_left(pair: Any) -> None:
    """Guards against a stream that is abandoned and breaks the next call."""
    reference, llm = pair
    stream = llm.create_completion("w5 w6", max_tokens=16, temperature=0.0, stream=True)
    next(stream)
    stream.close()
    expected = reference.create_completion("w7", max_tokens=8, temperature=0.0)["choices"]
    assert llm.create_completion("w7", max_tokens=8, temperature=0.0)["choices"] == expected


def test_chat_completion(write_model: ModelWriter) -> None:
    """Guards against a chat handler that is not called as by llama_cpp."""
    path = write_model("olmoe")
    messages = [{"role": "system", "content": "Be w7."}, {"role": "user", "content": "w5?"}]
    options = {"logits_all": False, "chat_format": "chatml", **ONE_THREAD}
    with contextlib.closing(stock(path, **options)) as reference, streamed(path, **options) as llm:
        asked = {"messages": messages, "max_tokens": 8, "temperature": 0.7, "seed": 3}
        expected = reference.create_chat_completion(**asked)["choices"][0]["message"]
        assert llm.create_chat_completion(**asked)["choices"][0]["message"] == expected
        deltas = [chunk["choices"][0]["delta"] for chunk in llm.create_chat_completion(stream=True, **asked)]
        assert "".join(delta.get("content") or "" for delta in deltas) == expected["content"]


def test_grammar_and_json_schema(pair: Any) -> None:
    """Guards against a sampler that the grammar does not reach."""
    _, llm = pair
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    assert llm.create_completion("w5", max_tokens=8, grammar=grammar)["choices"][0]["text"] in ("yes", "no")
    schema = {"type": "object", "properties": {"found": {"type": "boolean"}}, "required": ["found"]}
    answer = llm.create_chat_completion(
        [{"role": "user", "content": "w5?"}],
        response_format={"type": "json_object", "schema": schema},
        max_tokens=80,
        seed=1,
    )
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["found"], bool)


def test_logits_processor(pair: Any) -> None:
    """Guards against a logits processor that is ignored."""
    _, llm = pair
    forced = 300

    def force(_tokens: Any, scores: Any) -> Any:
        scores[:] = -1e9
        scores[forced] = 0.0
        return scores

    processors = llama_cpp.LogitsProcessorList([force])
    text = llm.create_completion("w5", max_tokens=3, logits_processor=processors)["choices"][0]["text"]
    assert text.split() == [llm.detokenize([forced]).decode().strip()] * 3


def test_speculative_decoding(write_model: ModelWriter) -> None:
    """Guards against a draft model that is lost on the way, or batches of a few tokens with other bits."""
    path = write_model("olmoe")
    prompt = TOKENS[:12] * 3

    def generate(llm: llama_cpp.Llama) -> list[int]:
        return list(itertools.islice(llm.generate(prompt, temp=0.0), 30))

    with (
        contextlib.closing(stock(path, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))) as reference,
        streamed(path, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4)) as llm,
    ):
        assert llm.draft_model is not None
        set_residency(llm, "cycle")
        assert generate(llm) == generate(reference)


def test_tokens_of_a_prompt_that_are_not_evaluated_again(write_model: ModelWriter) -> None:
    """Guards against counting tokens of a prompt as evaluated where the cache had them, or the other way round."""
    with streamed(write_model("olmoe"), **ONE_THREAD) as llm:
        for prompt, n_reused in ((TOKENS[:20], 0), (TOKENS[:30], 20), (TOKENS[:25] + TOKENS[:5], 25), (TOKENS[5:9], 0)):
            before = llm.stats().reused_tokens
            next(llm.generate(prompt, temp=0.0))
            assert llm.stats().reused_tokens - before == n_reused


def test_embeddings(write_model: ModelWriter) -> None:
    """Guards against embedding mode, which decodes without `eval`, giving other numbers."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    options = {"logits_all": False, "embedding": True, **ONE_THREAD}
    texts = ["w5 w6 w7", "w9"]
    with contextlib.closing(stock(path, **options)) as reference, streamed(path, **options) as llm:
        set_residency(llm, "cycle")
        expected = reference.embed(texts)
        assert [np.array(e).tolist() for e in llm.embed(texts)] == [np.array(e).tolist() for e in expected]
        assert llm.create_embedding("w5")["data"] == reference.create_embedding("w5")["data"]


def test_state_round_trip(write_model: ModelWriter) -> None:
    """Guards against a state that does not bring back the conversation."""
    with streamed(write_model("olmoe"), **ONE_THREAD) as llm:
        set_residency(llm, "cycle")
        llm.eval(PROMPT)
        state = llm.save_state()
        llm.eval(STEPS[:1])
        expected = llm.scores[len(PROMPT)].copy()
        llm.reset()
        llm.eval(STEPS)
        llm.load_state(state)
        assert llm.n_tokens == len(PROMPT)
        llm.eval(STEPS[:1])
        assert np.array_equal(llm.scores[len(PROMPT)], expected)


def test_prompt_cache(pair: Any) -> None:
    """Guards against llama_cpp's prompt cache, which saves and loads states, losing the answer."""
    reference, llm = pair
    llm.set_cache(llama_cpp.LlamaRAMCache())
    prompts = ("w5 w6 w7 w8", "w9 w10", "w5 w6 w7 w8")
    for prompt in prompts:
        expected = reference.create_completion(prompt, max_tokens=8, temperature=0.0)["choices"]
        assert llm.create_completion(prompt, max_tokens=8, temperature=0.0)["choices"] == expected


def test_context_is_rounded_up(write_model: ModelWriter) -> None:
    """Guards against arrays sized for the context that was asked for while llama.cpp makes a longer one."""
    with streamed(write_model("olmoe"), n_ctx=300, **ONE_THREAD) as llm:
        assert llm.n_ctx() == 512
        llm.eval(synthetic.uniform_tokens(500, N_VOCAB))
        assert llm.scores.shape[0] >= 500
    with streamed(write_model("olmoe"), n_ctx=0, logits_all=False) as llm:
        assert llm.n_ctx() == 4096  # the model's own


def test_options_of_the_context(write_model: ModelWriter) -> None:
    """Guards against keyword arguments of llama_cpp.Llama that do not arrive."""
    path = write_model("qwen3moe")
    options: dict[str, Any] = {"type_k": 8, "type_v": 8, "flash_attn": True, "n_ubatch": 16, **ONE_THREAD}
    with contextlib.closing(stock(path, **options)) as reference, streamed(path, **options) as llm:
        set_residency(llm, "cycle")
        assert np.array_equal(logits(llm, PROMPT, STEPS), logits(reference, PROMPT, STEPS))
    with streamed(path, use_mmap=False, use_mlock=True, **ONE_THREAD) as llm:
        llm.eval(PROMPT)


# ---------------------------------------------------------------- statistics


def test_field_names_are_stable(write_model: ModelWriter) -> None:
    """Guards against a renamed field: scripts read these."""
    assert [field.name for field in dataclasses.fields(edgemoe.Stats)] == _names(STATS_FIELDS)
    assert [field.name for field in dataclasses.fields(edgemoe.Plan)] == _names(PLAN_FIELDS)
    with streamed(write_model("olmoe")) as llm:
        assert list(llm.stats().to_dict()) == _names(STATS_FIELDS)
        assert list(llm.plan.to_dict()) == _names(PLAN_FIELDS)
        json.dumps([llm.stats().to_dict(), llm.plan.to_dict()])


def test_counters_add_up(write_model: ModelWriter) -> None:
    """Guards against experts counted twice or not at all, and bytes that do not match the misses."""
    n_layers, n_used, n_experts = 3, 4, 16
    path = write_model("olmoe", n_experts=n_experts, n_experts_used=n_used, n_layers=n_layers)
    with streamed(path, **ONE_THREAD) as llm:
        model, sizes = llm._gguf, runtime.slot_sizes(llm._gguf, 0)
        for tokens in STEPS:
            llm.eval([tokens])
        cold = llm.stats()
        asked = cold.expert_hits + cold.expert_misses + cold.expert_late_hits
        assert asked == len(STEPS) * n_layers * n_used
        # Everything fits: each expert is read once, in whole pages.
        assert cold.expert_bytes_read >= cold.expert_misses * model.expert_bytes
        assert cold.expert_bytes_read <= cold.expert_misses * (model.expert_bytes + 3 * 2 * 4096)
        assert (cold.completion_tokens, cold.prompt_tokens) == (len(STEPS), 0)
        assert cold.decode_tokens_per_s > 0
        assert (cold.n_slots, cold.slots_bytes) == (sizes.n_slices, sizes.bank_slot_bytes)

        llm.reset_stats()
        zero = llm.stats()
        assert (zero.expert_hits, zero.expert_misses, zero.expert_bytes_read, zero.completion_tokens) == (0, 0, 0, 0)
        assert (zero.load_s, zero.n_slots, zero.budget_bytes) == (cold.load_s, cold.n_slots, cold.budget_bytes)

        llm.reset()
        llm.eval(PROMPT)
        prefill = llm.stats()
        assert (prefill.prompt_tokens, prefill.completion_tokens) == (len(PROMPT), 0)
        assert prefill.prefill_tokens_per_s > 0 and prefill.ttft_s > 0
        asked = prefill.expert_hits + prefill.expert_misses + prefill.expert_late_hits
        assert n_layers * n_used < asked <= n_layers * n_experts  # one batch: each distinct expert once

        llm.reset_stats()
        llm.reset()
        llm.eval(PROMPT)
        again = llm.stats()
        assert (again.expert_misses, again.expert_bytes_read) == (0, 0)
        assert again.expert_hit_rate == 1.0


def test_an_expert_is_read_once_per_batch(write_model: ModelWriter) -> None:
    """Guards against waves of a prompt that read an expert again because slots are few."""
    with streamed(write_model("olmoe", n_experts=32, n_experts_used=4), **ONE_THREAD) as llm:
        for residency in ("third", "cycle", "fewest"):
            set_residency(llm, residency)
            llm.reset()
            llm.reset_stats()
            llm.eval(PROMPT)  # one micro-batch
            stats = llm.stats()
            asked = stats.expert_hits + stats.expert_misses + stats.expert_late_hits
            assert llm._runtime.stats().reads <= 3 * asked, residency


def test_completion_drives_the_counters(pair: Any) -> None:
    """Guards against statistics that only `eval` keeps, and a time to the first token that is not measured."""
    _, llm = pair
    n_prompt = llm.create_completion(" w5 w6 w7", max_tokens=6, temperature=0.0)["usage"]["prompt_tokens"]
    stats = llm.stats()
    assert stats.prompt_tokens == n_prompt
    assert stats.completion_tokens == 5  # the last token is not evaluated
    assert 0 < stats.ttft_s < 60
    assert stats.kernels == "ggml"
    assert stats.peak_rss_bytes > stats.slots_bytes


# ---------------------------------------------------------------- memory


def test_set_memory_shrinks_and_grows(write_model: ModelWriter) -> None:
    """Guards against slots that move while they hold experts, and a budget that does not take effect."""
    path = write_model("olmoe", n_experts=64, n_experts_used=4, n_layers=4)
    with streamed(path, memory="2GiB", **ONE_THREAD) as llm:
        expected = logits(llm, PROMPT, STEPS)
        everything = llm.stats()
        small = llm.plan.floor_bytes + (20 << 20)
        for memory in (small, "2GiB", small + (3 << 20), small, "2GiB"):
            llm.set_memory(memory)
            stats = llm.stats()
            assert stats.slots_bytes == llm.plan.slots_bytes
            assert (stats.slots_bytes < everything.slots_bytes) == (memory != "2GiB")
            assert stats.budget_bytes == (2 << 30 if memory == "2GiB" else memory)
            assert np.array_equal(logits(llm, PROMPT, STEPS), expected), memory


def test_slots_shrink_between_tokens(write_model: ModelWriter) -> None:
    """Guards against experts that are lost or mixed up when slots shrink and grow in the middle of a text."""
    path = write_model("gpt-oss", n_experts=16, down_quant="Q8_0")
    with contextlib.closing(stock(path, **ONE_THREAD)) as reference, streamed(path, **ONE_THREAD) as llm:
        expected = logits(reference, PROMPT, STEPS)
        llm.eval(PROMPT)
        for i, token in enumerate(STEPS):
            set_residency(llm, ("third", "fewest", "all", "cycle")[i % 4])
            llm.eval([token])
        assert np.array_equal(llm.scores[: llm.n_tokens], expected)


def test_refused_memory_leaves_the_old_in_force(write_model: ModelWriter) -> None:
    """Guards against a refused budget that changes something."""
    with streamed(write_model("olmoe"), memory="4GiB", **ONE_THREAD) as llm:
        expected = logits(llm, PROMPT, STEPS)
        before = llm.stats()
        for memory in (llm.plan.floor_bytes // 2, "1MiB"):
            with pytest.raises(BudgetError, match="below the floor"):
                llm.set_memory(memory)
        with pytest.raises(BudgetError, match="cannot parse"):
            llm.set_memory("lots")
        after = llm.stats()
        assert (after.budget_bytes, after.n_slots) == (before.budget_bytes, before.n_slots)
        assert np.array_equal(logits(llm, PROMPT, STEPS), expected)


def test_close_is_final_and_may_be_repeated(write_model: ModelWriter) -> None:
    """Guards against a crash at the second close, when a closed model is used, or when it is collected."""
    script = """
        import gc, sys
        from tests.integration.support import streamed
        llm = streamed(sys.argv[1], n_threads=1)
        llm.eval([5, 6])
        llm.close()
        llm.close()
        assert llm.stats().n_slots == 0
        for use in (lambda: llm.eval([5, 6]), lambda: llm.create_completion("w5"), lambda: llm.embed("w5")):
            try:
                use()
            except Exception as error:
                assert "closed" in str(error), repr(error)
            else:
                raise AssertionError("a closed model answers")
        del llm
        gc.collect()
    """
    done = python(script, write_model("olmoe"))
    assert done.returncode == 0, done.stderr


def test_loading_and_closing_leaves_nothing_behind(write_model: ModelWriter) -> None:
    """Guards against leaked memory, threads, file descriptors or mappings."""
    path = write_model("olmoe", n_experts=32)

    def cycle() -> None:
        with streamed(path, **ONE_THREAD) as llm:
            set_residency(llm, "cycle")
            llm.eval(PROMPT)

    def held() -> tuple[int, int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), maps.count(str(path))

    for _ in range(3):
        cycle()
    gc.collect()
    before, rss_before = held(), host.process_rss_bytes()
    for _ in range(10):
        cycle()
    gc.collect()
    await_no_more(held, before)
    assert host.process_rss_bytes() - rss_before < 8 << 20


def test_pickling_loads_the_model_again(write_model: ModelWriter) -> None:
    """Guards against a pickled model that forgets its budget."""
    with streamed(write_model("olmoe"), memory="4GiB", **ONE_THREAD) as llm:
        expected = logits(llm, PROMPT, STEPS)
        with pickle.loads(pickle.dumps(llm)) as copy:
            assert copy.stats().budget_bytes == 4 << 30
            assert np.array_equal(logits(copy, PROMPT, STEPS), expected)
