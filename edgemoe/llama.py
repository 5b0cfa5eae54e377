# SPDX-License-Identifier: MIT
"""`llama_cpp.Llama` with its routed experts streamed from storage under a memory budget."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as llama

from edgemoe import _native, choosers, engine, host, mapping, planner, price_curve, runtime, topology, warm
from edgemoe import on_miss as misses
from edgemoe.budget import MemoryBudget, Share, shared_error
from edgemoe.cache_size import CacheSize
from edgemoe.counters import Counters, prefetch_fields
from edgemoe.demo import demo_model
from edgemoe.draft_model import DraftModel
from edgemoe.draft_waits import Step
from edgemoe.errors import AdapterError, BackendError, TraceError
from edgemoe.formats.gguf import GgufModel, read_model
from edgemoe.profile import ProfiledLlama
from edgemoe.routers import Embedding, find_embedding
from edgemoe.sizes import parse_size
from edgemoe.speculate import SpeculativeLlama
from edgemoe.trace import TracedRun
from edgemoe.types import Plan, Stats

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total) while something takes long."""

_log = logging.getLogger("edgemoe")
# Loads are told apart by thread, but memory is measured by process: one at a time.
_load_lock = threading.Lock()
# Of the memory for experts: from about here on a draft model costs more hits than drafts mostly gain.
_LARGE_DRAFT_SHARE = 0.1


