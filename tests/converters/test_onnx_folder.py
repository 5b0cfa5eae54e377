# SPDX-License-Identifier: MIT
"""What `convert onnx` refuses, and that a folder is complete or not there."""

from __future__ import annotations

import fcntl
import json
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("torch", "transformers", "safetensors.torch", "tokenizers", "sentencepiece"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra edgemoe[verify])")

from edgemoe.cli.main import cli
from edgemoe.converters.onnx.checkpoint import Recipe, export_checkpoint, plan_export
from edgemoe.errors import ConversionError
from edgemoe.formats.onnx_model import read_model
from tests.converters import checkpoints


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, to be left as it is."""
    return _write(tmp_path_factory.mktemp("checkpoint") / "olmoe", "olmoe")


def _write(folder: Path, family: str, **changes: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checkpoints.write_checkpoint(folder, family, **changes).path


def _change(checkpoint: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose tensors have been changed, in one file."""
    import safetensors.torch

    shutil.copytree(checkpoint, to)
    state: dict[str, Any] = {}
    for path in sorted(to.glob("*.safetensors")):
        state |= safetensors.torch.load_file(path)
        path.unlink()
    (to / "model.safetensors.index.json").unlink()
    change(state)
    safetensors.torch.save_file(state, to / "model.safetensors")
    return to


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["convert", "onnx", *map(str, arguments)])


