# SPDX-License-Identifier: MIT
"""Drafts never change what is generated, and leave nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

import edgemoe
from benchmarks import synthetic
from edgemoe import host, planner
from edgemoe.confine import CgroupError, MemoryCgroup
from edgemoe.draft import DraftMemory
from edgemoe.draft_length import MAX_DRAFT_TOKENS, DraftLengthChooser
from edgemoe.errors import BackendError
from tests.conftest import ModelWriter
from tests.integration.support import N_VOCAB, Logits, said, set_residency, streamed

TOKENS = synthetic.uniform_tokens(330, N_VOCAB, seed=3)
REPETITIVE = TOKENS[:20] * 4
Generate = Callable[[edgemoe.Llama], list[int]]


class _Lengths(DraftLengthChooser):
    """Drafts of 1, 3 and 7 tokens, in this order."""

    n_chosen = 0

    def choose(self, kind: int, n_proposed: int) -> int:
        self.n_chosen += 1
        return min(n_proposed, (1, 3, 7)[min(self.n_chosen // 3, 2)])


class _Eager(DraftLengthChooser):
    """Evaluates every draft, however little it pays: what drafts do must not depend on what they cost."""

    def choose(self, kind: int, n_proposed: int) -> int:
        return n_proposed


# On a busy machine two threads wait for each other for long.
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}


def _plain(path: Path, **options: Any) -> edgemoe.Llama:
    return streamed(path, **{"logits_all": False, "kernels": "auto", **ONE_THREAD, **options})


def _eager(path: Path, **options: Any) -> edgemoe.Llama:
    llm = _plain(path, draft="ngram", **options)
    llm._chooser = _Eager(16, 4)
    return llm


def _logits(llm: edgemoe.Llama, begin: int, lengths: Iterator[int]) -> Logits:
    """Logits of the tokens from `begin` on, evaluated in batches of these lengths as drafts are."""
    rows = []
    llm.n_tokens = begin
    for n in lengths:
        first = llm.n_tokens
        llm._eval_draft(TOKENS[first : first + n])
        rows.append(llm.scores[first : first + n].copy())
    return np.concatenate(rows)


CASES = [
    ("olmoe", {}),
    ("olmoe", {"dense_quant": "F32"}),
    ("olmoe", {"dense_quant": "F16"}),
    ("olmoe", {"dense_quant": "BF16"}),
    ("olmoe", {"dense_quant": "Q8_0"}),
    ("olmoe", {"n_experts": 8, "n_experts_used": 8}),
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


@pytest.mark.parametrize("kernels", ["auto", "ggml"])
@pytest.mark.parametrize("flash_attn", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def test_bits_of_a_draft_are_those_of_single_tokens(
    case: tuple[str, dict[str, Any]], flash_attn: bool, kernels: str, write_model: ModelWriter
) -> None:
    """Guards against operations that round otherwise for several tokens: ggml's products of floats, flash attention
    split by threads, an expert with 8 rows. Each of them alone changes tokens of long answers."""
    # Flash attention is split from 512 cells on, among threads.
    begin = 300 if flash_attn else 50
    options = {"n_ctx": 512, "flash_attn": flash_attn, "kernels": kernels, "draft": "ngram"}
    options |= {} if flash_attn else ONE_THREAD
    with streamed(write_model(case[0], **case[1]), **options) as llm:
        set_residency(llm, "cycle")
        llm.eval(TOKENS[:begin])
        for token in TOKENS[begin : begin + 8]:
            llm.eval([token])
        expected = llm.scores[begin : begin + 8].copy()
        for lengths in ([8], [2, 3, 3], [1, 4, 3], [5, 1, 2], [6, 2], [7, 1]):
            found = _logits(llm, begin, iter(lengths))
            assert np.array_equal(found, expected), f"batches of {lengths}: {np.abs(found - expected).max():g}"


def test_batches_are_told_apart(write_model: ModelWriter) -> None:
    """Guards against a test above that compares equal things, and lone rows that outlive their batch."""
    with streamed(write_model("olmoe", dense_quant="F32"), draft="ngram") as llm:
        llm.eval(TOKENS[:50])
        lone = _logits(llm, 50, iter([4]))
        llm.n_tokens = 50
        llm.eval(TOKENS[50:54])
        assert not np.array_equal(llm.scores[50:54], lone)


def _greedy(prompt: list[int], n: int) -> Generate:
    return lambda llm: list(itertools.islice(llm.generate(prompt, temp=0.0), n))


def _few_words(_tokens: Any, scores: Any) -> Any:
    # Random text of the whole vocabulary repeats nothing: no drafts.
    scores[:300] = scores[308:] = -np.inf
    return scores


def _sampled(llm: edgemoe.Llama) -> list[int]:
    llm.set_seed(11)
    options = {"temp": 0.9, "top_k": 50, "top_p": 0.98, "repeat_penalty": 1.1, "presence_penalty": 0.1}
    processors = llama_cpp.LogitsProcessorList([_few_words])
    return list(itertools.islice(llm.generate(REPETITIVE, logits_processor=processors, **options), 90))


def _mirostat(llm: edgemoe.Llama) -> list[int]:
    llm.set_seed(12)
    processors = llama_cpp.LogitsProcessorList([_few_words])
    options = {"temp": 0.8, "mirostat_mode": 2}
    return list(itertools.islice(llm.generate(REPETITIVE, logits_processor=processors, **options), 90))


def _narrow(llm: edgemoe.Llama) -> list[int]:
    # So few candidates that the model repeats itself although it is random: drafts are right now and then.
    llm.set_seed(13)
    return list(itertools.islice(llm.generate(REPETITIVE, temp=0.3, top_k=2), 80))


GENERATIONS: list[tuple[str, Generate]] = [
    ("greedy", _greedy(REPETITIVE, 100)),
    ("greedy-random-prompt", _greedy(TOKENS[:60], 100)),
    ("greedy-to-context-end", lambda llm: list(itertools.islice(llm.generate(REPETITIVE, temp=0.0), 176))),
    ("one-token-prompt", _greedy(TOKENS[:1], 60)),
    ("sampled", _sampled),
    ("mirostat", _mirostat),
    ("narrow", _narrow),
]


@pytest.mark.parametrize("residency", ["all", "cycle"])
@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: generation[0])
def test_output_is_that_without_drafts(
    generation: tuple[str, Generate], residency: str, write_model: ModelWriter
) -> None:
    """Guards against a draft that is accepted wrongly, a rejected one that stays in the cache, and a sampler that is
    asked in another order."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    with _plain(path) as plain, _eager(path) as drafting:
        for llm in (plain, drafting):
            set_residency(llm, residency)
        expected = generation[1](plain)
        assert generation[1](drafting) == expected
        # From the cache that the first run left, too.
        assert generation[1](drafting) == generation[1](plain)
        stats = drafting.stats()
        assert stats.drafted_tokens > 0
        assert plain.stats().drafted_tokens == plain.stats().accepted_tokens == 0
        # Greedy, the tiny model ends in circles, and drafts are right; at random they are so by chance.
        assert stats.accepted_tokens > 0
        if generation[0] in ("sampled", "mirostat"):
            assert stats.accepted_tokens < stats.drafted_tokens
        assert stats.completion_tokens == pytest.approx(plain.stats().completion_tokens, abs=2)


