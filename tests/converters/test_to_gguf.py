# SPDX-License-Identifier: MIT
"""Conversion of checkpoints: bad input, interruption, memory, and layouts beside those of `checkpoints`."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

from edgemoe.converters.to_gguf import Plan, Recipe, convert, plan_conversion  # noqa: E402
from edgemoe.errors import ConversionError  # noqa: E402

HIDDEN, FFN, N_EXPERTS, N_LAYERS, HEAD_DIM, N_HEADS, N_VOCAB = 64, 32, 4, 2, 16, 4, 300
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": HEAD_DIM,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "mlp_only_layers": [],
    "moe_intermediate_size": FFN,
    "norm_topk_prob": True,
    "num_attention_heads": N_HEADS,
    "num_experts": N_EXPERTS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": N_LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": N_VOCAB,
}
RECIPE = Recipe(preset="F32", pre_tokenizer="qwen2")
Tensors = dict[str, npt.NDArray[Any]]


def random_tensors(config: dict[str, Any] = CONFIG) -> Tensors:
    """Weights of Qwen3-MoE in float32, under the names of published checkpoints."""
    rng = np.random.default_rng(5)
    hidden, ffn = config["hidden_size"], config["moe_intermediate_size"]
    n_q = config["head_dim"] * config["num_attention_heads"]
    n_kv = config["head_dim"] * config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return (rng.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)).astype(np.float32)

    tensors: Tensors = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": matrix(config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = np.ones(hidden, np.float32)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{prefix}.self_attn.{norm}.weight"] = np.ones(config["head_dim"], np.float32)
        for name, rows, columns in (("q", n_q, hidden), ("k", n_kv, hidden), ("v", n_kv, hidden), ("o", hidden, n_q)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(rows, columns)
        tensors[f"{prefix}.mlp.gate.weight"] = matrix(config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            tensors[f"{prefix}.mlp.experts.{expert}.gate_proj.weight"] = matrix(ffn, hidden)
            tensors[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = matrix(ffn, hidden)
            tensors[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = matrix(hidden, ffn)
    return tensors


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE of 256 letters and one merge."""
    letters = [chr(0x100 + byte) for byte in range(256)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    is_plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 257, "content": "<|end|>", "special": True, **is_plain}],
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate([*letters, letters[1] + letters[2]])},
            "merges": [[letters[1], letters[2]]],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))


