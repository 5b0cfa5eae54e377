# SPDX-License-Identifier: MIT
"""The file of a warm start: what was written is read, and nothing else is believed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import multiprocessing
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgemoe import warm
from edgemoe.formats.gguf import GgufModel, GgufTensor, read_model
from edgemoe.warm import HotSet, UnusableError
from tests.conftest import ModelWriter

SHAPE = (3, 8)
KEY = bytes(range(32))


def _hot_set(seed: int, n_experts: int = 10, shape: tuple[int, int] = SHAPE) -> HotSet:
    rng = np.random.default_rng(seed)
    order = rng.permutation(shape[0] * shape[1])[:n_experts]
    return HotSet(rng.integers(0, 256, shape, dtype=np.uint8), order.astype(np.uint32))


def _assert_equal(found: Sequence[HotSet], expected: Sequence[HotSet]) -> None:
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert np.array_equal(f.signature, e.signature)
        assert f.experts.tolist() == e.experts.tolist()


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("shape", [SHAPE, (1, 2), (61, 384), (300, 300)])
@pytest.mark.parametrize("n_sets", [0, 1, 8])
def test_what_is_packed_is_unpacked(n_sets: int, shape: tuple[int, int]) -> None:
    """Guards against a field lost, or an expert's number that does not fit."""
    n_all = shape[0] * shape[1]
    sets = [_hot_set(seed, [0, n_all, min(10, n_all)][seed % 3], shape) for seed in range(n_sets)]
    _assert_equal(warm.unpack(warm.pack(KEY, shape, sets), KEY, shape), sets)


def test_files_are_as_small_as_promised() -> None:
    """Guards against a file that outgrows what the module's description says."""
    for shape, share, kib in (((16, 64), 1.0, 24), ((48, 128), 1.0, 144), ((48, 128), 0.25, 72)):
        sets = [_hot_set(seed, int(share * shape[0] * shape[1]), shape) for seed in range(warm.MAX_SETS)]
        assert abs(len(warm.pack(KEY, shape, sets)) / 1024 - kib) < 0.2


def test_no_changed_byte_is_believed() -> None:
    """Guards against a corrupt file whose experts are read as if they were hot, anywhere that a byte can be wrong."""
    data = warm.pack(KEY, SHAPE, [_hot_set(1), _hot_set(2)])
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            with pytest.raises(UnusableError):
                warm.unpack(changed, KEY, SHAPE)


def test_no_truncated_or_longer_file_is_believed() -> None:
    """Guards against a file that was cut off, or written twice."""
    data = warm.pack(KEY, SHAPE, [_hot_set(1), _hot_set(2)])
    for n_bytes in range(len(data)):
        with pytest.raises(UnusableError):
            warm.unpack(data[:n_bytes], KEY, SHAPE)
    for more in (b"\0", data):
        with pytest.raises(UnusableError):
            warm.unpack(data + more, KEY, SHAPE)


def _with_checksum(content: bytes) -> bytes:
    return content + warm._COUNT.pack(warm.zlib.crc32(content))


def test_no_inconsistent_file_is_believed() -> None:
    """Guards against a file whose checksum is right and whose counts or experts are not."""
    good = warm.pack(KEY, SHAPE, [_hot_set(1)])[:-4]
    count_at = warm._HEADER.size
    huge = good[:count_at] + warm._COUNT.pack(2**32 - 1) + good[count_at + 4 :]
    fewer = good[:count_at] + warm._COUNT.pack(9) + good[count_at + 4 :]
    expert = good[:-2] + (24).to_bytes(2, "little")
    for content, why in ((huge, "ends inside"), (fewer, "2 bytes behind"), (expert, "expert 24")):
        with pytest.raises(UnusableError, match=why):
            warm.unpack(_with_checksum(content), KEY, SHAPE)
    _assert_equal(warm.unpack(_with_checksum(good), KEY, SHAPE), [_hot_set(1)])


