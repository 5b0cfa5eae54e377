# SPDX-License-Identifier: MIT
"""Routers tuned on the tiny trained model: that its checkpoint is it, and that reuse comes of the term for reuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tiny_moe.corpus import DOMAINS
from benchmarks.tiny_moe.samples import read_samples
from edgemoe.converters.tuning_settings import Method, Settings

pytest.importorskip("torch", reason="torch is not installed (the extra edgemoe[train])")
pytest.importorskip("transformers", reason="transformers is not installed (the extra edgemoe[train])")

# What transformers and torch warn of is for them to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "tiny_moe.gguf"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from benchmarks.tiny_moe.dequantized import write_checkpoint

    folder = tmp_path_factory.mktemp("tiny_moe")
    write_checkpoint(MODEL, folder)
    return folder


def test_the_checkpoint_of_the_measurement_is_the_model(checkpoint: Path) -> None:
    """Guards against measuring a tuning of something else: a norm, a constant or experts at another's place."""
    from edgemoe.converters.verify import _compare_logits

    found = _compare_logits(MODEL, checkpoint)
    assert found.kl < 6e-3 and found.top1_agreement > 0.95  # Q8_0, whose activations llama.cpp rounds to 8 bits, too


def test_reuse_comes_of_the_term_for_reuse(checkpoint: Path, tmp_path: Path) -> None:
    """Guards against a term with the wrong sign or without effect, and against praise for what text alone does."""
    from edgemoe.converters.tune_router import Report, tune

    texts = ["".join(samples) for samples in read_samples(DATA / "tiny_moe").values()]
    assert len(texts) == len(DOMAINS)

    def tuned(method: Method, cached_experts: int | None = None) -> Report:
        settings = Settings(method, n_steps=12, rate=1e-3, window_tokens=128, cached_experts=cached_experts)
        return tune(checkpoint, MODEL, tmp_path / f"{method}.gguf", texts, settings)

    control = tuned("ce")
    for method, cached_experts in (("remoe", None), ("remoe", 9), ("kd", None)):
        found = tuned(method, cached_experts)
        assert found.before == control.before
        misses_before, misses_control = 1 - found.before.hit_rate, 1 - control.after.hit_rate
        assert 1 - found.after.hit_rate < 0.9 * min(misses_before, misses_control), (method, found, control)
        assert found.after.overlap > control.after.overlap + 0.01
        assert found.after.cross_entropy < 1.01 * found.before.cross_entropy