@pytest.fixture
def pair(write_model: ModelWriter) -> Iterator[tuple[edgemoe.Llama, edgemoe.Llama]]:
    """One model without drafts and one that evaluates all of them."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    with _plain(path) as plain, _eager(path) as drafting:
        yield plain, drafting


PROMPT = "w5 w6 w7 w8 w9 w5 w6 w7 w8 w9 w5 w6 w7"


def test_stop_sequences_and_streams(pair: tuple[edgemoe.Llama, edgemoe.Llama]) -> None:
    """Guards against text after a stop sequence, and accepted tokens that a stream loses."""
    plain, drafting = pair
    whole = plain.create_completion(PROMPT, max_tokens=40, temperature=0.0)["choices"][0]
    stop = whole["text"][40:44]
    for asked in (
        {"max_tokens": 40},
        {"max_tokens": 40, "stop": [stop]},
        {"max_tokens": 3},
        {"max_tokens": 40, "seed": 2},
    ):
        options = {"temperature": 0.0, "repeat_penalty": 1.0, **asked}
        expected = plain.create_completion(PROMPT, **options)["choices"]
        assert drafting.create_completion(PROMPT, **options)["choices"] == expected
        chunks = drafting.create_completion(PROMPT, stream=True, **options)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected[0]["text"]
        assert drafting.n_tokens == plain.n_tokens
        assert drafting.input_ids[: drafting.n_tokens].tolist() == plain.input_ids[: plain.n_tokens].tolist()
    assert drafting.stats().accepted_tokens > 0
    messages = [{"role": "user", "content": PROMPT}]
    asked = {"messages": messages, "max_tokens": 30, "temperature": 0.5, "seed": 3}
    expected = plain.create_chat_completion(**asked)["choices"]
    assert drafting.create_chat_completion(**asked)["choices"] == expected


def test_processors_see_no_drafted_tokens(pair: tuple[edgemoe.Llama, edgemoe.Llama]) -> None:
    """Guards against a logits processor or a stopping criterion that is shown tokens that nobody has sampled."""
    seen: dict[edgemoe.Llama, list[list[int]]] = {}
    for llm in pair:
        shown = seen.setdefault(llm, [])

        def process(tokens: Any, scores: Any, shown: list[list[int]] = shown) -> Any:
            shown.append(tokens.tolist())
            return scores

        def stop(tokens: Any, _scores: Any, shown: list[list[int]] = shown) -> bool:
            shown.append(tokens.tolist())
            return len(tokens) > 60

        text = llm.create_completion(
            PROMPT,
            max_tokens=80,
            temperature=0.0,
            logit_bias={300: -1.0, 301: 0.5},
            logits_processor=llama_cpp.LogitsProcessorList([process]),
            stopping_criteria=llama_cpp.StoppingCriteriaList([stop]),
        )["choices"][0]["text"]
        shown.append(llm.tokenize(text.encode()))
    plain, drafting = pair
    assert drafting.stats().accepted_tokens > 0
    assert seen[drafting] == seen[plain]


def test_grammar(pair: tuple[edgemoe.Llama, edgemoe.Llama]) -> None:
    """Guards against a grammar that is advanced by tokens that were only drafted."""
    plain, drafting = pair
    text = 'root ::= ("yes no " | "no yes ")+'
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 0.0}
    found = []
    for llm in (plain, drafting):
        grammar = llama_cpp.LlamaGrammar.from_string(text, verbose=False)
        found.append(llm.create_completion("yes no yes no ", grammar=grammar, **options)["choices"][0]["text"])
    assert found[0] == found[1] and found[0].startswith(("yes no", "no yes"))
    assert drafting.stats().drafted_tokens > 0


def test_logprobs(write_model: ModelWriter) -> None:
    """Guards against logits of a draft that are not kept where all logits are asked for."""
    path = write_model("olmoe")
    found = []
    with _plain(path, logits_all=True) as plain, _eager(path, logits_all=True) as drafting:
        for llm in (plain, drafting):
            answer = llm.create_completion(PROMPT, max_tokens=30, temperature=0.0, logprobs=2)
            found.append(answer["choices"][0])
        assert drafting.stats().accepted_tokens > 0
    assert found[0] == found[1]


def test_a_stream_that_is_left_leaves_no_drafts(pair: tuple[edgemoe.Llama, edgemoe.Llama]) -> None:
    """Guards against drafted tokens that stay in the cache, as if someone had written them."""
    plain, drafting = pair
    for n in range(1, 12):
        tokens = []
        for llm in pair:
            stream = llm.generate(REPETITIVE, temp=0.0)
            tokens.append(list(itertools.islice(stream, n)))
            stream.close()
        assert tokens[0] == tokens[1]
        assert drafting.n_tokens == plain.n_tokens == len(REPETITIVE) + n - 1
        assert drafting.draft_model is None and drafting._input_ids.tolist() == plain._input_ids.tolist()
        # The next question begins with what is in the cache.
        follow_up = REPETITIVE + tokens[0]
        assert _greedy(follow_up, 5)(drafting) == _greedy(follow_up, 5)(plain)


def test_chooser_at_work(write_model: ModelWriter) -> None:
    """Guards against a chooser that is told nothing: without steps measured it never drafts."""
    with _plain(write_model("olmoe"), draft="ngram") as llm:
        assert llm._chooser is not None
        _greedy(REPETITIVE, 40)(llm)
        assert llm._chooser._base_computing_s.n >= 4
        assert llm._chooser._base_experts.value > 0
        llm.reset_stats()
        assert llm.stats().drafted_tokens == llm.stats().accepted_tokens == 0


def test_refusals(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against drafts that would change the output, or an option that is ignored in silence."""
    path = write_model("olmoe")
    for make in (edgemoe.Llama, edgemoe.plan):
        with pytest.raises(ValueError, match="unknown draft 'guess': expected off, ngram, or the path"):
            make(path, draft="guess")
    with pytest.raises(ValueError, match="draft='ngram' and draft_model exclude each other"):
        streamed(path, draft="ngram", draft_model=LlamaPromptLookupDecoding())
    with pytest.raises(BackendError, match=r"a cache of only the attention window .* use swa_full=True or draft='off'"):
        streamed(write_model("gpt-oss"), draft="ngram", swa_full=False)


