# SPDX-License-Identifier: MIT
"""Who may include whom in C++, as docs/architecture.md says, and how long a source file may be.

The arrows are `simd <- core <- plugins`: a plug-in sees nothing of the core but its C ABI, the core knows neither
ggml nor Python nor a plug-in, and the arithmetic knows nobody. The Python side is import-linter's (pyproject.toml).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
MAX_LINES = 600
PUBLIC_HEADER = "edgemoe/edgemoe.h"
SCHEDULER_HEADER = "edgemoe/scheduler.h"  # the rest of the C ABI is here and in the next
SELECTION_HEADER = "edgemoe/selection.h"
C_ABI = (PUBLIC_HEADER, SCHEDULER_HEADER, SELECTION_HEADER)
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')
FOREIGN = re.compile(r"^(ggml|gguf|llama|Python\.h|nanobind|pybind|onnxruntime|cuda|omp\.h)")
LAYERS = ("simd", "core", "gpu", "plugins", "benchmarks", "tests")
# They compare with an engine, so they know its headers.
KNOW_ENGINES = ("plugins", "benchmarks")

# What of the repository each layer may include besides its own folder.
ALLOWED: dict[str, tuple[str, ...]] = {
    "include": (PUBLIC_HEADER,),
    "simd": (PUBLIC_HEADER,),
    "core": (PUBLIC_HEADER, SCHEDULER_HEADER, SELECTION_HEADER, "simd/"),
    "gpu": (PUBLIC_HEADER,),
    "plugins": (PUBLIC_HEADER,),
    "benchmarks": ("simd/",),
    "tests": (PUBLIC_HEADER, SCHEDULER_HEADER, SELECTION_HEADER, "core/", "simd/"),
}
# Headers that a plug-in may see besides: the Python module loads the others through their C ABIs, and the arithmetic of
# ONNX Runtime's own formats, which the core does not multiply, is linked into its plug-in.
ALLOWED_TO_PLUGINS = {
    ("python", "plugins/ggml/edgemoe_ggml.h"),
    ("python", "plugins/onnxruntime/edgemoe_ort.h"),
    ("onnxruntime", "simd/kernel_table.h"),
    ("onnxruntime", "simd/qmoe.h"),
}


def sources(folder: Path) -> Iterator[Path]:
    for suffix in ("*.cc", "*.h", "*.c", "*.inl", "*.cpp", "*.hpp", "*.cu"):
        yield from sorted(folder.rglob(suffix))


def includes(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = INCLUDE.match(line)
        if match:
            yield number, match[1]


def in_repository(header: str) -> bool:
    return header.startswith("edgemoe/") or header.split("/")[0] in LAYERS


def complaints(layer: str) -> Iterator[str]:
    folder = KERNELS / layer
    for path in sources(folder):
        own_plugin = path.relative_to(folder).parts[0]
        for number, header in includes(path):
            where = f"{path.relative_to(ROOT)}:{number} includes {header}"
            if layer not in KNOW_ENGINES and FOREIGN.match(header):
                yield f"{where}: only plug-ins and benchmarks may know it"
            if not in_repository(header):
                continue
            if layer == "plugins":
                allowed = header.startswith(f"plugins/{own_plugin}/") or header in C_ABI
                allowed |= (own_plugin, header) in ALLOWED_TO_PLUGINS
            else:
                allowed = header.startswith((f"{layer}/", *ALLOWED[layer]))
            if not allowed:
                yield f"{where}: {layer} may include {', '.join((layer + '/', *ALLOWED[layer]))} only"


@pytest.mark.parametrize("layer", sorted(ALLOWED))
def test_includes_follow_the_layers(layer: str) -> None:
    assert list(complaints(layer)) == []


def test_every_folder_of_the_native_root_has_a_layer() -> None:
    folders = {p.name for p in KERNELS.iterdir() if p.is_dir() and any(sources(p))}
    assert folders <= set(ALLOWED), "say in this file what the new folder may include"


@pytest.mark.parametrize(
    ("name", "includes_of_it"),
    [
        (PUBLIC_HEADER, {"stddef.h", "stdint.h"}),
        (SCHEDULER_HEADER, {PUBLIC_HEADER}),
        (SELECTION_HEADER, {PUBLIC_HEADER}),
    ],
)
def test_public_header_is_plain_c_and_short(name: str, includes_of_it: set[str]) -> None:
    header = KERNELS / "include" / name
    assert {included for _, included in includes(header)} == includes_of_it
    assert len(header.read_text(encoding="utf-8").splitlines()) <= 250
    compiler = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-x", "c"]
    command = [*compiler, "-I", str(KERNELS / "include"), str(header)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no C compiler: apt-get install gcc")
    assert result.returncode == 0, result.stderr


def test_no_source_file_is_too_long() -> None:
    try:
        listing = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no git to list the files of the repository with")
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    too_long = {}
    for name in listing.stdout.split("\0"):
        path = ROOT / name
        if name.endswith((".py", ".cc", ".h", ".inl")) and path.exists():
            n_lines = len(path.read_text(encoding="utf-8").splitlines())
            if n_lines > MAX_LINES:
                too_long[name] = n_lines
    assert too_long == {}, f"files of more than {MAX_LINES} lines do more than one thing"