def test_the_command_writes_a_folder(olmoe: Path, tmp_path: Path) -> None:
    """Guards against: options that do not arrive, and files that genai or a tokenizer need and that are not there."""
    out = tmp_path / "out"
    result = _run(olmoe, out, "--quant", "int8", "--dense", "int4", "--embedding", "int4", "--context", "128", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.splitlines()[-1])
    names = {path.name for path in out.iterdir()}
    assert names == set(said["files"])
    assert names >= {"model.onnx", "model.onnx.data", "experts.bin", "genai_config.json", "tokenizer.json"}
    assert said["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    model = read_model(out / "model.onnx")
    assert {node.ints["expert_weight_bits"] for node in model.moe_nodes} == {8}
    assert "model.layers.0.self_attn.q_proj.weight_q4" in model.tensors
    assert "model.embed_tokens.weight_rows_q4" in model.tensors
    assert model.tensors["rope.cos"].shape[0] == 128
    assert json.loads((out / "genai_config.json").read_text())["model"]["context_length"] == 128
    assert list(tmp_path.iterdir()) == [out]


def test_an_existing_folder_is_kept_or_replaced_whole(olmoe: Path, tmp_path: Path) -> None:
    """Guards against: a model overwritten unasked, the checkpoint itself overwritten, or old files left in a new
    folder."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    result = _run(olmoe, out)
    assert result.exit_code == 1 and "exists" in result.output and "--force" in result.output
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert _run(olmoe, out, "--force").exit_code == 0
    assert (out / "model.onnx").is_file() and not (out / "mine.txt").exists()
    assert list(tmp_path.iterdir()) == [out]
    result = _run(olmoe, olmoe, "--force")
    assert result.exit_code == 1 and "checkpoint itself" in result.output
    assert (olmoe / "config.json").is_file()


def test_a_failed_export_leaves_nothing(olmoe: Path, tmp_path: Path) -> None:
    """Guards against: half a model under its final name, or gigabytes beside it, after a weight that is no number."""

    def damage(state: dict[str, Any]) -> None:
        state["model.layers.2.mlp.experts.15.down_proj.weight"][3, 5] = float("nan")

    damaged = _change(olmoe, tmp_path / "damaged", damage)
    with pytest.raises(ConversionError, match=r"experts\.15\.down_proj\.weight: nan at row 3, column 5"):
        export_checkpoint(plan_export(damaged), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_full_disk_leaves_nothing(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against: writing gigabytes onto a disk without room for them, and half a model where it fills up."""
    plan = plan_export(olmoe)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda _path: usage)
        with pytest.raises(ConversionError, match=r"it takes .*, 0\.977 KiB are free; make room"):
            export_checkpoint(plan, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ConversionError, match="cannot write"):
            export_checkpoint(plan, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_removed_and_a_running_one_is_not(olmoe: Path, tmp_path: Path) -> None:
    """Guards against: two exports that mix their files, and garbage of a killed one in the next one's folder."""
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "experts.bin").write_bytes(b"old")
    (partial / "old.txt").write_bytes(b"old")
    plan = plan_export(olmoe)
    with (partial / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConversionError, match="another conversion is writing it"):
            export_checkpoint(plan, tmp_path / "out")
        assert (partial / "old.txt").exists()
    export_checkpoint(plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert not (tmp_path / "out" / "old.txt").exists() and not (tmp_path / "out" / ".lock").exists()


def test_bytes_depend_on_the_checkpoint_and_the_recipe_alone(olmoe: Path, tmp_path: Path) -> None:
    """Guards against: names or places that differ from run to run, so that two exports cannot be compared."""
    for name in ("a", "b"):
        export_checkpoint(plan_export(olmoe), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_experts_stored_together_become_the_same_file(olmoe: Path, tmp_path: Path) -> None:
    """Guards against: gate and up exchanged, or experts, where transformers 5 has stored a layer's in one tensor."""
    import torch

    def fuse(state: dict[str, Any]) -> None:
        for layer in range(3):
            prefix = f"model.layers.{layer}.mlp.experts"
            gates, ups, downs = (
                torch.stack([state.pop(f"{prefix}.{expert}.{name}_proj.weight") for expert in range(16)])
                for name in ("gate", "up", "down")
            )
            state[f"{prefix}.gate_up_proj"] = torch.cat([gates, ups], dim=1)
            state[f"{prefix}.down_proj"] = downs

    export_checkpoint(plan_export(olmoe), tmp_path / "single.onnx")
    export_checkpoint(plan_export(_change(olmoe, tmp_path / "fused", fuse)), tmp_path / "fused.onnx")
    for name in ("model.onnx", "experts.bin", "model.onnx.data"):
        assert (tmp_path / "fused.onnx" / name).read_bytes() == (tmp_path / "single.onnx" / name).read_bytes()


def test_missing_and_foreign_tensors_are_named(olmoe: Path, tmp_path: Path) -> None:
    """Guards against: a graph without a part of the model, an adapter that is silently left out, a shard that is not
    there."""
    lost = _change(olmoe, tmp_path / "lost", lambda s: s.pop("model.layers.1.mlp.experts.7.up_proj.weight"))
    with pytest.raises(ConversionError, match=r"tensor model\.layers\.1\.mlp\.experts\.7\.up_proj\.weight is missing"):
        plan_export(lost)
    more = _change(
        olmoe, tmp_path / "more", lambda s: s.update({"model.layers.0.lora.weight": next(iter(s.values())).clone()})
    )
    with pytest.raises(ConversionError, match=r"has no place for model\.layers\.0\.lora\.weight"):
        plan_export(more)
    shape = _change(
        olmoe,
        tmp_path / "shape",
        lambda s: s.update({"model.norm.weight": s["model.norm.weight"][:32].clone()}),
    )
    with pytest.raises(ConversionError, match=r"model\.norm\.weight: its shape is \[32\], expected \[64\]"):
        plan_export(shape)
    shutil.copytree(olmoe, tmp_path / "short")
    (tmp_path / "short" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConversionError, match="1 of 2 shards are missing"):
        plan_export(tmp_path / "short")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type dynamic"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"architectures": ["AfmoeForCausalLM"]}, "architecture is AfmoeForCausalLM, expected one of DeepseekV2"),
        ({"num_experts": 17}, r"gate\.weight: its shape is \[16, 64\], expected \[17, 64\]"),
    ],
)
def test_what_the_graph_does_not_compute_is_refused(
    olmoe: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    """Guards against: a model that loads and answers differently."""
    shutil.copytree(olmoe, tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConversionError, match=named):
        plan_export(tmp_path / "changed")


def test_blocks_that_do_not_divide_rows_are_refused(olmoe: Path) -> None:
    """Guards against: scales that run over the end of a row; the message has to name a block that fits."""
    with pytest.raises(ConversionError, match=r"rows of 32 columns, expected a multiple of 64; use --block 32"):
        plan_export(olmoe, Recipe(block=64))
    with pytest.raises(ConversionError, match="expected one of 32, 64, 128"):
        plan_export(olmoe, Recipe(block=48))


def test_an_embedding_keeps_its_type(olmoe: Path, tmp_path: Path) -> None:
    """Guards against: an embedding that was to stay as it is and is of twice its size in memory, or rounded."""
    import safetensors.torch

    export_checkpoint(plan_export(olmoe, Recipe(embedding="stored")), tmp_path / "out")
    tensor = read_model(tmp_path / "out" / "model.onnx").tensors["model.embed_tokens.weight"]
    assert tensor.path is not None
    found = tensor.path.read_bytes()[tensor.offset : tensor.offset + tensor.n_bytes]
    stored: dict[str, Any] = {}
    for path in olmoe.glob("*.safetensors"):
        stored |= safetensors.torch.load_file(path)
    expected = stored["model.embed_tokens.weight"].float().numpy().view(np.uint32) >> 16
    assert found == expected.astype(np.uint16).tobytes()


def test_without_onnx_the_error_says_what_to_install(olmoe: Path, tmp_path: Path) -> None:
    """Guards against: a traceback where the extra is not installed."""
    code = "import sys; sys.modules['onnx'] = None; from edgemoe.cli.main import main; main()"
    arguments = [sys.executable, "-c", code, "convert", "onnx", str(olmoe), str(tmp_path / "out")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert result.returncode == 1
    assert "pip install 'edgemoe[convert]'" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_torch_and_transformers_are_not_needed(olmoe: Path, tmp_path: Path) -> None:
    """Guards against: gigabytes of packages to install where a checkpoint is only rewritten."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'onnxruntime', 'safetensors']));"
        "from edgemoe.cli.main import main; main()"
    )
    arguments = [sys.executable, "-c", code, "convert", "onnx", str(olmoe), str(tmp_path / "out")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "model.onnx").is_file()