def test_the_fewest_slots_have_room_for_the_longest_draft(write_model: ModelWriter) -> None:
    """Guards against a plan that forgets what drafts take, and one in which they have it from the beginning."""
    path = write_model("olmoe")
    model = planner.read_model(path)
    kwargs = {"n_ctx": 256}
    plain, drafting = (planner.measure(model, kwargs, draft=draft) for draft in ("off", "ngram"))
    most_bytes = DraftMemory(N_VOCAB, 256).most_bytes
    assert drafting.draft_buffers_bytes == most_bytes == 4 * N_VOCAB * MAX_DRAFT_TOKENS + 150 * 256
    assert drafting.batch_bytes == plain.batch_bytes
    assert drafting.least_slots_bytes - plain.least_slots_bytes == most_bytes
    after = drafting.after_draft_growth(1000)
    assert after.plan(1 << 30).floor_bytes == drafting.plan(1 << 30).floor_bytes
    assert after.plan(1 << 30).draft_buffers_bytes == most_bytes - 1000


def _budget_bytes(llm: edgemoe.Llama, resident_share: float) -> int:
    """A budget in which that share of the experts has slots."""
    bank_bytes = int(llm._footprint.slot_sizes(0).bank_slot_bytes)
    return host.with_slack(llm._fixed_bytes + int(resident_share * bank_bytes))


