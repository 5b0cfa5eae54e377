# SPDX-License-Identifier: MIT
"""How large the expert slots should be, found by the clock, where others take the memory that a budget has promised.

Slots that the kernel has swapped out are worse than none: a hit in one is hundreds of page faults, one after the other,
where a miss is one large read. That a process waits for its own memory shows in its major page faults; what they cost
shows only in its speed. So faults begin a *descent*: the slots shrink step by step as long as there are faults, each
size is timed, and the fastest is kept if it is faster by more than chance. While slots are smaller than the budget
allows, a larger size is tried now and then, where memory is free for it. What has failed is tried again ever later, so
that a machine that does not change is left alone. Without major faults nothing is ever changed.

The bits of the output do not depend on the slots. Measured: docs/experiments.md, A cache size in a closed loop.
"""

from __future__ import annotations

import dataclasses
import logging
import resource
from collections.abc import Callable

from edgemoe import _native, host

WINDOW_EVALS, WINDOW_S = 8, 1.0
"""A window ends after so many evaluations, or after two if they took so long: swapping can take a second a token.
Two windows measure a size; the one before them lets the cache settle."""
FAULTS_PER_EVAL = 16
"""Major faults from which on a window counts as pressed: about a millisecond of a token, at 50 to 100 us each."""
STEPS = 8
"""What is tried are eighths of what the budget allows."""
LEAST_GAIN = 1.08
SHORTEST_WAIT, LONGEST_WAIT = 16, 512
"""Windows until what failed, or was undone, is tried again; the wait doubles each time. After the longest without
faults at full size it is the shortest again."""

_log = logging.getLogger("edgemoe")


@dataclasses.dataclass(frozen=True)
class Window:
    """What a few evaluations did.

    Attributes:
        n_evals: how many.
        seconds: their time.
        n_experts: experts that layers asked for: the work done, whatever drafts there were.
        n_faults: major page faults of the process.
    """

    n_evals: int
    seconds: float
    n_experts: int
    n_faults: int

    @property
    def is_pressed(self) -> bool:
        """Whether so much of the process was swapped in that something may have to be done."""
        return self.n_faults >= FAULTS_PER_EVAL * self.n_evals


@dataclasses.dataclass(frozen=True)
class _Trial:
    slots_bytes: int
    rate: float  # experts a second