def test_what_is_of_another_model_or_version_is_named() -> None:
    """Guards against another model's experts, and against a reason that says nothing."""
    data = warm.pack(KEY, SHAPE, [_hot_set(1)])
    with pytest.raises(UnusableError, match="another model"):
        warm.unpack(data, KEY[::-1], SHAPE)
    with pytest.raises(UnusableError, match="another model"):
        warm.unpack(data, KEY, (8, 3))
    newer = data[:8] + (2).to_bytes(4, "little") + data[12:]
    with pytest.raises(UnusableError, match="version 2, expected 1"):
        warm.unpack(newer, KEY, SHAPE)
    with pytest.raises(UnusableError, match="begins with"):
        warm.unpack(b"GGUF" + data[4:], KEY, SHAPE)


def test_a_written_file_is_private_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    """Guards against others reading what was talked about, and against a folder that fills with partial files."""
    path = tmp_path / "new" / "folder" / "a.warm"
    path.parent.mkdir(parents=True)
    stale, young = path.with_name(".b.1-0.partial"), path.with_name(".c.1-0.partial")
    for partial in (stale, young):
        partial.write_bytes(b"x")
    os.utime(stale, (0, time.time() - 2 * 3600))
    for seed in (1, 2):
        warm.write_file(path, warm.pack(KEY, SHAPE, [_hot_set(seed)]))
    _assert_equal(warm.read_file(path, KEY, SHAPE), [_hot_set(2)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == [young.name, path.name]


def test_unreadable_places_are_unusable_not_fatal(tmp_path: Path) -> None:
    """Guards against a start that waits for a pipe, or fails on a folder, where a file was expected."""
    assert warm.read_file(tmp_path / "none", KEY, SHAPE) == []
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 1 << 40)
    for path in (pipe, huge, tmp_path, pipe / "below"):
        with pytest.raises(UnusableError):
            warm.read_file(path, KEY, SHAPE)


def _write_often(path: Path, seed: int) -> None:
    for _ in range(40):
        warm.write_file(path, warm.pack(KEY, SHAPE, [_hot_set(seed, 1 + seed)]))


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    """Guards against a file of two writers' halves, and a reader that finds none while it is replaced."""
    path = tmp_path / "a.warm"
    _write_often(path, 0)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_often, args=(path, seed)) for seed in (1, 2, 3)]
    for writer in writers:
        writer.start()
    n_read = 0
    while any(writer.is_alive() for writer in writers) or n_read == 0:
        (found,) = warm.read_file(path, KEY, SHAPE)
        _assert_equal([found], [_hot_set(len(found.experts) - 1, len(found.experts))])
        n_read += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.warm"]


# ---------------------------------------------------------------- the model's key


def test_the_key_follows_the_model_not_its_file(write_model: ModelWriter, tmp_path: Path) -> None:
    """Guards against a hot set lost when a model is moved, and against one taken from another fine-tune of it."""
    path = write_model("olmoe")
    key = warm.model_key(read_model(path))
    copy = tmp_path / "other-name.gguf"
    shutil.copyfile(path, copy)
    model = read_model(copy)
    assert warm.model_key(model) == key
    (router, *_) = [t for t in model.tensors if t.name.endswith("ffn_gate_inp.weight")]
    with copy.open("r+b") as file:
        file.seek(router.offset + 5)
        byte = file.read(1)
        file.seek(router.offset + 5)
        file.write(bytes([byte[0] ^ 1]))
    assert warm.model_key(read_model(copy)) != key, "another router"
    shutil.copyfile(path, copy)
    with copy.open("ab") as file:
        file.write(b"\0" * 64)
    assert warm.model_key(read_model(copy)) != key, "another size"
    keys = {warm.model_key(read_model(write_model("olmoe", **o))) for o in ({}, {"quant": "Q8_0"}, {"n_layers": 3})}
    assert len(keys) == 3


# ---------------------------------------------------------------- nearness


def _counts(expert_of_layer: Sequence[int], n_background: int = 5) -> npt.NDArray[np.uint64]:
    counts = np.full(SHAPE, n_background, np.uint64)
    for layer, expert in enumerate(expert_of_layer):
        counts[layer, expert] += np.uint64(100)
    return counts