def _room_bytes(llm: edgemoe.Llama) -> int:
    """What slots may take beside all that is booked now."""
    budget_bytes = llm.plan.budget_bytes
    return budget_bytes - host.slack_bytes(budget_bytes) - llm._fixed_bytes


def test_slots_give_up_what_drafts_take_before_they_take_it(write_model: ModelWriter) -> None:
    """Guards against slots that drafts never use, memory that is used before it is given up, or given up twice, and
    another answer because of it."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    with _plain(path) as plain, _plain(path, draft="ngram") as llm:
        expected = _greedy(REPETITIVE, 60)(plain)
        llm.set_memory(_budget_bytes(llm, 0.6))
        loaded, fixed_bytes, budget_bytes = llm.stats().slots_bytes, llm._fixed_bytes, llm.plan.budget_bytes
        most_bytes = DraftMemory(N_VOCAB, llm.n_ctx()).most_bytes
        assert llm.plan.draft_buffers_bytes == most_bytes and llm.plan.slots_bytes == loaded

        llm._chooser = _Lengths(16, 4)
        seen = []
        evaluate = llm._eval_draft

        def spy(tokens: list[int]) -> None:
            # Before llama.cpp makes room for these logits.
            seen.append((len(tokens) - 1, llm._fixed_bytes - fixed_bytes, llm.stats().slots_bytes))
            assert llm.stats().slots_bytes <= _room_bytes(llm)
            evaluate(tokens)

        llm._eval_draft = spy  # type: ignore[method-assign]
        stream = llm.generate(REPETITIVE, temp=0.0)
        first = next(stream)
        index_bytes = llm._fixed_bytes - fixed_bytes
        assert index_bytes <= 150 * 256, "nothing was drafted yet"
        assert [first, *itertools.islice(stream, 59)] == expected
        stream.close()
        assert {n for n, _, _ in seen} >= {1, 3, 7}
        longest = 0
        for n_drafted, taken_bytes, _ in seen:
            longest = max(longest, n_drafted)
            assert taken_bytes == 4 * N_VOCAB * longest + 150 * 256
        assert seen[-1][2] < loaded and llm.stats().slots_bytes == llm.plan.slots_bytes == seen[-1][2]
        assert llm._fixed_bytes - fixed_bytes == most_bytes and llm.plan.draft_buffers_bytes == 0
        assert llm.plan.budget_bytes == budget_bytes and llm.plan.fits

        # The same text again takes nothing again; a larger budget gives slots, and a smaller one takes them.
        assert _greedy(REPETITIVE, 60)(llm) == expected
        assert llm._fixed_bytes - fixed_bytes == most_bytes
        llm.set_memory(_budget_bytes(llm, 0.6))
        assert llm.stats().slots_bytes == pytest.approx(loaded, abs=1)


def test_slots_that_are_fewer_already_stay(write_model: ModelWriter) -> None:
    """Guards against drafts that give slots back which somebody else, or the loop of sizes, has given up."""
    with _eager(write_model("olmoe", n_experts=16, n_experts_used=4)) as llm:
        llm.set_memory(_budget_bytes(llm, 0.6))
        set_residency(llm, "cycle")
        slots_bytes = llm.stats().slots_bytes
        _greedy(REPETITIVE, 40)(llm)
        assert llm.stats().drafted_tokens > 0 and llm.stats().slots_bytes == slots_bytes
        assert llm.plan.slots_bytes > slots_bytes


def test_shared_slots_give_up_what_drafts_take(write_model: ModelWriter) -> None:
    """Guards against a budget of several models that hears of drafts only when they have the memory."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    budget = edgemoe.MemoryBudget("4GiB")
    with _plain(path) as plain, _eager(path, memory=budget) as llm:
        share = llm._share
        assert share is not None
        before, most_bytes = dataclasses.replace(llm.plan), DraftMemory(N_VOCAB, llm.n_ctx()).most_bytes
        least_bytes, fixed_bytes, floor_bytes = share.least_bytes, share.fixed_bytes, budget.floor_bytes
        assert least_bytes == int(llm._footprint.slot_sizes(0).cycle_slot_bytes) + most_bytes
        assert _greedy(REPETITIVE, 40)(llm) == _greedy(REPETITIVE, 40)(plain)
        assert share.least_bytes == least_bytes - most_bytes
        assert share.fixed_bytes >= fixed_bytes + most_bytes
        assert budget.floor_bytes >= floor_bytes
        assert llm.plan.draft_buffers_bytes == 0 and llm.plan.slots_bytes <= before.slots_bytes


