# SPDX-License-Identifier: MIT
"""Exported ONNX folders against transformers, in stock ONNX Runtime, in edgemoe, and in onnxruntime-genai.

Checkpoints' matrices lie on the grid of the quantization already (`onnx_checkpoints`), so transformers computes with
the dequantized weights. Relative errors are max |a - b| / max |b| over all positions and the vocabulary.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("torch", "transformers", "safetensors.torch", "tokenizers", "sentencepiece"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra edgemoe[verify])")

from edgemoe import _native
from edgemoe.converters.onnx import blocks
from edgemoe.converters.onnx.checkpoint import Recipe, export_checkpoint, plan_export
from edgemoe.formats.onnx_model import read_model
from edgemoe.onnx import PROVIDER, InferenceSession
from tests.converters import checkpoints
from tests.converters.onnx_checkpoints import Floats, Runner, all_logits, greedy, relative_error, write_checkpoint
from tests.converters.onnx_genai import genai_model, generate

FAMILIES = (
    "deepseek-v2-lite",
    "deepseek-v3",
    "gpt-oss",
    "gpt-oss-bf16",
    "granitemoe",
    "granitemoe-shared",
    "lfm2moe",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2moe",
    "qwen3moe",
)
TOLERANCE = 1e-5
N_TOKENS, N_PROMPT = 48, 24
TOKENS = checkpoints.random_tokens(1, N_TOKENS)[0]

Made = tuple[Path, Floats]
Maker = Callable[..., Made]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Exports a checkpoint, once: the .onnx file, and transformers' logits (position, vocabulary) of TOKENS."""
    folder = tmp_path_factory.mktemp("onnx")
    made: dict[tuple[str, Recipe], Made] = {}

    def make(family: str, recipe: Recipe | None = None) -> Made:
        recipe = recipe or Recipe()
        key = (family, recipe)
        if key not in made:
            name = f"{family}-{len(made)}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checkpoint = write_checkpoint(folder / name, family, int(recipe.quant.removeprefix("int")))
                logits = checkpoints.reference_logits(checkpoint, [TOKENS], is_as_published=True)[0]
            export_checkpoint(plan_export(checkpoint.path, recipe), folder / f"{name}.onnx")
            made[key] = (folder / f"{name}.onnx" / "model.onnx", logits)
        return made[key]

    return make


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


def stock(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, _options())


def streamed(path: Path) -> InferenceSession:
    return InferenceSession(path, memory="16GiB", sess_options=_options())


@pytest.mark.parametrize("open_session", [stock, streamed])
@pytest.mark.parametrize("family", FAMILIES)
def test_int4_computes_what_transformers_does(exported: Maker, family: str, open_session: Any) -> None:
    """Guards against: a tensor misnamed, transposed or packed wrongly; rope, windows, sinks, norms, scales, groups and
    mixing weights that are not the model's; a cache that is off by a position."""
    path, expected = exported(family)
    found = all_logits(open_session(path), TOKENS, N_PROMPT)
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("family", ["deepseek-v3", "gpt-oss", "olmoe"])
def test_int8_computes_what_transformers_does(exported: Maker, family: str) -> None:
    """Guards against: 8-bit weights packed wrongly. Stock quantizes activations of blockwise 8-bit experts, so that it
    is no reference (docs/onnx.md)."""
    path, expected = exported(family, Recipe("int8"))
    assert relative_error(all_logits(streamed(path), TOKENS, N_PROMPT), expected) <= TOLERANCE


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_accuracy_level_4_rounds_activations(exported: Maker, quant: str) -> None:
    """Guards against: an option that reaches some products only, and one that is honoured here and not in stock, or the
    other way round. What 8-bit activations cost a random model is what they cost it in stock, about."""
    path, expected = exported("qwen3moe", Recipe(quant, accuracy_level=4))
    products = [n for n in onnx.load(path, load_external_data=False).graph.node if n.op_type in ("MatMulNBits", "QMoE")]
    assert len(products) > 8
    for node in products:
        assert [a.i for a in node.attribute if a.name == "accuracy_level"] == [4], node.name
    of_stock = relative_error(all_logits(stock(path), TOKENS, N_PROMPT), expected)
    ours = relative_error(all_logits(streamed(path), TOKENS, N_PROMPT), expected)
    assert 100 * TOLERANCE < of_stock
    assert ours == pytest.approx(of_stock, rel=0.25)


@pytest.mark.parametrize("family", ["granitemoe-shared", "lfm2moe"])
def test_a_dense_part_in_floats_computes_the_same(exported: Maker, family: str) -> None:
    """Guards against: `--dense fp32` with another product than the quantized one, an embedding as it is stored that is
    the output's matrix too, and one in 4 bits."""
    path, expected = exported(family, Recipe(dense="fp32", embedding="stored" if family == "lfm2moe" else "int4"))
    assert relative_error(all_logits(streamed(path), TOKENS, N_PROMPT), expected) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_stock(exported: Maker, family: str) -> None:
    """Guards against: experts streamed while generating that are not those of the file."""
    path, _ = exported(family)
    ours = streamed(path)
    assert greedy(ours, TOKENS[:N_PROMPT], 16) == greedy(stock(path), TOKENS[:N_PROMPT], 16)
    assert ours.stats().n_streamed_nodes == len(read_model(path).moe_nodes) > 0
    assert ours.stats().n_other_moe_nodes == 0


