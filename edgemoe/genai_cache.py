# SPDX-License-Identifier: MIT
"""A generator of onnxruntime-genai whose cache of keys and values outlives an answer.

What genai 0.18.0 does, tried on folders of its builder and of ours, with its own kernels:

- The token that it has chosen is in its sequence before it is evaluated. Tokens that are appended then are evaluated
  without it: an error where the cache grows with the text, wrong logits in silence where it is made at once (3e-2 of
  the largest one). `get_logits` evaluates it. The token that ends an answer is not in the sequence, and appending opens
  a generator again that was done.
- `rewind_to` forgets the end of the text. It refuses models with states of convolutions (LFM2), and windows that
  tokens have left already (gpt-oss of the builder). A cache that grows has to lose a token: its own length is refused.
- What a generator samples with is fixed when it is made, and its random numbers go on from one answer to the next. So
  a seed asks for a new generator. (Another one cannot choose by the first one's logits: `set_logits` of 0.18.0 wants
  its generator to have evaluated something for each token.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

# Of these types, genai evaluates a text again that gets longer than so many tokens, as RoPE changes for all of it.
_CHANGING_TOKENS = {"phi3": 4096, "phimoe": 4096, "phi3small": 8192}


def can_outlive(architecture: str, n_ctx: int) -> bool:
    """Whether a cache made for one text is right for another that begins alike; `architecture` as genai names it."""
    return n_ctx <= _CHANGING_TOKENS.get(architecture, n_ctx)


class CachedGenerator:
    """A generator of one sequence, and the tokens that its cache has keys and values of.

    Attributes:
        sampling: the search options that it was made with.
    """

    def __init__(self, generator: Any, sampling: dict[str, Any], grows: bool) -> None:
        """Take a generator that has evaluated nothing.

        Args:
            generator: an `onnxruntime_genai.Generator`.
            sampling: its search options.
            grows: whether the cache grows with the text (no `past_present_share_buffer`).
        """
        self.sampling = sampling
        self._generator = generator
        self._grows = grows
        self._evaluated: list[int] = []
        self._pending: int | None = None  # in genai's sequence, and not evaluated
        self._is_whole = True

    def cut_back(self, tokens: Sequence[int]) -> int:
        """Forget what does not begin `tokens`.

        Returns:
            How many of `tokens` the cache has; `append` takes all others, at least one. 0: this generator is of no
            more use.
        """
        n_kept = _n_common(self._evaluated, tokens[:-1])
        if n_kept == len(self._evaluated) and self._is_whole and self._pending in (None, tokens[n_kept]):
            return n_kept
        # What an interrupt has left is longer by an unknown number of tokens, maybe none.
        is_at_end = n_kept == len(self._evaluated)
        n_kept -= is_at_end and (self._grows or not self._is_whole)
        if n_kept < 1:
            return 0
        try:
            self._generator.rewind_to(n_kept)
        except Exception:  # genai's reasons are for evaluating the text again
            return 0
        del self._evaluated[n_kept:]
        self._pending = None
        self._is_whole = True
        return n_kept

    def append(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens; those that are chosen next follow them.

        Raises:
            Exception: genai's, if the model fails or there is no room. Use the generator no more.
        """
        rest = list(tokens)
        with self._changing():
            if self._pending is not None:  # `cut_back` has seen to it that it is the first of them
                self._generator.get_logits()
                del rest[0]
            if rest:
                self._generator.append_tokens(rest)
            self._evaluated += tokens
            self._pending = None

    def next_token(self) -> int:
        """Choose a token, after the evaluation of the one before.

        Raises:
            Exception: as `append`.
        """
        with self._changing():
            self._generator.generate_next_token()
            if self._pending is not None:
                self._evaluated.append(self._pending)
            token = int(self._generator.get_next_tokens()[0])
            self._pending = token if self._generator.token_count() > len(self._evaluated) else None
        return token

    def is_done(self) -> bool:
        """Whether the token that was chosen last ends the text, or its longest length is reached."""
        return bool(self._generator.is_done())

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        self._is_whole = False
        yield
        self._is_whole = True


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
