# SPDX-License-Identifier: MIT
"""A draft model changes what is fast, not what is generated; its memory is part of the budget."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

import edgemoe
from benchmarks import synthetic
from edgemoe import _native, draft_model, planner
from edgemoe.draft_length import DraftLengthChooser
from edgemoe.draft_waits import Step
from edgemoe.errors import BackendError, BudgetError, ModelFormatError
from edgemoe.formats.gguf import read_model
from tests.conftest import ModelWriter
from tests.integration.support import N_VOCAB, python, set_residency, streamed

TOKENS = synthetic.uniform_tokens(120, N_VOCAB, seed=5)
PROMPT = TOKENS[:50]
OPTIONS = {"n_threads": 1, "n_threads_batch": 1, "logits_all": False, "kernels": "auto"}


class _Eager(DraftLengthChooser):
    """Asks for every draft and evaluates it, however little it pays; never lets the text propose."""

    def choose(self, kind: int, n_proposed: int) -> int:
        return n_proposed if kind >= 4 else 0

    def wanted(self, n_tokens: int, _draft_s: Any) -> int:
        return n_tokens

    def catch_up_s(self) -> float:
        return 1e6


def _dense_draft(path: Path, n_vocab: int = N_VOCAB, seed: int = 0) -> Path:
    """A dense model of one layer with random weights and the vocabulary of the synthetic ones."""
    rng = np.random.default_rng(seed)
    width, n_ff = 64, 96
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    synthetic._add_vocabulary(writer, n_vocab)
    shapes = {f"attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (n_ff, width), "ffn_up": (n_ff, width), "ffn_down": (width, n_ff)}
    shapes |= {"attn_norm": (width,), "ffn_norm": (width,)}
    names = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    names |= {"token_embd.weight": (n_vocab, width), "output.weight": (n_vocab, width), "output_norm.weight": (width,)}
    for name, shape in names.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32) / (8 if len(shape) > 1 else 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def drafts(write_model: ModelWriter, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Draft models: the model itself, which is nearly always right; another one with experts, and a dense one."""
    return {
        "itself": write_model("olmoe", n_experts=16, n_experts_used=4),
        "other": write_model("qwen3moe"),
        "dense": _dense_draft(tmp_path_factory.mktemp("dense") / "dense.gguf"),
    }


@contextlib.contextmanager
def _eager(path: Path, draft: Path, **options: Any) -> Iterator[edgemoe.Llama]:
    with streamed(path, **{**OPTIONS, "draft": draft, **options}) as llm:
        llm._chooser = _Eager(16, 4)
        yield llm


def _greedy(llm: edgemoe.Llama) -> list[int]:
    return list(itertools.islice(llm.generate(PROMPT, temp=0.0), 100))


def _sampled(llm: edgemoe.Llama) -> list[int]:
    llm.set_seed(11)
    options = {"temp": 0.9, "top_k": 50, "top_p": 0.98, "repeat_penalty": 1.1}
    return list(itertools.islice(llm.generate(PROMPT, **options), 80))


def _to_context_end(llm: edgemoe.Llama) -> list[int]:
    return list(itertools.islice(llm.generate(PROMPT[:5], temp=0.0), 251))


