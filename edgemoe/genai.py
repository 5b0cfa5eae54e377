# SPDX-License-Identifier: MIT
"""Text from a folder with an ONNX model, by onnxruntime-genai, its experts streamed under a memory budget.

genai's loop, sampling and tokenizer are used as they are; our execution provider is a plug-in that it loads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe import _native, host, onnx_schedule, topology
from edgemoe import on_miss as misses
from edgemoe.budget import MemoryBudget
from edgemoe.counters import Counters, prefetch_fields
from edgemoe.errors import BackendError, EdgeMoeError
from edgemoe.genai_cache import CachedGenerator, can_outlive
from edgemoe.onnx_folder import budget_plan, genai, read_folder, session_plan
from edgemoe.onnx_memory import SessionMemory
from edgemoe.sizes import parse_size
from edgemoe.types import Stats

if TYPE_CHECKING:
    from edgemoe.profile import Profiler

_PROVIDER = "EdgeMoEExecutionProvider"
# As `llama_cpp.Llama.generate`, so that folders and GGUF files are sampled alike.
_TOP_K, _TOP_P = 40, 0.95
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The arena may grow without a longer input: it is looked at once in so many tokens.
_OBSERVED_TOKENS = 32


class GenaiModel:
    """A language model in a folder, ready to generate.

    Args:
        path: a folder that `edgemoe convert onnx` or genai's model builder wrote.
        memory: budget for everything this process holds: bytes, or a size such as "1.5GiB", or a `MemoryBudget` that
            several models share; None for what the machine and its cgroup have free.
        n_ctx: context in tokens; None for 4096, or the model's if that is less.
        n_threads: threads that compute; None for the fast physical cores.
        eviction, prefetch, warm_start: as for `edgemoe.Llama`; none changes a result.
        reuse_bias, reuse_method, top_j, expert_top_k, on_miss, on_miss_mass: as for `edgemoe.onnx.InferenceSession`.
            They change the tokens that are decoded.

    Raises:
        ModelFormatError: the folder cannot be read.
        BudgetError: the budget is below the floor, which the message names; nothing is loaded then.
        BackendError: onnxruntime-genai is missing or refuses the model; or a MoE node cannot be streamed and `memory`
            is given, or its choices cannot be changed.
        ValueError: a keyword makes no sense, or is not for ONNX models.
    """

    reuse_choice = None

    def __init__(
        self,
        path: str | Path,
        *,
        memory: int | float | str | MemoryBudget | None = None,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        eviction: str = "auto",
        prefetch: str = "auto",
        warm_start: bool = True,
        reuse_bias: str | float = "off",
        reuse_method: str = "cache-prior",
        top_j: int | None = None,
        expert_top_k: str | int = "off",
        on_miss: str = "wait",
        on_miss_mass: float = misses.DEFAULT_MASS,
    ) -> None:
        begin_s, begin_read = time.perf_counter(), host.storage_bytes_read()
        keywords = onnx_schedule.Keywords(
            eviction, prefetch, warm_start, reuse_bias, reuse_method, top_j, expert_top_k, on_miss, on_miss_mass
        )
        keywords.check()
        self.folder = folder = read_folder(Path(path))
        self._n_ctx = folder.context(n_ctx)
        threads = n_threads or topology.default_threads()
        self._og = genai()
        self._session = session_plan(folder, self._n_ctx, prefetch)
        size = memory.budget_bytes if isinstance(memory, MemoryBudget) else memory
        self.plan = budget_plan(folder, self._session, None if size is None else parse_size(size))
        budget = memory if isinstance(memory, MemoryBudget) else self.plan.budget_bytes
        self._memory = SessionMemory(folder.model, self._session, budget, folder.path.name)
        self._runtime: _native.Runtime | None = None
        self._schedule: onnx_schedule.Schedule | None = None
        self._seed: int | None = None
        self._counters = Counters()
        self._model: Any = None
        self._tokenizer: Any = None
        self._stream: Any = None
        self._kept: CachedGenerator | None = None
        try:
            self._load(threads, keywords, is_strict=memory is not None)
        except BaseException:
            self.close()
            raise
        self._fit_plan()
        self._load_s = time.perf_counter() - begin_s
        self._load_bytes_read = host.storage_bytes_read() - begin_read

    def _load(self, n_threads: int, keywords: onnx_schedule.Keywords, is_strict: bool) -> None:
        options = keywords.provider_options(self._memory.slots_bytes, n_threads, is_strict)
        session = {"intra_op_num_threads": n_threads, "log_severity_level": 3}
        try:
            config = self._og.Config(str(self.folder.path))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            config.clear_providers()
            config.append_provider(_PROVIDER)
            for key, value in options.items():
                config.set_provider_option(_PROVIDER, key, value)
            self._model = self._og.Model(config)
            self._tokenizer = self._og.Tokenizer(self._model)
        except Exception as error:
            _native.take_ort_loaded()  # release what was opened before the failure
            raise BackendError(f"onnxruntime-genai cannot load the model: {error} ({self.folder.path})") from error
        loaded = _native.take_ort_loaded()
        self._runtime = loaded.runtime
        if loaded.n_refused:
            warnings.warn(onnx_schedule.refusal(loaded), stacklevel=3)
        self._memory.loaded(loaded)
        self._schedule = onnx_schedule.Schedule(self.folder.model, keywords, loaded)
        self._schedule.begin_warm(self)

    def _fit_plan(self) -> None:
        self.plan = dataclasses.replace(
            self.plan, fits=True, budget_bytes=self._memory.budget_bytes, slots_bytes=self._memory.slots_bytes
        )

    def n_ctx(self) -> int:
        """The context in tokens."""
        return self._n_ctx

    def set_seed(self, seed: int) -> None:
        """The seed of sampling from now on."""
        self._seed = seed

    def set_memory(self, memory: int | float | str) -> None:
        """Change the budget of the process; experts that no longer fit are dropped, the coldest first.

        The cache of the last answer is freed before, so that it is not taken for other memory of the process.

        Raises:
            BudgetError: it is below what the model needs, or shared; the budget stays as it is.
        """
        self._kept = None
        self._memory.set_memory(memory)
        self._fit_plan()

    def text_tokens(self, text: str) -> list[int]:
        """The tokens of a plain prompt, begun as the model wants it begun.

        Raises:
            EdgeMoeError: there are none.
        """
        tokenizer = self._need(self._tokenizer)
        tokens = [int(token) for token in tokenizer.encode(text)] if text else []
        if len(tokens) > 1 and tokens[0] == tokens[1] == int(tokenizer.bos_token_id):
            del tokens[0]  # a chat template has written it as well
        if not tokens:
            raise EdgeMoeError("the prompt is empty: found 0 tokens, expected at least 1; give it some text")
        return tokens

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder brings a chat template of its own."""
        if (self.folder.path / "chat_template.jinja").is_file():
            return True
        try:
            text = (self.folder.path / "tokenizer_config.json").read_text(encoding="utf-8")
            return bool(json.loads(text).get("chat_template"))
        except (OSError, ValueError, AttributeError):
            return False

    def chat_tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation in the folder's own chat template (ChatML if it has none), ready for an answer.

        Raises:
            EdgeMoeError: the template refuses the conversation; some know no system message.
        """
        tokenizer = self._need(self._tokenizer)
        try:
            template = {} if self.has_chat_template else {"template_str": _CHATML}
            prompt = tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True, **template)
        except Exception as error:
            raise EdgeMoeError(
                f"the chat template of the model failed: {error}; try without a system message, or `edgemoe generate` "
                "without --chat"
            ) from error
        return self.text_tokens(str(prompt))

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return token in {int(t) for t in self._need(self._tokenizer).eos_token_ids}

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """The text that becomes complete with these tokens of the answer that is being generated."""
        if self._stream is None:
            self._stream = self._need(self._tokenizer).create_stream()
        return "".join(str(self._stream.decode(token)) for token in tokens).encode("utf-8", errors="replace")

    def generate(self, tokens: Sequence[int], temp: float = 0.8) -> Generator[int, None, None]:
        """Generate tokens until the model ends the answer, its last token included, or the context is full.

        Of a prompt that begins as the text of the last answer did, only the rest is evaluated, where genai can forget
        what followed (`Stats.reused_tokens`), and unless a seed is set and `temp` is above 0.

        Raises:
            ExpertReadError: an expert could not be read from storage.
            BackendError: onnxruntime-genai failed, or the prompt is empty or longer than the context.
        """
        begin_s = last_s = time.perf_counter()
        tokens = list(tokens)
        if not 0 < len(tokens) < self._n_ctx:
            raise BackendError(
                f"cannot answer a prompt of {len(tokens)} tokens: expected 1 to {self._n_ctx - 1}, as the context is "
                f"{self._n_ctx} ({self.folder.path}); shorten it, or make n_ctx larger"
            )
        self._stream = None
        cached, n_reused = self._begun(tokens, temp)
        is_valid = True
        try:
            n_piece = self.folder.n_piece_tokens
            for start in range(n_reused, len(tokens), n_piece):
                piece = tokens[start : start + n_piece]
                self._watched(functools.partial(cached.append, piece))
                self._after_run(len(piece))
            self._counters.prompt_tokens += len(tokens) - n_reused
            self._counters.reused_tokens += n_reused
            self._counters.prefill_s += time.perf_counter() - begin_s
            n_generated = 0
            while not cached.is_done():
                last_s = time.perf_counter()
                token = self._watched(cached.next_token)
                now_s = time.perf_counter()
                if n_generated == 0:
                    self._counters.ttft_s = now_s - begin_s
                else:
                    self._counters.completion_tokens += 1
                    self._counters.decode_s += now_s - last_s
                n_generated += 1
                self._after_run(None if n_generated % _OBSERVED_TOKENS == 0 else 1)
                yield token
        except Exception:
            is_valid = False
            raise
        finally:
            # An answer that is broken off is kept as well, unless the model was closed meanwhile.
            if is_valid and self._model is not None and self._can_outlive(cached):
                self._kept = cached

    def _begun(self, tokens: list[int], temperature: float) -> tuple[CachedGenerator, int]:
        """A generator whose cache has as many of the tokens as can be, and how many these are."""
        options: dict[str, Any] = {
            "max_length": self._n_ctx,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "repetition_penalty": 1.0,
            "do_sample": temperature > 0,
        }
        if temperature > 0:
            options |= {"temperature": temperature, "top_k": _TOP_K, "top_p": _TOP_P}
            if self._seed is not None:
                options["random_seed"] = self._seed
        cached, self._kept = self._kept, None  # what is interrupted here is not kept
        if cached is not None and cached.sampling == options:
            n_reused = cached.cut_back(tokens)
            if n_reused > 0:
                return cached, n_reused
        cached = None  # its memory is needed
        return CachedGenerator(self._generator(options), options, grows=not self.folder.shares_cache), 0

    def _can_outlive(self, cached: CachedGenerator) -> bool:
        return "random_seed" not in cached.sampling and can_outlive(self.folder.architecture, self._n_ctx)

    def _after_run(self, n_input_tokens: int | None) -> None:
        self._memory.after_run(n_input_tokens)
        if self._schedule is not None:
            self._schedule.after_run()

    def _generator(self, options: dict[str, Any]) -> Any:
        model = self._need(self._model)

        def make() -> Any:
            params = self._og.GeneratorParams(model)
            params.set_search_options(**options)
            return self._og.Generator(model, params)

        return self._watched(make)

    def _watched(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            if self._runtime is not None:
                _native.raise_error(self._runtime)
            raise BackendError(f"onnxruntime-genai cannot run the model: {error} ({self.folder.path})") from error

    def reset(self) -> None:
        """Forget the conversation, and free its cache."""
        self._kept = None

    def profile(self) -> contextlib.AbstractContextManager[Profiler]:
        """As of `edgemoe.Llama`; ONNX Runtime does not say where time goes.

        Raises:
            BackendError: always.
        """
        raise BackendError(f"cannot take a profile of a folder with an ONNX model ({self.folder.path})")

    def stats(self) -> Stats:
        """Counters since loading."""
        experts = self._runtime.stats() if self._runtime is not None else None
        counted = self._counters.fields(experts) | prefetch_fields(None)
        names = {field.name for field in dataclasses.fields(Stats)} - {"bytes_per_token"}  # by rows there
        scheduled = self._schedule.stats() if self._schedule is not None else {}
        return Stats(
            **counted | {name: value for name, value in scheduled.items() if name in names},
            load_s=self._load_s,
            load_bytes_read=self._load_bytes_read,
            peak_rss_bytes=host.peak_rss_bytes(),
            budget_bytes=self._memory.budget_bytes,
            kernels=_PROVIDER,
        )

    def _need(self, value: Any) -> Any:
        if value is None:
            raise BackendError("cannot use the model: it is closed; load it again")
        return value

    def close(self) -> None:
        """Free the model and its experts. May be called twice."""
        if self._schedule is not None:
            self._schedule.end_warm()
            self._schedule = None
        self._stream = self._tokenizer = self._model = self._kept = None
        self._runtime = None
        self._memory.close()

    def __enter__(self) -> GenaiModel:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
