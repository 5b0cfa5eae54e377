# SPDX-License-Identifier: MIT
"""Where the time of each token goes, measured while a model runs: `Llama.profile`.

One native clock (kernels/core/phase_clock.h) runs while a token is made, and each moment belongs to one part. Only
while a profile is taken, llama.cpp's part of the graph is computed in pieces, so that routers and the choice of experts
are told from the rest; results are the same, and docs/profiling.md says what it costs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from edgemoe import _native, runtime, trace, trace_summary
from edgemoe.errors import BackendError, TraceError
from edgemoe.formats.gguf import GgufModel

MAX_TRACED_TOKENS = 1024
"""Tokens from which the router's figures are taken: what is kept of each grows with layers and experts (Qwen3-30B-A3B:
9 KiB), and memory is what a user of edgemoe lacks."""

_OVERHEAD = _native.PHASES.index("overhead")
_SAMPLING = _native.PHASES.index("sampling")


@dataclasses.dataclass(frozen=True)
class Split:
    """Where the time of some tokens went; all in seconds, for all of the tokens together.

    Attributes:
        n_tokens: how many.
        wall_s: by the wall clock, inside of `generate`: what the caller does between two tokens is not in it.
        router_s: scores of the experts.
        select_s: the choice by them, mixing weights, what that needs from storage, and predictions for later layers.
        wait_s: computing waited for storage with nothing else to do.
        experts_s: products with routed experts, and what follows from them.
        dense_s: attention, norms, shared experts, embedding and output.
        sampling_s: choosing the next token by the logits.
        overhead_s: the rest: llama.cpp's and Python's bookkeeping, drafts.
    """

    n_tokens: int = 0
    wall_s: float = 0.0
    router_s: float = 0.0
    select_s: float = 0.0
    wait_s: float = 0.0
    experts_s: float = 0.0
    dense_s: float = 0.0
    sampling_s: float = 0.0
    overhead_s: float = 0.0

    def parts(self) -> dict[str, float]:
        """Seconds by name of the part, in the order in which a token meets them; they add up to `wall_s`."""
        names = ("router", "select", "wait", "experts", "dense", "sampling", "overhead")
        return {name: getattr(self, f"{name}_s") for name in names}

    def plus(self, n_tokens: int, wall_s: float, phases_ns: Sequence[int]) -> Split:
        """With some tokens more; `phases_ns` in the order of `_native.PHASES`."""
        sums = {f"{name}_s": getattr(self, f"{name}_s") for name in _native.PHASES}
        for name, ns in zip(_native.PHASES, phases_ns, strict=True):
            sums[f"{name}_s"] += ns / 1e9
        return Split(n_tokens=self.n_tokens + n_tokens, wall_s=self.wall_s + wall_s, **sums)

    @property
    def storage_share(self) -> float:
        """Share of the time in which computing waited for storage; 0.0 of no time."""
        return self.wait_s / self.wall_s if self.wall_s else 0.0

    @property
    def compute_share(self) -> float:
        """Share of the time in which the model was computed; 0.0 of no time."""
        return (self.router_s + self.experts_s + self.dense_s) / self.wall_s if self.wall_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields and shares as a plain dictionary, ready for JSON."""
        return dict(dataclasses.asdict(self), storage_share=self.storage_share, compute_share=self.compute_share)


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a profile found; None where nothing says.

    Attributes:
        prefill: prompts, each with the token that was sampled from it.
        decode: all other tokens.
        hit_rate: of decoding: experts found resident, of all asked for.
        bytes_per_token: of decoding: bytes of experts read from storage.
        expert_overlap: share of a token's experts that the token before had chosen too, mean of the layers.
        router_entropy_bits: mean entropy of a token's mixing weights.
        load_imbalance, load_imbalance_max: uses of the most used expert divided by the mean over all experts; mean and
            largest of the layers.
        n_traced_tokens: decoded tokens behind these four: the first ones of the first request, at most
            `MAX_TRACED_TOKENS`.
        trace_problem: why there are none, if something went wrong.
    """

    prefill: Split
    decode: Split
    hit_rate: float | None = None
    bytes_per_token: float | None = None
    expert_overlap: float | None = None
    router_entropy_bits: float | None = None
    load_imbalance: float | None = None
    load_imbalance_max: float | None = None
    n_traced_tokens: int = 0
    trace_problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary, ready for JSON."""
        return dict(dataclasses.asdict(self), prefill=self.prefill.to_dict(), decode=self.decode.to_dict())


