# SPDX-License-Identifier: MIT
"""Fewer experts for a token: what is left out of the choice is left out of everything that follows from it."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from edgemoe import _native
from edgemoe.selection import Selection
from tests.conftest import ModelWriter
from tests.integration.support import logits, set_residency, stock, streamed
from tests.integration.test_reuse import ROUTERS, STEPS, WIDE


@pytest.mark.parametrize("arch", ROUTERS)
def test_fewer_experts_have_the_bits_of_llama_cpp_with_fewer(arch: str, write_model: ModelWriter) -> None:
    """Guards against a wrong normalization of what is left, for any router, and experts that are read for nothing."""
    path = write_model(arch, **WIDE)
    steps = STEPS[:10]
    with streamed(path) as llm:
        set_residency(llm, "third")
        model = llm._gguf
        n_layers = 1 + max(t.layer for t in model.expert_tensors)
        assert llm._runtime is not None
        count = _native.ExpertCount(0, n_layers, model.n_experts, [2] * n_layers, 1.0)
        llm._selection = Selection(llm._runtime, model, count=count)
        found = logits(llm, steps[:1], steps[1:])
        stats = llm.stats()
    with contextlib.closing(stock(path, kv_overrides={f"{model.architecture}.expert_used_count": 2})) as reference:
        assert np.array_equal(found, logits(reference, steps[:1], steps[1:]))
    assert stats.selections_changed == 0.5
    assert 0.1 < stats.gate_mass_moved < 0.5
    assert stats.expert_hits + stats.expert_misses + stats.expert_late_hits == 2 * len(steps) * model.n_moe_layers