@pytest.mark.parametrize("family", ["olmoe", "deepseek-v3", "gpt-oss", "lfm2moe"])
def test_logits_do_not_depend_on_what_is_resident(exported: Maker, family: str) -> None:
    """Guards against: the bits of an answer depending on the budget."""
    path, _ = exported(family)
    everything = streamed(path)
    expected = all_logits(everything, TOKENS, N_PROMPT)
    floor, bank = everything.plan.token_cycle_bytes, everything.plan.expert_bank_bytes
    for slots_bytes in (floor, (3 * floor + bank) // 4, (floor + bank) // 2, (floor + 3 * bank) // 4):
        session = streamed(path)
        _native.set_slots_bytes(session._runtime, slots_bytes)
        np.testing.assert_array_equal(all_logits(session, TOKENS, N_PROMPT), expected)
        if slots_bytes == floor:
            assert session.stats().expert_misses > 3 * everything.stats().expert_misses


@pytest.mark.parametrize("family", ["deepseek-v3", "gpt-oss", "lfm2moe", "olmoe", "phimoe"])
def test_routers_are_found_in_the_graph(exported: Maker, family: str) -> None:
    """Guards against: routers written such that the next layer's experts cannot be foretold by them."""
    path, _ = exported(family)
    session = InferenceSession(path, "16GiB", _options(), prefetch="1", warm_start=False)
    _native.set_slots_bytes(session._runtime, session.plan.token_cycle_bytes)
    all_logits(session, TOKENS, N_PROMPT)
    stats, tensor = session.stats(), session._loaded.tensors[0]
    assert stats.n_predicted_nodes == stats.n_streamed_nodes
    chance = tensor.n_experts_used / tensor.n_experts
    assert stats.predicted_right >= (1 + chance) / 2 * stats.predicted > 0


def test_sequences_of_a_batch_do_not_mix(exported: Maker) -> None:
    """Guards against: a graph that was made for one sequence."""
    path, expected = exported("qwen3moe")
    session = stock(path)
    runner = Runner(session)
    feed: dict[str, Any] = {name: np.repeat(value, 2, axis=0) for name, value in runner._cache.items()}
    feed["input_ids"] = np.array([TOKENS, TOKENS[::-1]], np.int64)
    feed["attention_mask"] = np.ones((2, N_TOKENS), np.int64)
    found = session.run(["logits"], feed)[0]
    assert relative_error(found[0], expected) <= TOLERANCE
    assert relative_error(found[1], Runner(session)(TOKENS[::-1])) <= TOLERANCE


@pytest.mark.parametrize("family", ["gpt-oss", "lfm2moe", "olmoe", "qwen3moe"])
def test_a_shorter_sequence_of_a_batch_is_filled_up_on_the_right(exported: Maker, family: str) -> None:
    """Guards against: positions, windows or convolutions counted from the padded end, and padding that is attended
    to; tokens of padding have experts as well, which must change nothing."""
    path, expected = exported(family)
    session = streamed(path)
    n_short = N_TOKENS // 3
    feed: dict[str, Any] = {name: np.repeat(value, 2, axis=0) for name, value in Runner(session)._cache.items()}
    feed["input_ids"] = np.array([TOKENS, TOKENS[:n_short] + [0] * (N_TOKENS - n_short)], np.int64)
    feed["attention_mask"] = np.ones((2, N_TOKENS), np.int64)
    feed["attention_mask"][1, n_short:] = 0
    found = session.run(["logits"], feed)[0]
    assert relative_error(found[0], expected) <= TOLERANCE
    assert relative_error(found[1, :n_short], expected[:n_short]) <= TOLERANCE


@pytest.mark.parametrize("family", ["gpt-oss", "olmoe"])
def test_a_batch_goes_on_after_padding(exported: Maker, family: str) -> None:
    """Guards against: the next token of a shorter sequence after its padding instead of in its place; rows of a batch
    whose lengths our session does not keep apart as stock does."""
    path, expected = exported(family)
    n_long, n_short, n_new = N_TOKENS - 8, N_TOKENS // 3, 8
    ours, theirs = streamed(path), stock(path)
    names = [output.name for output in theirs.get_outputs()]
    feed: dict[str, Any] = {name: np.repeat(value, 2, axis=0) for name, value in Runner(theirs)._cache.items()}
    inputs = np.array([TOKENS[:n_long], TOKENS[:n_short] + [0] * (n_long - n_short)], np.int64)
    mask = np.ones((2, n_long), np.int64)
    mask[1, n_short:] = 0
    for step in range(n_new + 1):
        given = {**feed, "input_ids": inputs, "attention_mask": mask}
        found = dict(zip(names, ours.run(None, given), strict=True))
        logits, stocks = found["logits"], theirs.run(["logits"], given)[0]
        n_valid = n_short if step == 0 else 1
        assert relative_error(logits[0], stocks[0]) <= TOLERANCE
        assert relative_error(logits[1, :n_valid], stocks[1, :n_valid]) <= TOLERANCE
        if step > 0:
            assert relative_error(logits[0, 0], expected[n_long + step - 1]) <= TOLERANCE
            assert relative_error(logits[1, 0], expected[n_short + step - 1]) <= TOLERANCE
        if step == n_new:
            return
        feed = {name: found[name.replace("past_key_values", "present").replace("past.", "present.")] for name in feed}
        inputs = np.array([[TOKENS[n_long + step]], [TOKENS[n_short + step]]], np.int64)
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)


