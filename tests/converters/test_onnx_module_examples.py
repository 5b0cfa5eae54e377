# SPDX-License-Identifier: MIT
"""The five modules of benchmarks/onnx_modules, exported, against torch: in stock ONNX Runtime and in edgemoe.

Weights of experts lie on the grid of int4 already, so torch computes with the dequantized weights. Relative errors are
max |a - b| / max |b|.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("torch", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra edgemoe[modules])")

from edgemoe import _native
from edgemoe.converters.onnx import export
from edgemoe.formats.onnx_model import read_model
from edgemoe.onnx import InferenceSession
from tests.converters.onnx_checkpoints import on_grid, relative_error

EXPERTS = {
    "vision_transformer": r"layers\.\d+\.ffn\.w[12]",
    "time_series": r"layers\.\d+\.ffn\.experts\.\d+\.\w+\.weight",
    "robot_policy": r"head\.skills\.\d+\.\d\.weight",
    "pde_operator": r"trunk\.regimes\.\d+\.w[12]",
    "diffusion": r"layers\.\d+\.ffn\.(high|low)\.\d\.weight",
}
"""Names of the matrices that are quantized."""

BLOCKS = {"vision_transformer": 2, "time_series": 2, "robot_policy": 1, "pde_operator": 1, "diffusion": 2}
EXAMPLE_BATCH, BATCHES = 2, (1, 2, 5)
TOLERANCE = 1e-5

Made = tuple[ModuleType, Any, Path]
Maker = Callable[[str], Made]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Exports an example, once: its file, the module with weights on the grid, the .onnx file."""
    folder = tmp_path_factory.mktemp("modules")
    made: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in made:
            example = importlib.import_module(f"benchmarks.onnx_modules.{name}")
            module = example.make()
            matrices = [p.data for key, p in module.named_parameters() if re.fullmatch(EXPERTS[name], key)]
            assert matrices
            for matrix in matrices:
                matrix.copy_(on_grid(matrix, 4))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done = export(
                    module,
                    example.inputs(EXAMPLE_BATCH),
                    folder / name,
                    moe=example.MOE,
                    dynamic=example.DYNAMIC,
                )
            assert done.n_blocks == BLOCKS[name]
            made[name] = (example, module, done.path)
        return made[name]

    return make


def options() -> Any:
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 3
    made.intra_op_num_threads = 1
    return made


def computed(session: Any, inputs: tuple[Any, ...]) -> list[Any]:
    names = [value.name for value in session.get_inputs()]
    found: list[Any] = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    return found


def expected(module: Any, inputs: tuple[Any, ...]) -> list[Any]:
    import torch

    with torch.no_grad():
        outputs = module(*inputs)
    return [value.numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]


@pytest.mark.parametrize("runtime", ["stock", "edgemoe"])
@pytest.mark.parametrize("name", EXPERTS)
def test_it_computes_what_torch_does_in_any_batch(exported: Maker, name: str, runtime: str) -> None:
    """Guards against: scores, weights, biases or activations that are not the module's; two levels of experts flattened
    wrongly; a step at the boundary that goes to the other expert; a batch or a length that is that of the example."""
    example, module, path = exported(name)
    if runtime == "stock":
        session: Any = onnxruntime.InferenceSession(path, options())
    else:
        session = InferenceSession(path, memory="16GiB", sess_options=options())
    for batch in BATCHES:
        inputs = example.inputs(batch)
        for ours, theirs in zip(computed(session, inputs), expected(module, inputs), strict=True):
            assert relative_error(ours, theirs) <= TOLERANCE
    if runtime == "edgemoe":
        assert session.stats().n_streamed_nodes == BLOCKS[name]
        assert session.stats().n_other_moe_nodes == 0


@pytest.mark.parametrize("name", EXPERTS)
def test_outputs_do_not_depend_on_what_is_resident(exported: Maker, name: str) -> None:
    """Guards against: experts of one layer or of one half of the matrices taken for others' when slots are few."""
    example, _, path = exported(name)
    inputs = example.inputs(5)
    everything = InferenceSession(path, memory="16GiB", sess_options=options())
    before = computed(everything, inputs)
    floor = InferenceSession(path, memory="16GiB", sess_options=options())
    _native.set_slots_bytes(floor._runtime, floor.plan.token_cycle_bytes)
    for ours, theirs in zip(computed(floor, inputs), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert floor.stats().slots_bytes < everything.stats().slots_bytes


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_lie_at_pages_of_a_file_of_their_own(exported: Maker, name: str) -> None:
    """Guards against: experts that cannot be read past the page cache; float experts that are kept beside them; paths
    of the machine that exported, which torch writes into the graph."""
    _, module, path = exported(name)
    model = read_model(path)
    packed = {n for node in model.moe_nodes for n in node.inputs if n.endswith(("_q", "_scales"))}
    assert len(packed) == 4 * BLOCKS[name]
    for tensor in model.tensors.values():
        if tensor.path is not None:
            assert tensor.offset % 4096 == 0
            assert (tensor.path.name == "experts.bin") == (tensor.name in packed)
    assert not [
        key for key, _ in module.named_parameters() if re.fullmatch(EXPERTS[name], key) and key in model.tensors
    ]
    assert b".py" not in path.read_bytes()


def test_steps_of_a_batch_go_to_both_experts(exported: Maker) -> None:
    """Guards against: an example that never reaches one of two experts, so that the other tests show nothing."""
    example, _, path = exported("diffusion")
    session = InferenceSession(path, memory="16GiB", sess_options=options())
    for batch in BATCHES[1:]:
        t = example.inputs(batch)[1]
        assert bool((t >= example.BOUNDARY).any()) and bool((t < example.BOUNDARY).any())
    computed(session, example.inputs(5))
    assert session.stats().expert_misses + session.stats().expert_hits == 2 * BLOCKS["diffusion"]
