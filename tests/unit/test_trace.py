# SPDX-License-Identifier: MIT
"""Trace files, and what a trace says in a few numbers."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgemoe
from edgemoe import trace
from edgemoe.errors import TraceError
from edgemoe.trace import Trace, TracedRun, TraceLayer
from edgemoe.trace_summary import summarize
from tests.unit.fakes import FakeLlama, error_lines, run


def make_trace(
    seed: int = 0,
    batches: tuple[int, ...] = (5, 1, 1),
    layers: tuple[tuple[int, int, int], ...] = ((1, 16, 4), (2, 9, 2), (7, 16, 4)),
    is_recorded: bool = True,
) -> Trace:
    """A random trace: tokens of each batch, (number, experts, used) of each layer; without costs if not recorded."""
    rng = np.random.default_rng(seed)
    n_tokens, n_used = sum(batches), max(layer[2] for layer in layers)
    experts = np.full((n_tokens, len(layers), n_used), -1, np.int16)
    weights = np.full(experts.shape, np.nan, np.float32)
    for i, (_, n_experts, k) in enumerate(layers):
        experts[:, i, :k] = rng.permuted(np.tile(np.arange(n_experts), (n_tokens, 1)), axis=1)[:, :k]
        weights[:, i, :k] = rng.dirichlet(np.ones(k), n_tokens)
    shape = (len(batches), len(layers))
    resident = np.zeros((*shape, max(layer[1] for layer in layers)), np.bool_)
    for i, (_, n_experts, _) in enumerate(layers):
        resident[:, i, :n_experts] = rng.random((len(batches), n_experts)) < 0.5
    foreseen = np.full((*shape, trace.N_DISTANCES, n_used), -1, np.int16)
    for i, (_, _, k) in enumerate(layers):
        foreseen[:, i, 0, :k] = experts[np.cumsum(batches, dtype=np.int64) - 1, i, :k]
        foreseen[1:, i, 1, : k - 1] = foreseen[1:, i, 0, 1:k]
    unknown = np.full(shape, np.nan)
    return Trace(
        model="tiny é.gguf",
        layers=tuple(TraceLayer(number, n_experts, k, (4096, 4096, 8192)) for number, n_experts, k in layers),
        batch_of_token=np.repeat(np.arange(len(batches), dtype=np.int32), batches),
        experts=experts,
        weights=weights,
        begin_us=rng.random(shape) * 1e6 if is_recorded else unknown,
        wait_us=(rng.random(shape) * 1e3 if is_recorded else unknown).astype(np.float32),
        read_bytes=rng.integers(0, 1 << 40, shape) if is_recorded else np.full(shape, -1),
        resident=resident if is_recorded else None,
        foreseen=foreseen if is_recorded and n_used > 0 else None,
        run=TracedRun(1 << 30, "auto", "2", 4) if is_recorded else None,
    )


def assert_same(found: Trace, expected: Trace) -> None:
    assert (found.model, found.layers) == (expected.model, expected.layers)
    for field in dataclasses.fields(Trace)[2:]:
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert (one is None) == (other is None), field.name
        if isinstance(one, TracedRun):
            assert one == other
        elif one is not None:
            assert one.dtype == other.dtype, field.name
            np.testing.assert_array_equal(one, other, err_msg=field.name)


def blocks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(tag, payload) of each block."""
    found, at = [], 12
    while at < len(data):
        tag, n_bytes = struct.unpack_from("<4sI", data, at)
        found.append((tag, data[at + 12 : at + 12 + n_bytes]))
        at += 12 + n_bytes
    return found


def join(parts: list[tuple[bytes, bytes]]) -> bytes:
    """A file of these blocks, with true checksums."""
    data = b"EMTRACE\0" + struct.pack("<I", 2)
    for tag, payload in parts:
        head = tag + struct.pack("<I", len(payload))
        data += head + struct.pack("<I", zlib.crc32(head + payload)) + payload
    return data


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved.trace"
    trace.save(make_trace(), path)
    return path


# ---------------------------------------------------------------- save and load