@pytest.mark.parametrize("residency", ["all", "cycle"])
@pytest.mark.parametrize("generate", [_greedy, _sampled, _to_context_end])
@pytest.mark.parametrize("name", ["itself", "other", "dense"])
def test_output_is_that_without_drafts(
    name: str, generate: Any, residency: str, drafts: dict[str, Path], write_model: ModelWriter
) -> None:
    """Guards against a draft model that disturbs the model beside it, and drafts that are accepted wrongly."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    with streamed(path, **OPTIONS) as plain, _eager(path, drafts[name]) as drafting:
        for llm in (plain, drafting):
            set_residency(llm, residency)
        for _ in range(2):  # the second time from what the first one left
            assert generate(drafting) == generate(plain)
        stats = drafting.stats()
        assert stats.drafted_tokens > 50
        # Synthetic models of one recipe are alike, so the other one is often right.
        lowest, highest = {"itself": (0.9, 1.0), "other": (0.1, 0.95), "dense": (0.0, 0.5)}[name]
        if generate is not _sampled:
            assert lowest * stats.drafted_tokens <= stats.accepted_tokens <= highest * stats.drafted_tokens


def _only_four(_tokens: Any, scores: Any) -> Any:
    scores[:300] = scores[304:] = -np.inf
    return scores


def test_sampled_tokens_have_the_distribution_of_the_model(drafts: dict[str, Path], write_model: ModelWriter) -> None:
    """Guards against a bias towards drafted tokens: a drafted position against the exact probabilities, which are
    computed from the logits here."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    n_samples = 1200
    with streamed(path, **{**OPTIONS, "logits_all": True}) as plain:
        plain.eval(PROMPT)
        exact = np.zeros((4, 4))
        first = _softmax(plain.scores[len(PROMPT) - 1, 300:304])
        second = []
        for token in range(300, 304):
            plain.n_tokens = len(PROMPT)
            plain.eval([token])
            second.append(_softmax(plain.scores[len(PROMPT), 300:304]))
        exact = first[:, None] * np.array(second)
    counts = np.zeros((4, 4))
    processors = llama_cpp.LogitsProcessorList([_only_four])
    with _eager(path, drafts["dense"]) as llm:
        # The draft model knows nothing of the processor: let it propose one of the four.
        assert llm._draft_proposer is not None
        llm._draft_proposer._likeliest = lambda _logits: (302, 0.9)  # type: ignore[method-assign]
        options = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logits_processor": processors}
        for seed in range(n_samples):
            llm.set_seed(seed)
            a, b, _ = itertools.islice(llm.generate(PROMPT, **options), 3)
            counts[a - 300, b - 300] += 1
        stats = llm.stats()
        assert stats.drafted_tokens >= n_samples and stats.accepted_tokens > 50
    chi_squared = ((counts - n_samples * exact) ** 2 / (n_samples * exact)).sum()
    assert chi_squared < 37.7  # 15 degrees of freedom: one in a thousand is beyond


def _softmax(logits: Any) -> Any:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def test_memory_is_planned_before_anything_is_loaded(drafts: dict[str, Path], write_model: ModelWriter) -> None:
    """Guards against a draft model beside the budget, and a refusal that comes too late or has no numbers."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    plain, drafting = (planner.measure(read_model(path), {"n_ctx": 512}, draft=d) for d in ("ngram", drafts["dense"]))
    assert drafting.draft is not None and plain.draft_bytes == 0
    model = read_model(drafts["dense"])
    assert drafting.draft.weights_bytes == sum(t.n_bytes for t in model.tensors)
    assert drafting.draft.kv_bytes == pytest.approx(2 * 2 * 64 * 512, abs=20_000)  # K and V, f16; logged in 0.01 MiB
    assert drafting.draft.options["n_ctx"] == 512
    plan = drafting.plan(1 << 30)
    assert plan.draft_bytes == drafting.draft_bytes > 0
    parts = plan.dense_bytes + plan.kv_bytes + plan.buffers_bytes + plan.draft_bytes + plan.slots_bytes
    assert parts + plan.slack_bytes <= plan.budget_bytes
    # All else being equal, the floor is higher by the draft model.
    floors = [_floor_bytes(f, plain.buffers_bytes) for f in (plain, drafting)]
    assert floors[1] - floors[0] == pytest.approx(plan.draft_bytes * 128 / 127, abs=2)
    with pytest.raises(BudgetError, match=r"draft model \d+\.\d\d, one token's.*use no draft model or --memory"):
        streamed(path, draft=drafts["dense"], memory=plan.floor_bytes // 2)


def _floor_bytes(footprint: planner.Footprint, buffers_bytes: int) -> int:
    """The floor of a footprint with other buffers: those hold this process, which grows from test to test."""
    return dataclasses.replace(footprint, buffers_bytes=buffers_bytes).plan(None).floor_bytes


PLAN = """
import json, sys
import edgemoe
print(json.dumps(edgemoe.plan(sys.argv[1], n_ctx=512, n_batch=128, draft=sys.argv[2]).to_dict()))
"""
GENERATE = """
import itertools, json, sys
import edgemoe
from benchmarks import synthetic
path, draft, memory = sys.argv[1], sys.argv[2], int(sys.argv[3])
with edgemoe.Llama(path, memory=memory, n_ctx=512, n_batch=128, n_threads=1, n_threads_batch=1, draft=draft) as llm:
    class Eager(type(llm._chooser)):
        wanted = lambda self, n, _: n
        catch_up_s = lambda self: 1e6
    llm._chooser = Eager(64, 8)
    list(itertools.islice(llm.generate(synthetic.local_tokens(64, 8192), temp=0.0), 24))
    print(json.dumps({**llm.stats().to_dict(), "plan": llm.plan.to_dict()}))
