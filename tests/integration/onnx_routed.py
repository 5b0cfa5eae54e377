# SPDX-License-Identifier: MIT
"""Stacks of QMoE nodes with their routers in the graph, as exporters write them, over a residual stream that changes
little from one node to the next: y = x + QMoE(norm(x), router(norm(x))).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.integration.onnx_models import Array, Model, Shape, _layer_tensors, _qmoe

FORMS = ("gemm", "matmul_add", "softmax_weights", "sigmoid_bias", "groups", "nbits", "half")
"""Routers whose scores are those of all experts."""
SCATTERED = ("scattered_weights", "scattered_logs")
"""Those of the chosen experts alone, among zeros (and the same as mixing weights) or -10000."""
# Of what an expert adds to the residual stream: so little that the next router mostly agrees with this one's input.
_STEP = 0.05


class RoutedModel(Model):
    """`tensors` has each layer's `norm`, `router` [hidden, experts] and `bias` [experts] as well."""

    def inputs(self, n_tokens: int, seed: int = 0) -> Array:
        return np.random.default_rng(seed).standard_normal((n_tokens, self.shape.hidden), dtype=np.float32)

    def routed(self, x: Array, layer: int, form: str) -> tuple[Array, Array, Array]:
        """float64 of x [tokens, hidden]: what experts get, scores, and mixing weights before they are normalized."""
        t = self.tensors[layer]
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * t["norm"]
        logits = normed @ t["router"].astype(np.float64)
        if form == "sigmoid_bias":
            return normed, 1 / (1 + np.exp(-logits)) + t["bias"], 1 / (1 + np.exp(-logits))
        if form == "softmax_weights":
            return normed, logits, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        logits = logits + (t["bias"] if form == "matmul_add" else 0)
        return normed, logits, np.exp(logits)

    def reference_of_choice(self, x: Array, experts: Array, form: str) -> Array:
        """float64 of x [tokens, hidden] with the experts [tokens, layers, k] that were chosen, -1 for none."""
        rows = []
        for token, chosen in enumerate(experts):
            row = x[token : token + 1].astype(np.float64)
            for layer, of_layer in enumerate(chosen):
                normed, _, weights = self.routed(row, layer, form)
                ids = of_layer[of_layer >= 0]
                ranked = np.full(weights.shape, -1.0)
                ranked[0, ids] = np.arange(len(ids), 0, -1)
                shape = Shape(**{**vars(self.shape), "k": len(ids)})
                row = row + _qmoe(shape, self.tensors[layer], normed, ranked, weights)
            rows.append(row[0])
        return np.array(rows)


def _route(form: str, layer: int, s: Shape, t: dict[str, Array]) -> tuple[list[Any], dict[str, Array], str, str]:
    """Nodes behind n{layer}, constants, and the names of scores and mixing weights ("": none)."""
    node, at = helper.make_node, f".{layer}"
    n, router, bias, logits, scores, weights = (
        name + at for name in ("n", "router", "bias", "logits", "scores", "weights")
    )
    constants = {router: t["router"]}
    if form == "gemm":
        return [node("Gemm", [n, router], [logits], transB=1)], {router: t["router"].T.copy()}, logits, ""
    if form == "half":
        nodes = [
            node("Cast", [n], ["half" + at], to=TensorProto.FLOAT16),
            node("MatMul", ["half" + at, router], [logits]),
        ]
        nodes.append(node("Cast", [logits], [scores], to=TensorProto.FLOAT))
        return nodes, {router: t["router"].astype(np.float16)}, scores, ""
    if form == "nbits":
        attributes = {"K": s.hidden, "N": s.n_experts, "bits": 4, "block_size": 32}
        # On the grid of 4 bits: 15 steps of each block of a column.
        blocks = t["router"].T.reshape(s.n_experts, -1, 32)
        steps = np.abs(blocks).max(-1, keepdims=True) / 7
        q = (np.rint(blocks / steps) + 8).astype(np.uint8)
        packed = q[..., 0::2] | q[..., 1::2] << 4
        nodes = [node("MatMulNBits", [n, "q" + at, "s" + at], [logits], domain="com.microsoft", **attributes)]
        return nodes, {"q" + at: packed, "s" + at: steps.astype(np.float32).reshape(-1)}, logits, ""
    nodes = [node("MatMul", [n, router], [logits])]
    if form == "matmul_add":
        return [*nodes, node("Add", [logits, bias], [scores])], constants | {bias: t["bias"]}, scores, ""
    if form == "softmax_weights":
        return [*nodes, node("Softmax", [logits], [weights], axis=-1)], constants, logits, weights
    if form == "groups":
        masked = {"mask" + at: np.arange(s.n_experts) % 4 != 3, "low" + at: np.float32(-1e30)}
        return [*nodes, node("Where", ["mask" + at, logits, "low" + at], [scores])], constants | masked, scores, ""
    if form == "sigmoid_bias":
        nodes += [node("Sigmoid", [logits], [weights]), node("Add", [weights, bias], [scores])]
        return nodes, constants | {bias: t["bias"]}, scores, weights
    if form == "computed":
        return [*nodes, node("Mul", [logits, logits], [scores])], constants, scores, ""
    # scattered: the k best by softmax (zeros elsewhere), or the logarithm of a written-out sigmoid (-10000 elsewhere)
    is_log = form == "scattered_logs"
    constants |= {"k" + at: np.array([s.k]), "one" + at: np.float32(1), "least" + at: np.float32(-1e4 * is_log)}
    if is_log:
        nodes += [node("Neg", [logits], ["neg" + at]), node("Exp", ["neg" + at], ["exp" + at])]
        nodes += [node("Add", ["exp" + at, "one" + at], ["sum" + at]), node("Reciprocal", ["sum" + at], ["p" + at])]
    else:
        nodes.append(node("Softmax", [logits], ["p" + at], axis=-1))
    nodes.append(node("TopK", ["p" + at, "k" + at], ["best" + at, "idx" + at], axis=-1))
    if is_log:
        nodes.append(node("Log", ["best" + at], ["value" + at]))
    nodes += [node("Shape", [logits], ["shape" + at]), node("Expand", ["least" + at, "shape" + at], ["base" + at])]
    value = ("value" if is_log else "best") + at
    nodes.append(node("ScatterElements", ["base" + at, "idx" + at, value], [scores], axis=-1))
    return nodes, constants, scores, "" if is_log else scores


