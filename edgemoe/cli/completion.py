# SPDX-License-Identifier: MIT
"""One completion: the tokens of a prompt, and the tokens and text that a model answers.

`Llama.create_completion` hands out text without token ids, so this drives `Llama.generate`, the loop below it,
with the same defaults of sampling.
"""

from __future__ import annotations

import codecs
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from edgemoe.cli.options import UNLIMITED
from edgemoe.errors import EdgeMoeError
from edgemoe.sizes import format_size

if TYPE_CHECKING:
    from edgemoe.genai import GenaiModel
    from edgemoe.llama import Llama
    from edgemoe.types import Stats

Message = dict[str, str]
"""One message of a conversation: its `role` (system, user, assistant) and its `content`."""

CHAT_TEMPLATE_KEY = "tokenizer.chat_template"


@runtime_checkable
class OwnTokens(Protocol):
    """A model that makes tokens of text by itself, as that of a folder does (`edgemoe.genai.GenaiModel`)."""

    @property
    def has_chat_template(self) -> bool:
        """Whether it brings a chat template of its own."""

    def text_tokens(self, text: str) -> list[int]:
        """The tokens of a plain prompt."""

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, ready for an answer."""

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""


class Completion:
    """The answer to a prompt, made token by token while it is iterated.

    Each step yields the text that became complete with one token: whole characters only, so it may be empty. An
    iteration that is interrupted leaves in `tokens` and `text` what had been generated until then.

    Attributes:
        tokens: ids of the tokens generated so far, without the one that ended the answer.
        text: their text; bytes of a character that was never finished are left out.
        is_cut: the answer was stopped by the limit or the context, not by the model.
    """

    def __init__(
        self,
        llm: Llama | GenaiModel,
        prompt_tokens: Sequence[int],
        *,
        n_tokens_max: int,
        temperature: float,
        seed: int | None,
    ) -> None:
        """Prepare an answer of at most `n_tokens_max` tokens (`UNLIMITED`: until the context is full).

        Raises:
            EdgeMoeError: the prompt leaves no room in the context.
        """
        n_room = llm.n_ctx() - len(prompt_tokens)
        if n_room < 1:
            raise EdgeMoeError(
                f"the prompt does not fit into the context: {len(prompt_tokens)} tokens, expected at most "
                f"{llm.n_ctx() - 1}; shorten it or use --ctx {len(prompt_tokens) + 256}"
            )
        self.tokens: list[int] = []
        self.text = ""
        self.is_cut = False
        self._llm = llm
        self._prompt_tokens = list(prompt_tokens)
        self._n_tokens_max = n_room if n_tokens_max == UNLIMITED else min(n_tokens_max, n_room)
        self._temperature = temperature
        self._seed = seed
        self._first_token_s = 0.0
        self._last_token_s = 0.0
        self._at_start = self._at_first_token = llm.stats()

    def __iter__(self) -> Iterator[str]:
        """Generate; once only."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        if self._seed is not None:
            self._llm.set_seed(self._seed)
        with contextlib.closing(self._llm.generate(self._prompt_tokens, temp=self._temperature)) as generated:
            for token in generated:
                self._last_token_s = time.monotonic()
                if self._first_token_s == 0.0:
                    self._first_token_s = self._last_token_s
                    self._at_first_token = self._llm.stats()
                if is_end_of_generation(self._llm, token):
                    return
                self.tokens.append(token)
                piece = decoder.decode(self._llm.detokenize([token]))
                self.text += piece
                yield piece
                if len(self.tokens) >= self._n_tokens_max:
                    self.is_cut = True
                    return

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second from the first token to the last, sampling included; 0.0 before the second."""
        seconds = self._last_token_s - self._first_token_s
        return max(len(self.tokens) - 1, 0) / seconds if seconds > 0 else 0.0

    def footer(self) -> str:
        """One line about the answer: its speed, and what it asked from storage.

        Hit rate and bytes are those of decoding, between the first token and the last; the prompt's share shows in
        TTFT. Stall is that of both.
        """
        start, first, end = self._at_start, self._at_first_token, self._llm.stats()
        n_hits = end.expert_hits - first.expert_hits
        n_asked = n_hits + end.expert_misses - first.expert_misses + end.expert_late_hits - first.expert_late_hits
        n_drafted = end.drafted_tokens - start.drafted_tokens
        n_accepted = end.accepted_tokens - start.accepted_tokens
        n_decoded = max(end.completion_tokens - first.completion_tokens, 1)
        parts = [
            f"{len(self.tokens)} tokens" + (", cut at the limit" if self.is_cut else ""),
            f"{self.decode_tokens_per_s:.1f} tok/s",
            f"TTFT {end.ttft_s:.2f} s",
            f"hits {n_hits / n_asked:.1%}" if n_asked else "hits -",
            f"{(end.expert_bytes_read - first.expert_bytes_read) / n_decoded / 2**20:.2f} MiB read/token",
            *([f"drafts {n_accepted} of {n_drafted} right"] if n_drafted else []),
            *([reuse_price(end)] if is_lossy(end) else []),
            *([miss_price(end)] if end.lowbit_hits or end.skipped_experts else []),
            f"stall {end.stall_s - start.stall_s:.2f} s",
            f"memory peak {format_size(end.peak_rss_bytes)} of {format_size(end.budget_bytes)}",
        ]
        return "[" + " | ".join(parts) + "]"


def is_lossy(stats: Stats) -> bool:
    """Whether there is a price to show."""
    return stats.reuse_bias > 0 or stats.selections_changed > 0 or stats.reuse_price_target is not None


def reuse_price(stats: Stats) -> str:
    """What choosing other or fewer experts costs, over all that was decoded so far, and what was expected of a bias."""
    expected = ""
    if stats.reuse_price_target is not None:
        allowed = f"{stats.reuse_price_target:.2%} of perplexity"
        if stats.reuse_price_expected is None:
            return f"reuse bias off: none is known to cost at most {allowed}"
        expected = f"; expected {stats.reuse_price_expected:+.2%}, allowed {allowed}"
    bias = f"reuse bias {stats.reuse_bias:.2f} now: " if stats.reuse_bias > 0 else ""
    return (
        f"{bias}{stats.selections_changed:.1%} of experts changed, "
        f"{stats.gate_mass_moved:.1%} of their weight, KL {stats.kl_estimate:.3f}{expected}"
    )


def miss_price(stats: Stats) -> str:
    """What became of experts that were not used, or not exactly, over all that was decoded so far."""
    return f"{stats.lowbit_hits} low-bit copies, {stats.skipped_experts} experts left out"


def text_prompt(llm: Llama | GenaiModel, text: str) -> list[int]:
    """The tokens of a plain prompt, begun as the model wants it begun."""
    if isinstance(llm, OwnTokens):
        return llm.text_tokens(text)
    tokens: list[int] = llm.tokenize(text.encode("utf-8", errors="replace"), add_bos=True, special=True)
    if not tokens and llm.token_bos() >= 0:
        tokens = [llm.token_bos()]
    if not tokens:
        raise EdgeMoeError("the prompt is empty: found 0 tokens, expected at least 1; give it some text")
    return tokens


def chat_prompt(llm: Llama | GenaiModel, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation in the model's own chat template (ChatML if it has none), ready for an answer.

    Raises:
        EdgeMoeError: the template refuses the conversation; some know no system message.
    """
    if isinstance(llm, OwnTokens):
        return llm.chat_tokens(messages)
    from jinja2 import TemplateError
    from llama_cpp.llama_chat_format import CHATML_CHAT_TEMPLATE, Jinja2ChatFormatter

    formatter = Jinja2ChatFormatter(
        template=llm.metadata.get(CHAT_TEMPLATE_KEY) or CHATML_CHAT_TEMPLATE,
        bos_token=_token_text(llm, llm.token_bos()),
        eos_token=_token_text(llm, llm.token_eos()),
    )
    conversation: list[Any] = list(messages)
    try:
        prompt: str = formatter(messages=conversation).prompt
    except (TemplateError, ValueError) as error:
        raise EdgeMoeError(
            f"the chat template of the model failed: {error}; try without a system message, or `edgemoe generate` "
            "without --chat"
        ) from error
    tokens: list[int] = llm.tokenize(prompt.encode("utf-8", errors="replace"), add_bos=False, special=True)
    return tokens


def has_chat_template(llm: Llama | GenaiModel) -> bool:
    """Whether the model brings a chat template of its own."""
    if isinstance(llm, OwnTokens):
        return llm.has_chat_template
    return bool(llm.metadata.get(CHAT_TEMPLATE_KEY))


def is_end_of_generation(llm: Llama | GenaiModel, token: int) -> bool:
    """Whether a token ends an answer (end of sequence, of turn, ...)."""
    if isinstance(llm, OwnTokens):
        return llm.is_end(token)
    import llama_cpp

    return bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(llm.model), token))


def _token_text(llm: Llama, token: int) -> str:
    """The text of a special token as it stands in the vocabulary; empty if the model has none."""
    if token < 0:
        return ""
    import llama_cpp

    text: bytes = llama_cpp.llama_vocab_get_text(llama_cpp.llama_model_get_vocab(llm.model), token)
    return text.decode("utf-8", errors="replace")
