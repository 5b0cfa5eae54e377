# SPDX-License-Identifier: MIT
"""How routers are tuned; apart from `tune_router`, which needs torch, so that a command can show its defaults."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

Method = Literal["remoe", "kd", "ce"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to tune.

    Attributes:
        method: see `tune_router`.
        n_steps: steps of AdamW; 0 gives IN's bytes.
        reuse_weight, anchor_weight: of the terms; `ce` has neither, `kd` no anchor.
        cached_experts: experts of a layer in the cache whose use is rewarded; a token's own number if None, as in the
            paper.
        rate: learning rate.
        n_windows: windows of a step.
        window_tokens: tokens of a window; each begins with an empty context.
        seed: of the order of the windows.
    """

    method: Method = "remoe"
    n_steps: int = 100
    reuse_weight: float = 0.3
    anchor_weight: float = 0.1
    cached_experts: int | None = None
    rate: float = 3e-4
    n_windows: int = 4
    window_tokens: int = 512
    seed: int = 0


def check(settings: Settings) -> None:
    """Refuse settings that make no sense.

    Raises:
        ValueError: one of them.
    """
    if settings.method not in METHODS:
        raise ValueError(f"unknown method {settings.method!r}: expected one of {', '.join(METHODS)}")
    for name in ("reuse_weight", "anchor_weight", "rate"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}: expected a number of at least 0")
    if settings.rate > 1:
        raise ValueError(f"rate is {settings.rate}: expected at most 1, and far less")
    if settings.n_steps < 0 or settings.n_windows < 1 or settings.window_tokens < 2:
        raise ValueError("expected at least 0 steps, 1 window and 2 tokens of a window")
