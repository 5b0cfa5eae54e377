# SPDX-License-Identifier: MIT
"""Mixed precision: scores with known answers, and the comparison with a single type, end to end on tiny models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from gguf import GGMLQuantizationType as GgmlType  # noqa: E402

from edgemoe.cli.main import cli  # noqa: E402
from edgemoe.converters import gemq, mixed_precision  # noqa: E402
from edgemoe.converters.calibrate import calibrate  # noqa: E402
from edgemoe.converters.cross_entropy import compare, negative_log_likelihoods  # noqa: E402
from edgemoe.converters.quantize import alphaq, blocks  # noqa: E402
from edgemoe.converters.quantize.allocation import Group, Option  # noqa: E402
from edgemoe.converters.quantize.distortion import Sample, distortions, spread  # noqa: E402
from edgemoe.converters.quantize.importance import read_importance  # noqa: E402
from edgemoe.converters.unpacked import UnpackedLlama  # noqa: E402
from edgemoe.errors import ConversionError  # noqa: E402
from tests.conftest import ModelWriter  # noqa: E402

TEXT = "The quick brown fox jumps over the lazy dog; 12 + 30 = 42. " * 6
HOLDOUT = "Sphinx of black quartz, judge my vow. Pack my box with five dozen jugs. " * 5


def silent(_stage: str, _done: int, _total: int) -> None:
    """No progress."""


def matrix_of_tail(exponent: float, seed: int) -> np.ndarray:
    """512 x 512 floats whose 128 x 128 blocks have squared singular values of density lambda ** -exponent."""
    rng = np.random.default_rng(seed)

    def block() -> np.ndarray:
        eigenvalues = rng.random(128) ** (-1 / (exponent - 1))
        left, right = (np.linalg.qr(rng.standard_normal((128, 128)))[0] for _ in range(2))
        return (left * np.sqrt(eigenvalues)) @ right

    return np.block([[block() for _ in range(4)] for _ in range(4)]).astype(np.float32)


def test_tail_exponents_of_known_spectra_are_found() -> None:
    """Guards against singular values not squared, the wrong end of the spectrum, and blocks cut across each other.

    Hill's estimator over k = 204 values has a relative standard error of 1 / sqrt(204) = 7 % in alpha - 1.
    """
    for exponent in (1.5, 2.5, 4.0):
        found = alphaq.tail_exponent([matrix_of_tail(exponent, seed=1)])
        assert abs(found - exponent) < 3 * 0.07 * (exponent - 1)
    weights = alphaq.weigh({"heavy": 1.5, "middle": 2.0, "light": 4.0, "zeros": float("inf")})
    assert weights["heavy"] > weights["middle"] == 1 > weights["light"] > weights["zeros"] == 0


@pytest.mark.parametrize("shape", [(3, 40, 64), (64, 512, 256), (2, 130, 2048), (1, 1, 32)])
def test_samples_lie_within_the_tensor(shape: tuple[int, int, int]) -> None:
    """Guards against rows past the end of an expert, and samples of the first experts only."""
    for pieces in (list(spread(*shape)), alphaq.bands(*shape)):
        assert pieces
        assert all(0 <= matrix < shape[0] and 0 <= row and row + n <= shape[1] for matrix, row, n in pieces)
        assert len({piece[:2] for piece in pieces}) == len(pieces)
        if shape[0] > 1:
            assert {matrix * 2 // shape[0] for matrix, _, _ in pieces} == {0, 1}


def test_distortions_are_the_weighted_errors_of_the_whole() -> None:
    """Guards against errors that are not scaled up from the sample, and importance of another expert."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 64, 256), np.float32) * np.array([1, 2, 3, 4], np.float32)[:, None, None]
    importance = rng.random((4, 256)).astype(np.float32) + 0.1
    shares = np.array([0.5, 1.5, 1, 1], np.float32)
    types = [GgmlType.Q8_0, GgmlType.Q2_K]
    halves = [Sample(matrix[:32], index, 64.0) for index, matrix in enumerate(values)]
    found = distortions(halves, types, importance, weights=shares)
    for ggml_type in types:
        exact = 0.0
        for matrix, columns, share in zip(values, importance, shares, strict=True):
            error = blocks.dequantize(blocks.quantize(matrix, ggml_type, columns), ggml_type) - matrix
            exact += float(share * (error**2 * columns).sum())
        assert found[ggml_type] == pytest.approx(exact, rel=0.05)
    assert found[GgmlType.Q8_0] < 0.01 * found[GgmlType.Q2_K]


