# SPDX-License-Identifier: MIT
"""From any PyTorch module with MoE blocks to a folder with a quantized ONNX model, its experts in a file of their own.

The module is traced by torch's exporter with one node for each block; weights of experts take no part in that. Then the
nodes become QMoE nodes, experts are quantized one by one, and all large tensors are written at pages of their files.
Stock ONNX Runtime runs the folder; `edgemoe.onnx` streams its experts.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.errors import ConversionError

from .blocks import BLOCKS, Grid

if TYPE_CHECKING:
    import torch

    from .module_blocks import Mappings

QUANTS: dict[str, int | None] = {"int4": 4, "int8": 8, "fp32": None}


@dataclasses.dataclass(frozen=True)
class ExportedModule:
    """What an export has written.

    Attributes:
        path: the .onnx file.
        n_blocks: MoE blocks; one that is called more than once has as many QMoE nodes, and one set of experts.
        expert_bytes, dense_bytes: lengths of `experts.bin` and of `model.onnx.data`.
        mapping_error: the largest difference between a block and what its `MoeBlock` says, with weights that are not
            quantized, relative to the largest element of the block's output.
    """

    path: Path
    n_blocks: int
    expert_bytes: int
    dense_bytes: int
    mapping_error: float


def export(
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    out: Path | str,
    *,
    moe: Mappings,
    quant: str = "int4",
    block: int = 32,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    output_names: Sequence[str] | None = None,
    force: bool = False,
) -> ExportedModule:
    """Write the folder `out`: `model.onnx`, `experts.bin`, `model.onnx.data`.

    Args:
        module: in eval mode and float32; all but its MoE blocks has to be what torch.export takes.
        inputs: positional inputs of an example; axes that are dynamic have 2 elements or more in it. Blocks are
            compared with their `MoeBlock` on this example, so it should reach what matters.
        out: the folder; complete and on the disk, or not there.
        moe: which submodules are MoE blocks and what they compute. A key is a class, a pattern of names in
            `module.named_modules()` (`blocks.*.moe`), or a function of a name and a module that says whether; a value
            is a function from the submodule to a `MoeBlock`.
        quant: `int4`, `int8` or `fp32`: experts' weights. All others stay as they are. With `fp32`, experts are MoE
            nodes, which have no input for weights: these have to be the softmax of the scores, normalized or not.
        block: columns that share a scale of `int4` and `int8`: 32, 64 or 128. Experts whose widths are no multiple are
            filled up with zeros.
        dynamic: by the input's name, names of axes that may have any size. None: the first axis of every input is
            `batch`.
        output_names: names of the outputs; torch's if None.
        force: replace `out` if it exists.

    Raises:
        ConversionError: `moe` names no block or describes one wrongly, QMoE cannot express a block, torch.export
            refuses the module, something has the wrong type, a weight is not finite, a package is missing, `out`
            exists, or the disk is full or fails.
    """
    for field, value, known in (("quant", quant, tuple(QUANTS)), ("block", block, BLOCKS)):
        if value not in known:
            raise ConversionError(f"cannot export with {field} {value}: expected one of {', '.join(map(str, known))}")
    out = Path(out)
    if out.exists() and not (force and out.is_dir()):
        todo = "name another folder" + (", or give force=True" if out.is_dir() else "")
        raise ConversionError(f"cannot write the model: {out} exists; {todo}")
    try:
        import onnxscript  # noqa: F401  # torch's exporter needs it

        from . import module_blocks, module_graph
    except ImportError as error:
        raise ConversionError(f"cannot export a module: {error}; pip install 'edgemoe[modules]'") from error
    from .graph import DENSE, EXPERTS
    from .out_folder import OutFolder

    _check_module(module, inputs)
    names = _input_names(module, len(inputs))
    axes = _axes(dynamic, names, inputs)
    bits = QUANTS[quant]
    grid = Grid(bits, block) if bits else None
    found = module_blocks.find_blocks(module, moe)
    are_weights_input = grid is not None
    mapping_error = module_blocks.check_blocks(module, found, tuple(inputs), are_weights_input=are_weights_input)
    with module_blocks.traced_as_nodes(found, grid.block if grid else 1, are_weights_input=are_weights_input):
        traced = _trace(module, tuple(inputs), names, axes, output_names)
    model, graph = module_graph.place_tensors(traced, found, grid)
    data = model.SerializeToString(deterministic=True)
    with OutFolder(out, graph.file_bytes, sum(graph.file_bytes.values()) + len(data)) as folder:
        for job in graph.jobs:
            job.run(folder)
        folder.add("model.onnx", data)
        folder.commit()
    return ExportedModule(
        out / "model.onnx",
        len(found),
        graph.file_bytes.get(EXPERTS, 0),
        graph.file_bytes.get(DENSE, 0),
        mapping_error,
    )


def _check_module(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise ConversionError(f"cannot export a {type(module).__name__}: expected a torch.nn.Module")
    if isinstance(inputs, torch.Tensor) or not all(isinstance(value, torch.Tensor) for value in inputs):
        raise ConversionError(
            f"cannot export {type(module).__name__}: inputs have to be a sequence of tensors; bind all else in a "
            "module around it"
        )
    if any(child.training for child in module.modules()):
        raise ConversionError(
            f"cannot export {type(module).__name__}: it is in training mode, where dropout and noise differ from run "
            "to run; call module.eval()"
        )


def _input_names(module: torch.nn.Module, n_inputs: int) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in positional]
    if len(names) < n_inputs:
        raise ConversionError(
            f"cannot export {type(module).__name__}: forward names {len(names)} inputs ({', '.join(names)}), found "
            f"{n_inputs}; give as many, or name them in a module around it"
        )
    return names[:n_inputs]


def _axes(
    dynamic: Mapping[str, Mapping[int, str]] | None, names: list[str], inputs: Sequence[torch.Tensor]
) -> dict[str, dict[int, str]]:
    """Dynamic axes of each input."""
    if dynamic is None:
        dynamic = {name: {0: "batch"} for name, value in zip(names, inputs, strict=True) if value.dim()}
    if unknown := sorted(set(dynamic) - set(names)):
        raise ConversionError(f"cannot export: dynamic names {unknown[0]}, expected inputs: {', '.join(names)}")
    for name, value in zip(names, inputs, strict=True):
        for axis, size_name in dynamic.get(name, {}).items():
            if not 0 <= axis < value.dim():
                raise ConversionError(f"cannot export: {name} has {value.dim()} axes, dynamic names axis {axis}")
            if value.shape[axis] < 2:
                raise ConversionError(
                    f"cannot export: axis {axis} of {name} ({size_name}) is dynamic and has {value.shape[axis]} "
                    "elements in the example, expected 2 or more, as torch.export takes 0 and 1 for constants"
                )
    return {name: dict(dynamic.get(name, {})) for name in names}


def _trace(
    module: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    names: list[str],
    axes: dict[str, dict[int, str]],
    output_names: Sequence[str] | None,
) -> Any:
    import torch

    with torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                inputs,
                input_names=names,
                output_names=output_names,
                dynamic_shapes=axes,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            cause = error
            while isinstance(cause.__cause__, Exception):
                cause = cause.__cause__
            raise ConversionError(
                f"cannot export {type(module).__name__}: torch.onnx.export refuses it: {type(cause).__name__}: "
                f"{str(cause).strip()}; write what depends on numbers of a tensor with torch.where or a mask, and make "
                "dynamic only what the module takes in any size"
            ) from error
    assert program is not None
    return program.model
