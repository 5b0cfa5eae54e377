# SPDX-License-Identifier: MIT
"""What reuse bias costs and gains with one model and one's own texts, stepped token by token with the real cache.

Each text begins with an exact prompt in an empty context. Its other tokens are evaluated one at a time, whatever the
model would have said (teacher forcing), because only decoding is biased. What each column is: docs/pricing.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as llama

from edgemoe import _native, reuse, runtime
from edgemoe.converters.cross_entropy import log_softmax
from edgemoe.errors import BudgetError, EdgeMoeError, ModelFormatError
from edgemoe.formats.gguf import GgufModel, read_model
from edgemoe.llama import Llama
from edgemoe.sizes import format_size

DEFAULT_PROMPT_TOKENS = 32
DEFAULT_TOKENS = 512
_LEAST_PROMPT_TOKENS = 2  # one token alone is decoded, with the bias

Logits = npt.NDArray[np.single]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Lever:
    """One setting: `reuse_bias`, `reuse_method` and `top_j` as for `Llama`; None for `reuse_bias` is lossless."""

    reuse_bias: float | None
    reuse_method: str = "cache-prior"
    top_j: int | None = None


EXACT = Lever(None)


@dataclasses.dataclass(frozen=True)
class TextPrice:
    """One text under one lever: means over `n_tokens`, the tokens predicted behind a decoded one.

    `cross_entropy` and `kl` (from the exact model) are nats per token; `agreement` is the share of positions at which
    both find the same token likeliest.
    """

    n_tokens: int
    cross_entropy: float
    kl: float
    agreement: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One lever over all texts; counters are of decoding only.

    Attributes:
        lever: the setting.
        texts: the price of each text, in the order given.
        selections_changed, gate_mass_moved, kl_estimate: as in `Stats`.
        bytes_per_token: bytes of experts read from storage, divided by decoded tokens.
        hit_rate: expert hits divided by requests.
        tokens_per_s: decoded tokens per second of evaluation.
    """

    lever: Lever
    texts: tuple[TextPrice, ...]
    selections_changed: float
    gate_mass_moved: float
    kl_estimate: float
    bytes_per_token: float
    hit_rate: float
    tokens_per_s: float

    @property
    def n_tokens(self) -> int:
        """Tokens predicted."""
        return sum(t.n_tokens for t in self.texts)

    def _mean(self, values: Sequence[float]) -> float:
        return sum(t.n_tokens * v for t, v in zip(self.texts, values, strict=True)) / self.n_tokens

    @property
    def cross_entropy(self) -> float:
        """Nats per token."""
        return self._mean([t.cross_entropy for t in self.texts])

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy)."""
        return math.exp(self.cross_entropy)

    @property
    def kl(self) -> float:
        """KL(exact || this), nats per token."""
        return self._mean([t.kl for t in self.texts])

    @property
    def agreement(self) -> float:
        """Share of positions with the exact model's likeliest token."""
        return self._mean([t.agreement for t in self.texts])


@dataclasses.dataclass(frozen=True)
class Change:
    """A row against the exact one: the difference of cross-entropy in nats per token, its standard error over texts
    (None with one text), and what the two mean for perplexity (0.01 is 1 % more)."""

    cross_entropy: float
    standard_error: float | None

    @property
    def perplexity(self) -> float:
        """Relative change of perplexity."""
        return math.expm1(self.cross_entropy)

    @property
    def perplexity_error(self) -> float | None:
        """Its standard error, to first order."""
        return None if self.standard_error is None else math.exp(self.cross_entropy) * self.standard_error


@dataclasses.dataclass(frozen=True)
class Price:
    """A price list: the exact row first, then one for each lever.

    `slots_bytes` is the memory of the experts, and `resident_share` how many of them it holds, 0 to 1.
    """

    model: str
    texts: tuple[str, ...]
    n_prompt_tokens: int
    slots_bytes: int
    resident_share: float
    rows: tuple[Row, ...]

    @property
    def exact(self) -> Row:
        """The lossless row."""
        return self.rows[0]

    def change(self, row: Row) -> Change:
        """What a row's lever does to cross-entropy, paired text by text."""
        weights = [t.n_tokens / row.n_tokens for t in row.texts]
        differences = [t.cross_entropy - e.cross_entropy for t, e in zip(row.texts, self.exact.texts, strict=True)]
        mean = sum(w * d for w, d in zip(weights, differences, strict=True))
        n = len(weights)
        if n < 2:
            return Change(mean, None)
        # Of a weighted mean; with texts of one length, the usual s / sqrt(n).
        squares = sum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True))
        return Change(mean, math.sqrt(squares * n / (n - 1)))

    def bytes_ratio(self, row: Row) -> float | None:
        """Bytes per token, divided by the exact row's; None where that reads nothing."""
        return row.bytes_per_token / self.exact.bytes_per_token if self.exact.bytes_per_token else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        fields = dataclasses.asdict(self)
        for row, plain in zip(self.rows, fields["rows"], strict=True):
            change = self.change(row)
            plain.update(plain.pop("lever"))
            plain.update(
                n_tokens=row.n_tokens,
                cross_entropy=row.cross_entropy,
                perplexity=row.perplexity,
                kl=row.kl,
                agreement=row.agreement,
                perplexity_change=change.perplexity,
                perplexity_change_error=change.perplexity_error,
                bytes_per_token_ratio=self.bytes_ratio(row),
            )
        return fields


