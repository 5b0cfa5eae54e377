# SPDX-License-Identifier: MIT
"""What a model that generates text counts itself, and how that and native counters become fields of statistics."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Counters:
    """Tokens and times; those of experts are native."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    reused_tokens: int = 0

    def fields(self, experts: Any | None) -> dict[str, Any]:
        """Those of `Stats` that come of these and of the native statistics (None: no experts)."""
        n_tokens = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "prefill_tokens_per_s": self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0,
            "decode_tokens_per_s": self.completion_tokens / self.decode_s if self.decode_s else 0.0,
            "ttft_s": self.ttft_s,
            "bytes_per_token": experts.bytes_read / n_tokens if experts and n_tokens else 0.0,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "reused_tokens": self.reused_tokens,
            **expert_fields(experts),
        }


def expert_fields(experts: Any | None) -> dict[str, Any]:
    """Those of `Stats` and `OnnxStats` that come of the native statistics of experts; zeros if there are none."""
    return {
        "expert_hits": experts.hits if experts else 0,
        "expert_misses": experts.misses if experts else 0,
        "expert_late_hits": experts.late_hits if experts else 0,
        "expert_bytes_read": experts.bytes_read if experts else 0,
        "stall_s": experts.stall_ns / 1e9 if experts else 0.0,
        "n_slots": experts.n_slots if experts else 0,
        "slots_bytes": experts.slots_bytes if experts else 0,
    }


def prefetch_fields(prefetched: Any | None) -> dict[str, int]:
    """Those that come of the native statistics of predictions."""
    return {
        "prefetch_used_bytes": prefetched.used_bytes if prefetched else 0,
        "prefetch_late_bytes": prefetched.late_bytes if prefetched else 0,
        "prefetch_wasted_bytes": prefetched.wasted_bytes if prefetched else 0,
    }
