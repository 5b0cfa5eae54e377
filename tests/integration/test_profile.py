# SPDX-License-Identifier: MIT
"""`Llama.profile` on real models: the parts are the wall, each is where it should be, and results do not change."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import edgemoe
from benchmarks import synthetic
from edgemoe import trace, trace_summary
from edgemoe.errors import BackendError
from edgemoe.profile import Profile
from tests.conftest import ModelWriter
from tests.integration.support import N_VOCAB, logits, set_residency, streamed

TOKENS = synthetic.uniform_tokens(70 + 12, N_VOCAB, seed=3)
PROMPT, STEPS = TOKENS[:70], TOKENS[70:]
ARCHITECTURES = ["olmoe", "qwen2moe", "gpt-oss", "deepseek2-v3", "granitemoe"]
SLOW_S = 0.02


def generate(llm: edgemoe.Llama, n: int, **options: Any) -> tuple[list[int], list[float]]:
    """Tokens, and how long each took by the caller's clock."""
    tokens, walls = [], []
    with_options = {"temp": 0.0, **options}
    generated = llm.generate(PROMPT, **with_options)
    for _ in range(n):
        begin_s = time.perf_counter()
        tokens.append(next(generated))
        walls.append(time.perf_counter() - begin_s)
    generated.close()
    return tokens, walls


def slow(_ids: Any, scores: Any) -> Any:
    """A logits processor that takes its time."""
    time.sleep(SLOW_S)
    return scores


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parts_are_the_wall_and_bits_stay(arch: str, write_model: ModelWriter) -> None:
    """Guards against time counted twice or not at all, a router that is not found, and pieces with other bits."""
    with streamed(write_model(arch), kernels="auto") as llm:
        set_residency(llm, "third")
        plain = logits(llm, PROMPT, STEPS)
        with llm.profile() as profiler:
            profiled = logits(llm, PROMPT, STEPS)
        found = profiler.result()
    np.testing.assert_array_equal(profiled, plain)
    assert (found.prefill.n_tokens, found.decode.n_tokens) == (len(PROMPT), len(STEPS))
    for split in (found.prefill, found.decode):
        assert sum(split.parts().values()) == pytest.approx(split.wall_s, rel=0.03)
        for part in ("router", "select", "experts", "dense", "overhead"):
            assert split.parts()[part] > 0, part
        assert split.sampling_s == 0.0


def test_parts_are_what_the_caller_waits_for(write_model: ModelWriter) -> None:
    """Guards against a wall that is not the caller's, and a sampler's time in another part.

    Tokens are slow here, so that taking the profile (some 50 us a token) and a busy machine weigh little.
    """
    with streamed(write_model("olmoe")) as llm, llm.profile() as profiler:
        slow_list = llama_cpp.LogitsProcessorList([slow])
        _, walls = generate(llm, 15, logits_processor=slow_list)
        found = profiler.result()
    assert found.decode.n_tokens == 14
    assert sum(found.decode.parts().values()) == pytest.approx(sum(walls[1:]), rel=0.03)
    assert sum(found.prefill.parts().values()) == pytest.approx(walls[0], rel=0.03, abs=0.001)
    assert found.decode.sampling_s >= 14 * SLOW_S
    others_s = sum(found.decode.parts().values()) - found.decode.sampling_s
    assert others_s < sum(walls[1:]) - 14 * SLOW_S


def test_waiting_is_the_stall_and_counts_are_the_statistics(write_model: ModelWriter) -> None:
    """Guards against a wait, hits or bytes that are not those of the decoded tokens."""
    with streamed(write_model("olmoe")) as llm:
        set_residency(llm, "cycle")
        with llm.profile() as profiler:
            generated = llm.generate(PROMPT, temp=0.0)
            next(generated)
            begin = llm.stats()
            for _ in range(30):
                next(generated)
            end = llm.stats()
            generated.close()
        found = profiler.result()
    stall_s = end.stall_s - begin.stall_s
    assert stall_s > 0
    # The clock is read a moment before and after what the statistics measure.
    assert stall_s <= found.decode.wait_s <= end.stall_s - begin.stall_s + 0.02 * found.decode.wall_s
    n_hits = end.expert_hits - begin.expert_hits
    n_asked = n_hits + end.expert_misses - begin.expert_misses + end.expert_late_hits - begin.expert_late_hits
    assert found.hit_rate == n_hits / n_asked
    assert found.bytes_per_token is not None
    assert found.bytes_per_token * 30 == pytest.approx(end.expert_bytes_read - begin.expert_bytes_read, rel=0.01)


