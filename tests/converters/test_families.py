# SPDX-License-Identifier: MIT
"""Converted checkpoints against transformers: what they compute, in stock llama.cpp and in edgemoe.

Relative errors are max |a - b| / max |b| over all positions and the vocabulary, b being transformers' float32 logits.
KL is sum p ln(p / q) in nats, p being transformers', averaged over positions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from edgemoe import lexi
from edgemoe.converters import to_gguf
from edgemoe.formats.gguf import read_model
from tests.converters.conftest import N_TOKENS, Workshop
from tests.converters.families import FAMILIES
from tests.integration.support import sampled, set_residency, stock, streamed
from tests.integration.test_lexi import check_layers

Floats = npt.NDArray[np.float32]

F32_KV = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
"""llama.cpp rounds its cache to 16 bits if not told otherwise, transformers does not."""

SMALL = {**F32_KV, "n_batch": N_TOKENS, "n_threads": 1, "n_threads_batch": 1}

# Everything but MXFP4 experts, whose inputs ggml rounds to 8 bits (`vec_dot_type`), as it does for Q8_0 ones.
FLOAT_FAMILIES = sorted(set(FAMILIES) - {"gpt-oss"})
ALL_FAMILIES = sorted(FAMILIES)


def edgemoe_streamed(path: Path, **options: Any) -> llama_cpp.Llama:
    """edgemoe with room for a third of the experts, so that most tokens wait for some to be read."""
    llm = streamed(path, **options)
    set_residency(llm, "third")
    return llm


def edgemoe_by_default(path: Path, **options: Any) -> llama_cpp.Llama:
    """The same with the kernels that users get: edgemoe's own, which have other bits than ggml's."""
    return edgemoe_streamed(path, kernels="auto", **options)


Opener = Callable[..., llama_cpp.Llama]
OPENERS = [
    pytest.param(stock, id="stock"),
    pytest.param(edgemoe_streamed, id="edgemoe"),
    pytest.param(edgemoe_by_default, id="edgemoe-own-kernels"),
]


def all_logits(llm: llama_cpp.Llama, sequences: list[list[int]]) -> Floats:
    """Logits of each position: the first sequence in one batch, the others half in a batch and half token by token."""
    result = []
    for i, tokens in enumerate(sequences):
        llm.reset()
        cut = len(tokens) if i == 0 else len(tokens) // 2
        llm.eval(tokens[:cut])
        for token in tokens[cut:]:
            llm.eval([token])
        result.append(llm.scores[: len(tokens)].copy())
    return np.stack(result)


def relative_error(found: Floats, expected: Floats) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return result


def mean_kl(found: Floats, expected: Floats) -> float:
    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("open_model", OPENERS)
@pytest.mark.parametrize("family", FLOAT_FAMILIES)
def test_f32_computes_what_transformers_does(workshop: Workshop, family: str, open_model: Opener) -> None:
    """Guards against any tensor that is misnamed, transposed, permuted or split wrongly, and any hyper-parameter that
    is missing or means something else: experts, routers, biases, rope, windows, scales."""
    llm = open_model(workshop.gguf(family, "F32"), **SMALL)
    found, expected = all_logits(llm, workshop.sequences()), workshop.reference(family)
    llm.close()
    assert relative_error(found, expected) <= 1e-3


@pytest.mark.parametrize("family", FLOAT_FAMILIES)
def test_losses_of_fewer_experts_are_of_the_models_layers(
    workshop: Workshop, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a family that `edgemoe lexi` takes and whose layers it computes unlike llama.cpp."""
    path = workshop.gguf(family, "F32")
    lexi.check(read_model(path))
    check_layers(path, read_model(path).n_experts_used - 1, monkeypatch)


