# SPDX-License-Identifier: MIT
"""Low-bit companions: their weights, what they are tied to, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

from benchmarks import synthetic
from edgemoe.cli.main import cli
from edgemoe.converters.calibrate import calibrate
from edgemoe.converters.lowbit import make_companion
from edgemoe.converters.pack import pack
from edgemoe.errors import ConversionError, ModelFormatError
from edgemoe.formats.companion import expert_bank_key, open_companion
from edgemoe.formats.gguf import read_model
from tests.conftest import ModelWriter

PAGE = 4096


def values(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """All expert tensors of a file in F32, by the `gguf` package."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape([int(n) for n in t.shape[::-1]])
        for t in gguf.GGUFReader(path).tensors
        if "_exps.weight" in t.name
    }


def test_the_companion_has_the_experts_in_fewer_bits(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: experts in another order, blocks that others do not read, other tensors in the file."""
    source, out = write_model("olmoe", quant="Q8_0"), tmp_path / "low.gguf"
    report = make_companion(source, out)
    exact, low = values(source), values(out)
    assert low.keys() == exact.keys() == {t.name for t in gguf.GGUFReader(out).tensors}
    for name, expected in exact.items():
        error = np.sqrt(np.square(low[name] - expected).mean(axis=(1, 2)) / np.square(expected).mean(axis=(1, 2)))
        # 2.6 bits: theory and llama.cpp give a relative error of about 0.3; another expert's weights would give 1.4.
        assert (error < 0.4).all(), (name, error)
    assert 0.1 < report.rms_error < 0.4
    assert report.types == {"Q2_K": 6}
    assert report.source_bytes == read_model(source).expert_bank_bytes
    assert report.out_bytes * 100 == pytest.approx(report.source_bytes * 100 * (84 / 256) / (34 / 32))
    assert all(t.offset % PAGE == 0 for t in read_model(out).expert_tensors)


def test_the_bytes_are_those_of_llama_cpp(tmp_path: Path) -> None:
    """Guards against: blocks other than llama.cpp's, which is the reference."""
    source = synthetic.write_model(tmp_path / "f32.gguf", "olmoe", quant="F32")
    make_companion(source, tmp_path / "low.gguf", quant="Q3_K")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_S, True, 1
    params.allow_requantize = True
    theirs = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(theirs).encode(), params) == 0
    expected = {t.name: t.data for t in gguf.GGUFReader(theirs).tensors}
    for t in gguf.GGUFReader(tmp_path / "low.gguf").tensors:
        np.testing.assert_array_equal(t.data, expected[t.name])


