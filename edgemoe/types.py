# SPDX-License-Identifier: MIT
"""The typed records that edgemoe hands out. Field names are stable: scripts read them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple


class ExpertKey(NamedTuple):
    """One routed expert: a feed-forward network of one layer."""

    layer: int
    expert: int


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counters since the model was loaded or `reset_stats()` was last called.

    Attributes:
        prompt_tokens: tokens evaluated in batches of more than one token (prefill).
        completion_tokens: tokens evaluated one at a time (decode), and drafted ones that were right.
        prefill_tokens_per_s, decode_tokens_per_s: tokens per second of the two; 0.0 before the first.
        ttft_s: seconds from the start of the last request to its first token.
        load_s, load_bytes_read: seconds and bytes read from storage while the model was loaded.
        expert_hits, expert_misses, expert_late_hits: experts found resident, absent, or still loading when a
            layer asked for them; a layer of a batch asks once for each distinct expert.
        expert_bytes_read: bytes of experts read from storage.
        bytes_per_token: bytes of experts read from storage, divided by all tokens evaluated; 0.0 before the first.
        prefetch_used_bytes, prefetch_late_bytes, prefetch_wasted_bytes: of the experts read because they were
            predicted, those that were resident when first used, still being read then, and evicted unused.
        stall_s: seconds that computing waited for storage with nothing else to do.
        n_slots, slots_bytes: expert tensors that fit in the slots now, and the memory set aside for them: less than
            planned while the system swaps the process out (see `edgemoe.cache_size`).
        peak_rss_bytes: largest resident set of this process so far.
        budget_bytes: the memory budget in force.
        kernels: who multiplies by the experts: `ggml`, or the instruction set of our kernels (`avx512_vnni`); where
            some formats are left to ggml, both (`avx512_vnni, ggml for Q5_0`).
        drafted_tokens, accepted_tokens: tokens evaluated ahead because they were likely, and those that sampling chose.
        reuse_bias: the reuse bias in force, as the guard has lowered it, on average over layers; 0.0 when off.
        selections_changed: of the experts chosen while decoding with a reuse bias, the share that exact routing would
            not have chosen; with `expert_top_k`, of those that exact routing chooses the share left out, and both
            together.
        gate_mass_moved, kl_estimate: what that cost, per token and layer: the share of the exact choice's mixing
            weight that was dropped, and nats (see docs/routing.md).
        lowbit_hits, skipped_experts: experts replaced by their low-bit copy, and left out, while decoding.
        reuse_price_target, reuse_price_expected: with `reuse_bias="auto"`, the relative change of perplexity that was
            asked for at most, and the one that was measured with the bias chosen (None if it stays off); else None.
        reused_tokens: tokens of prompts that were in the cache from an earlier answer, and not evaluated again.
    """

    prompt_tokens: int
    completion_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ttft_s: float
    load_s: float
    load_bytes_read: int
    expert_hits: int
    expert_misses: int
    expert_late_hits: int
    expert_bytes_read: int
    bytes_per_token: float
    prefetch_used_bytes: int
    prefetch_late_bytes: int
    prefetch_wasted_bytes: int
    stall_s: float
    n_slots: int
    slots_bytes: int
    peak_rss_bytes: int
    budget_bytes: int
    kernels: str
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    reuse_bias: float = 0.0
    selections_changed: float = 0.0
    gate_mass_moved: float = 0.0
    kl_estimate: float = 0.0
    lowbit_hits: int = 0
    skipped_experts: int = 0
    reuse_price_target: float | None = None
    reuse_price_expected: float | None = None
    reused_tokens: int = 0

    @property
    def expert_hit_rate(self) -> float:
        """Hits divided by all requests for an expert; 0.0 before the first request."""
        asked = self.expert_hits + self.expert_misses + self.expert_late_hits
        return self.expert_hits / asked if asked else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the bytes of a memory budget go; made before anything is loaded.

    `floor_bytes` is the smallest budget that runs: everything but the slots, plus the experts of one token.
    `draft_bytes` is what a draft model takes: weights, cache, compute buffers. `prefetch_bytes` is a part of
    `buffers_bytes`: what predictions take. `draft_buffers_bytes` is the most that drafts may yet take, for the logits
    of their tokens and an index of the text: slots give it up when it is needed, so it is a part of `floor_bytes`.
    All sizes are bytes. For a model without routed experts the expert fields are 0.
    """

    fits: bool
    budget_bytes: int
    floor_bytes: int
    dense_bytes: int
    kv_bytes: int
    buffers_bytes: int
    slots_bytes: int
    slack_bytes: int
    token_cycle_bytes: int
    expert_bank_bytes: int
    n_experts: int
    n_experts_used: int
    n_moe_layers: int
    prefetch_bytes: int = 0
    draft_buffers_bytes: int = 0
    draft_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)