class Llama(ProfiledLlama, SpeculativeLlama):
    """A `llama_cpp.Llama` whose experts stay on storage, within `memory`.

    Everything that `llama_cpp.Llama` offers works as it does there. Its bits do not depend on the budget, and with
    `kernels="ggml"` are those of llama_cpp without weight repacking. A model without routed experts runs as it would
    in llama_cpp.
    """

    def __init__(
        self,
        model_path: str | Path | None = None,
        *,
        memory: int | str | MemoryBudget | None = None,
        n_ctx: int = 4096,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        eviction: str = "auto",
        kernels: str = "auto",
        prefetch: str = planner.DEFAULT_PREFETCH,
        warm_start: bool = True,
        draft: str | Path = "off",
        reuse_bias: str | float = "off",
        reuse_method: str = "cache-prior",
        top_j: int | None = None,
        reuse_price: str | float | None = None,
        expert_top_k: str | int = "off",
        on_miss: str = "wait",
        on_miss_mass: float = misses.DEFAULT_MASS,
        on_miss_skip_mass: float | None = None,
        lowbit: str | Path | None = None,
        progress: Progress | None = None,
        verbose: bool = False,
        **llama_cpp_kwargs: Any,
    ) -> None:
        """Plan, refuse or load.

        Args:
            model_path: a GGUF file, the first of a split one; None for the demo model.
            memory: budget for everything this process holds: bytes, or a size such as "1.5GiB"; None for what
                the machine and its cgroup have free. Or a `MemoryBudget`, which several models share.
            n_ctx: context length in tokens, rounded up to a multiple of 256; 0 for the model's own.
            n_threads, n_threads_batch: threads for decode and prefill; None for the fast physical cores it may use.
            eviction: which expert goes first: `lru`, `lfu`, `least-stale`, `utility`, or `auto` (one of the first two).
            kernels: who multiplies by experts: `auto` for our kernels where a format has them, `ggml` for the bits of
                llama.cpp.
            prefetch: how many layers ahead experts are predicted, kept and read: `off`, `1`, `2`, or `auto` for as many
                as pays by the clock. It changes no result.
            warm_start: read the experts that were hot when this model was last closed into free slots while storage
                is idle, and remember the hot ones when it is closed, in the user's cache folder (see `edgemoe.warm`).
            draft: speculative decoding, which never changes what is generated: `off`; `ngram` to draft from the
                prompt and the answer so far, as many tokens as their experts' bytes make worth while; or the path of
                a small GGUF model with the same vocabulary, dense or not, to draft with it as well. It is loaded
                whole, and its memory is part of the budget.
            reuse_bias: `off`, or a number from 0 (exact) to 1: while decoding, how much experts that need not be read
                are preferred. This changes what is generated, and makes it depend on timing; a guard bounds how much,
                and `stats()` says what it costs. Prompts stay exact. See docs/routing.md. `auto` for the strongest
                that `edgemoe price` has found to cost this model at most `reuse_price`; `reuse_choice` says which.
            reuse_method: who is preferred how: `cache-prior`, `max-rank` or `cumulative`.
            top_j: so many of the best experts are chosen whatever is resident; None for 1 or, of more than 8, for 2.
            reuse_price: the change of perplexity that `auto`, which it implies, may cost: "1%", or 0.01, by default.
            expert_top_k: while decoding, how many experts a token uses, at most the model's number: `off`, a number,
                `top-p:P` (the fewest with that share of the weight), `map` or `map:MIN-MAX` (those with a positive
                logit), `lexi:MEAN` or `lexi:MEAN@FILE` (what each layer can spare, measured at load or by
                `edgemoe lexi`). This changes what is generated; `stats()` says how much. See docs/routing.md.
            on_miss: what becomes, while decoding, of an expert that would have to be read and comes behind
                `on_miss_mass` of the token's mixing weight: `wait` reads it (exact), `skip` leaves it out, `lowbit`
                takes its copy in the file `lowbit`, which shares the memory; behind `on_miss_skip_mass` (None: 0.9) it
                is left out, too. This changes what is generated, as a reuse bias does. See docs/routing.md.
            progress: called as (stage, done, total) while loading.
            llama_cpp_kwargs: as for `llama_cpp.Llama`. `use_mmap` has no effect: weights are always mapped.

        Raises:
            ModelFormatError: a file is missing, truncated or no GGUF.
            BudgetError: the budget is below the model's floor, or cannot be parsed.
            BackendError: llama.cpp refused the model, the environment's EDGEMOE_ISA cannot be had, `draft` cannot
                be exact with this model, the draft model has another vocabulary, its routers cannot be biased, or it
                cannot do `expert_top_k`.
            ValueError: `eviction`, `kernels`, `prefetch`, `draft` or `reuse_method` is unknown, `reuse_bias`, `top_j`,
                `reuse_price`, `expert_top_k`, `on_miss` or what belongs to it makes no sense.
            PriceError: `auto` finds no measurement of this model with so much memory for experts, or less.
            AdapterError: the LoRA adapter changes routed experts.
        """
        begin_s, begin_read = time.perf_counter(), host.storage_bytes_read()
        _native.check_eviction(eviction)
        _native.check_kernels(kernels)
        _native.check_prefetch(prefetch)
        planner.draft_path(draft)
        lossy = choosers.Keywords(
            reuse_bias, reuse_method, top_j, reuse_price, expert_top_k, on_miss, on_miss_mass, on_miss_skip_mass, lowbit
        )
        request = choosers.parse(lossy)
        if draft != "off" and llama_cpp_kwargs.get("draft_model") is not None:
            raise ValueError(f"draft={draft!r} and draft_model exclude each other: expected one of them")
        report = progress or (lambda _stage, _done, _total: None)
        self._runtime: _native.Runtime | None = None
        self._warm: warm.WarmStart | None = None
        self._warm_start = warm_start
        self._counters = Counters()
        self._memory = memory
        self._share: Share | None = None
        self._cache_size: CacheSize | None = None
        self._longest_eval_tokens = 0
        self._eviction = eviction
        self._kernels = kernels
        self._prefetch = prefetch
        self._embedding: Embedding | None = None
        self._kernels_used = "ggml"
        self._draft = draft
        self._draft_model: DraftModel | None = None
        self._is_in_prompt = False
        self._n_prompt_evaluated = 0
        self._is_prepared = False
        self._gguf = model = read_model(model_path if model_path is not None else demo_model(progress=progress))
        companion = request.check(model)
        self._choosers = choosers.Choosers(request, model, progress)
        n_cores = topology.default_threads()
        kwargs = dict(
            llama_cpp_kwargs,
            n_ctx=planner.context_size(n_ctx, model),
            n_threads=n_threads or n_cores,
            n_threads_batch=n_threads_batch or n_threads or n_cores,
        )
        lora_path, lora_scale = kwargs.pop("lora_path", None), kwargs.get("lora_scale", 1.0)
        lock_memory = bool(kwargs.pop("use_mlock", False))
        kwargs.pop("use_mmap", None)
        if lora_path is not None:
            _check_adapter(lora_path, model)
        report("planning", 0, 1)
        with _load_lock:
            process_bytes = host.process_rss_bytes()
            self._footprint = planner.measure(model, kwargs, kernels, prefetch, draft, companion)
            if isinstance(memory, MemoryBudget):
                self._share = self._footprint.join(memory, process_bytes)
                self.plan = self._footprint.shared_plan(self._share)
            else:
                self.plan = self._footprint.plan(None if memory is None else parse_size(memory))
            if not self.plan.fits:
                raise planner.refusal(self.plan, model, kwargs["n_ctx"])
            try:
                self._choosers.expect(self.plan.slots_bytes, eviction)
                report("loading", 0, model.dense_bytes)
                slots_bytes = self.plan.slots_bytes
                if self.plan.draft_bytes > _LARGE_DRAFT_SHARE * slots_bytes and slots_bytes < model.expert_bank_bytes:
                    _log.warning(
                        "the draft model %s takes %d MiB, experts have %d: it may gain less than what they lose",
                        draft,
                        self.plan.draft_bytes >> 20,
                        slots_bytes >> 20,
                    )
                if self._footprint.draft is not None:
                    self._draft_model = DraftModel(self._footprint.draft)
                self._load(kwargs, eviction, lock_memory, verbose)
                if lora_path is not None:
                    self._add_adapter(str(lora_path), lora_scale)
                if draft != "off":
                    self._prepare_drafts(self._draft_model)
                if self._runtime is not None:
                    self._choosers.prepare(self._runtime, self.plan.slots_bytes, eviction, is_hooked=self._is_hooked)
                self._is_prepared = True
            except BaseException:
                self.close()
                raise
        self._load_s = time.perf_counter() - begin_s
        self._load_bytes_read = host.storage_bytes_read() - begin_read
        if warm_start and self._runtime is not None:
            self._warm = warm.WarmStart(warm.Bank.of_gguf(model), self._runtime)
            self._warm.begin()
        # Shared slots are the budget's to divide, and a price belongs to the slots that it was measured with.
        if self._runtime is not None and self._share is None and self.reuse_choice is None:
            least_bytes = int(self._footprint.slot_sizes(0).cycle_slot_bytes)
            self._cache_size = CacheSize(self._runtime, self.plan.slots_bytes, least_bytes)
        report("loading", model.dense_bytes, model.dense_bytes)

    def _load(self, kwargs: dict[str, Any], eviction: str, lock_memory: bool, verbose: bool) -> None:
        model = self._gguf
        if model.expert_tensors:
            companion = self._footprint.companion
            self._runtime = runtime.open_runtime(model, self.plan.slots_bytes, eviction, self._kernels, companion)
            runtime.start_prefetch(self._runtime, model, self._prefetch)
            paths = runtime.format_paths(model, self._runtime)
            if any(p.n_own for p in paths):
                self._kernels_used = runtime.kernels_used(paths, _native.active_isa())
        else:
            _log.warning("%s has no routed experts: it runs as plain llama.cpp", model.path)
        before = {m.address for path in model.files for m in mapping.mappings(path)}
        with engine.loading(self._runtime) as load, engine.engine_log(echo=verbose) as log:
            try:
                super().__init__(str(model.path), use_mmap=True, verbose=verbose, **kwargs)
            except (ValueError, RuntimeError) as error:
                raise BackendError(f"llama.cpp cannot load {model.path}: {log.last_error()}") from error
        if self._runtime is None:
            return
        self._is_hooked = load.is_hooked
        if not load.is_hooked:
            _log.warning("llama.cpp's loader could not be kept from reading %s whole: loading is slower", model.path)
        n_tensors = len(model.expert_tensors)
        if load.n_placed < n_tensors:
            _log.warning(
                "llama.cpp uses %d of the %d expert tensors of %s as experts; it reads the rest by itself, outside of "
                "the budget, if at all",
                load.n_placed,
                n_tensors,
                model.path,
            )
        libc = ctypes.CDLL(None, use_errno=True)
        for i, path in enumerate(model.files):
            mapped = [m for m in mapping.mappings(path) if m.address not in before]
            ranges = engine.dense_ranges(model, i, mapped)
            if not mapped:
                _log.warning("cannot find where llama.cpp mapped %s: its dense weights stay in the page cache", path)
            if not load.is_hooked:
                mapping.drop(mapped)
            _native.populate(path, ranges, host.N_IO_THREADS)
            self._find_embedding(i, mapped)
            for _, length, address in ranges if lock_memory else ():
                if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(length)) != 0:
                    _log.warning("cannot lock %d bytes of dense weights in memory; raise the memlock limit", length)
                    break
        # What was planned is now there to be measured; only buffers not yet written to are still a plan.
        sizes = log.sizes(host.process_rss_bytes())
        self._fixed_bytes = sizes.process_bytes + sizes.compute_bytes + self._footprint.batch_bytes
        if self._footprint.draft is not None:
            self._fixed_bytes += self._footprint.draft.compute_bytes
        if self._share is not None:
            self._share.settle(self, self._fixed_bytes - sizes.process_bytes, self._share.least_bytes)
        else:
            self._fit_slots(self.plan)
        if not self._runtime.stats().direct_io:
            _log.warning("the file system of %s has no O_DIRECT: reads are buffered, and slower", model.path)

    def _find_embedding(self, file_idx: int, mapped: list[mapping.Mapping]) -> None:
        """Let the first layers be foreseen from the token, where its embedding can be read."""
        tensor = find_embedding(self._gguf) if self._prefetch != "off" else None
        if tensor is not None and tensor.file_idx == file_idx:
            address = engine.tensor_address(tensor, mapped)
            self._embedding = None if address is None else Embedding(tensor, address)

    def _fit_slots(self, plan: Plan, *, may_grow: bool = True) -> None:
        assert self._runtime is not None
        slots = self._footprint.slots_bytes(plan.budget_bytes, self._fixed_bytes)
        if slots is None:
            short = self._fixed_bytes - (plan.dense_bytes + plan.kv_bytes + plan.buffers_bytes + plan.draft_bytes)
            raise planner.refusal(
                dataclasses.replace(plan, fits=False, floor_bytes=plan.floor_bytes + short), self._gguf, self.n_ctx()
            )
        sizes = self._footprint.slot_sizes(slots)
        if may_grow or self._runtime.stats().slots_bytes > slots:
            _native.set_slots_bytes(self._runtime, slots)
        self.plan = dataclasses.replace(plan, slots_bytes=int(sizes.slots_bytes))
        if self._cache_size is not None:
            (self._cache_size.restart if may_grow else self._cache_size.limit)(self.plan.slots_bytes)

    def _make_room(self, n_bytes: int) -> None:
        self._footprint = self._footprint.after_draft_growth(n_bytes)
        self._fixed_bytes += n_bytes
        if self._share is not None:
            self._share.take(n_bytes)
        else:  # the fewest slots have had room for it
            buffers_bytes = self.plan.buffers_bytes + n_bytes
            to_come_bytes = self._footprint.draft_buffers_bytes
            plan = dataclasses.replace(self.plan, buffers_bytes=buffers_bytes, draft_buffers_bytes=to_come_bytes)
            self._fit_slots(plan, may_grow=False)

    def _release_draft_model(self) -> None:
        draft, model = self._footprint.draft, self._draft_model
        assert draft is not None and model is not None
        self._draft_model = self._draft_proposer = None
        model.close()
        self._footprint = dataclasses.replace(self._footprint, draft=None)
        self._fixed_bytes -= draft.total_bytes
        if self._share is not None:
            self._share.release(draft.total_bytes)
        else:
            self._fit_slots(self._footprint.plan(self.plan.budget_bytes))
        _log.warning(
            "drafts of %s are no gain here: it is freed, and its %d MiB go to experts",
            draft.model.path,
            draft.total_bytes >> 20,
        )

    @property
    def reuse_choice(self) -> price_curve.Choice | None:
        """The bias that `reuse_bias="auto"` has chosen, by which measurement; None for all others."""
        return self._choosers.reuse_choice

    def set_memory(self, memory: int | str) -> None:
        """Change the budget now: experts are dropped, coldest first, or get more room.

        Raises:
            BudgetError: the budget is below the floor, or shared; the old one stays in force.
        """
        if self._share is not None:
            raise shared_error(self._gguf.path.name)
        plan = self._footprint.plan(parse_size(memory))
        if not plan.fits:
            raise planner.refusal(plan, self._gguf, self.n_ctx())
        if self._runtime is not None:
            self._fit_slots(plan)
            self._choosers.prepare_again(self._runtime, self.plan.slots_bytes, self._eviction)
        else:
            self.plan = plan
        self._memory = memory

    def take_slots(self, slots_bytes: int) -> None:
        """Make the slots that large: for the `MemoryBudget` that this model shares."""
        if self._runtime is None or self._share is None:
            return
        _native.set_slots_bytes(self._runtime, slots_bytes)
        self.plan = self._footprint.shared_plan(self._share)
        if self._is_prepared:
            self._choosers.prepare_again(self._runtime, self.plan.slots_bytes, self._eviction)

    def expert_bytes_read(self) -> int:
        """Bytes of experts read since loading or `reset_stats()`."""
        return int(self._runtime.stats().bytes_read) if self._runtime is not None else 0

    def _add_adapter(self, path: str, scale: float) -> None:
        adapter = llama.llama_adapter_lora_init(self._model.model, path.encode())
        if not adapter:  # a null pointer, which is an object
            raise AdapterError(f"llama.cpp cannot load the LoRA adapter {path}; is it made for {self._gguf.path}?")
        self._stack.callback(llama.llama_adapter_lora_free, adapter)
        adapters = (llama.llama_adapter_lora_p_ctypes * 1)(adapter)
        if llama.llama_set_adapters_lora(self._ctx.ctx, adapters, 1, (ctypes.c_float * 1)(scale)) != 0:
            raise AdapterError(f"llama.cpp cannot apply the LoRA adapter {path}; is it made for {self._gguf.path}?")
        self.lora_path = path

    @contextlib.contextmanager
    def _read_errors(self) -> Iterator[None]:
        if self._runtime is not None:
            # A read ahead may have failed before and been mended since: not what stops the call that begins now.
            self._runtime.take_error()
        try:
            yield
        except RuntimeError:
            if self._runtime is not None:
                _native.raise_error(self._runtime)
            raise

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens, as `llama_cpp.Llama.eval`.

        Raises:
            ExpertReadError: an expert could not be read. The tokens of earlier batches stay evaluated.
        """
        n_drafted, self._n_drafted = self._n_drafted, 0
        before = self._runtime.stats() if self._drafter is not None and self._runtime is not None else None
        is_decode = len(tokens) == n_drafted + 1 and not self._is_in_prompt
        begin_s = time.perf_counter()
        if len(tokens) == n_drafted + 1:
            self._foresee(tokens)
        try:
            with self._read_errors(), self._choosers.applied() if is_decode else contextlib.nullcontext():
                if n_drafted:
                    self._eval_draft(tokens)
                else:
                    super().eval(tokens)
        except BaseException:
            # The logits on hand may belong to a later position than n_tokens: decode again before sampling.
            self._requires_eval = True
            raise
        elapsed_s = time.perf_counter() - begin_s
        if self._is_in_prompt:
            self._n_prompt_evaluated += len(tokens)
        if len(tokens) > self._longest_eval_tokens and self._share is not None:
            self._longest_eval_tokens = len(tokens)
            self._share.observe()
        if self._warm is not None:
            self._warm.on_tokens(len(tokens))
        if self._cache_size is not None:
            if is_decode:
                self._cache_size.on_eval(elapsed_s)
            else:
                self._cache_size.interrupt()
        if self._drafter is not None and before is not None and len(tokens) == n_drafted + 1:
            after = self._runtime.stats()  # type: ignore[union-attr]
            n_experts = after.hits + after.misses + after.late_hits
            n_experts -= before.hits + before.misses + before.late_hits
            n_bytes, stall_s = after.bytes_read - before.bytes_read, (after.stall_ns - before.stall_ns) / 1e9
            self._drafter.observe(Step(n_drafted, elapsed_s, stall_s, n_experts, n_bytes))
        if len(tokens) > 1 and not n_drafted:
            self._counters.prompt_tokens += len(tokens)
            self._counters.prefill_s += elapsed_s
            self._counters.ttft_s = elapsed_s
        else:
            self._counters.completion_tokens += 1
            self._counters.decode_s += elapsed_s

    def _foresee(self, tokens: Sequence[int]) -> None:
        # At most 8: a token and its draft.
        if self._embedding is not None and self._runtime is not None:
            known = [t for t in tokens if 0 <= t < self._embedding.n_tokens]  # llama.cpp refuses the others
            if len(known) == len(tokens):
                choosers = () if self._is_in_prompt else self._choosers.natives
                self._runtime.foresee_tokens(self._embedding.rows(known), *choosers)

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, None, None]:
        """Generate tokens, as `llama_cpp.Llama.generate`; the time to the first one becomes `ttft_s`."""
        begin_s = time.perf_counter()
        self._is_in_prompt, self._n_prompt_evaluated = True, 0
        n_prompt = len(args[0] if args else kwargs.get("tokens", ()))
        with (
            self._out_of_prompt(),
            self._drafting(self._count_draft),
            contextlib.closing(super().generate(*args, **kwargs)) as tokens,
        ):
            for token in tokens:
                if self._is_in_prompt:
                    self._counters.ttft_s = time.perf_counter() - begin_s
                    self._counters.reused_tokens += n_prompt - self._n_prompt_evaluated
                    self._is_in_prompt = False
                # Between two tokens the text ends here for everyone but the loop that compares it with the draft.
                self._n_visible = self._n_certain
                yield token
                self._n_visible = None

    @contextlib.contextmanager
    def _out_of_prompt(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._is_in_prompt = False

    def _count_draft(self, n_drafted: int, n_accepted: int) -> None:
        self._counters.drafted_tokens += n_drafted
        self._counters.accepted_tokens += n_accepted
        self._counters.completion_tokens += n_accepted

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """Embed text, as `llama_cpp.Llama.embed`."""
        with self._read_errors():
            return super().embed(*args, **kwargs)

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """The text of tokens, as `llama_cpp.Llama.detokenize`, which loses pieces of more than 32 bytes."""
        longest = max((self._piece_bytes(token, special) for token in tokens), default=0)
        if longest <= 32:
            return bytes(super().detokenize(tokens, prev_tokens, special))
        text = b"".join(self._piece(token, special) for token in tokens)
        # As llama_cpp: Llama 1 tokenizers put a space before the prompt.
        return text[1:] if tokens[0] == self.token_bos() and text[:1] == b" " else text

    def _piece_bytes(self, token: int, special: bool) -> int:
        return abs(int(llama.llama_token_to_piece(self._model.vocab, token, None, 0, 0, special)))

    def _piece(self, token: int, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(self._piece_bytes(token, special) + 1)
        n_bytes = llama.llama_token_to_piece(self._model.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(0, n_bytes)]

    def reset(self) -> None:
        """Forget the conversation, as `llama_cpp.Llama.reset`."""
        super().reset()

    def stats(self) -> Stats:
        """Counters since loading or the last `reset_stats()`."""
        experts = self._runtime.stats() if self._runtime is not None else None
        prefetched = self._runtime.prefetch_stats() if self._runtime is not None else None
        return Stats(
            **self._counters.fields(experts),
            **prefetch_fields(prefetched),
            load_s=self._load_s,
            load_bytes_read=self._load_bytes_read,
            peak_rss_bytes=host.peak_rss_bytes(),
            budget_bytes=self.plan.budget_bytes,
            kernels=self._kernels_used,
            **self._choosers.stats(),
        )

    def reset_stats(self) -> None:
        """Start the counters again; load time and peak memory stay."""
        self._counters = Counters()
        self._choosers.reset_stats()
        if self._cache_size is not None:
            self._cache_size.interrupt()
        if self._share is not None:
            self._share.before_reset()
        if self._runtime is not None:
            self._runtime.reset_stats()

    @contextlib.contextmanager
    def record_trace(self, path: str | Path) -> Iterator[Callable[[], None]]:
        """Record which experts every layer chooses, waits for and reads, until the context ends; see `edgemoe.trace`.

        The file appears then, also when the context ends with an exception. Recording takes 4 MiB of the slack.
        The context's value is a function that raises what has ended the recording early.

        Raises:
            TraceError: the model has no routed experts, the file cannot be written, storage is slower than records
                are made, or a trace is being recorded.
        """
        native = self._runtime
        if native is None:
            raise TraceError(f"cannot record a trace: {self._gguf.path} has no routed experts")
        slots_bytes = int(native.stats().slots_bytes)
        run = TracedRun(slots_bytes, self._eviction, self._prefetch, host.N_IO_THREADS)
        with _native.recorded_trace(native, Path(path), runtime.trace_header(self._gguf, run)) as check:
            yield check

    def close(self) -> None:
        """Free the model and its experts, and remember the hot ones if `warm_start`."""
        if getattr(self, "_warm", None) is not None:
            self._warm.save()  # type: ignore[union-attr]
            self._warm = None
        self._embedding = self._cache_size = None
        if getattr(self, "_draft_model", None) is not None:
            self._draft_model.close()  # type: ignore[union-attr]
            self._draft_model = self._draft_proposer = None
        stack = getattr(self, "_stack", None)
        if stack is not None:
            stack.close()
        if getattr(self, "_runtime", None) is not None:
            self._runtime.close()  # type: ignore[union-attr]
            self._runtime = None
        if getattr(self, "_share", None) is not None:
            self._share.leave()  # type: ignore[union-attr]
            self._share = None
        # llama_cpp would hand null pointers to llama.cpp, which does not check them.
        self._model = self._ctx = self._batch = self.tokenizer_ = _Closed()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return dict(
            state,
            memory=self._memory,
            eviction=self._eviction,
            kernels=self._kernels,
            prefetch=self._prefetch,
            draft=self._draft,
            warm_start=self._warm_start,
            **self._choosers.keywords,
        )


class _Closed:
    """Stands in the place of what a closed model no longer has."""

    def __getattr__(self, name: str) -> Any:
        raise BackendError("cannot use the model: it is closed; load it again")


def _check_adapter(path: str | Path, model: GgufModel) -> None:
    experts = {t.name for t in model.expert_tensors}
    changed = [t.name for t in read_model(path).tensors if t.name.removesuffix(".lora_a") in experts]
    if changed:
        raise AdapterError(
            f"cannot use the LoRA adapter {path}: it changes {len(changed)} tensors of routed experts, the first is "
            f"{changed[0]}; merge it into the model, or train one for the dense part only"
        )
