# SPDX-License-Identifier: MIT
"""`edgemoe convert pack`: the layout of the result, and that it is still the model it was, for llama.cpp and for us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import synthetic
from edgemoe.cli.main import cli
from edgemoe.converters.gguf_writer import OutTensor, copy_of, write_gguf
from edgemoe.converters.pack import MERGED_GATE_UP, pack, reads_of
from edgemoe.errors import ConversionError, ModelFormatError
from edgemoe.formats.gguf import read_model, read_raw_metadata
from tests.conftest import ModelWriter
from tests.integration.support import logits, set_residency, stock, streamed

PROMPT = synthetic.local_tokens(24, 512, seed=3)
STEPS = synthetic.uniform_tokens(8, 512, seed=4)
PAGE = 4096


@pytest.mark.parametrize(
    "arch", ["olmoe", "deepseek2", "deepseek2-v3", "deepseek2-merged", "gpt-oss", "granitemoe-shared"]
)
def test_logits_of_llama_cpp_stay_bit_for_bit(write_model: ModelWriter, tmp_path: Path, arch: str) -> None:
    """Guards against: experts or projections in another order, and files that stock llama.cpp refuses."""
    source, out = write_model(arch), tmp_path / "packed.gguf"
    pack(source, out)
    expected = logits(stock(source), PROMPT, STEPS)
    np.testing.assert_array_equal(logits(stock(out), PROMPT, STEPS), expected)


SLIDING = {"attention.sliding_window": 128, "attention.sliding_window_pattern": [True, False]}
NO_DENSE = {"leading_dense_block_count": 0, "expert_gating_func": 1}


@pytest.mark.parametrize(
    ("source_arch", "arch", "keys", "dropped", "has_sinks"),
    [
        ("deepseek2", "mistral4", {}, (), False),
        ("qwen3moe", "hy_v3", NO_DENSE, (), False),
        ("qwen3moe", "cohere2moe", NO_DENSE | SLIDING | {"logit_scale": 1.0}, ("q_norm", "k_norm", "ffn_norm"), False),
        ("granitemoe", "granite_swa", SLIDING, (), True),
    ],
)
def test_other_architectures_take_merged_tensors(
    write_model: ModelWriter,
    tmp_path: Path,
    source_arch: str,
    arch: str,
    keys: dict[str, Any],
    dropped: tuple[str, ...],
    has_sinks: bool,
) -> None:
    """Guards against: an architecture in the table whose loader takes what its graph does not use, or the reverse."""
    model, named, out = read_model(write_model(source_arch)), tmp_path / "named.gguf", tmp_path / "packed.gguf"
    metadata: dict[str, Any] = {
        arch + key.removeprefix(source_arch) if key.startswith(source_arch) else key: data
        for key, data in read_raw_metadata(model.path).items()
    }
    metadata |= {"general.architecture": arch, **{f"{arch}.{key}": data for key, data in keys.items()}}
    tensors = [copy_of(model, t) for t in model.tensors if not t.name.endswith(tuple(f"{d}.weight" for d in dropped))]
    sinks = np.linspace(-1, 1, 4, dtype=np.float32)
    for layer in range(2 if has_sinks else 0):
        tensors.append(OutTensor(f"blk.{layer}.attn_sinks.weight", (4,), "F32", lambda: [sinks]))
    write_gguf(named, metadata, tensors)
    assert pack(named, out).n_merged_layers == 2
    np.testing.assert_array_equal(*(logits(stock(path), PROMPT, STEPS) for path in (named, out)))


@pytest.mark.parametrize("arch", ["olmoe", "deepseek2"])
@pytest.mark.parametrize("kernels", ["ggml", "auto"])
def test_logits_of_edgemoe_stay_bit_for_bit(write_model: ModelWriter, tmp_path: Path, arch: str, kernels: str) -> None:
    """Guards against: slices found at other places than they are, with all experts resident and with few."""
    source, out = write_model(arch), tmp_path / "packed.gguf"
    pack(source, out)
    expected = logits(streamed(source, kernels=kernels), PROMPT, STEPS)
    for residency in ("all", "fewest"):
        llm = streamed(out, kernels=kernels)
        set_residency(llm, residency)
        np.testing.assert_array_equal(logits(llm, PROMPT, STEPS), expected)


def test_every_slice_begins_and_ends_at_a_page(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: reads of a page more than an expert has, and slots larger by a page."""
    source, out = write_model("olmoe"), tmp_path / "packed.gguf"
    report = pack(source, out)
    model = read_model(out)
    for t in model.expert_tensors:
        assert t.offset % PAGE == 0 and t.n_bytes // t.shape[2] % PAGE == 0
    assert report.unaligned == {}
    assert report.after.n_bytes == model.expert_bytes
    assert report.before.n_bytes > report.after.n_bytes
    # What every token needs lies in one range, before the experts; these follow layer by layer.
    names = [t.name for t in sorted(model.tensors, key=lambda t: t.offset)]
    n_dense = len(names) - len(model.expert_tensors)
    assert all("_exps.weight" not in name for name in names[:n_dense])
    parts = ("gate", "up", "down")
    assert names[n_dense:] == [f"blk.{layer}.ffn_{part}_exps.weight" for layer in (0, 1) for part in parts]


