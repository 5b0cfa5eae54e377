# SPDX-License-Identifier: MIT
"""Reuse-biased routing: experts that need not be read are preferred, within bounds; see docs/routing.md.

The choice itself is native (`kernels/core/reuse_bias.h`). Here is what may be asked for, and for which tokens.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING

from edgemoe import _native
from edgemoe.errors import BackendError

if TYPE_CHECKING:
    from edgemoe.formats.gguf import GgufModel

METHODS = {"cache-prior": 0, "max-rank": 1, "cumulative": 2}
"""How residents get ahead; numbers as `edgemoe_reuse_method` in scheduler.h."""
MAX_MASS_MOVED = 0.2
MAX_KL = 0.1
"""Bounds of the guard, per selection on average. On simulated routers (64 and 128 experts, 8 used, a quarter resident)
Cache-Prior moves 0.07 to 0.21 of the mass with a bias of 0.15 and 0.23 to 0.35 with 0.3; a report on a 35B model puts
the price of those at 1-4 % and at 25 % of perplexity (BigMoeOnEdge, Qwen3.6). The bounds lie between the two."""
# The paper's J: 1 where experts are few and large, else 2.
_FEW_EXPERTS = 8
# Their routers choose a second set of experts, by the same scores, that belongs to the first.
_UNSUITABLE = ("grovemoe",)

_log = logging.getLogger("edgemoe")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `Llama` was asked for: strength 0..1 of a method, and how many of the best are always chosen."""

    strength: float
    method: str
    top_j: int | None


def parse(reuse_bias: str | float, reuse_method: str = "cache-prior", top_j: int | None = None) -> Settings | None:
    """Check the keywords of `Llama` by themselves; None where `reuse_bias` is `off`.

    Raises:
        ValueError: one of them makes no sense.
    """
    if reuse_method not in METHODS:
        raise ValueError(f"unknown reuse_method {reuse_method!r}: expected one of {', '.join(METHODS)}")
    if top_j is not None and (isinstance(top_j, bool) or not isinstance(top_j, int) or top_j < 1):
        raise ValueError(f"top_j is {top_j!r}: expected a whole number of at least 1, for the best is always kept")
    if reuse_bias == "off":
        return None
    try:
        strength = float(reuse_bias)
    except (TypeError, ValueError):
        strength = math.nan
    if isinstance(reuse_bias, bool) or not 0.0 <= strength <= 1.0:
        raise ValueError(f"reuse_bias is {reuse_bias!r}: expected off or a number from 0 (exact) to 1")
    return Settings(strength, reuse_method, top_j)


def check(settings: Settings | None, model: GgufModel) -> None:
    """Refuse what this model's router cannot do.

    Raises:
        BackendError: it has no router, one that cannot be biased, or chooses fewer than `top_j` experts.
    """
    if settings is None:
        return
    if not model.expert_tensors:
        raise BackendError(f"cannot bias routing: {model.path} has no routed experts; use reuse_bias='off'")
    if model.architecture in _UNSUITABLE:
        raise BackendError(
            f"cannot bias routing of {model.path}: its architecture {model.architecture} chooses two sets of experts "
            "that belong together; use reuse_bias='off'"
        )
    if settings.top_j is not None and settings.top_j > model.n_experts_used:
        raise BackendError(
            f"cannot keep the best {settings.top_j} experts: {model.path} chooses {model.n_experts_used}; use a top_j "
            f"of at most {model.n_experts_used}"
        )


def default_top_j(n_experts: int, n_experts_used: int) -> int:
    """How many of the best are chosen whatever is resident: the paper's, but such that one remains to be biased."""
    wanted = 1 if n_experts <= _FEW_EXPERTS else 2
    return max(1, min(wanted, n_experts_used - 1))


class ReuseBias:
    """The biased choice of one model's experts."""

    def __init__(self, settings: Settings, model: GgufModel) -> None:
        n_layers = 1 + max(t.layer for t in model.expert_tensors)
        top_j = settings.top_j or default_top_j(model.n_experts, model.n_experts_used)
        if top_j >= model.n_experts_used:
            _log.warning("top_j %d keeps all experts that a token chooses: nothing is biased", top_j)
        self.native = _native.ReuseBias(
            METHODS[settings.method], n_layers, model.n_experts, top_j, settings.strength, MAX_MASS_MOVED, MAX_KL
        )