@pytest.mark.parametrize("family", ["olmoe", "gpt-oss"])
def test_experts_lie_at_pages_of_a_file_of_their_own(exported: Maker, family: str) -> None:
    """Guards against: experts that cannot be read past the page cache, or that ONNX Runtime maps with the rest."""
    model = read_model(exported(family)[0])
    names = {name for node in model.moe_nodes for name in node.inputs if name.endswith(("_q", "_scales"))}
    assert len(names) == 4 * len(model.moe_nodes)
    for tensor in model.tensors.values():
        if tensor.path is not None:
            assert tensor.offset % 4096 == 0
            assert (tensor.path.name == "experts.bin") == (tensor.name in names)


@pytest.mark.parametrize("provider", [None, PROVIDER])
@pytest.mark.parametrize("family", FAMILIES)
def test_genai_generates_from_the_folder(exported: Maker, genai: Any, family: str, provider: str | None) -> None:
    """Guards against: names, shapes or a genai_config.json that onnxruntime-genai does not take, with its own kernels
    or with our provider in it."""
    path, _ = exported(family)
    model = genai_model(genai, path.parent, provider)
    assert generate(genai, model, TOKENS[:N_PROMPT], 16) == greedy(stock(path), TOKENS[:N_PROMPT], 16)


def test_genai_generates_with_our_custom_operators(exported: Maker, genai: Any) -> None:
    """Guards against: options of a session that do not reach operators through onnxruntime-genai."""
    path, _ = exported("olmoe")
    config = genai.Config(str(path.parent))
    entries = {"model_path": str(path), "publish": "1"}
    session = {f"ep.edgemoeexecutionprovider.{key}": value for key, value in entries.items()}
    session["custom_ops_library"] = str(_native.ort_plugin_path())
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    found = generate(genai, genai.Model(config), TOKENS[:N_PROMPT], 16)
    assert _native.take_ort_loaded().n_layers > 0
    assert found == greedy(stock(path), TOKENS[:N_PROMPT], 16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 128])
def test_matrices_are_quantized_as_onnx_runtime_does(bits: int, block: int) -> None:
    """Guards against: another rounding or scale than ONNX Runtime's own quantizer has, and nibbles the wrong way."""
    from onnxruntime.capi import _pybind_state

    n_rows, n_columns = 48, 320
    values = np.random.default_rng(0).standard_normal((n_rows, n_columns)).astype(np.float32)
    values[3, :block] = 0
    grid = blocks.Grid(bits, block)
    packed, scales = blocks.quantize(values, grid)
    n_blocks = -(-n_columns // block)
    theirs = np.zeros((n_rows, n_blocks, block * bits // 8), np.uint8)
    their_scales = np.zeros(n_rows * n_blocks, np.float32)
    zero_points = np.zeros(n_rows * n_blocks, np.uint8)
    quantizer = getattr(_pybind_state, f"quantize_matmul_{bits}bits")
    quantizer(theirs, np.ascontiguousarray(values.T), their_scales, zero_points, block, n_rows, n_columns, True)
    np.testing.assert_array_equal(scales.reshape(-1), their_scales)
    assert packed.shape == (n_rows, grid.row_bytes(n_columns))
    # Columns beyond the last are padding: whatever they are, they are multiplied with nothing.
    shape = (n_rows, n_columns * bits // 8)
    found, expected = packed[:, : shape[1]], theirs.reshape(n_rows, -1)[:, : shape[1]]
    np.testing.assert_array_equal(found, expected)


def test_a_grid_is_kept_exactly() -> None:
    """Guards against: checkpoints on a grid that are rounded after all, which would make the tests above moot."""
    values = np.random.default_rng(0).integers(-7, 8, (16, 64)).astype(np.float32) / 4
    values[:, ::32] = 2.0
    packed, scales = blocks.quantize(values, blocks.Grid(4, 32))
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(16, 2, 32).astype(np.float32) - 8
    np.testing.assert_array_equal((codes * scales[:, :, None]).reshape(16, 64), values)
