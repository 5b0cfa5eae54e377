# SPDX-License-Identifier: MIT
"""The keywords of `Llama` that change which experts decoded tokens get: what they ask for together, and who chooses."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from edgemoe import _native, expert_count, price_curve, reuse
from edgemoe import on_miss as misses
from edgemoe.errors import BackendError
from edgemoe.formats.gguf import GgufModel
from edgemoe.selection import Natives, Selection

_log = logging.getLogger("edgemoe")


@dataclasses.dataclass(frozen=True)
class Keywords:
    """Those of `Llama`, as they were given."""

    reuse_bias: str | float = "off"
    reuse_method: str = "cache-prior"
    top_j: int | None = None
    reuse_price: str | float | None = None
    expert_top_k: str | int = "off"
    on_miss: str = "wait"
    on_miss_mass: float = misses.DEFAULT_MASS
    on_miss_skip_mass: float | None = None
    lowbit: str | Path | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for."""

    keywords: Keywords
    bias: price_curve.Request
    count: expert_count.Settings | None
    miss: misses.Settings | None

    def check(self, model: GgufModel) -> GgufModel | None:
        """Refuse what this model cannot do; the header of the low-bit companion, if there is to be one.

        For errors see `reuse.check`, `expert_count.check` and `on_miss.check`.
        """
        reuse.check(self.bias.settings, model)
        expert_count.check(self.count, model)
        return misses.check(self.miss, model)


def parse(given: Keywords) -> Request:
    """Check the keywords by themselves.

    Raises:
        ValueError: one of them makes no sense, or a price is asked for that other levers would change.
    """
    bias = price_curve.parse(given.reuse_bias, given.reuse_method, given.top_j, given.reuse_price)
    count = expert_count.parse(given.expert_top_k)
    miss = misses.parse(given.on_miss, given.on_miss_mass, given.on_miss_skip_mass, given.lowbit)
    if bias.price is not None and (count is not None or miss is not None):
        other = f"expert_top_k {given.expert_top_k!r}" if count is not None else f"on_miss {given.on_miss!r}"
        raise ValueError(
            f"reuse_bias 'auto' and {other} exclude each other: expected a number for the bias, as remembered prices "
            "are those of a bias alone"
        )
    return Request(given, bias, count, miss)


class Choosers:
    """Those who choose for one `Llama`; until `prepare`, and where nothing was asked for, the model alone."""

    def __init__(
        self, request: Request, model: GgufModel, progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        """For errors see `expert_count.make`."""
        self._request = request
        self._model = model
        self._count = None if request.count is None else expert_count.make(request.count, model, progress)
        self._miss = None if request.miss is None else misses.open_native(request.miss, model)
        self.selection: Selection | None = None
        self.reuse_choice: price_curve.Choice | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """As they were given."""
        return dataclasses.asdict(self._request.keywords)

    def expect(self, slots_bytes: int, eviction: str) -> None:
        """Refuse before loading what `prepare` would refuse with so much memory for experts.

        Raises:
            PriceError: see `price_curve.Request.choose`.
        """
        self._request.bias.choose(self._model, slots_bytes, eviction)

    def prepare(self, native: _native.Runtime, slots_bytes: int, eviction: str, *, is_hooked: bool) -> None:
        """Choose from now on.

        Raises:
            PriceError: see `price_curve.Request.choose`.
            BackendError: llama.cpp's graphs cannot be interrupted.
        """
        self._take(native, self._request.bias.choose(self._model, slots_bytes, eviction), is_hooked=is_hooked)

    def prepare_again(self, native: _native.Runtime, slots_bytes: int, eviction: str) -> None:
        """The memory for experts has changed: a price may allow another bias, or none any more."""
        if self.reuse_choice is not None:
            choice = self._request.bias.choose_again(self._model, slots_bytes, eviction)
            self._take(native, choice, is_hooked=True)

    def _take(self, native: _native.Runtime, choice: price_curve.Choice | None, *, is_hooked: bool) -> None:
        before, self.reuse_choice = self.reuse_choice, choice
        settings = self._request.bias.settings if choice is None else choice.settings
        if choice is not None and choice != before:
            _log.log(logging.WARNING if settings is None else logging.INFO, "%s", choice.text)
        if settings is None and self._count is None and self._miss is None:
            self.selection = None
            return
        if self.selection is not None and before is not None and before.settings == settings:
            return  # what the guard has learned stays
        if not is_hooked:
            raise BackendError(
                "cannot change routing: llama.cpp's CPU backend cannot be told to leave the choice to edgemoe; "
                "use reuse_bias='off', expert_top_k='off' and on_miss='wait'"
            )
        bias = None if settings is None else reuse.ReuseBias(settings, self._model)
        self.selection = Selection(native, self._model, self._count, bias, self._miss)

    def applied(self) -> AbstractContextManager[None]:
        """Within: the experts of what this thread evaluates are chosen so; see `Selection.applied`."""
        return contextlib.nullcontext() if self.selection is None else self.selection.applied()

    @property
    def natives(self) -> Natives:
        """See `Selection.natives`; None for the model."""
        return (None, None, None) if self.selection is None else self.selection.natives

    def stats(self) -> dict[str, Any]:
        """The fields of `Stats` that say what it costs."""
        found = {} if self.selection is None else self.selection.stats()
        return found | ({} if self.reuse_choice is None else self.reuse_choice.stats())

    def reset_stats(self) -> None:
        """Start the counters again; what a guard has learned stays."""
        if self.selection is not None:
            self.selection.reset_stats()