def test_likelihoods_are_those_of_llama_cpp_python(write_model: ModelWriter) -> None:
    """Guards against tokens scored with the logits of another position, and chunks that see each other."""
    model = write_model("olmoe", quant="Q8_0")
    found = negative_log_likelihoods(model, TEXT)
    llama = UnpackedLlama(str(model), n_ctx=256, n_batch=256, logits_all=True, verbose=False)
    tokens = llama.tokenize(TEXT.encode(), add_bos=False)
    expected: list[float] = []
    head = [llama.token_bos()] if llama.metadata.get("tokenizer.ggml.add_bos_token", "true") == "true" else []
    for start in range(0, len(tokens), 256 - len(head)):
        chunk = head + tokens[start : start + 256 - len(head)]
        llama.reset()
        llama.eval(chunk)
        scores = llama_cpp.Llama.logits_to_logprobs(llama.scores[: len(chunk)])
        expected += [-float(scores[i, token]) for i, token in enumerate(chunk[1:])]
    llama.close()
    assert len(tokens) > 256
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_differences_carry_their_error() -> None:
    """Guards against a difference of the wrong sign, and errors of the two models taken as independent."""
    first = np.array([1.0, 5.0, 3.0, 7.0])
    found = compare(first + np.array([0.1, 0.3, 0.1, 0.3]), first)
    assert found.mean == pytest.approx(0.2)
    assert found.standard_error == pytest.approx(np.std([0.1, 0.3, 0.1, 0.3], ddof=1) / 2)


