# SPDX-License-Identifier: MIT
"""A price list: what each lever has cost and saved, text by text, and what follows from that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from edgemoe.levers import LEVER_KEYWORDS, Lever
from edgemoe.price_change import Change, paired


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
        lowbit_hits, skipped_experts: as in `Stats`.
    """

    lever: Lever
    texts: tuple[TextPrice, ...]
    selections_changed: float
    gate_mass_moved: float
    kl_estimate: float
    bytes_per_token: float
    hit_rate: float
    tokens_per_s: float
    lowbit_hits: int = 0
    skipped_experts: int = 0

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
class Price:
    """A price list: the exact row first, then one for each lever.

    `slots_bytes` is the memory of the experts, and `resident_share` how many of them it holds, 0 to 1. `measured_at` is
    the time at its end, in ISO 8601.
    """

    model: str
    texts: tuple[str, ...]
    n_prompt_tokens: int
    slots_bytes: int
    resident_share: float
    rows: tuple[Row, ...]
    eviction: str
    measured_at: str

    @property
    def exact(self) -> Row:
        """The lossless row."""
        return self.rows[0]

    def change(self, row: Row) -> Change:
        """What a row's lever does to cross-entropy, paired text by text."""
        exact, found = self.exact.texts, row.texts
        return paired([t.n_tokens for t in found], [t.cross_entropy for t in exact], [t.cross_entropy for t in found])

    def bytes_ratio(self, row: Row) -> float | None:
        """Bytes per token, divided by the exact row's; None where that reads nothing."""
        return row.bytes_per_token / self.exact.bytes_per_token if self.exact.bytes_per_token else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        fields = dataclasses.asdict(self)
        for row, plain in zip(self.rows, fields["rows"], strict=True):
            change = self.change(row)
            low, high = change.perplexity_interval or (None, None)
            del plain["lever"]
            plain.update({name: row.lever.get(name) for name in LEVER_KEYWORDS})
            plain.update(
                lever=row.lever.name,
                model=None if row.lever.model is None else str(row.lever.model),
                n_tokens=row.n_tokens,
                cross_entropy=row.cross_entropy,
                perplexity=row.perplexity,
                kl=row.kl,
                agreement=row.agreement,
                perplexity_change=change.perplexity,
                perplexity_change_error=change.perplexity_error,
                perplexity_change_low=low,
                perplexity_change_high=high,
                bytes_per_token_ratio=self.bytes_ratio(row),
            )
        return fields
