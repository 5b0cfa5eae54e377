# SPDX-License-Identifier: MIT
"""An OLMoE-shaped ONNX model for `benchmarks.onnx`: real shapes, random weights, no attention.

    hidden = embedding[ids];  per layer:  hidden += QMoE(norm(hidden), router(norm(hidden)))

One token runs all its MoE layers and nothing else worth time, so what is compared is experts. Embeddings are an AR(1)
walk along the vocabulary and layers add little to them, so the token decides the routing in every layer, as in
`benchmarks.synthetic`, whose `local_tokens` and `uniform_tokens` fit here as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT_BYTES = 4096
DATA = "experts.bin"
ACCURACY_LEVELS = (0, 4)
"""0: activations stay 32-bit floats; 4: stock's kernels quantize them to 8 bits, which is faster."""
_LOCALITY = 0.88  # correlation of embeddings of neighbours, as in benchmarks.synthetic
_CODE_STD = 4.32  # of -7...7, uniform
Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class MoeShape:
    """Sizes of the model; the defaults are one layer of OLMoE-1B-7B, six times."""

    n_layers: int = 6
    n_experts: int = 64
    n_used: int = 8
    hidden: int = 2048
    inter: int = 1024
    block: int = 32
    n_vocab: int = 4096
    branch_gain: float = 0.5  # of what a layer adds: little beside the embedding

    @property
    def expert_bank_bytes(self) -> int:
        """Weights (4 bits) and scales (32 bits a block) of all experts."""
        n_weights = self.n_layers * self.n_experts * 3 * self.hidden * self.inter
        return n_weights // 2 + n_weights // self.block * 4

    @property
    def cycle_bytes(self) -> int:
        """Bytes of the experts that one token uses."""
        return self.expert_bank_bytes // self.n_experts * self.n_used


@dataclasses.dataclass(frozen=True)
class _Tensor:
    name: str
    data_type: int
    dims: tuple[int, ...]
    offset: int
    n_bytes: int
    parts: Iterator[Array]


class _Layout:
    """Tensors of the data file, one after the other, each at a page."""

    def __init__(self) -> None:
        self.tensors: list[_Tensor] = []
        self._end = 0

    def add(self, name: str, dtype: npt.DTypeLike, dims: tuple[int, ...], parts: Iterator[Array]) -> str:
        from onnx import helper

        offset = -(-self._end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        n_bytes = math.prod(dims) * np.dtype(dtype).itemsize
        data_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.tensors.append(_Tensor(name, data_type, dims, offset, n_bytes, parts))
        self._end = offset + n_bytes
        return name


def _embedding(shape: MoeShape, rng: np.random.Generator) -> Iterator[Array]:
    row = rng.standard_normal(shape.hidden)
    for _ in range(shape.n_vocab):
        yield row.astype(np.float32)
        row = _LOCALITY * row + math.sqrt(1 - _LOCALITY**2) * rng.standard_normal(shape.hidden)


def _router(shape: MoeShape, rng: np.random.Generator) -> Iterator[Array]:
    yield rng.standard_normal((shape.hidden, shape.n_experts), dtype=np.float32) * (2 / math.sqrt(shape.hidden))


def _codes(shape: MoeShape, n_bytes: int, rng: np.random.Generator) -> Iterator[Array]:
    # Both nibbles in 1...15, -7...7 with the zero point: a mean of -0.5 would add up along every row.
    pairs = np.array([low | high << 4 for high in range(1, 16) for low in range(1, 16)], np.uint8)
    for _ in range(shape.n_experts):
        yield pairs[rng.integers(0, len(pairs), n_bytes, np.uint8)]


def _scales(shape: MoeShape, n_blocks: int, n_columns: int, gain: float, rng: np.random.Generator) -> Iterator[Array]:
    unit = gain / (_CODE_STD * math.sqrt(n_columns))
    for _ in range(shape.n_experts):
        yield (unit * rng.uniform(0.7, 1.3, n_blocks)).astype(np.float32)


def _graph(shape: MoeShape, layout: _Layout, accuracy_level: int) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    initializers = [numpy_helper.from_array(np.ones(shape.hidden, np.float32), "ones")]
    for t in layout.tensors:
        proto = TensorProto(name=t.name, data_type=t.data_type, dims=t.dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", DATA), ("offset", t.offset), ("length", t.n_bytes)):
            proto.external_data.add(key=key, value=str(value))
        initializers.append(proto)
    nodes = [helper.make_node("Gather", ["embedding", "ids"], ["h0"], "embed")]
    settings = {
        "k": shape.n_used,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "expert_weight_bits": 4,
        "block_size": shape.block,
        "normalize_routing_weights": 0,
        "accuracy_level": accuracy_level,
    }
    for i in range(shape.n_layers):
        n, logits, mixing, q = (f"{name}{i}" for name in ("norm", "logits", "mixing", "moe"))
        weights = [f"{name}.{i}" if name else "" for name in ("w1", "s1", "", "w2", "s2", "")]
        nodes += [
            helper.make_node("SimplifiedLayerNormalization", [f"h{i}", "ones"], [n], n, epsilon=1e-5),
            helper.make_node("MatMul", [n, f"router.{i}"], [logits], logits),
            helper.make_node("Softmax", [logits], [mixing], mixing, axis=-1),
            helper.make_node(
                "QMoE", [n, logits, *weights, *[""] * 6, mixing], [q], q, domain="com.microsoft", **settings
            ),
            helper.make_node("Add", [f"h{i}", q], [f"h{i + 1}"], f"add{i}"),
        ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["tokens"])
    out = helper.make_tensor_value_info(f"h{shape.n_layers}", TensorProto.FLOAT, ["tokens", shape.hidden])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "olmoe_shape", [ids], [out], initializers)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def model_name(accuracy_level: int) -> str:
    """The .onnx file whose QMoE nodes ask for that accuracy level."""
    return f"accuracy-{accuracy_level}.onnx"


def write_model(folder: Path, shape: MoeShape, seed: int = 0) -> None:
    """Write `experts.bin`, an expert at a time, and beside it one .onnx file for each accuracy level."""
    rng = np.random.default_rng(seed)
    layout = _Layout()
    layout.add("embedding", np.float32, (shape.n_vocab, shape.hidden), _embedding(shape, rng))
    e, rows, hidden, inter = shape.n_experts, 2 * shape.inter, shape.hidden, shape.inter
    for i in range(shape.n_layers):
        layout.add(f"router.{i}", np.float32, (hidden, e), _router(shape, rng))
        for name, n, k, gain in (("1", rows, hidden, 1.0), ("2", hidden, inter, shape.branch_gain)):
            layout.add(f"w{name}.{i}", np.uint8, (e, n, k // 2), _codes(shape, n * k // 2, rng))
            n_blocks = n * k // shape.block
            layout.add(f"s{name}.{i}", np.float32, (e, n, k // shape.block), _scales(shape, n_blocks, k, gain, rng))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / DATA).open("wb") as file:
        for t in layout.tensors:
            file.seek(t.offset)
            for part in t.parts:
                file.write(part.tobytes())
            assert file.tell() == t.offset + t.n_bytes
    for level in ACCURACY_LEVELS:
        (folder / model_name(level)).write_bytes(_graph(shape, layout, level).SerializeToString())
