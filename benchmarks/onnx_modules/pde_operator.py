# SPDX-License-Identifier: MIT
"""An operator network for partial differential equations (DeepONet, arXiv 1910.03193) with experts within experts.

G(u)(y) = sum over p of branch(u)_p trunk(y, u)_p: from a function u, known at sensors, to the solution at any point y.
In the trunk, outer experts stand for regimes of the equation and are chosen by u; each is a mixture itself, whose inner
experts stand for parts of the domain and are chosen by y. Random weights, small shapes.

QMoE has one level. A pair (outer, inner) becomes one expert, and it is exact: the weight of a pair is the product of
both, pairs that the two levels choose get a score above all others, and k is the number of such pairs.
"""

from __future__ import annotations

import torch
from torch import nn

from edgemoe.converters.onnx import MoeBlock

N_SENSORS, WIDTH, INTER = 32, 64, 64
N_OUTER, N_OUTER_USED, N_INNER, N_INNER_USED = 4, 2, 4, 1


class InnerMoe(nn.Module):
    """One of 4 experts for each point."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, N_INNER)
        self.w1 = nn.Parameter(torch.randn(N_INNER, INTER, WIDTH) * WIDTH**-0.5)
        self.b1 = nn.Parameter(torch.randn(N_INNER, INTER) * 0.3)
        self.w2 = nn.Parameter(torch.randn(N_INNER, WIDTH, INTER) * INTER**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, points, WIDTH) to the same."""
        weights, chosen = self.router(x).softmax(-1).topk(N_INNER_USED)
        y = torch.zeros_like(x)
        for place in range(N_INNER_USED):
            w1, b1, w2 = (w[chosen[..., place]] for w in (self.w1, self.b1, self.w2))
            h = nn.functional.silu((w1 @ x.unsqueeze(-1)).squeeze(-1) + b1)
            y = y + weights[..., place, None] * (w2 @ h.unsqueeze(-1)).squeeze(-1)
        return y


class NestedMoe(nn.Module):
    """2 of 4 regimes for each input function, one of 4 experts of each for each point."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, N_OUTER)
        self.regimes = nn.ModuleList(InnerMoe() for _ in range(N_OUTER))

    def forward(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """(batch, points, WIDTH) and (batch, WIDTH) to (batch, points, WIDTH)."""
        best, chosen = self.router(u).topk(N_OUTER_USED)
        weights = torch.zeros(len(u), N_OUTER).scatter(1, chosen, best.softmax(-1))
        y = torch.stack([regime(x) for regime in self.regimes], dim=-1)
        return (y * weights[:, None, None]).sum(-1)


class OperatorNet(nn.Module):
    """An input function at its sensors, and points, to the solution there."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(N_SENSORS, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.lift = nn.Linear(2, WIDTH)
        self.trunk = NestedMoe()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, u: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """(batch, N_SENSORS), (batch, points, 2) to (batch, points)."""
        coefficients = self.branch(u)
        x = torch.sin(self.lift(points))
        basis = x + self.trunk(x, coefficients)
        return (basis * coefficients[:, None]).sum(-1) + self.bias


def _chosen(scores: torch.Tensor, k: int) -> torch.Tensor:
    """1 where a score is one of the k highest, else 0."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(k).indices, 1.0)


def _describe(block: NestedMoe) -> MoeBlock:
    def route(x: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outer = block.router(u)[:, None].expand(-1, x.shape[1], -1)
        outer_chosen = _chosen(outer, N_OUTER_USED)
        outer_weights = outer.masked_fill(outer_chosen == 0, -torch.inf).softmax(-1)
        inner = torch.stack([regime.router(x).softmax(-1) for regime in block.regimes], dim=-2)
        pairs = outer.softmax(-1)[..., None] * inner  # below 1
        is_chosen = outer_chosen[..., None] * _chosen(inner, N_INNER_USED)
        return (pairs + is_chosen).flatten(-2), (outer_weights[..., None] * inner).flatten(-2)

    return MoeBlock(
        w1=torch.cat([regime.w1 for regime in block.regimes]),
        b1=torch.cat([regime.b1 for regime in block.regimes]),
        w2=torch.cat([regime.w2 for regime in block.regimes]),
        k=N_OUTER_USED * N_INNER_USED,
        route=route,
        activation="silu",
    )


MOE = {NestedMoe: _describe}
DYNAMIC = {"u": {0: "batch"}, "points": {0: "batch", 1: "points"}}


def make() -> OperatorNet:
    """The module."""
    torch.manual_seed(3)
    return OperatorNet().eval()


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    """Input functions, and points; the more of the former, the more of the latter."""
    generator = torch.Generator().manual_seed(batch)
    return (
        torch.randn(batch, N_SENSORS, generator=generator),
        torch.rand(batch, 5 + 4 * batch, 2, generator=generator),
    )
