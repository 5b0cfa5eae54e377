# SPDX-License-Identifier: MIT
"""What steps with and without drafts take: computing by the clock, waiting by the bytes that were read.

Pure arithmetic; one thread at a time.
"""

from __future__ import annotations

import dataclasses


class Average:
    """A mean that begins as that of all values and becomes an exponential one over the last `memory` of them."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self.n = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        self.n += 1
        self.value += (value - self.value) / min(self.n, self._memory)

    @property
    def weight(self) -> int:
        """How many values it stands for."""
        return min(self.n, self._memory)

    def doubt(self, n: int) -> None:
        """Let what was added so far weigh no more than `n` values."""
        self.n = min(self.n, n)


@dataclasses.dataclass(frozen=True)
class Step:
    """What the evaluation of one token and `n_drafted` drafted ones took.

    Attributes:
        seconds, stall_s: wall time, and the part of it that computing waited for storage.
        n_experts: experts that the layers asked for, each once for each layer.
        read_bytes: what was read from storage meanwhile.
        draft_s: time that went into the draft itself.
    """

    n_drafted: int
    seconds: float
    stall_s: float = 0.0
    n_experts: int = 0
    read_bytes: int = 0
    draft_s: float = 0.0

    @property
    def wait_s(self) -> float:
        """The waiting that bytes explain."""
        return min(self.stall_s, self.seconds) if self.read_bytes else 0.0

    @property
    def computing_s(self) -> float:
        """All but that."""
        return self.seconds - self.wait_s


class _Rate:
    """Something for each byte, over the last steps: the ratio of two sums, in which no single step says much."""

    def __init__(self, memory: int) -> None:
        self._value, self._bytes = Average(memory), Average(memory)

    def add(self, value: float, n_bytes: float) -> None:
        self._value.add(value)
        self._bytes.add(n_bytes)

    def doubt(self, n: int) -> None:
        self._value.doubt(n)
        self._bytes.doubt(n)

    @property
    def sum(self) -> float:
        return self._value.weight * self._value.value

    @property
    def n_bytes(self) -> float:
        return self._bytes.weight * self._bytes.value

    def shrunk(self, usual: float, weight: float) -> float:
        """The rate, with `weight` more steps in the sums that were as usual."""
        extra_bytes = weight * self._bytes.value
        n_bytes = self.n_bytes + extra_bytes
        return (self.sum + usual * extra_bytes) / n_bytes if n_bytes > 0 else usual


class Waits:
    """What waiting for storage takes, from the bytes that are read.

    The waits of one step say little: with a disk that lets reads through in bursts a step takes a third or the triple
    of what its bytes take on the average. So a step is judged by its bytes, times what a byte took in many steps.
    Those with drafts are counted apart: where bytes do not explain their waits, it shows there within some steps.
    """

    _MEMORY = 64  # steps of one token
    _DRAFT_MEMORY = 16
    _WEIGHT = 4  # steps that are taken to have been as those of both kinds together
    _GROWTH_MEMORY, _GROWTH_WEIGHT = 12, 1.5

    def __init__(self) -> None:
        self._plain, self._drafts = _Rate(self._MEMORY), _Rate(self._DRAFT_MEMORY)
        self._growth = _Rate(self._GROWTH_MEMORY)

    def begin(self) -> None:
        """Another text begins: the disk is the same, what drafts read beyond the expected is not."""
        for rate in (self._plain, self._drafts):
            rate.doubt(self._WEIGHT)
        self._growth.doubt(2)

    def observe(self, step: Step) -> None:
        """A step of one token."""
        self._plain.add(step.wait_s, step.read_bytes)

    def observe_draft(self, step: Step, expected_bytes: float) -> None:
        """A step with drafts, which was expected to read so much."""
        self._drafts.add(step.wait_s, step.read_bytes)
        if expected_bytes > 0:
            self._growth.add(step.read_bytes, expected_bytes)

    @property
    def s_per_byte(self) -> float:
        """Of steps of one token."""
        return self._plain.shrunk(self._usual_s_per_byte, self._WEIGHT)

    @property
    def draft_s_per_byte(self) -> float:
        """Of steps with drafts: more than of others where there is something that bytes do not explain."""
        return self._drafts.shrunk(self._usual_s_per_byte, self._WEIGHT)

    @property
    def growth(self) -> float:
        """Bytes of steps with drafts over those that were expected."""
        return self._growth.shrunk(1.0, self._GROWTH_WEIGHT)

    @property
    def _usual_s_per_byte(self) -> float:
        n_bytes = self._plain.n_bytes + self._drafts.n_bytes
        return (self._plain.sum + self._drafts.sum) / n_bytes if n_bytes > 0 else 0.0
