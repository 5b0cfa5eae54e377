# SPDX-License-Identifier: MIT
"""Presets, against the files that llama.cpp's own `llama_model_quantize` writes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from gguf import GGMLQuantizationType as GgmlType  # noqa: E402

from edgemoe.converters.quantize import blocks, presets  # noqa: E402
from edgemoe.converters.quantize.presets import Model, Override, Tensor  # noqa: E402
from edgemoe.errors import ConversionError  # noqa: E402
from tests.converters.stock_quantize import TinyModel, stock_quantize  # noqa: E402

MODELS = {
    "16 experts, 16 layers": TinyModel("olmoe", 16, 16),
    "8 experts, shared keys, tied": TinyModel("llama", 16, 8, n_heads_kv=2, is_tied=True),
    "many experts, shared keys, 27 layers": TinyModel("qwen3moe", 27, 128, n_heads_kv=1),
    "compressed keys, dense layers, odd rows": TinyModel(
        "deepseek2", 9, 64, n_columns=320, n_ff_columns=40, n_dense_layers=1, n_shared=2, compressed_kv=True
    ),
    "rows of 32, 8 experts, tied": TinyModel("llama", 8, 8, n_columns=96, n_ff_columns=32, is_tied=True),
    "dense, 80 layers, shared keys": TinyModel("llama", 80, 0, n_heads_kv=1),
    "dense, fused keys": TinyModel("phi3", 12, 0, fused_qkv=True),
}

Files = dict[str, tuple[Path, dict[str, npt.NDArray[np.float32]]]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("presets")
    return {
        name: (path := folder / f"{index}.gguf", tiny.write(path)) for index, (name, tiny) in enumerate(MODELS.items())
    }


def importance_of(values: dict[str, npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[np.float32]]:
    """An importance (experts, columns) for each tensor that may be quantized."""
    rng = np.random.default_rng(1)
    return {
        name: np.exp(rng.standard_normal((array.shape[0] if array.ndim == 3 else 1, array.shape[-1]))).astype(
            np.float32
        )
        for name, array in values.items()
        if presets.is_quantizable(Tensor(name, array.shape))
    }


@pytest.mark.parametrize("has_importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("preset", presets.PRESETS)
def test_types_and_bytes_are_llama_cpps(preset: str, has_importance: bool, files: Files, tmp_path: Path) -> None:
    """Guards against a preset that is another one than users know, and blocks other than ggml's own.

    The bytes are compared for two of the models: how a tensor came by its type does not matter to them.
    """
    for index, (name, tiny) in enumerate(MODELS.items()):
        source, values = files[name]
        importance = importance_of(values) if has_importance else {}
        expected = tmp_path / "stock.gguf"
        if not stock_quantize(source, expected, presets.file_type(preset), importance or None):
            with pytest.raises(ConversionError, match=r"it needs an importance matrix|no type stands in"):
                presets.choose_types(preset, tiny.tensors(), tiny.model, importance_of=importance)
            continue
        choice = presets.choose_types(preset, tiny.tensors(), tiny.model, importance_of=importance)
        reader = gguf.GGUFReader(expected)
        stock_types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        assert dict(choice.types) == stock_types, name
        assert reader.get_field("general.file_type").contents() == presets.file_type(preset)
        if index not in (1, 3):
            continue
        for tensor in reader.tensors:
            rows = values[tensor.name].reshape(-1, *values[tensor.name].shape[-2:])
            weights = importance.get(tensor.name)
            found = [
                blocks.quantize(matrix.reshape(-1, matrix.shape[-1]), tensor.tensor_type, weight)
                for matrix, weight in zip(rows, [None] * len(rows) if weights is None else weights, strict=True)
            ]
            np.testing.assert_array_equal(np.concatenate(found).ravel(), tensor.data.ravel().view(np.uint8))


def test_fallbacks_are_told() -> None:
    """Guards against tensors that silently get other types, and rows that no type's blocks divide."""
    tiny = MODELS["compressed keys, dense layers, odd rows"]
    choice = presets.choose_types("Q4_K_M", tiny.tensors(), tiny.model)
    assert choice.fallbacks["blk.1.ffn_gate_exps.weight"] is GgmlType.Q4_K
    assert choice.types["blk.1.ffn_gate_exps.weight"] is GgmlType.Q5_0
    assert choice.types["blk.3.ffn_down_exps.weight"] is GgmlType.F16
    assert choice.fallbacks.keys() <= choice.types.keys()
    whole = MODELS["16 experts, 16 layers"]
    assert not presets.choose_types("Q4_K_M", whole.tensors(), whole.model).fallbacks


def test_overrides_are_llama_cpps(files: Files, tmp_path: Path) -> None:
    """Guards against other precedence among patterns, and rules that count overridden tensors."""
    tiny = MODELS["16 experts, 16 layers"]
    source, _ = files["16 experts, 16 layers"]
    overrides = [
        Override(r"blk\.[3-6]\.ffn_down_exps", GgmlType.IQ4_NL),
        Override(r"ffn_down_exps", GgmlType.Q3_K),
        Override(r"blk\.[0-4]\.attn_v", GgmlType.F16),
        Override(r"^output\.weight$", GgmlType.Q5_1),
    ]
    entries = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
    for entry, override in zip(entries, overrides, strict=False):
        entry.pattern, entry.type = override.pattern.encode(), int(override.ggml_type)
    out = tmp_path / "stock.gguf"
    pointer = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    assert stock_quantize(source, out, presets.file_type("Q4_K_M"), tt_overrides=pointer)
    expected = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(out).tensors}
    assert dict(presets.choose_types("Q4_K_M", tiny.tensors(), tiny.model, overrides=overrides).types) == expected


def test_what_cannot_be_chosen_is_an_error() -> None:
    """Guards against misspelt presets and patterns that do nothing, and rules of other architectures applied."""
    tiny = MODELS["16 experts, 16 layers"]
    with pytest.raises(ConversionError, match="'Q4_X': no such preset; use one of F32, "):
        presets.find_preset("Q4_X")
    with pytest.raises(ConversionError, match=r"llama\.cpp has rules of its own"):
        presets.choose_types("Q4_K_M", tiny.tensors(), Model("falcon", 16, 0, 8, 8))
    for pattern, message in (("ffn_dawn", "no tensor that may be quantized"), ("ffn_(", "cannot read the pattern")):
        with pytest.raises(ConversionError, match=message):
            presets.choose_types("Q8_0", tiny.tensors(), tiny.model, overrides=[Override(pattern, GgmlType.Q4_0)])
    with pytest.raises(ConversionError, match=r"found layer 8, expected 0 to 7 \(block_count\)"):
        presets.choose_types("Q4_K_M", tiny.tensors(), Model("olmoe", 8, 16, 8, 8))


@pytest.mark.parametrize(("name", "preset"), [("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("mxfp4", "MXFP4_MOE")])
def test_names_are_found_in_any_case(name: str, preset: str) -> None:
    """Guards against names that llama.cpp takes and we do not."""
    assert presets.find_preset(name) == preset
