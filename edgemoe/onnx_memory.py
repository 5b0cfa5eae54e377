# SPDX-License-Identifier: MIT
"""A session of ONNX Runtime within a memory budget: planned before it is loaded, measured and fitted afterwards.

The session itself may be onnxruntime's or onnxruntime-genai's: what counts is the plug-in's runtime, which publishes
itself while the session is made.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from pathlib import Path

from edgemoe import _native, host, mapping
from edgemoe.budget import MemoryBudget, Share, shared_error
from edgemoe.formats.onnx_model import OnnxModel
from edgemoe.onnx_plan import OnnxPlan


class _Rows:
    """The tensors of which a run reads some rows, as ONNX Runtime has mapped them."""

    def __init__(self, model: OnnxModel, names: Iterable[str], most_bytes: int) -> None:
        tensors = [model.tensors[name] for name in names]
        mapped = {path: mapping.mappings(path) for path in {t.path for t in tensors if t.path is not None}}
        self._mapped = [
            m for t in tensors if t.path is not None for m in mapping.whole_pages(mapped[t.path], t.offset, t.n_bytes)
        ]
        self._most_bytes = most_bytes
        mapping.read_single_pages(self._mapped)
        mapping.drop(self._mapped)
        self._file_bytes = _resident_file_bytes()

    def trim(self) -> None:
        """Give the pages back if they are more than was planned."""
        if self._mapped and _resident_file_bytes() > self._file_bytes + self._most_bytes:
            mapping.drop(self._mapped)


def _resident_file_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[2]) * resource.getpagesize()


class SessionMemory:
    """The memory of one session: its plan, its part of a budget, and what it has grown to."""

    def __init__(
        self, model: OnnxModel, planned: OnnxPlan, memory: int | float | str | MemoryBudget | None, name: str
    ) -> None:
        """Make room.

        Args:
            model: what is going to be loaded.
            planned: what it will take.
            memory: a size for a budget of its own, or one to share; None for none.
            name: for messages.

        Raises:
            BudgetError: it does not fit, or the size cannot be parsed.
        """
        self._model = model
        self._planned = planned
        self._name = name
        self._is_shared = isinstance(memory, MemoryBudget)
        self._runtime: _native.Runtime | None = None
        self._rows: _Rows | None = None
        self._share: Share | None = None
        self._largest_input_bytes = 0
        self._pending_bytes = planned.pending_bytes
        if memory is None:
            slots = host.spare_bytes() - planned.own_bytes
            self.slots_bytes = min(planned.expert_bank_bytes, max(slots, planned.token_cycle_bytes))
            return
        budget = memory if isinstance(memory, MemoryBudget) else MemoryBudget(memory)
        self._share = budget.join(name, planned.parts, planned.least_slots_bytes, planned.expert_bank_bytes)
        self.slots_bytes = self._share.slots_bytes

    @property
    def budget_bytes(self) -> int:
        """The budget in force; 0 without one."""
        return self._share.budget.budget_bytes if self._share is not None else 0

    def loaded(self, found: _native.OrtLoaded) -> None:
        """The session is there.

        Raises:
            BudgetError: it took more than planned, and does not fit.
        """
        self._runtime = found.runtime
        self._pending_bytes += found.workspace_bytes - self._planned.workspace_bytes
        self._rows = _Rows(self._model, self._planned.mapped_names, self._planned.rows_bytes)
        if self._share is not None:
            self._share.settle(self, self._pending_bytes, self._planned.token_cycle_bytes)

    def close(self) -> None:
        """The session is gone, or could not be made."""
        if self._share is not None:
            self._share.leave()

    def set_memory(self, memory: int | float | str) -> None:
        """Change the budget.

        Raises:
            BudgetError: it is below what the session needs, or shared; nothing is changed.
        """
        if self._is_shared:
            raise shared_error(self._name)
        if self._share is not None:
            self._share.budget.set_memory(memory)
            return
        budget = MemoryBudget(memory)
        pending = {"buffers that it has not used yet": self._pending_bytes}
        least, bank = self._planned.token_cycle_bytes, self._planned.expert_bank_bytes
        self._share = budget.adopt(self._name, pending, least, bank, self, self.slots_bytes)

    def after_run(self, n_input_bytes: int | None) -> None:
        """Give back slots for what arenas have grown by, after the largest input so far, or one of unknown size."""
        if self._rows is not None:
            self._rows.trim()
        if self._share is None:
            return
        if n_input_bytes is not None:
            if n_input_bytes <= self._largest_input_bytes:
                return
            self._largest_input_bytes = n_input_bytes
        self._share.observe()

    def before_reset(self) -> None:
        """The runtime's counters, by which slots are known to be filled, are about to begin again."""
        if self._share is not None:
            self._share.before_reset()

    def take_slots(self, slots_bytes: int) -> None:
        """As `budget.Member`."""
        self.slots_bytes = slots_bytes
        if self._runtime is not None:
            _native.set_slots_bytes(self._runtime, slots_bytes)

    def expert_bytes_read(self) -> int:
        """As `budget.Member`."""
        return int(self._runtime.stats().bytes_read) if self._runtime is not None else 0