@pytest.mark.parametrize("is_recorded", [True, False])
def test_load_gives_back_what_was_saved(tmp_path: Path, is_recorded: bool) -> None:
    """Guards against a field that is rounded, shifted to another token or layer, or lost."""
    expected = make_trace(is_recorded=is_recorded)
    expected.weights[2:, 1] = np.nan  # known for some layers only
    expected.experts[:4, 2] = -1  # as llama.cpp's last layer
    expected.weights[:4, 2] = np.nan
    trace.save(expected, tmp_path / "t")
    assert_same(trace.load(tmp_path / "t"), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    batches=st.lists(st.integers(1, 9), max_size=5),
    layers=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=3),
    is_recorded=st.booleans(),
)
def test_any_shape_survives(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    batches: list[int],
    layers: list[tuple[int, int]],
    is_recorded: bool,
) -> None:
    """Guards against shapes that only the tests' own have: no batch, one expert, layers that differ."""
    shapes = tuple((3 * i, max(sizes), min(sizes)) for i, sizes in enumerate(layers))
    if not batches:
        is_recorded = False  # nothing says what was resident
    expected = make_trace(seed, tuple(batches), shapes, is_recorded)
    path = tmp_path_factory.mktemp("trace") / "t"
    trace.save(expected, path)
    assert_same(trace.load(path), expected)


def test_records_fill_several_blocks(tmp_path: Path) -> None:
    """Guards against a long trace in one block, or one of which only the first block is read."""
    expected = make_trace(batches=(1,) * 3000)
    trace.save(expected, tmp_path / "t")
    assert len(blocks((tmp_path / "t").read_bytes())) > 3
    assert_same(trace.load(tmp_path / "t"), expected)


def test_every_truncation_is_an_error_with_its_offset(saved: Path) -> None:
    """Guards against a shortened file that loads as a shorter trace, or fails with something else than an error."""
    data = saved.read_bytes()
    for n_bytes in range(len(data)):
        saved.write_bytes(data[:n_bytes])
        with pytest.raises(TraceError, match=r"cannot read the trace: .*saved\.trace, offset \d+\)"):
            trace.load(saved)


def test_every_changed_byte_is_an_error_with_its_offset(saved: Path) -> None:
    """Guards against a bit that flipped on the disk and becomes another expert."""
    data = saved.read_bytes()
    for at in range(len(data)):
        saved.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(TraceError, match=r"saved\.trace, offset \d+\)"):
            trace.load(saved)


def test_foreign_files_are_told_apart(tmp_path: Path, saved: Path) -> None:
    """Guards against advice to record again where the path is wrong, and a later version read as this one."""
    with pytest.raises(TraceError, match="No such file"):
        trace.load(tmp_path / "missing")
    with pytest.raises(TraceError, match="Is a directory"):
        trace.load(tmp_path)
    foreign = tmp_path / "model.gguf"
    foreign.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(TraceError, match=r"no trace: found b'GGUF.*offset 0"):
        trace.load(foreign)
    data = saved.read_bytes()
    foreign.write_bytes(data[:8] + struct.pack("<I", 3) + data[12:])
    with pytest.raises(TraceError, match="format version 3, expected 1 to 2"):
        trace.load(foreign)
    foreign.write_bytes(data + b"\0")
    with pytest.raises(TraceError, match="1 bytes behind the end"):
        trace.load(foreign)


