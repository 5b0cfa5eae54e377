# SPDX-License-Identifier: MIT
"""What a trace says in a few numbers: how local the choice of experts is, and what it cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.trace import Trace

CACHE_SHARES = (0.125, 0.25, 0.5)
"""Shares of a layer's experts for which an LRU hit rate is given."""


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One layer; None where the trace does not say.

    Attributes:
        layer: its number in the model.
        hit_rate: of the distinct experts that each batch chose, how many were wholly resident when the layer began.
        next_token_reuse: share of a token's experts that the token before had chosen too.
        router_entropy_bits: mean entropy of the mixing weights of a token's experts, scaled to sum 1.
        load_imbalance: uses of the most used expert divided by the mean over all experts.
    """

    layer: int
    hit_rate: float | None
    next_token_reuse: float | None
    router_entropy_bits: float | None
    load_imbalance: float | None


@dataclasses.dataclass(frozen=True)
class TraceSummary:
    """A trace; None where it does not say. What is a mean of layers counts each of them once.

    Attributes:
        model: name of the model's file.
        n_layers, n_experts, n_experts_used: layers with routed experts; the most experts, and the most used, in one.
        tokens, decode_tokens, batches: tokens in all, tokens evaluated one at a time, and batches.
        hit_rate, decode_hit_rate: as of a layer, over all layers; of batches of one token only.
        bytes_per_token, stall_us_per_token: of batches of one token: bytes read, and microseconds waited for storage.
        next_token_reuse: mean of the layers.
        lru_hit_rates: (share of a layer's experts, hit rate) of an LRU cache of its own for each layer; mean of layers.
        first_use_share: share of choices that are the first of their expert, which no cache can foresee.
        reuse_distance_median: distinct experts of the layer used between two uses of one, for the median reuse.
        router_entropy_bits: mean of the layers.
        load_imbalance, load_imbalance_max: mean and largest of the layers.
        layers: each of them.
    """

    model: str
    n_layers: int
    n_experts: int
    n_experts_used: int
    tokens: int
    decode_tokens: int
    batches: int
    hit_rate: float | None
    decode_hit_rate: float | None
    bytes_per_token: float | None
    stall_us_per_token: float | None
    next_token_reuse: float | None
    lru_hit_rates: tuple[tuple[float, float], ...]
    first_use_share: float | None
    reuse_distance_median: float | None
    router_entropy_bits: float | None
    load_imbalance: float | None
    load_imbalance_max: float | None
    layers: tuple[LayerSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)


def summarize(trace: Trace) -> TraceSummary:
    """Summarize a trace; takes some 0.1 ms for each of its tokens."""
    is_decode = np.bincount(trace.batch_of_token, minlength=trace.n_batches) == 1
    hits = np.zeros((2, len(trace.layers)))  # of all batches, of those of one token
    asked = np.zeros_like(hits)
    reuse: list[float | None] = []
    entropy: list[float | None] = []
    imbalance: list[float | None] = []
    for i, layer in enumerate(trace.layers):
        experts = trace.experts[:, i]
        token, used = np.nonzero(experts >= 0)
        chosen = np.zeros((trace.n_tokens, layer.n_experts), np.bool_)
        chosen[token, experts[token, used]] = True
        reuse.append(_next_token_reuse(chosen))
        entropy.append(_entropy_bits(trace.weights[:, i]))
        uses = chosen.sum(axis=0)
        imbalance.append(float(uses.max() / uses.mean()) if uses.any() else None)
        if trace.resident is not None:
            distinct = np.zeros((trace.n_batches, layer.n_experts), np.bool_)
            distinct[trace.batch_of_token[token], experts[token, used]] = True
            found = distinct & trace.resident[:, i, : layer.n_experts]
            for row, batches in enumerate((slice(None), is_decode)):
                hits[row, i], asked[row, i] = found[batches].sum(), distinct[batches].sum()
    distances, n_first_uses = _reuse_distances(trace)
    n_uses = distances.sum(axis=1) + n_first_uses
    is_read = is_decode & (trace.read_bytes >= 0).any(axis=1)
    waits = trace.wait_us[is_read]
    return TraceSummary(
        model=trace.model,
        n_layers=len(trace.layers),
        n_experts=max((layer.n_experts for layer in trace.layers), default=0),
        n_experts_used=max((layer.n_used for layer in trace.layers), default=0),
        tokens=trace.n_tokens,
        decode_tokens=int(is_decode.sum()),
        batches=trace.n_batches,
        hit_rate=_ratio(hits[0].sum(), asked[0].sum()),
        decode_hit_rate=_ratio(hits[1].sum(), asked[1].sum()),
        bytes_per_token=_ratio(np.maximum(trace.read_bytes[is_read], 0).sum(), is_read.sum()),
        stall_us_per_token=_ratio(np.nansum(waits, dtype=np.float64), is_read.sum()),
        next_token_reuse=_mean(reuse),
        lru_hit_rates=tuple(
            (share, rate)
            for share in CACHE_SHARES
            if (rate := _lru_hit_rate(trace, distances, n_uses, share)) is not None
        ),
        first_use_share=_ratio(n_first_uses.sum(), n_uses.sum()),
        reuse_distance_median=_median(distances.sum(axis=0)),
        router_entropy_bits=_mean(entropy),
        load_imbalance=_mean(imbalance),
        load_imbalance_max=max((value for value in imbalance if value is not None), default=None),
        layers=tuple(
            LayerSummary(layer.layer, _ratio(hits[0, i], asked[0, i]), reuse[i], entropy[i], imbalance[i])
            for i, layer in enumerate(trace.layers)
        ),
    )


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _next_token_reuse(chosen: npt.NDArray[np.bool_]) -> float | None:
    """chosen: [token, expert]. Tokens of which the layer, or the token before, chose nothing are left out."""
    both = chosen[1:].any(axis=1) & chosen[:-1].any(axis=1)
    return _ratio((chosen[1:] & chosen[:-1])[both].sum(), chosen[1:][both].sum())


def _entropy_bits(weights: npt.NDArray[np.float32]) -> float | None:
    """weights: [token, used], NaN where unknown. Weights that are not positive have no entropy and are left out."""
    weights = np.where(np.isnan(weights), 0.0, np.maximum(weights, 0.0)).astype(np.float64)
    sums = weights.sum(axis=1)
    shares = weights[sums > 0] / sums[sums > 0, None]
    if not len(shares):
        return None
    # max: a single expert has -0.0
    return max(0.0, float(-(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(axis=1).mean()))


def _reuse_distances(trace: Trace) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """How often each distance occurs, [layer, distance], and first uses, [layer].

    The distance of a use is the number of distinct experts of the layer used since the use before (Mattson et al.,
    Evaluation techniques for storage hierarchies, 1970): an LRU cache of more slots than that has it.
    """
    n_layers, n_used = trace.experts.shape[1:]
    n_experts = max((layer.n_experts for layer in trace.layers), default=0)
    distances = np.zeros((n_layers, n_experts + 1), np.int64)
    n_first_uses = np.zeros(n_layers, np.int64)
    last_use = np.full((n_layers, n_experts + 1), -1, np.int64)  # the last column is nobody's
    layer_of = np.broadcast_to(np.arange(n_layers)[:, None], (n_layers, n_used))
    for token, ids in enumerate(trace.experts):
        is_use = ids >= 0
        before = np.take_along_axis(last_use, ids.astype(np.int64), axis=1)  # -1 is the last column
        distance = (last_use[:, None, :-1] > before[:, :, None]).sum(axis=2)
        is_reuse = is_use & (before >= 0)
        np.add.at(distances, (layer_of[is_reuse], distance[is_reuse]), 1)
        n_first_uses += (is_use & (before < 0)).sum(axis=1)
        # In the router's order, so that no two experts were last used at one time.
        time = np.broadcast_to(token * n_used + np.arange(n_used), ids.shape)
        last_use[layer_of[is_use], ids[is_use]] = time[is_use]
    return distances, n_first_uses


def _lru_hit_rate(
    trace: Trace, distances: npt.NDArray[np.int64], n_uses: npt.NDArray[np.int64], share: float
) -> float | None:
    rates = [
        _ratio(distances[i, : round(layer.n_experts * share)].sum(), n_uses[i]) for i, layer in enumerate(trace.layers)
    ]
    return _mean(rates)


def _median(counts: npt.NDArray[np.int64]) -> float | None:
    """The median of values 0, 1, ... that occur so often."""
    return float(np.searchsorted(counts.cumsum(), counts.sum() / 2)) if counts.any() else None
