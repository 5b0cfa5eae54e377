# SPDX-License-Identifier: MIT
"""GGUF to GGUF: bytes against llama.cpp's own quantizer, and importance matrices as its tools write them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from edgemoe.converters.quantize import presets  # noqa: E402
from edgemoe.converters.quantize.importance import read_importance  # noqa: E402
from edgemoe.converters.requantize import Recipe, requantize  # noqa: E402
from edgemoe.converters.unpacked import UnpackedLlama  # noqa: E402
from edgemoe.errors import ConversionError, EdgeMoeError  # noqa: E402
from tests.conftest import ModelWriter  # noqa: E402
from tests.converters.stock_quantize import N_STACKED, TinyModel, stock_quantize  # noqa: E402

TINY = TinyModel("olmoe", 8, 16)


def tensors_of(path: Path) -> dict[str, tuple[object, bytes]]:
    return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}


def write_importance(path: Path, *, drop: str = "", n_columns: int = 256) -> dict[str, np.ndarray]:
    """An importance matrix as llama.cpp's tool writes it; the means. Expert 1 of layer 3's gate was never reached."""
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    means = {}
    for name, shape in TINY.shapes():
        if not presets.is_quantizable(presets.Tensor(name, shape)) or name in ("token_embd.weight", "output.weight"):
            continue
        n_matrices = shape[0] if len(shape) == 3 else 1
        sums = rng.random((n_matrices, n_columns)).astype(np.float32) * 100
        counts = rng.integers(1, 50, (n_matrices, 1)).astype(np.float32)
        if name == "blk.3.ffn_gate_exps.weight":
            sums[1], counts[1] = 0, 0
        means[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
        writer.add_tensor(name + ".in_sum2", sums)
        if name != drop:
            writer.add_tensor(name + ".counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return means


@pytest.mark.parametrize("has_importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("preset", ["Q4_K_M", "Q8_0", "IQ4_XS", "BF16"])
def test_a_requantized_file_has_llama_cpps_tensors(preset: str, has_importance: bool, tmp_path: Path) -> None:
    """Guards against an importance that goes to another expert or tensor, and rows out of order."""
    source, out, stock, matrix = (tmp_path / name for name in ("in.gguf", "out.gguf", "stock.gguf", "imatrix.gguf"))
    TINY.write(source)
    means = write_importance(matrix) if has_importance else {}
    importance = read_importance(matrix).for_tensors(TINY.tensors()) if has_importance else {}
    requantize(source, out, Recipe(preset, importance=importance))
    assert stock_quantize(source, stock, presets.file_type(preset), means or None)
    assert tensors_of(out) == tensors_of(stock)
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["in.gguf", "out.gguf", "stock.gguf", *(["imatrix.gguf"] if has_importance else [])]
    )


def test_a_requantized_model_runs_and_says_how_it_was_made(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against lost metadata and tensors that llama.cpp finds elsewhere than they are."""
    source = write_model("qwen3moe", quant="F32", dense_quant="F32")
    out = tmp_path / "out.gguf"
    plan = requantize(source, out, Recipe("Q8_0"))
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(out)
    assert after.get_field("general.file_type").contents() == 7
    assert after.get_field("edgemoe.quantize.recipe").contents() == '{"quant": "Q8_0"}'
    for key, field in before.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.file_type", "general.quantization_version"):
            assert after.get_field(key).contents() == field.contents(), key
    assert plan.n_bytes == sum(int(tensor.n_bytes) for tensor in after.tensors)
    stock = tmp_path / "stock.gguf"
    assert stock_quantize(source, stock, presets.file_type("Q8_0"))
    logits = []
    for path in (stock, out):
        llama = UnpackedLlama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
        llama.eval(list(range(5, 37)))
        logits.append(np.array(llama.scores[:32]))
        llama.close()
    np.testing.assert_array_equal(*logits)