DRAFTING = """
import itertools, json, sys
import edgemoe, llama_cpp
from benchmarks import synthetic
path, memory = sys.argv[1], int(sys.argv[2])
with edgemoe.Llama(path, memory=memory, n_ctx=512, n_batch=128, n_threads=1, n_threads_batch=1, draft="ngram") as llm:
    slots = [llm.stats().slots_bytes]
    class Longer(type(llm._chooser)):
        n = 0
        def choose(self, kind, n_proposed):
            self.n += 1
            return min(n_proposed, self.n // 4)
    llm._chooser = Longer(64, 8)
    def few_words(_tokens, scores):
        scores[:300] = scores[308:] = float("-inf")
        return scores
    processors = llama_cpp.LogitsProcessorList([few_words])
    for _ in itertools.islice(llm.generate(synthetic.local_tokens(64, 65536), logits_processor=processors), 120):
        slots.append(llm.stats().slots_bytes)
    assert llm.stats().drafted_tokens > 20
    print(json.dumps({**llm.stats().to_dict(), "slots": slots, "to_come": llm.plan.draft_buffers_bytes}))
"""
DRAFTING_PLAN = """
import json, sys
import edgemoe
options = {"n_ctx": 512, "n_batch": 128, "n_threads": 1, "n_threads_batch": 1, "draft": "ngram"}
print(json.dumps(edgemoe.plan(sys.argv[1], **options).to_dict()))
"""


