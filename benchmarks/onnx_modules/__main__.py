# SPDX-License-Identifier: MIT
"""Exports the five modules and runs them: bytes, and how far int4 and int8 experts are from torch's float32.

    python -m benchmarks.onnx_modules

Weights are random: errors say that a module was exported rightly, not what quantization costs a trained one. Prints a
table, then one JSON line; exit 1 when stock ONNX Runtime and edgemoe differ by more than 1e-5 on the same int4 file.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks import session
from edgemoe.converters.onnx import export
from edgemoe.formats.onnx_model import read_model
from edgemoe.onnx import InferenceSession

NAMES = ("vision_transformer", "time_series", "robot_policy", "pde_operator", "diffusion")
BATCH = 4
TOLERANCE = 1e-5
Record = dict[str, Any]


def measure(name: str, folder: Path) -> Record:
    """Export a module with int4 and int8 experts, and run both."""
    example = importlib.import_module(f"benchmarks.onnx_modules.{name}")
    module, inputs = example.make(), example.inputs(BATCH)
    with torch.no_grad():
        output = module(*inputs)
    expected = (output[0] if isinstance(output, tuple) else output).numpy()
    record: Record = {"name": name, "parameters": sum(p.numel() for p in module.parameters())}
    for quant in ("int4", "int8"):
        out = folder / f"{name}-{quant}"
        done = export(module, example.inputs(2), out, moe=example.MOE, dynamic=example.DYNAMIC, quant=quant)
        ours = InferenceSession(done.path, memory="16GiB")
        feed = {value.name: x.numpy() for value, x in zip(ours.get_inputs(), inputs, strict=True)}
        found = ours.run(None, feed)[0]
        record[f"{quant}_bytes"] = sum(path.stat().st_size for path in out.iterdir())
        record[f"{quant}_expert_bytes"] = done.expert_bytes
        record[f"{quant}_error"] = _error(found, expected)
        if quant == "int4":
            stock = onnxruntime.InferenceSession(done.path).run(None, feed)[0]
            record["ours_to_stock"] = _error(found, stock)
            record["nodes"] = len(read_model(done.path).moe_nodes)
            record["mapping_error"] = done.mapping_error
    return record


def _error(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main() -> int:
    """Run all modules; 0, or 1 if edgemoe and stock differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_modules", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args()
    onnxruntime.set_default_logger_severity(3)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(name, Path(folder)) for name in NAMES]
    print(f"{'module':20}{'parameters':>12}{'QMoE':>6}{'int4 KiB':>10}{'int8 KiB':>10}", end="")
    print(f"{'int4 error':>12}{'int8 error':>12}{'ours to stock':>15}")
    for run in runs:
        print(f"{run['name']:20}{run['parameters']:>12}{run['nodes']:>6}", end="")
        print(f"{run['int4_bytes'] / 1024:>10.0f}{run['int8_bytes'] / 1024:>10.0f}", end="")
        print(f"{run['int4_error']:>12.1e}{run['int8_error']:>12.1e}{run['ours_to_stock']:>15.1e}")
    session.finish("onnx_modules", options, runs=runs)
    return int(any(run["ours_to_stock"] > TOLERANCE for run in runs))


if __name__ == "__main__":
    sys.exit(main())
