# SPDX-License-Identifier: MIT
"""The arithmetic of the benchmarks: what they report must follow from the readings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from benchmarks import instructions, kernels, memory_pressure, observing, quality, resident, session


def test_kl_is_zero_for_equal_logits_and_positive_for_others() -> None:
    logits = np.random.default_rng(0).standard_normal((100, 50)).astype(np.float32)
    assert np.allclose(quality.kl_divergences(logits, logits + 3), 0, atol=1e-12)  # softmax ignores a shift
    assert (quality.kl_divergences(logits, logits[:, ::-1]) > 0).all()


def test_kl_of_two_outcomes() -> None:
    logits = np.log(np.array([[0.5, 0.5]], np.float32)), np.log(np.array([[0.25, 0.75]], np.float32))
    assert quality.kl_divergences(*logits)[0] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_recast_keeps_everything_but_the_experts(write_model: Callable[..., Path], tmp_path: Path) -> None:
    source = write_model("gpt-oss")
    recast = quality.recast_experts(source, tmp_path / "f32.gguf", lambda _: "F32")
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(recast)
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert list(new.shape) == list(old.shape)
        if "_exps.weight" in old.name:
            assert new.tensor_type == gguf.GGMLQuantizationType.F32
            assert np.array_equal(new.data, gguf.dequantize(old.data, old.tensor_type))
        else:
            assert new.tensor_type == old.tensor_type
            assert np.array_equal(new.data, old.data)
    names = {name for name in before.fields if not name.startswith("GGUF.")}
    assert {name for name in after.fields if not name.startswith("GGUF.")} == names
    assert all(after.fields[name].contents() == before.fields[name].contents() for name in names)


def test_recast_quantizes_by_width(write_model: Callable[..., Path], tmp_path: Path) -> None:
    recast = quality.recast_experts(write_model("olmoe"), tmp_path / "new.gguf", lambda width: f"Q{width // 64}_0")
    types = {t.tensor_type.name for t in gguf.GGUFReader(recast).tensors if "_exps.weight" in t.name}
    assert types == {"Q4_0"}  # rows of 256


def _readings(**values: list[float]) -> dict[str, Any]:
    return {"kind": "decode", "format": "q4_K", "isa": "best", "threads": 2, "disturbed": False, "readings": values}


def test_kernels_takes_ratios_within_repetitions() -> None:
    # The machine slowed down to a half in the second repetition; the shares did not change.
    row = kernels.summarize(
        _readings(memory=[40, 20, 40], ours=[38, 19, 38], ggml_vec_dot=[20, 10, 20], ggml_mul_mat_id=[19, 9, 19])
    )
    assert row["roof_share"] == pytest.approx(0.95)
    assert (row["ggml_best"], row["ratio"]) == ("ggml_vec_dot", pytest.approx(1.9))
    assert [one["met"] for one in kernels.find_targets([row])] == [True, True]


def test_kernels_asks_less_of_one_thread() -> None:
    row = kernels.summarize({**_readings(memory=[10], ours=[8.7], ggml_vec_dot=[9.0]), "threads": 1})
    assert [one["met"] for one in kernels.find_targets([row])] == [True, False]


def _run(engine: str, pair: int, speed: float, disturbed: bool = False) -> dict[str, Any]:
    return {"engine": engine, "pair": pair, "decode_tok_per_s": speed, "disturbed": disturbed}


@pytest.mark.parametrize(
    ("instruction", "kinds"),
    [
        ("vpdpbusd zmm8,zmm1,zmm2", {"multiplications", "vector_operations"}),
        ("{vex} vpdpbusd ymm8,ymm1,YMMWORD PTR [rax+0x10]", {"multiplications", "vector_operations", "vector_loads"}),
        ("vpbroadcastd ymm1,DWORD PTR [rdx+0x4]", {"vector_loads"}),
        ("vmovdqa ymm1,YMMWORD PTR [rsp+0x88]", {"vector_loads", "stack"}),
        ("vmovaps YMMWORD PTR [rsp+0x328],ymm14", {"vector_stores", "stack"}),
        ("vmovdqa ymm4,ymm0", set()),  # renamed, not executed
        ("vpsignb ymm3,ymm3,ymm4", {"vector_operations"}),
        ("prefetcht0 BYTE PTR [rax]", {"prefetches"}),
        ("add    rdx,0x20", set()),
    ],
)
def test_instructions_are_counted_as_what_they_cost(instruction: str, kinds: set[str]) -> None:
    # Guards against: a bound computed from loads taken for operations, or from spills not seen.
    assert instructions.classify(instruction) == kinds | {"instructions"}


def test_bounds_follow_from_counts() -> None:
    # 128 dot products of 64 products each, and 32 multiplications more on the same ports: 64 cycles of 80.
    totals = {"instructions": 320, "multiplications": 160, "vector_operations": 192, "vector_loads": 100}
    found = instructions.bounds(totals, 128 * 64, False, "avx512_vnni")
    assert found["multiplications"] == pytest.approx(0.8)
    assert min(found, key=lambda kind: found[kind]) == "multiplications"


def test_resident_compares_within_pairs_and_with_the_better_stock() -> None:
    records = [_run("ours", pair, 30.0 + pair) for pair in range(3)]
    records += [_run("stock", pair, 20.0) for pair in range(3)] + [_run("stock-plain", pair, 25.0) for pair in range(2)]
    assert resident.better_stock(records, "decode_tok_per_s") == "stock-plain"
    assert resident.pair_ratios(records, "decode_tok_per_s", "stock-plain") == [30 / 25, 31 / 25]


def test_resident_leaves_out_disturbed_pairs_while_enough_remain() -> None:
    records = [
        _run(engine, pair, 1.0, pair == 1 and engine == "ours") for pair in range(4) for engine in ("ours", "stock")
    ]
    assert {one["pair"] for one in resident.clean(records)} == {0, 2, 3}
    assert resident.clean(records[:6]) == records[:6]


def test_a_target_not_measured_is_missed() -> None:
    assert not session.target("x", None, 1.0)["met"]
    assert session.target("x", 0.5, 0.6, at_most=True)["met"]


def test_observing_compares_within_rounds() -> None:
    """Guards against a cost that is the machine's drift, and an interval that is narrower than its promise."""
    drift = [1.0, 2.0, 1.5, 4.0, 0.5, 1.0, 3.0, 1.0]
    windows = [
        {"round": n, "mode": mode, "token_s": seconds * (1.02 if mode == "profile" else 1.0), "disturbed": False}
        for n, seconds in enumerate(drift)
        for mode in observing.MODES
    ]
    assert observing.costs(windows, "profile") == pytest.approx([2.0] * len(drift))
    (target,) = observing.report(windows)
    assert target["met"] and target["found"] == pytest.approx(0.0)
    # Of draws with median 0, the interval holds it at least 95 times in a hundred (here: with 6, 7, 20 values each).
    for n_values in (6, 7, 20):
        draws = np.random.default_rng(n_values).standard_normal((4000, n_values))
        bounds = np.array([observing.interval(list(one)) for one in draws])
        assert np.mean((bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)) >= 0.95


def test_a_process_that_was_killed_has_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a ratio to a process that did not survive, and against one of the wrong half."""

    def one(*, loop: bool, speed: float | None) -> dict[str, Any]:
        part = {"tokens_per_s": speed, "faults_per_token": 3.0, "slots_mib": 900.0}
        measured = {} if speed is None else {"before": part, "first": {**part, "tokens_per_s": 99.0}, "second": part}
        return {"loop": loop, "seed": 1, "killed": speed is None, **measured}

    speeds = [(2.0, 1.0), (3.0, 1.0), (4.0, None)]
    memory_pressure.report([(one(loop=True, speed=a), one(loop=False, speed=b)) for a, b in speeds])
    printed = capsys.readouterr().out
    assert printed.count("killed by the system") == 1
    assert "on / off, second half: 2.50 [2.00-3.00]" in printed