@pytest.mark.parametrize("family, most", [("phimoe", 2e-3), ("gpt-oss", 1e-5), ("gpt-oss-bf16", 2e-4)])
def test_where_llama_cpp_differs_it_differs_little(workshop: Workshop, family: str, most: float) -> None:
    """Guards against a graph that is further from the model than docs/converting.md says. The other tests hold these
    families to transformers with the setting that llama.cpp's graph lacks; this one to the checkpoint as published.
    With experts weighted as llama.cpp's graph does by itself, the KL divergence of phimoe is 0.016."""
    llm = stock(workshop.gguf(family, "F32"), **SMALL)
    found = all_logits(llm, workshop.sequences())
    llm.close()
    assert mean_kl(found, workshop.reference(family, is_as_published=True)) <= most


@pytest.mark.parametrize(
    "routing, most_error, most_kl",
    [
        pytest.param({"topk_method": "group_limited_greedy", "topk_group": 3}, 0.1, 2e-4, id="as-published"),
        pytest.param({"topk_method": "group_limited_greedy", "topk_group": 8}, 1e-3, 1e-6, id="all-groups"),
        pytest.param({"topk_method": "greedy", "topk_group": 3}, 1e-3, 1e-6, id="greedy"),
    ],
)
def test_groups_of_deepseek_v2_differ_little(
    workshop: Workshop, tmp_path: Path, routing: dict[str, Any], most_error: float, most_kl: float
) -> None:
    """Guards against groups that llama.cpp stops the process at (all of them used), groups where the model has none,
    and a ranking of groups further from DeepSeek-V2's than docs/converting.md says. Its routing as published (160
    experts, 8 groups), a file without groups, whose KL divergence is 2.8e-4; where no group is left out, the ranking
    does not matter and logits have to be the same."""
    checkpoint, expected = workshop.deepseek_v2_with_groups(routing)
    recipe = to_gguf.Recipe(preset="F32", pre_tokenizer=checkpoint.family.pre_tokenizer)
    path = tmp_path / "model.gguf"
    to_gguf.convert(to_gguf.plan_conversion(checkpoint.path, recipe), path)
    llm = stock(path, **SMALL)
    found = all_logits(llm, workshop.sequences())
    llm.close()
    assert relative_error(found, expected) <= most_error
    assert mean_kl(found, expected) <= most_kl


@pytest.mark.parametrize("preset, most", [("BF16", 1e-3), ("F16", 1e-4)])
@pytest.mark.parametrize("family", FLOAT_FAMILIES)
def test_16_bits_lose_what_16_bits_lose(workshop: Workshop, family: str, preset: str, most: float) -> None:
    """Guards against weights that are rounded twice, or of other tensors than matrices. Published weights are BF16, so
    only activations are rounded; the bounds are of KL, because a token may go to another expert."""
    llm = stock(workshop.gguf(family, preset), **SMALL)
    found = all_logits(llm, workshop.sequences())
    llm.close()
    assert mean_kl(found, workshop.reference(family)) <= most


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_q8_0_keeps_the_distribution(workshop: Workshop, family: str) -> None:
    """Guards against blocks along the wrong dimension, and against quantized tensors that have to be exact, such as
    routers and norms. MXFP4 experts stay MXFP4."""
    llm = stock(workshop.gguf(family, "Q8_0"), **SMALL)
    found = all_logits(llm, workshop.sequences())
    llm.close()
    assert mean_kl(found, workshop.reference(family)) <= 1e-3


@pytest.mark.parametrize("preset", ["F32", "BF16", "F16", "Q8_0"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_edgemoe_says_what_stock_llama_cpp_says(workshop: Workshop, family: str, preset: str) -> None:
    """Guards against files whose experts edgemoe reads from another place than llama.cpp."""
    path, prompt = workshop.gguf(family, preset), workshop.sequences()[0][:24]
    answers, logits = [], []
    for open_model in (stock, edgemoe_streamed):
        llm = open_model(path, n_threads=1, n_threads_batch=1)
        answers.append(sampled(llm, prompt, 24, 0, 0.0))
        logits.append(llm.scores[: llm.n_tokens].copy())
        llm.close()
    assert answers[0] == answers[1]
    np.testing.assert_array_equal(logits[0], logits[1])