def test_similarity_is_of_directions_not_of_lengths() -> None:
    """Guards against a long session that looks unlike a short one of the same task, and against all looking alike."""
    a, b = warm.signature(_counts((1, 2, 3))), warm.signature(_counts((4, 5, 6)))
    assert warm.similarity(a, warm.signature(_counts((1, 2, 3)) * np.uint64(1000))) == pytest.approx(1.0)
    assert warm.similarity(a, b) < 0.0
    assert 0.2 < warm.similarity(a, warm.signature(_counts((1, 2, 6)))) < 0.8
    nothing = warm.signature(np.zeros(SHAPE, np.uint64))
    assert warm.similarity(nothing, a) == warm.similarity(nothing, nothing) == 0.0


def test_merging_replaces_the_same_task_and_drops_the_oldest() -> None:
    """Guards against a file full of one task, one that grows for ever, and one that forgets the latest first."""

    def of(expert: int, marker: int) -> HotSet:
        return HotSet(warm.signature(_counts((expert, expert, expert))), np.array([marker], np.uint32))

    sets: list[HotSet] = []
    for expert in range(7):
        sets = warm.merge(of(expert, expert), sets)
    assert [s.experts[0] for s in sets] == [6, 5, 4, 3, 2, 1, 0]
    sets = warm.merge(of(3, 20), sets)
    assert [s.experts[0] for s in sets] == [20, 6, 5, 4, 2, 1, 0]
    two_way = HotSet(warm.signature(_counts((7, 7, 0))), np.array([21], np.uint32))
    sets = warm.merge(of(7, 22), warm.merge(two_way, sets))
    assert [s.experts[0] for s in sets] == [22, 21, 20, 6, 5, 4, 2, 1], "eight are kept"


# ---------------------------------------------------------------- a session


class FakeRuntime:
    """Counts and hot slices as they are set; keeps what it was asked to preload."""

    def __init__(self) -> None:
        self.uses: list[int] = []
        self.hot: list[int] = []
        self.preloads: list[list[int]] = []

    def slice_uses(self) -> list[int]:
        return self.uses

    def hot_slices(self) -> list[int]:
        return self.hot

    def preload(self, slices: list[int]) -> None:
        self.preloads.append(slices)


@dataclasses.dataclass
class Session:
    """A warm start of a model of 3 layers of 8 experts, each with gate, up and down; no runtime."""

    warm_start: warm.WarmStart
    runtime: FakeRuntime

    def use(self, expert_of_layer: Sequence[int], n_tokens: int, n_background: int = 0) -> None:
        counts = _counts(expert_of_layer, n_background)
        counts = counts // np.uint64(100) * np.uint64(n_tokens) + np.uint64(n_background)
        self.runtime.uses = [int(n) for row in counts for _ in range(3) for n in row]
        # down first: a layer's slices in any order
        self.runtime.hot = [layer * 24 + 8 * i + e for layer, e in enumerate(expert_of_layer) for i in (2, 0, 1)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEMOE_WARM_DIR", str(tmp_path / "warm"))
    return tmp_path / "warm"


@contextlib.contextmanager
def _session(tmp_path: Path) -> Iterator[Session]:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"header" * 100)
    tensors = [
        GgufTensor(f"blk.{layer + 4}.ffn_{name}_exps.weight", (2, 2, 8), "F32", 8, 0, 100 + 8 * (3 * layer + i))
        for layer in range(3)
        for i, name in enumerate(("gate", "up", "down"))
    ]
    metadata = {"general.architecture": "a", "a.expert_count": 8, "a.expert_used_count": 1}
    runtime = FakeRuntime()
    bank = warm.Bank.of_gguf(GgufModel(path, [path], metadata, tensors))
    session = Session(warm.WarmStart(bank, runtime), runtime)  # type: ignore[arg-type]
    session.warm_start.begin()
    yield session
    session.warm_start.save()


