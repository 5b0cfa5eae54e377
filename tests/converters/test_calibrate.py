# SPDX-License-Identifier: MIT
"""Importance matrices, compared with what transformers computes from the same weights, and used by llama.cpp."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

from benchmarks import synthetic
from edgemoe import observe
from edgemoe.cli.main import cli
from edgemoe.converters import calibrate as converter
from edgemoe.errors import ConversionError, ModelFormatError
from tests.conftest import ModelWriter
from tests.integration.support import python, set_fewest_slots

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

N_LAYERS, HIDDEN, EXPERT_FF, N_EXPERTS, N_USED, N_VOCAB = 2, 256, 256, 6, 2, 257
TEXT = "Pack_my_box_with_five_dozen_liquor_jugs;17*3=51." * 13  # two chunks of byte tokens; a space would be three
Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Collected:
    """A model, its importance matrix, and what was reported."""

    model: Path
    imatrix: Path
    report: converter.CalibrationReport
    reference: Any


def tiny_transformer() -> Any:
    """A random Qwen3-MoE of transformers; expert 5 of the last layer is never chosen."""
    torch.manual_seed(11)
    config = transformers.Qwen3MoeConfig(
        vocab_size=N_VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=EXPERT_FF,
        num_experts=N_EXPERTS,
        num_experts_per_tok=N_USED,
        norm_topk_prob=True,
        rope_theta=10000.0,
        initializer_range=0.05,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=1.0)
        # Of experts with opposite rows one has a score above 0, so expert 5 of the last layer is never in the top 2.
        router = model.model.layers[-1].mlp.gate.weight
        router[1], router[3], router[5] = -router[0], -router[2], 0.0
    return model


def write_as_gguf(model: Any, path: Path) -> Path:
    """The transformer's weights in F32 under llama.cpp's names, with one token for each byte."""
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(EXPERT_FF)
    writer.add_expert_feed_forward_length(EXPERT_FF)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(N_EXPERTS)
    writer.add_expert_used_count(N_USED)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2] + [6] * 256)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    layer_names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate": "ffn_gate_inp",
    }
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(N_LAYERS):
        theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
        for name, our_name in layer_names.items():
            writer.add_tensor(f"{ours}{our_name}.weight", weights[f"{theirs}{name}.weight"])
        gate_up = weights[f"{theirs}mlp.experts.gate_up_proj"]
        writer.add_tensor(f"{ours}ffn_gate_exps.weight", np.ascontiguousarray(gate_up[:, :EXPERT_FF]))
        writer.add_tensor(f"{ours}ffn_up_exps.weight", np.ascontiguousarray(gate_up[:, EXPERT_FF:]))
        writer.add_tensor(f"{ours}ffn_down_exps.weight", weights[f"{theirs}mlp.experts.down_proj"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sums_of_transformers(model: Any, text: str) -> tuple[Arrays, Arrays]:
    """Sums of squares [matrices, columns] and counts of every product with weights, from hooks in transformers."""
    sums: Arrays = {}
    counts: Arrays = {}

    def add(name: str, rows: npt.NDArray[Any], matrix: int = 0, n_matrices: int = 1) -> None:
        total = sums.setdefault(name, np.zeros((n_matrices, rows.shape[1])))
        total[matrix] += (rows.astype(np.float64) ** 2).sum(axis=0)
        counts.setdefault(name, np.zeros(n_matrices, int))[matrix] += len(rows)

    def of_linear(name: str) -> Any:
        return lambda _module, inputs: add(name, inputs[0].reshape(-1, inputs[0].shape[-1]).numpy())

    def of_experts(layer: int) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            x, chosen = inputs[0], inputs[1]
            for expert in range(N_EXPERTS):
                rows = x[(chosen == expert).any(dim=1)]
                gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                inner = torch.nn.functional.silu(gate) * up
                for name, values in (("gate", rows), ("up", rows), ("down", inner)):
                    add(f"blk.{layer}.ffn_{name}_exps.weight", values.numpy(), expert, N_EXPERTS)

        return hook

    handles = []
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        linear = {"attn_q": attention.q_proj, "attn_k": attention.k_proj, "attn_v": attention.v_proj}
        linear |= {"attn_output": attention.o_proj, "ffn_gate_inp": layer.mlp.gate}
        for name, module in linear.items():
            handles.append(module.register_forward_pre_hook(of_linear(f"blk.{i}.{name}.weight")))
        handles.append(layer.mlp.experts.register_forward_pre_hook(of_experts(i)))
    tokens = [byte + 1 for byte in text.encode()]
    with torch.no_grad():
        for begin in range(0, len(tokens), converter.CHUNK_TOKENS):
            model(torch.tensor([tokens[begin : begin + converter.CHUNK_TOKENS]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return sums, counts


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    folder = tmp_path_factory.mktemp("calibrate")
    transformer = tiny_transformer()
    model = write_as_gguf(transformer, folder / "model.gguf")
    report = converter.calibrate(model, folder / "imatrix.gguf", TEXT, text_name="words.txt")
    return Collected(model, folder / "imatrix.gguf", report, transformer)


def read_imatrix(path: Path) -> tuple[Arrays, Arrays]:
    """Sums [matrices, columns] and counts [matrices] by tensor."""
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    sums = {name.removesuffix(".in_sum2"): data for name, data in tensors.items() if name.endswith(".in_sum2")}
    counts = {name.removesuffix(".counts"): data[:, 0] for name, data in tensors.items() if name.endswith(".counts")}
    assert sums.keys() == counts.keys() and len(tensors) == 2 * len(sums)
    return sums, counts


def test_sums_are_those_of_transformers(collected: Collected) -> None:
    """Guards against: activations of another tensor, expert or token, and strides misread."""
    sums, counts = read_imatrix(collected.imatrix)
    expected_sums, expected_counts = sums_of_transformers(collected.reference, TEXT)
    assert sums.keys() == expected_sums.keys()
    n_compared = 0
    for name, expected in expected_sums.items():
        assert sums[name].shape == expected.shape
        reached = expected_counts[name] > 0
        n_compared += reached.sum()
        np.testing.assert_array_equal(counts[name][reached], expected_counts[name][reached])
        scale = expected[reached].max(axis=1, keepdims=True)
        assert np.abs(sums[name][reached] - expected[reached]).max() <= 1e-3 * scale.max(), name
        np.testing.assert_allclose(sums[name][reached].sum(axis=1), expected[reached].sum(axis=1), rtol=1e-3)
    assert n_compared == 2 * 5 + 3 * (N_EXPERTS + N_EXPERTS - 1)


def test_experts_never_reached_are_told_and_get_the_layers_mean(collected: Collected) -> None:
    """Guards against: an expert without data that is quantized as if none of its columns, or noise, mattered."""
    assert collected.report.unreached == [(1, 5)]
    assert collected.report.n_experts == 2 * N_EXPERTS
    sums, counts = read_imatrix(collected.imatrix)
    for part in ("gate", "up"):
        name = f"blk.1.ffn_{part}_exps.weight"
        assert counts[name][5] == 1
        mean = sums[name][:5].sum(axis=0) / counts[name][:5].sum()
        np.testing.assert_allclose(sums[name][5], mean, rtol=1e-5)
    down = sums["blk.1.ffn_down_exps.weight"][5]
    assert (down == down[0]).all() and down[0] > 0
    listed = gguf.GGUFReader(collected.imatrix).fields["edgemoe.calibrate.unreached"].contents()
    assert listed == [1, 5]


def test_one_expert_for_each_token(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: the input of down taken for one that all experts share, where both have the same shape."""
    model = write_model("olmoe", n_experts=32, n_experts_used=1)
    report = converter.calibrate(model, tmp_path / "imatrix.gguf", TEXT, max_tokens=16)
    assert report.unreached
    sums, _ = read_imatrix(tmp_path / "imatrix.gguf")
    for layer, expert in report.unreached:
        up, down = (sums[f"blk.{layer}.ffn_{part}_exps.weight"][expert] for part in ("up", "down"))
        assert np.ptp(up) > 0 and np.ptp(down) == 0