"""


def test_the_budget_holds(tmp_path: Path) -> None:
    """Guards against memory of a draft model that no line of the plan has: here it is a third of all."""
    path = synthetic.write_preset(tmp_path / "large.gguf", "olmoe", n_layers=1, expert_ff=768, n_vocab=8192)
    draft = synthetic.write_preset(tmp_path / "draft.gguf", "olmoe", n_layers=1, expert_ff=512, n_vocab=8192)
    floor_bytes = json.loads(python(PLAN, path, draft).stdout)["floor_bytes"]
    done = python(GENERATE, path, draft, int(1.02 * floor_bytes))
    assert done.returncode == 0, done.stderr
    stats = json.loads(done.stdout)
    assert stats["plan"]["draft_bytes"] > 100 << 20
    assert stats["peak_rss_bytes"] <= stats["budget_bytes"]


def test_a_model_without_use_gives_its_memory_back(drafts: dict[str, Path], write_model: ModelWriter) -> None:
    """Guards against memory that stays with a draft model that is never asked, and an answer that it changes."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    with streamed(path, **OPTIONS) as plain, streamed(path, draft=drafts["dense"], **OPTIONS) as llm:
        expected = list(itertools.islice(plain.generate(PROMPT, temp=0.0), 60))
        stream = llm.generate(PROMPT, temp=0.0)
        found = list(itertools.islice(stream, 20))
        plan, fixed_bytes = llm.plan, llm._fixed_bytes
        assert llm._chooser is not None
        llm._chooser._n_unwanted = llm._chooser._GIVE_UP_STEPS
        found += list(itertools.islice(stream, 40))
        stream.close()
        assert found == expected
        assert llm._draft_model is None and llm._draft_proposer is None
        assert llm.plan.draft_bytes == 0 and llm.plan.budget_bytes == plan.budget_bytes
        grown_bytes = plan.draft_buffers_bytes - llm.plan.draft_buffers_bytes  # of drafts from the text
        assert fixed_bytes + grown_bytes - llm._fixed_bytes == plan.draft_bytes
        assert list(itertools.islice(llm.generate(PROMPT, temp=0.0), 60)) == expected


