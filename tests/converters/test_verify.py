# SPDX-License-Identifier: MIT
"""`edgemoe convert verify`: that it passes what is right and finds what is wrong."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgemoe.formats.gguf import read_model
from tests.converters.conftest import Workshop
from tests.unit.fakes import error_lines, run

# What transformers and torch warn of is for them to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

Edit = Callable[[Path], Path]


@pytest.fixture
def edit(tmp_path: Path) -> Edit:
    """A copy of a file, to be damaged."""
    return lambda path: Path(shutil.copy(path, tmp_path / "edited.gguf"))


def verify(path: Path, workshop: Workshop, family: str, *options: str) -> tuple[int, dict[str, Any], list[str]]:
    """Exit code, the line of JSON and the errors of a run of the command."""
    result = run("convert", "verify", str(path), "--against", str(workshop.checkpoint(family).path), "--json", *options)
    return result.exit_code, json.loads(result.stdout.splitlines()[-1]), error_lines(result)


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    "family, preset",
    [
        ("olmoe", "F32"),
        ("mixtral", "BF16"),
        ("deepseek-v3", "F16"),
        ("gpt-oss", "Q8_0"),
        ("lfm2moe", "Q8_0"),
        ("qwen3moe", "Q6_K"),
        ("qwen3moe", "Q4_K_M"),
        ("qwen3moe", "Q2_K"),
    ],
)
def test_a_conversion_passes(workshop: Workshop, family: str, preset: str) -> None:
    """Guards against false alarms, and against bounds so wide that one type passes as another."""
    code, found, errors = verify(workshop.gguf(family, preset), workshop, family, "--rows", "0")
    assert (code, found["ok"], errors) == (0, True, [])
    assert found["n_positions"] == 256
    if preset == "F32":
        assert found["max_rel_error"] <= 1e-3 and found["top1_agreement"] == 1.0 and found["max_tensor_error"] == 0.0
    else:
        assert 0 < found["kl"] < 0.6


def test_one_damaged_block_is_found(workshop: Workshop, edit: Edit) -> None:
    """Guards against an error of one row that drowns in a tensor's average."""
    path = edit(workshop.gguf("qwen3moe", "Q4_K_M"))
    tensor = next(t for t in read_model(path).tensors if t.name == "blk.1.ffn_up_exps.weight")
    row_bytes = tensor.n_bytes // (tensor.shape[1] * tensor.shape[2])
    patch(path, tensor.offset + 1000 * row_bytes + 20, bytes(range(100)))
    code, found, errors = verify(path, workshop, "qwen3moe", "--rows", "0")
    assert code == 1 and not found["ok"]
    assert len(errors) == 1 and "blk.1.ffn_up_exps.weight (Q4_K): row 1000 is off by" in errors[0]


def test_experts_in_another_order_are_found_in_a_sample(workshop: Workshop, edit: Edit) -> None:
    """Guards against a sample that does not reach all experts."""
    path = edit(workshop.gguf("mixtral", "Q8_0"))
    tensor = next(t for t in read_model(path).tensors if t.name == "blk.0.ffn_down_exps.weight")
    data, n_bytes = path.read_bytes(), tensor.n_bytes // tensor.shape[2]
    third, fourth = (data[tensor.offset + i * n_bytes :][:n_bytes] for i in (2, 3))
    patch(path, tensor.offset + 2 * n_bytes, fourth + third)
    code, _, errors = verify(path, workshop, "mixtral")
    assert code == 1 and "blk.0.ffn_down_exps.weight (Q8_0): row" in errors[0]


def test_a_hyper_parameter_of_another_value_is_named(workshop: Workshop, edit: Edit) -> None:
    """Guards against a file whose weights are right and whose rotary base is another model's."""
    path = edit(workshop.gguf("olmoe", "F32"))
    key = b"olmoe.rope.freq_base"
    at = path.read_bytes().index(key) + len(key) + 4
    patch(path, at, struct.pack("<f", 20000.0))
    code, found, errors = verify(path, workshop, "olmoe")
    assert code == 1 and found["kl"] is None
    assert errors == ["edgemoe: error: olmoe.rope.freq_base is 20000.0, expected 10000.0"]


def test_logits_tell_what_rows_and_metadata_do_not(workshop: Workshop, edit: Edit) -> None:
    """Guards against a comparison of the file with the converter's own idea of it only: without the key that says that
    weights of experts are normalized, llama.cpp computes something else."""
    path = edit(workshop.gguf("glm4moe", "F32"))
    key = b"glm4moe.expert_weights_norm"
    patch(path, path.read_bytes().index(key), b"glm4moe.expert_weights_non_")
    code, found, errors = verify(path, workshop, "glm4moe")
    assert code == 1 and found["max_rel_error"] > 1e-3 and found["max_tensor_error"] == 0.0
    assert len(errors) == 1 and "logits are off by" in errors[0]


def test_another_checkpoint_is_not_taken_for_the_same(workshop: Workshop) -> None:
    """Guards against a success because nothing was comparable."""
    code, _, errors = verify(workshop.gguf("olmoe", "F32"), workshop, "mixtral")
    assert code == 1
    assert errors[0] == "edgemoe: error: the architecture is olmoe, expected llama (general.architecture)"
    assert len(errors) == 21  # 20 and how many more


def test_a_model_that_llama_cpp_computes_differently_fails(workshop: Workshop) -> None:
    """Guards against a bound that hides how far llama.cpp's Phi-3.5-MoE is from the model."""
    code, found, errors = verify(workshop.gguf("phimoe", "F32"), workshop, "phimoe")
    assert code == 1 and found["max_tensor_error"] == 0.0
    assert len(errors) == 1 and "logits are off by" in errors[0]


def test_without_transformers_tensors_are_compared(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a need for torch where it is not installed, and against silence about what was not compared."""
    path = workshop.gguf("olmoe", "Q8_0")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    result = run("convert", "verify", str(path), "--against", str(workshop.checkpoint("olmoe").path))
    assert result.exit_code == 0
    assert "logits were not compared: transformers and torch are not installed" in result.stderr
    code, _, errors = run_always(path, workshop)
    assert code == 1 and "cannot compare logits: transformers and torch are not installed" in errors[0]


def run_always(path: Path, workshop: Workshop) -> tuple[int, str, list[str]]:
    folder = str(workshop.checkpoint("olmoe").path)
    result = run("convert", "verify", str(path), "--against", folder, "--logits", "always")
    return result.exit_code, result.stdout, error_lines(result)


def test_a_class_that_transformers_lacks_is_said(workshop: Workshop) -> None:
    """Guards against a crash, or code of the checkpoint's own being run, for DeepSeek-MoE."""
    folder = str(workshop.checkpoint("deepseek-moe").path)
    result = run("convert", "verify", str(workshop.gguf("deepseek-moe", "F32")), "--against", folder)
    assert result.exit_code == 0
    assert "has no class for the model type deepseek" in result.stderr


@pytest.mark.parametrize("arguments", [["OUT.gguf"], ["OUT.gguf", "--against", "no-such-folder"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    """Guards against a mistyped command that looks like a failed comparison."""
    assert run("convert", "verify", *arguments).exit_code == 2