class SizeController:
    """Decides about sizes; time, faults and free memory come from outside. Not thread-safe.

    Attributes:
        slots_bytes: the size that slots should have now.
        allowed_bytes: what the budget pays for: the largest.
    """

    def __init__(self, allowed_bytes: int, least_bytes: int, available_bytes: Callable[[], int]) -> None:
        """Begin with all that is allowed.

        Args:
            allowed_bytes: the largest size.
            least_bytes: slots for the experts of one token: the smallest size.
            available_bytes: memory that can be taken without swapping. It is asked only before growing.
        """
        self._available_bytes = available_bytes
        self._least_bytes = min(least_bytes, allowed_bytes)
        self.slots_bytes = self.allowed_bytes = allowed_bytes
        self._step_bytes = max(1, allowed_bytes // STEPS)
        self._windows: list[Window] = []
        self._is_settling = self._is_descending = self._is_growing = False
        self._trials: list[_Trial] = []
        self._n_pressed = self._n_calm = 0
        self._growth_wait = self._growth_left = SHORTEST_WAIT
        self._descent_wait, self._descent_left = SHORTEST_WAIT, 0

    @property
    def is_in_trial(self) -> bool:
        """Whether `slots_bytes` is being tried, and not yet chosen."""
        return self._is_descending or self._is_growing

    def interrupt(self) -> None:
        """Something other than decoding happened: the windows in progress say nothing."""
        self._windows = []
        self._is_settling = True

    def limit(self, allowed_bytes: int) -> None:
        """A little less is allowed than before; what is known of sizes stays true."""
        self.allowed_bytes = allowed_bytes
        self.slots_bytes = min(self.slots_bytes, allowed_bytes)

    def on_window(self, window: Window) -> bool:
        """Take notice of a window; True if `slots_bytes` has changed."""
        if self._is_settling:
            self._is_settling = False
            return False
        self._windows = [*self._windows[-1:], window]
        if not self.is_in_trial:
            return self._end_usual_window(window)
        if len(self._windows) < 2:
            return False
        return self._end_descent_step() if self._is_descending else self._end_growth()

    def _end_usual_window(self, window: Window) -> bool:
        self._n_pressed = self._n_pressed + 1 if window.is_pressed else 0
        self._descent_left -= 1
        if self._n_pressed >= 2 and self._descent_left < 0 and self.slots_bytes > self._least_bytes:
            self._is_descending = True
            self._trials = [self._measured()]
            return self._take(self._smaller_bytes())
        if self.slots_bytes == self.allowed_bytes:
            self._n_calm = 0 if window.is_pressed else self._n_calm + 1
            if self._n_calm >= LONGEST_WAIT:
                self._growth_wait = self._descent_wait = SHORTEST_WAIT
            return False
        self._growth_left -= 1
        if self._growth_left > 0 or self._n_pressed > 0 or len(self._windows) < 2:
            return False
        larger_bytes = min(self.allowed_bytes, self.slots_bytes + self._step_bytes)
        if self._available_bytes() < larger_bytes - self.slots_bytes:
            self._growth_left = SHORTEST_WAIT
            return False
        self._is_growing = True
        self._trials = [self._measured()]
        return self._take(larger_bytes)

    def _end_descent_step(self) -> bool:
        self._trials.append(self._measured())
        start, fastest = self._trials[0], max(self._trials, key=lambda one: one.rate)
        if self._is_pressed() and self.slots_bytes > self._least_bytes:
            return self._take(self._smaller_bytes())
        self._is_descending = False
        self._n_pressed = self._n_calm = 0
        self._descent_wait = self._descent_left = min(2 * self._descent_wait, LONGEST_WAIT)
        if fastest.rate < LEAST_GAIN * start.rate:
            return self._take(start.slots_bytes)
        self._wait_longer_to_grow()
        return self._take(fastest.slots_bytes)

    def _end_growth(self) -> bool:
        self._is_growing = False
        smaller = self._trials[0]
        if self._is_pressed() and self._measured().rate < LEAST_GAIN * smaller.rate:
            self._wait_longer_to_grow()
            return self._take(smaller.slots_bytes)
        self._growth_left = 2
        return False

    def _wait_longer_to_grow(self) -> None:
        self._growth_left = self._growth_wait
        self._growth_wait = min(2 * self._growth_wait, LONGEST_WAIT)

    def _smaller_bytes(self) -> int:
        return max(self._least_bytes, self.slots_bytes - self._step_bytes)

    def _is_pressed(self) -> bool:
        return any(one.is_pressed for one in self._windows)

    def _measured(self) -> _Trial:
        seconds = sum(one.seconds for one in self._windows)
        return _Trial(self.slots_bytes, sum(one.n_experts for one in self._windows) / seconds)

    def _take(self, slots_bytes: int) -> bool:
        self.interrupt()
        slots_bytes = min(slots_bytes, self.allowed_bytes)  # it may have been tried before there was a lower limit
        is_changed = slots_bytes != self.slots_bytes
        self.slots_bytes = slots_bytes
        return is_changed


class CacheSize:
    """The controller at work on a runtime: called after every evaluation while decoding, never during one."""

    def __init__(self, native: _native.Runtime, allowed_bytes: int, least_bytes: int) -> None:
        """`allowed_bytes` are the slots that the runtime has now; `least_bytes` as for `SizeController`."""
        self._native = native
        self._least_bytes = least_bytes
        self._is_reduced = self._has_said = False
        self._n_evals, self._seconds = 0, 0.0
        self._experts_before = self._faults_before = self._slots_bytes = 0
        self.restart(allowed_bytes)

    def restart(self, allowed_bytes: int) -> None:
        """The budget has changed, and the slots with it: what was learned is forgotten."""
        self._controller = SizeController(allowed_bytes, self._least_bytes, host.available_memory_bytes)
        self._slots_bytes = int(self._native.stats().slots_bytes)
        self._begin_window()

    def limit(self, allowed_bytes: int) -> None:
        """The budget has become a little less, and the slots, where they were more."""
        self._controller.limit(allowed_bytes)
        self._slots_bytes = min(self._slots_bytes, allowed_bytes)

    def interrupt(self) -> None:
        """A prompt was read."""
        self._controller.interrupt()
        self._begin_window()

    def on_eval(self, seconds: float) -> None:
        """A token, or a token and its draft, was evaluated in so many seconds."""
        self._n_evals += 1
        self._seconds += seconds
        if self._n_evals >= WINDOW_EVALS or (self._seconds >= WINDOW_S and self._n_evals >= 2):
            self._end_window()

    def _end_window(self) -> None:
        n_experts = self._experts_asked() - self._experts_before
        window = Window(self._n_evals, self._seconds, n_experts, _major_faults() - self._faults_before)
        # Counters may have been reset; and whoever has set the slots otherwise knows why.
        if n_experts > 0 and self._native.stats().slots_bytes == self._slots_bytes:
            if self._controller.on_window(window):
                _native.set_slots_bytes(self._native, self._controller.slots_bytes)
                self._slots_bytes = int(self._native.stats().slots_bytes)
            if not self._controller.is_in_trial:
                self._say()
        self._begin_window()

    def _begin_window(self) -> None:
        self._n_evals, self._seconds = 0, 0.0
        self._experts_before, self._faults_before = self._experts_asked(), _major_faults()

    def _experts_asked(self) -> int:
        stats = self._native.stats()
        return int(stats.hits + stats.misses + stats.late_hits)

    def _say(self) -> None:
        """Once as a warning that slots are smaller now; later, and when they are whole again, as information."""
        now, allowed = self._controller.slots_bytes, self._controller.allowed_bytes
        if (now < allowed) == self._is_reduced:
            return
        self._is_reduced = now < allowed
        if self._is_reduced:
            _log.log(
                logging.INFO if self._has_said else logging.WARNING,
                "the system swaps this process out, so experts get %d of %d MiB, which is faster; they grow again when "
                "memory is free. A smaller budget, or fewer other programs, would avoid it",
                now >> 20,
                allowed >> 20,
            )
            self._has_said = True
        else:
            _log.info("experts have all of their %d MiB again", allowed >> 20)


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