def test_the_format_is_that_of_llama_cpp(collected: Collected) -> None:
    """Guards against: keys and shapes that tools/quantize of llama.cpp refuses (common/imatrix-loader.cpp)."""
    reader = gguf.GGUFReader(collected.imatrix)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "imatrix"
    assert values["imatrix.datasets"] == ["words.txt"]
    assert values["imatrix.chunk_count"] == 2
    assert values["imatrix.chunk_size"] == 512
    shapes = {t.name: [int(n) for n in t.shape] for t in reader.tensors}
    assert shapes["blk.0.ffn_down_exps.weight.in_sum2"] == [EXPERT_FF, N_EXPERTS]
    assert shapes["blk.0.ffn_down_exps.weight.counts"] == [1, N_EXPERTS]
    assert shapes["blk.0.attn_q.weight.in_sum2"] == [HIDDEN, 1]
    stems = [t.name.rpartition(".")[0] for t in reader.tensors]
    assert stems == sorted(stems)


def quantize_with_llama_cpp(model: Path, out: Path, importance: Arrays) -> Path:
    """llama.cpp's own quantization of everything to Q2_K with these importances [matrices * columns]."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    kept = {name: np.ascontiguousarray(data.reshape(-1), np.float32) for name, data in importance.items()}
    for entry, (name, data) in zip(entries, kept.items(), strict=False):
        entry.name, entry.size = name.encode(), data.size
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K
    params.pure, params.nthread = True, 1
    if importance:
        params.imatrix = entries
    assert llama_cpp.llama_model_quantize(str(model).encode(), str(out).encode(), ctypes.byref(params)) == 0
    return out


def test_llama_cpp_quantizes_with_it(collected: Collected, tmp_path: Path) -> None:
    """Guards against: names or sizes that llama.cpp does not find, and an importance that makes experts worse."""
    sums, counts = read_imatrix(collected.imatrix)
    importance = {name: data / counts[name][:, None] for name, data in sums.items()}
    files = {
        "with": quantize_with_llama_cpp(collected.model, tmp_path / "with.gguf", importance),
        "without": quantize_with_llama_cpp(collected.model, tmp_path / "without.gguf", {}),
    }
    errors = {}
    exact = {t.name: t.data for t in gguf.GGUFReader(collected.model).tensors}
    for label, path in files.items():
        tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
        for name in ("blk.0.ffn_down_exps.weight", "blk.1.ffn_down_exps.weight"):
            assert tensors[name].tensor_type == gguf.GGMLQuantizationType.Q2_K
            values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).reshape(exact[name].shape)
            weighted = (values - exact[name]) ** 2 * importance[name][:, None, :]
            errors[label, name] = weighted[:5].sum()
    for name in ("blk.0.ffn_down_exps.weight", "blk.1.ffn_down_exps.weight"):
        assert errors["with", name] < errors["without", name]


def test_the_same_text_gives_the_same_bytes(collected: Collected, tmp_path: Path) -> None:
    """Guards against: results that depend on threads, time or the order of a dictionary."""
    again = tmp_path / "again.gguf"
    converter.calibrate(collected.model, again, TEXT, text_name="words.txt")
    assert again.read_bytes() == collected.imatrix.read_bytes()


@pytest.mark.parametrize("arch", ["deepseek2", "gpt-oss", "deepseek2-merged", "olmoe"])
def test_streamed_experts_give_the_same_bytes(
    write_model: ModelWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    """Guards against: a model larger than the budget whose experts are read too late, or whose products have other
    bits, where llama.cpp asks for them one by one."""
    misses = []

    class Smallest(observe._ObservedLlama):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            set_fewest_slots(self)

        def close(self) -> None:
            if self._runtime is not None:
                misses.append(self.stats().expert_misses)
            super().close()

    monkeypatch.setattr(observe, "_ObservedLlama", Smallest)
    model, text = write_model(arch), tmp_path / "words.txt"
    text.write_text(TEXT)
    command = ["calibrate", str(model), "--text", str(text), "--output", str(tmp_path / "streamed.gguf")]
    run = CliRunner().invoke(cli, [*command, "--max-tokens", "600"])
    assert run.exit_code == 0, run.output
    assert misses and misses[0] > 0
    converter.calibrate(model, tmp_path / "stock.gguf", TEXT, text_name="words.txt", max_tokens=600)
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "stock.gguf").read_bytes()


WITHIN = """
import functools, json, pathlib, sys
import edgemoe
from edgemoe.converters import calibrate
from edgemoe.converters.upcycle import default_calibration_text
from edgemoe.formats.gguf import read_model
from edgemoe.observe import observed_context
path = pathlib.Path(sys.argv[1])
model = read_model(path)
reserved = calibrate.collected_bytes(model)
plan = edgemoe.plan(path, n_ctx=512, logits_all=True, kernels="ggml")
memory = plan.floor_bytes + reserved + plan.expert_bank_bytes // 5
context = functools.partial(observed_context, memory_bytes=memory, reserved_bytes=reserved)
calibrate.calibrate(path, pathlib.Path(sys.argv[2]), default_calibration_text(), max_tokens=1024, open_context=context)
peak = int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
print(json.dumps([peak, memory, plan.floor_bytes + plan.expert_bank_bytes]))
"""


def test_it_stays_within_its_memory(tmp_path: Path) -> None:
    """Guards against: sums, activations or logits that no budget knows, for a model of which a fifth fits."""
    path = synthetic.write_preset(tmp_path / "olmoe.gguf", "olmoe", n_layers=2, expert_ff=768, n_vocab=8192)
    done = python(WITHIN, path, tmp_path / "imatrix.gguf")
    assert done.returncode == 0, done.stderr
    peak_bytes, memory_bytes, everything_bytes = json.loads(done.stdout.splitlines()[-1])
    assert peak_bytes <= memory_bytes < everything_bytes


def test_too_little_memory_is_refused(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a load that fails, or swaps, after it has begun; and a hint that is too low to follow."""
    command = ["calibrate", str(write_model("olmoe")), "--output", str(tmp_path / "imatrix.gguf")]
    run = CliRunner().invoke(cli, [*command, "--memory", "64MiB"])
    assert run.exit_code == 1 and "is below the floor" in run.stderr and "MiB more for what is collected" in run.stderr
    assert list(tmp_path.glob("*imatrix*")) == []


