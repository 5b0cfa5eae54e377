# SPDX-License-Identifier: MIT
"""Which type each group of weights gets, so that together they fit into so many bytes and cost least: solved exactly.

The problem is the multiple-choice knapsack: of each group one option, the sum of their bytes within a budget, the sum
of their costs minimal. It is solved group by group over the states (bytes, cost) that no other state beats in both
(Nemhauser and Ullmann, Management Science 15(9), 1969). A state is dropped early if its cost, plus the least that the
remaining groups can cost when options may be mixed (the linear relaxation: lower convex hulls, steepest step first;
Sinha and Zoltners, Operations Research 27(3), 1979), is more than that of a solution already known.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GgmlType

from edgemoe.errors import ConversionError

_TOLERANCE = 1e-9
"""Relative error of a sum of costs that must not make a bound drop the best state."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A type that a group may have: what it takes, and what it costs in quality."""

    ggml_type: GgmlType
    n_bytes: int
    cost: float


@dataclasses.dataclass(frozen=True)
class Group:
    """Weights that have one type: a projection of all experts of a layer.

    Attributes:
        name: of the tensor.
        n_weights: how many.
        options: at least one; costs are finite and not negative.
    """

    name: str
    n_weights: int
    options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One option for each group, in their order."""

    groups: tuple[Group, ...]
    chosen: tuple[Option, ...]

    @property
    def n_bytes(self) -> int:
        return sum(option.n_bytes for option in self.chosen)

    @property
    def cost(self) -> float:
        return sum(option.cost for option in self.chosen)

    @property
    def bits_per_weight(self) -> float:
        return self.n_bytes * 8 / sum(group.n_weights for group in self.groups)

    def table(self) -> list[str]:
        """A line for each group: its tensor, type, bits per weight, bytes and cost."""
        width = max(len(group.name) for group in self.groups)
        return [
            f"{group.name:<{width}}  {option.ggml_type.name:<7}  {option.n_bytes * 8 / group.n_weights:6.3f} bpw  "
            f"{option.n_bytes:>12} bytes  cost {option.cost:.4g}"
            for group, option in zip(self.groups, self.chosen, strict=True)
        ]


def allocate(groups: Sequence[Group], budget_bytes: int) -> Allocation:
    """The options of least total cost within the budget; of equal ones, some with the fewest bytes.

    Raises:
        ConversionError: even the smallest options do not fit.
    """
    options = [_undominated(group) for group in groups]
    least = [min(option.n_bytes for option in group) for group in options]
    if sum(least) > budget_bytes:
        n_weights = sum(group.n_weights for group in groups)
        raise ConversionError(
            f"cannot fit the experts into {budget_bytes} bytes ({budget_bytes * 8 / n_weights:.3f} bits per weight): "
            f"the smallest types take {sum(least)} ({sum(least) * 8 / n_weights:.3f}); ask for more bits per weight"
        )
    bounds = [_Relaxation(options[index:]) for index in range(len(options) + 1)]
    best_known = bounds[0].greedy_cost(budget_bytes)
    limit = best_known + _TOLERANCE * (1 + abs(best_known))

    n_bytes = np.zeros(1, np.int64)
    cost = np.zeros(1)
    steps: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []  # where each state came from, by which option
    for index, group in enumerate(options):
        all_bytes = (n_bytes[:, None] + np.array([option.n_bytes for option in group])).ravel()
        all_costs = (cost[:, None] + np.array([option.cost for option in group])).ravel()
        room = budget_bytes - all_bytes
        kept = np.flatnonzero(room >= bounds[index + 1].least_bytes)
        kept = kept[all_costs[kept] + bounds[index + 1].cost(room[kept]) <= limit]
        kept = kept[np.lexsort((all_costs[kept], all_bytes[kept]))]
        cheapest = np.minimum.accumulate(all_costs[kept])
        kept = kept[np.concatenate(([True], all_costs[kept][1:] < cheapest[:-1]))]
        n_bytes, cost = all_bytes[kept], all_costs[kept]
        steps.append((kept // len(group), kept % len(group)))
    state = len(cost) - 1  # states are sorted by bytes, and costs fall
    chosen: list[Option] = []
    for (parents, picks), group in zip(reversed(steps), reversed(options), strict=True):
        chosen.append(group[picks[state]])
        state = int(parents[state])
    return Allocation(tuple(groups), tuple(reversed(chosen)))


def _undominated(group: Group) -> list[Option]:
    """Options that no other one beats in bytes and cost, by rising bytes and falling costs."""
    kept: list[Option] = []
    for option in sorted(group.options, key=lambda option: (option.n_bytes, option.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


class _Relaxation:
    """The least cost of some groups within so many bytes, if options could be mixed: convex and piecewise linear."""

    def __init__(self, groups: Sequence[Sequence[Option]]) -> None:
        self.least_bytes = sum(group[0].n_bytes for group in groups)
        self._most_cost = sum(group[0].cost for group in groups)
        steps = [
            ((after.cost - before.cost) / (after.n_bytes - before.n_bytes), index, before, after)
            for index, group in enumerate(groups)
            for before, after in itertools.pairwise(_hull(group))
        ]
        self._steps = sorted(steps, key=lambda step: step[:2])  # of one group, hulls keep their order
        self._bytes = np.cumsum([0, *(after.n_bytes - before.n_bytes for _, _, before, after in self._steps)])
        self._costs = self._most_cost + np.cumsum(
            [0.0, *(after.cost - before.cost for _, _, before, after in self._steps)]
        )

    def cost(self, room: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """A lower bound of the cost within `room` bytes, each at least `least_bytes`."""
        bound: npt.NDArray[np.float64] = np.interp(room - self.least_bytes, self._bytes, self._costs)
        return bound

    def greedy_cost(self, budget_bytes: int) -> float:
        """The cost of one solution: the steepest steps that fit, none after one of its group that did not."""
        room, cost = budget_bytes - self.least_bytes, self._most_cost
        stopped: set[int] = set()
        for _, index, before, after in self._steps:
            if index in stopped or after.n_bytes - before.n_bytes > room:
                stopped.add(index)
                continue
            room -= after.n_bytes - before.n_bytes
            cost += after.cost - before.cost
        return cost


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull over bytes."""
    hull: list[Option] = []
    for option in options:
        while len(hull) > 1 and (hull[-1].cost - hull[-2].cost) * (option.n_bytes - hull[-1].n_bytes) >= (
            option.cost - hull[-1].cost
        ) * (hull[-1].n_bytes - hull[-2].n_bytes):
            hull.pop()
        hull.append(option)
    return hull