def _slices(experts: Sequence[int]) -> list[int]:
    return [layer * 24 + 8 * i + e for layer, e in enumerate(experts) for i in range(3)]


def test_a_session_begins_with_the_latest_hot_set_and_goes_on_with_the_nearest(tmp_path: Path, folder: Path) -> None:
    """Guards against a start that is cold, warmed with the wrong experts, or decided before the prompt is known."""
    for experts in ((1, 2, 3), (4, 5, 6)):
        with _session(tmp_path) as session:
            session.use(experts, 100)
    with _session(tmp_path) as session:
        assert session.runtime.preloads == [_slices((4, 5, 6))]
        session.use((1, 2, 3), 40)
        session.warm_start.on_tokens(31)
        assert len(session.runtime.preloads) == 1, "too few tokens to tell"
        session.warm_start.on_tokens(1)
        assert session.runtime.preloads[1:] == [_slices((1, 2, 3))]
        session.warm_start.on_tokens(100)
        assert len(session.runtime.preloads) == 2, "decided once"
    with _session(tmp_path) as session:
        assert session.runtime.preloads == [_slices((1, 2, 3))], "now the latest"
        session.use((1, 2, 3), 40)
        session.warm_start.on_tokens(40)
        assert len(session.runtime.preloads) == 1, "it is the nearest"
    assert [p.suffix for p in folder.iterdir()] == [".warm"]


def test_a_short_session_is_not_remembered(tmp_path: Path, folder: Path) -> None:
    """Guards against a hot set replaced by what a few tokens have touched."""
    with _session(tmp_path) as session:
        session.use((1, 2, 3), 31)
    assert not folder.exists()
    with _session(tmp_path) as session:
        session.use((1, 2, 3), 32)
    assert len(list(folder.iterdir())) == 1


def test_an_unusable_file_is_said_once_ignored_and_replaced(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a corrupt file that stops a start, passes in silence, or stays."""
    with _session(tmp_path) as session:
        session.use((1, 2, 3), 50)
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING), _session(tmp_path) as session:
        assert session.runtime.preloads == []
        session.use((4, 5, 6), 50)
    (record,) = caplog.records
    assert "checksum" in record.getMessage() and str(path) in record.getMessage()
    with _session(tmp_path) as session:
        assert session.runtime.preloads == [_slices((4, 5, 6))]


@pytest.mark.parametrize("trouble", ["full disk", "no folder", "runtime fails"])
def test_saving_never_fails_the_close(
    trouble: str, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a model that cannot be closed because nothing can be saved, and against silence about it."""
    with _session(tmp_path) as session:
        session.use((1, 2, 3), 50)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with caplog.at_level(logging.WARNING), _session(tmp_path) as session:
        session.use((4, 5, 6), 50)
        if trouble == "full disk":

            def fail(_fd: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(os, "fsync", fail)
        elif trouble == "no folder":
            shutil.rmtree(folder)
            folder.write_bytes(b"a file in its place")
        else:
            monkeypatch.setattr(session.runtime, "hot_slices", lambda: [10**6])
    (record,) = caplog.records
    assert "cannot save" in record.getMessage()
    if trouble != "no folder":
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_place_that_cannot_be_found_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a load that fails for want of a home directory."""
    for name in ("EDGEMOE_WARM_DIR", "EDGEMOE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(Path, "home", no_home)
    with caplog.at_level(logging.WARNING), _session(tmp_path) as session:
        session.use((1, 2, 3), 50)
    (record,) = caplog.records
    assert "cannot start warm" in record.getMessage()


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against files in a place that the user did not choose."""
    monkeypatch.setenv("EDGEMOE_WARM_DIR", "/a")
    monkeypatch.setenv("EDGEMOE_CACHE_DIR", "/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert warm.default_dir() == Path("/a")
    monkeypatch.delenv("EDGEMOE_WARM_DIR")
    assert warm.default_dir() == Path("/b/warm")
    monkeypatch.delenv("EDGEMOE_CACHE_DIR")
    assert warm.default_dir() == Path("/c/edgemoe/warm")