def price(
    model_path: str | Path,
    texts: Sequence[str | Path],
    levers: Sequence[Lever],
    *,
    experts: float | None = None,
    memory: int | str | None = None,
    n_prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
    n_tokens: int = DEFAULT_TOKENS,
    prefetch: str = "off",
    progress: Progress | None = None,
    **llama_kwargs: Any,
) -> Price:
    """Measure what levers cost and gain; the model is loaded once for each, with a cold cache.

    Exact logits lie in a temporary file: tokens x vocabulary x 4 bytes.

    Args:
        model_path: a GGUF file, the first of a split one.
        texts: text files; each is evaluated from an empty context, the cache goes on from one to the next.
        levers: the settings; the exact row comes first by itself.
        experts: the share of all experts that memory holds, above 0 and up to 1, instead of a budget.
        memory: a budget, as for `Llama`; the memory for experts that the first load finds holds for all.
        n_prompt_tokens: tokens at the beginning of each text that are evaluated at once, exactly; at least 2.
        n_tokens: most tokens of each text, the prompt among them.
        prefetch: as for `Llama`; with anything but `off`, bytes and residents, and so choices, depend on timing.
        progress: called as (stage, done, total).
        llama_kwargs: as for `Llama`.

    Raises:
        EdgeMoeError: there is no text, one is too short or cannot be read, or the exact logits do not fit on disk.
        ModelFormatError, BudgetError, BackendError: as for `Llama`; also models without routed experts, and shares
            that do not hold the experts of one token.
        ValueError: a lever, a share or a number of tokens makes no sense.
    """
    report = progress or (lambda _stage, _done, _total: None)
    _check_counts(n_prompt_tokens, n_tokens, experts, memory)
    if not texts:
        raise EdgeMoeError("cannot measure a price: found no text, expected at least one file; name it with --text")
    contents = [_read(Path(t)) for t in texts]
    model = read_model(model_path)
    if not model.expert_tensors:
        raise ModelFormatError(
            f"cannot measure a price: {model.path} has no routed experts; name a Mixture-of-Experts model"
        )
    for lever in levers:
        reuse.check(_settings(lever), model)
    slots_bytes = None if experts is None else _slots_bytes(model, experts)
    options = dict(llama_kwargs, memory=memory, n_ctx=n_tokens, prefetch=prefetch, warm_start=False, logits_all=False)
    rows: list[Row] = []
    with tempfile.TemporaryFile(prefix="edgemoe-price-") as kept:
        for lever in (EXACT, *levers):
            with _open(model.path, lever, slots_bytes, options) as llm:
                slots_bytes = llm.stats().slots_bytes
                tokenized = [
                    _tokens(llm, t, c, n_prompt_tokens, n_tokens) for t, c in zip(texts, contents, strict=True)
                ]
                if lever is EXACT:
                    _check_room(sum(len(t) - 1 - n_prompt_tokens for t in tokenized), llm.n_vocab())
                kept.seek(0)
                stage = f"measuring {len(rows) + 1} of {len(levers) + 1}"
                rows.append(_measure(llm, lever, tokenized, n_prompt_tokens, kept, lambda *at, s=stage: report(s, *at)))
    return Price(
        model=model.path.name,
        texts=tuple(str(t) for t in texts),
        n_prompt_tokens=n_prompt_tokens,
        slots_bytes=slots_bytes or 0,
        resident_share=min(1.0, (slots_bytes or 0) / int(runtime.slot_sizes(model, 0).bank_slot_bytes)),
        rows=tuple(rows),
    )


def _check_counts(n_prompt_tokens: int, n_tokens: int, experts: float | None, memory: int | str | None) -> None:
    if n_prompt_tokens < _LEAST_PROMPT_TOKENS:
        raise ValueError(f"n_prompt_tokens is {n_prompt_tokens}: expected at least {_LEAST_PROMPT_TOKENS}")
    if n_tokens < n_prompt_tokens + 2:
        raise ValueError(
            f"n_tokens is {n_tokens}: expected at least {n_prompt_tokens + 2}, a prompt of {n_prompt_tokens}, one "
            "token to decode and one to predict"
        )
    if experts is not None and memory is not None:
        raise ValueError("experts and memory exclude each other: expected one of them")
    if experts is not None and not 0 < experts <= 1:
        raise ValueError(f"experts is {experts}: expected a share above 0 and up to 1")


def _settings(lever: Lever) -> reuse.Settings | None:
    return reuse.parse("off" if lever.reuse_bias is None else lever.reuse_bias, lever.reuse_method, lever.top_j)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EdgeMoeError(f"cannot read the text {path}: {error.strerror}; name a text file") from error


