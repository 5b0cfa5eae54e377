# SPDX-License-Identifier: MIT
"""One memory budget for several models of a process: how it is divided among their expert slots.

A model's memory beside its slots is planned before it is loaded and measured afterwards. Every growth of the process
is booked on somebody - a model that was loading or running, or the process - so that what is booked is at least what
is resident. What the budget leaves beyond that are slots: for each model those of one token, and the rest in
proportion to the experts that do not fit into them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from edgemoe import host
from edgemoe.errors import BudgetError
from edgemoe.sizes import format_size, parse_size


class Member(Protocol):
    """A loaded model as a budget sees it."""

    def take_slots(self, slots_bytes: int) -> None:
        """Make its slots that large; experts that no longer fit are dropped, the coldest first."""

    def expert_bytes_read(self) -> int:
        """Bytes of experts read since the last reset of its counters."""


class Share:
    """What a model has of a `MemoryBudget`; the model holds it.

    Attributes:
        budget, name: what it is of, and the model's name.
        least_bytes, bank_bytes: slots for one token's experts (while loading: what loading needs), and for all.
        parts: what else it takes, by what it is, as planned.
        slots_bytes: its part of the budget for slots.
    """

    def __init__(
        self, budget: MemoryBudget, name: str, parts: Mapping[str, int], least_bytes: int, bank_bytes: int
    ) -> None:
        self.budget = budget
        self.name = name
        self.parts = dict(parts)
        self.least_bytes = least_bytes
        self.bank_bytes = max(bank_bytes, least_bytes)
        self.slots_bytes = least_bytes
        self._planned_bytes = sum(parts.values())
        self._booked_bytes = 0
        self._most_booked_bytes = 0
        self._member: weakref.ref[Member] | None = None
        # Of the slots, at most this was resident when so much had been read.
        self._resident_at_mark_bytes = 0
        self._mark_bytes = 0

    @property
    def fixed_bytes(self) -> int:
        """What the model takes beside slots: as planned, or as measured where that is more."""
        return max(self._planned_bytes, self._most_booked_bytes)

    def resident_slots_bytes(self) -> int:
        """The most that its slots can hold now: what had been there, and what has been read since."""
        member = None if self._member is None else self._member()
        if member is None:
            return 0
        n_read = max(0, member.expert_bytes_read() - self._mark_bytes)
        return min(self.slots_bytes, self._resident_at_mark_bytes + n_read)

    def settle(self, member: Member, pending_bytes: int, least_bytes: int) -> None:
        """The model is loaded: what it took is measured now, and the slots are divided again.

        Args:
            member: the model; it is not kept alive.
            pending_bytes: what it will take beside slots and has not yet.
            least_bytes: the fewest slots from now on.

        Raises:
            BudgetError: it took more than planned and does not fit; it has left the budget then.
        """
        with self.budget._lock:
            self._attach(member)
            self.least_bytes = least_bytes
            self._book(self.budget._growth())
            self._planned_bytes = self._booked_bytes + pending_bytes
            try:
                self.budget._check(self.budget.budget_bytes)
            except BudgetError:
                self.leave()
                raise
            self.budget._divide()

    def observe(self) -> None:
        """The model may have grown beside its slots: if so, slots are given back for it, down to the fewest."""
        with self.budget._lock:
            self._book(self.budget._growth())
            self.budget._give_back()

    def take(self, n_bytes: int) -> None:
        """The model is about to take so much, for which its fewest slots have had room until now."""
        with self.budget._lock:
            self._planned_bytes = self.fixed_bytes + n_bytes
            self.least_bytes -= n_bytes
            self.budget._divide()

    def release(self, n_bytes: int) -> None:
        """The model has freed so much of what it had taken beside slots."""
        with self.budget._lock:
            self.budget._growth()
            self._booked_bytes -= n_bytes
            self._most_booked_bytes = self._booked_bytes
            self._planned_bytes -= n_bytes
            self.budget._divide()

    def leave(self) -> None:
        """The model is closed: its memory is the others'. May be called twice."""
        self.budget._remove(self)

    def before_reset(self) -> None:
        """The model's counters are about to begin again."""
        self._resident_at_mark_bytes, self._mark_bytes = self.resident_slots_bytes(), 0

    def _attach(self, member: Member) -> None:
        self._member = weakref.ref(member, lambda _: self.leave())
        self._mark_bytes = 0

    def _book(self, n_bytes: int) -> None:
        self._booked_bytes += n_bytes
        self._most_booked_bytes = max(self._most_booked_bytes, self._booked_bytes)

    def _take(self, slots_bytes: int) -> None:
        member = None if self._member is None else self._member()
        resident = min(self.resident_slots_bytes(), slots_bytes)
        self.slots_bytes = slots_bytes
        if member is not None:
            self._resident_at_mark_bytes, self._mark_bytes = resident, member.expert_bytes_read()
            member.take_slots(slots_bytes)


