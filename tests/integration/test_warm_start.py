# SPDX-License-Identifier: MIT
"""A model that was used before starts warm: with fewer misses, and with the same bits."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import edgemoe
from benchmarks import synthetic
from tests.conftest import ModelWriter
from tests.integration.support import N_VOCAB, await_preloads, logits, python, set_residency, streamed

MODEL = {"n_experts": 32, "n_experts_used": 4, "n_layers": 4}
TOKENS = synthetic.local_tokens(60, N_VOCAB, seed=3)
PROMPT, STEPS = TOKENS[:16], TOKENS[16:]


def _folder() -> Path:
    return Path(os.environ["EDGEMOE_WARM_DIR"])


def _start(path: Path, residency: str, **options: object) -> edgemoe.Llama:
    """A model as it is when its slots were given at the load: tiny models are smaller than any budget."""
    llm = streamed(path, n_threads=1, n_threads_batch=1, **options)
    await_preloads(llm)
    set_residency(llm, "cycle")  # drops what was preloaded
    set_residency(llm, residency)
    llm.reset_stats()
    return llm


@pytest.mark.parametrize("residency", ["all", "third"])
def test_a_warm_start_misses_less_and_gives_the_same_bits(residency: str, write_model: ModelWriter) -> None:
    """Guards against a warm start that reads the wrong experts, and against bits that depend on what it read."""
    path = write_model("olmoe", **MODEL)
    before, after = TOKENS[:44], TOKENS[44:]
    # Without prefetch: what is predicted is no miss, warm or cold. By recency: 16 tokens do not decide a duel.
    fixed = {"prefetch": "off", "eviction": "lru"}
    with _start(path, residency, warm_start=False, **fixed) as llm:
        expected = logits(llm, after[:1], after[1:])
        cold_misses = llm.stats().expert_misses
    with _start(path, residency, **fixed) as llm:
        logits(llm, before[:16], before[16:])
    with _start(path, residency, **fixed) as llm:
        assert llm._warm is not None and llm._runtime is not None
        llm._warm.begin()
        await_preloads(llm)
        read_bytes = llm._runtime.preload_stats().read_bytes
        assert 0 < read_bytes <= llm.stats().slots_bytes, "within the budget"
        found = logits(llm, after[:1], after[1:])
        assert np.array_equal(found, expected)
        assert llm.stats().expert_misses <= (cold_misses / 2 if residency == "all" else 0.8 * cold_misses)
        assert llm._runtime.preload_stats().used_bytes > read_bytes / 4


def test_bits_while_experts_are_being_preloaded(write_model: ModelWriter) -> None:
    """Guards against a slot that is computed with before it is complete, or given to two slices."""
    path = write_model("qwen3moe", **MODEL)
    with streamed(path, warm_start=False) as llm:
        expected = logits(llm, PROMPT, STEPS)
    with _start(path, "all") as llm:
        logits(llm, PROMPT, STEPS)
    for residency in ("fewest", "cycle", "third", "all"):
        with _start(path, residency) as llm:
            assert llm._warm is not None
            llm._warm.begin()
            assert np.array_equal(logits(llm, PROMPT, STEPS), expected), residency


def test_the_model_starts_warm_by_itself(write_model: ModelWriter) -> None:
    """Guards against a default that does nothing, and against a load that forgets to preload."""
    path = write_model("olmoe", **MODEL)
    for n_misses in (None, 0):
        with streamed(path) as llm:
            await_preloads(llm)
            logits(llm, PROMPT, STEPS)
            assert n_misses is None or llm.stats().expert_misses == n_misses


def test_a_model_that_nobody_closes_is_remembered(write_model: ModelWriter) -> None:
    """Guards against saving when the interpreter has forgotten how to open files, and saying so to whoever exits."""
    path = write_model("olmoe", **MODEL)
    code = f"import edgemoe; llm = edgemoe.Llama({str(path)!r}, n_ctx=256, verbose=False); llm.eval({PROMPT + STEPS!r})"
    result = python(code)
    assert result.returncode == 0 and "cannot save" not in result.stderr, result.stderr
    assert [p.suffix for p in _folder().iterdir()] == [".warm"]


def test_off_is_off(write_model: ModelWriter) -> None:
    """Guards against a file written, or experts read, where the user has said not to."""
    path = write_model("olmoe", **MODEL)
    with streamed(path, warm_start=False) as llm:
        logits(llm, PROMPT, STEPS)
    assert not _folder().exists()
    with streamed(path) as llm:
        logits(llm, PROMPT, STEPS)
    before = {p: p.stat().st_mtime_ns for p in _folder().iterdir()}
    assert len(before) == 1
    with streamed(path, warm_start=False) as llm:
        assert llm._runtime is not None and llm._runtime.preload_stats().n_left == 0
        logits(llm, PROMPT, STEPS)
        assert llm._runtime.preload_stats().read_bytes == 0
        assert llm.__getstate__()["warm_start"] is False
        with pickle.loads(pickle.dumps(llm)) as copy:
            assert copy._warm is None
    assert {p: p.stat().st_mtime_ns for p in _folder().iterdir()} == before


def test_a_start_with_an_unusable_file_is_cold_and_says_so(
    write_model: ModelWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a load that fails on a corrupt file, and a close that fails on a folder that is gone."""
    path = write_model("olmoe", **MODEL)
    with streamed(path) as llm:
        logits(llm, PROMPT, STEPS)
    (file,) = _folder().iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING, "edgemoe"), streamed(path) as llm:
        assert llm._runtime is not None and llm._runtime.preload_stats().n_left == 0
        logits(llm, PROMPT, STEPS)
        file.unlink()
        _folder().rmdir()
        _folder().write_bytes(b"")
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("cannot start warm") and second.startswith("cannot save")


def test_a_model_that_is_never_closed_saves_when_the_process_ends_or_not_at_all(write_model: ModelWriter) -> None:
    """Guards against a crash, or an error on the terminal, at the end of a process that left its model open."""
    script = """
        import sys, edgemoe
        llm = edgemoe.Llama(sys.argv[1], n_ctx=256, memory="2GiB")
        llm.eval(list(range(5, 50)))
    """
    result = python(script, write_model("olmoe", **MODEL))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr, result.stderr
