# SPDX-License-Identifier: MIT
"""What layers lose with fewer experts: against llama.cpp's own layers, the best division by brute force, and files."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe import lexi
from edgemoe.cli.main import cli
from edgemoe.errors import BackendError, ModelFormatError
from edgemoe.formats.gguf import read_model
from tests.conftest import ModelWriter
from tests.integration.support import node_values, stock, watch_nodes
from tests.integration.test_reuse import PROMPT, ROUTERS, WIDE
from tests.unit.fakes import run

TABLES = st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=4), min_size=1, max_size=5)


def _losses(tables: list[list[float]]) -> lexi.Losses:
    return lexi.Losses("key", "made up", 1, 0, {2 * i + 1: tuple(table) for i, table in enumerate(tables)})


@given(TABLES, st.floats(0, 1))
@settings(max_examples=200)
def test_division_is_the_best_of_all(tables: list[list[float]], share: float) -> None:
    """Guards against a sum that is missed, another layer's number, and a division that is not the best: losses need
    neither fall nor be convex."""
    losses = _losses(tables)
    budget = len(tables) + round(share * sum(len(t) - 1 for t in tables))
    numbers = lexi.solve(losses, budget / len(tables))
    assert list(numbers) == list(losses.of_layer)
    assert sum(numbers.values()) == budget
    found = sum(table[k - 1] for table, k in zip(tables, numbers.values(), strict=True))
    every = itertools.product(*(range(1, len(t) + 1) for t in tables))
    best = min(sum(table[k - 1] for table, k in zip(tables, ks, strict=True)) for ks in every if sum(ks) == budget)
    assert found == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("mean", [0.9, 2.6, float("nan"), float("inf")])
def test_means_that_do_not_exist_are_refused(mean: float) -> None:
    """Guards against numbers of a sum that nobody asked for."""
    with pytest.raises(ValueError, match=r"expected 1 to 2\.5"):
        lexi.solve(_losses([[3, 1], [3, 2, 0]]), mean)


def check_layers(path: Path, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare all layers' outputs for one prompt with those of stock llama.cpp made to use `k` experts."""
    model = read_model(path)
    monkeypatch.setattr(lexi, "_BLOCK_BYTES", 100 * 256 * 4)  # more than one block of rows, the last one smaller
    seen: dict[str, Any] = {}

    def look(name: str, node: Any) -> None:
        seen.setdefault(name, node_values(node.src[1].contents if "logits" in name else node))

    watch_nodes(monkeypatch, r"ffn_moe_(logits|out)-\d+", look)
    override = {f"{model.architecture}.expert_used_count": k}
    with contextlib.closing(stock(path, kv_overrides=override)) as reference:
        reference.eval(PROMPT)
    layers = sorted({t.layer for t in model.expert_tensors})
    assert layers
    for layer in layers:
        ours = lexi._Layer(model, layer)
        x = seen[f"ffn_moe_logits-{layer}"].reshape(len(PROMPT), -1)
        norm = next(n for n in ("ffn_norm", "post_attention_norm") if ours._vector(f"{n}.weight") is not None)
        bias = ours._vector(f"{norm}.bias")
        before = (x - (0.0 if bias is None else bias)) / ours._vector(f"{norm}.weight")
        assert ours._normed(before) == pytest.approx(x, rel=1e-3, abs=1e-3)
        chosen, weights = ours._route(x)
        found = np.einsum("skr,src->skc", weights, ours._outputs(x, chosen))[:, k - 1]
        expected = seen[f"ffn_moe_out-{layer}"].reshape(found.shape)
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("arch", [*ROUTERS, "granitemoe-shared"])
def test_layers_are_llama_cpps(arch: str, k: int, write_model: ModelWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against losses of another router, activation, bias or normalization than the model's, for all experts and
    for fewer. With F32 experts, as ggml rounds activations to 8 bits beside quantized ones."""
    check_layers(write_model(arch, quant="F32", **WIDE), k, monkeypatch)


def test_losses_fall_to_nothing_and_repeat(write_model: ModelWriter) -> None:
    """Guards against losses of all experts, inputs that change with each run, and tables of layers without experts."""
    model = read_model(write_model("deepseek2-v3", **WIDE))
    losses = lexi.measure(model, n_samples=8)
    assert list(losses.of_layer) == [1, 2]
    for table in losses.of_layer.values():
        assert len(table) == 4
        assert table[-1] == 0
        assert min(table[:-1]) > 0
        assert table[0] == max(table)
    assert losses == lexi.measure(model, n_samples=8)
    assert losses != lexi.measure(model, n_samples=8, seed=1)
    for wrong in ({"n_samples": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match="expected at least"):
            lexi.measure(model, **wrong)  # type: ignore[arg-type]


def test_models_that_cannot_be_computed_are_refused(write_model: ModelWriter) -> None:
    """Guards against losses of a layer that is not the model's."""
    model = read_model(write_model("olmoe"))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"metadata": {**model.metadata, "general.architecture": "llama4"}}, "no routed experts"),
        ({"metadata": {**model.metadata, "olmoe.swiglu_clamp_exp": [0.0, 7.0]}}, "is clamped"),
        (
            {"tensors": [*model.tensors, dataclasses.replace(model.tensors[0], name="blk.0.ffn_up_exps.scale")]},
            "scales",
        ),
        ({"tensors": [t for t in model.tensors if "exps" not in t.name]}, "no routed experts"),
    ]
    for change, message in changes:
        with pytest.raises(BackendError, match=message):
            lexi.check(dataclasses.replace(model, **change))
    unknown = {k.replace("olmoe.", "llama4."): v for k, v in model.metadata.items()} | {
        "general.architecture": "llama4"
    }
    with pytest.raises(BackendError, match=r"its architecture llama4 is none of .*; use a number or top-p:P"):
        lexi.check(dataclasses.replace(model, metadata=unknown))


