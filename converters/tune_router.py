# SPDX-License-Identifier: MIT
"""Trains the routers of a Mixture-of-Experts model so that tokens reuse experts, and nothing else of it.

The checkpoint is run by transformers, in float32; the GGUF that was made of it says where training begins, and gets the
result: a copy in which the routers' bytes alone differ. A router is whatever parameter of the model has the numbers
that `blk.N.ffn_gate_inp.weight` has, so no names are assumed, and another model's file is refused.

Methods, with L_reuse of `router_losses` (a mean over layers) and a factor r that rises from 0 to 1 over the first tenth
of the steps, as the learning rate does:

- `remoe` (ReMoE, arXiv 2605.27081): cross-entropy + w_anchor KL(P || P_ref) + r w_reuse L_reuse, where P_ref is the
  original router on the same input. The paper's weights are in an appendix that we have not seen; ours were chosen on
  the tiny trained model (docs/tuning.md).
- `kd` (Router KD, arXiv 2603.02217, and the same term): KL(original model || tuned model) + r w_reuse L_reuse.
- `ce`, the control: cross-entropy.

Same seed, versions of packages and number of threads: same bytes. Memory: `needed_bytes`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import psutil
import torch

from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufModel, read_model
from edgemoe.sizes import format_size

from . import evaluate, router_losses
from .gguf_writer import Progress, no_progress
from .hf.checkpoint import open_checkpoint
from .hf.transformers_model import load_model
from .router_probe import RouterProbe, attach, watched
from .router_tensors import find_routers, write_with
from .tuning_settings import Settings, check

HELD_OUT_SHARE = 0.1
"""Of each text, its end, which is not trained on."""

MAX_HELD_OUT_WINDOWS = 16

_WARM_UP_SHARE = 0.1  # of the steps; 200 of 2000 in the paper
_UNSUITABLE = ("phimoe",)  # its routers only rank in GGUF: their mixing weights are not those that would be trained
_LOGITS_COPIES = {"remoe": 4, "kd": 6, "ce": 4}
"""Of a batch: as computed, in float32, their log-softmax and its gradient; for kd also the original model's two."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """The held-out text.

    Attributes:
        cross_entropy: nats per token.
        overlap: share of a token's experts that the token before had chosen too.
        hit_rate: share of a token's experts in a least recently used cache of a quarter of each layer's experts (a
            token's own number at least) that is empty at the beginning of each window.
    """

    cross_entropy: float
    overlap: float
    hit_rate: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What tuning did.

    Attributes:
        n_routers, n_parameters: what was trained.
        n_train_tokens, n_held_out_tokens: tokens that a step may draw, and that quality is measured on.
        before, after: quality of the original and the tuned routers.
    """

    n_routers: int
    n_parameters: int
    n_train_tokens: int
    n_held_out_tokens: int
    before: Quality
    after: Quality


OnQuality = Callable[[int, float | None, Quality], None]
"""Called with the step, its loss (None before the first) and the quality after it."""


def tune(
    checkpoint: Path,
    source: Path,
    out: Path,
    texts: Sequence[str],
    settings: Settings,
    *,
    progress: Progress | None = None,
    on_quality: OnQuality | None = None,
) -> Report:
    """Write the GGUF `source` with routers trained on `texts` to `out`. See the module.

    Args:
        checkpoint: the folder that `source` was converted from, of a class that transformers knows.
        source: a GGUF of one file.
        out: another file; replaced if it exists, when the new one is complete and on the disk.
        texts: a tenth of each is held out.
        settings: how.
        progress: called with stage (`load`, `train` in steps, `write` in bytes), done and total.
        on_quality: called at the beginning, about ten times while it trains, and at the end.

    Raises:
        ModelFormatError: `source` is not a complete GGUF.
        ConversionError: the files are not of the same model, transformers cannot run it, memory or text do not suffice,
            training diverges, or `out` cannot be written.
        ValueError: a setting makes no sense.
    """
    check(settings)
    report = progress or no_progress
    model = read_model(source)
    if model.architecture in _UNSUITABLE:
        raise ConversionError(
            f"cannot tune the routers of {source}: llama.cpp weights the experts of {model.architecture} otherwise "
            "than transformers, so what is trained would not be what runs; there is no way to tune this model"
        )
    found = find_routers(model)
    windows = _windows(model, texts, settings)
    _check_memory(model, checkpoint, settings)
    report("load", 0, 0)
    network = load_model(checkpoint, "tune routers")
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    routers = [attach(network, model, router, checkpoint) for router in found]
    trainer = _Trainer(network, routers, windows, settings)
    with watched(network, routers):
        before = after = trainer.quality()
        if on_quality:
            on_quality(0, None, before)
        every = max(1, settings.n_steps // 10)
        for step in range(settings.n_steps):
            report("train", step, settings.n_steps)
            loss = trainer.step(step)
            _check_finite(loss, step, source)
            if (step + 1) % every == 0 or step + 1 == settings.n_steps:
                after = trainer.quality()
                _check_finite(after.cross_entropy, step, source)
                if on_quality:
                    on_quality(step + 1, loss, after)
    write_with(model, out, {name: value for router in routers for name, value in router.values().items()}, report)
    return Report(
        n_routers=len(routers),
        n_parameters=sum(p.numel() for router in routers for p in router.parameters),
        n_train_tokens=windows.train.size,
        n_held_out_tokens=windows.held_out.size,
        before=before,
        after=after,
    )


def needed_bytes(model: GgufModel, checkpoint: Path, settings: Settings) -> int:
    """An estimate of the memory that tuning takes: weights in float32, what is kept of a batch until its gradients
    are computed, and copies of its logits.

    Raises:
        ConversionError: the checkpoint cannot be read.
    """
    stored = open_checkpoint(checkpoint).tensors.values()
    n_weights = sum(math.prod(tensor.shape) * (2 if tensor.dtype == "U8" else 1) for tensor in stored)  # U8: MXFP4
    n_tokens = settings.n_windows * settings.window_tokens
    n_layers, width = _number(model, "block_count"), _number(model, "embedding_length")
    heads = _number(model, "attention.head_count")
    expert_width = _number(model, "expert_feed_forward_length") or _number(model, "feed_forward_length")
    # Of a layer: 20 vectors of the model's width and 6 of each expert's for a token, and 3 tables of attention. That
    # makes 688 MiB of the tiny model's 4 windows of 512 tokens; 595 to 677 were measured (highest resident set).
    of_layer = n_tokens * (20 * width + 6 * model.n_experts_used * (expert_width + width))
    of_layer += 3 * settings.n_windows * heads * settings.window_tokens**2
    n_vocab = len(model.metadata.get("tokenizer.ggml.tokens", ()))
    return 4 * (n_weights + n_layers * of_layer + _LOGITS_COPIES[settings.method] * n_tokens * n_vocab)


def _number(model: GgufModel, key: str) -> int:
    value = model.metadata.get(f"{model.architecture}.{key}", 0)
    values = value if isinstance(value, list) else [value]
    return max(int(v) for v in values)


def _check_finite(loss: float, step: int, source: Path) -> None:
    if not math.isfinite(loss):
        raise ConversionError(
            f"cannot tune the routers of {source}: the loss is {loss} at step {step + 1}, expected a number; use a "
            "smaller --rate"
        )


def _check_memory(model: GgufModel, checkpoint: Path, settings: Settings) -> None:
    needed = needed_bytes(model, checkpoint, settings)
    free = psutil.virtual_memory().available
    if needed > free:
        raise ConversionError(
            f"cannot tune the routers of {checkpoint}: that takes about {format_size(needed)} ({needed} bytes), "
            f"{format_size(free)} are free; use a larger machine, or a smaller --batch or --context"
        )


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Token ids [window, token], to train on and held out."""

    train: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]


def _windows(model: GgufModel, texts: Sequence[str], settings: Settings) -> _Windows:
    """The texts as the model's own vocabulary cuts them, in windows, of each text the last ones held out."""
    train: list[list[int]] = []
    held_out: list[list[int]] = []
    with _vocabulary(model.path) as llama:
        for text in texts:
            chunks = [tokens for tokens, _ in evaluate.chunks_of_tokens(llama, text, settings.window_tokens)]
            full = [tokens for tokens in chunks if len(tokens) == settings.window_tokens]
            n_held_out = math.ceil(HELD_OUT_SHARE * len(full)) if len(full) > 1 else 0
            train += full[: len(full) - n_held_out]
            held_out += full[len(full) - n_held_out :]
    if not train or not held_out:
        raise ConversionError(
            f"cannot tune the routers of {model.path}: the texts have {len(train) + len(held_out)} windows of "
            f"{settings.window_tokens} tokens, expected one to train on and one of the same text to measure on; use "
            "longer texts or a smaller --context"
        )
    chosen = np.unique(np.linspace(0, len(held_out) - 1, min(len(held_out), MAX_HELD_OUT_WINDOWS)).round().astype(int))
    return _Windows(np.array(train), np.array(held_out)[chosen])


@contextlib.contextmanager
def _vocabulary(path: Path) -> Iterator[Any]:
    """llama.cpp's model of the vocabulary alone."""
    with evaluate.quiet_llama_cpp():
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        llama = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not llama:
        raise ConversionError(f"cannot read the vocabulary of {path}: llama.cpp refuses it; is the file complete?")
    try:
        yield llama
    finally:
        llama_cpp.llama_model_free(llama)


class _Trainer:
    """The network and its optimizer. One thread."""

    def __init__(self, network: Any, routers: list[RouterProbe], windows: _Windows, settings: Settings) -> None:
        self._network = network
        self._routers = routers
        self._windows = windows
        self._settings = settings
        parameters = [p for router in routers for p in router.parameters]
        self._optimizer = torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=0.0)
        self._order = self._shuffled()

    def step(self, step: int) -> float:
        """Train on the next windows; gives the loss before."""
        settings = self._settings
        ids = torch.from_numpy(np.stack([next(self._order) for _ in range(settings.n_windows)]))
        rise = min(1.0, (step + 1) / max(1.0, _WARM_UP_SHARE * settings.n_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate * rise
        teacher = self._original_logits(ids) if settings.method == "kd" else None
        logits = self._logits(ids)
        if teacher is None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        else:
            loss = router_losses.distillation_loss(logits, teacher)
        if settings.method != "ce" and settings.reuse_weight:
            loss = loss + rise * settings.reuse_weight * self._mean(functools.partial(self._reuse_loss, len(ids)))
        if settings.method == "remoe" and settings.anchor_weight:
            loss = loss + settings.anchor_weight * self._mean(functools.partial(self._anchor_loss, len(ids)))
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([loss])
        self._optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def quality(self) -> Quality:
        """Of the held-out windows."""
        losses, overlaps, hits = [], [], []
        for window in self._windows.held_out:
            ids = torch.from_numpy(window[None])
            logits = self._logits(ids)
            losses.append(float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])))
            for router in self._routers:
                chosen = router.chosen(1)
                n_experts = len(router.parameters[0])
                held = router_losses.residents(chosen, n_experts, max(chosen.shape[-1], n_experts // 4))
                overlaps.append(router_losses.overlap(chosen))
                hits.append(float(held.gather(-1, chosen).double().mean()))
        return Quality(float(np.mean(losses)), float(np.mean(overlaps)), float(np.mean(hits)))

    def _shuffled(self) -> Iterator[npt.NDArray[np.int64]]:
        """Windows to train on, again and again, each time in another order."""
        rng = np.random.default_rng(self._settings.seed)
        while True:
            for index in rng.permutation(len(self._windows.train)):
                yield self._windows.train[index]

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._network(input_ids=ids, use_cache=False).logits.float()
        return logits

    @torch.no_grad()
    def _original_logits(self, ids: torch.Tensor) -> torch.Tensor:
        tuned = [router.exchange(router.originals) for router in self._routers]
        try:
            return self._logits(ids)
        finally:
            for router, values in zip(self._routers, tuned, strict=True):
                router.exchange(values)

    def _mean(self, loss_of: Callable[[RouterProbe], torch.Tensor]) -> torch.Tensor:
        return torch.stack([loss_of(router) for router in self._routers]).mean()

    def _reuse_loss(self, n_windows: int, router: RouterProbe) -> torch.Tensor:
        chosen = router.chosen(n_windows)
        log_p = router.log_probabilities(n_windows)
        n_slots = max(self._settings.cached_experts or 0, chosen.shape[-1])
        held = router_losses.residents(chosen, log_p.shape[-1], n_slots)
        return router_losses.reuse_loss(log_p, held, chosen.shape[-1])

    def _anchor_loss(self, n_windows: int, router: RouterProbe) -> torch.Tensor:
        log_p = router.log_probabilities(n_windows)
        with torch.no_grad():
            reference = router.log_probabilities(n_windows, original=True)
        return router_losses.anchor_loss(log_p, reference)