def test_an_importance_lowers_the_weighted_error(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: an importance that is not used, or of another expert or column."""
    source, imatrix = write_model("olmoe", quant="Q8_0"), tmp_path / "imatrix.gguf"
    calibrate(source, imatrix, "Pack my box with five dozen liquor jugs. " * 20)
    make_companion(source, tmp_path / "plain.gguf")
    make_companion(source, tmp_path / "weighted.gguf", imatrix=imatrix)
    exact, plain, weighted = (values(path) for path in (source, tmp_path / "plain.gguf", tmp_path / "weighted.gguf"))
    sums = {t.name: t.data for t in gguf.GGUFReader(imatrix).tensors}
    for name, w in exact.items():
        importance = sums[f"{name}.in_sum2"] / sums[f"{name}.counts"]
        errors = [(np.square(v[name] - w) * importance[:, None, :]).sum(axis=(1, 2)) for v in (plain, weighted)]
        assert (errors[1] < errors[0]).all(), name
    with pytest.raises(ConversionError, match="it was collected on another model"):
        make_companion(write_model("olmoe", expert_ff=512), tmp_path / "wrong.gguf", imatrix=imatrix)


def test_a_companion_opens_with_its_source(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a companion that its own model refuses, also where that was copied, packed or split."""
    source, out = write_model("olmoe"), tmp_path / "low.gguf"
    make_companion(source, out)
    companion = open_companion(out, read_model(source))
    shapes = [{t.name: t.shape for t in m.expert_tensors} for m in (companion, read_model(source))]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 6
    packed = tmp_path / "packed.gguf"
    pack(source, packed)
    assert open_companion(out, read_model(packed)).path == out
    split = synthetic.write_model(tmp_path / "split.gguf", "olmoe", n_splits=3)
    assert open_companion(out, read_model(split)).path == out


def test_other_models_companions_are_refused(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: experts of one model computed with the weights of another, without a word."""
    source, out = write_model("olmoe"), tmp_path / "low.gguf"
    make_companion(source, out)
    fine_tune = synthetic.write_model(tmp_path / "fine.gguf", "olmoe", seed=1)
    with pytest.raises(
        ModelFormatError, match="'synthetic olmoe', whose experts have the same shapes and other weights"
    ):
        open_companion(out, read_model(fine_tune))
    wider = write_model("olmoe", n_experts=16)
    with pytest.raises(
        ModelFormatError, match=r"blk\.0\.ffn_down_exps\.weight: found \[256, 256, 8\], expected .* 16\]"
    ):
        open_companion(out, read_model(wider))
    with pytest.raises(ModelFormatError, match=r"found general\.type 'model', expected 'expert-companion'"):
        open_companion(source, read_model(source))
    merged = tmp_path / "merged.gguf"
    make_companion(write_model("deepseek2"), out)
    pack(write_model("deepseek2"), merged)
    with pytest.raises(ModelFormatError, match="which has other experts"):
        open_companion(out, read_model(merged))
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(out.read_bytes()[:-PAGE])
    with pytest.raises(ModelFormatError, match="it is truncated"):
        open_companion(truncated, read_model(write_model("deepseek2")))


def test_a_change_of_one_expert_changes_the_key(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a fine-tune of the experts that passes for its base; one of routers has to pass."""
    source, copy = write_model("olmoe"), tmp_path / "copy.gguf"
    copy.write_bytes(source.read_bytes())
    model = read_model(source)
    by_name = {t.name: t for t in model.tensors}

    def flip(name: str, position: int) -> str:
        with copy.open("r+b") as file:
            file.seek(by_name[name].offset + position)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        return expert_bank_key(read_model(copy))

    key = expert_bank_key(model)
    assert flip("blk.1.ffn_gate_inp.weight", 0) == key
    assert flip("blk.1.ffn_down_exps.weight", by_name["blk.1.ffn_down_exps.weight"].n_bytes - 1) != key


def test_rows_that_no_large_block_divides(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a failure, or blocks across rows, where an expert is 96 columns wide."""
    source = write_model("olmoe", expert_ff=96, quant="Q8_0")
    report = make_companion(source, tmp_path / "low.gguf")
    assert report.types == {"Q4_0": 2, "Q2_K": 4}
    exact, low = values(source), values(tmp_path / "low.gguf")
    for name, w in exact.items():
        assert np.square(low[name] - w).sum() < 0.16 * np.square(w).sum()


def test_the_kept_formats(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: MXFP4 experts, with biases, that are not read as what they are."""
    source, out = write_model("gpt-oss"), tmp_path / "low.gguf"
    make_companion(source, out)
    exact, low = values(source), values(out)
    for name, w in exact.items():
        assert np.square(low[name] - w).sum() < 0.16 * np.square(w).sum()
    assert open_companion(out, read_model(source)).metadata["edgemoe.companion.quant"] == "Q2_K"


def test_llama_cpp_refuses_a_companion(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a companion that passes for a model, or that crashes who tries."""
    make_companion(write_model("olmoe"), tmp_path / "low.gguf")
    with pytest.raises(ValueError, match="Failed to load model"):
        llama_cpp.Llama(str(tmp_path / "low.gguf"), verbose=False)


def test_bad_input_is_told(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: hours of work before a wrong name is told."""
    out = tmp_path / "low.gguf"
    with pytest.raises(ConversionError, match="cannot quantize to 'Q1_Z': no such type; use one of"):
        make_companion(write_model("olmoe"), out, quant="Q1_Z")
    with pytest.raises(ConversionError, match="needs an importance"):
        make_companion(write_model("olmoe"), out, quant="IQ2_XXS")
    assert list(tmp_path.iterdir()) == []


def test_the_command(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a report that scripts cannot read."""
    source, out = write_model("olmoe"), tmp_path / "low.gguf"
    run = CliRunner().invoke(cli, ["convert", "lowbit", str(source), str(out), "--quant", "q3_k", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout.splitlines()[-1])["types"] == {"Q3_K": 6}
    run = CliRunner().invoke(cli, ["convert", "lowbit", str(source), str(out), "--force"])
    assert run.exit_code == 0 and "6 Q2_K; relative error of the weights 0." in run.stdout