def test_wrong_contents_with_true_checksums_are_refused(saved: Path) -> None:
    """Guards against another writer's mistake that becomes an index out of bounds, or a huge allocation."""
    parts = blocks(saved.read_bytes())
    (_, header), (_, records), (_, done) = parts
    no_layers = json.dumps({"model": "x"}).encode()
    unordered = json.dumps({"model": "x", "layers": [*json.loads(header)["layers"]][::-1]}).encode()
    ids = records[:40] + struct.pack("<H", 16) + records[42:]  # layer 1 has 16 experts
    short = struct.pack("<I", 48) + records[4:]
    many_tokens = records[:8] + struct.pack("<I", 0x7FFFFFFF) + records[12:]
    other_layer = records[:12] + struct.pack("<H", 3) + records[14:]
    for wrong in (
        [(b"HEAD", no_layers), *parts[1:]],
        [(b"HEAD", b"[1]"), *parts[1:]],
        [(b"HEAD", b"\xff"), *parts[1:]],
        [(b"HEAD", unordered), *parts[1:]],
        [parts[0], (b"RECS", ids), parts[2]],
        [parts[0], (b"RECS", short), parts[2]],
        [parts[0], (b"RECS", many_tokens), parts[2]],
        [parts[0], (b"RECS", other_layer), parts[2]],
        [parts[0], (b"RECS", records[:-1]), parts[2]],
        [*parts[:2], (b"DONE", struct.pack("<Q", 8))],
        [*parts[:2], (b"DONE", done + b"\0")],
        [parts[0], parts[2]],
        [*parts[:2], (b"MORE", b""), parts[2]],
        parts[1:],
    ):
        saved.write_bytes(join(wrong))
        with pytest.raises(TraceError, match=r"corrupt: .*offset \d+\)"):
            trace.load(saved)
    saved.write_bytes(join(parts))
    assert_same(trace.load(saved), make_trace())


def test_fewer_tokens_are_the_last_and_missing_layers_are_empty(saved: Path) -> None:
    """Guards against a prompt's last layer, which llama.cpp computes for few tokens, given to the first ones."""
    trace.save(dataclasses.replace(make_trace(), foreseen=None), saved)
    (_, header), (_, records), _ = blocks(saved.read_bytes())
    n_bytes = [struct.unpack_from("<I", records, 0)[0]]
    n_bytes.append(struct.unpack_from("<I", records, n_bytes[0])[0])
    first, second = records[: n_bytes[0]], records[n_bytes[0] : sum(n_bytes)]
    # Layer 2 has two ids and two weights for each of five tokens, and a resident set of two bytes.
    shorter = struct.pack("<III", 40 + 2 * 4 + 2 + 2 * 8, 0, 2) + second[12:48] + second[60:62] + second[62:78]
    parts = [(b"HEAD", header), (b"RECS", first + shorter), (b"DONE", struct.pack("<Q", 2))]
    saved.write_bytes(join(parts))
    expected, found = make_trace(), trace.load(saved)
    assert (found.n_tokens, found.n_batches) == (5, 1)
    np.testing.assert_array_equal(found.experts[:, 0], expected.experts[:5, 0])
    np.testing.assert_array_equal(found.experts[3:, 1], expected.experts[:2, 1])
    assert (found.experts[:3, 1] == -1).all() and np.isnan(found.weights[:3, 1]).all()
    assert (found.experts[:, 2] == -1).all()
    assert math.isnan(found.begin_us[0, 2]) and found.read_bytes[0, 2] == -1


def test_save_refuses_what_it_could_not_give_back(tmp_path: Path) -> None:
    """Guards against a generated trace that is wrong and becomes another one in the file."""
    good = make_trace()
    experts = good.experts.copy()
    experts[0, 1, 0] = 9
    hidden = good.experts.copy()
    hidden[0, 1, 3] = 1
    wrong = {
        "chooses expert 9 of 9": {"experts": experts},
        "more than 2 experts": {"experts": hidden},
        "no layers": {"layers": ()},
        "count up from 0": {"batch_of_token": good.batch_of_token[::-1]},
        "its layers are": {"layers": good.layers[::-1]},
        "wait_us is": {"wait_us": good.wait_us[:2]},
        "foreseen is": {"foreseen": good.foreseen[:2]},
    }
    for message, fields in wrong.items():
        with pytest.raises(TraceError, match=message):
            trace.save(dataclasses.replace(good, **fields), tmp_path / "t")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TraceError, match="cannot write the trace: No such file"):
        trace.save(good, tmp_path / "none" / "t")