def test_files_come_back_and_others_are_refused(
    write_model: ModelWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against numbers made of a damaged file, half a file where the disk is full, and temporary files left."""
    model = read_model(write_model("olmoe", **WIDE))
    losses = lexi.measure(model, n_samples=2)
    path = tmp_path / "losses.json"
    lexi.save(losses, path)
    assert lexi.load(path, model) == losses
    good = json.loads(path.read_text())
    tables = good["losses"]
    damaged: list[Any] = [
        [],
        {**good, "version": 2},
        {**good, "format": "else"},
        {**good, "losses": {"0": [1, None], "1": [0]}},
        {**good, "losses": {**tables, "0": [float("nan"), 1, 1, 0]}},
        {**good, "losses": {**tables, "0": [-1, 1, 1, 0]}},
        {**good, "losses": {**tables, "0": []}},
        {**good, "losses": {"x": [1]}},
        {k: v for k, v in good.items() if k != "model_key"},
    ]
    for content in (*map(json.dumps, damaged), "", path.read_text()[:-30], "[" * 100000, "0" * (5 << 20)):
        path.write_text(content)
        with pytest.raises(ModelFormatError, match="no file of `edgemoe lexi`"):
            lexi.load(path, model)

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelFormatError, match="cannot write what fewer experts cost: No space left"):
        lexi.save(losses, path)
    assert path.read_text() == "0" * (5 << 20)
    assert os.listdir(tmp_path) == ["losses.json"]


def test_command_writes_what_loading_reads(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against a file that the option does not take, an overwritten one, and a mean noticed after the work."""
    path, out = write_model("olmoe", **WIDE), tmp_path / "out.json"
    shown = run("lexi", str(path), str(out), "--samples", "4")
    assert shown.exit_code == 0
    assert "mean 2:" in shown.stdout
    numbers = json.loads(run("lexi", str(path), str(out), "--force", "--mean-k", "2.5", "--json").stdout)["numbers"]
    assert sum(numbers["2.5"].values()) == 5
    assert run("lexi", str(path), str(out)).exit_code == 1
    assert run("lexi", str(path), str(tmp_path / "no.json"), "--mean-k", "5").exit_code == 2
    assert not (tmp_path / "no.json").exists()
    used = run("generate", str(path), "-p", "a", "-n", "4", "--ctx", "256", "--expert-top-k", f"lexi:2@{out}")
    assert used.exit_code == 0, used.stderr
    assert "50.0% of experts changed" in used.stderr
    assert run("generate", str(path), "-p", "a", "--expert-top-k", "lexi").exit_code == 2
    assert "lexi" in cli.commands
