# SPDX-License-Identifier: MIT
"""Fewer experts for decoded tokens: what may be asked for, and for which models; see docs/routing.md.

How many a token gets is decided natively (`kernels/core/expert_count.h`), layer by layer.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe import _native
from edgemoe.errors import BackendError, ModelFormatError

if TYPE_CHECKING:
    from edgemoe.formats.gguf import GgufModel

FORMS = "off, a number, top-p:P, map, map:MIN-MAX, lexi:MEAN or lexi:MEAN@FILE"
_OF_LAYER, _TOP_P, _MAP = 0, 1, 2  # edgemoe_count_rule in selection.h
# Their routers choose a second set of experts, by the same scores, that belongs to the first.
_UNSUITABLE = ("grovemoe",)

_log = logging.getLogger("edgemoe")

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `Llama` was asked for.

    Attributes:
        rule: `number`, `top-p`, `map` or `lexi`.
        value: the number, the share of the mass, or the mean number of a layer.
        n_min, n_max: bounds for `map`; 0 for the model's number.
        path: where `lexi` finds the losses; None to measure them.
    """

    rule: str
    value: float = 0.0
    n_min: int = 1
    n_max: int = 0
    path: Path | None = None


def parse(expert_top_k: str | int) -> Settings | None:
    """Check the keyword of `Llama` by itself; None where it is `off`.

    Raises:
        ValueError: it makes no sense.
    """
    wrong = ValueError(f"expert_top_k is {expert_top_k!r}: expected {FORMS}")
    if isinstance(expert_top_k, bool) or not isinstance(expert_top_k, str | int):
        raise wrong
    if expert_top_k == "off":
        return None
    rule, _, rest = str(expert_top_k).partition(":")
    try:
        if rule == "map":
            n_min, n_max = (int(n) for n in rest.split("-")) if ":" in str(expert_top_k) else (1, 0)
            found = Settings(rule, n_min=n_min, n_max=n_max)
            is_right = n_min >= 1 and (n_max >= n_min or not rest)
        elif rule == "top-p":
            found = Settings(rule, float(rest))
            is_right = 0.0 < found.value <= 1.0
        elif rule == "lexi":
            mean, has_path, path = rest.partition("@")
            found = Settings(rule, float(mean), path=Path(path) if has_path else None)
            is_right = 1.0 <= found.value < math.inf and path != "" if has_path else 1.0 <= found.value < math.inf
        else:
            found = Settings("number", int(expert_top_k))
            is_right = found.value >= 1
    except ValueError:
        raise wrong from None
    if not is_right:
        raise wrong
    return found


def check(settings: Settings | None, model: GgufModel) -> None:
    """Refuse what this model cannot do.

    Raises:
        BackendError: it has no router, fewer experts than asked for, or experts that `lexi` cannot compute.
        ModelFormatError: the file with its losses cannot be used.
    """
    if settings is None:
        return
    n_used = model.n_experts_used
    if not model.expert_tensors:
        raise BackendError(f"cannot use fewer experts: {model.path} has no routed experts; use expert_top_k='off'")
    if model.architecture in _UNSUITABLE:
        raise BackendError(
            f"cannot use fewer experts of {model.path}: its architecture {model.architecture} chooses two sets of "
            "experts that belong together; use expert_top_k='off'"
        )
    most = max(settings.value if settings.rule in ("number", "lexi") else 0, settings.n_min, settings.n_max)
    if most > n_used:
        raise BackendError(
            f"cannot use {most:g} experts for a token: {model.path} was made for {n_used}; use at most {n_used}"
        )
    if settings.rule == "lexi":
        from edgemoe import lexi  # which needs llama.cpp; sessions of ONNX models do without

        if settings.path is not None:
            lexi.load(settings.path, model)
        else:
            lexi.check(model)


def make(settings: Settings, model: GgufModel, progress: Progress | None = None) -> _native.ExpertCount:
    """The rule for one model; `lexi` without a file reads all experts first, a few MiB at a time.

    Raises:
        BackendError, ModelFormatError: see `check`; also a mean below one expert in each layer.
        ConversionError: an expert cannot be read.
    """
    n_layers = 1 + max(t.layer for t in model.expert_tensors)
    n_experts = max(t.shape[2] for t in model.expert_tensors)
    if settings.rule == "top-p":
        return _native.ExpertCount(_TOP_P, n_layers, n_experts, [], settings.value, 0, 0)
    if settings.rule == "map":
        n_max = settings.n_max or model.n_experts_used
        return _native.ExpertCount(_MAP, n_layers, n_experts, [], 0.0, settings.n_min, n_max)
    if settings.rule == "number":
        of_layer = [int(settings.value)] * n_layers
    else:
        from edgemoe import lexi

        losses = lexi.measure(model, progress=progress) if settings.path is None else lexi.load(settings.path, model)
        try:
            numbers = lexi.solve(losses, settings.value)
        except ValueError as error:
            raise ModelFormatError(f"cannot divide experts among the layers of {model.path}: {error}") from error
        _log.info("experts of each layer (lexi): %s", lexi.describe(numbers))
        of_layer = [numbers.get(layer, 0) for layer in range(n_layers)]
    return _native.ExpertCount(_OF_LAYER, n_layers, n_experts, of_layer, 0.0, 0, 0)