def test_full_disk_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against half a trace under its name, or beside it, and a good one lost for it."""
    before = saved.read_bytes()

    def fsync(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TraceError, match="cannot write the trace: No space left"):
        trace.save(make_trace(1), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_files_of_the_first_version_still_load(tmp_path: Path) -> None:
    """Guards against traces lost with an update: version 1 had neither predictions nor settings."""
    old = dataclasses.replace(make_trace(), foreseen=None, run=None)
    trace.save(old, tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data[:8] + struct.pack("<I", 1) + data[12:])
    assert_same(trace.load(tmp_path / "t"), old)


def test_wrong_predictions_with_true_checksums_are_refused(saved: Path) -> None:
    """Guards against a number of experts that reads behind the block, and experts that the layer does not have."""
    (_, header), (_, records), done = blocks(saved.read_bytes())
    at = 40 + 2 * 5 * 4 + 2  # layer 1 of the first batch: five tokens of four ids, 16 resident
    assert struct.unpack_from("<H", records, at)[0] == 4
    for wrong in (
        records[:at] + struct.pack("<H", 0xFFFF) + records[at + 2 :],
        records[:at] + struct.pack("<H", 3) + records[at + 2 :],
        records[: at + 2] + struct.pack("<H", 16) + records[at + 4 :],
    ):
        saved.write_bytes(join([(b"HEAD", header), (b"RECS", wrong), done]))
        with pytest.raises(TraceError, match=r"corrupt: .*offset \d+\)"):
            trace.load(saved)
    odd_run = json.dumps(dict(json.loads(header), run={"slots_bytes": 1})).encode()
    saved.write_bytes(join([(b"HEAD", odd_run), (b"RECS", records), done]))
    with pytest.raises(TraceError, match="the header is not what it should be"):
        trace.load(saved)


# ---------------------------------------------------------------- summary


def chosen(*tokens: list[int], n_experts: int = 4) -> Trace:
    """A recorded trace of one layer, token by token, in which experts 0 and 1 are always resident."""
    made = make_trace(batches=(1,) * len(tokens), layers=((0, n_experts, len(tokens[0])),))
    resident = np.zeros_like(made.resident)
    resident[:, :, :2] = True
    return dataclasses.replace(
        made,
        experts=np.array(tokens, np.int16)[:, None, :],
        resident=resident,
        weights=np.full_like(made.weights, 0.25),
    )


def test_summary_of_a_trace_that_can_be_counted_by_hand() -> None:
    """Guards against a rate over the wrong whole: tokens for choices, or first uses left out."""
    made = chosen([0, 1], [1, 2], [2, 3], [0, 2])
    found = summarize(made)
    assert (found.tokens, found.decode_tokens, found.batches) == (4, 4, 4)
    assert found.next_token_reuse == 3 / 6
    assert found.hit_rate == found.decode_hit_rate == 4 / 8
    assert found.first_use_share == 4 / 8
    # Reuses: 1 at distance 0, 2 at 0 and at 1 (3 came after it), 0 at 3 (1, 2, 3).
    assert found.lru_hit_rates == ((0.125, 0.0), (0.25, 2 / 8), (0.5, 3 / 8))
    assert found.reuse_distance_median == 0
    assert found.router_entropy_bits == 1.0
    assert found.load_imbalance == 3 / 2
    assert found.bytes_per_token == made.read_bytes.sum() / 4
    assert found.stall_us_per_token == pytest.approx(made.wait_us.sum() / 4)


def test_lru_hit_rates_are_those_of_an_lru_cache() -> None:
    """Guards against a stack distance that is off by one, or counts an expert twice."""
    made = make_trace(3, batches=(1,) * 200, layers=((0, 16, 1),))
    rates = dict(summarize(made).lru_hit_rates)
    for share, n_slots in ((0.125, 2), (0.25, 4), (0.5, 8)):
        cache: list[int] = []
        n_hits = 0
        for expert in made.experts[:, 0, 0].tolist():
            if expert in cache:
                n_hits += 1
                cache.remove(expert)
            cache = [*cache, expert][-n_slots:]
        assert rates[share] == n_hits / 200


def test_summary_counts_a_prompts_experts_once_and_its_bytes_not() -> None:
    """Guards against rates that differ from the runtime's, which counts distinct experts of a batch."""
    made = dataclasses.replace(chosen([0, 1], [0, 2], [2, 3]), batch_of_token=np.array([0, 0, 1], np.int32))
    fields = {name: getattr(made, name)[:2] for name in ("begin_us", "wait_us", "read_bytes", "resident")}
    found = summarize(dataclasses.replace(made, **fields))
    assert found.hit_rate == 2 / 5
    assert found.decode_hit_rate == 0.0
    assert found.bytes_per_token == made.read_bytes[1, 0]


