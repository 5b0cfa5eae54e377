# SPDX-License-Identifier: MIT
"""Code for a newer CPU must not be linked into code for all CPUs.

Each file of kernels/simd that is compiled for one instruction set may define a single symbol that others can see, its
table. In particular no weak one: an inline function of a header, compiled there with AVX-512, would be one of many
equal definitions of which the linker keeps any, and the program would die on CPUs without AVX-512, far from here.
"""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SIMD = ROOT / "kernels" / "simd"
TABLES = {
    "avx2": "kAvx2Table",
    "avx_vnni": "kAvxVnniTable",
    "avx512_vnni": "kAvx512VnniTable",
    "neon": "kNeonTable",
    "neon_dotprod": "kNeonDotprodTable",
    "neon_i8mm": "kNeonI8mmTable",
    "scalar": "kScalarTable",
}
# What GNU nm prints for weak symbols, defined or not, and for the unique ones of the GNU linker.
WEAK = set("WwVvu")


def native() -> ModuleType:
    """test_native.py, whose presets and build folders these are."""
    spec = importlib.util.spec_from_file_location("edgemoe_test_native", Path(__file__).with_name("test_native.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_objects(preset: str) -> dict[str, Path]:
    """Compile the arithmetic as that preset does; the object file of each instruction set."""
    tests = native()
    tests.require("cmake", "cmake")
    tests.run(["cmake", "--preset", preset, f"-DEDGEMOE_GTEST_DIR={tests.GTEST_DIR}"], tests.BUILD_TIMEOUT_S)
    build = ["cmake", "--build", "--preset", preset, "--target", "edgemoe_simd"]
    tests.run(build, tests.BUILD_TIMEOUT_S)
    objects = ROOT / "build" / f"native-{preset}" / "simd" / "CMakeFiles" / "edgemoe_simd.dir"
    return {stem: objects / f"{stem}.cc.o" for stem in TABLES if (objects / f"{stem}.cc.o").exists()}


def external_symbols(nm: str, path: Path) -> list[tuple[str, str]]:
    """(kind, demangled name) of what the object file offers to others, and of all its weak symbols."""
    result = subprocess.run([nm, "--demangle", str(path)], capture_output=True, text=True, check=True)
    symbols = []
    for line in result.stdout.splitlines():
        kind, name = line[17:].split(" ", 1)
        if kind in WEAK or (kind.isupper() and kind != "U"):
            symbols.append((kind, name))
    return symbols


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "compiler", "package", "nm"),
    [
        ("release", "c++", "g++", "nm"),
        ("aarch64", "aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu", "aarch64-linux-gnu-nm"),
    ],
)
def test_an_instruction_sets_file_defines_its_table_only(preset: str, compiler: str, package: str, nm: str) -> None:
    native().require(compiler, package)
    native().require(nm, "binutils")
    objects = build_objects(preset)
    assert "scalar" in objects, "no object files where CMake is thought to put them"
    for stem, path in objects.items():
        symbols = external_symbols(nm, path)
        assert [name for _, name in symbols] == [f"edgemoe::simd::{TABLES[stem]}"], f"{stem}.cc: {symbols}"
        assert symbols[0][0] not in WEAK, f"{stem}.cc: {symbols}"


def test_every_source_file_of_an_instruction_set_is_known_here() -> None:
    portable = {"cpu_features", "kernel_table", "pack", "panels", "qmoe"}
    assert {path.stem for path in SIMD.glob("*.cc")} - portable <= set(TABLES)
