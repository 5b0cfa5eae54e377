# SPDX-License-Identifier: MIT
"""QMoE and MoE models written with onnx.helper, and both in numpy's float64, from the operators' documentation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]


def stock(path: Path) -> Any:
    """Stock ONNX Runtime with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclasses.dataclass(frozen=True)
class Shape:
    """A stack of QMoE (or MoE) nodes: y = x + QMoE(x, router) for each layer."""

    n_layers: int = 1
    n_experts: int = 8
    k: int = 2
    hidden: int = 64
    inter: int = 96
    bits: int = 4
    block: int = 32  # 0: one scale for a row
    has_zero_points: bool = False
    has_bias: bool = False
    activation: str = "swiglu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    has_router_weights: bool = False
    normalizes: int = 1
    accuracy_level: int = 0
    is_quantized: bool = True  # QMoE; else MoE
    is_half: bool = False  # float16: activations, router, biases; weights of MoE
    has_half_scales: bool = False
    has_residual: bool = True  # else y = QMoE(x, router)

    @property
    def dtype(self) -> type[np.floating[Any]]:
        return np.float16 if self.is_half else np.float32

    @property
    def fc1_rows(self) -> int:
        return self.inter * (2 if self.activation == "swiglu" else 1)


@dataclasses.dataclass(frozen=True)
class Model:
    path: Path
    shape: Shape
    tensors: list[dict[str, Array]]  # [layer] by the name of the input

    def feed(self, n_tokens: int, seed: int = 0, rank: int = 2) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        s = self.shape
        x = rng.standard_normal((n_tokens, s.hidden), dtype=np.float32).astype(s.dtype)
        feed = {"x": x if rank == 2 else x[None]}
        for layer in range(s.n_layers):
            feed[f"router{layer}"] = rng.standard_normal((n_tokens, s.n_experts), dtype=np.float32).astype(s.dtype)
            if s.has_router_weights:
                feed[f"mixing{layer}"] = rng.random((n_tokens, s.n_experts), dtype=np.float32).astype(s.dtype)
        return feed

    def reference(self, feed: dict[str, Array]) -> Array:
        x = feed["x"].astype(np.float64)
        for layer, t in enumerate(self.tensors):
            scores, mixing = feed[f"router{layer}"], feed.get(f"mixing{layer}")
            y = _qmoe(self.shape, t, x.reshape(-1, self.shape.hidden), scores, mixing).reshape(x.shape)
            x = x + y if self.shape.has_residual else y
        return x


