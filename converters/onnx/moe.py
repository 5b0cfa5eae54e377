# SPDX-License-Identifier: MIT
"""A router and its experts: one `com.microsoft::QMoE` node, with scores that an execution provider can bias.

QMoE takes the k experts of the highest `router_probs` (input 1). Mixing weights are the softmax of these scores, or
what input 14 says, divided by their sum on request. So input 1 has what the model ranks experts by, for all experts,
and input 14 is left out only where the weights are that softmax.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgemoe.errors import ConversionError

from ..hf.checkpoint import Floats
from . import blocks
from .blocks import Grid
from .experts import Experts
from .families import Activation, Routing
from .graph import MICROSOFT, Graph
from .packing import store_experts

_LOWEST = -1e30
"""A score that no expert has: those outside of the chosen groups get it."""


def route(graph: Graph, logits: str, bias: Floats | None, routing: Routing) -> tuple[str, str]:
    """Scores and mixing weights.

    Args:
        logits: of the router, (tokens, experts).
        bias: (experts,), added to what experts are ranked by, not to their weights.
        routing: how.

    Returns:
        QMoE's inputs 1 and 14, the latter "" where it is not needed.
    """
    if routing.kind == "sparse_mixer":
        return logits, _sparse_mixer(graph, logits, routing.jitter)
    if routing.kind == "softmax":
        needs_weights = not routing.normalizes
        weights = graph.node("Softmax", logits, axis=-1) if needs_weights else ""
        scores = logits
    else:
        weights = scores = graph.node("Sigmoid", logits)
    if bias is not None:
        scores = graph.node("Add", scores, graph.constant(bias))
    if routing.n_groups > 1:
        scores = _in_best_groups(graph, scores, routing)
    return scores, weights


def _in_best_groups(graph: Graph, scores: str, routing: Routing) -> str:
    """Scores of experts in the best groups, the lowest of all for the others."""
    grouped = graph.node("Reshape", scores, graph.constant([0, routing.n_groups, -1], np.int64))
    best = graph.nodes("TopK", [grouped, graph.constant([routing.group_score], np.int64)], 2, axis=-1)[0]
    of_groups = graph.node("ReduceSum", best, graph.constant([2], np.int64), keepdims=0)
    chosen = graph.nodes("TopK", [of_groups, graph.constant([routing.n_groups_used], np.int64)], 2, axis=-1)[0]
    least = graph.node("ReduceMin", chosen, graph.constant([1], np.int64), keepdims=1)
    is_chosen = graph.node("GreaterOrEqual", of_groups, least)
    mask = graph.node("Unsqueeze", is_chosen, graph.constant([2], np.int64))
    return graph.reshape(graph.node("Where", mask, grouped, graph.constant(_LOWEST)), 0, -1)


def _sparse_mixer(graph: Graph, logits: str, jitter: float) -> str:
    """Weights of the best expert and of the second, and of every expert as if it were the second (arXiv 2409.12136).

    Of the experts left, those within the jitter of the best share the weight; the best one has its part of their
    softmax.
    """
    nothing = graph.constant(-np.inf)
    axis = graph.constant([-1], np.int64)
    size = graph.node("Abs", logits)

    def shares(left: str) -> tuple[str, str]:
        best = graph.node("ReduceMax", left, axis, keepdims=1)
        distance = graph.node("Div", graph.node("Sub", best, left), graph.node("Max", size, best))
        is_far = graph.node("Greater", distance, graph.constant(2 * jitter))
        return best, graph.node("Softmax", graph.node("Where", is_far, nothing, left), axis=-1)

    best, first = shares(logits)
    is_first = graph.node("Equal", logits, best)
    _, second = shares(graph.node("Where", is_first, nothing, logits))
    return graph.node("Where", is_first, first, second)


def add_experts(
    graph: Graph,
    x: str,
    routed: tuple[str, str],
    experts: Experts,
    n_experts: int,
    n_used: int,
    hidden: int,
    grid: Grid,
    routing: Routing,
    activation: Activation,
) -> str:
    """The QMoE node of a layer, whose experts are quantized one after the other.

    Args:
        x: (batch, sequence, hidden).
        routed: what `route` returned.

    Raises:
        ConversionError: rows are no whole number of blocks.
    """
    inter = experts.inter
    for n_columns in (hidden, inter):
        if n_columns % grid.block:
            fitting = [str(block) for block in blocks.BLOCKS if hidden % block == 0 and inter % block == 0]
            todo = f"use --block {fitting[0]}" if fitting else "no --block fits"
            raise ConversionError(
                f"cannot convert {graph.scope}: experts have rows of {n_columns} columns, expected a multiple of "
                f"{grid.block}; {todo}"
            )
    matrices = {"fc1": (2 * inter, hidden, experts.gate_up), "fc2": (hidden, inter, experts.down)}
    inputs = store_experts(graph, graph.scope, n_experts, matrices, grid)
    biases = ["" if b is None else graph.constant(b) for b in (experts.gate_up_bias, experts.down_bias)]
    scores, weights = routed
    names = [x, scores, inputs["fc1_q"], inputs["fc1_scales"], biases[0]]
    names += [inputs["fc2_q"], inputs["fc2_scales"], biases[1]]
    if weights:
        names += [""] * 6 + [weights]
    attributes: dict[str, Any] = dict(grid.accuracy)
    if activation.limit is not None:
        attributes["swiglu_limit"] = activation.limit
    y = graph.nodes(
        "QMoE",
        names,
        domain=MICROSOFT,
        k=n_used,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=activation.alpha,
        activation_beta=activation.beta,
        expert_weight_bits=grid.bits,
        block_size=grid.block,
        normalize_routing_weights=int(routing.normalizes),
        **attributes,
    )[0]
    return y if routing.factor == 1 else graph.node("Mul", y, graph.constant(routing.factor))
