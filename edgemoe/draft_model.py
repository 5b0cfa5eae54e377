# SPDX-License-Identifier: MIT
"""A draft model: a small model with the vocabulary of the large one, which stock llama.cpp runs, wholly in memory.

It reads the end of the text and says what it would write next. Its memory is part of the budget, and its time is
charged to the account of `edgemoe.draft_length`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as llama

from edgemoe import engine
from edgemoe.draft import Draft
from edgemoe.draft_length import model_kind
from edgemoe.draft_waits import Average
from edgemoe.errors import BackendError
from edgemoe.formats.gguf import GgufModel, iter_strings

MAX_CTX = 1024
"""Tokens of the text's end that a draft model reads at most: its cache is memory that experts do not get."""

# Its compute buffers grow with this; on the development machine SmolLM2-135M reads 64 tokens at a time as fast as 256.
_BATCH_TOKENS = 64
# As far as llama.cpp lets the vocabularies of a model and its draft model differ (common/speculative.cpp).
_MAX_VOCAB_DIFFERENCE = 128
_FIRST_COMPARED_TOKEN = 5
# Tokens that are read as part of a draft: what the last steps gave.
_FEW_TOKENS = 8
_SHORTEST_WINDOW = 16  # below it, what a model says next has little to do with the text
_WIDENING = 4  # reading a longer part of the text anew must give that many times the context
# A draft ends where the model itself gives it less than this chance of being right up to there.
_MIN_CONFIDENCE = 0.3
_TIME_MEMORY = 16

Logits = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class DraftFootprint:
    """A draft model, how llama.cpp is asked for it, and the memory that it takes."""

    model: GgufModel
    options: dict[str, Any]
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it but the vocabulary and the graph, which are in the process's resident set."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


@contextlib.contextmanager
def rehearsed(model: GgufModel, target: GgufModel, llama_kwargs: dict[str, Any]) -> Iterator[DraftFootprint]:
    """What `model` takes as a draft model of `target`; within, the process holds all of it but weights and cache.

    Raises:
        BackendError: llama.cpp cannot load it, or its vocabulary is another one.
    """
    check_vocabulary(model, target)
    trained = model.metadata.get(f"{model.architecture}.context_length")
    n_ctx = min(MAX_CTX, llama_kwargs["n_ctx"], trained if isinstance(trained, int) and trained > 0 else MAX_CTX)
    options = {key: llama_kwargs[key] for key in ("n_threads", "n_threads_batch") if llama_kwargs.get(key)}
    options |= {"n_ctx": n_ctx, "n_batch": _BATCH_TOKENS, "n_ubatch": _BATCH_TOKENS}
    with engine.rehearsal(model, None, options) as sizes:
        weights_bytes = sum(t.n_bytes for t in model.tensors)
        yield DraftFootprint(model, options, weights_bytes, sizes.kv_bytes, sizes.compute_bytes + sizes.output_bytes)


def check_vocabulary(model: GgufModel, target: GgufModel) -> None:
    """Refuse a draft model whose tokens mean something else: it would never be right.

    Raises:
        BackendError: they do.
    """
    kind, wanted = (m.metadata.get("tokenizer.ggml.model") for m in (model, target))
    counts = [len(m.metadata.get("tokenizer.ggml.tokens", [])) for m in (model, target)]
    found = None
    if kind != wanted:
        found = f"its tokenizer is {kind!r}, expected {wanted!r}"
    elif abs(counts[0] - counts[1]) > _MAX_VOCAB_DIFFERENCE:
        found = f"it has {counts[0]} tokens, expected {counts[1]}"
    else:
        pairs = zip(*(iter_strings(m.path, "tokenizer.ggml.tokens") for m in (model, target)), strict=False)
        for i, (token, expected) in enumerate(pairs):
            if token != expected and i >= _FIRST_COMPARED_TOKEN:
                found = f"its token {i} is {token!r}, expected {expected!r}"
                break
    if found is not None:
        raise BackendError(
            f"cannot draft for {target.path} with {model.path}: {found}; use a small model with the same vocabulary, "
            "mostly of the same family, or draft='ngram'"
        )


class Evaluator(Protocol):
    """A model with a cache of tokens."""

    n_ctx: int
    n_vocab: int

    def evaluate(self, n_kept: int, tokens: Sequence[int]) -> tuple[Logits, float]:
        """Put tokens behind the first `n_kept` of the cache: logits [n_vocab] of the last one, and seconds taken."""


class DraftModel:
    """The draft model, loaded.

    Raises:
        BackendError: llama.cpp cannot load or run it, or its memory cannot take tokens back.
    """

    def __init__(self, footprint: DraftFootprint) -> None:
        path = footprint.model.path
        self._path = path
        with engine.engine_log(echo=False) as log:
            try:
                self._llm = engine.PlainLlama(str(path), use_mmap=False, verbose=False, **footprint.options)
            except (ValueError, RuntimeError) as error:
                raise BackendError(f"llama.cpp cannot load the draft model {path}: {log.last_error()}") from error
        self.n_ctx = self._llm.n_ctx()
        self.n_vocab = self._llm.n_vocab()
        if self._llm._is_recurrent or self._llm._is_hybrid:
            self.close()
            raise BackendError(
                f"cannot draft with {path}: its memory is recurrent, and cannot take back tokens; use another one"
            )
        # The weights are in memory now: what reading them left in the page cache is of no more use.
        for file in footprint.model.files:
            _drop_cache(str(file))

    def evaluate(self, n_kept: int, tokens: Sequence[int]) -> tuple[Logits, float]:
        """As `Evaluator.evaluate`; the logits are valid until the next call."""
        begin_s = time.perf_counter()
        self._llm.n_tokens = n_kept
        try:
            self._llm.eval(tokens)
        except RuntimeError as error:
            raise BackendError(f"the draft model {self._path} failed: {error}; use draft='ngram' or 'off'") from error
        pointer = llama.llama_get_logits_ith(self._llm._ctx.ctx, -1)
        logits: Logits = np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))
        return logits, time.perf_counter() - begin_s

    def close(self) -> None:
        """Free it."""
        self._llm.close()