def test_what_is_quantized_does_not_grow(tmp_path: Path) -> None:
    """Guards against files that grow without gaining anything, and against bytes changed on the way."""
    source, coarse, out = (tmp_path / name for name in ("in.gguf", "coarse.gguf", "out.gguf"))
    TINY.write(source)
    requantize(source, coarse, Recipe("Q4_0"))
    plan = requantize(coarse, out, Recipe("Q8_0"))
    assert "blk.0.ffn_up_exps.weight" in plan.kept and not plan.requantized
    assert tensors_of(out) == tensors_of(coarse)
    plan = requantize(
        coarse, out, Recipe("Q2_K", overrides=(presets.Override("ffn_down", gguf.GGMLQuantizationType.Q3_K),))
    )
    assert "blk.0.ffn_up_exps.weight" in plan.requantized
    assert plan.types["output.weight"].name == "Q6_K"  # the preset's type and the source's, neither kept nor lossy
    assert "output.weight" not in plan.kept


def test_a_weight_that_is_not_finite_is_found(tmp_path: Path) -> None:
    """Guards against NaN that goes into a file of which nobody looks at the numbers, and half a file."""
    source = tmp_path / "in.gguf"
    TINY.write(source)
    reader = gguf.GGUFReader(source)
    offset = next(int(tensor.data_offset) for tensor in reader.tensors if tensor.name == "blk.2.ffn_up_exps.weight")
    with source.open("r+b") as file:
        file.seek(offset + 4 * (2 * 256 + 7))  # expert 1, row 0, column 7
        file.write(struct.pack("<f", float("nan")))
    with pytest.raises(ConversionError, match=r"found nan \(row 0, column 7\).*blk\.2\.ffn_up_exps\.weight, matrix 1"):
        requantize(source, tmp_path / "out.gguf", Recipe("Q8_0"))
    assert os.listdir(tmp_path) == ["in.gguf"]
    with pytest.raises(ConversionError, match="onto itself"):
        requantize(source, source, Recipe("Q8_0"))


def test_importance_of_both_formats_is_the_same(tmp_path: Path) -> None:
    """Guards against sums taken for means, and calls taken for tokens, in the older format."""
    means = write_importance(tmp_path / "new.gguf")
    n_calls = 7
    with (tmp_path / "old.dat").open("wb") as file:
        file.write(struct.pack("<i", len(means)))
        for name, mean in means.items():
            file.write(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, mean.size))
            file.write((mean * n_calls).astype(np.float32).tobytes())
        file.write(struct.pack("<ii", n_calls, 4) + b"text")
    new, old = read_importance(tmp_path / "new.gguf"), read_importance(tmp_path / "old.dat")
    assert new.unreached == {"blk.3.ffn_gate_exps.weight": 1}
    for name, mean in means.items():
        np.testing.assert_allclose(new.means[name], mean.ravel(), rtol=1e-6)
        np.testing.assert_allclose(old.means[name], mean.ravel(), rtol=1e-6)
    assert new.for_tensors(TINY.tensors())["blk.3.ffn_gate_exps.weight"].shape == (N_STACKED, 256)
    assert (new.for_tensors(TINY.tensors())["blk.3.ffn_gate_exps.weight"][1] == 1).all()


def test_importance_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Guards against importance of another model, and reads past the end of a damaged file."""
    path = tmp_path / "matrix.gguf"
    write_importance(path, n_columns=128)
    with pytest.raises(ConversionError, match=r"found 128 values for blk\.0\.attn_q\.weight, expected 1 x 256"):
        read_importance(path).for_tensors(TINY.tensors())
    with pytest.raises(ConversionError, match="none of the tensors of this model"):
        read_importance(path).for_tensors(TINY.tensors()[:1])
    write_importance(path, drop="blk.0.attn_q.weight")
    with pytest.raises(ConversionError, match=r"found nothing \(blk\.0\.attn_q\.weight\.counts\)"):
        read_importance(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EdgeMoeError, match="truncated"):
        read_importance(path)
    for data in (
        b"",
        b"\x01",
        struct.pack("<iii", 1, 1 << 30, 0),
        struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, -4),
    ):
        path.write_bytes(data)
        with pytest.raises(ConversionError, match="truncated, or no importance matrix"):
            read_importance(path)
    with pytest.raises(ConversionError, match="No such file"):
        read_importance(tmp_path / "none")
