# SPDX-License-Identifier: MIT
"""Folders that onnxruntime-genai's own model builder makes: nothing in them was written here, and they run streamed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("torch", "transformers", "safetensors.torch", "tokenizers", "sentencepiece"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra edgemoe[verify])")
    pytest.importorskip("onnx_ir", reason="onnx_ir, which genai's builder needs, is not installed (edgemoe[dev])")

from edgemoe.formats.onnx_model import read_model
from edgemoe.onnx import PROVIDER, InferenceSession
from tests.converters import checkpoints
from tests.converters.onnx_checkpoints import relative_error
from tests.converters.onnx_genai import genai_model, generate

FAMILIES = ("gpt-oss", "lfm2moe")
PROMPTS = checkpoints.random_tokens(4, 24, seed=7)
N_NEW = 24


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_stock(builder_folders: dict[str, Path], genai: Any, family: str) -> None:
    """Guards against: QMoE nodes as others write them (biases of zero, empty inputs, scales of both signs, scores with
    sentinels) claimed and computed in another way, or not claimed."""
    theirs, ours = (genai_model(genai, builder_folders[family], provider) for provider in (None, PROVIDER))
    found = [generate(genai, ours, prompt, N_NEW) for prompt in PROMPTS]
    assert found == [generate(genai, theirs, prompt, N_NEW) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in found}) == len(PROMPTS)


def test_a_budget_holds_their_model_as_well(builder_folders: dict[str, Path]) -> None:
    """Guards against: a folder that our session takes only if our exporter made it."""
    import onnxruntime

    path = builder_folders["lfm2moe"] / "model.onnx"
    ours = InferenceSession(path, memory="16GiB")
    assert ours.stats().n_streamed_nodes == len(read_model(path).moe_nodes) > 0
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    theirs = onnxruntime.InferenceSession(path, options)
    # Activations of dense products are rounded to 8 bits here, so that a difference of 1e-7 may become one of 1e-3.
    for prompt in PROMPTS:
        assert relative_error(_first_logits(ours, prompt), _first_logits(theirs, prompt)) < 1e-2


def _first_logits(session: Any, prompt: list[int]) -> Any:
    sizes = {"batch_size": 1, "past_sequence_length": 0, "kv_cache_dim": 16}
    feed = {"input_ids": np.array([prompt], np.int64), "attention_mask": np.ones((1, len(prompt)), np.int64)}
    for value in session.get_inputs()[2:]:
        feed[value.name] = np.zeros([sizes.get(n, n) for n in value.shape], np.float32)
    return session.run(["logits"], feed)[0]
