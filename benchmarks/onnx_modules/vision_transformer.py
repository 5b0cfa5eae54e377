# SPDX-License-Identifier: MIT
"""A vision transformer whose every second feed-forward block is a mixture of experts, as in V-MoE (arXiv 2106.05974).

Random weights, small shapes. Experts are stacked tensors with biases and GELU; the weights of the 2 experts of a patch
are the softmax over all 8 and are not divided by their sum.
"""

from __future__ import annotations

import torch
from torch import nn

from edgemoe.converters.onnx import MoeBlock

WIDTH, INTER, N_EXPERTS, N_USED, N_LAYERS, N_HEADS = 64, 128, 8, 2, 4, 4
IMAGE, PATCH, N_CLASSES = 32, 8, 10


class MoeMlp(nn.Module):
    """Top-2 of 8 experts for each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, N_EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(N_EXPERTS, INTER, WIDTH) * WIDTH**-0.5)
        self.b1 = nn.Parameter(torch.randn(N_EXPERTS, INTER) * 0.1)
        self.w2 = nn.Parameter(torch.randn(N_EXPERTS, WIDTH, INTER) * INTER**-0.5)
        self.b2 = nn.Parameter(torch.randn(N_EXPERTS, WIDTH) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, patches, WIDTH) to the same."""
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = self.router(tokens).softmax(-1).topk(N_USED)
        y = torch.zeros_like(tokens)
        for expert in range(N_EXPERTS):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            h = nn.functional.gelu(tokens[rows] @ self.w1[expert].T + self.b1[expert], approximate="tanh")
            y[rows] += weights[rows, place, None] * (h @ self.w2[expert].T + self.b2[expert])
        return y.view_as(x)


class Layer(nn.Module):
    """Attention and a feed-forward block."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.ffn = ffn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, patches, WIDTH) to the same."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, N_HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norms[1](x))


class VisionTransformer(nn.Module):
    """Images to classes."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.randn((IMAGE // PATCH) ** 2, WIDTH) * 0.1)
        dense = [nn.Sequential(nn.Linear(WIDTH, INTER), nn.GELU(), nn.Linear(INTER, WIDTH)) for _ in range(N_LAYERS)]
        self.layers = nn.Sequential(*(Layer(MoeMlp() if i % 2 else dense[i]) for i in range(N_LAYERS)))
        self.head = nn.Linear(WIDTH, N_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 3, IMAGE, IMAGE) to logits (batch, N_CLASSES)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.layers(x).mean(dim=1))


def _describe(block: MoeMlp) -> MoeBlock:
    def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = block.router(x)
        return logits, logits.softmax(-1)

    return MoeBlock(block.w1, block.w2, N_USED, route, "gelu_tanh", b1=block.b1, b2=block.b2)


MOE = {MoeMlp: _describe}
DYNAMIC = {"images": {0: "batch"}}


def make() -> VisionTransformer:
    """The module."""
    torch.manual_seed(0)
    return VisionTransformer().eval()


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    """Images."""
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, 3, IMAGE, IMAGE, generator=generator),)
