# SPDX-License-Identifier: MIT
"""Denoising blocks with two experts, one for steps of much noise and one for the rest, as Wan 2.2 has them.

The step alone decides: no router is trained, the score of an expert is how far the step is on its side of the boundary.
A batch may have several steps. Blocks are modulated by the step as in DiT (arXiv 2212.09748). Random weights, small
shapes.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from edgemoe.converters.onnx import MoeBlock

WIDTH, INTER, N_LAYERS, N_HEADS, N_CHANNELS = 64, 128, 2, 4, 4
BOUNDARY = 0.875


class TwoExperts(nn.Module):
    """A feed-forward network for each side of the boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = (
            nn.Sequential(nn.Linear(WIDTH, INTER), nn.GELU(approximate="tanh"), nn.Linear(INTER, WIDTH))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, WIDTH), (batch,) to (batch, tokens, WIDTH)."""
        return torch.where((t >= BOUNDARY)[:, None, None], self.high(x), self.low(x))


class Layer(nn.Module):
    """Attention and two experts, scaled and shifted by the step."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.ffn = TwoExperts()

    def forward(self, x: torch.Tensor, step: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, WIDTH), (batch, WIDTH), (batch,) to (batch, tokens, WIDTH)."""
        shift1, scale1, gain1, shift2, scale2, gain2 = self.modulation(step)[:, None].chunk(6, dim=-1)
        h = self.norms[0](x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).unflatten(-1, (3, N_HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + gain1 * self.out(attended.transpose(1, 2).flatten(2))
        return x + gain2 * self.ffn(self.norms[1](x) * (1 + scale2) + shift2, t)


class Denoiser(nn.Module):
    """Noisy latents at a step to the noise in them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(N_CHANNELS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(N_LAYERS))
        self.head = nn.Linear(WIDTH, N_CHANNELS)
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", torch.exp(-math.log(1e4) * torch.arange(WIDTH // 2) / (WIDTH // 2)))

    def forward(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, N_CHANNELS), steps from 0 to 1 (batch,), to (batch, tokens, N_CHANNELS)."""
        angles = 1000 * t[:, None] * self.frequencies
        step = torch.cat([angles.cos(), angles.sin()], dim=-1)
        x = self.embed(latents)
        for layer in self.layers:
            x = layer(x, step, t)
        return self.head(x)


def _describe(block: TwoExperts) -> MoeBlock:
    # Of equal scores the last expert is taken: at the boundary itself that has to be the one for much noise.
    experts = (block.low, block.high)

    def route(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        scores = torch.stack([BOUNDARY - t, t - BOUNDARY], dim=-1)
        return scores[:, None].expand(-1, x.shape[1], -1)

    return MoeBlock(
        w1=[expert[0].weight for expert in experts],
        b1=[expert[0].bias for expert in experts],
        w2=[expert[2].weight for expert in experts],
        b2=[expert[2].bias for expert in experts],
        k=1,
        route=route,
        activation="gelu_tanh",
    )


MOE = {"layers.*.ffn": _describe}
DYNAMIC = {"latents": {0: "batch", 1: "tokens"}, "t": {0: "batch"}}


def make() -> Denoiser:
    """The module."""
    torch.manual_seed(4)
    return Denoiser().eval()


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    """Latents, the more the longer, and steps: the first is the boundary, the others lie on both sides of it."""
    generator = torch.Generator().manual_seed(batch)
    latents = torch.randn(batch, 6 + 5 * batch, N_CHANNELS, generator=generator)
    return latents, torch.linspace(BOUNDARY, 0.1, batch) if batch % 2 else torch.linspace(1.0, BOUNDARY - 0.2, batch)
