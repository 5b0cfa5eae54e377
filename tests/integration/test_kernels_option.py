# SPDX-License-Identifier: MIT
"""`kernels=`: which path runs, that it is said, and that our own kernels' bits depend on nothing but the model."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgemoe
from benchmarks import synthetic
from edgemoe import _native
from edgemoe.errors import BackendError
from tests.conftest import ModelWriter
from tests.integration.support import (
    N_VOCAB,
    RESIDENCIES,
    ROOT,
    logits,
    set_residency,
    set_threads,
    stock,
    streamed,
)

# 64 + 6 tokens in two batches: an expert is given from 1 to more than 16 rows at a time.
TOKENS = synthetic.uniform_tokens(70 + 12, N_VOCAB, seed=3)
PROMPT, STEPS = TOKENS[:70], TOKENS[70:]
OWN = {"kernels": "auto", "n_threads": 1, "n_threads_batch": 1}


@pytest.fixture
def isa(monkeypatch: pytest.MonkeyPatch) -> str:
    """The best instruction set here; where that is none, the portable kernels, which run only when asked for."""
    monkeypatch.delenv("EDGEMOE_ISA", raising=False)
    name = _native.active_isa()
    if name == "scalar":
        monkeypatch.setenv("EDGEMOE_ISA", name)
    return name


@pytest.mark.parametrize(
    ("quant", "down_quant", "left_to_ggml"),
    [("Q4_K", "Q6_K", ""), ("Q4_K", "Q5_0", ", ggml for Q5_0"), ("F16", "", "")],
)
def test_statistics_say_what_ran(
    quant: str, down_quant: str, left_to_ggml: str, isa: str, write_model: ModelWriter
) -> None:
    """Guards against ggml's kernels where ours were promised, and a mixture that looks like one path."""
    path = write_model("olmoe", quant=quant, down_quant=down_quant)
    with streamed(path, **OWN) as llm:
        assert llm.stats().kernels == isa + left_to_ggml
        assert np.isfinite(logits(llm, PROMPT, STEPS)).all()
        native = llm._runtime.stats()
        assert native.n_own_tensors == len(llm._gguf.expert_tensors) - (1 if left_to_ggml else 0)
        assert native.pack_ns > 0 or isa == "scalar"
    with streamed(path, kernels="ggml") as llm:
        assert llm.stats().kernels == "ggml"
        assert (llm._runtime.stats().n_own_tensors, llm._runtime.stats().pack_ns) == (0, 0)


@pytest.mark.parametrize("quant", ["Q4_K", "Q8_0", "MXFP4", "BF16"])
def test_answers_stay_close_to_those_of_ggml(quant: str, isa: str, write_model: ModelWriter) -> None:
    """Guards against kernels that are fast and wrong; what differs is only how activations are rounded."""
    path = write_model("olmoe", quant=quant)
    with contextlib.closing(stock(path)) as reference, streamed(path, **OWN) as llm:
        assert llm.stats().kernels == isa
        expected, found = logits(reference, PROMPT, STEPS), logits(llm, PROMPT, STEPS)
    error = ((found - expected) ** 2).mean(axis=1) / expected.var(axis=1)
    # The median position: where a router was undecided, rounding may choose another expert. Measured: 3e-5 (AVX-512).
    assert np.median(error) < 3e-4


@pytest.mark.parametrize("case", [("olmoe", "Q4_K"), ("gpt-oss", "MXFP4"), ("deepseek2-merged", "Q6_K")])
def test_bits_do_not_depend_on_residency_or_threads(case: tuple[str, str], isa: str, write_model: ModelWriter) -> None:
    """Guards against a slice packed twice or not at all, and sums whose order depends on who was first."""
    with streamed(write_model(case[0], quant=case[1]), **OWN) as llm:
        expected = logits(llm, PROMPT, STEPS)
        for n_threads, residencies in ((1, RESIDENCIES), (2, ["cycle"])):
            set_threads(llm, n_threads)
            for residency in residencies:
                set_residency(llm, residency)
                assert np.array_equal(logits(llm, PROMPT, STEPS), expected), (residency, n_threads)
        assert llm.stats().expert_misses > 0


def test_bits_do_not_depend_on_the_instruction_set(
    isa: str, write_model: ModelWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against answers that change with the processor; the dense part is ggml's on this one in all cases."""
    path = write_model("olmoe", quant="Q4_K", down_quant="Q6_K")
    found = {}
    for name in [i.name for i in _native.isas() if i.is_supported]:
        monkeypatch.setenv("EDGEMOE_ISA", name)
        with streamed(path, **OWN) as llm:
            assert llm.stats().kernels == name
            found[name] = logits(llm, PROMPT, STEPS)
    assert all(np.array_equal(bits, found[isa]) for bits in found.values())


def test_instruction_set_that_cannot_be_had(write_model: ModelWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a mistyped EDGEMOE_ISA that is ignored, or crashes after loading."""
    path = write_model("olmoe")
    monkeypatch.setenv("EDGEMOE_ISA", "sse9")
    for make in (streamed, edgemoe.plan):
        with pytest.raises(BackendError, match=r"EDGEMOE_ISA=sse9: .*scalar"):
            make(path)


def test_pickling_keeps_the_kernels(write_model: ModelWriter) -> None:
    """Guards against a copy of a model that gives other bits than the original."""
    with streamed(write_model("olmoe"), kernels="ggml", n_threads=1, n_threads_batch=1) as llm:
        with pickle.loads(pickle.dumps(llm)) as copy:
            assert copy.stats().kernels == "ggml"
            assert np.array_equal(logits(copy, PROMPT, STEPS), logits(llm, PROMPT, STEPS))


def _edgemoe(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgemoe", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_line(isa: str, write_model: ModelWriter) -> None:
    """Guards against an option that does not reach the model, and a traceback for a mistyped variable."""
    path = write_model("olmoe", quant="Q4_K", down_quant="Q5_0")
    prompt = ("generate", path, "-p", " w5 w6", "-n", "4", "--ctx", "256", "--temperature", "0", "--json")
    for kernels, expected in (("auto", f"{isa}, ggml for Q5_0"), ("ggml", "ggml")):
        result = _edgemoe(*prompt, "--kernels", kernels)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["kernels"] == expected
    refused = _edgemoe(*prompt, EDGEMOE_ISA="sse9")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.splitlines()[-1].startswith("edgemoe: error: EDGEMOE_ISA=sse9: ")
    examined = _edgemoe("doctor", path, "--json", EDGEMOE_ISA="sse9")
    assert examined.returncode == 1
    report = json.loads(examined.stdout)
    assert "Traceback" not in examined.stderr
    assert (report["EDGEMOE_ISA"], report["kernels_active"]) == ("sse9", None)
    assert [f["severity"] for f in report["findings"] if "sse9" in f["text"]] == ["error"]
    report = json.loads(_edgemoe("doctor", path, "--json").stdout)
    assert report["kernels_of_formats"] == {"Q4_K": isa, "Q5_0": "ggml"}
    assert any("Q5_0 has no fast path" in f["text"] for f in report["findings"])
