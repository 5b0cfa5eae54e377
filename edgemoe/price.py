# SPDX-License-Identifier: MIT
"""What lossy levers cost and gain with one model and one's own texts, stepped token by token with the real cache.

Each text begins with an exact prompt in an empty context. Its other tokens are evaluated one at a time, whatever the
model would have said (teacher forcing), because only decoding is lossy. What each column is: docs/pricing.md.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as llama

from edgemoe import _native, planner, price_curve, reuse, runtime
from edgemoe.converters.cross_entropy import log_softmax
from edgemoe.errors import BudgetError, EdgeMoeError, ModelFormatError
from edgemoe.formats.gguf import GgufModel, read_model, read_raw_metadata
from edgemoe.levers import EXACT, Lever
from edgemoe.llama import Llama
from edgemoe.price_curve import Curve, Point
from edgemoe.price_list import Price, Row, TextPrice
from edgemoe.sizes import format_size

DEFAULT_PROMPT_TOKENS = 32
DEFAULT_TOKENS = 512
_LEAST_PROMPT_TOKENS = 2  # one token alone is decoded, with the levers
_OF_REUSE = ("reuse_bias", "reuse_method", "top_j")

Logits = npt.NDArray[np.single]
Progress = Callable[[str, int, int], None]


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
    eviction: str = "auto",
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
        eviction: as for `Llama`.
        progress: called as (stage, done, total).
        llama_kwargs: as for `Llama`.

    Raises:
        EdgeMoeError: there is no text, one is too short or cannot be read, or the exact logits do not fit on disk.
        ModelFormatError, BudgetError, BackendError: as for `Llama`; also models without routed experts, shares that
            do not hold the experts of one token, and a lever's model that is no copy of this one.
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
    options = dict(
        llama_kwargs,
        memory=memory,
        n_ctx=n_tokens,
        prefetch=prefetch,
        eviction=eviction,
        warm_start=False,
        logits_all=False,
    )
    for lever in levers:
        if lever.model is not None:
            _check_copy(model, read_model(lever.model))
        # What is wrong with a lever is found now, and not behind an exact pass that may take hours.
        planner.plan(lever.model or model.path, **dict(lever.keywords), **options)
    slots_bytes = None if experts is None else _slots_bytes(model, experts)
    rows: list[Row] = []
    exact_tokens: list[list[int]] = []
    with tempfile.TemporaryFile(prefix="edgemoe-price-") as kept:
        for lever in (EXACT, *levers):
            with _open(lever.model or model.path, lever, slots_bytes, options) as llm:
                slots_bytes = llm.stats().slots_bytes
                tokenized = [
                    _tokens(llm, t, c, n_prompt_tokens, n_tokens) for t, c in zip(texts, contents, strict=True)
                ]
                if not rows:
                    exact_tokens = tokenized
                    _check_room(sum(len(t) - 1 - n_prompt_tokens for t in tokenized), llm.n_vocab())
                elif tokenized != exact_tokens:
                    raise _no_copy(model, llm._gguf, "its tokens of the texts are others")
                kept.seek(0)
                stage = f"measuring {len(rows) + 1} of {len(levers) + 1}"
                row = _measure(
                    llm,
                    lever,
                    tokenized,
                    n_prompt_tokens,
                    kept,
                    is_exact=not rows,
                    report=lambda *at, s=stage: report(s, *at),
                )
                rows.append(row)
    return Price(
        model=model.path.name,
        texts=tuple(str(t) for t in texts),
        n_prompt_tokens=n_prompt_tokens,
        slots_bytes=slots_bytes or 0,
        resident_share=price_curve.resident_share(model, slots_bytes or 0),
        rows=tuple(rows),
        eviction=eviction,
        measured_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def remember(found: Price, model_path: str | Path) -> list[Curve]:
    """Keep what was measured of reuse biases for `reuse_bias="auto"`, in the user's cache folder; see `price_curve`.

    Levers that set something else as well, and other models', are left out. The result is what was kept.

    Raises:
        OSError, RuntimeError: see `price_curve.remember`.
    """
    model = read_model(model_path)
    rows: dict[tuple[str, int], dict[float, Row]] = {}
    for row in found.rows[1:]:
        strength = row.lever.get("reuse_bias")
        if strength is None or row.lever.model is not None or {n for n, _ in row.lever.keywords} - set(_OF_REUSE):
            continue
        top_j = row.lever.get("top_j") or reuse.default_top_j(model.n_experts, model.n_experts_used)
        rows.setdefault((row.lever.get("reuse_method") or "cache-prior", top_j), {})[strength] = row
    exact = found.exact
    curves = [
        Curve(
            method=method,
            top_j=top_j,
            resident_share=found.resident_share,
            eviction=found.eviction,
            measured_at=found.measured_at,
            n_tokens=tuple(t.n_tokens for t in exact.texts),
            cross_entropies=tuple(t.cross_entropy for t in exact.texts),
            bytes_per_token=exact.bytes_per_token,
            points=tuple(
                Point(strength, tuple(t.cross_entropy for t in row.texts), row.bytes_per_token)
                for strength, row in sorted(measured.items())
            ),
        )
        for (method, top_j), measured in rows.items()
    ]
    return price_curve.remember(model, curves) if curves else []


def _check_copy(model: GgufModel, other: GgufModel) -> None:
    """Refuse to compare what cannot be compared: another vocabulary, other experts."""
    if _vocabulary(model) != _vocabulary(other):
        raise _no_copy(model, other, "its vocabulary is another one")
    shapes, others = ({t.name: (t.shape, t.type_name) for t in m.expert_tensors} for m in (model, other))
    differing = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
    if differing:
        raise _no_copy(
            model,
            other,
            f"{len(differing)} tensors of experts have other shapes or formats, the first is {differing[0]}: found "
            f"{others.get(differing[0])}, expected {shapes.get(differing[0])}",
        )


def _vocabulary(model: GgufModel) -> dict[str, bytes]:
    values = read_raw_metadata(model.path)
    return {name: value for name, value in values.items() if name.startswith("tokenizer.ggml.")}


def _no_copy(model: GgufModel, other: GgufModel, why: str) -> ModelFormatError:
    return ModelFormatError(
        f"cannot measure {other.path} against {model.path}: {why}; name a copy of the same model with other routers"
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
    with Llama(path, **dict(lever.keywords), **options) as llm:
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
    is_exact: bool,
    report: Callable[[int, int], None],
) -> Row:
    """One lever over all texts; the exact one writes its logits to `kept`, the others read them."""
    found: list[TextPrice] = []
    n_decoded = n_read_bytes = n_hits = n_asked = n_lowbit = n_skipped = 0
    seconds = 0.0
    shares = np.zeros(3)
    for i, tokens in enumerate(texts):
        report(i, len(texts))
        llm.reset()
        llm.eval(tokens[:n_prompt_tokens])
        llm.reset_stats()
        found.append(_step(llm, tokens, n_prompt_tokens, kept, is_exact=is_exact))
        stats = llm.stats()
        n = stats.completion_tokens
        n_decoded += n
        n_read_bytes += stats.expert_bytes_read
        n_hits += stats.expert_hits
        n_asked += stats.expert_hits + stats.expert_misses + stats.expert_late_hits
        n_lowbit += stats.lowbit_hits
        n_skipped += stats.skipped_experts
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
        lowbit_hits=n_lowbit,
        skipped_experts=n_skipped,
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