class MemoryBudget:
    """A memory budget that several models of this process share: give it to each as `memory`.

    GGUF models (`edgemoe.Llama`) and ONNX models (`edgemoe.onnx.InferenceSession`) alike. Slots are divided again
    whenever a model is opened, closed or grows, and by `set_memory`. Models that are given plain sizes do not share:
    each counts the others as part of the process. A copy made by pickling has the same size and no models.
    """

    def __init__(self, memory: int | float | str) -> None:
        """Make a budget for everything that this process holds.

        Args:
            memory: bytes, or a size such as "1.5GiB".

        Raises:
            BudgetError: the size cannot be parsed.
        """
        self._budget_bytes = parse_size(memory)
        self._lock = threading.RLock()
        self._shares: list[Share] = []
        self._process_bytes = 0  # what no model is the cause of
        self._measured_bytes: int | None = None  # the last time, without slots

    def __reduce__(self) -> tuple[type[MemoryBudget], tuple[int]]:
        return MemoryBudget, (self._budget_bytes,)

    @property
    def budget_bytes(self) -> int:
        """The budget in force."""
        return self._budget_bytes

    @property
    def floor_bytes(self) -> int:
        """The smallest budget for the models that are open."""
        with self._lock:
            return host.with_slack(self._fixed_bytes() + sum(share.least_bytes for share in self._shares))

    def stats(self) -> dict[str, Any]:
        """Where the budget goes, in bytes: `process_bytes`, `slack_bytes`, and `fixed_bytes` and `slots_bytes` of each
        of the `models`."""
        with self._lock:
            return {
                "budget_bytes": self._budget_bytes,
                "floor_bytes": self.floor_bytes,
                "process_bytes": self._process_bytes,
                "slack_bytes": host.slack_bytes(self._budget_bytes),
                "models": [
                    {"name": s.name, "fixed_bytes": s.fixed_bytes, "slots_bytes": s.slots_bytes} for s in self._shares
                ],
            }

    def set_memory(self, memory: int | float | str) -> None:
        """Change the budget of all models: experts that no longer fit are dropped, the coldest of each model first.

        Raises:
            BudgetError: it is below what the open models need, which the message names; the old one stays in force.
        """
        budget_bytes = parse_size(memory)
        with self._lock:
            self._book_on_nobody()
            self._check(budget_bytes)
            self._budget_bytes = budget_bytes
            self._divide()

    def join(self, name: str, parts: Mapping[str, int], least_bytes: int, bank_bytes: int) -> Share:
        """Make room for a model that is about to be loaded: the others' slots shrink.

        Args:
            name: for messages.
            parts: bytes that it will take beside slots, by what they are.
            least_bytes: slots without which it cannot be loaded.
            bank_bytes: slots for all its experts.

        Raises:
            BudgetError: it does not fit, even with the others' slots as small as they can be; nothing has changed.
        """
        share = Share(self, name, parts, least_bytes, bank_bytes)
        self._enter(share)
        return share

    def adopt(
        self, name: str, parts: Mapping[str, int], least_bytes: int, bank_bytes: int, member: Member, slots_bytes: int
    ) -> Share:
        """As `join`, for a model that is loaded already, with slots of `slots_bytes`; `parts` is what is to come."""
        share = Share(self, name, parts, least_bytes, bank_bytes)
        share.slots_bytes = slots_bytes
        share._attach(member)
        self._enter(share)
        return share

    def _enter(self, share: Share) -> None:
        with self._lock:
            self._shares.append(share)
            try:
                self._book_on_nobody()
                self._check(self._budget_bytes)
            except BudgetError:
                self._shares.remove(share)
                raise
            self._divide()

    def _remove(self, share: Share) -> None:
        with self._lock:
            if share not in self._shares:
                return
            self._shares.remove(share)
            if self._measured_bytes is not None:
                self._measured_bytes -= share._booked_bytes
            self._divide()

    def _give_back(self) -> None:
        if self._spare_bytes(self._budget_bytes) + host.TOLERANCE_BYTES < sum(s.slots_bytes for s in self._shares):
            self._divide()

    def _measure(self) -> int:
        return host.process_rss_bytes() - sum(share.resident_slots_bytes() for share in self._shares)

    def _growth(self) -> int:
        """By how much the process has grown since the last call, slots apart."""
        measured = self._measure()
        before = measured if self._measured_bytes is None else self._measured_bytes
        self._measured_bytes = measured
        return measured - before

    def _book_on_nobody(self) -> None:
        """Growth that no model reports: they may have begun to use what was planned for them, the rest is others'."""
        if self._measured_bytes is None:
            self._process_bytes = self._measured_bytes = self._measure()
            return
        growth = self._growth()
        for share in self._shares:
            used = max(0, min(growth, share._planned_bytes - share._booked_bytes))
            share._book(used)
            growth -= used
        self._process_bytes += growth

    def _fixed_bytes(self) -> int:
        return self._process_bytes + sum(share.fixed_bytes for share in self._shares)

    def _spare_bytes(self, budget_bytes: int) -> int:
        return budget_bytes - host.slack_bytes(budget_bytes) - self._fixed_bytes()

    def _check(self, budget_bytes: int) -> None:
        least = sum(share.least_bytes for share in self._shares)
        if self._spare_bytes(budget_bytes) + host.TOLERANCE_BYTES >= least:
            return
        floor = self.floor_bytes
        models = "; ".join(_described(share, is_only=len(self._shares) == 1) for share in self._shares)
        raise BudgetError(
            f"memory {format_size(budget_bytes)} is below the floor of {format_size(floor)}: this process "
            f"{format_size(self._process_bytes)}, {models}; and slack; give at least {floor} bytes"
        )

    def _divide(self) -> None:
        shares = tuple(self._shares)
        spare = self._spare_bytes(self._budget_bytes) - sum(share.least_bytes for share in shares)
        wanted = sum(share.bank_bytes - share.least_bytes for share in shares)
        part = min(1.0, max(0, spare) / wanted) if wanted else 0.0
        slots = [share.least_bytes + int(part * (share.bank_bytes - share.least_bytes)) for share in shares]
        # Who shrinks goes first, so that the sum is never above the budget.
        for share, slots_bytes in sorted(
            zip(shares, slots, strict=True), key=lambda pair: pair[1] - pair[0].slots_bytes
        ):
            share._take(slots_bytes)


def shared_error(name: str) -> BudgetError:
    """Why one model's budget cannot be changed."""
    return BudgetError(
        f"cannot change the budget of {name} alone: it was opened with a MemoryBudget, which others may share; call "
        "set_memory of that object"
    )


def _described(share: Share, is_only: bool) -> str:
    if is_only or share._member is None:
        parts = ", ".join(f"{name} {format_size(n_bytes)}" for name, n_bytes in share.parts.items())
    else:
        parts = f"all but experts {format_size(share.fixed_bytes)}"
    named = "" if is_only else f"{share.name}: "
    return f"{named}{parts}, the experts of one token {format_size(share.least_bytes)}"
