# SPDX-License-Identifier: MIT
"""A forecaster of time series: patches of a series, causal attention, experts with a shared one as in Time-MoE (arXiv
2409.16040), and a router as in DeepSeek-V3 (arXiv 2412.19437): sigmoids, with a bias that counts for the choice only.

Random weights, small shapes. Experts are modules of a list; the shared expert stays in the dense part.
"""

from __future__ import annotations

import torch
from torch import nn

from edgemoe.converters.onnx import MoeBlock

WIDTH, INTER, N_EXPERTS, N_USED, N_LAYERS, N_HEADS = 64, 96, 16, 4, 2, 4
PATCH, HORIZON, SCALE = 8, 16, 2.5


class Expert(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INTER, bias=False)
        self.up_proj = nn.Linear(WIDTH, INTER, bias=False)
        self.down_proj = nn.Linear(INTER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., WIDTH) to the same."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseBlock(nn.Module):
    """4 of 16 experts for each patch, and one that all take."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(N_EXPERTS))
        self.shared = Expert()
        self.shared_router = nn.Linear(WIDTH, 1, bias=False)
        self.router = nn.Linear(WIDTH, N_EXPERTS, bias=False)
        self.router_bias = nn.Parameter(torch.randn(N_EXPERTS) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, patches, WIDTH) to the same."""
        affinities = self.router(x).sigmoid()
        chosen = (affinities + self.router_bias).topk(N_USED).indices
        weights = affinities.gather(-1, chosen)
        weights = SCALE * weights / weights.sum(-1, keepdim=True)
        y = self.add_shared(torch.zeros_like(x), x)
        for expert, module in enumerate(self.experts):
            *rows, place = (chosen == expert).nonzero(as_tuple=True)
            y[tuple(rows)] += weights[(*rows, place)][:, None] * module(x[tuple(rows)])
        return y

    def add_shared(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y + the shared expert's output."""
        return y + self.shared_router(x).sigmoid() * self.shared(x)


class Layer(nn.Module):
    """Causal attention and a sparse block."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ffn = SparseBlock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, patches, WIDTH) to the same."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, N_HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norms[1](x))


class Forecaster(nn.Module):
    """The past of a series to its next HORIZON values, from every patch on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(N_LAYERS)))
        self.head = nn.Linear(WIDTH, HORIZON)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """(batch, patches, PATCH) to (batch, patches, HORIZON)."""
        mean, deviation = series.mean((1, 2), keepdim=True), series.std((1, 2), keepdim=True) + 1e-5
        return self.head(self.layers(self.embed((series - mean) / deviation))) * deviation + mean


def _describe(block: SparseBlock) -> MoeBlock:
    def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        affinities = block.router(x).sigmoid()
        return affinities + block.router_bias, affinities

    return MoeBlock(
        w1=[expert.gate_proj.weight for expert in block.experts],
        w3=[expert.up_proj.weight for expert in block.experts],
        w2=[expert.down_proj.weight for expert in block.experts],
        k=N_USED,
        route=route,
        activation="swiglu",
        normalizes=True,
        finish=lambda y, x: block.add_shared(SCALE * y, x),
    )


MOE = {SparseBlock: _describe}
DYNAMIC = {"series": {0: "batch", 1: "patches"}}


def make() -> Forecaster:
    """The module."""
    torch.manual_seed(1)
    return Forecaster().eval()


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    """Random walks; the more, the longer."""
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, (4 + 3 * batch) * PATCH, generator=generator).cumsum(1).unflatten(1, (-1, PATCH)),)
