# SPDX-License-Identifier: MIT
"""A robot's policy: a camera's image and the joints' state to a chunk of actions, with a small MoE head.

Random weights, small shapes: an encoder, and experts (skills) that an instruction's embedding and what is seen choose
together. So the router reads another input than the experts do. Experts are 40 wide, which is no multiple of a block.
"""

from __future__ import annotations

import torch
from torch import nn

from edgemoe.converters.onnx import MoeBlock

WIDTH, INTER, N_EXPERTS, N_USED = 48, 40, 6, 2
IMAGE, N_JOINTS, CONTEXT, CHUNK = 24, 7, 16, 8


class SkillHead(nn.Module):
    """2 of 6 skills for each observation; returns the skills' probabilities as well, for the log."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH + CONTEXT, N_EXPERTS)
        self.skills = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INTER), nn.ReLU(), nn.Linear(INTER, WIDTH)) for _ in range(N_EXPERTS)
        )

    def logits(self, x: torch.Tensor, instruction: torch.Tensor) -> torch.Tensor:
        """(batch, WIDTH) and (batch, CONTEXT) to (batch, N_EXPERTS)."""
        return self.router(torch.cat([x, instruction], dim=-1))

    def forward(self, x: torch.Tensor, instruction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, WIDTH) and (batch, CONTEXT) to (batch, WIDTH) and (batch, N_EXPERTS)."""
        logits = self.logits(x, instruction)
        best, chosen = logits.topk(N_USED)
        weights = torch.zeros_like(logits).scatter(1, chosen, best.softmax(-1))
        y = torch.stack([skill(x) for skill in self.skills], dim=1)
        return x + (weights.unsqueeze(-1) * y).sum(1), logits.softmax(-1)


class Policy(nn.Module):
    """Image, joints and an instruction to actions."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten()
        )
        self.join = nn.Linear(32 * 4 * 4 + N_JOINTS, WIDTH)
        self.head = SkillHead()
        self.actions = nn.Linear(WIDTH, CHUNK * N_JOINTS)

    def forward(
        self, image: torch.Tensor, joints: torch.Tensor, instruction: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, 3, IMAGE, IMAGE), (batch, N_JOINTS), (batch, CONTEXT) to actions (batch, CHUNK, N_JOINTS), skills."""
        seen = torch.relu(self.join(torch.cat([self.camera(image), joints], dim=-1)))
        x, skills = self.head(seen, instruction)
        return self.actions(x).unflatten(-1, (CHUNK, N_JOINTS)).tanh(), skills


def _describe(head: SkillHead) -> MoeBlock:
    def finish(y: torch.Tensor, x: torch.Tensor, instruction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + y, head.logits(x, instruction).softmax(-1)

    return MoeBlock(
        w1=[skill[0].weight for skill in head.skills],
        b1=[skill[0].bias for skill in head.skills],
        w2=[skill[2].weight for skill in head.skills],
        b2=[skill[2].bias for skill in head.skills],
        k=N_USED,
        route=head.logits,
        activation="relu",
        finish=finish,
    )


MOE = {"head": _describe}
DYNAMIC = {name: {0: "batch"} for name in ("image", "joints", "instruction")}


def make() -> Policy:
    """The module."""
    torch.manual_seed(2)
    return Policy().eval()


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    """Image, joints, instruction."""
    generator = torch.Generator().manual_seed(batch)
    shapes = ((3, IMAGE, IMAGE), (N_JOINTS,), (CONTEXT,))
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)
