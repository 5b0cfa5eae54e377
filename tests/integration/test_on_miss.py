# SPDX-License-Identifier: MIT
"""Experts that are not waited for under llama.cpp's graph: left out of everything, or their low-bit copies used."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp import llama_cpp as low_level

import edgemoe
from benchmarks import synthetic
from edgemoe import trace
from edgemoe.converters.evaluate import GgmlTensor
from edgemoe.converters.lowbit import make_companion
from edgemoe.errors import BackendError, ModelFormatError
from tests.conftest import ModelWriter
from tests.integration.support import await_preloads, logits, python, set_residency, set_threads, stock, streamed
from tests.integration.test_reuse import PROMPT, STEPS, WIDE

NO_EXPERT = -1
# Softmax with and without renormalization, logits with biases, sigmoid with a correction bias and groups.
SKIPPING = ["olmoe", "qwen3moe", "gpt-oss", "deepseek2-v3", "granitemoe"]


def _companion(path: Path, quant: str) -> Path:
    out = path.with_name(f"{path.stem}-{quant}.low.gguf")
    if not out.exists():
        make_companion(path, out, quant=quant)
    return out


@contextlib.contextmanager
def _callback(monkeypatch: pytest.MonkeyPatch, look: Any) -> Iterator[None]:
    """Contexts made within call `look(node, ask)` for each node."""

    def on_node(address: int, ask: bool, _user_data: Any) -> bool:
        node = ctypes.cast(address, ctypes.POINTER(GgmlTensor)).contents
        return bool(look(node, ask)) or not ask

    callback = low_level.ggml_backend_sched_eval_callback(on_node)
    defaults = low_level.llama_context_default_params

    def with_callback() -> Any:
        params = defaults()
        params.cb_eval = callback
        return params

    with monkeypatch.context() as patch:
        patch.setattr(low_level, "llama_context_default_params", with_callback)
        yield


def _array(node: Any, dtype: type) -> Any:
    """The node's elements, in place."""
    n = int(np.prod(node.ne[:]))
    return np.frombuffer((ctypes.c_char * (4 * n)).from_address(node.data), dtype)


@pytest.mark.parametrize("arch", SKIPPING)
def test_a_threshold_of_one_is_exact(arch: str, write_model: ModelWriter) -> None:
    """Guards against bits that change because a graph is interrupted, and routers in which nothing is recognized."""
    path = write_model(arch)
    with contextlib.closing(stock(path)) as reference:
        expected = logits(reference, PROMPT, STEPS[:8])
    with streamed(path, on_miss="skip", on_miss_mass=1.0) as llm:
        set_residency(llm, "cycle")
        assert np.array_equal(logits(llm, PROMPT, STEPS[:8]), expected)
        stats = llm.stats()
        assert llm._choosers.selection._miss.stats().n_selections == 8 * llm._gguf.n_moe_layers  # type: ignore[union-attr]
    assert (stats.skipped_experts, stats.selections_changed, stats.gate_mass_moved, stats.kl_estimate) == (0, 0, 0, 0)