class Profiler:
    """Takes a profile of one model; see `ProfiledLlama.profile`."""

    def __init__(self, native: _native.Runtime, model: GgufModel) -> None:
        self._native = native
        self._model = model
        self._plugin = _native.plugin()
        self._prefill = self._decode = Split()
        self._counts = [0, 0, 0]  # hits, experts asked for, bytes read while decoding
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._is_tracing = False
        self._problem: str | None = None
        self._summary: trace_summary.TraceSummary | None = None
        self._is_in_step = False
        self._last_step: tuple[bool, float, list[int]] = (True, 0.0, [0] * len(_native.PHASES))
        self._before = native.stats()
        self.n_evaluated_tokens = 0

    @property
    def is_in_step(self) -> bool:
        """Whether the clock runs."""
        return self._is_in_step

    @contextlib.contextmanager
    def step(self, is_prefill: bool) -> Iterator[None]:
        """Within, the clock runs; counted by `count_step` only."""
        if is_prefill:
            self._end_trace()
        elif self._folder is None and self._problem is None:
            self._begin_trace()
        self.n_evaluated_tokens = 0
        self._before = self._native.stats()
        self._is_in_step = True
        begin_s = time.perf_counter()
        self._native.start_clock(_OVERHEAD)
        self._plugin.set_profiled(self._native, self._model.n_experts)
        try:
            yield
        finally:
            self._plugin.set_profiled(None, 0)
            phases_ns = self._native.stop_clock()
            self._last_step = (is_prefill, time.perf_counter() - begin_s, phases_ns)
            self._is_in_step = False

    def count_step(self) -> None:
        """Count the last step: one that has made a token, or evaluated some."""
        is_prefill, wall_s, phases_ns = self._last_step
        if is_prefill:
            self._prefill = self._prefill.plus(self.n_evaluated_tokens, wall_s, phases_ns)
            return
        self._decode = self._decode.plus(1, wall_s, phases_ns)
        before, after = self._before, self._native.stats()
        n_hits = after.hits - before.hits
        n_others = after.misses + after.late_hits - before.misses - before.late_hits
        for i, n in enumerate((n_hits, n_hits + n_others, after.bytes_read - before.bytes_read)):
            self._counts[i] += n
        if self._decode.n_tokens >= MAX_TRACED_TOKENS:
            self._end_trace()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Within, the time is sampling's."""
        before = self._native.enter_phase(_SAMPLING)
        try:
            yield
        finally:
            if before >= 0:
                self._native.enter_phase(before)

    def _begin_trace(self) -> None:
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="edgemoe-profile-")
            _native.start_trace(self._native, Path(self._folder.name, "trace"), runtime.trace_header(self._model))
            self._is_tracing = True
        except (TraceError, OSError) as error:
            self._problem = str(error)

    def _end_trace(self) -> None:
        if not self._is_tracing or self._folder is None:
            return
        self._is_tracing = False
        try:
            _native.stop_trace(self._native)
            self._summary = trace_summary.summarize(trace.load(Path(self._folder.name, "trace")))
        except TraceError as error:
            self._problem = str(error)

    def close(self) -> None:
        """End the profile; may be called twice."""
        self._end_trace()
        if self._folder is not None:
            self._folder.cleanup()

    def result(self) -> Profile:
        """What was found so far. The router's figures are there when the profile has ended."""
        n_hits, n_asked, n_bytes = self._counts
        summary = self._summary
        return Profile(
            prefill=self._prefill,
            decode=self._decode,
            hit_rate=n_hits / n_asked if n_asked else None,
            bytes_per_token=n_bytes / self._decode.n_tokens if self._decode.n_tokens else None,
            expert_overlap=summary.next_token_reuse if summary else None,
            router_entropy_bits=summary.router_entropy_bits if summary else None,
            load_imbalance=summary.load_imbalance if summary else None,
            load_imbalance_max=summary.load_imbalance_max if summary else None,
            n_traced_tokens=summary.tokens if summary else 0,
            trace_problem=self._problem,
        )


class ProfiledLlama(llama_cpp.Llama):  # type: ignore[misc]
    """The part of `edgemoe.Llama` that is between llama_cpp's loop and its clock. Without a profile it does nothing."""

    _runtime: _native.Runtime | None
    _gguf: GgufModel
    _is_hooked: bool
    _profiler: Profiler | None = None

    @contextlib.contextmanager
    def profile(self) -> Iterator[Profiler]:
        """Measure where the time of each token goes until the context ends; then `result()` of its value says it.

        Tokens of `generate`, and of everything in llama_cpp that generates, are measured from one to the next;
        calls of `eval` by themselves. Figures of the router come from a trace in a temporary file, which takes 4 MiB
        of the slack; while another trace is recorded there are none.

        Raises:
            BackendError: the model has no routed experts, is being profiled, or llama.cpp's part cannot be seen.
        """
        if self._runtime is None:
            raise BackendError(f"cannot take a profile: {self._gguf.path} has no routed experts")
        if not self._is_hooked:
            raise BackendError("cannot take a profile: llama.cpp's CPU backend cannot be told to report its parts")
        if self._profiler is not None:
            raise BackendError("cannot take a profile: one is being taken; end it first")
        self._profiler = profiler = Profiler(self._runtime, self._gguf)
        try:
            yield profiler
        finally:
            self._profiler = None
            profiler.close()

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, None, None]:
        """Generate tokens, as `llama_cpp.Llama.generate`."""
        is_first = True
        with contextlib.closing(super().generate(*args, **kwargs)) as tokens:
            while True:
                profiler = self._profiler
                with profiler.step(is_first) if profiler is not None else contextlib.nullcontext():
                    token = next(tokens, None)
                if token is None:
                    return
                if profiler is not None:
                    profiler.count_step()
                is_first = False
                yield token

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens, as `llama_cpp.Llama.eval`."""
        profiler = self._profiler
        if profiler is None or profiler.is_in_step:
            if profiler is not None:
                profiler.n_evaluated_tokens += len(tokens)
            super().eval(tokens)
            return
        with profiler.step(is_prefill=len(tokens) > 1):
            profiler.n_evaluated_tokens = len(tokens)
            super().eval(tokens)
        profiler.count_step()

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """Sample a token, as `llama_cpp.Llama.sample`."""
        with self._profiler.sampling() if self._profiler is not None else contextlib.nullcontext():
            return int(super().sample(*args, **kwargs))
