# SPDX-License-Identifier: MIT
"""Loading reads the dense part and leaves the experts where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgemoe import _native, host
from edgemoe.errors import BackendError
from tests.conftest import ModelWriter
from tests.integration.support import python, streamed

# 19 MiB dense, 54 MiB of experts.
SHAPE = {"n_layers": 2, "n_experts": 64, "n_experts_used": 4, "hidden": 512, "expert_ff": 512, "n_vocab": 16384}

MEASURE = """
    import ctypes, json, mmap, os, sys
    from pathlib import Path
    from tests.integration.support import set_residency, streamed
    from edgemoe import host

    def cached_bytes(path):
        # Pages of the file in the page cache, whoever brought them there.
        size = os.path.getsize(path)
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_WRITE) as view:
            pages = (ctypes.c_ubyte * -(-size // 4096))()
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
            return 4096 * sum(page & 1 for page in pages)

    def mapped_bytes(path):
        # Resident bytes of this process's mappings of the file.
        total, ours = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                ours = line.endswith(path)
            elif ours and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
        return total

    warm, path = sys.argv[1:3]
    streamed(warm).close()  # modules and libraries come from the disk too
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_bytes(path) < 1 << 20, "the page cache was not dropped"
    before, rss_before = host.storage_bytes_read(), host.process_rss_bytes()
    llm = streamed(path, logits_all=False)
    read = host.storage_bytes_read() - before
    facts = {
        "dense": llm._gguf.dense_bytes,
        "read": read,
        "reported": llm.stats().load_bytes_read,
        "rss_growth": host.process_rss_bytes() - rss_before,
        "mapped": mapped_bytes(path),
    }
    set_residency(llm, "third")
    llm.eval(list(range(300, 400)))
    facts["cached_after_eval"] = cached_bytes(path)
    facts["streamed"] = llm.stats().expert_bytes_read
    print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def cold(write_model: ModelWriter) -> Path:
    """A model whose dense part is large enough to measure; on a disk, not in memory."""
    path = write_model("olmoe", **SHAPE)
    if not host.direct_io_supported(path):
        pytest.skip(f"the file system of {path} does not read with O_DIRECT")
    return path


@pytest.fixture(scope="module")
def measured(write_model: ModelWriter, cold: Path) -> Any:
    """What a process of its own counts while it loads the cold model and streams a little."""
    done = python(MEASURE, write_model("olmoe"), cold)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_reads_the_dense_part_only(measured: Any) -> None:
    """Guards against a loader that reads the experts too, or the dense part twice."""
    assert measured["dense"] <= measured["read"] <= 1.15 * measured["dense"], measured
    assert measured["reported"] == pytest.approx(measured["read"], rel=0.05)


def test_experts_are_not_in_memory_after_loading(measured: Any) -> None:
    """Guards against expert pages that stay mapped, outside of every budget."""
    assert measured["mapped"] <= 1.1 * measured["dense"]
    assert measured["rss_growth"] <= measured["dense"] + (24 << 20)


def test_experts_never_pass_through_the_page_cache(measured: Any) -> None:
    """Guards against memory that the budget does not show but the cgroup is charged for."""
    assert measured["streamed"] > 8 << 20
    assert measured["cached_after_eval"] < 4 << 20


def test_loader_that_cannot_be_hooked(write_model: ModelWriter, cold: Path) -> None:
    """Guards against wrong bits, silence, or experts left in memory where llama.cpp's loader reads ahead."""
    script = """
        import ctypes, logging, sys
        import numpy as np
        from benchmarks import synthetic
        from edgemoe import _native, host
        from llama_cpp import llama_cpp as llama
        from tests.integration.support import logits, set_residency, stock, streamed

        logging.basicConfig(format="%(message)s")
        lib = llama._lib
        for name in ("ggml_backend_dev_by_type", "ggml_backend_dev_backend_reg"):
            getattr(lib, name).restype = ctypes.c_void_p
        registry = lib.ggml_backend_dev_backend_reg(ctypes.c_void_p(lib.ggml_backend_dev_by_type(0)))
        page = ctypes.c_void_p(registry // 4096 * 4096)
        protect = ctypes.CDLL(None).mprotect
        plugin = _native.plugin()

        class Unhookable:
            # llama.cpp's registry lies in read-only memory while the hook is placed.
            def begin_load(self, runtime):
                assert protect(page, ctypes.c_size_t(4096), 1) == 0
                hooked = plugin.begin_load(runtime)
                assert protect(page, ctypes.c_size_t(4096), 3) == 0
                assert not hooked
                return hooked

            def __getattr__(self, name):
                return getattr(plugin, name)

        _native.plugin = Unhookable
        for path, tokens in ((sys.argv[1], 512), (sys.argv[2], 16384)):
            before = host.process_rss_bytes()
            ours = streamed(path, n_threads=1)
            growth = host.process_rss_bytes() - before - ours._gguf.dense_bytes
            assert growth < 40 << 20, growth
            set_residency(ours, "cycle")
            reference = stock(path, n_threads=1, n_threads_batch=1)
            ids = synthetic.uniform_tokens(60, tokens)
            assert np.array_equal(logits(ours, ids[:50], ids[50:]), logits(reference, ids[:50], ids[50:]))
            ours.close()
            reference.close()
    """
    done = python(script, write_model("olmoe"), cold)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("could not be kept from reading") == 2


def test_other_version_of_ggml(write_model: ModelWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against struct layouts of another version: they would read and write the wrong memory."""

    class Other(_native._core.GgmlPlugin):  # type: ignore[misc, name-defined]
        def loaded(self) -> str:
            return "0.1.2"

    monkeypatch.setattr(_native._core, "GgmlPlugin", Other)
    monkeypatch.setattr(_native, "plugin", _native.plugin.__wrapped__)  # without its cache
    with pytest.raises(BackendError, match=r"ggml is 0\.1\.2, expected .*pip install llama-cpp-python==0\.3\.36"):
        streamed(write_model("olmoe"))


def test_versions_are_told() -> None:
    """Guards against a bug report without versions."""
    versions = _native.versions()
    assert versions["ggml_loaded"] == versions["ggml_built_against"]
    assert versions["llama_cpp_python"] == "0.3.36"