def test_bytes_read_are_those_of_the_report(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a report of what packing saves that the runtime's counters do not confirm."""
    source, out = write_model("deepseek2"), tmp_path / "packed.gguf"
    report = pack(source, out)
    for path, reads in ((source, report.before), (out, report.after)):
        assert reads == reads_of(read_model(path))
        llm = streamed(path, prefetch="off")  # so that only misses are read
        set_residency(llm, "cycle")
        llm.reset_stats()
        logits(llm, PROMPT, STEPS)
        counters = llm._runtime.stats()
        missed = counters.misses + counters.late_hits
        assert missed > 0
        assert counters.reads == missed * reads.n_reads
        assert counters.bytes_read == pytest.approx(
            missed * reads.n_bytes, rel=0.1
        )  # of unaligned ones some are longer


def test_gate_and_up_are_merged_row_by_row(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: rows of gate and up mixed within an expert, or experts one after the other."""
    source, out = write_model("deepseek2"), tmp_path / "packed.gguf"
    report = pack(source, out)
    assert report.n_merged_layers == 2 and report.unmerged_because == ""
    assert (report.before.n_reads, report.after.n_reads) == (3, 2)
    before, after = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (source, out))
    gate, up = (before[f"blk.1.ffn_{part}_exps.weight"].data for part in ("gate", "up"))
    merged = after["blk.1.ffn_gate_up_exps.weight"].data
    np.testing.assert_array_equal(merged, np.concatenate([gate, up], axis=1))
    assert "blk.1.ffn_gate_exps.weight" not in after
    unchanged = [name for name in after if name in before]
    assert len(unchanged) == len(before) - 4
    for name in unchanged:
        np.testing.assert_array_equal(after[name].data, before[name].data)


def test_what_is_not_merged_says_why(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a merged tensor that llama.cpp would not find, and a report that leaves the reader guessing."""
    out = tmp_path / "packed.gguf"
    assert "olmoe" not in MERGED_GATE_UP
    assert pack(write_model("olmoe"), out).unmerged_because == "llama.cpp has no merged tensor for olmoe"
    assert pack(write_model("deepseek2"), out, merge=False).unmerged_because == "not asked for"
    assert len(read_model(out).expert_tensors) == 6


def test_llama_cpp_is_asked_before_a_merged_file_gets_its_name(
    write_model: ModelWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against: a table of architectures that is wrong for the installed llama.cpp, and files nothing loads."""
    monkeypatch.setattr("edgemoe.converters.pack.MERGED_GATE_UP", MERGED_GATE_UP | {"olmoe"})
    with pytest.raises(ConversionError, match=r"llama\.cpp does not load what was made"):
        pack(write_model("olmoe"), tmp_path / "packed.gguf")
    assert list(tmp_path.iterdir()) == []


def test_gate_and_up_of_two_types_stay_apart(tmp_path: Path) -> None:
    """Guards against: bytes of one type read as another in a model of mixed precision."""
    source, out = tmp_path / "mixed.gguf", tmp_path / "packed.gguf"
    synthetic.write_model(source, "deepseek2")
    mixed = tmp_path / "other.gguf"
    synthetic.write_model(mixed, "deepseek2", quant="Q6_K")
    _replace_tensor(source, mixed, "blk.2.ffn_up_exps.weight", tmp_path / "two.gguf")
    report = pack(tmp_path / "two.gguf", out)
    assert report.n_merged_layers == 1
    assert report.unmerged_because == "layer 2 has gate in Q4_K and up in Q6_K"
    expected = logits(stock(tmp_path / "two.gguf"), PROMPT, STEPS)
    np.testing.assert_array_equal(logits(stock(out), PROMPT, STEPS), expected)


def _replace_tensor(path: Path, other: Path, name: str, out: Path) -> None:
    """`path` with one tensor of `other`."""
    models = [read_model(path), read_model(other)]
    replaced = {t.name: t for t in models[1].tensors}[name]
    tensors = [copy_of(models[1], replaced) if t.name == name else copy_of(models[0], t) for t in models[0].tensors]
    write_gguf(out, read_raw_metadata(path), tensors)


def test_experts_that_no_page_divides_are_named(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a promise of alignment that GGUF cannot keep."""
    source, out = write_model("gpt-oss"), tmp_path / "packed.gguf"
    report = pack(source, out)
    assert len(report.unaligned) == report.n_expert_tensors == 6
    assert set(report.unaligned.values()) == {256 * 256 // 32 * 17}
    assert all(t.offset % PAGE == 0 for t in read_model(out).expert_tensors)


def test_a_split_model_becomes_one_file(tmp_path: Path) -> None:
    """Guards against: tensors of the other files forgotten, and metadata that ask for files that are not there."""
    whole = synthetic.write_model(tmp_path / "whole.gguf", "olmoe")
    first = synthetic.write_model(tmp_path / "split.gguf", "olmoe", n_splits=3)
    pack(whole, tmp_path / "a.gguf")
    pack(first, tmp_path / "b.gguf")
    a, b = (read_model(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert not any(key.startswith("split.") for key in b.metadata)
    np.testing.assert_array_equal(*(logits(stock(m.path), PROMPT, STEPS) for m in (a, b)))


def test_metadata_are_kept(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a vocabulary, template or hyper-parameter lost on the way."""
    source, out = write_model("qwen2moe"), tmp_path / "packed.gguf"
    pack(source, out)
    before, after = read_raw_metadata(source), read_raw_metadata(out)
    assert {key: after[key] for key in before} == before
    assert after.keys() - before.keys() == {
        "general.alignment",
        "edgemoe.pack.version",
        "edgemoe.pack.merged_layers",
        "edgemoe.pack.source_sha256",
    }
    packed_again = tmp_path / "again.gguf"
    pack(source, packed_again)
    assert packed_again.read_bytes() == out.read_bytes()


def test_bad_input_is_told(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: a result made of a broken or unsuitable source."""
    out = tmp_path / "packed.gguf"
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(write_model("olmoe").read_bytes()[:-5000])
    with pytest.raises(ModelFormatError, match="it is truncated"):
        pack(truncated, out)
    dense = tmp_path / "dense.gguf"
    writer = gguf.GGUFWriter(dense, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConversionError, match="it has no routed experts"):
        pack(dense, out)
    assert not out.exists()


def test_the_command(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against: an overwritten model, and a report that scripts cannot read."""
    source, out = write_model("deepseek2"), tmp_path / "packed.gguf"
    run = CliRunner().invoke(cli, ["convert", "pack", str(source), str(out), "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["after"] == {"n_reads": 2.0, "n_bytes": 110592.0}
    assert report["n_merged_layers"] == 2
    again = CliRunner().invoke(cli, ["convert", "pack", str(source), str(out)])
    assert again.exit_code == 1 and "the file exists" in again.stderr
    forced = CliRunner().invoke(cli, ["convert", "pack", str(source), str(out), "--force", "--no-merge"])
    assert forced.exit_code == 0 and "gate and up are not merged: not asked for" in forced.stdout
    itself = CliRunner().invoke(cli, ["convert", "pack", str(out), str(out), "--force"])
    assert itself.exit_code == 1 and "OUT is SRC itself" in itself.stderr