@pytest.mark.parametrize("arch", SKIPPING)
def test_what_is_skipped_is_left_out_of_everything(
    arch: str, write_model: ModelWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against weights that are normalized over experts left out, skipped experts that are read or computed, and
    residents that are skipped: llama.cpp itself, with the mixing weights of those that we skipped set to nothing before
    it gathers them, gives the same bits."""
    path, steps = write_model(arch, **WIDE), STEPS[:12]
    with streamed(path, on_miss="skip", on_miss_mass=0.3, prefetch="off") as llm:
        set_residency(llm, "third")
        llm.eval(PROMPT)
        assert llm.stats().skipped_experts == 0
        llm.reset_stats()
        with llm.record_trace(tmp_path / "trace"):
            for token in steps:
                llm.eval([token])
        found, stats, n_layers = llm.scores[: llm.n_tokens].copy(), llm.stats(), llm._gguf.n_moe_layers
    recorded = trace.load(tmp_path / "trace")
    k = WIDE["n_experts_used"]
    asked = recorded.experts.reshape(-1, recorded.experts.shape[-1])[:, :k]
    assert len(asked) == len(steps) * n_layers
    n_skipped = int((asked == NO_EXPERT).sum())
    assert 0.05 * asked.size < n_skipped == stats.skipped_experts
    assert stats.selections_changed == pytest.approx(n_skipped / asked.size)
    assert stats.expert_hits + stats.expert_misses + stats.expert_late_hits == asked.size - n_skipped
    assert 0 < stats.gate_mass_moved <= 0.7

    turns = iter(asked)
    masses: dict[str, Any] = {}
    n_left_out: list[int] = []

    def leave_out(node: Any, ask: bool) -> bool:
        name, _, layer = node.name.decode().partition("-")
        if name not in ("ffn_moe_probs", "ffn_moe_argsort") or node.ne[1] != 1 or not is_decoding:
            return False
        if name == "ffn_moe_probs":
            masses[layer] = node
        elif not ask:
            used, mass = next(turns), _array(masses[layer], np.single)
            order = _array(node, np.int32)[:k]
            kept = used != NO_EXPERT
            assert order[kept].tolist() == used[kept].tolist()
            mass[order[~kept]] = -np.inf if arch == "gpt-oss" else 0.0
            n_left_out.append(int((~kept).sum()))
        return True

    is_decoding = False
    with _callback(monkeypatch, leave_out), contextlib.closing(stock(path)) as reference:
        reference.eval(PROMPT)
        is_decoding = True
        for token in steps:
            reference.eval([token])
        expected = reference.scores[: reference.n_tokens].copy()
    assert sum(n_left_out) == n_skipped
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "deepseek2-merged", "deepseek2-v3"])
def test_copies_of_the_same_bits_change_nothing(arch: str, write_model: ModelWriter) -> None:
    """Guards against a copy of another expert, of another projection or with another's bias, whatever is resident."""
    path = write_model(arch, **WIDE, quant="Q8_0", down_quant="Q8_0")
    low = _companion(path, "Q8_0")
    with streamed(path, kernels="auto") as llm:
        if llm.stats().kernels == "ggml":
            pytest.skip("this CPU has only the portable kernels")
        expected = logits(llm, PROMPT, STEPS[:10])
    lossy = {"on_miss": "lowbit", "lowbit": low, "on_miss_mass": 0.0, "on_miss_skip_mass": 1.0}
    for residency in ("third", "cycle", "fewest"):
        for prefetch in ("off", "2"):
            with streamed(path, kernels="auto", prefetch=prefetch, **lossy) as llm:
                set_residency(llm, residency)
                assert np.array_equal(logits(llm, PROMPT, STEPS[:10]), expected), (residency, prefetch)
                stats = llm.stats()
            assert stats.lowbit_hits > 0, residency
            assert (stats.skipped_experts, stats.selections_changed, stats.gate_mass_moved) == (0, 0, 0)


def test_copies_beside_experts_of_ggml(write_model: ModelWriter) -> None:
    """Guards against copies in our kernels whose model's own experts are ggml's, with its activations: copies in 8 bits
    of experts in 5 are nearly the experts."""
    path = write_model("qwen3moe", **WIDE, quant="Q5_0", down_quant="Q5_0")
    low = _companion(path, "Q8_0")
    with streamed(path, kernels="auto") as llm:
        assert llm.stats().kernels == "ggml"
        expected = logits(llm, PROMPT, STEPS[:10])
    try:
        llm = streamed(path, kernels="auto", on_miss="lowbit", lowbit=low, on_miss_mass=0.0, on_miss_skip_mass=1.0)
    except BackendError as error:
        pytest.skip(str(error))
    with llm:
        set_residency(llm, "fewest")
        found = logits(llm, PROMPT, STEPS[:10])
        assert llm.stats().lowbit_hits > 50
    assert np.array_equal(found[: len(PROMPT)], expected[: len(PROMPT)])
    difference = found[len(PROMPT) :] - expected[len(PROMPT) :]
    assert 0 < difference.std() < 0.05 * expected[len(PROMPT) :].std()


def _weights(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape([int(n) for n in t.shape[::-1]])
        for t in gguf.GGUFReader(path).tensors
        if "_exps.weight" in t.name
    }


def test_all_but_the_best_are_the_companions(
    write_model: ModelWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against full experts where copies are meant, and copies where the best is meant: with next to nothing
    resident, layers' outputs are those of float arithmetic on the two files' weights."""
    path = write_model("olmoe", **WIDE)
    low = _companion(path, "Q2_K")
    inputs: list[Any] = []
    outputs: list[Any] = []

    def look(node: Any, ask: bool) -> bool:
        name, _, layer = node.name.decode().partition("-")
        if name not in ("ffn_norm", "ffn_moe_out") or not layer.isdecimal() or node.ne[1] != 1:
            return False
        if not ask:
            (inputs if name == "ffn_norm" else outputs).append(_array(node, np.single).copy())
        return True

    lossy = {"on_miss": "lowbit", "lowbit": low, "on_miss_mass": 0.0, "on_miss_skip_mass": 1.0}
    with _callback(monkeypatch, look):
        try:
            llm = streamed(path, kernels="auto", prefetch="off", **lossy)
        except BackendError as error:
            pytest.skip(str(error))
    with llm:
        set_residency(llm, "fewest")
        llm.eval(PROMPT)
        llm.reset_stats()
        inputs.clear()
        outputs.clear()
        with llm.record_trace(tmp_path / "trace"):
            for token in STEPS[:6]:
                llm.eval([token])
        stats, n_layers = llm.stats(), llm._gguf.n_moe_layers
    k = WIDE["n_experts_used"]
    recorded = trace.load(tmp_path / "trace")
    assert recorded.weights is not None and recorded.resident is not None
    ids, mixing = (a.reshape(len(inputs), -1)[:, :k] for a in (recorded.experts, recorded.weights))
    here = np.take_along_axis(recorded.resident.reshape(len(inputs), -1), ids.astype(np.int64), axis=1)
    is_full = here | (np.arange(k) == mixing.argmax(axis=1, keepdims=True))
    assert stats.lowbit_hits == (~is_full).sum() > 0.9 * (k - 1) * len(inputs)
    full, copies = _weights(path), _weights(low)
    for i, (x, found) in enumerate(zip(inputs, outputs, strict=True)):
        sums = []
        for of_full, of_copies in ((full, copies), (full, full), (copies, copies)):
            total = np.zeros_like(found)
            for used, (expert, weight) in enumerate(zip(ids[i], mixing[i], strict=True)):
                source = of_full if is_full[i, used] else of_copies
                gate, up, down = (
                    source[f"blk.{i % n_layers}.ffn_{p}_exps.weight"][expert] for p in ("gate", "up", "down")
                )
                h = gate @ x
                total += weight * (down @ (h / (1 + np.exp(-h)) * (up @ x)))
            sums.append(float(np.linalg.norm(total - found) / np.linalg.norm(found)))
        # Activations of 8 bits: below 1 %. Copies of 2.6 bits differ by about 30 % from their experts.
        assert sums[0] < 0.03, sums
        assert min(sums[1:]) > 3 * sums[0], sums


def test_everything_else_goes_on(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against features that know nothing of copies: drafts, prefetch, a bias, traces, profiles, warm starts, and
    slots that are taken away and given back."""
    path = write_model("olmoe", **WIDE)
    low = _companion(path, "Q2_K")
    options = {"on_miss": "lowbit", "lowbit": low, "on_miss_mass": 0.3, "reuse_bias": 0.1, "draft": "ngram"}
    options |= {"kernels": "auto", "prefetch": "1", "warm_start": True, "logits_all": False}
    for round_ in range(2):
        try:
            llm = streamed(path, **options)
        except BackendError as error:
            pytest.skip(str(error))
        with llm:
            set_threads(llm, 1)
            await_preloads(llm)
            set_residency(llm, "third")
            with llm.record_trace(tmp_path / f"trace-{round_}"), llm.profile():
                tokens = list(itertools.islice(llm.generate(PROMPT * 3, temp=0.0), 40))
            set_residency(llm, "fewest")
            llm.eval(STEPS[:3])
            llm.eval(STEPS[3:4])
            set_residency(llm, "all")
            llm.eval(STEPS[4:5])
            stats = llm.stats()
            assert llm._runtime is not None
            assert (llm._runtime.preload_stats().read_bytes > 0) == (round_ == 1)
        assert len(tokens) == 40
        assert stats.lowbit_hits > 0
        recorded = trace.load(tmp_path / f"trace-{round_}")
        assert recorded.experts.max() < WIDE["n_experts"]
        assert recorded.experts.min() >= NO_EXPERT


def test_copies_that_cannot_be_used_are_refused(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against another model's weights in a token's sum, a copy that ends early, a silent change of kernels, and
    errors that come after a long load only."""
    path = write_model("olmoe")
    low, other = _companion(path, "Q2_K"), _companion(write_model("olmoe", seed=5), "Q2_K")
    wider = _companion(write_model("olmoe", **WIDE), "Q2_K")
    ours = low.read_bytes()
    (tmp_path / "short.gguf").write_bytes(ours[: len(ours) // 2])
    (tmp_path / "header.gguf").write_bytes(ours[:2000])
    for make in (edgemoe.Llama, edgemoe.plan):
        for lowbit, message in (
            (other, "same shapes and other weights"),
            (wider, "has other experts"),
            (path, "low-bit companion: found general.type"),
            (tmp_path / "short.gguf", "truncated|ends"),
            (tmp_path / "header.gguf", "short|ends|truncated"),
            (tmp_path / "missing.gguf", "cannot (read|open)"),
        ):
            with pytest.raises(ModelFormatError, match=message):
                make(path, n_ctx=256, on_miss="lowbit", lowbit=lowbit)
        for lowbit, kernels in ((low, "ggml"), (_companion(path, "Q5_0"), "auto")):
            with pytest.raises(BackendError, match=r"low-bit copy blk.*own kernels"):
                make(path, n_ctx=256, on_miss="lowbit", lowbit=lowbit, kernels=kernels)
        with pytest.raises(ValueError, match="needs the model's low-bit copy"):
            make(path, n_ctx=256, on_miss="lowbit")


BUDGET = """
import json, sys
import edgemoe
from benchmarks import synthetic
options = {"n_ctx": 512, "n_batch": 128, "n_threads": 2, "on_miss": "lowbit", "lowbit": sys.argv[2]}
options |= {"on_miss_mass": 0.2, "on_miss_skip_mass": 1.0, "prefetch": "off", "warm_start": False}
alone = edgemoe.plan(sys.argv[1], n_ctx=512, n_batch=128, n_threads=2, prefetch="off").floor_bytes
floor = edgemoe.plan(sys.argv[1], **options).floor_bytes
found = [alone, floor]
for memory in (floor, floor + (48 << 20)):
    with edgemoe.Llama(sys.argv[1], memory=memory, **options) as llm:
        tokens = synthetic.local_tokens(96, 8192)
        llm.eval(tokens[:64])
        for token in tokens[64:]:
            llm.eval([token])
        stats = llm.stats()
        found.append([memory, stats.peak_rss_bytes, stats.slots_bytes, llm.plan.slots_bytes, stats.lowbit_hits])
print(json.dumps(found))
"""


def test_both_precisions_share_the_budget(tmp_path: Path) -> None:
    """Guards against memory for copies that no line of the plan knows, and a floor that does not run."""
    shape = {"n_layers": 2, "expert_ff": 256, "n_experts": 32, "n_vocab": 8192, "quant": "Q8_0", "down_quant": "Q8_0"}
    path = synthetic.write_preset(tmp_path / "large.gguf", "olmoe", **shape)
    done = python(BUDGET, path, _companion(path, "Q4_0"))
    if "own kernels" in done.stderr:
        pytest.skip("this CPU has only the portable kernels")
    assert done.returncode == 0, done.stderr
    alone, floor, *runs = json.loads(done.stdout)
    copies_of_a_layer = 8 * 3 * 256 * 2048 * 18 // 32
    assert copies_of_a_layer < floor - alone < 2 * copies_of_a_layer + (2 << 20)
    for memory, peak_rss_bytes, slots_bytes, planned_bytes, lowbit_hits in runs:
        assert peak_rss_bytes <= memory
        assert slots_bytes == planned_bytes
        assert lowbit_hits > 0
    assert runs[1][2] > runs[0][2] + (16 << 20)


def test_settings_survive_a_pickle(write_model: ModelWriter) -> None:
    """Guards against a copy that waits where the original does not."""
    with streamed(write_model("olmoe"), on_miss="skip", on_miss_mass=0.25) as llm:
        state = llm.__getstate__()
    assert (state["on_miss"], state["on_miss_mass"], state["lowbit"]) == ("skip", 0.25, None)
