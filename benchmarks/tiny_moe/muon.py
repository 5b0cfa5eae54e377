# SPDX-License-Identifier: MIT
"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) for matrices and stacks of experts' matrices.

`torch.optim.Muon` refuses parameters of three dimensions, which is how transformers keeps experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the source above
_ITERATIONS = 5
_EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest matrix with orthonormal rows or columns.

    Gate and up of an expert, which transformers keeps under each other, are one matrix here.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], rate: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": rate, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's
                rows, columns = parameter.shape[-2:]
                direction = orthogonalize(update)
                parameter.add_(direction, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """U V^T of each matrix U S V^T, roughly: singular values come out between 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.bfloat16)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + _EPSILON)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)
