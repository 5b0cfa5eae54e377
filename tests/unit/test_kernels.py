# SPDX-License-Identifier: MIT
"""Whose kernels multiply: what is said of it, and what the native core is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import edgemoe
from edgemoe import _native, runtime
from edgemoe.cli.options import kernels_option
from edgemoe.errors import BackendError
from edgemoe.formats.gguf import GgufModel, GgufTensor, read_model
from edgemoe.runtime import FormatPath, kernels_used
from tests.conftest import ModelWriter


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([], "ggml"),
        ([FormatPath("Q5_0", 3, 0), FormatPath("Q5_1", 1, 0)], "ggml"),
        ([FormatPath("Q4_K", 2, 2), FormatPath("Q6_K", 1, 1)], "avx2"),
        ([FormatPath("Q4_K", 2, 2), FormatPath("Q5_0", 1, 0)], "avx2, ggml for Q5_0"),
        ([FormatPath("Q5_1", 2, 0), FormatPath("Q4_K", 1, 1), FormatPath("Q5_0", 1, 0)], "avx2, ggml for Q5_1, Q5_0"),
        ([FormatPath("Q4_K", 5, 3)], "avx2, ggml for Q4_K (2 of 5 tensors)"),
    ],
)
def test_what_ran_is_said(paths: list[FormatPath], text: str) -> None:
    """Guards against statistics that name fast kernels while some of the experts go another way."""
    assert kernels_used(paths, "avx2") == text


def test_formats_are_counted_by_tensor() -> None:
    """Guards against a format that is called fast because one of its tensors is."""
    model = _model(("gate", "Q4_K"), ("up", "Q4_K"), ("down", "Q5_0"))

    class Half:
        def is_own(self, name: str) -> bool:
            return name == "blk.0.ffn_gate_exps.weight"

    paths = runtime.format_paths(model, Half())  # type: ignore[arg-type]
    assert paths == [FormatPath("Q4_K", 2, 1), FormatPath("Q5_0", 1, 0)]


def _model(*tensors: tuple[str, str]) -> GgufModel:
    made = [
        GgufTensor(f"blk.0.ffn_{name}_exps.weight", (512, 96, 4), kind, 4 * 96 * 288, 0, i << 20)
        for i, (name, kind) in enumerate(tensors)
    ]
    metadata = {"general.architecture": "olmoe", "olmoe.expert_count": 4, "olmoe.expert_used_count": 2}
    return GgufModel(Path("made-up.gguf"), [Path("made-up.gguf")], metadata, made)


def test_extents_have_a_shape_and_a_format() -> None:
    """Guards against rows and columns changed places, and against two names for one format."""
    extents = runtime.extents(_model(("gate", "Q4_K"), ("down", "Q5_0")))
    assert [(e.n_cols, e.n_rows) for e in extents] == [(512, 96)] * 2
    assert extents[0].format > 0
    assert extents[1].format == 0
    names = ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
    assert [_native.find_format(name) for name in names] == list(range(1, 14))  # as in edgemoe.h
    assert _native.find_format("F32") == _native.find_format("") == 0


def test_unknown_kernels_are_refused(tmp_path: Path) -> None:
    """Guards against exact bits that are asked for by a mistyped name, found out after minutes of loading."""
    for make in (edgemoe.plan, edgemoe.Llama):
        with pytest.raises(ValueError, match="unknown kernels 'gglm': expected one of auto, ggml"):
            make(tmp_path / "not-even-opened.gguf", kernels="gglm")


def test_command_line_and_library_agree() -> None:
    """Guards against an option of the command line that the library does not know."""
    from click import Choice, Command, Option

    command = kernels_option(Command("x", callback=lambda: None))
    kind = next(p for p in command.params if isinstance(p, Option)).type
    assert isinstance(kind, Choice)
    assert list(kind.choices) == list(_native.KERNELS)


def test_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an override that has no effect, and one that cannot be had and is silently replaced."""
    monkeypatch.delenv("EDGEMOE_ISA", raising=False)
    isas = _native.isas()
    assert isas[-1] == _native.Isa("scalar", True)
    assert _native.active_isa() == next(isa.name for isa in isas if isa.is_supported)
    monkeypatch.setenv("EDGEMOE_ISA", "scalar")
    assert _native.active_isa() == "scalar"
    monkeypatch.setenv("EDGEMOE_ISA", "sse9")
    with pytest.raises(BackendError, match=r"EDGEMOE_ISA=sse9: .*scalar"):
        _native.active_isa()
    for isa in isas:
        monkeypatch.setenv("EDGEMOE_ISA", isa.name)
        if not isa.is_supported:
            with pytest.raises(BackendError, match=isa.name):
                _native.active_isa()


def test_runtime_says_what_is_its_own(write_model: ModelWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against `kernels="ggml"` that is not passed on, and an instruction set found missing in mid-answer."""
    monkeypatch.setenv("EDGEMOE_ISA", "scalar")
    model = read_model(write_model("olmoe"))
    for kernels, is_own in (("auto", True), ("ggml", False)):
        native = runtime.open_runtime(model, int(runtime.slot_sizes(model, 0).bank_slot_bytes), kernels=kernels)
        paths = runtime.format_paths(model, native)
        assert all(p.n_own == (p.n_tensors if is_own else 0) for p in paths)
        assert native.stats().n_own_tensors == (len(model.expert_tensors) if is_own else 0)
        assert not native.is_own("no.such.tensor")
        native.close()
    assert [dataclasses.replace(p, n_own=0) for p in runtime.examine_formats(model)] == paths
    monkeypatch.setenv("EDGEMOE_ISA", "sse9")
    with pytest.raises(BackendError, match="EDGEMOE_ISA=sse9"):
        runtime.examine_formats(model)
