# SPDX-License-Identifier: MIT
"""Which experts decoded tokens get where that is not left to the model: who has a say, and what it costs together.

The choices are native (`kernels/include/edgemoe/selection.h`); prompts and embeddings are never changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from edgemoe import _native, reuse
from edgemoe.errors import BackendError

if TYPE_CHECKING:
    from edgemoe.formats.gguf import GgufModel

Natives: TypeAlias = tuple["_native.ExpertCount | None", "_native.ReuseBias | None", "_native.OnMiss | None"]


def price(count: Any | None, biased: Any | None, missed: Any | None) -> dict[str, Any]:
    """The fields of `Stats` that say what choosers cost together, by the native statistics of each (None: it has no
    say)."""
    n_selections = n_chosen = n_changed = n_skipped = 0
    mass_moved = kl = 0.0
    found: dict[str, Any] = {}
    if biased is not None:
        n_selections, n_chosen, n_changed = biased.n_selections, biased.n_chosen, biased.n_changed
        mass_moved, kl = biased.mass_moved, biased.kl
        found["reuse_bias"] = biased.mean_strength
    if count is not None:
        # All that the model would have chosen, of which a bias sees only those that are left.
        n_skipped += count.n_dropped
        n_selections, n_chosen = count.n_selections, count.n_chosen
        n_changed += count.n_dropped
        mass_moved += count.mass_moved
        kl += count.kl
    if missed is not None:
        n_selections = n_selections or missed.n_selections
        n_chosen = n_chosen or missed.n_chosen
        n_skipped += missed.n_skipped
        n_changed += missed.n_skipped
        mass_moved += missed.mass_moved
        kl += missed.kl
        found["lowbit_hits"] = missed.n_copies
    return found | {
        "skipped_experts": n_skipped,
        "selections_changed": n_changed / max(n_chosen, 1),
        "gate_mass_moved": mass_moved / max(n_selections, 1),
        "kl_estimate": kl / max(n_selections, 1),
    }


class Selection:
    """Those who choose the experts of one model's decoded tokens: how many, which, and of those that would have to be
    read, in which precision. None: the model."""

    def __init__(
        self,
        native: _native.Runtime,
        model: GgufModel,
        count: _native.ExpertCount | None = None,
        reuse_bias: reuse.ReuseBias | None = None,
        miss: _native.OnMiss | None = None,
    ) -> None:
        self._runtime = native
        self._model = model
        self._count = count
        self._reuse = reuse_bias
        self._miss = miss

    @property
    def natives(self) -> Natives:
        """How many, which, and in which precision, as `_native.Runtime.foresee_tokens` takes them."""
        return self._count, None if self._reuse is None else self._reuse.native, self._miss

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within: the experts of what this thread evaluates are chosen so.

        Raises:
            BackendError: behind the first evaluation, if no choice of experts was recognized in it.
        """
        plugin = _native.plugin()
        plugin.set_choosers(self._runtime, *self.natives, self._model.n_experts)
        n_selections = 0
        try:
            yield
        finally:
            n_selections = plugin.set_choosers(None, None, None, None, 0)
        if n_selections == 0:
            raise BackendError(
                f"cannot change routing: in llama.cpp's graph of {self._model.path} ({self._model.architecture}) "
                "no choice of experts was recognized; use reuse_bias='off', expert_top_k='off' and on_miss='wait'"
                + (" (`map` also needs a router with a softmax or a sigmoid)" if self._count is not None else "")
            )

    def stats(self) -> dict[str, Any]:
        """The fields of `Stats` that say what it costs."""
        return price(
            None if self._count is None else self._count.stats(),
            None if self._reuse is None else self._reuse.native.stats(),
            None if self._miss is None else self._miss.stats(),
        )

    def reset_stats(self) -> None:
        """Start the counters again; what a guard has learned stays."""
        if self._reuse is not None:
            self._reuse.native.reset_stats()
        if self._count is not None:
            self._count.reset_stats()
        if self._miss is not None:
            self._miss.reset_stats()
