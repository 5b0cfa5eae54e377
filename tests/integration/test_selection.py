# SPDX-License-Identifier: MIT
"""Fewer experts for a token: what is left out of the choice is left out of everything that follows from it.

The references are stock llama.cpp made to use fewer experts, and numpy's own count of the router outputs that are seen
in llama.cpp's nodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgemoe
from edgemoe import lexi, trace
from edgemoe.errors import BackendError, ModelFormatError
from edgemoe.formats.gguf import read_model
from tests.conftest import ModelWriter
from tests.integration.support import (
    logits,
    node_values,
    set_residency,
    set_threads,
    stock,
    streamed,
    watch_nodes,
)
from tests.integration.test_draft import _Eager
from tests.integration.test_reuse import PROMPT, ROUTERS, STEPS, WIDE


def _fewer(path: Path, k: int) -> Any:
    """Stock llama.cpp with `k` experts for each token, prompts as well."""
    return stock(path, kv_overrides={f"{read_model(path).architecture}.expert_used_count": k})


def _numbers(path: Path, of_layer: list[int], out: Path) -> str:
    """A setting that gives each layer its number: losses under which no other numbers of that sum lose nothing."""
    model = read_model(path)
    layers = sorted({t.layer for t in model.expert_tensors})
    tables = {
        layer: tuple(float(k != wanted) for k in range(1, model.n_experts_used + 1))
        for layer, wanted in zip(layers, of_layer, strict=True)
    }
    key = lexi.expert_bank_key(model)
    lexi.save(lexi.Losses(key, "made up", 1, 0, tables), out)
    return f"lexi:{sum(of_layer) / len(layers)}@{out}"


@pytest.mark.parametrize("rule", ["2", "map:2-2"])
@pytest.mark.parametrize("arch", ROUTERS)
def test_fewer_experts_have_the_bits_of_llama_cpp_with_fewer(arch: str, rule: str, write_model: ModelWriter) -> None:
    """Guards against a wrong normalization of what is left, for any router, experts that are read for nothing, and bits
    that change because the graph is interrupted before the softmax, too."""
    path = write_model(arch, **WIDE)
    steps = STEPS[:10]
    with streamed(path, expert_top_k=rule) as llm:
        set_residency(llm, "third")
        model = llm._gguf
        found = logits(llm, steps[:1], steps[1:])
        stats = llm.stats()
    with contextlib.closing(_fewer(path, 2)) as reference:
        assert np.array_equal(found, logits(reference, steps[:1], steps[1:]))
    assert stats.selections_changed == 0.5
    assert 0.1 < stats.gate_mass_moved < 0.5
    assert stats.kl_estimate > 0.1
    assert stats.expert_hits + stats.expert_misses + stats.expert_late_hits == 2 * len(steps) * model.n_moe_layers


@pytest.mark.parametrize("rule", [4, "top-p:1", "map:4-4", "lexi:4"])
@pytest.mark.parametrize("arch", ["olmoe", "gpt-oss", "deepseek2-v3"])
def test_as_many_as_the_model_has_are_exact(arch: str, rule: Any, write_model: ModelWriter) -> None:
    """Guards against bits that change where no expert is left out."""
    path = write_model(arch, **WIDE)
    with contextlib.closing(stock(path)) as reference, streamed(path, expert_top_k=rule) as llm:
        set_residency(llm, "third")
        assert np.array_equal(logits(llm, PROMPT, STEPS[:6]), logits(reference, PROMPT, STEPS[:6]))
        stats = llm.stats()
    assert (stats.selections_changed, stats.gate_mass_moved, stats.kl_estimate) == (0, 0, 0)


def test_prompts_use_all_experts(write_model: ModelWriter) -> None:
    """Guards against prompts, also those of one token, and embeddings that lose experts."""
    path = write_model("olmoe", **WIDE)
    with contextlib.closing(stock(path)) as reference, streamed(path, expert_top_k=1) as llm:
        for prompt in (PROMPT, PROMPT[:1]):
            for one in (reference, llm):
                one.reset()
                assert len(list(itertools.islice(one.generate(prompt, temp=0.0), 1))) == 1
            assert np.array_equal(llm.scores[: len(prompt)], reference.scores[: len(prompt)])
        assert llm.stats().selections_changed == 0
        list(itertools.islice(llm.generate(PROMPT, temp=0.0), 3))
        assert llm.stats().selections_changed == 0.75


@pytest.mark.parametrize("arch", ["olmoe", "gpt-oss", "deepseek2-v3", "granitemoe"])
def test_layers_have_numbers_of_their_own(
    arch: str, write_model: ModelWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against the number of another layer, or of the first one with experts where dense ones come before it.

    As the first layer has 2, its output and the second's input are those of llama.cpp with 2; and as the second has 4,
    its output is what llama.cpp with 4 makes of such an input, which numpy computes."""
    path = write_model(arch, quant="F32", **WIDE)  # ggml rounds activations to 8 bits beside quantized weights
    model = read_model(path)
    first, second = sorted({t.layer for t in model.expert_tensors})
    seen: dict[str, list[Any]] = {}

    def look(name: str, node: Any) -> None:
        values = node_values(node.src[1].contents) if "logits" in name else node_values(node)
        seen.setdefault(name, []).append(values.reshape(-1))

    watch_nodes(monkeypatch, r"ffn_moe_(logits|out)-\d+", look)
    found = []
    setting = _numbers(path, [2, 4], tmp_path / "numbers.json")
    for make in (lambda: streamed(path, expert_top_k=setting), lambda: _fewer(path, 2)):
        seen.clear()
        with contextlib.closing(make()) as llm:
            logits(llm, STEPS[:1], STEPS[1:5])
        found.append({name: np.stack(values) for name, values in seen.items()})
    mixed, twos = found
    for name in (f"ffn_moe_logits-{first}", f"ffn_moe_out-{first}", f"ffn_moe_logits-{second}"):
        assert np.array_equal(mixed[name], twos[name])
    x, y = mixed[f"ffn_moe_logits-{second}"], mixed[f"ffn_moe_out-{second}"]
    layer = lexi._Layer(model, second)
    chosen, weights = layer._route(x)
    by_numpy = np.einsum("skr,src->skc", weights, layer._outputs(x, chosen))
    errors = [np.linalg.norm(by_numpy[:, k] - y) / np.linalg.norm(y) for k in range(4)]
    assert errors[3] < 1e-4 < 0.1 < min(errors[:3])


