# SPDX-License-Identifier: MIT
"""Which experts a model chose, token by token and layer by layer, and what it waited for."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class TraceLayer:
    """One layer with routed experts.

    Attributes:
        layer: its number in the model.
        n_experts, n_used: experts in it, and how many a token selects.
        slice_bytes: bytes that reading one expert's projections takes (whole pages), in the order of use (gate, up,
            down; merged: gate_up, down).
    """

    layer: int
    n_experts: int
    n_used: int
    slice_bytes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Trace:
    """A recorded or generated run. A batch is what was evaluated together: a prompt's micro-batch, or one token.

    Attributes:
        model: name of the model's file.
        layers: the layers with routed experts, in order; their number is L, the most experts used is K.
        batch_of_token: int32 [n_tokens], ascending from 0; its last value is n_batches - 1.
        experts: int16 [n_tokens, L, K], the selected experts in the router's order; -1 where a layer uses fewer.
        weights: float32 [n_tokens, L, K], their mixing weights; NaN where they are not known.
        begin_us: float64 [n_batches, L], when the layer began, since the start of the trace; NaN in generated traces.
        wait_us: float32 [n_batches, L], for how long the layer waited for storage; NaN likewise.
        read_bytes: int64 [n_batches, L], bytes read from storage while it was in progress; -1 likewise.
        resident: bool [n_batches, L, most experts], experts wholly resident when the layer began; None likewise.
    """

    model: str
    layers: tuple[TraceLayer, ...]
    batch_of_token: npt.NDArray[np.int32]
    experts: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float32]
    begin_us: npt.NDArray[np.float64]
    wait_us: npt.NDArray[np.float32]
    read_bytes: npt.NDArray[np.int64]
    resident: npt.NDArray[np.bool_] | None

    @property
    def n_tokens(self) -> int:
        """Tokens in the trace."""
        return len(self.batch_of_token)

    @property
    def n_batches(self) -> int:
        """Batches in the trace."""
        return len(self.begin_us)