def test_chooser_at_work(drafts: dict[str, Path], write_model: ModelWriter) -> None:
    """Guards against a draft model that is never asked, and time of its that nobody is charged with."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    with streamed(path, draft=drafts["itself"], **OPTIONS) as llm:
        chooser, proposer = llm._chooser, llm._draft_proposer
        assert chooser is not None and proposer is not None and proposer.seconds(3) > 0
        # As if drafts were always right and cost nothing but what the draft model takes, of steps of a second each: a
        # neighbour's work in a measured one would empty the account that drafts are paid from.
        chooser.acceptance = lambda _kind, _position: 1.0  # type: ignore[method-assign]
        chooser.time_ratio = lambda _n_drafted: 1.0  # type: ignore[method-assign]
        observe = chooser.observe_step
        steps = []

        def spy(step: Step, n_tokens: int) -> None:
            steps.append(step)
            observe(dataclasses.replace(step, seconds=1.0), n_tokens)

        chooser.observe_step = spy  # type: ignore[method-assign]
        list(itertools.islice(llm.generate(TOKENS, temp=0.9), 60))
        assert sum(step.n_drafted > 0 and step.draft_s > 0 for step in steps) > 5


def test_refusals(drafts: dict[str, Path], write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against a draft model that cannot be right, and errors that do not say what is wrong."""
    path = write_model("olmoe")
    other = _dense_draft(tmp_path / "other.gguf", n_vocab=N_VOCAB + 200)
    no_gguf = tmp_path / "no.gguf"
    no_gguf.write_bytes(b"not a model at all, but long enough")
    short = tmp_path / "short.gguf"
    short.write_bytes(drafts["dense"].read_bytes()[:-1000])
    for make in (edgemoe.Llama, edgemoe.plan):
        with pytest.raises(BackendError, match=r"it has 712 tokens, expected 512; use a small model with the same"):
            make(path, draft=other)
        with pytest.raises(ModelFormatError, match=r"cannot open .*absent\.gguf: No such file or directory"):
            make(path, draft=tmp_path / "absent.gguf")
        with pytest.raises(ModelFormatError, match=r"no\.gguf: it begins with b'not ' .* is it a GGUF file"):
            make(path, draft=str(no_gguf))
        with pytest.raises(ModelFormatError, match=r"short\.gguf: tensor .* it is truncated"):
            make(path, draft=short)


def test_vocabularies_are_compared_token_by_token(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against a draft model with as many tokens of another meaning."""
    target = read_model(write_model("olmoe"))
    same = _dense_draft(tmp_path / "same.gguf")
    draft_model.check_vocabulary(read_model(same), target)
    data = same.read_bytes()
    name = next(token for token in ("w5", "w7") if data.count(f"w{token[1:]}".encode()) >= 1).encode()
    at = data.index(name)
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(data[:at] + b"X" + data[at + 1 :])
    with pytest.raises(BackendError, match=r"its token \d+ is '.*X\d+', expected '.*w\d+'; use a small model"):
        draft_model.check_vocabulary(read_model(changed), target)
    longer = _dense_draft(tmp_path / "longer.gguf", n_vocab=N_VOCAB + 100)
    draft_model.check_vocabulary(read_model(longer), target)


def test_pickle_and_close(drafts: dict[str, Path], write_model: ModelWriter) -> None:
    """Guards against a copy without its draft model, and one that is used when it is closed."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    with streamed(path, draft=drafts["dense"], **OPTIONS) as llm:
        expected = _greedy(llm)
        with contextlib.closing(pickle.loads(pickle.dumps(llm))) as copy:
            assert copy._draft == drafts["dense"] and copy._draft_model is not None
            assert _greedy(copy) == expected
    assert llm._draft_model is None
    llm.close()


def test_foreseen_drafts_are_hints_for_all_tokens(write_model: ModelWriter) -> None:
    """Guards against the first layers' experts being foreseen for only one token of a batch."""
    path = write_model("olmoe", n_experts=16, n_experts_used=4)
    with streamed(path, prefetch="1", draft="ngram", **OPTIONS) as llm:
        set_residency(llm, "cycle")
        for token in TOKENS[:20]:
            llm.eval([token])
        before = llm._runtime.prefetch_stats().predicted
        llm._n_drafted = 3
        llm.eval(TOKENS[20:24])
        after = llm._runtime.prefetch_stats()
        llm._n_drafted = 0
        llm.eval([TOKENS[24]])
        alone = llm._runtime.prefetch_stats()
        # Four tokens choose more experts than one, in each of the two layers.
        assert after.predicted - before > alone.predicted - after.predicted
        assert isinstance(llm._runtime, _native.Runtime)