def test_the_budget_holds_while_drafts_grow(tmp_path: Path) -> None:
    """Guards against logits that come on top of all slots: a budget near the floor, in a memory cgroup of its size."""
    # 256 KiB for the logits of a token, and slots that are nearly all used.
    path = synthetic.write_preset(tmp_path / "large.gguf", "olmoe", n_layers=1, expert_ff=512, n_vocab=65536)
    plan = said(DRAFTING_PLAN, path)
    most_bytes = plan["draft_buffers_bytes"]
    assert most_bytes == DraftMemory(65536, 512).most_bytes
    budget_bytes = plan["floor_bytes"] + (8 << 20)
    try:
        group = MemoryCgroup(f"edgemoe-test-drafts-{os.getpid()}", budget_bytes)
    except CgroupError as error:
        pytest.skip(str(error))
    with group:
        found = said(DRAFTING, path, budget_bytes, group=group)
        usage = group.usage()
    assert usage.peak_bytes < budget_bytes and found["peak_rss_bytes"] <= budget_bytes
    assert found["to_come"] <= 150 * 512, "the longest draft was evaluated"
    slots = found["slots"]
    assert slots == sorted(slots, reverse=True) and len(set(slots)) >= 3, "step by step"
    assert slots[0] - slots[-1] == pytest.approx(most_bytes, abs=1 << 20)  # of whole slots
    assert slots[-1] >= plan["token_cycle_bytes"]


def test_pickle_keeps_the_draft(write_model: ModelWriter) -> None:
    """Guards against a copy of a model that forgets how it was made."""
    with _plain(write_model("olmoe"), draft="ngram") as llm:
        expected = _greedy(REPETITIVE, 20)(llm)
        with contextlib.closing(pickle.loads(pickle.dumps(llm))) as copy:
            assert copy._draft == "ngram"
            assert _greedy(REPETITIVE, 20)(copy) == expected


def test_a_failed_draft_changes_nothing(write_model: ModelWriter) -> None:
    """Guards against lone rows that stay switched on after an evaluation that failed."""
    path = write_model("olmoe", dense_quant="F32")
    with _plain(path, logits_all=True) as plain, _plain(path, logits_all=True, draft="ngram") as drafting:
        for llm in (plain, drafting):
            llm.eval(TOKENS[:20])
        drafting.n_tokens = drafting.n_ctx() - 1
        with pytest.raises(RuntimeError):
            drafting._eval_draft(TOKENS[:MAX_DRAFT_TOKENS])
        drafting.n_tokens = 20
        for llm in (plain, drafting):
            llm.eval(TOKENS[20 : 20 + MAX_DRAFT_TOKENS])
        assert np.array_equal(drafting.scores[20:27], plain.scores[20:27])
