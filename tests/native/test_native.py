# SPDX-License-Identifier: MIT
"""Builds the C++ tests and runs them: as shipped, under two sanitizers, and for 64-bit Arm under an emulator.

Each configuration is a preset of kernels/CMakePresets.json and builds into build/native-<preset>, which later runs
reuse. GoogleTest is compiled from the sources of Debian's libgtest-dev (or EDGEMOE_GTEST_DIR).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from edgemoe import _native

ROOT = Path(__file__).parents[2]
BINARIES = ("edgemoe_tests", "edgemoe_simd_tests", "edgemoe_allocation_test")
GTEST_DIR = Path(os.environ.get("EDGEMOE_GTEST_DIR", "/usr/src/googletest/googletest"))
BUILD_TIMEOUT_S = 1200
RUN_TIMEOUT_S = 600
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


def require(tool: str, package: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool}: apt-get install {package}")


def run(command: list[str], timeout_s: int, cwd: Path = ROOT / "kernels", isa: str = "") -> None:
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **SANITIZER_OPTIONS, **({"EDGEMOE_ISA": isa} if isa else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, f"{isa} {' '.join(command)}: exit code {result.returncode}\n{result.stdout[-12000:]}"


def build(preset: str) -> Path:
    """Configure and compile one preset; the folder of the test binaries."""
    require("cmake", "cmake")
    if not (GTEST_DIR / "src" / "gtest-all.cc").exists():
        pytest.skip(f"no GoogleTest sources in {GTEST_DIR}: apt-get install libgtest-dev, or set EDGEMOE_GTEST_DIR")
    run(["cmake", "--preset", preset, f"-DEDGEMOE_GTEST_DIR={GTEST_DIR}"], BUILD_TIMEOUT_S)
    n_jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    targets = ["edgemoe", *BINARIES] if preset == "aarch64" else list(BINARIES)
    run(["cmake", "--build", "--preset", preset, "--parallel", n_jobs, "--target", *targets], BUILD_TIMEOUT_S)
    return ROOT / "build" / f"native-{preset}"


def without_address_randomization() -> list[str]:
    """A prefix that places a program's memory where ThreadSanitizer's shadow map expects it.

    Kernels with vm.mmap_rnd_bits above 28 place it elsewhere. Containers may forbid the system call: then the
    program runs as it is.
    """
    prefix = ["setarch", platform.machine(), "-R"]
    if shutil.which("setarch") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        return []
    return prefix


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["release", "asan", "tsan"])
def test_native(preset: str) -> None:
    require("c++", "g++")
    folder = build(preset) / "tests"
    prefix = without_address_randomization() if preset == "tsan" else []
    for binary in BINARIES:
        run([*prefix, str(folder / binary), "--gtest_brief=1"], RUN_TIMEOUT_S)
    if preset == "release":
        for isa in _native.isas():
            if isa.is_supported:
                run([str(folder / "edgemoe_tests"), "--gtest_brief=1"], RUN_TIMEOUT_S, isa=isa.name)


@pytest.mark.slow
def test_native_on_64_bit_arm() -> None:
    require("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    require("qemu-aarch64-static", "qemu-user-static")
    folder = build("aarch64")
    library = (folder / "libedgemoe.so").read_bytes()
    assert library[:4] == b"\x7fELF" and int.from_bytes(library[18:20], "little") == 183, "not a library for aarch64"
    for binary in BINARIES:
        emulator = ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"]
        run([*emulator, str(folder / "tests" / binary), "--gtest_brief=1"], RUN_TIMEOUT_S)
