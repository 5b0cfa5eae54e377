# SPDX-License-Identifier: MIT
"""How well a GGUF model predicts a text: the negative log-likelihood of each token, by stock llama.cpp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

from edgemoe.errors import ConversionError

from . import evaluate

CHUNK_TOKENS = 256
"""Tokens of a context; each chunk begins with an empty one."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much worse one model predicts a text than another.

    Attributes:
        mean: nats a token; negative if the first model is better.
        standard_error: of the mean, from the differences of the single tokens taken as independent.
    """

    mean: float
    standard_error: float


def negative_log_likelihoods(
    model: Path, text: str, *, max_tokens: int | None = None, progress: Callable[[str, int, int], None] | None = None
) -> npt.NDArray[np.float64]:
    """Nats (tokens,) of each token of the text given those before it in its chunk of 256; the chunk's first has none.

    Args:
        model: what llama.cpp can load; it runs on the CPU.
        text: what to predict.
        max_tokens: of the text, at most.
        progress: called with the stage `evaluate`, tokens done and in total.

    Raises:
        ConversionError: llama.cpp cannot run the model, logits are not finite, or the text has fewer than 2 tokens.
    """
    parts = []
    with evaluate.llama_context(model, _ignore, CHUNK_TOKENS) as (llama, context):
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama))
        chunks = [tokens for tokens, _ in evaluate.chunks_of_tokens(llama, text, CHUNK_TOKENS, max_tokens)]
        n_done, n_total = 0, sum(map(len, chunks))
        for tokens in chunks:
            evaluate.decode(model, context, tokens)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(tokens), n_vocab))
            parts.append(-log_softmax(logits[:-1])[np.arange(len(tokens) - 1), tokens[1:]])
            n_done += len(tokens)
            if progress is not None:
                progress("evaluate", n_done, n_total)
    found = np.concatenate(parts) if parts else np.zeros(0)
    if not len(found):
        raise ConversionError("cannot evaluate the text: it has fewer than 2 tokens; use a longer one")
    if not np.isfinite(found).all():
        raise ConversionError(f"cannot evaluate {model}: its logits are not finite; check its weights")
    return found


def compare(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> Difference:
    """What the first model has more than the second on the same tokens."""
    assert first.shape == second.shape  # the same text and vocabulary
    difference = first - second
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else float("nan")
    return Difference(float(difference.mean()), spread / len(difference) ** 0.5)


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities, along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _ignore(_tensor: int, _ask: bool, _user_data: int | None) -> bool:
    """No tensor is looked at, so the graph is computed in one go."""
    return False
