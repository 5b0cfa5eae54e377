# SPDX-License-Identifier: MIT
"""How a user names the parts of a MoE block: experts' weights, and a function from the block's inputs to scores.

Nothing here imports torch; tensors are the user's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.errors import ConversionError

from ..hf.checkpoint import Floats

if TYPE_CHECKING:
    import torch

    Tensors = torch.Tensor | Sequence[torch.Tensor]

ACTIVATIONS = {"relu": "relu", "gelu_tanh": "gelu", "silu": "silu", "identity": "identity", "swiglu": "swiglu"}
"""Names here, and those of QMoE's `activation_type`."""


@dataclasses.dataclass(frozen=True)
class MoeBlock:
    """A block of routed experts: y = sum over the k experts of the highest scores of weight * expert(x), where

    expert(x) = w2 activation(w1 x + b1) + b2, and with `swiglu`
    expert(x) = w2 (g * sigmoid(swiglu_alpha * g) * (u + swiglu_beta)) + b2, g = w1 x + b1, u = w3 x + b3.

    Shapes are for E experts of width I on tokens of width H. What is [E, ...] may be one tensor or a sequence of E.

    Attributes:
        w1: [E, I, H]; with `swiglu` and without `w3`: [E, 2 I, H], rows of g and then rows of u.
        w2: [E, H, I].
        k: experts that a token uses.
        route: called with the inputs of the block; returns scores [..., E] of all experts, which are ranked by them,
            or (scores, weights), both [..., E]. Without weights, these are the softmax of the k scores. Return the
            scores that the model ranks by and not a mask, so that an execution provider can make use of them.
        activation: `relu`, `gelu_tanh`, `silu`, `identity` or `swiglu`.
        w3: [E, I, H], of `swiglu`.
        b1, b2, b3: [E, rows] of w1, w2 and w3.
        is_interleaved: rows of g and u alternate in w1 (and b1), instead of following each other.
        normalizes: the weights of the k experts are divided by their sum.
        swiglu_alpha, swiglu_beta: see above.
        swiglu_limit: g is at most this, u within its positive and negative; None: no limit.
        tokens: called with the inputs of the block; returns x [..., H]. None: the first input.
        finish: called with y [..., H] and the inputs of the block; returns what the block returns. None: y.
    """

    w1: Tensors
    w2: Tensors
    k: int
    route: Callable[..., Any]
    activation: str = "silu"
    w3: Tensors | None = None
    b1: Tensors | None = None
    b2: Tensors | None = None
    b3: Tensors | None = None
    is_interleaved: bool = False
    normalizes: bool = False
    swiglu_alpha: float = 1.0
    swiglu_beta: float = 0.0
    swiglu_limit: float | None = None
    tokens: Callable[..., torch.Tensor] | None = None
    finish: Callable[..., Any] | None = None

    @property
    def n_experts(self) -> int:
        """E."""
        return len(self.w1)

    @property
    def hidden(self) -> int:
        """H."""
        return int(self.w1[0].shape[1])

    @property
    def inter(self) -> int:
        """I."""
        return int(self.w2[0].shape[1])

    @property
    def is_gated(self) -> bool:
        """Whether an expert has rows of g and of u."""
        return self.activation == "swiglu"

    def check(self, name: str) -> None:
        """Refuse what QMoE cannot express and parts that do not fit together.

        Args:
            name: of the block, for messages.

        Raises:
            ConversionError: see there.
        """
        if self.activation not in ACTIVATIONS:
            todo = "is not known"
            if self.activation == "gelu":
                todo = "(by erf) is not QMoE's, which is nn.GELU(approximate='tanh')"
            raise ConversionError(
                f"cannot export {name}: activation {self.activation} {todo}, expected one of {', '.join(ACTIVATIONS)}"
            )
        if not self.is_gated and (self.w3 is not None or self.b3 is not None or self.is_interleaved):
            raise ConversionError(
                f"cannot export {name}: w3, b3 and is_interleaved are of activation swiglu, found {self.activation}"
            )
        if self.w3 is not None and self.is_interleaved:
            raise ConversionError(f"cannot export {name}: rows are interleaved in w1, and there is w3; leave one out")
        if self.b3 is not None and self.w3 is None:
            raise ConversionError(f"cannot export {name}: b3 without w3; put these rows behind those of b1")
        for field in ("w1", "w2"):
            first = _shapes(getattr(self, field))[:1]
            if not first or len(first[0]) != 2:
                raise ConversionError(
                    f"cannot export {name}: {field} has {len(getattr(self, field))} experts"
                    f"{f' of shape {list(first[0])}' if first else ''}, expected one matrix for each"
                )
        rows = self.inter * (2 if self.is_gated and self.w3 is None else 1)
        expected = {
            "w1": (rows, self.hidden),
            "w2": (self.hidden, self.inter),
            "w3": (self.inter, self.hidden),
            "b1": (rows,),
            "b2": (self.hidden,),
            "b3": (self.inter,),
        }
        for field, shape in expected.items():
            tensors = getattr(self, field)
            if tensors is None:
                continue
            if len(tensors) != self.n_experts or set(_shapes(tensors)) != {shape}:
                found = " or ".join(str(list(s)) for s in sorted(set(_shapes(tensors))))
                raise ConversionError(
                    f"cannot export {name}: {field} has {len(tensors)} experts of shape {found}, expected "
                    f"{self.n_experts} of {list(shape)} (H {self.hidden} as in w1, I {self.inter} as in w2)"
                )
            for expert in range(self.n_experts):
                if not np.isfinite(_floats(tensors[expert])).all():
                    raise ConversionError(
                        f"cannot export {name}: {field} of expert {expert} has a number that is not finite; "
                        "was the model trained, or loaded, to the end?"
                    )
        if not 1 <= self.k <= self.n_experts:
            raise ConversionError(f"cannot export {name}: k is {self.k}, expected 1 to {self.n_experts} experts")

    def fc1(self, expert: int) -> Floats:
        """(I, H), with `swiglu` (2 I, H) whose rows of g and u alternate, as QMoE wants them."""
        return self._interleaved(self.w1, self.w3, expert)

    def fc2(self, expert: int) -> Floats:
        """(H, I)."""
        return _floats(self.w2[expert])

    def fc1_bias(self) -> Floats | None:
        """(E, rows of fc1), in the order of those."""
        if self.b1 is None and self.b3 is None:
            return None
        zeros = np.zeros(self.inter, np.float32)
        if self.b1 is None:
            assert self.b3 is not None
            return np.stack([np.stack([zeros, _floats(b)], axis=1).reshape(-1) for b in self.b3])
        if self.w3 is not None and self.b3 is None:
            return np.stack([np.stack([_floats(b), zeros], axis=1).reshape(-1) for b in self.b1])
        return np.stack([self._interleaved(self.b1, self.b3, expert) for expert in range(self.n_experts)])

    def fc2_bias(self) -> Floats | None:
        """(E, H)."""
        return None if self.b2 is None else np.stack([_floats(b) for b in self.b2])

    def _interleaved(self, first: Tensors, third: Tensors | None, expert: int) -> Floats:
        rows = _floats(first[expert])
        if not self.is_gated or self.is_interleaved:
            return rows
        gate, up = np.split(rows, 2) if third is None else (rows, _floats(third[expert]))
        return np.stack([gate, up], axis=1).reshape(2 * len(gate), *gate.shape[1:])


def _shapes(tensors: Tensors) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in tensors[i].shape) for i in range(len(tensors))]


def _floats(tensor: torch.Tensor) -> Floats:
    values: Floats = tensor.detach().float().cpu().numpy()
    return values