def test_router_figures_are_those_of_a_trace(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against figures of other tokens, or from another formula than `edgemoe trace show`."""
    with streamed(write_model("olmoe"), kernels="auto") as llm:
        with llm.profile() as profiler:
            profiled, _ = generate(llm, 20)
        found = profiler.result()
        llm.reset()
        generated = llm.generate(PROMPT, temp=0.0)
        plain = [next(generated)]
        with llm.record_trace(tmp_path / "t"):
            plain += list(itertools.islice(generated, 19))
        generated.close()
    expected = trace_summary.summarize(trace.load(tmp_path / "t"))
    assert profiled == plain
    assert (found.n_traced_tokens, found.trace_problem) == (19, None)
    assert found.expert_overlap == expected.next_token_reuse
    assert found.router_entropy_bits == expected.router_entropy_bits
    assert (found.load_imbalance, found.load_imbalance_max) == (expected.load_imbalance, expected.load_imbalance_max)


def test_profile_beside_a_recording_says_that_it_has_no_figures(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against a generation that a profile breaks, and against a recording that it takes over."""
    with streamed(write_model("olmoe")) as llm:
        with llm.record_trace(tmp_path / "t"), llm.profile() as profiler:
            generate(llm, 3)
        found = profiler.result()
    assert found.decode.n_tokens == 2
    assert found.n_traced_tokens == 0
    assert found.trace_problem is not None and "recorded" in found.trace_problem
    assert trace.load(tmp_path / "t").n_tokens == len(PROMPT) + 2


def test_drafts_are_profiled(write_model: ModelWriter) -> None:
    """Guards against tokens of a draft that are missing from the profile, or evaluated outside of it."""
    prompt = PROMPT[:8] * 6
    with streamed(write_model("olmoe"), draft="ngram", logits_all=False) as llm:
        plain = list(itertools.islice(llm.generate(prompt, temp=0.0), 40))
        llm.reset()
        with llm.profile() as profiler:
            profiled = list(itertools.islice(llm.generate(prompt, temp=0.0), 40))
        found = profiler.result()
    assert profiled == plain
    assert found.decode.n_tokens == 39
    assert sum(found.decode.parts().values()) == pytest.approx(found.decode.wall_s, rel=0.03)
    assert found.decode.dense_s > 0 and found.decode.router_s > 0


def test_profile_ends_with_its_context(write_model: ModelWriter) -> None:
    """Guards against a clock that runs on after a caller's error, and tokens counted in no or two profiles."""
    with streamed(write_model("olmoe")) as llm:
        with pytest.raises(ZeroDivisionError), llm.profile():
            with pytest.raises(BackendError, match="one is being taken"), llm.profile():
                pass
            for _ in llm.generate(PROMPT, temp=0.0):
                raise ZeroDivisionError
        generate(llm, 3)
        llm.reset()
        with llm.profile() as profiler:
            generate(llm, 3)
        generate(llm, 3)
        found = profiler.result()
    assert (found.prefill.n_tokens, found.decode.n_tokens) == (len(PROMPT), 2)


def test_model_without_experts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a profile of nothing."""
    monkeypatch.setattr(synthetic, "_check_shape", lambda shape: None)  # it wants a layer with experts
    with streamed(synthetic.write_model(tmp_path / "dense.gguf", "deepseek2", n_dense_layers=3)) as llm:
        with pytest.raises(BackendError, match="no routed experts"), llm.profile():
            pass


def _values(fields: Any) -> Iterator[Any]:
    for value in fields.values():
        yield from _values(value) if isinstance(value, dict) else (value,)


def test_profile_is_ready_for_json(write_model: ModelWriter) -> None:
    """Guards against values that JSON cannot hold, and fields that are missing from it."""
    with streamed(write_model("olmoe")) as llm, llm.profile() as profiler:
        generate(llm, 3)
        found = profiler.result()
    fields = found.to_dict()
    assert {f.name for f in dataclasses.fields(Profile)} == set(fields)
    assert fields["decode"]["storage_share"] == found.decode.storage_share
    assert all(value is None or type(value) in (int, float, str) for value in _values(fields))
