# SPDX-License-Identifier: MIT
"""What becomes of a decoded token's experts that would have to be read: waited for, replaced or left out.

The rule is native (`kernels/core/on_miss.h`), see docs/routing.md. Here is what may be asked for.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe import _native
from edgemoe.errors import BackendError

if TYPE_CHECKING:
    from edgemoe.formats.gguf import GgufModel

ACTIONS = ("wait", "lowbit", "skip")
DEFAULT_MASS = 0.6
DEFAULT_SKIP_MASS = 0.9
"""HOBBIT's thresholds (arXiv 2411.01433), which give 67 % of Mixtral's experts full precision, 30 % low precision and
leave 3 % out."""
# As for the reuse bias: their routers choose a second set of experts that belongs to the first.
_UNSUITABLE = ("grovemoe",)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `Llama` was asked for: behind `mass` of a token's mixing weight an expert that is missing is not waited for,
    behind `skip_mass` not for its copy in `lowbit` either (None: there are no copies)."""

    mass: float
    skip_mass: float
    lowbit: Path | None


def parse(
    on_miss: str = "wait",
    on_miss_mass: float = DEFAULT_MASS,
    on_miss_skip_mass: float | None = None,
    lowbit: str | Path | None = None,
) -> Settings | None:
    """Check the keywords of `Llama` by themselves; None where `on_miss` is `wait`.

    Raises:
        ValueError: one of them makes no sense.
    """
    if on_miss not in ACTIONS:
        raise ValueError(f"unknown on_miss {on_miss!r}: expected one of {', '.join(ACTIONS)}")
    mass = _share("on_miss_mass", on_miss_mass)
    if on_miss_skip_mass is None:
        skip_mass = max(mass, DEFAULT_SKIP_MASS)
    else:
        skip_mass = _share("on_miss_skip_mass", on_miss_skip_mass)
        if on_miss != "lowbit":
            raise ValueError(f"on_miss_skip_mass is given with on_miss {on_miss!r}: it is for 'lowbit'")
        if skip_mass < mass:
            raise ValueError(
                f"on_miss_skip_mass is {skip_mass:g}: expected at least on_miss_mass, {mass:g}; for no copies at all "
                "use on_miss='skip'"
            )
    if on_miss == "lowbit" and lowbit is None:
        raise ValueError(
            "on_miss 'lowbit' needs the model's low-bit copy: expected lowbit, the path of a file that "
            "`edgemoe convert lowbit` made"
        )
    if on_miss != "lowbit" and lowbit is not None:
        raise ValueError(f"lowbit is given with on_miss {on_miss!r}, which does not use it: expected on_miss 'lowbit'")
    if on_miss == "wait":
        return None
    return Settings(mass, skip_mass, None if lowbit is None else Path(lowbit))


def _share(name: str, value: float) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = math.nan
    if isinstance(value, bool) or not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} is {value!r}: expected a number from 0 to 1 (exact)")
    return share


def check(settings: Settings | None, model: GgufModel) -> GgufModel | None:
    """Refuse what this model's router cannot do; returns the header of the companion, if there is to be one.

    Raises:
        BackendError: the model has no router, or one whose choices cannot be changed.
        ModelFormatError: the low-bit copy cannot be read, is incomplete, or not this model's.
    """
    if settings is None:
        return None
    if not model.expert_tensors:
        raise BackendError(f"cannot leave experts out: {model.path} has no routed experts; use on_miss='wait'")
    if model.architecture in _UNSUITABLE:
        raise BackendError(
            f"cannot leave experts out of {model.path}: its architecture {model.architecture} chooses two sets of "
            "experts that belong together; use on_miss='wait'"
        )
    if settings.lowbit is None:
        return None
    from edgemoe.formats.companion import open_companion  # sessions of ONNX models, which have none, do without gguf

    return open_companion(settings.lowbit, model)


def open_native(settings: Settings, model: GgufModel) -> _native.OnMiss:
    """The rule for one model's layers."""
    n_layers = 1 + max(t.layer for t in model.expert_tensors)
    return _native.OnMiss(settings.lowbit is not None, n_layers, model.n_experts, settings.mass, settings.skip_mass)