def test_summary_of_what_is_unknown_is_none() -> None:
    """Guards against a generated trace shown with zero bytes and stall, as if it had been measured."""
    made = make_trace(is_recorded=False)
    made.weights[:] = np.nan
    found = summarize(made)
    assert found.hit_rate is found.bytes_per_token is found.stall_us_per_token is found.router_entropy_bits is None
    assert found.next_token_reuse is not None
    empty = summarize(make_trace(batches=(), is_recorded=False))
    assert empty.next_token_reuse is empty.load_imbalance is empty.reuse_distance_median is None


# ---------------------------------------------------------------- command line


def test_show(saved: Path) -> None:
    """Guards against a table or JSON object that says something else than the summary."""
    fields = json.loads(run("trace", "show", str(saved), "--json").stdout)
    assert fields == json.loads(json.dumps(summarize(make_trace()).to_dict()))
    table = run("trace", "show", str(saved)).stdout
    assert "7 in 3 batches, 2 of one token" in table
    assert len(table.splitlines()) == 11 + 2 + 3


def test_show_says_what_is_wrong_with_a_file(saved: Path) -> None:
    """Guards against a traceback for a file that was cut off."""
    saved.write_bytes(saved.read_bytes()[:-3])
    result = run("trace", "show", str(saved))
    assert result.exit_code == 1
    assert len(error_lines(result)) == 1 and "truncated" in error_lines(result)[0]


def test_show_of_a_generated_trace(tmp_path: Path) -> None:
    """Guards against a table that formats what is unknown."""
    made = make_trace(is_recorded=False)
    made.weights[:] = np.nan
    trace.save(made, tmp_path / "t")
    result = run("trace", "show", str(tmp_path / "t"))
    assert result.exit_code == 0, result.output
    assert "- bits over" in result.stdout


def test_record_writes_the_trace_of_the_answer(llama: type[FakeLlama], model: str, tmp_path: Path) -> None:
    """Guards against a recording of other tokens, or of the demo where a model was named."""
    out = tmp_path / "out.trace"
    llama.answers = [[ord("a"), ord("b")]]
    result = run("trace", "record", model, "-p", "question", "--memory", "1GiB", str(out))
    assert result.exit_code == 0, result.output
    assert llama.prompts == ["question"]
    assert (llama.options["path"], llama.options["memory"]) == (model, 1 << 30)
    assert out.read_text() == "2 checks"
    assert result.stdout == f"{out} (8 B)\n"
    result = run("trace", "record", model, str(out))
    assert result.exit_code == 1 and "the file exists" in error_lines(result)[0]
    assert run("trace", "record", model, str(out), "--force").exit_code == 0
    assert run("trace", "record").exit_code == 2
    assert run("trace", "record", model, str(out), "-p", "x", "-f", model).exit_code == 2


def test_record_of_the_demo(
    llama: type[FakeLlama], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against OUT taken for the model, which would be overwritten."""
    monkeypatch.setitem(vars(edgemoe), "demo_model", lambda progress: Path(model))
    result = run("trace", "record", str(tmp_path / "out.trace"))
    assert result.exit_code == 0, result.output
    assert llama.options["path"] == model
    assert (tmp_path / "out.trace").exists()


def test_record_stops_at_once_when_the_recording_has_ended(llama: type[FakeLlama], model: str, tmp_path: Path) -> None:
    """Guards against a long answer that is generated for a trace that failed at its first token."""
    llama.answers = [[ord("a"), ord("b"), ord("c")]]
    llama.trace_fails_at = 1
    result = run("trace", "record", model, str(tmp_path / "out.trace"))
    assert result.exit_code == 1
    assert error_lines(result) == ["edgemoe: error: the disk is full (token 1)"]
