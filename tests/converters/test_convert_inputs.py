# SPDX-License-Identifier: MIT
"""What a conversion takes beside the weights: importance, types by patterns, and the hashes of its inputs."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

from edgemoe.converters.gguf_writer import no_progress
from edgemoe.converters.input_hashes import InputHashes
from edgemoe.converters.quantize.importance import ImportanceMatrix
from edgemoe.converters.quantize.presets import Tensor, find_preset
from edgemoe.converters.requantize import Recipe as Requantize
from edgemoe.converters.requantize import requantize
from edgemoe.converters.to_gguf import Recipe, convert, plan_conversion
from edgemoe.errors import ConversionError
from tests.converters.conftest import Workshop
from tests.converters.test_to_gguf import (
    RECIPE,
    fuse,
    interrupt,
    random_tensors,
    run_cli,
    tensor,
    to_gguf,
    write_checkpoint,
)


def test_inputs_that_change_meanwhile_are_told(tmp_path: Path) -> None:
    """Guards against a hash of other bytes than were converted, and against going on with tensors of other inputs."""
    copy = write_checkpoint(tmp_path / "copy")
    out, plan = tmp_path / "out.gguf", plan_conversion(copy, RECIPE)
    shard = copy / "model-00002-of-00002.safetensors"

    interrupt(plan, out)
    data = bytearray(shard.read_bytes())
    data[-400:] = bytes(400)  # another tensor of the same length
    shard.write_bytes(data)
    convert(plan, out)
    convert(plan, tmp_path / "whole.gguf")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    hashes = InputHashes(plan.inputs, _Journal())
    os.utime(shard, ns=(1, 2))
    with hashes, pytest.raises(ConversionError, match="it changed while it was converted"):
        hashes.wait(no_progress)


class _Journal:
    """A journal that keeps nothing."""

    def recall(self, _kind: str) -> list[Any]:
        return []

    def note(self, _kind: str, _value: dict[str, Any]) -> None:
        return


def test_each_expert_has_its_own_importance(tmp_path: Path) -> None:
    """Guards against the first expert's importance for all experts that lie in one stored tensor. What `convert
    quantize` makes of the exact file is the reference, because llama_model_quantize is that one's."""
    rng = np.random.default_rng(2)
    source = write_checkpoint(tmp_path / "single")
    plain = to_gguf(source, tmp_path / "plain.gguf")
    shapes = {found.name: tuple(reversed(found.shape.tolist())) for found in plain.tensors if len(found.shape) > 1}
    means = {name: rng.uniform(0.01, 4, math.prod(s) // s[-2]).astype(np.float32) for name, s in shapes.items()}
    imatrix = ImportanceMatrix(tmp_path / "imatrix.gguf", means, {}, {}, "f" * 64)
    columns = imatrix.for_tensors([Tensor(name, shape) for name, shape in shapes.items()])
    requantize(tmp_path / "plain.gguf", tmp_path / "expected.gguf", Requantize("Q4_0", (), columns, "f" * 64))
    expected = gguf.GGUFReader(tmp_path / "expected.gguf")
    fused = write_checkpoint(tmp_path / "fused", fuse(random_tensors()))
    for checkpoint in (source, fused):
        out = tmp_path / f"{checkpoint.name}.gguf"
        convert(plan_conversion(checkpoint, Recipe("Q4_0", "qwen2"), imatrix), out)
        found = gguf.GGUFReader(out)
        for name in shapes:
            np.testing.assert_array_equal(tensor(found, name), tensor(expected, name), err_msg=name)


@pytest.mark.parametrize("preset", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "MXFP4", "Q3_K_M", "Q2_K"])
def test_presets_are_those_of_convert_quantize(workshop: Workshop, tmp_path: Path, preset: str) -> None:
    """Guards against other types or bytes than `convert quantize` makes of the exact file, which tests compare with
    llama_model_quantize."""
    out = tmp_path / "out.gguf"
    requantize(workshop.gguf("qwen3moe", "F32"), out, Requantize(find_preset(preset)))
    expected, found = gguf.GGUFReader(out), gguf.GGUFReader(workshop.gguf("qwen3moe", find_preset(preset)))
    types = {t.name: t.tensor_type for t in found.tensors}
    assert types == {t.name: t.tensor_type for t in expected.tensors}
    assert len(set(types.values())) > 1, "norms stay F32"
    for name in types:
        np.testing.assert_array_equal(tensor(found, name), tensor(expected, name), err_msg=name)


def test_types_by_patterns(tmp_path: Path) -> None:
    """Guards against a MIXED.toml that is read and not followed, and against patterns that reach routers."""
    source, mixed, out = write_checkpoint(tmp_path / "source"), tmp_path / "mixed.toml", tmp_path / "out.gguf"
    mixed.write_text("base = 'Q8_0'\n[types]\n'^blk\\.1\\.ffn_down_exps' = 'Q4_0'\n'ffn_(gate|up)_exps' = 'Q5_0'\n")
    done = run_cli(source, out, "--quant", mixed, "--pre-tokenizer", "qwen2")
    assert done.exit_code == 0, done.output
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert types["blk.1.ffn_down_exps.weight"] == "Q4_0" and types["blk.0.ffn_down_exps.weight"] == "Q8_0"
    assert types["blk.0.ffn_up_exps.weight"] == types["blk.1.ffn_gate_exps.weight"] == "Q5_0"
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    mixed.write_text("base = 'Q8_0'\n[types]\n'ffn_sideways' = 'Q4_0'\n")
    done = run_cli(source, out, "--quant", mixed, "--pre-tokenizer", "qwen2", "--force")
    assert done.exit_code == 1 and "ffn_sideways" in done.output
