# SPDX-License-Identifier: MIT
"""`edgemoe inspect`: what a model file holds."""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.console import find_model, print_json
from edgemoe.cli.onnx_folder import is_folder
from edgemoe.cli.options import json_option, model_argument
from edgemoe.sizes import format_size

if TYPE_CHECKING:
    from edgemoe.formats.gguf import GgufModel


@click.command()
@model_argument
@json_option
def inspect(model: Path | None, as_json: bool) -> None:
    """Show what a model file, or a folder with an ONNX model, holds."""
    if model is not None and is_folder(model):
        from edgemoe.onnx_folder import folder_facts, read_folder

        facts = folder_facts(read_folder(model))
    else:
        path = find_model(model)
        from edgemoe.formats.gguf import read_model

        facts = model_facts(read_model(path))
    if as_json:
        print_json(facts)
    else:
        click.echo(_table(facts))


def model_facts(model: GgufModel) -> dict[str, Any]:
    """What a model file holds; sizes are bytes, `expert_types` counts the expert tensors by quantization type."""
    n_parameters = sum(math.prod(tensor.shape) for tensor in model.tensors)
    n_expert_parameters = sum(math.prod(tensor.shape) for tensor in model.expert_tensors)
    used_share = model.n_experts_used / model.n_experts if model.n_experts else 0.0
    types: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for tensor in model.expert_tensors:
        types[tensor.type_name]["tensors"] += 1
        types[tensor.type_name]["bytes"] += tensor.n_bytes
    return {
        "path": str(model.path),
        "architecture": model.architecture,
        "name": str(model.metadata.get("general.name", "")),
        "n_parameters": n_parameters,
        "n_parameters_used": n_parameters - n_expert_parameters + round(n_expert_parameters * used_share),
        "n_experts": model.n_experts,
        "n_experts_used": model.n_experts_used,
        "n_moe_layers": model.n_moe_layers,
        "expert_bytes": model.expert_bytes,
        "token_cycle_bytes": model.token_cycle_bytes,
        "expert_bank_bytes": model.expert_bank_bytes,
        "dense_bytes": model.dense_bytes,
        "expert_types": dict(types),
        "files": [{"path": str(file), "bytes": file.stat().st_size} for file in model.files],
    }


def _table(facts: dict[str, Any]) -> str:
    """The facts as lines of text."""
    rows = [
        ("architecture", facts["architecture"]),
        ("name", facts["name"] or "-"),
        ("parameters", f"{_count(facts['n_parameters'])}, {_count(facts['n_parameters_used'])} used by a token"),
        ("dense weights", format_size(facts["dense_bytes"])),
    ]
    if facts["n_experts"]:
        rows += [
            ("experts", f"{facts['n_experts_used']} of {facts['n_experts']} in each of {facts['n_moe_layers']} layers"),
            ("one expert", format_size(facts["expert_bytes"])),
            ("token cycle", f"{format_size(facts['token_cycle_bytes'])} (experts of one token)"),
            ("expert bank", format_size(facts["expert_bank_bytes"])),
        ]
    else:
        rows.append(("experts", "none: nothing to stream"))
    rows += [
        (f"expert {name}", f"{of_type['tensors']} tensors, {format_size(of_type['bytes'])}")
        for name, of_type in facts["expert_types"].items()
    ]
    rows += [("file", f"{file['path']} ({format_size(file['bytes'])})") for file in facts["files"]]
    width = max(16, 2 + max(len(name) for name, _ in rows))
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def _count(n: int) -> str:
    """A count of parameters as people say it: `135 M`, `6.92 B`."""
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= factor:
            return f"{n / factor:.3g} {unit}"
    return str(n)