def write_routed(path: Path, form: str, shape: Shape, *, seed: int = 0) -> RoutedModel:
    """Write a model whose experts lie in `path`.data; what is below 1 KiB lies in the file itself."""
    s = shape
    rng = np.random.default_rng(seed)
    nodes: list[Any] = []
    constants: dict[str, Array] = {}
    tensors = []
    x = "x"
    for layer in range(s.n_layers):
        t = _layer_tensors(s, rng)
        last = "s2" if s.is_quantized else "w2"
        t[last] = t[last] * np.float32(_STEP)
        t["norm"] = rng.uniform(0.5, 1.5, s.hidden).astype(np.float32)
        t["router"] = rng.standard_normal((s.hidden, s.n_experts), dtype=np.float32) / np.float32(s.hidden**0.5)
        # As large as what it is added to: sigmoids lie within 0.2 of their mean, logits within 1.
        scale = 0.2 if form == "sigmoid_bias" else 1.0
        t["bias"] = (scale * rng.standard_normal(s.n_experts)).astype(np.float32)
        tensors.append(t)
        constants |= {f"{name}.{layer}": t[name] for name in ("w1", "s1", "w2", "s2", "norm") if name in t}
        nodes.append(
            helper.make_node(
                "SimplifiedLayerNormalization", [x, f"norm.{layer}"], [f"n.{layer}"], axis=-1, epsilon=1e-6
            )
        )
        routed, of_router, scores, weights = _route(form, layer, s, t)
        nodes += routed
        constants |= of_router
        given = ("w1", "s1", "", "w2", "s2") if s.is_quantized else ("w1", "", "w2")
        names = [f"n.{layer}", scores, *(name and f"{name}.{layer}" for name in given)]
        settings: dict[str, Any] = {"k": s.k, "activation_type": "swiglu", "swiglu_fusion": 1}
        settings |= {"normalize_routing_weights": 1}
        if s.is_quantized:
            names += [""] * 7 + [weights] if weights else []
            settings |= {"block_size": s.block, "expert_weight_bits": s.bits}
        op = "QMoE" if s.is_quantized else "MoE"
        nodes.append(helper.make_node(op, names, [f"moe.{layer}"], f"moe{layer}", domain="com.microsoft", **settings))
        nodes.append(helper.make_node("Add", [x, f"moe.{layer}"], [f"y.{layer}"]))
        x = f"y.{layer}"
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["tokens", s.hidden]) for n in ("x", x)]
    initializers = [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()]
    graph = helper.make_graph(nodes, "moe", values[:1], values[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save_model(proto, path, save_as_external_data=True, location=path.name + ".data", size_threshold=1024)
    return RoutedModel(path, s, tensors)