def _codes(packed: Array, bits: int) -> Array:
    """[.., n] bytes -> [.., n * 8 / bits] codes; those of the lowest bits come first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1).astype(np.int64)


def _dequantize(s: Shape, w: Array, scales: Array, zero_points: Array | None) -> Array:
    """[E, N, K] float64."""
    e, n, _ = w.shape
    q = _codes(w, s.bits)
    n_cols = q.shape[2]
    n_blocks = n_cols // s.block if s.block else 1
    if zero_points is None:
        zero = np.full((e, n, n_blocks), 1 << (s.bits - 1))
    else:
        codes = _codes(zero_points, s.bits)
        zero = codes[:, :, :n_blocks] if s.block else codes[:, :n, None]
    blocks = q.reshape(e, n, n_blocks, -1).astype(np.float64) - zero[..., None]
    return (blocks * scales.reshape(e, n, n_blocks, 1).astype(np.float64)).reshape(e, n, n_cols)


def _activations(s: Shape, x: Array) -> Array:
    """[columns] -> as products take them: accuracy_level 4 rounds to 8 bits, a float32 scale for 32 columns (or 16)."""
    if s.accuracy_level != 4:
        return x
    group = 16 if s.block == 16 else 32
    padded = np.pad(x, (0, -len(x) % group)).astype(np.float32).reshape(-1, group)
    largest = np.abs(padded).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    scale = (largest / np.float32(127)).astype(np.float64)
    return (np.rint(padded * inverse).astype(np.float64) * scale).reshape(-1)[: len(x)]


def _activate(s: Shape, h: Array) -> Array:
    if s.activation == "relu":
        return np.maximum(h, 0)
    if s.activation == "identity":
        return h
    if s.activation == "gelu":
        return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    if s.activation == "silu":
        return h / (1 + np.exp(-h))
    limit = np.inf if s.limit is None else s.limit
    gate, up = np.minimum(h[:, 0::2], limit), np.clip(h[:, 1::2], -limit, limit)
    return gate / (1 + np.exp(-s.alpha * gate)) * (up + s.beta)


def _qmoe(s: Shape, t: dict[str, Array], x: Array, scores: Array, mixing: Array | None) -> Array:
    if s.is_quantized:
        w1 = _dequantize(s, t["w1"], t["s1"], t.get("z1"))
        w2 = _dequantize(s, t["w2"], t["s2"], t.get("z2"))
    else:
        w1, w2 = t["w1"].astype(np.float64), t["w2"].astype(np.float64)
    out = np.zeros((x.shape[0], s.hidden))
    for token in range(x.shape[0]):
        chosen = np.argsort(-scores[token].astype(np.float64), kind="stable")[: s.k]
        if mixing is None:
            p = np.exp(scores[token].astype(np.float64) - scores[token].max())
            p = p[chosen] / (p[chosen].sum() if s.is_quantized or s.normalizes else p.sum())
        else:
            p = mixing[token, chosen].astype(np.float64)
            p = p / p.sum() if s.normalizes else p
        for weight, expert in zip(p, chosen, strict=True):
            h = w1[expert] @ _activations(s, x[token]) + (t["b1"][expert] if s.has_bias else 0)
            y = w2[expert] @ _activations(s, _activate(s, h[None])[0]) + (t["b2"][expert] if s.has_bias else 0)
            out[token] += weight * y
    return out


def _layer_tensors(s: Shape, rng: np.random.Generator) -> dict[str, Array]:
    t: dict[str, Array] = {}
    for i, (n, k) in enumerate(((s.fc1_rows, s.hidden), (s.hidden, s.inter)), start=1):
        n_blocks = k // s.block if s.block else 1
        if s.has_bias:
            t[f"b{i}"] = rng.standard_normal((s.n_experts, n)).astype(s.dtype)
        if not s.is_quantized:
            t[f"w{i}"] = (rng.standard_normal((s.n_experts, n, k)) * k**-0.5).astype(s.dtype)
            continue
        t[f"w{i}"] = rng.integers(0, 256, (s.n_experts, n, k * s.bits // 8), dtype=np.uint8)
        scales = rng.uniform(0.5, 1.5, (s.n_experts, n, n_blocks)).astype(np.float32) / (2.0**s.bits * k**0.5)
        t[f"s{i}"] = scales * 2 if s.block else (scales * 2)[:, :, 0]
        if s.has_zero_points:
            size = (n, (n_blocks * s.bits + 7) // 8) if s.block else ((n * s.bits + 7) // 8,)
            t[f"z{i}"] = rng.integers(0, 256, (s.n_experts, *size), dtype=np.uint8)
        if s.has_half_scales:
            t[f"s{i}"] = t[f"s{i}"].astype(np.float16)
    return t


def write_model(
    path: Path, shape: Shape, *, seed: int = 0, size_threshold: int = 0, attributes: dict[str, Any] | None = None
) -> Model:
    """Write a model whose tensors of at least `size_threshold` bytes lie in `path`.data, at unaligned offsets."""
    s = shape
    rng = np.random.default_rng(seed)
    tensors = [_layer_tensors(s, rng) for _ in range(s.n_layers)]
    element_type = TensorProto.FLOAT16 if s.is_half else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", element_type, None)]
    nodes, initializers = [], []
    x = "x"
    for layer, t in enumerate(tensors):
        given = [f"router{layer}"] + ([f"mixing{layer}"] if s.has_router_weights else [])
        inputs += [helper.make_tensor_value_info(n, element_type, ["tokens", s.n_experts]) for n in given]
        initializers += [numpy_helper.from_array(a, f"{name}.{layer}") for name, a in t.items()]

        def use(name: str, layer: int = layer, t: dict[str, Array] = t) -> str:
            return f"{name}.{layer}" if name in t else ""

        names = [x, f"router{layer}", *map(use, ("w1", "s1", "b1", "w2", "s2", "b2")), "", "", "", use("z1"), use("z2")]
        if not s.is_quantized:
            names = [x, f"router{layer}", *map(use, ("w1", "b1", "w2", "b2"))]
        if s.has_router_weights:
            names += ["", f"mixing{layer}"]
        settings: dict[str, Any] = {
            "k": s.k,
            "activation_type": s.activation,
            "normalize_routing_weights": s.normalizes,
        }
        if s.is_quantized:
            settings["expert_weight_bits"] = s.bits
        if s.accuracy_level:
            settings["accuracy_level"] = s.accuracy_level
        if s.block and s.is_quantized:
            settings["block_size"] = s.block
        if s.activation == "swiglu":
            settings |= {"swiglu_fusion": 1, "activation_alpha": s.alpha, "activation_beta": s.beta}
            if s.limit is not None:
                settings["swiglu_limit"] = s.limit
        settings |= attributes or {}
        op, q = "QMoE" if s.is_quantized else "MoE", f"q{layer}" if s.has_residual else f"y{layer}"
        nodes.append(helper.make_node(op, names, [q], f"moe{layer}", domain="com.microsoft", **settings))
        if s.has_residual:
            nodes.append(helper.make_node("Add", [x, q], [f"y{layer}"], f"add{layer}"))
        x = f"y{layer}"
    graph = helper.make_graph(
        nodes, "moe", inputs, [helper.make_tensor_value_info(x, element_type, None)], initializers
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save_model(
        helper.make_model(graph, opset_imports=opsets, ir_version=10),
        path,
        save_as_external_data=True,
        location=path.name + ".data",
        size_threshold=size_threshold,
    )
    return Model(path, s, tensors)


def relative_error(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())
