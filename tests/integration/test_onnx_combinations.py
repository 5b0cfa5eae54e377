# SPDX-License-Identifier: MIT
"""Every combination of what the provider claims of QMoE, against float64 in numpy. Shapes are as small as they may be.

All of bits, blocks, zero points, biases, activations and routings are combined; the number of experts, of experts used
and of tokens, axes, and the forms of SwiGLU take turns, in steps that share no factor with the others' numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest

from edgemoe.onnx import InferenceSession
from tests.integration.onnx_models import Shape, relative_error, write_model

ACTIVATIONS = ("swiglu", "silu", "gelu", "relu", "identity")
ROUTINGS = ((False, 1), (True, 0), (True, 1))  # has router_weights, normalizes
SWIGLUS = ((1.0, 0.0, None), (1.702, 1.0, 0.5), (0.5, -1.0, None))  # alpha, beta, limit
TOLERANCES = {0: 1e-5, 4: 3e-2}
"""By accuracy level, of the largest output. 4: activations are rounded to 8 bits, by 1/254 of a block's largest."""


def _shapes(bits: int, block: int, accuracy_level: int) -> Iterator[tuple[int, Shape]]:
    """Index and shape of each combination; without blocks columns need not be a multiple of anything but a byte."""
    width = block if block else 8 // bits
    for index, (has_zero_points, has_bias, activation, routing) in enumerate(
        itertools.product((False, True), (False, True), ACTIVATIONS, ROUTINGS)
    ):
        n_experts = (1, 3, 8, 2)[index % 4]
        alpha, beta, limit = SWIGLUS[index // len(ROUTINGS) % len(SWIGLUS)]
        if block:
            n_blocks = (1, 3, 5) if has_zero_points and bits < 8 else (1, 3, 2)
            hidden, inter = n_blocks[index % 3], n_blocks[(index // 3 + 1) % 3]
        else:
            hidden, inter = (17, 8, 40)[index % 3], (9, 24, 64)[index % 3]
        yield (
            index,
            Shape(
                n_experts=n_experts,
                k=1 + index // 4 % n_experts,
                hidden=width * hidden,
                inter=width * inter,
                bits=bits,
                block=block,
                has_zero_points=has_zero_points,
                has_bias=has_bias,
                activation=activation,
                alpha=alpha,
                beta=beta,
                limit=limit,
                has_router_weights=routing[0],
                normalizes=routing[1],
                accuracy_level=accuracy_level,
            ),
        )


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("block", [0, 16, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_combinations_are_those_of_numpy(bits: int, block: int, accuracy_level: int, tmp_path: Path) -> None:
    """Guards against: parts that are right alone and wrong together, such as zero points of an odd number of blocks
    with biases, one expert of one, or a limit with rows that alternate."""
    wrong = []
    for index, shape in _shapes(bits, block, accuracy_level):
        model = write_model(tmp_path / "model.onnx", shape, seed=index)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1 + index % 2
        session = InferenceSession(model.path, memory="8GiB", sess_options=options)
        feed = model.feed((1, 5, 2)[index % 3], seed=index, rank=2 + index % 2)
        error = relative_error(session.run(None, feed)[0], model.reference(feed))
        if not error < TOLERANCES[accuracy_level]:
            wrong.append((error, dataclasses.asdict(shape)))
    assert not wrong