def test_noise_costs_where_it_reaches_the_answer(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against noise put into another layer or projection than the one it is counted for.

    Layer 0's down projection is zeroed, so nothing that happens to its gate and up can be seen.
    """
    model = tmp_path / "model.gguf"
    model.write_bytes(write_model("olmoe", quant="F32").read_bytes())
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(model).tensors}
    down = tensors["blk.0.ffn_down_exps.weight"]
    with model.open("r+b") as file:
        file.seek(int(down.data_offset))
        file.write(bytes(int(down.n_bytes)))
    names = [name for name in tensors if "_exps" in name]
    found = gemq.sensitivities(model, names, TEXT, max_tokens=100, progress=silent)
    assert found["blk.0.ffn_gate_exps.weight"] == pytest.approx(0, abs=1e-9)
    assert found["blk.0.ffn_up_exps.weight"] == pytest.approx(0, abs=1e-9)
    assert found["blk.0.ffn_down_exps.weight"] == 0  # its output is zero, and so is noise relative to it
    assert all(found[f"blk.1.ffn_{part}_exps.weight"] > 1e-6 for part in ("gate", "up", "down"))
    again = gemq.sensitivities(model, names[-1:], TEXT, max_tokens=100, progress=silent)
    assert again[names[-1]] == found[names[-1]]


@pytest.mark.parametrize("method", ["alphaq", "gemq"])
def test_the_better_of_the_two_is_written(
    method: mixed_precision.Method, write_model: ModelWriter, tmp_path: Path
) -> None:
    """Guards against a report that says other than what was written, broken budgets, and trial files left behind."""
    source = write_model("qwen3moe", quant="F32", dense_quant="F32", n_layers=4)
    out, matrix = tmp_path / "out.gguf", tmp_path / "imatrix.gguf"
    calibrate(source, matrix, TEXT)
    report = mixed_precision.quantize_to_bits(
        source,
        out,
        base="Q8_0",
        bits_per_weight=4.6,
        method=method,
        holdout_text=HOLDOUT,
        importance=read_importance(matrix),
        calibration_text=TEXT,
        progress=silent,
    )
    assert sorted(os.listdir(tmp_path)) == ["imatrix.gguf", "out.gguf"]
    for trial in (report.mixed, report.uniform):
        assert trial.allocation.bits_per_weight <= 4.6
    assert report.mixed.allocation.cost <= report.uniform.allocation.cost
    assert {option.n_bytes for option in report.uniform.allocation.chosen} == {8 * 256 * 256 * 9 // 16}  # 4.5 bits
    assert report.written.nats == min(report.mixed.nats, report.uniform.nats)
    assert negative_log_likelihoods(out, HOLDOUT).mean() == pytest.approx(report.written.nats, rel=1e-9)
    reader = gguf.GGUFReader(out)
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    for group, option in zip(report.written.allocation.groups, report.written.allocation.chosen, strict=True):
        assert types[group.name] == option.ggml_type
    assert types["blk.0.attn_q.weight"] == GgmlType.Q8_0
    assert reader.get_field("edgemoe.quantize.allocation").contents() == report.written.allocation.table()
    comparison = json.loads(reader.get_field("edgemoe.quantize.comparison").contents())
    assert comparison["written"] == report.written.name
    assert comparison["mixed_less_uniform_nats"] == pytest.approx(report.mixed.nats - report.uniform.nats)


def test_what_cannot_be_allocated_is_an_error(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against allocations without the data they are said to use, and budgets that nothing fits."""
    source = write_model("olmoe", quant="F32")
    with pytest.raises(ConversionError, match="gemq: it needs an importance matrix of all experts, found none"):
        mixed_precision.score(source, "gemq", progress=silent)
    scores = mixed_precision.score(source, "alphaq", progress=silent)
    with pytest.raises(ConversionError, match="smallest types take"):
        mixed_precision.choose(scores, 2.0)
    mixed, uniform = mixed_precision.choose(scores, 2.7)
    assert {option.ggml_type for option in uniform.chosen} == {GgmlType.Q2_K}
    assert mixed.n_bytes >= uniform.n_bytes


def test_short_rows_get_the_smallest_type_they_can_have() -> None:
    """Guards against a budget that has no comparison because one projection's rows are too short for narrow types."""
    costs = {GgmlType.Q2_K: (21, 9.0), GgmlType.Q3_K: (28, 5.0), GgmlType.Q8_0: (68, 0.1)}  # bytes of 64 weights
    wide = Group("up", 64, tuple(Option(t, *found) for t, found in costs.items()))
    short = Group("down", 64, (Option(GgmlType.MXFP4, 34, 3.0), Option(GgmlType.Q8_0, 68, 0.1)))
    scores = mixed_precision.Scores((wide, short), {})
    _, uniform = mixed_precision.choose(scores, (28 + 34) * 8 / 128)
    assert [option.ggml_type for option in uniform.chosen] == [GgmlType.Q3_K, GgmlType.MXFP4]
    _, uniform = mixed_precision.choose(scores, (28 + 34) * 8 / 128 - 0.1)
    assert [option.ggml_type for option in uniform.chosen] == [GgmlType.Q2_K, GgmlType.MXFP4]


def test_the_command_quantizes(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against options that reach another argument, and files overwritten without being asked."""
    source = str(write_model("olmoe", quant="F32", dense_quant="F32"))
    out, types, holdout = tmp_path / "out.gguf", tmp_path / "mixed.toml", tmp_path / "holdout.txt"
    holdout.write_text(HOLDOUT, encoding="utf-8")
    runner = CliRunner()

    def run(*arguments: object) -> tuple[int, str]:
        result = runner.invoke(cli, ["convert", "quantize", source, *map(str, arguments)])
        return result.exit_code, result.output

    code, output = run(out, "--quant", "q4_k_m", "--json")
    assert code == 0, output
    assert json.loads(output.splitlines()[-1])["types"]["Q4_K"] > 0
    assert run(out, "--quant", "Q8_0")[0] == 1
    code, output = run(
        out, "--quant", "Q8_0", "--bpw", 4.6, "--holdout", holdout, "--types-out", types, "--force", "--json"
    )
    assert code == 0, output
    fields = json.loads(output.splitlines()[-1])
    assert fields["written"] in ("mixed", "uniform")
    again = tmp_path / "again.gguf"
    assert run(again, "--quant", types)[0] == 0
    first, second = ({t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors} for path in (out, again))
    assert first == second
    assert run(tmp_path / "x.gguf", "--quant", "Q8_0", "--bpw", 4.5)[0] == 2
    assert run(tmp_path / "x.gguf", "--quant", "Q4_X")[0] == 1