def _slots_bytes(model: GgufModel, share: float) -> int:
    sizes = runtime.slot_sizes(model, 0)
    bank_bytes, cycle_bytes = int(sizes.bank_slot_bytes), int(sizes.cycle_slot_bytes)
    slots_bytes = int(share * bank_bytes)
    if slots_bytes < cycle_bytes:
        enough = math.ceil(100 * cycle_bytes / bank_bytes) / 100
        raise BudgetError(
            f"cannot keep {share:.3g} of the experts: that is {format_size(slots_bytes)}, and one token of "
            f"{model.path.name} uses {format_size(cycle_bytes)}; use --experts {enough}"
        )
    return slots_bytes


def _tokens(llm: Llama, path: str | Path, text: bytes, n_prompt_tokens: int, n_tokens: int) -> list[int]:
    tokens: list[int] = llm.tokenize(text, add_bos=True, special=False)[:n_tokens]
    if len(tokens) < n_prompt_tokens + 2:
        raise EdgeMoeError(
            f"the text is too short: found {len(tokens)} tokens, expected at least {n_prompt_tokens + 2} ({path}); "
            "use a longer text or fewer --prompt-tokens"
        )
    return tokens


def _check_room(n_positions: int, n_vocab: int) -> None:
    needed_bytes = n_positions * n_vocab * np.dtype(np.single).itemsize
    folder = tempfile.gettempdir()
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise EdgeMoeError(
            f"cannot keep the exact logits: {format_size(free_bytes)} are free, expected {format_size(needed_bytes)} "
            f"({folder}); use fewer texts or --tokens, or set TMPDIR"
        )


@contextlib.contextmanager
def _open(path: Path, lever: Lever, slots_bytes: int | None, options: dict[str, Any]) -> Iterator[Llama]:
    keywords: dict[str, Any] = dataclasses.asdict(lever)
    keywords["reuse_bias"] = "off" if lever.reuse_bias is None else lever.reuse_bias
    with Llama(path, **keywords, **options) as llm:
        if slots_bytes is not None:
            assert llm._runtime is not None
            _native.set_slots_bytes(llm._runtime, slots_bytes)
        yield llm


def _measure(
    llm: Llama,
    lever: Lever,
    texts: Sequence[Sequence[int]],
    n_prompt_tokens: int,
    kept: BinaryIO,
    report: Callable[[int, int], None],
) -> Row:
    """One lever over all texts; the exact one writes its logits to `kept`, the others read them."""
    found: list[TextPrice] = []
    n_decoded = n_read_bytes = n_hits = n_asked = 0
    seconds = 0.0
    shares = np.zeros(3)
    for i, tokens in enumerate(texts):
        report(i, len(texts))
        llm.reset()
        llm.eval(tokens[:n_prompt_tokens])
        llm.reset_stats()
        found.append(_step(llm, tokens, n_prompt_tokens, kept, is_exact=lever is EXACT))
        stats = llm.stats()
        n = stats.completion_tokens
        n_decoded += n
        n_read_bytes += stats.expert_bytes_read
        n_hits += stats.expert_hits
        n_asked += stats.expert_hits + stats.expert_misses + stats.expert_late_hits
        seconds += n / stats.decode_tokens_per_s
        # Each token has as many selections as any other, so tokens are the weights of these means.
        shares += n * np.array([stats.selections_changed, stats.gate_mass_moved, stats.kl_estimate])
    report(len(texts), len(texts))
    changed, moved, kl_estimate = (shares / n_decoded).tolist()
    return Row(
        lever=lever,
        texts=tuple(found),
        selections_changed=changed,
        gate_mass_moved=moved,
        kl_estimate=kl_estimate,
        bytes_per_token=n_read_bytes / n_decoded,
        hit_rate=n_hits / n_asked if n_asked else 0.0,
        tokens_per_s=n_decoded / seconds,
    )


def _step(llm: Llama, tokens: Sequence[int], n_prompt_tokens: int, kept: BinaryIO, *, is_exact: bool) -> TextPrice:
    n_vocab = llm.n_vocab()
    losses, kls, agreements = [], [], []
    for token, target in zip(tokens[n_prompt_tokens:], tokens[n_prompt_tokens + 1 :], strict=False):
        llm.eval([token])
        logits: Logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(llm._ctx.ctx, -1), shape=(n_vocab,))
        if is_exact:
            kept.write(logits.tobytes())
            exact = logits
        else:
            exact = np.frombuffer(kept.read(logits.nbytes), np.single)
        loss, kl, agrees = compare(exact, logits, target)
        losses.append(loss)
        kls.append(kl)
        agreements.append(agrees)
    return TextPrice(len(losses), float(np.mean(losses)), float(np.mean(kls)), float(np.mean(agreements)))


def compare(exact: Logits, found: Logits, target: int) -> tuple[float, float, bool]:
    """Of two rows of logits, [vocabulary]: the second's loss of `target` and KL(exact || found), both in nats, and
    whether they find the same token likeliest."""
    log_p, log_q = log_softmax(exact), log_softmax(found)
    kl = float(np.exp(log_p) @ (log_p - log_q))
    return -float(log_q[target]), max(kl, 0.0), bool(exact.argmax() == found.argmax())
