# SPDX-License-Identifier: MIT
"""From a traced module to an ONNX graph: nodes that stand for blocks become QMoE nodes, tensors get their places.

Needs onnx_ir, which comes with torch's exporter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir
from onnx import helper

from edgemoe.errors import ConversionError

from ..hf.checkpoint import Floats
from .blocks import Grid
from .graph import ALIGNMENT_BYTES, FLOAT, MICROSOFT, MICROSOFT_OPSET, Graph, Job, Place, Writer
from .module_blocks import DOMAIN, Found
from .moe_block import ACTIVATIONS
from .packing import Matrices, store_experts, store_float_experts


def place_tensors(traced: Any, blocks: list[Found], grid: Grid | None) -> tuple[Any, Graph]:
    """Decide the whole result.

    Args:
        traced: `onnx_ir.Model` with a node of `DOMAIN` for every call of a block; large constants are taken out of it.
        blocks: what these nodes stand for.
        grid: how experts are quantized; None: they stay float32, in MoE nodes.

    Returns:
        the `ModelProto`, and a `Graph` whose jobs fill the files of tensors.

    Raises:
        ConversionError: a block is called where no execution provider can see it.
    """
    graph = Graph()
    _take_constants(traced, graph)
    model = onnx_ir.to_proto(traced)
    _strip(model)
    names: dict[int, dict[str, str]] = {}
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        i = _block_of(node)
        if i not in names:
            names[i] = _store(graph, blocks[i], grid)
        _rewrite(node, blocks[i], names[i], grid)
    if hidden := [node for node in _inner_nodes(model) if node.domain == DOMAIN]:
        name = blocks[_block_of(hidden[0])].name
        raise ConversionError(
            f"cannot export {name}: it is called inside of torch.cond, a loop or another function, where experts "
            "cannot be streamed; call it always, and choose between results"
        )
    model.graph.initializer.extend(graph.initializers)
    _check_names(model)
    kept = [opset for opset in model.opset_import if opset.domain not in (DOMAIN, MICROSOFT)]
    del model.opset_import[:]
    model.opset_import.extend([*kept, helper.make_opsetid(MICROSOFT, MICROSOFT_OPSET)])
    return model, graph


def _take_constants(traced: Any, graph: Graph) -> None:
    """Tensors from a page on get places in a file; those that nothing uses, as experts' floats, are dropped."""
    outputs = {id(value) for value in traced.graph.outputs}
    for name, value in list(traced.graph.initializers.items()):
        tensor = value.const_value
        if not value.uses() and id(value) not in outputs:
            del traced.graph.initializers[name]
        elif tensor.nbytes >= ALIGNMENT_BYTES:
            place = graph.stored(name, int(tensor.dtype), [int(n) for n in tensor.shape])
            graph.jobs.append(Job(place.n_bytes, _written(place, tensor)))
            del traced.graph.initializers[name]


def _written(place: Place, tensor: Any) -> Callable[[Writer], None]:
    return lambda writer: writer.write(place, 0, np.ascontiguousarray(tensor.numpy()))


def _strip(model: Any) -> None:
    """Remove torch's notes, which have stack traces with paths of this machine in them."""
    del model.metadata_props[:]
    model.graph.ClearField("doc_string")
    del model.graph.metadata_props[:]
    for item in (*model.graph.node, *_inner_nodes(model), *model.graph.value_info, *model.graph.input):
        item.ClearField("doc_string")
        del item.metadata_props[:]
    for item in (*model.graph.output, *model.graph.initializer, *model.functions):
        item.ClearField("doc_string")
        del item.metadata_props[:]


def _inner_nodes(model: Any) -> Iterator[Any]:
    """Nodes of functions and of branches and bodies, at any depth."""

    def inside(nodes: Any) -> Iterator[Any]:
        for node in nodes:
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    yield from graph.node
                    yield from inside(graph.node)

    yield from inside(model.graph.node)
    for function in model.functions:
        yield from function.node
        yield from inside(function.node)


def _block_of(node: Any) -> int:
    return int(next(attribute.i for attribute in node.attribute if attribute.name == "block"))


def _store(graph: Graph, block: Found, grid: Grid | None) -> dict[str, str]:
    """Places of a block's experts. Rows and columns are filled up to whole blocks with zeros, which adds nothing: to a
    column of zeros it does not matter what it is multiplied with."""
    moe = block.moe
    multiple = grid.block if grid else 1
    hidden, inter = (size + -size % multiple for size in (moe.hidden, moe.inter))
    rows = 2 * inter if moe.is_gated else inter
    matrices: Matrices = {
        "fc1": (rows, hidden, lambda expert: _filled(moe.fc1(expert), rows, hidden)),
        "fc2": (hidden, inter, lambda expert: _filled(moe.fc2(expert), hidden, inter)),
    }
    if grid is None:
        names = store_float_experts(graph, block.name, moe.n_experts, matrices)
    else:
        names = store_experts(graph, block.name, moe.n_experts, matrices, grid)
    for fc, biases, size in (("fc1", moe.fc1_bias(), rows), ("fc2", moe.fc2_bias(), hidden)):
        if biases is not None:
            names[f"{fc}_bias"] = name = f"{block.name}.experts.{fc}_bias"
            values = _filled(biases, moe.n_experts, size)
            place = graph.stored(name, FLOAT, values.shape)
            graph.jobs.append(Job(place.n_bytes, _biases_written(place, values)))
    return names


def _biases_written(place: Place, values: Floats) -> Callable[[Writer], None]:
    return lambda writer: writer.write(place, 0, values)


def _filled(values: Floats, n_rows: int, n_columns: int) -> Floats:
    missing = [(0, n_rows - values.shape[0]), (0, n_columns - values.shape[1])]
    return np.ascontiguousarray(np.pad(values, missing))


def _rewrite(node: Any, block: Found, names: dict[str, str], grid: Grid | None) -> None:
    moe = block.moe
    x, scores, *weights = node.input
    has_weights = any(attribute.name == "has_weights" and attribute.i for attribute in node.attribute)
    attributes: dict[str, Any] = {
        "k": moe.k,
        "activation_type": ACTIVATIONS[moe.activation],
        "normalize_routing_weights": int(moe.normalizes or not has_weights),
    }
    if grid is None:
        inputs = [x, scores, names["fc1"], names.get("fc1_bias", ""), names["fc2"], names.get("fc2_bias", "")]
    else:
        inputs = [x, scores, names["fc1_q"], names["fc1_scales"], names.get("fc1_bias", "")]
        inputs += [names["fc2_q"], names["fc2_scales"], names.get("fc2_bias", "")]
        if weights:
            inputs += [""] * 6 + weights
        attributes |= {"expert_weight_bits": grid.bits, "block_size": grid.block}
    if moe.is_gated:
        attributes |= {"swiglu_fusion": 1, "activation_alpha": moe.swiglu_alpha, "activation_beta": moe.swiglu_beta}
        if moe.swiglu_limit is not None:
            attributes["swiglu_limit"] = float(moe.swiglu_limit)
    op_type = "MoE" if grid is None else "QMoE"
    name = f"{block.name}.{node.name}"
    node.CopyFrom(helper.make_node(op_type, inputs, list(node.output), name, domain=MICROSOFT, **attributes))


def _check_names(model: Any) -> None:
    seen: set[str] = set()
    for tensor in model.graph.initializer:
        if tensor.name in seen:
            raise ConversionError(
                f"cannot export: two tensors have the name {tensor.name}; rename the parameter of the module"
            )
        seen.add(tensor.name)