def write_checkpoint(folder: Path, tensors: Tensors | None = None, config: dict[str, Any] = CONFIG) -> Path:
    """A checkpoint in two shards with an index."""
    folder.mkdir(parents=True)
    tensors = random_tensors(config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    names = sorted(tensors)
    weight_map = {}
    for shard, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file_name = f"model-{shard + 1:05}-of-00002.safetensors"
        safetensors.save_file({name: tensors[name] for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint, to be left as it is."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


def to_gguf(checkpoint: Path, out: Path, recipe: Recipe = RECIPE) -> gguf.GGUFReader:
    convert(plan_conversion(checkpoint, recipe), out)
    return gguf.GGUFReader(out)


def tensor(reader: gguf.GGUFReader, name: str) -> npt.NDArray[Any]:
    return next(np.asarray(found.data) for found in reader.tensors if found.name == name)


# ─── what goes wrong with checkpoints ─────────────────────────────────────────────────────────────────────────────


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite(checkpoint: Path, change: Callable[[Tensors], object]) -> None:
    """Change tensors, and the files with them."""
    tensors = random_tensors()
    change(tensors)
    shutil.rmtree(checkpoint)
    write_checkpoint(checkpoint, tensors)


def truncate(path: Path, n_bytes: int) -> None:
    os.truncate(path, n_bytes)


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


def _set_nan(tensors: Tensors) -> None:
    tensors[GATE][5, 7] = np.nan


def _set_infinity(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"][9, 1] = np.inf


def _store_integers(tensors: Tensors) -> None:
    tensors[GATE] = np.zeros((FFN, HIDDEN), np.int32)


def _make_pickle(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "missing shard": (lambda c: (c / "model-00002-of-00002.safetensors").unlink(), "1 of 2 shards are missing"),
    "no weights": (lambda c: [p.unlink() for p in c.glob("*.safetensors*")], r"found no \*.safetensors"),
    "pickle": (_make_pickle, "its weights are pickles"),
    "index names too much": (
        lambda c: edit(
            c / "model.safetensors.index.json",
            lambda v: v["weight_map"].update({"extra.weight": "model-00001-of-00002.safetensors"}),
        ),
        "the index places extra.weight",
    ),
    "index lacks a tensor": (
        lambda c: edit(c / "model.safetensors.index.json", lambda v: v["weight_map"].pop("lm_head.weight")),
        "which the index does not place there",
    ),
    "truncated shard": (lambda c: truncate(c / "model-00001-of-00002.safetensors", 40000), "the file is truncated"),
    "empty shard": (lambda c: truncate(c / "model-00001-of-00002.safetensors", 0), "it has 0 bytes"),
    "no JSON": (lambda c: (c / "config.json").write_text("{"), "it is not JSON"),
    "config.json missing": (lambda c: (c / "config.json").unlink(), "is .* a complete checkpoint"),
    "field missing": (lambda c: edit(c / "config.json", lambda v: v.pop("num_experts_per_tok")), "is missing"),
    "integers": (lambda c: rewrite(c, _store_integers), "its type is I32"),
    "NaN": (lambda c: rewrite(c, _set_nan), "nan at row 5, column 7"),
    "infinity": (lambda c: rewrite(c, _set_infinity), "inf at row 9, column 1"),
    "too few experts": (lambda c: rewrite(c, lambda t: t.pop(GATE)), "has 3 experts, expected 4 .*expert 3 is missing"),
    "too many experts": (
        lambda c: edit(c / "config.json", lambda v: v.update(num_experts=3)),
        "has 4 experts, expected 3",
    ),
    "tensor missing": (
        lambda c: rewrite(c, lambda t: t.pop("model.layers.1.self_attn.k_norm.weight")),
        "llama.cpp would refuse the result .*blk.1.attn_k_norm",
    ),
    "tensor of another shape": (
        lambda c: rewrite(c, lambda t: t.update({"model.norm.weight": np.ones(HIDDEN + 32, np.float32)})),
        "llama.cpp would refuse the result .*output_norm",
    ),
    "tensor unknown": (
        lambda c: rewrite(c, lambda t: t.update({"model.layers.0.adapter.weight": np.ones(4, np.float32)})),
        "has no place for it",
    ),
    "no tokenizer": (lambda c: (c / "tokenizer.json").unlink(), "neither tokenizer.json nor tokenizer.model"),
    "token outside of the vocabulary": (
        lambda c: edit(c / "config.json", lambda v: v.update(vocab_size=100)),
        "token .* has the id 100",
    ),
    "graph computes it differently": (
        lambda c: edit(c / "config.json", lambda v: v.update(norm_topk_prob=False)),
        "norm_topk_prob is False, llama.cpp computes .* with True",
    ),
    "RoPE unknown": (
        lambda c: edit(c / "config.json", lambda v: v.update(rope_scaling={"type": "dynamic", "factor": 2.0})),
        "its RoPE is of the type dynamic",
    ),
    "family unknown": (
        lambda c: edit(c / "config.json", lambda v: v.update(architectures=["JambaForCausalLM"])),
        "its class is JambaForCausalLM",
    ),
    "family without architecture": (
        lambda c: edit(c / "config.json", lambda v: v.update(architectures=["MobileMoEForCausalLM"])),
        "MobileMoE checkpoint: llama.cpp has no architecture for it",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_checkpoints_are_refused(copy: Path, tmp_path: Path, what: str) -> None:
    """Guards against a crash, or a file that loads and answers nonsense, where the checkpoint is at fault; and against
    leftovers of the attempt."""
    spoil, message = SPOILED[what]
    spoil(copy)
    with pytest.raises(ConversionError, match=message):
        to_gguf(copy, tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir() if path != copy) == []


def test_unknown_pre_tokenizers_say_what_to_do(source: Path, tmp_path: Path) -> None:
    """Guards against a guess where the vocabulary is not one that llama.cpp knows, and against names it has not."""
    pytest.importorskip("tokenizers")
    with pytest.raises(ConversionError, match=r"the hash [0-9a-f]{64} .*--pre-tokenizer"):
        plan_conversion(source, Recipe())
    with pytest.raises(ConversionError, match="cannot use the pre-tokenizer 'qwen17'"):
        plan_conversion(source, Recipe(pre_tokenizer="qwen17"))


def test_full_disks_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against filling the disk before finding out, and against a partial file where it fills up meanwhile."""
    plan = plan_conversion(source, RECIPE)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=plan.n_bytes - 1))
        with pytest.raises(ConversionError, match="are free in"):
            convert(plan, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConversionError, match="No space left on device"):
        _convert_on_a_full_disk(plan, tmp_path / "out.gguf", monkeypatch)
    assert list(tmp_path.iterdir()) == []


def _convert_on_a_full_disk(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_written = 0
    pwrite = os.pwrite

    def limited(file: int, data: bytes, offset: int) -> int:
        nonlocal n_written
        n_written += len(data)
        if n_written > plan.n_bytes // 2:
            raise OSError(28, os.strerror(28))
        return pwrite(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", limited)
        convert(plan, out)


def test_two_conversions_to_one_name_do_not_meet(source: Path, tmp_path: Path) -> None:
    """Guards against two processes writing one file."""
    plan = plan_conversion(source, RECIPE)

    def convert_again(_stage: str, _done: int, _total: int) -> None:
        with pytest.raises(ConversionError, match="another process is writing it"):
            convert(plan, tmp_path / "out.gguf")

    convert(plan, tmp_path / "out.gguf", progress=convert_again)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


# ─── interruption ─────────────────────────────────────────────────────────────────────────────────────────────────

KILLED = """
import os, signal, sys
from pathlib import Path
from edgemoe.converters.to_gguf import Recipe, convert, plan_conversion

n_calls = 0

def counted(function):
    def call(*arguments):
        global n_calls
        n_calls += 1
        if n_calls == int(sys.argv[3]):
            if function is pwrite:  # half of it arrives
                pwrite(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

pwrite = os.pwrite
for name in ("pwrite", "ftruncate", "fsync", "replace"):
    setattr(os, name, counted(getattr(os, name)))
convert(plan_conversion(Path(sys.argv[1]), Recipe("Q8_0", "qwen2")), Path(sys.argv[2]))
print(n_calls)
"""


def run_killed(checkpoint: Path, out: Path, at_call: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(out), str(at_call)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_kill_at_any_moment_then_again_gives_the_same_file(source: Path, tmp_path: Path) -> None:
    """Guards against torn tensors, a journal that says more than is there, and files left behind. The process is killed
    in the middle of a write to the disk, at ten of them, among them the first and the last."""
    whole = tmp_path / "whole.gguf"
    finished = run_killed(source, whole, 0)
    assert finished.returncode == 0, finished.stderr
    n_calls = int(finished.stdout)
    points = [1, n_calls, *random.Random(11).sample(range(2, n_calls), 8)]
    plan = plan_conversion(source, Recipe("Q8_0", "qwen2"))
    n_resumed = 0
    for point in points:
        folder = tmp_path / str(point)
        folder.mkdir()
        out = folder / "out.gguf"
        killed = run_killed(source, out, point)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists() or out.read_bytes() == whole.read_bytes()  # after the rename, it is complete
        stages: list[str] = []
        convert(plan, out, progress=lambda stage, _done, _total, seen=stages: seen.append(stage))
        n_resumed += "check" in stages
        assert out.read_bytes() == whole.read_bytes(), point
        assert [path.name for path in folder.iterdir()] == ["out.gguf"]
    assert n_resumed >= 5  # those that had a complete tensor


def interrupt(plan: Plan, out: Path) -> None:
    """Convert more than half of it."""

    def stop_late(stage: str, done: int, total: int) -> None:
        if stage == "convert" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, out, progress=stop_late)


def test_what_changed_behind_the_journal_is_written_again(source: Path, tmp_path: Path) -> None:
    """Guards against trusting a journal after a power failure, when data that it speaks of never reached the disk."""
    out, plan = tmp_path / "out.gguf", plan_conversion(source, RECIPE)
    partial = tmp_path / ".out.gguf.partial"

    interrupt(plan, out)
    with partial.open("r+b") as file:
        file.seek(plan.n_bytes // 4)
        file.write(bytes(20000))
    convert(plan, out)
    convert(plan, tmp_path / "whole.gguf")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_another_recipe_does_not_go_on_with_the_old_file(source: Path, tmp_path: Path) -> None:
    """Guards against a file of two halves when options change between attempts; F16 and BF16 have the same lengths."""
    out = tmp_path / "out.gguf"

    interrupt(plan_conversion(source, Recipe("F16", "qwen2")), out)
    plan = plan_conversion(source, Recipe("BF16", "qwen2"))
    convert(plan, out)
    convert(plan, tmp_path / "whole.gguf")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


# ─── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────

MEASURED = """
import resource, sys
from pathlib import Path
from edgemoe.converters.to_gguf import Recipe, convert, plan_conversion

plan = plan_conversion(Path(sys.argv[1]), Recipe(sys.argv[3], "qwen2"))
before = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) << 10
convert(plan, Path(sys.argv[2]), memory_bytes=before + int(sys.argv[4]))
print(int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before)
"""


@pytest.mark.parametrize("preset", ["F16", "Q4_0"])
def test_memory_is_what_was_allowed(tmp_path: Path, preset: str) -> None:
    """Guards against holding a layer, a bank of experts or the embedding. The largest tensors have 64 MiB, the limit is
    24 MiB above what the process had before."""
    config = {**CONFIG, "hidden_size": 1024, "moe_intermediate_size": 1024, "num_experts": 16, "vocab_size": 16384}
    tensors = random_tensors({**config, "num_hidden_layers": 1})
    checkpoint = write_checkpoint(tmp_path / "source", tensors, {**config, "num_hidden_layers": 1})
    del tensors
    allowed = 24 << 20
    command = [sys.executable, "-c", MEASURED, str(checkpoint), str(tmp_path / "out.gguf"), preset, str(allowed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= allowed


def test_too_little_memory_is_refused(source: Path, tmp_path: Path) -> None:
    """Guards against going over a limit that cannot be kept."""
    with pytest.raises(ConversionError, match=r"use --memory [0-9]+MiB or more"):
        convert(plan_conversion(source, RECIPE), tmp_path / "out.gguf", memory_bytes=1 << 20)
    assert list(tmp_path.iterdir()) == []


def test_bytes_do_not_depend_on_memory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against blocks that are encoded differently where they are cut differently."""
    plan = plan_conversion(source, Recipe("Q4_K_M", "qwen2"))
    convert(plan, tmp_path / "large.gguf")
    monkeypatch.setattr("edgemoe.converters.to_gguf.BUFFER_BYTES", 24 * HIDDEN * 3)
    convert(plan, tmp_path / "small.gguf")
    assert (tmp_path / "small.gguf").read_bytes() == (tmp_path / "large.gguf").read_bytes()


# ─── layouts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_experts_are_stacked_and_the_rest_is_as_stored(source: Path, tmp_path: Path) -> None:
    """Guards against experts in the order of their names (10 before 2) or of their files."""
    reader, stored = to_gguf(source, tmp_path / "out.gguf"), random_tensors()
    expected = np.stack([stored[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(N_EXPERTS)])
    np.testing.assert_array_equal(tensor(reader, "blk.1.ffn_up_exps.weight"), expected)
    np.testing.assert_array_equal(
        tensor(reader, "blk.0.attn_k.weight"), stored["model.layers.0.self_attn.k_proj.weight"]
    )


def test_fused_experts_give_the_same_file(source: Path, tmp_path: Path) -> None:
    """Guards against the layout that transformers 5 has in memory being read in another order than the published."""
    tensors = fuse(random_tensors())
    fused = to_gguf(write_checkpoint(tmp_path / "fused", tensors), tmp_path / "fused.gguf")
    plain = to_gguf(source, tmp_path / "plain.gguf")
    for expected in plain.tensors:
        np.testing.assert_array_equal(tensor(fused, expected.name), expected.data)


def fuse(tensors: Tensors) -> Tensors:
    """The layout that transformers 5 has in memory: all experts of a projection in one tensor."""
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts: dict[str, list[npt.NDArray[Any]]] = {
            name: [tensors.pop(f"{prefix}.{e}.{name}.weight") for e in range(N_EXPERTS)]
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        gate_up = [np.concatenate(pair) for pair in zip(parts["gate_proj"], parts["up_proj"], strict=True)]
        tensors[f"{prefix}.gate_up_proj"] = np.stack(gate_up)
        tensors[f"{prefix}.down_proj"] = np.stack(parts["down_proj"])
    return tensors


def test_fp8_is_multiplied_with_the_scales_of_its_blocks(tmp_path: Path) -> None:
    """Guards against scales of the wrong block, at the edges above all, and against a wrong table of FP8. PyTorch's own
    conversion is the reference."""
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    rng = np.random.default_rng(3)
    tensors = {name: torch.from_numpy(values) for name, values in random_tensors().items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    codes = torch.from_numpy(rng.integers(0, 256, (HIDDEN, HIDDEN), np.uint8))
    codes[(codes & 0x7F) == 0x7F] = 0  # the two NaN
    scales = torch.from_numpy(rng.uniform(0.5, 2, (3, 2)).astype(np.float32))
    tensors[name], tensors[name + "_scale_inv"] = codes.view(torch.float8_e4m3fn), scales
    folder = write_checkpoint(tmp_path / "fp8")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    edit(folder / "config.json", lambda v: v.update(quantization_config={"weight_block_size": [24, 40]}))
    found = tensor(to_gguf(folder, tmp_path / "out.gguf"), "blk.0.attn_q.weight")
    blocks = scales.repeat_interleave(24, 0).repeat_interleave(40, 1)[:HIDDEN, :HIDDEN]
    expected = codes.view(torch.float8_e4m3fn).float() * blocks
    np.testing.assert_array_equal(found, expected.numpy())


def test_the_file_says_what_it_was_made_of(source: Path, tmp_path: Path) -> None:
    """Guards against results that nobody can trace to their inputs."""
    reader = to_gguf(source, tmp_path / "out.gguf")
    field = reader.get_field("edgemoe.convert.input_sha256")
    assert field is not None
    found = dict(reversed(line.split("  ")) for line in field.contents())
    shards = [path for path in source.iterdir() if path.name != "generation_config.json"]
    assert found == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}
    recipe = reader.get_field("edgemoe.convert.recipe")
    assert recipe is not None
    assert json.loads(recipe.contents()) == {"pre_tokenizer": "qwen2", "quant": "F32"}


# ─── the command line ─────────────────────────────────────────────────────────────────────────────────────────────


def run_cli(*arguments: object) -> Result:
    from edgemoe.cli.main import cli

    return CliRunner().invoke(cli, ["convert", "gguf", *map(str, arguments)])


def test_command_line_and_its_exit_codes(source: Path, tmp_path: Path) -> None:
    """Guards against a result that is overwritten unasked, and failures that scripts cannot tell from success."""
    out = tmp_path / "out.gguf"
    done = run_cli(source, out, "--quant", "q8_0", "--pre-tokenizer", "qwen2", "--memory", "4GiB")
    assert (done.exit_code, out.is_file()) == (0, True), done.output
    again = run_cli(source, out, "--quant", "F16", "--pre-tokenizer", "qwen2")
    assert again.exit_code == 1
    assert "the file exists" in again.output
    assert run_cli(source, out, "--quant", "F16", "--pre-tokenizer", "qwen2", "--force").exit_code == 0
    assert gguf.GGUFReader(out).get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_F16
    unknown = run_cli(source, tmp_path / "other.gguf", "--quant", "Q17", "--pre-tokenizer", "qwen2")
    assert unknown.exit_code == 1
    assert "no such preset" in unknown.output
    assert run_cli(source).exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf"]