@pytest.mark.parametrize("arch", ["olmoe", "gpt-oss", "deepseek2"])
@pytest.mark.parametrize("p", [0.4, 0.7, 0.9])
def test_top_p_keeps_the_share_of_the_routers_outputs(
    arch: str, p: float, write_model: ModelWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a share of all experts' weight instead of the chosen ones', and masses of another token."""
    found = _counts(write_model(arch, **WIDE), f"top-p:{p}", tmp_path, monkeypatch)
    n_checked = 0
    for logit, used in found:
        mass = np.sort(np.exp(logit.astype(np.float64) - logit.max()))[::-1][: WIDE["n_experts_used"]]
        shares = np.cumsum(mass) / mass.sum()
        if np.abs(shares - p).min() > 1e-5:
            n_checked += 1
            assert len(used) == int(np.argmax(shares >= p)) + 1
        assert used == np.argsort(-logit, kind="stable")[: len(used)].tolist()
    assert n_checked > 0.9 * len(found)
    assert len({len(used) for _, used in found}) > 1


@pytest.mark.parametrize("arch", ["olmoe", "gpt-oss", "deepseek2-v3"])
@pytest.mark.parametrize("with_profile", [False, True])
def test_map_counts_the_routers_positive_outputs(
    arch: str, with_profile: bool, write_model: ModelWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a count of what a softmax has left in the same memory, and logits kept for another piece of the
    graph: a profile computes routers and choices apart."""
    path = write_model(arch, **{**WIDE, "n_experts": 8} if arch != "deepseek2-v3" else WIDE)
    found = _counts(path, "map:1-3", tmp_path, monkeypatch, with_profile=with_profile)
    for logit, used in found:
        assert len(used) == int(np.clip((logit > 0).sum(), 1, 3))
    assert len({len(used) for _, used in found}) > (0 if arch == "deepseek2-v3" else 1)


def _counts(
    path: Path, rule: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, with_profile: bool = False
) -> list[tuple[Any, list[int]]]:
    """For each decoded token and layer the router's outputs, and the experts that were used."""
    rows: list[Any] = []
    name = r"ffn_moe_probs-\d+" if "gpt-oss" in path.name else r"ffn_moe_logits-\d+"
    watch_nodes(monkeypatch, name, lambda _name, node: rows.append(node_values(node).reshape(-1)))
    with streamed(path, expert_top_k=rule, prefetch="off") as llm:
        set_threads(llm, 1)
        set_residency(llm, "third")
        llm.eval(PROMPT)
        rows.clear()
        with llm.record_trace(folder / "trace"), llm.profile() if with_profile else contextlib.nullcontext():
            for token in STEPS[:40]:
                llm.eval([token])
        n_changed = llm.stats().selections_changed
    experts = trace.load(folder / "trace").experts.reshape(len(rows), -1)
    used = [[e for e in row.tolist() if e >= 0] for row in experts]
    n_of_model = WIDE["n_experts_used"]
    assert n_changed == pytest.approx(1 - sum(map(len, used)) / (n_of_model * len(rows)))
    return list(zip(rows, used, strict=True))


def test_our_kernels_stay_close(write_model: ModelWriter) -> None:
    """Guards against our kernels' sums over experts that are not there; the tolerance is test_kernels_option's."""
    path = write_model("olmoe", **WIDE)
    with contextlib.closing(_fewer(path, 2)) as reference, streamed(path, kernels="auto", expert_top_k=2) as llm:
        expected, found = logits(reference, STEPS[:1], STEPS[1:]), logits(llm, STEPS[:1], STEPS[1:])
        assert llm._runtime is not None
    error = ((found - expected) ** 2).mean(axis=1) / expected.var(axis=1)
    assert np.median(error) < 3e-4


@pytest.mark.parametrize("rule", ["2", "top-p:0.7", "map:1-3"])
def test_drafts_prefetch_traces_and_profiles_go_on(rule: str, write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against drafts that get other experts than the same tokens one by one, and features that lose each other
    at the hook they share."""
    path = write_model("qwen3moe", **WIDE)
    options: dict[str, Any] = {"expert_top_k": rule, "logits_all": False, "kernels": "auto", "n_threads": 1}
    tokens = []
    for draft, prefetch in (("off", "off"), ("ngram", "1")):
        with streamed(path, draft=draft, prefetch=prefetch, n_threads_batch=1, **options) as llm:
            set_residency(llm, "third")
            if draft != "off":
                llm._chooser = _Eager(16, 4)
            with llm.record_trace(tmp_path / draft), llm.profile() as profiler:
                tokens.append(list(itertools.islice(llm.generate(PROMPT * 3, temp=0.0), 60)))
            stats = llm.stats()
        assert 0 < stats.selections_changed <= 0.75
        assert profiler.result().decode.select_s > 0
        experts = trace.load(tmp_path / draft).experts
        assert (experts[: 3 * len(PROMPT), 0] >= 0).all()  # the last layer has only the last token
        n_used = (experts[3 * len(PROMPT) :] >= 0).sum(axis=-1)
        assert (n_used >= 1).all()
        assert n_used.mean() < 4
    assert tokens[0] == tokens[1]
    assert stats.accepted_tokens > 0


def test_a_bias_chooses_among_fewer(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against a bias that fills the places that are to stay empty, or counts what is dropped twice."""
    path = write_model("olmoe", **WIDE)
    found = []
    for bias in ("off", 1.0):
        with streamed(path, expert_top_k=3, reuse_bias=bias, top_j=1, prefetch="off") as llm:
            set_threads(llm, 1)
            set_residency(llm, "third")
            llm.eval(PROMPT)
            llm.reset_stats()
            with llm.record_trace(tmp_path / str(bias)):
                for token in STEPS:
                    llm.eval([token])
            found.append(llm.stats())
        experts = trace.load(tmp_path / str(bias)).experts
        assert ((experts >= 0).sum(axis=-1) == 3).all()
    alone, both = found
    assert alone.selections_changed == 0.25
    assert both.selections_changed > 0.25
    assert both.gate_mass_moved > alone.gate_mass_moved
    assert both.expert_hit_rate > alone.expert_hit_rate
    assert both.reuse_bias > 0


def test_settings_that_do_not_fit_the_model_are_refused(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against more experts than there are, losses of another model, and errors that come after a long load."""
    path = write_model("olmoe", **WIDE)
    other = _numbers(write_model("qwen3moe", **WIDE), [2, 4], tmp_path / "other.json")
    mine = _numbers(path, [2, 4], tmp_path / "mine.json")
    fewer = tmp_path / "fewer.json"
    losses = lexi.load(tmp_path / "mine.json", read_model(path))
    lexi.save(dataclasses.replace(losses, of_layer={k: v[:2] for k, v in losses.of_layer.items()}), fewer)
    broken = tmp_path / "broken.json"
    broken.write_bytes((tmp_path / "mine.json").read_bytes()[:-20])
    cases: list[tuple[Any, type[Exception], str]] = [
        (5, BackendError, r"cannot use 5 experts for a token: .* was made for 4; use at most 4"),
        ("map:1-5", BackendError, "was made for 4"),
        ("lexi:4.5", BackendError, "was made for 4"),
        (other, ModelFormatError, "which has other experts"),
        (f"lexi:2@{fewer}", ModelFormatError, "another number of experts used"),
        (f"lexi:2@{broken}", ModelFormatError, "no file of `edgemoe lexi`"),
        (f"lexi:2@{tmp_path / 'none.json'}", ModelFormatError, "make it with `edgemoe lexi`"),
        ("top_p:0.9", ValueError, "expected off, a number"),
    ]
    for make in (edgemoe.Llama, edgemoe.plan):
        for setting, kind, message in cases:
            with pytest.raises(kind, match=message):
                make(path, n_ctx=256, expert_top_k=setting)
    assert edgemoe.plan(path, n_ctx=256, expert_top_k=mine).fits


def test_settings_survive_a_pickle(write_model: ModelWriter) -> None:
    """Guards against a copy that uses other numbers of experts."""
    with streamed(write_model("olmoe"), expert_top_k="top-p:0.9") as llm:
        assert llm.__getstate__()["expert_top_k"] == "top-p:0.9"