@pytest.mark.parametrize("arch", ["deepseek2", "gpt-oss", "deepseek2-merged"])
def test_other_products(write_model: ModelWriter, tmp_path: Path, arch: str) -> None:
    """Guards against: stacked attention matrices, merged gate and up, and quantized experts that are not understood."""
    model = write_model(arch)
    report = converter.calibrate(model, tmp_path / "imatrix.gguf", TEXT, max_tokens=100)
    sums, counts = read_imatrix(tmp_path / "imatrix.gguf")
    assert report.n_tokens == 101 and report.n_chunks == 1  # 100, and the one that begins a text
    tensors = {t.name: t for t in gguf.GGUFReader(model).tensors if t.name.startswith("blk.") and len(t.shape) > 1}
    assert sums.keys() == {name for name in tensors if name.endswith(".weight")}
    for name, data in sums.items():
        n_columns, *rest = (int(n) for n in tensors[name].shape)
        assert data.shape == (rest[1] if len(rest) == 2 else 1, n_columns), name
        if "_exps" in name:
            assert len(counts[name]) == rest[1]
            assert counts[name].sum() >= 101 * 2
        else:
            assert len(counts[name]) == 1 and counts[name][0] == 101, name


def test_what_cannot_be_calibrated(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: an empty or worthless matrix where the input is wrong, and a traceback from a callback."""
    out = tmp_path / "imatrix.gguf"
    with pytest.raises(ConversionError, match="the text has 0 tokens, expected at least 16"):
        converter.calibrate(write_model("olmoe"), out, "")
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"no model")
    with pytest.raises(ModelFormatError, match="is it a GGUF file"):
        converter.calibrate(garbage, out, TEXT)
    assert not out.exists()


def test_broken_weights_are_told(collected: Collected, tmp_path: Path) -> None:
    """Guards against: a matrix of NaN, which llama.cpp's quantizer would only refuse much later."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(collected.model.read_bytes())
    tensors = {t.name: t for t in gguf.GGUFReader(broken).tensors}
    with broken.open("r+b") as file:
        file.seek(int(tensors["blk.0.attn_norm.weight"].data_offset))
        file.write(np.full(4, np.nan, np.float32).tobytes())
    with pytest.raises(ConversionError, match=r"an activation before blk\.0\.attn_[qkv]\.weight is not finite"):
        converter.calibrate(broken, tmp_path / "imatrix.gguf", TEXT)


def test_memory_does_not_grow_with_the_text(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: activations that are kept until the end of the text."""
    model, peaks = write_model("olmoe"), []
    converter.calibrate(model, tmp_path / "warm.gguf", TEXT)
    for n_repeats in (2, 8):
        tracemalloc.start()
        converter.calibrate(model, tmp_path / "imatrix.gguf", TEXT * n_repeats)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 16 tensors of 256 columns for each of 3900 more tokens would be 64 MB.
    assert peaks[1] - peaks[0] < 2 << 20, peaks


def test_the_command(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a report that scripts cannot read, and an overwritten model."""
    out, text = tmp_path / "imatrix.gguf", tmp_path / "words.txt"
    text.write_text(TEXT)
    command = ["calibrate", str(write_model("olmoe")), "--text", str(text), "--output", str(out)]
    run = CliRunner().invoke(cli, [*command, "--json", "--max-tokens", "64"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["n_tokens"] == 65 and report["n_experts"] == 16
    run = CliRunner().invoke(cli, [*command, "--force"])
    assert run.exit_code == 0 and "experts: 16, the median one chosen by" in run.stdout
    assert CliRunner().invoke(cli, command).exit_code == 1
    text.write_bytes(b"\xff")
    run = CliRunner().invoke(cli, [*command, "--force"])
    assert run.exit_code == 1 and "byte 0 is not UTF-8" in run.stderr
