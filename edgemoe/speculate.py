# SPDX-License-Identifier: MIT
"""The drafting loop: llama_cpp's, made exact and given a draft of a length that pays.

llama_cpp's loop evaluates a draft, samples at each of its positions with the one sampler, and drops it from the first
token that differs: exact for any sampler, if logits do not depend on the batch. That they do not, and that only the
draft's positions have logits (llama_cpp's own draft models need a table of the whole context), is here. What is
drafted, and how much of it, is for `edgemoe.draft` to say.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as llama

from edgemoe import _native
from edgemoe.draft import Drafter, DraftMemory, NgramProposer
from edgemoe.draft_length import MAX_DRAFT_TOKENS, DraftLengthChooser
from edgemoe.draft_model import DraftModel, ModelProposer
from edgemoe.engine import PlainLlama
from edgemoe.errors import BackendError
from edgemoe.formats.gguf import GgufModel

# llama.cpp computes attention over the cells in use, rounded up to a multiple of this (llama-kv-cache.cpp, get_n_kv).
_CACHE_PADDING = 256


class SpeculativeLlama(PlainLlama):
    """A `llama_cpp.Llama` that drafts within `_drafting()`, once `_prepare_drafts` has been called."""

    n_tokens: int
    _requires_eval: bool
    _runtime: _native.Runtime | None
    _gguf: GgufModel
    _draft: str | Path
    _is_hooked: bool
    _chooser: DraftLengthChooser | None = None
    _draft_proposer: ModelProposer | None = None
    _drafter: Drafter | None = None
    _draft_memory: DraftMemory
    _n_drafted = 0  # tokens of the draft that the next evaluation ends with
    _n_certain: int | None = None  # tokens that have been sampled, while a draft is compared with them
    _n_visible: int | None = None

    def _prepare_drafts(self, model: DraftModel | None) -> None:
        if self._runtime is None:
            raise BackendError(
                f"cannot use draft={self._draft!r}: {self._gguf.path} has no routed experts; use draft='off'"
            )
        if self._is_recurrent or self._is_hybrid:
            raise BackendError(
                f"cannot use draft={self._draft!r}: the memory of {self._gguf.path} is recurrent, and cannot take back "
                "tokens; use draft='off'"
            )
        if llama.llama_model_n_swa(self._model.model) > 0 and not self.context_params.swa_full:
            raise BackendError(
                f"cannot use draft={self._draft!r}: a cache of only the attention window orders tokens otherwise after "
                "drafts; use swa_full=True or draft='off'"
            )
        if not self._is_hooked:
            raise BackendError(
                f"cannot use draft={self._draft!r}: llama.cpp's CPU backend cannot be told to give the bits of single "
                "tokens; use draft='off'"
            )
        if model is not None:
            self._draft_proposer = ModelProposer(model, self._n_vocab)
        self._chooser = DraftLengthChooser(self._gguf.n_experts, self._gguf.n_experts_used)
        self._draft_memory = DraftMemory(self._n_vocab, self._n_ctx)

    @abc.abstractmethod
    def _make_room(self, n_bytes: int) -> None:
        """Give up slots for what drafts are about to take, for good."""

    @abc.abstractmethod
    def _release_draft_model(self) -> None:
        """Free the draft model, and use its memory otherwise."""

    @abc.abstractmethod
    def _foresee(self, tokens: Sequence[int]) -> None:
        """Let the experts be read that the first layers will choose for these tokens, which come next."""

    @contextlib.contextmanager
    def _drafting(self, count: Callable[[int, int], None]) -> Iterator[None]:
        """Within: `llama_cpp.Llama.generate` asks for drafts; `count` as for `Drafter`."""
        if self._chooser is None:
            yield
            return
        self._drafter = Drafter(NgramProposer(), self._chooser, count, self._draft_proposer, self._foresee)
        self._n_certain = self._n_visible = None
        self.draft_model: Any = self._propose
        try:
            yield
        finally:
            self.draft_model = None
            drafter, self._drafter = self._drafter, None
            self._n_drafted = 0
            n_certain, self._n_certain, self._n_visible = self._n_certain, None, None
            if n_certain is not None:
                drafter.finish(n_certain + 1 - drafter.n_known_tokens)
                if n_certain < self.n_tokens:  # the rest of a draft that nobody asked for any more
                    self.n_tokens = n_certain
                    self._ctx.kv_cache_seq_rm(-1, n_certain, -1)
                    self._requires_eval = True

    def _propose(self, history: Any) -> Any:
        """The draft that follows `history`, as llama_cpp asks a draft model for it."""
        assert self._drafter is not None and self._chooser is not None
        if self._draft_proposer is not None and self._chooser.has_given_up:
            self._drafter.drop_model()
            self._release_draft_model()
        # The last token of the history and the draft share llama.cpp's padding of the cache: it decides how flash
        # attention splits.
        first = len(history) - 1
        self._take_memory(n_text=len(history))
        n_max = min(
            MAX_DRAFT_TOKENS,
            self._n_ctx - len(history),
            min(self.n_batch, self.context_params.n_ubatch) - 1,
            _CACHE_PADDING - 1 - first % _CACHE_PADDING,
        )
        draft = self._drafter.draft(history[self._drafter.n_known_tokens :].tolist(), n_max)
        self._n_drafted = len(draft)
        self._take_memory(n_drafted=len(draft))
        return np.array(draft, dtype=np.intc)

    def _take_memory(self, n_drafted: int = 0, n_text: int = 0) -> None:
        n_bytes = self._draft_memory.grow(n_drafted, n_text)
        if n_bytes > 0:
            self._make_room(n_bytes)

    def _eval_draft(self, tokens: Sequence[int]) -> None:
        n_threads_batch = llama.llama_n_threads_batch(self._ctx.ctx)
        n_threads = llama.llama_n_threads(self._ctx.ctx)
        plugin = _native.plugin()
        plugin.set_lone_rows(len(tokens))
        llama.llama_set_n_threads(self._ctx.ctx, n_threads, n_threads)
        try:
            if self._logits_all:
                super().eval(tokens)
                return
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
            self._batch.set_batch(batch=tokens, n_past=self.n_tokens, logits_all=True)
            self._ctx.decode(self._batch)
        finally:
            plugin.set_lone_rows(0)
            llama.llama_set_n_threads(self._ctx.ctx, n_threads, n_threads_batch)
        self.input_ids[self.n_tokens : self.n_tokens + len(tokens)] = tokens
        self.n_tokens += len(tokens)
        self._requires_eval = False

    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """Sample a token, as `llama_cpp.Llama.sample`."""
        if self._drafter is None or idx is None:
            return int(super().sample(*args, idx=idx, **kwargs))
        self._n_certain = self._n_visible = idx + 1
        try:
            return int(super().sample(*args, idx=idx, **kwargs))
        finally:
            self._n_visible = None

    @property
    def _input_ids(self) -> Any:
        # What logits processors and stopping criteria are shown: without what is only drafted.
        return self.input_ids[: self.n_tokens if self._n_visible is None else self._n_visible]