def _drop_cache(path: str) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


class ModelProposer:
    """Proposes what a draft model finds likeliest, token by token.

    The model reads as much of the text's end as may be paid for, a short part at first: whether its drafts are of use
    is not known before. Later it reads a longer part, out of what its drafts have gained.
    """

    def __init__(self, evaluator: Evaluator, n_vocab: int) -> None:
        """Propose tokens below `n_vocab`. Evaluates some tokens, to know what that takes."""
        self._evaluator = evaluator
        self._n_vocab = min(n_vocab, evaluator.n_vocab)
        self._text = array("i")
        self._begin = 0  # where in the text the cache begins
        self._cache: list[int] = []
        self._n_same = 0  # tokens of the cache that are known to be those of the text
        self._token_s, self._text_token_s = Average(_TIME_MEMORY), Average(_TIME_MEMORY)
        n_read = min(_BATCH_TOKENS, evaluator.n_ctx)
        for _ in range(2):  # the first time takes longer than any other
            _, seconds = evaluator.evaluate(0, [0])
            _, text_s = evaluator.evaluate(0, [0] * n_read)
        self._token_s.add(seconds)
        self._text_token_s.add(text_s / n_read)

    def begin(self) -> None:
        """Another text begins, perhaps as the last one did."""
        self._text = array("i")
        self._n_same = 0

    def extend(self, tokens: Iterable[int]) -> None:
        """Tokens that are certain."""
        self._text.extend(tokens)

    def seconds(self, n_tokens: int) -> float:
        """What a draft of that many tokens will take, without catching up."""
        return n_tokens * self._token_s.value

    def propose(self, n_tokens: int, catch_up_s: float) -> Draft:
        """Up to `n_tokens` tokens; none if the text cannot be caught up with in about `catch_up_s`."""
        n_affordable = int(min(catch_up_s / self._text_token_s.value, 1e9))
        if not self._place(n_tokens, n_affordable):
            return Draft(())
        n_behind = len(self._text) - self._begin - len(self._cache)
        logits, seconds = self._read(self._text[len(self._text) - n_behind :])
        paid_s = 0.0
        if n_behind > _FEW_TOKENS:
            self._text_token_s.add(seconds / n_behind)
            seconds, paid_s = 0.0, seconds
        self._n_same = len(self._cache)
        draft: list[int] = []
        kind, confidence = 0, 1.0
        for i in range(n_tokens):
            token, probability = self._likeliest(logits)
            confidence *= probability
            if i == 0:
                kind = model_kind(probability)
            elif confidence < _MIN_CONFIDENCE:
                break
            draft.append(token)
            if i + 1 < n_tokens:
                logits, token_s = self._read([token])
                self._token_s.add(token_s)
                seconds += token_s
        return Draft(tuple(draft), kind, seconds, paid_s)

    def _place(self, n_tokens: int, n_affordable: int) -> bool:
        """Let the cache hold only what is of the text, all but its last tokens; False if that costs too much."""
        begin, end = self._begin, len(self._text)
        while (
            self._n_same < len(self._cache)
            and begin + self._n_same < end
            and self._cache[self._n_same] == self._text[begin + self._n_same]
        ):
            self._n_same += 1
        # The last token has to be evaluated for what follows it.
        n_same = min(self._n_same, end - begin - 1)
        n_behind = end - begin - n_same
        # With room for what comes: a cache that is full has to be read anew.
        n_window = min(end, self._evaluator.n_ctx * 3 // 4, n_affordable)
        is_lost = n_same < 0 or end - begin + n_tokens > self._evaluator.n_ctx
        is_lost = is_lost or n_behind > max(_FEW_TOKENS, n_affordable)
        n_shortest = min(_SHORTEST_WINDOW, end)
        is_lost = is_lost or end - begin < n_shortest  # another text, shorter than the last
        if is_lost and n_window < n_shortest:
            return False
        if is_lost or (begin > 0 and n_window >= _WIDENING * (n_same + n_behind)):
            self._begin, n_same = end - n_window, 0
        self._n_same = n_same
        del self._cache[n_same:]
        return True

    def _read(self, tokens: Sequence[int]) -> tuple[Logits, float]:
        # Where the large model has tokens that the draft model lacks, any other will do.
        known = [token if token < self._evaluator.n_vocab else 0 for token in tokens]
        result = self._evaluator.evaluate(len(self._cache), known)
        self._cache.extend(tokens)
        return result

    def _likeliest(self, logits: Logits) -> tuple[int, float]:
        logits = logits[: self._n_vocab]
        token = int(np.argmax(logits))
        return token, 1.0 / float(np.exp(logits - logits[token]).sum(dtype=np.float64))
