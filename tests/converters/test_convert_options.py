# SPDX-License-Identifier: MIT
"""Options of `edgemoe convert gguf` that combine conversion with packing and with mixed precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from gguf import GGUFReader

from edgemoe.cli.main import cli
from edgemoe.formats.gguf import read_model

PAGE = 4096
TEXT = "Sphinx of black quartz, judge my vow. Pack my box with five dozen jugs. " * 8


def convert(workshop: Any, family: str, out: Path, *options: object) -> Result:
    checkpoint = workshop.checkpoint(family)
    arguments = [checkpoint.path, out, "--pre-tokenizer", checkpoint.family.pre_tokenizer, *options]
    return CliRunner().invoke(cli, ["convert", "gguf", *map(str, arguments)])


def test_a_packed_conversion_has_the_same_tensors_at_pages_in_the_order_of_use(workshop: Any, tmp_path: Path) -> None:
    """Guards against: an option that reorders names but not data, types that depend on the order, unaligned experts."""
    plain, packed = tmp_path / "plain.gguf", tmp_path / "packed.gguf"
    assert convert(workshop, "qwen3moe", plain, "--quant", "Q8_0").exit_code == 0
    result = convert(workshop, "qwen3moe", packed, "--quant", "Q8_0", "--pack")
    assert result.exit_code == 0, result.output
    model = read_model(packed)
    experts = sorted(model.expert_tensors, key=lambda t: t.offset)
    n_layers = model.n_moe_layers
    parts = ("gate", "up", "down")
    assert [t.name for t in experts] == [f"blk.{i}.ffn_{part}_exps.weight" for i in range(n_layers) for part in parts]
    assert min(t.offset for t in experts) > max(t.offset for t in model.tensors if t not in model.expert_tensors)
    assert all(t.offset % PAGE == 0 for t in model.tensors)
    assert any(t.offset % PAGE for t in read_model(plain).tensors), "or the option does nothing"
    expected = {t.name: t for t in GGUFReader(plain).tensors}
    found = {t.name: t for t in GGUFReader(packed).tensors}
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.tensor_type == found[name].tensor_type, name
        assert np.array_equal(tensor.data, found[name].data), name


def test_bits_per_weight_of_a_checkpoint(workshop: Any, tmp_path: Path) -> None:
    """Guards against: a file of more bits than asked for, and one of a checkpoint's size left behind."""
    out, holdout, types = tmp_path / "mixed.gguf", tmp_path / "holdout.txt", tmp_path / "types.toml"
    holdout.write_text(TEXT)
    options = ("--quant", "Q8_0", "--bpw", "6", "--holdout", holdout, "--types-out", types)
    result = convert(workshop, "qwen3moe", out, *options)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["holdout.txt", "mixed.gguf", "types.toml"]
    model = read_model(out)
    n_bits = sum(8 * t.n_bytes for t in model.expert_tensors)
    assert n_bits / sum(int(np.prod(t.shape)) for t in model.expert_tensors) <= 6
    assert any("is written" in line for line in result.output.splitlines())
    assert convert(workshop, "qwen3moe", out, "--bpw", "6", "--force").exit_code == 2, "without a text to compare on"
    assert convert(workshop, "qwen3moe", out, *options, "--pack", "--force").exit_code == 2
