# SPDX-License-Identifier: MIT
"""`plan` and `inspect` of a folder with an ONNX model, without ONNX Runtime and genai; options that do not apply."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="onnx is not installed (the extra edgemoe[test])")

from tests.integration.onnx_models import Shape, write_model
from tests.unit.fakes import error_lines, run

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "model": {
        "context_length": 2048,
        "decoder": {"filename": "model.onnx", "session_options": {"provider_options": []}},
        "type": "decoder",
        "vocab_size": 1000,
    },
    "search": {"past_present_share_buffer": False},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two layers of 8 experts, 2 used, 64 columns and 96 rows: int4 with a float32 scale for 32 columns."""
    path = tmp_path / "tiny"
    path.mkdir()
    write_model(path / "model.onnx", Shape(n_layers=2))
    (path / "genai_config.json").write_text(json.dumps(CONFIG))
    return path


def without_engines(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line where neither package is installed."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['onnxruntime', 'onnxruntime_genai', 'llama_cpp']));"
        "from edgemoe.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_inspect_counts_what_lies_in_the_folder(folder: Path) -> None:
    """Guards against: parameters counted in packed bytes, scales counted as weights, experts counted as dense."""
    result = without_engines("inspect", folder, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    n_expert = 64 * 2 * 96 + 96 * 64
    assert facts["n_parameters"] == 2 * 8 * n_expert
    assert facts["n_parameters_used"] == 2 * 2 * n_expert
    assert (facts["n_experts"], facts["n_experts_used"], facts["n_moe_layers"]) == (8, 2, 2)
    expert_bytes = n_expert // 2 + n_expert // 32 * 4
    assert facts["expert_bytes"] == expert_bytes
    assert facts["token_cycle_bytes"] == 2 * 2 * expert_bytes
    assert facts["expert_bank_bytes"] == 2 * 8 * expert_bytes
    assert facts["expert_types"] == {"QMoE int4 block 32": {"tensors": 8, "bytes": 2 * 8 * expert_bytes}}
    assert facts["dense_bytes"] == 0
    assert [file["path"] for file in facts["files"]] == [str(folder / n) for n in ("model.onnx", "model.onnx.data")]
    table = without_engines("inspect", folder).stdout
    assert "2 of 8 in each of 2 layers" in table and "expert QMoE int4 block 32  8 tensors" in table


def test_plan_without_loading(folder: Path) -> None:
    """Guards against: a plan that needs what only generating needs, or another shape of JSON than for GGUF."""
    result = without_engines("plan", folder, "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    parts = ("dense_bytes", "kv_bytes", "buffers_bytes", "slots_bytes", "slack_bytes")
    assert plan["fits"] and sum(plan[part] for part in parts) <= plan["budget_bytes"]
    assert plan["slots_bytes"] == plan["expert_bank_bytes"] > plan["token_cycle_bytes"] > 0
    small = without_engines("plan", folder, "--memory", plan["floor_bytes"] - (16 << 20))
    assert small.returncode == 1
    # Each process counts its own memory, which differs by some hundred KiB from one to the next.
    advised = re.search(r"is below the floor .*; use --memory (\d+)MiB", small.stdout)
    assert advised and abs((int(advised[1]) << 20) - plan["floor_bytes"]) < 4 << 20
    fitting = without_engines("plan", folder, "--memory", plan["floor_bytes"] + (4 << 20))
    assert fitting.returncode == 0 and "tiny, context 2048" in fitting.stdout


def test_a_context_that_the_model_does_not_have(folder: Path) -> None:
    """Guards against: a plan for a context that no run can have."""
    result = run("plan", str(folder), "--ctx", "4096")
    assert result.exit_code == 1
    assert "context of 4096 tokens: the model's is at most 2048" in error_lines(result)[0]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "-p", "a", "--draft", "ngram"],
        ["generate", "-p", "a", "--profile"],
        ["chat", "--kernels", "ggml"],
        ["chat", "--reuse-price", "1%"],
        ["plan", "--on-miss-skip-mass", "0.9"],
    ],
)
def test_options_that_do_not_apply_are_wrong_usage(folder: Path, command: list[str]) -> None:
    """Guards against: an option that is silently without effect."""
    result = run(command[0], str(folder), *command[1:])
    assert result.exit_code == 2
    option = next(word for word in command[::-1] if word.startswith("--")).replace("--no-", "--")
    assert f"{option} does not apply to a folder with an ONNX model" in result.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--reuse-bias", "auto"], "reuse_bias 'auto' is for GGUF models"),
        (["--expert-top-k", "lexi:2"], "expert_top_k 'lexi:2' is for GGUF models"),
    ],
)
def test_ways_to_use_fewer_experts_that_onnx_models_do_not_have(folder: Path, options: list[str], named: str) -> None:
    """Guards against: a traceback where the usage is wrong."""
    result = run("generate", str(folder), "-p", "a", *options)
    assert result.exit_code == 2
    assert named in result.stderr


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (None, "No such file"),
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        (json.dumps({"model": {**CONFIG["model"], "vocab_size": 0}}), "vocab_size 0"),
        (json.dumps({"model": {**CONFIG["model"], "decoder": {"filename": "other.onnx"}}}), "other.onnx"),
        (json.dumps({"model": {**CONFIG["model"], "vision": {}}}), "it has a part 'vision'"),
    ],
)
@pytest.mark.parametrize("command", [["inspect"], ["plan"], ["generate", "-p", "a"], ["chat"]])
def test_a_folder_that_cannot_be_read_is_one_line(
    folder: Path, command: list[str], config: str | None, named: str
) -> None:
    """Guards against: a traceback, or genai's words, where the folder is not what it should be."""
    (folder / "genai_config.json").unlink()
    if config is not None:
        (folder / "genai_config.json").write_text(config)
    result = run(*command, str(folder))
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and named in lines[0] and str(folder) in lines[0]


def test_without_genai_the_error_says_what_to_install(folder: Path) -> None:
    """Guards against: a traceback where the extra is not installed."""
    result = without_engines("generate", folder, "-p", "a")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "pip install 'edgemoe[genai]'" in result.stderr
